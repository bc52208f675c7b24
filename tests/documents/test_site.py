"""The documentation site, built as it is published."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.processes import ROOT

pytestmark = pytest.mark.site


class Loaded(HTMLParser):
    """Collects what a browser fetches by itself with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag != "a" and values.get("rel") != "canonical":
            self.urls += [url for name in ("src", "href", "srcset", "data") if (url := values.get(name))]
        self.urls += re.findall(r"url\(([^)]*)\)", values.get("style") or "")


@pytest.fixture(scope="module")
def site() -> Path:
    # What is fetched at build time comes to grief here.
    offline = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=100, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return ROOT / "site"


def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        folder = page.parent if page.stem == "index" else page.with_suffix("")
        name = folder.relative_to(ROOT / "docs") / "index.html"
        text = (site / name).read_text()
        assert "<h1" in text, name
        assert "--8&lt;--" not in text, name
        assert "\n:::" not in text, name


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.urls
        assert not [url for url in loaded.urls if re.match(r"\s*(\w+:)?//", url)], page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:\w+:)?//", sheet.read_text()), sheet
