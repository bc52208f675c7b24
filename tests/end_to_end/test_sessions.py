"""Logins that proxies live from, and what they write: all as processes."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.processes import ROOT, StartProxy, admin_of
from tests.support.service import Service
from tests.support.waiting import eventually

LAUNCHER = [sys.executable, str(ROOT / "run-mitmproxy.py")]


def command(environment: Mapping[str, str], folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*LAUNCHER, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("origin", [None, "given"])
def test_a_proxy_that_waits_for_credentials_picks_a_login_up_and_so_does_the_next(
    origin: str | None, start: StartProxy, base_environment: dict[str, str], tmp_path: Path, client: httpx.Client
) -> None:
    behaviour = Behaviour(lifetime=2, refresh_tokens="rotate")
    behaviour.login.interval = 0.1
    with FakeIssuer(behaviour) as issuer, Service(issuer) as service:
        given = {"OPEN_ID_REFRESH_TOKEN": issuer.refresh_token if origin else ""}
        environment = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path / "store"), **given)
        everything = base_environment | environment
        if origin is None:
            assert command(everything, tmp_path, "login").returncode == 0
        proxy = start("launcher", service.url, environment)
        assert client.get(proxy.url).status_code == 200
        issuer.end_sessions()
        eventually(lambda: client.get(proxy.url).status_code == 502)
        problem = client.get(proxy.url)
        assert problem.headers["X-OIDC-Proxy-Error"] == "credentials_rejected"
        assert "run-mitmproxy.py login" in problem.json()["detail"]

        done = command(everything, tmp_path, "login")
        assert done.returncode == 0, done.stderr
        assert client.get(proxy.url).status_code == 200
        # What was said of the rejection was said once.
        assert sum("credentials_rejected" in line for line in proxy.lines) == 1
        proxy.stop()
        if origin is not None:
            return
        again = start("launcher", service.url, environment)
        assert client.get(again.url).status_code == 200
        assert issuer.reuses == 0
        assert all(seen.authorized for seen in service.seen)
        again.stop()

        assert command(everything, tmp_path, "logout").returncode == 0
        left = command(everything | {"REMOTE_PROTECTED_DOMAIN": service.url, "PROXY_PORT": "0"}, tmp_path, "serve")
        assert (left.returncode, len(left.stderr.splitlines())) == (2, 1)
        assert "run-mitmproxy.py login" in left.stderr
        assert left.stdout == ""


def test_a_login_without_the_rejected_token_in_the_settings_heals_a_running_proxy(
    start: StartProxy, base_environment: dict[str, str], tmp_path: Path, client: httpx.Client
) -> None:
    behaviour = Behaviour(lifetime=2, refresh_tokens="rotate")
    behaviour.login.interval = 0.1
    with FakeIssuer(behaviour) as issuer, Service(issuer) as service:
        shell = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path / "store"), OPEN_ID_REFRESH_TOKEN="")
        environment = shell | {
            "OPEN_ID_REFRESH_TOKEN": issuer.refresh_token,
            "PROXY_ADMIN": "127.0.0.1:0",
        }
        proxy = start("launcher", service.url, environment | {"PROXY_WORKERS": "2"})
        ready = f"{admin_of(proxy)}/readyz"
        assert client.get(ready).status_code == 200
        issuer.end_sessions()
        eventually(lambda: client.get(ready).headers.get("X-OIDC-Proxy-Error") == "credentials_rejected")

        done = command(base_environment | shell, tmp_path, "login")
        assert done.returncode == 0, done.stderr
        eventually(lambda: client.get(ready).status_code == 200, 5)
        eventually(lambda: [client.get(proxy.url).status_code for _ in range(8)] == [200] * 8, 5)
        assert "continuing with the stored login of alice (sub u-1)" in proxy.output
        proxy.stop()

        # The token is still set, and is not sent again: its session has ended for good.
        sent_before = len(issuer.requests)
        again = start("launcher", service.url, environment)
        assert client.get(again.url).status_code == 200
        assert "continuing with the stored login of alice (sub u-1)" in again.output
        again.stop()
        assert {seen.form["refresh_token"] for seen in issuer.requests[sent_before:]}.isdisjoint(
            seen.form.get("refresh_token") for seen in issuer.requests[:sent_before]
        )
        assert issuer.reuses == 0


def test_json_lines_for_machines(
    start: StartProxy, base_environment: dict[str, str], tmp_path: Path, client: httpx.Client
) -> None:
    with FakeIssuer() as issuer:
        nowhere = "http://127.0.0.1:9"
        environment = {"REMOTE_PROTECTED_DOMAIN": nowhere, "PROXY_PORT": "0", **settings_for(issuer)}
        process = subprocess.Popen(
            [*LAUNCHER, "serve", "--log-format", "json"],
            env=base_environment | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            first = json.loads(process.stdout.readline())
            for _ in range(3):
                assert client.get(first["listener"]).status_code == 502
        finally:
            process.terminate()
            rest = [json.loads(line) for line in process.stdout]
            assert process.wait(15) == 0
            process.stdout.close()
    assert (first["level"], first["identity"], first["upstream"]) == ("info", "alice (sub u-1)", nowhere)
    assert first["message"].startswith("OIDC proxy listening at http://127.0.0.1:")
    # Three requests failed for one reason.
    assert [line["level"] for line in rest] == ["warning"]
    assert rest[0]["logger"] == "eoepca_security.proxy.addon"

    failed = command(base_environment, tmp_path, "--log-format", "json")
    assert failed.returncode == 2
    assert {json.loads(line)["level"] for line in failed.stderr.splitlines()} == {"error"}


def test_at_a_terminal_people_see_a_summary_a_qr_code_and_colours(
    base_environment: dict[str, str], tmp_path: Path
) -> None:
    with FakeIssuer() as issuer, Service(issuer) as service:
        issuer.behaviour.login.interval = 0.1
        own = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path / "store"), OPEN_ID_REFRESH_TOKEN="")
        environment = {**base_environment, **own, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
        environment |= {"REMOTE_PROTECTED_DOMAIN": service.url, "PROXY_PORT": "0", "PROXY_ADMIN": "127.0.0.1:0"}
        logged_in = at_terminal(environment, tmp_path, "login", until="Logged in as")
        assert "▀▄" in logged_in
        checked = at_terminal(environment, tmp_path, "check", until="upstream")
        assert "\x1b[32m✓ token" in checked
        served = at_terminal(environment, tmp_path, "serve", until="Ctrl-C to stop")
        assert re.search(r"listening at.*http://127\.0\.0\.1:\d+", served)
        assert re.search(r"status page.*http://127\.0\.0\.1:\d+/", served)
        assert re.search(r"try.*curl -i http://127\.0\.0\.1:\d+/", served)
        assert re.search(r"\d\d:\d\d:\d\d info +\S*admin listener at", served)
        assert "OIDC proxy listening" not in served


def at_terminal(environment: Mapping[str, str], folder: Path, verb: str, *, until: str) -> str:
    """Run a command in a terminal of its own until it has written something; returns what it wrote."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*LAUNCHER, verb], env=environment, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 60
    try:
        while until not in shown.decode(errors="replace"):
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 65536)
        return shown.decode(errors="replace")
    finally:
        process.terminate()
        process.wait(15)
        os.close(ours)
