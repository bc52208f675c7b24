"""The wings of the package: each imports only what its sentence allows. Imports run one way, from `cli` to `errors`."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.imports import imported
from tests.support.processes import ROOT

PACKAGE = ROOT / "eoepca_security"
TOOL = runpy.run_path(str(ROOT / "tools" / "wings.py"))
WINGS: dict[str, Any] = TOOL["wings"]()
BASE = {"errors", "oauth", "issuer", "session", "fastapi", "testing"}

# What waits, reads, writes, or depends on when it is called.
IO = re.compile(
    r"(asyncio|concurrent|ftplib|http|multiprocessing|os|pathlib|requests|select|selectors|shutil|smtplib|socket|"
    r"socketserver|ssl|subprocess|tempfile|threading|time|tornado|urllib\.request|urllib3|jwt\.PyJWKClient)(\.|$)"
)
OURS = "eoepca_security"


def may_import(name: str) -> set[str]:
    return {"errors", *TOOL["allowed"](name, WINGS)}


def files_of(wing: str) -> list[Path]:
    place = PACKAGE / WINGS[wing].folder
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def wing_of(module: str) -> str | None:
    """Return the wing that a module of ours belongs to; None for the packages above the wings."""
    names = module.split(".")[1:]
    names = names[1:] if names[:1] == ["proxy"] else names
    return names[0] if names and names[0] in WINGS else None


def wings_imported(file: Path) -> set[str | None]:
    ours = {name for name in imported(file) if name.split(".")[0] == OURS}
    # `from eoepca_security.proxy import cli` has the package and the wing; what is below neither is of no wing.
    packages = {name for name in ours if any(other.startswith(f"{name}.") and wing_of(other) for other in ours)}
    return {wing_of(name) for name in ours if wing_of(name) or name not in packages}


def imports_mitmproxy(file: Path) -> bool:
    return any(name.split(".")[0] == "mitmproxy" for name in imported(file))


def test_every_module_belongs_to_a_wing() -> None:
    of_wings = {file for wing in WINGS for file in files_of(wing)}
    others = {file.relative_to(PACKAGE).as_posix() for file in set(PACKAGE.rglob("*.py")) - of_wings}
    assert others == {"__init__.py", "proxy/__init__.py", "proxy/__main__.py"}


def test_the_sentences_name_only_neighbours() -> None:
    for name, wing in WINGS.items():
        assert set(wing.below) <= set(WINGS), f"{name} names a wing that does not exist"
        for neighbour in wing.below:
            farther = set().union(*(TOOL["allowed"](other, WINGS) for other in wing.below))
            assert neighbour not in farther, f"{name} names {neighbour}, which it may import by way of another"


@pytest.mark.parametrize(
    ("text", "wings"),
    [
        ("import eoepca_security.issuer.threads", {"issuer"}),
        ("def f():\n    from eoepca_security.proxy import cli", {"cli"}),
        ("if TYPE_CHECKING:\n    from eoepca_security.proxy.cli.main import main", {"cli"}),
        ("import_module('eoepca_security.fastapi.scheme')", {"fastapi"}),
        ("from eoepca_security import errors", {"errors"}),
        ("from eoepca_security import Provider", {None}),
        ("import eoepca_security", {None}),
        ("import requests", set()),
    ],
)
def test_no_way_to_import_a_wing_is_overlooked(text: str, wings: set[str | None], tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(text)
    assert wings_imported(tmp_path / "module.py") == wings


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_imports_only_what_its_sentence_allows(name: str) -> None:
    for file in files_of(name):
        wrong = wings_imported(file) - may_import(name) - {name}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}; its wing may import {sorted(may_import(name))}"


def test_the_base_knows_nothing_of_the_proxy() -> None:
    for name in BASE:
        assert may_import(name) <= BASE
        assert not WINGS[name].folder.startswith("proxy")
        assert not any(imports_mitmproxy(file) for file in files_of(name)), name
    assert wings_imported(PACKAGE / "__init__.py") <= BASE
    assert wings_imported(PACKAGE / "proxy" / "__init__.py") == set()


def test_messages_and_tokens_are_read_and_written_without_io() -> None:
    for file in (file for name in ("errors", "oauth") for file in files_of(name)):
        assert not [name for name in imported(file) if IO.match(name)], file


def test_what_decides_and_what_runs_before_mitmproxy_do_without_it() -> None:
    patches = [PACKAGE / "proxy" / "patches" / name for name in ("__init__.py", "seams.py")]
    decides = [file for name in ("policy", *may_import("policy")) for file in files_of(name)]
    for file in (*decides, *patches):
        assert not file.exists() or not imports_mitmproxy(file), file


def test_the_map_is_as_the_wings_say() -> None:
    assert TOOL["MAP"].read_text() == TOOL["svg"](), "run `uv run tools/wings.py`"
