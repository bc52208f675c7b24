"""Programs that people have, started by `exec`, by their own defaults: a token where it belongs, and nowhere else.

Run with `uv run --group interop pytest -m interop tests/interop/test_exec.py`; needs curl, git, and Debian's gdal-bin;
uses wget, and Node.js 24 or newer, if they are there.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from eoepca_security.testing import FakeIssuer
from tests.interop.kc_service import serving
from tests.support.environment import settings_for
from tests.support.processes import ROOT

pytest_plugins = ["tests.interop.eo_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

SECONDS = 60


class Files:
    """Serves files: to all, or with an issuer only to who has a token. `given` is what came in `Authorization`."""

    def __init__(self, app: ASGIApp, given: list[str | None], issuer: FakeIssuer | None) -> None:
        self._app, self._given, self._issuer = app, given, issuer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = HTTPConnection(scope).headers.get("Authorization")
        self._given.append(given)
        is_open = self._issuer is None or self._issuer.accepts((given or "").removeprefix("Bearer "))
        await (self._app if is_open else Response("Unauthorized", 401))(scope, receive, send)


@dataclass
class Setup:
    """A service that wants a token, an open one, and what each was given."""

    url: str
    open_url: str
    environment: dict[str, str]
    given: list[str | None] = field(default_factory=list)
    open_given: list[str | None] = field(default_factory=list)

    def run(self, *command: str) -> str:
        """Run a command, and return its output. Each service must have been asked, as it has to be."""
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        called = [sys.executable, str(ROOT / "run-mitmproxy.py"), "exec", "--", *command]
        done = subprocess.run(
            called, env=self.environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.given
        assert all(given and given.startswith("Bearer ") for given in self.given)
        assert self.open_given
        assert not any(self.open_given)
        return done.stdout


@pytest.fixture
def setup(eo_rasters: Path, certificate: Path, base_environment: dict[str, str], tmp_path: Path) -> Iterator[Setup]:
    given: list[str | None] = []
    open_given: list[str | None] = []
    shutil.copy(eo_rasters / "large.tif", tmp_path)
    (tmp_path / "text").write_text("hello\n")
    script = (
        "git init -q work && git -C work -c user.name=a -c user.email=a@a.example commit -q --allow-empty -m first"
        " && git clone -q --bare work repository.git && git -C repository.git update-server-info"
    )
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True, timeout=SECONDS)
    with ExitStack() as stack:
        issuer = stack.enter_context(FakeIssuer())
        files = StaticFiles(directory=tmp_path)
        url = stack.enter_context(serving(Files(files, given, issuer), certificate))
        open_url = stack.enter_context(serving(Files(files, open_given, None), certificate))
        settings = settings_for(issuer, REMOTE_PROTECTED_DOMAIN=url, TLS_CA_FILE=str(certificate))
        yield Setup(url, open_url, base_environment | settings, given, open_given)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(version: str, setup: Setup) -> None:
    assert setup.run("curl", "-sSf", version, f"{setup.url}/text", f"{setup.open_url}/text") == "hello\n" * 2


@pytest.mark.parametrize("library", ["requests", "httpx"])
def test_python(library: str, setup: Setup) -> None:
    code = f"import sys, {library}\nfor url in sys.argv[1:]: print({library}.get(url, timeout=20).text, end='')"
    shown = setup.run(sys.executable, "-c", code, f"{setup.url}/text", f"{setup.open_url}/text")
    assert shown == "hello\n" * 2


def test_gdal(setup: Setup) -> None:
    script = 'for url in "$@"; do gdalinfo "/vsicurl/$url/large.tif" || exit; done'
    shown = setup.run("sh", "-c", script, "sh", setup.url, setup.open_url)
    assert shown.count("Driver: GTiff") == 2


def test_git(setup: Setup, tmp_path: Path) -> None:
    script = 'for url in "$@"; do git ls-remote "$url/repository.git" || exit; done'
    assert len(re.findall(r"^\w+\tHEAD$", setup.run("sh", "-c", script, "sh", setup.url, setup.open_url), re.M)) == 2


def test_node(setup: Setup) -> None:
    node = shutil.which("node", path=setup.environment["PATH"])
    if node is None:
        pytest.skip("Node.js is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    if int(version[1:].partition(".")[0]) < 24:
        pytest.skip(f"Node.js {version.strip()} does not look at proxies")
    script = (
        "(async () => { for (const url of process.argv.slice(1)) {"
        " const answer = await fetch(url); if (!answer.ok) process.exit(1); process.stdout.write(await answer.text());"
        "} })()"
    )
    assert setup.run(node, "-e", script, f"{setup.url}/text", f"{setup.open_url}/text") == "hello\n" * 2


def test_wget_that_takes_the_proxy_from_the_environment_and_the_ca_as_an_option(setup: Setup) -> None:
    script = 'wget -q -O - --ca-certificate="$SSL_CERT_FILE" "$@"'
    shown = setup.run("sh", "-c", script, "sh", f"{setup.url}/text", f"{setup.open_url}/text")
    assert shown == "hello\n" * 2
