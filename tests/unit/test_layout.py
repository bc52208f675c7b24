"""How tests are arranged: what several need stands in `tests.support`, so that each can be moved and read alone."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent.parent


def imported(file: Path) -> set[str]:
    """Return the names of all modules that a file may import."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_test_imports_another_or_conftest() -> None:
    files = [*TESTS.rglob("*.py")]
    assert len(files) > 50
    for file in files:
        for name in imported(file):
            last = name.rpartition(".")[2]
            is_test = name.startswith("tests.") and last.startswith("test_")
            assert not is_test, f"{file} imports {name}"
            assert last != "conftest", f"{file} imports {name}"
