"""A mitmproxy in which something has moved: nothing starts on it, and no request passes meanwhile."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import free_port
from tests.support.processes import ROOT
from tests.support.service import Service

# Changes mitmproxy as a release of it might, and runs a program in it.
DOCTORED = """
import runpy, sys
from types import FunctionType
from mitmproxy.proxy.layers import http
from mitmproxy.proxy.layers.http import _http2

def elsewhere(function, **names):
    return FunctionType(function.__code__, function.__globals__ | names, None, function.__defaults__)

sys.path[:0] = [sys.argv.pop(1)]
exec(sys.argv.pop(1))
sys.argv = sys.argv[1:]
if sys.argv[0] == "mitmdump":
    from mitmproxy.tools.main import mitmdump
    sys.exit(mitmdump())
runpy.run_path(sys.argv[0], run_name="__main__")
"""

MOVES = {
    "gone": ("del http.HttpStream", "http.HttpStream is gone", "http_stream"),
    "other signature": (
        "_http2.Http2Client._handle_event2 = lambda self, event, conn: ()",
        "http._http2.Http2Client._handle_event2 takes (self, event, conn), not (self, event)",
        "http_clients",
    ),
    "looked up elsewhere": (
        "http.HttpLayer.make_stream = elsewhere(http.HttpLayer.make_stream)",
        "http.HttpStream is not what HttpLayer.make_stream uses",
        "http_stream",
    ),
}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(base_environment: dict[str, str], tmp_path: Path) -> Run:
    """Run a program on a mitmproxy in which something has moved, until it ends."""

    def run(move: str, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", DOCTORED, str(ROOT), move, *command],
            env=base_environment | environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def check_line(line: str, what: str, file: str) -> None:
    assert line.startswith("mitmproxy 1")
    assert f": mitmproxy.proxy.layers.{what}, which eoepca_security/proxy/patches/{file}.py needs: install" in line


@pytest.mark.parametrize("kind", MOVES)
def test_mitmdump_ends_with_a_line_and_no_request_passes_meanwhile(kind: str, run: Run) -> None:
    move, what, file = MOVES[kind]
    port, over = free_port(), threading.Event()
    with FakeIssuer() as issuer, Service(issuer) as service:

        def ask() -> None:
            with httpx.Client(trust_env=False, timeout=2) as client:
                while not over.wait(0.002):
                    try:
                        client.get(f"http://127.0.0.1:{port}/")
                    except httpx.HTTPError:
                        continue

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for thread in clients:
            thread.start()
        try:
            mode = f"reverse:{service.url}@127.0.0.1:{port}"
            script = str(ROOT / "mitmproxy-oidc-addon.py")
            result = run(move, "mitmdump", "-s", script, "--mode", mode, **settings_for(issuer))
        finally:
            over.set()
            for thread in clients:
                thread.join()
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        check_line(line, what, file)
        assert "listening" not in result.stdout
        assert service.seen == []
        assert issuer.requests == []


@pytest.mark.parametrize("kind", MOVES)
def test_the_launcher_ends_with_a_line(kind: str, run: Run) -> None:
    move, what, file = MOVES[kind]
    with FakeIssuer() as issuer:
        settings = settings_for(issuer, REMOTE_PROTECTED_DOMAIN="https://service.example", PROXY_PORT="0")
        result = run(move, str(ROOT / "run-mitmproxy.py"), **settings)
        assert (result.returncode, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        check_line(line, what, file)
        assert issuer.requests == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_launchers_line_is_json_where_its_log_is(workers: str, run: Run) -> None:
    move, what, file = MOVES["gone"]
    with FakeIssuer() as issuer:
        settings = settings_for(issuer, REMOTE_PROTECTED_DOMAIN="https://service.example", PROXY_WORKERS=workers)
        result = run(move, str(ROOT / "run-mitmproxy.py"), "serve", "--log-format", "json", **settings)
        assert (result.returncode, result.stdout) == (1, "")
        told = json.loads(result.stderr)
        assert (told["level"], told["logger"]) == ("error", "eoepca_security.proxy")
        check_line(told["message"], what, file)


def test_the_demo_ends_with_a_line(run: Run) -> None:
    move, what, file = MOVES["gone"]
    result = run(move, str(ROOT / "run-mitmproxy.py"), "demo", "--once")
    assert (result.returncode, result.stdout) == (1, "")
    check_line(result.stderr, what, file)
