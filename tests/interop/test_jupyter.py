"""A real Jupyter server behind the proxy: a kernel is started, and runs what comes over its WebSocket.

Run with `uv run --group interop pytest -m interop tests/interop/test_jupyter.py`.
"""

import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from tests.interop.kc_process import accepts, running
from tests.support.environment import settings_for
from tests.support.network import free_port
from tests.support.processes import StartProxy

pytest.importorskip("jupyter_server")

from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

CONFIGURATION = Path(__file__).with_name("jupyter_server_config.py")
SECONDS = 60.0


@pytest.fixture(scope="module")
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def jupyter(
    issuer: FakeIssuer, base_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("jupyter")
    port = free_port()
    command = [sys.executable, "-m", "jupyter_server", f"--config={CONFIGURATION}", "--ip=127.0.0.1", f"--port={port}"]
    environment = base_environment | {"HOME": str(folder), "ISSUER_KEYS": f"{issuer.url}/certs"}
    with running(command, environment, folder, folder / "jupyter.log") as child:
        child.wait_until(lambda: accepts(port), SECONDS)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def proxy(start: StartProxy, jupyter: str, issuer: FakeIssuer) -> str:
    return start("launcher", jupyter, settings_for(issuer)).url


def test_a_notebook_runs(proxy: str, jupyter: str) -> None:
    assert httpx.get(f"{jupyter}/api/me", trust_env=False).status_code == 403
    # What a browser and JupyterLab say when they came through the proxy; the server checks all of it.
    site = proxy.replace("127.0.0.1", "localhost")
    page = {"Origin": site, "Referer": f"{site}/lab", "Cookie": "_xsrf=a", "X-XSRFToken": "a"}
    with httpx.Client(base_url=site, headers=page, trust_env=False, timeout=SECONDS) as browser:
        assert browser.get("/api/me").json()["identity"]["username"] == "alice"
        started = browser.post("/api/kernels", json={"name": "python3"})
        assert started.status_code == 201, started.text
        assert started.headers["Location"] == f"/api/kernels/{started.json()['id']}"
        url = f"{site.replace('http', 'ws')}{started.headers['Location']}/channels"
        with connect(url, origin=Origin(site), open_timeout=SECONDS) as channels:
            channels.send(json.dumps(execute("print(6 * 7)")))
            output = next(message for message in messages(channels) if message["msg_type"] == "stream")
        assert output["content"]["text"] == "42\n"
        assert browser.delete(started.headers["Location"]).status_code == 204


def test_another_sites_page_starts_no_kernel(proxy: str) -> None:
    foreign = {"Origin": "https://evil.example", "Cookie": "_xsrf=a", "X-XSRFToken": "a"}
    answer = httpx.post(f"{proxy}/api/kernels", json={}, headers=foreign, trust_env=False, timeout=SECONDS)
    assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (403, "cross_site_request")


def execute(code: str) -> dict[str, Any]:
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "execute_request",
        "session": "s",
        "username": "",
        "version": "5.3",
    }
    content = {"code": code, "silent": False}
    return {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}


def messages(channels: ClientConnection) -> Iterator[dict[str, Any]]:
    while True:
        yield json.loads(channels.recv(timeout=SECONDS))
