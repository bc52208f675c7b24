"""What a module imports, read from its text."""

import ast
from pathlib import Path


def imported(file: Path) -> set[str]:
    """Return the names of all modules that a file may import, in functions and for type checkers, too.

    Of `from a import b`, it has both `a` and `a.b`, which may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file}:{node.lineno}: a relative import"
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {
                name.value for name in node.args if isinstance(name, ast.Constant) and isinstance(name.value, str)
            }
    return names
