"""The documentation's pictures can be taken of the product as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

pytestmark = pytest.mark.browser


def test_the_pictures_are_taken_of_the_running_product(tmp_path: Path) -> None:
    pytest.importorskip("selenium")
    command = [sys.executable, str(ROOT / "tools" / "screenshots.py"), str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    taken = {picture.name: picture.read_bytes() for picture in tmp_path.iterdir()}
    assert set(taken) == {picture.name for picture in (ROOT / "docs" / "assets" / "screenshots").iterdir()}
    for name, text in (("login.svg", b"alice"), ("check.svg", b"upstream"), ("serve.svg", b"forwarding")):
        assert text in taken[name]
    assert all(content.startswith((b"<svg", b"RIFF")) for content in taken.values())
