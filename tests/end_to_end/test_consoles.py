"""The add-on's commands in the user interfaces of mitmproxy itself, as they come."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import free_port
from tests.support.processes import ROOT, ProxyProcess, run_process
from tests.support.service import Service
from tests.support.waiting import eventually

WEB = re.compile(r"Web server listening at (http://\S+)")


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer() as issuer:
        issuer.behaviour.claims |= {"preferred_username": "alice"}
        yield issuer


@pytest.fixture
def service(issuer: FakeIssuer) -> Iterator[Service]:
    with Service(issuer) as service:
        yield service


def command_line(program: str, service: Service, *more: str) -> list[str]:
    path = str(Path(sys.executable).parent / program)
    mode = f"reverse:{service.url}@127.0.0.1:0"
    return [path, "-s", str(ROOT / "mitmproxy-oidc-addon.py"), "--mode", mode, *more]


def secrets(issuer: FakeIssuer) -> set[str]:
    return {*issuer._issued, *(token.rpartition(".")[2] for token in issuer._issued), issuer.refresh_token}


def test_mitmweb_runs_the_commands(
    issuer: FakeIssuer, service: Service, base_environment: dict[str, str], tmp_path: Path
) -> None:
    command = command_line("mitmweb", service, "--no-web-open-browser", "--web-port", str(free_port()))
    web = ProxyProcess(run_process(command, base_environment | settings_for(issuer), tmp_path))
    try:
        match = web.wait_for(WEB)
        assert match, web.output
        # That the same is in cookie and header is all that mitmweb wants; the cookie's name differs between versions.
        headers = {"X-XSRFToken": "a" * 32, "Cookie": f"_xsrf={'a' * 32}; _mitmproxy_xsrf={'a' * 32}"}
        with httpx.Client(trust_env=False, timeout=20) as client:
            url = httpx.URL(match[1])  # with a token from version 12 on

            def run(name: str) -> dict[str, list[str]]:
                response = client.post(url.copy_with(path=f"/commands/{name}"), headers=headers, json={"arguments": []})
                assert response.status_code == 200, response.text
                return dict(response.json())

            eventually(lambda: run("oidc.status")["value"][0] == "Ready: Requests get a token.")
            told = run("oidc.status")["value"]
            assert f"forwarding to: {service.url}" in told
            assert any(line.startswith("identity: alice") for line in told)
            assert run("oidc.refresh") == {"value": None}
            log = url.copy_with(path="/events")
            eventually(lambda: "new access token for alice" in client.get(log).text)
            assert "no refresh now; try again in" in str(run("oidc.refresh")["error"])
            assert len(issuer.requests) == 2
            shown = client.get(log).text + str(told) + client.get(url.copy_with(path="/commands")).text
        assert not [secret for secret in secrets(issuer) if secret in shown]
    finally:
        web.stop()


class Terminal:
    """What a program has written to a terminal of 40 lines, without the colours and movements."""

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        os.close(theirs)
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._written += os.read(self._ours, 65536)
            except OSError:  # the other end is closed
                return

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def text(self) -> str:
        return re.sub(
            r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])|[\x0e\x0f]", "", self._written.decode(errors="replace")
        )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(15)
        os.close(self._ours)
        self._reader.join(15)


@contextmanager
def terminal(command: list[str], environment: Mapping[str, str], folder: Path) -> Iterator[Terminal]:
    shown = Terminal(command, environment, folder)
    try:
        yield shown
    finally:
        shown.close()


@pytest.mark.interop
def test_mitmproxys_console_shows_them(
    issuer: FakeIssuer, service: Service, base_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = base_environment | settings_for(issuer) | {"TERM": "xterm", "LANG": "C.UTF-8"}
    with terminal(command_line("mitmproxy", service), environment, tmp_path) as console:
        eventually(lambda: "OIDC proxy listening" in console.text(), timeout=60)
        console.type(":oidc.status\r")
        eventually(lambda: "Ready: Requests get a token." in console.text())
        eventually(lambda: "identity: alice" in console.text())
        console.type("q:oidc.refresh\r")
        eventually(lambda: "new access token for alice" in console.text())
        console.type(":oidc.refresh\r")
        eventually(lambda: "no refresh now" in console.text())
        assert len(issuer.requests) == 2
        assert not [secret for secret in secrets(issuer) if secret in console.text()]
