"""How tests are arranged: what several need stands in `tests.support`, so that each can be moved and read alone."""

from pathlib import Path

from tests.support.imports import imported

TESTS = Path(__file__).parent.parent


def test_no_test_imports_another_or_conftest() -> None:
    files = [*TESTS.rglob("*.py")]
    assert len(files) > 50
    for file in files:
        for name in imported(file):
            last = name.rpartition(".")[2]
            is_test = name.startswith("tests.") and last.startswith("test_")
            assert not is_test, f"{file} imports {name}"
            assert last != "conftest", f"{file} imports {name}"
