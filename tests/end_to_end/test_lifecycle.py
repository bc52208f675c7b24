"""No session lost, no request stalled: the real proxy against strict, slow, failing issuers, killed and shared."""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.environment import settings_for
from tests.support.processes import ROOT, ProxyProcess, StartProxy
from tests.support.service import Service
from tests.support.waiting import eventually

Answers = list[tuple[int, float]]


def load(urls: list[str], seconds: float, pace: float = 0.02) -> Answers:
    """Let a client for each URL ask for some seconds; return status and latency of each answer."""

    def ask(url: str) -> Answers:
        answers: Answers = []
        end = time.monotonic() + seconds
        with httpx.Client(trust_env=False, timeout=20) as client:
            while not answers or time.monotonic() < end:
                response = client.get(url)
                answers.append((response.status_code, response.elapsed.total_seconds()))
                time.sleep(pace)
        return answers

    with concurrent.futures.ThreadPoolExecutor(len(urls)) as pool:
        return [answer for answers in pool.map(ask, urls) for answer in answers]


def fails(handler: Handler) -> bool:
    handler.answer(503, {})
    return True


@pytest.mark.parametrize("seconds", [8, pytest.param(20, marks=pytest.mark.soak)])
def test_a_slow_issuer_stalls_nobody(seconds: int, start: StartProxy) -> None:
    with FakeIssuer(Behaviour(lifetime=6, delay=1.5)) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer))
        before = len(issuer.requests)
        answers = load([proxy.url] * 8, seconds, pace=0.1)
        assert {status for status, _ in answers} == {200}
        # Nobody waited for a refresh; the tighter bound is for a run on its own.
        assert max(latency for _, latency in answers) < (0.7 if seconds == 20 else 1.4)
        # JWTs count whole seconds, so their six are five and a half.
        assert len(issuer.requests) - before <= 1.3 * seconds / 5.5 + 1
        assert all(seen.authorized for seen in service.seen)


def test_an_issuer_that_is_down_is_noticed_by_nobody_while_the_token_lives_and_is_not_hammered_after(
    start: StartProxy,
) -> None:
    with FakeIssuer(Behaviour(lifetime=6)) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer))
        began = time.time()
        down: list[float] = []
        issuer.behaviour.fault = lambda handler: bool(down.append(time.time())) or fails(handler)  # type: ignore[func-returns-value]
        assert {status for status, _ in load([proxy.url] * 2, 3)} == {200}
        # Up again for just long enough before the token ends.
        eventually(lambda: len(down) >= 1 or time.time() > began + 4.4)
        issuer.behaviour.fault = None
        assert {status for status, _ in load([proxy.url] * 2, 4)} == {200}

        issuer.behaviour.fault = fails
        eventually(lambda: httpx.get(proxy.url, trust_env=False).status_code == 503, timeout=20)
        seen: list[str] = []
        issuer.behaviour.fault = lambda handler: bool(seen.append(handler.command)) or fails(handler)  # type: ignore[func-returns-value]
        statuses = {status for status, _ in load([proxy.url] * 4, 6)}
        assert statuses == {503}
        assert len(seen) <= 8
        assert all(seen.authorized for seen in service.seen)


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.soak)])
def test_kills_lose_no_session(kills: int, start: StartProxy, tmp_path: Path) -> None:
    with FakeIssuer(Behaviour(lifetime=1, refresh_tokens="rotate")) as issuer, Service(issuer) as service:
        environment = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path / "store"))
        for number in range(kills):
            proxy = start("launcher", service.url, environment)
            assert proxy.url, proxy.output
            assert {status for status, _ in load([proxy.url], 0.05 + 0.05 * (number % 5))} == {200}
            proxy.process.kill()
            proxy.wait_until_ended()
        assert issuer.reuses == 0
        assert all(seen.authorized for seen in service.seen)


@pytest.mark.parametrize("seconds", [5, pytest.param(12, marks=pytest.mark.soak)])
def test_processes_share_one_rotating_session(seconds: int, start: StartProxy, tmp_path: Path) -> None:
    with FakeIssuer(Behaviour(lifetime=3, refresh_tokens="rotate")) as issuer, Service(issuer) as service:
        environment = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path / "store"))
        proxies = [start("launcher", service.url, environment, wait=False) for _ in range(4)]
        urls = [proxy.wait_until_started().url for proxy in proxies]
        assert all(urls)
        before = len(issuer.requests)
        assert {status for status, _ in load(urls, seconds)} == {200}
        assert issuer.reuses == 0
        # Shared, not one each: four proxies need little more than one does.
        assert len(issuer.requests) - before <= 2 * seconds / 2
        assert all(seen.authorized for seen in service.seen)


def test_a_session_that_is_over_heals_when_the_store_gets_a_new_one(
    start: StartProxy, tmp_path: Path, client: httpx.Client
) -> None:
    with FakeIssuer(Behaviour(lifetime=2, refresh_tokens="rotate")) as issuer, Service(issuer) as service:
        environment = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path))
        proxy = start("launcher", service.url, environment)
        issuer.end_sessions()
        eventually(lambda: client.get(proxy.url).status_code == 502)
        # So long that the retries have become rare.
        assert {status for status, _ in load([proxy.url], 5)} == {502}
        (file,) = tmp_path.glob("*.json")
        content = json.loads(file.read_text()) | {"refresh_token": issuer.new_session()}
        file.write_text(json.dumps(content))
        assert client.get(proxy.url).status_code == 200


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        # The end of the terminal, unless the tests themselves are to outlive that.
        pytest.param(
            signal.SIGHUP,
            marks=pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL, reason="run by nohup"),
        ),
    ],
)
def test_a_stop_waits_for_a_refresh_whose_answer_has_the_only_token(
    number: signal.Signals, start: StartProxy, tmp_path: Path
) -> None:
    with FakeIssuer(Behaviour(lifetime=2, refresh_tokens="rotate")) as issuer, Service(issuer) as service:
        environment = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path))
        proxy = start("launcher", service.url, environment)
        before = len(issuer.requests)
        issuer.behaviour.delay = 1
        load([proxy.url], 0.1)
        eventually(lambda: bool(load([proxy.url], 0.05)) and len(issuer.requests) > before)
        proxy.process.send_signal(number)
        assert proxy.wait_until_ended(15) == 0
        issuer.behaviour.delay = 0
        assert start("launcher", service.url, environment).url
        assert issuer.reuses == 0


SIGNAL_AT_IMPORT = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("at", ["eoepca_security.proxy.runtime.serve", "mitmproxy.tools.dump"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_proxy_still_loads_is_one_in_order(
    number: signal.Signals, at: str, workers: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_AT_IMPORT)
    with FakeIssuer() as issuer:
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        environment = settings_for(issuer, AT=at, NUMBER=str(int(number)), PYTHONPATH=path, PROXY_WORKERS=workers)
        environment["REMOTE_PROTECTED_DOMAIN"] = "http://127.0.0.1:9"
        command = [sys.executable, str(ROOT / "run-mitmproxy.py")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        assert not issuer.requests


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_proxy_that_has_nowhere_to_log_to_serves_all_the_same(
    workers: str, base_environment: dict[str, str], tmp_path: Path, client: httpx.Client
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with FakeIssuer() as issuer, Service(issuer) as service:
        environment = base_environment | settings_for(issuer, PROXY_WORKERS=workers, PROXY_PORT=str(port))
        environment["REMOTE_PROTECTED_DOMAIN"] = service.url
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, str(ROOT / "run-mitmproxy.py")]
        with subprocess.Popen(command, env=environment, cwd=tmp_path) as process:

            def answers() -> bool:
                assert process.poll() is None
                with contextlib.suppress(httpx.TransportError):
                    return client.get(f"http://127.0.0.1:{port}").status_code == 200
                return False

            eventually(answers)
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0


@pytest.mark.parametrize("used_up", [False, True])
def test_an_answer_that_is_cut_off_heals_unless_it_had_the_only_token(
    used_up: bool, start: StartProxy, tmp_path: Path, client: httpx.Client
) -> None:
    cut: list[str] = []

    def cut_off(handler: Handler) -> bool:
        """Read the token request, use the refresh token up or not, and hang up in the middle of the answer."""
        if handler.command != "POST" or cut:
            return False
        body = handler.read_body()
        cut.append(body.decode())
        if used_up:
            issuer.answer_token_request(None, body)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
        handler.close_connection = True
        return True

    with FakeIssuer(Behaviour(lifetime=2, refresh_tokens="rotate")) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path)))
        issuer.behaviour.fault = cut_off
        if used_up:
            eventually(lambda: client.get(proxy.url).status_code == 502)
            answer = client.get(proxy.url)
            assert answer.headers["X-OIDC-Proxy-Error"] == "credentials_rejected"
            assert "answer to the previous refresh was lost" in answer.json()["detail"]
            assert "login" in answer.json()["detail"]
        else:
            # Asked again while the token before still lives: nobody notices.
            assert {status for status, _ in load([proxy.url], 4)} == {200}
            assert issuer.reuses == 0
        assert len(cut) == 1


@pytest.mark.soak
def test_a_minute_of_faults_loses_nothing(start: StartProxy, tmp_path: Path) -> None:
    chance = random.Random(1)
    faults: list[str] = []

    def fault(handler: Handler) -> bool:
        """Fail before anything is used up: one in three exchanges, in one of four ways."""
        kind = chance.choice(["none"] * 8 + ["error", "garbage", "hang up", "slow"])
        faults.append(kind)
        if kind == "error":
            handler.answer(503, {}, {"Retry-After": "1"})
        elif kind == "garbage":
            handler.answer(200, b"<html>")
        elif kind == "hang up":
            handler.close_connection = True
        elif kind == "slow":
            time.sleep(1)
        return kind in ("error", "garbage", "hang up")

    with FakeIssuer(Behaviour(lifetime=3, refresh_tokens="rotate")) as issuer, Service(issuer) as service:
        environment = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(tmp_path))
        urls = [start("launcher", service.url, environment).url for _ in range(2)]
        issuer.behaviour.fault = fault
        answers = load(urls * 2, 60)
        assert {status for status, _ in answers} <= {200, 503}
        assert max(latency for _, latency in answers) < 15
        assert sum(status == 200 for status, _ in answers) > 0.8 * len(answers)
        assert issuer.reuses == 0
        assert all(seen.authorized for seen in service.seen)
        assert {"error", "garbage", "hang up", "slow"} <= set(faults)
        issuer.behaviour.fault = None
        assert {status for status, _ in load(urls, 5)[-10:]} == {200}


# --- a service that refuses a token ------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_request_that_is_refused_is_sent_once_more_with_a_new_token(
    entry: str, start: StartProxy, client: httpx.Client
) -> None:
    with FakeIssuer() as issuer, Service(issuer) as service:
        proxy = start(entry, service.url, settings_for(issuer))
        assert client.get(proxy.url).status_code == 200
        issuer.forget_access_tokens()
        response = client.post(proxy.url, content=b"x" * 1000)
        assert (response.status_code, response.json()["length"]) == (200, 1000)
        assert [seen.authorized for seen in service.seen] == [True, False, True]
        # Refused again so soon, the service's answer is passed on, and the issuer is left alone.
        issuer.forget_access_tokens()
        before = len(issuer.requests)
        assert [client.get(proxy.url).status_code for _ in range(3)] == [401] * 3
        assert len(issuer.requests) == before


def test_requests_that_are_refused_together_share_one_refresh(start: StartProxy) -> None:
    with FakeIssuer() as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer))
        issuer.forget_access_tokens()
        issuer.behaviour.delay = 0.5
        before = len(issuer.requests)
        with httpx.Client(trust_env=False, timeout=20) as client, concurrent.futures.ThreadPoolExecutor(10) as pool:
            assert list(pool.map(lambda _: client.get(proxy.url).status_code, range(10))) == [200] * 10
        assert len(issuer.requests) - before == 1


# --- a store that is not as it should be -------------------------------------------------------------------------


def empty(folder: Path, file: Path) -> None:
    file.write_bytes(b"")


def folder_in_its_place(folder: Path, file: Path) -> None:
    file.unlink()
    file.mkdir()


def occupied(folder: Path, file: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("a file")


@pytest.mark.parametrize("spoil", [empty, folder_in_its_place, occupied])
def test_a_spoilt_store_is_told_of_and_the_proxy_works(
    spoil: Callable[[Path, Path], None], start: StartProxy, tmp_path: Path, client: httpx.Client
) -> None:
    folder = tmp_path / "store"
    with FakeIssuer() as issuer, Service(issuer) as service:
        environment = settings_for(issuer, OPEN_ID_TOKEN_STORE=str(folder))
        first: ProxyProcess = start("launcher", service.url, environment)
        assert first.stop() == 0
        (file,) = folder.glob("*.json")
        spoil(folder, file)
        proxy = start("launcher", service.url, environment)
        assert client.get(proxy.url).status_code == 200
        assert proxy.output.count("only in memory") == 1
        assert str(folder) in proxy.output
        assert "Traceback" not in proxy.output
