"""The table in docs/issuers.md: the tests write down what ran, and this compares it with what the page says.

`python tests/interop/issuer_table.py RESULTS docs/issuers.md` fails where they differ; `--write` writes the page.
Issuers that have to be built run less often, and have a table of their own: `--slow` chooses that one.
"""

import difflib
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

BEGIN = "<!-- What ran: written by tests/interop/issuer_table.py, do not edit. -->"
BEGIN_SLOW = "<!-- What ran with --all: written by tests/interop/issuer_table.py, do not edit. -->"
END = "<!-- The end of what ran. -->"
FOLDER = "ISSUER_RESULTS"  # the environment variable that names the folder of the results

# Two tables: one with all of them is wider than a page.
HALF = 6  # columns of the first one
COLUMNS = {
    "test_discovery": "Discovery",
    "test_login_by_device": "Login by device",
    "test_login_by_browser": "Login by browser",
    "test_refresh": "Refresh",
    "test_rotation": "Rotation, reuse",
    "test_logout": "Logout",
    "test_revocation": "Revocation",
    "test_key_rotation": "New keys",
    "test_scheme": "`OIDCProxyScheme`",
    "test_client_authentication": "Client authentication",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """As a plugin: write down what a scenario came to, in a file for each issuer."""
    report = yield
    callspec = getattr(item, "callspec", None)
    column = getattr(item, "originalname", "")
    if (
        FOLDER in os.environ
        and callspec is not None
        and column in COLUMNS
        and (report.when == "call" or not report.passed)
    ):
        path = Path(os.environ[FOLDER]) / f"{callspec.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        results = json.loads(path.read_text()) if path.exists() else {}
        said = dict(item.user_properties).get("says", "yes")
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        results[column] = {"passed": said, "skipped": f"- {reason}"}.get(report.outcome, "failed")
        path.write_text(json.dumps(results))
    return report


def table(folder: Path) -> str:
    """What ran, as Markdown: two tables with a row for each issuer, and why something was not for it."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.name.lower())
    issuers = {path.stem: json.loads(path.read_text()) for path in paths}
    columns = list(COLUMNS)
    halves = [_half(issuers, part) for part in (columns[:HALF], columns[HALF:])]
    notes = [
        f"- {name}, {COLUMNS[column]}: {results[column].removeprefix('- ')}."
        for name, results in issuers.items()
        for column in columns
        if results.get(column, "").startswith("- ")
    ]
    return "\n".join([*halves[0], "", *halves[1], "", *notes]).rstrip()


def _half(issuers: dict[str, dict[str, str]], columns: list[str]) -> list[str]:
    lines = [f"| Issuer | {' | '.join(COLUMNS[column] for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, results in issuers.items():
        cells = [results.get(column, "did not run") for column in columns]
        lines.append(f"| {name} | {' | '.join('—' if cell.startswith('- ') else cell for cell in cells)} |")
    return lines


def main(arguments: list[str]) -> int:
    results, page = (Path(argument) for argument in arguments[:2])
    before = page.read_text()
    begin = BEGIN_SLOW if "--slow" in arguments else BEGIN
    head, _, rest = before.partition(begin)
    _, _, tail = rest.partition(END)
    after = f"{head}{begin}\n\n{table(results)}\n\n{END}{tail}"
    if "--write" in arguments:
        page.write_text(after)
        return 0
    if before != after:
        print(
            *difflib.unified_diff(before.splitlines(), after.splitlines(), str(page), "what ran", lineterm=""), sep="\n"
        )
    return before != after


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
