import asyncio
import gc
import importlib.util
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from eoepca_security import SettingsError
from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.fastapi import bearer, get
from tests.support.processes import ROOT, ProxyProcess, run_process
from tests.support.service import Service

EXAMPLE = ROOT / "example" / "app.py"
STARTED = re.compile(r"Uvicorn running on http://0\.0\.0\.0:(\d+)")


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(
        Behaviour(refresh_tokens="rotate", lifetime=2), client_id="gateway", client_secret="secret-of-the-gateway"
    ) as issuer:
        yield issuer


@pytest.fixture
def service(issuer: FakeIssuer) -> Iterator[Service]:
    with Service(issuer) as service:
        yield service


def environment_of(issuer: FakeIssuer, service: Service, **more: str) -> dict[str, str]:
    return {
        "OPEN_ID_CONNECT_URL": issuer.url,
        "OPEN_ID_CONNECT_CLIENT_ID": issuer.client_id,
        "OPEN_ID_CONNECT_CLIENT_SECRET": issuer.client_secret or "",
        "OPEN_ID_CONNECT_AUDIENCE": "service",
        "REMOTE_PROTECTED_ENDPOINT": f"{service.url}/protected",
        **more,
    }


def load(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("URL", "CLIENT_ID", "CLIENT_SECRET", "AUDIENCE"):
        monkeypatch.delenv(f"OPEN_ID_CONNECT_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("example_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def until(condition: Any) -> None:
    async with asyncio.timeout(15):
        while not condition():  # noqa: ASYNC110  what it waits for happens in other threads
            await asyncio.sleep(0.02)


def test_it_runs_as_the_readme_says(
    issuer: FakeIssuer, service: Service, base_environment: dict[str, str], client: httpx.Client
) -> None:
    command = [str(Path(sys.executable).parent / "fastapi"), "dev", "example/app.py", "--host=0.0.0.0", "--port=0"]
    command += ["--root-path=/behind", "--no-reload"]
    process = ProxyProcess(run_process(command, base_environment | environment_of(issuer, service), ROOT))
    try:
        match = process.wait_for(STARTED)
        assert match, process.output
        url = f"http://127.0.0.1:{match[1]}"
        token = issuer.issue()

        refused = client.get(url)
        greeted = client.get(url, headers={**bearer(token), "X-Refresh-Token": issuer.refresh_token})

        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert greeted.json() == {"message": "Hello, alice!", "remote": "answered 200"}
        assert [(seen.target, seen.authorization) for seen in service.seen] == [("/protected", [f"Bearer {token}"])]
        assert client.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/behind"}]
    finally:
        process.process.send_signal(signal.SIGINT)
        code = process.wait_until_ended()
    # A task that would go on for minutes does not hold up the end.
    assert code in (0, -signal.SIGINT, 128 + signal.SIGINT), process.output
    assert not any(secret in process.output for secret in (token, issuer.refresh_token, "secret-of-the-gateway"))


# A call that is cancelled while it connects leaves its connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_it_goes_on_calling_with_fresh_tokens(
    issuer: FakeIssuer, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    example = load(environment_of(issuer, service), monkeypatch)
    monkeypatch.setattr(example, "INTERVAL", 0.05)
    caplog.set_level("INFO")
    token = issuer.issue(exp=int(time.time()) + 2)
    headers = {**bearer(token), "X-Refresh-Token": issuer.refresh_token}
    async with example.app.router.lifespan_context(example.app):
        answers = [await get(example.app, headers) for _ in range(3)]
        await until(lambda: service.seen[-1].authorization != [f"Bearer {token}"])
        await until(lambda: len(issuer.requests) > 1)
        assert len(example.tasks) == 1

    gc.collect()
    assert example.tasks == {}
    assert {answer.json()["remote"] for answer in answers} == {"answered 200"}
    assert all(seen.authorized for seen in service.seen)
    assert issuer.reuses == 0
    assert {request.form["grant_type"] for request in issuer.requests} == {"refresh_token"}
    shown = caplog.text + "".join(answer.text for answer in answers)
    assert "on behalf of 'u-1': answered 200" in shown
    used = [part for seen in service.seen for part in seen.authorization[0].split(" ")[1].split(".")[1:]]
    assert not any(secret in shown for secret in [*used, *(r.form["refresh_token"] for r in issuer.requests)])


async def test_without_a_refresh_token_it_ends_with_the_access_token(
    issuer: FakeIssuer, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    example = load(environment_of(issuer, service), monkeypatch)
    monkeypatch.setattr(example, "INTERVAL", 0.05)
    async with example.app.router.lifespan_context(example.app):
        answer = await get(example.app, bearer(issuer.issue(exp=int(time.time()) + 1)))
        await until(lambda: not example.tasks)

    assert answer.json()["message"] == "Hello, alice!"
    assert "the gateway sent no refresh token" in caplog.text
    assert issuer.requests == []


async def test_the_other_service_may_fail(
    issuer: FakeIssuer, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = load(environment_of(issuer, service), monkeypatch)
    closed = load(environment_of(issuer, service, REMOTE_PROTECTED_ENDPOINT="http://127.0.0.1:1/"), monkeypatch)
    alone = load(environment_of(issuer, service, REMOTE_PROTECTED_ENDPOINT=""), monkeypatch)
    monkeypatch.setattr(issuer, "accepts", lambda _token: False)

    for example, remote in ((moved, "answered 401"), (closed, "not reached (ConnectError)"), (alone, None)):
        async with example.app.router.lifespan_context(example.app):
            answer = await get(example.app, bearer(issuer.issue()))
        assert (answer.status_code, answer.json().get("remote")) == (200, remote)


def test_its_settings_have_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="OPEN_ID_CONNECT_URL and OPEN_ID_CONNECT_CLIENT_ID"):
        load({}, monkeypatch)


@pytest.mark.parametrize("audience", ["", "service"])
async def test_it_tells_to_set_the_audience(
    audience: str,
    issuer: FakeIssuer,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    example = load(environment_of(issuer, service, OPEN_ID_CONNECT_AUDIENCE=audience), monkeypatch)
    async with example.app.router.lifespan_context(example.app):
        assert ("OPEN_ID_CONNECT_AUDIENCE is not set" in caplog.text) is (audience == "")
