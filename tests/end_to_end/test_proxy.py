"""The proxy as a process, under both of its entry points, before a service that knows good tokens from bad ones."""

import concurrent.futures
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.environment import settings_for
from tests.support.processes import ROOT, ProxyProcess, StartProxy
from tests.support.service import Service
from tests.support.waiting import eventually

AWKWARD_SECRET = "s: %+é&=~/?"


@dataclass
class Setup:
    issuer: FakeIssuer
    service: Service
    proxy: ProxyProcess

    @property
    def url(self) -> str:
        return self.proxy.url


@pytest.fixture(scope="module", params=["launcher", "addon"])
def setup(request: pytest.FixtureRequest, start: StartProxy) -> Iterator[Setup]:
    with FakeIssuer(client_secret=AWKWARD_SECRET) as issuer, Service(issuer) as service:
        yield Setup(issuer, service, start(request.param, service.url, settings_for(issuer)))


def test_a_request_arrives_with_a_token_and_its_answer_comes_back(setup: Setup, client: httpx.Client) -> None:
    response = client.get(f"{setup.url}/some/path?q=1")
    assert (response.status_code, response.json()["path"]) == (200, "/some/path?q=1")
    assert setup.service.seen[-1].authorized


def test_ten_requests_within_a_lifetime_cost_one_token_request(setup: Setup, client: httpx.Client) -> None:
    assert [client.get(setup.url).status_code for _ in range(10)] == [200] * 10
    assert len(setup.issuer.requests) == 1


def test_the_clients_own_authorization_is_replaced(setup: Setup, client: httpx.Client) -> None:
    headers = [("Authorization", "Basic eDp5"), ("AUTHORIZATION", "Bearer forged"), ("X-Other", "kept")]
    assert client.get(setup.url, headers=headers).status_code == 200
    seen = setup.service.seen[-1]
    assert (seen.authorized, len(seen.authorization), seen.headers["X-Other"]) == (True, 1, "kept")


def test_bodies_and_methods_pass(setup: Setup, client: httpx.Client) -> None:
    assert client.post(setup.url, content=b"x" * 70_000).json()["length"] == 70_000
    for method in ("HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, setup.url).status_code == 200
        assert (setup.service.seen[-1].method, setup.service.seen[-1].authorized) == (method, True)


def test_an_absolute_target_names_no_other_host(setup: Setup) -> None:
    before = len(setup.service.seen)
    for target, host, status in (("evil.example", "localhost", 403), ("localhost", "localhost", 200)):
        answer = raw_exchange(setup.url, f"GET http://{target}/x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert [(seen.target, seen.headers["Host"]) for seen in setup.service.seen[before:]] == [
        ("/x", urlsplit(setup.service.url).netloc)
    ]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00\xff\x17 nothing like HTTP\r\n\r\n",
    ],
)
def test_what_is_no_proper_request_reaches_the_service_with_a_token_or_not_at_all(
    setup: Setup, request_bytes: bytes
) -> None:
    before = len(setup.service.seen)
    raw_exchange(setup.url, request_bytes)
    assert all(seen.authorized for seen in setup.service.seen[before:])


def test_the_start_line_names_listener_service_identity_and_lifetime(setup: Setup) -> None:
    line = next(line for line in setup.proxy.lines if "OIDC proxy listening" in line)
    for part in (setup.url, setup.service.url, "alice", "u-1", "60 s"):
        assert part in line


def test_no_token_and_no_secret_is_printed(setup: Setup, client: httpx.Client) -> None:
    client.get(setup.url)
    token = setup.service.seen[-1].authorization[0].removeprefix("Bearer ")
    for secret in (token, token.rpartition(".")[2], setup.issuer.refresh_token, AWKWARD_SECRET):
        assert secret not in setup.proxy.output


def raw_exchange(url: str, request: bytes, timeout: float = 15) -> bytes:
    """Send bytes and return what comes back until a second of silence or the end."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
                connection.settimeout(1)
        except TimeoutError:
            assert answer, "the client was left hanging"
        except ConnectionResetError:
            pass
        return answer


# --- answers when there is no token ------------------------------------------------------------------------------


def refuse(status: int, body: object) -> object:
    def fault(handler: Handler) -> bool:
        handler.read_body()
        handler.answer(status, body)
        return True

    return fault


@pytest.fixture(params=["launcher", "addon"])
def tokenless(request: pytest.FixtureRequest, start: StartProxy) -> Iterator[Setup]:
    """A proxy that was started while its issuer answered 500."""
    behaviour = Behaviour(fault=refuse(500, {}))  # type: ignore[arg-type]
    with FakeIssuer(behaviour) as issuer, Service(issuer) as service:
        proxy = start(request.param, service.url, settings_for(issuer))
        yield Setup(issuer, service, proxy)
        assert all(seen.authorized for seen in service.seen)
        proxy.stop()


def test_without_a_token_the_proxy_answers_itself_and_heals(tokenless: Setup, client: httpx.Client) -> None:
    response = client.get(tokenless.url)
    assert response.status_code == 503
    assert response.headers["X-OIDC-Proxy-Error"] == "issuer_unavailable"
    assert response.headers["Content-Type"] == "application/problem+json"
    assert int(response.headers["Retry-After"]) >= 1
    problem = response.json()
    assert problem["status"] == 503
    assert problem["code"] == "issuer_unavailable"
    assert problem["title"]
    assert "500" in problem["detail"]

    assert client.head(tokenless.url).status_code == 503
    assert client.post(tokenless.url, content=b"x" * 100_000).status_code == 503
    assert client.post(tokenless.url, content=iter([b"x" * 1000] * 5)).status_code == 503
    raw = raw_exchange(
        tokenless.url, b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx"
    )
    assert b" 503 " in raw

    for _ in range(5):
        assert client.post(tokenless.url, content=b"x" * 3_000_000).status_code == 503

    tokenless.issuer.behaviour.fault = None
    eventually(lambda: client.get(tokenless.url).status_code == 200, timeout=40)


def test_a_hundred_requests_that_wait_share_one_token_request(start: StartProxy) -> None:
    with FakeIssuer(Behaviour(delay=1, lifetime=4)) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer))
        token_ends = time.time() + 4
        with httpx.Client(trust_env=False, timeout=20, limits=httpx.Limits(max_connections=100)) as client:
            eventually(lambda: time.time() > token_ends)
            before = len(issuer.requests)
            issuer.behaviour.lifetime = 60
            with concurrent.futures.ThreadPoolExecutor(100) as pool:
                statuses = list(pool.map(lambda _: client.get(proxy.url).status_code, range(100)))
        assert statuses == [200] * 100
        assert len(issuer.requests) - before == 1
        assert all(seen.authorized for seen in service.seen)


def test_a_silent_issuer_gives_503_in_time_and_does_not_stop_other_requests(
    start: StartProxy, client: httpx.Client
) -> None:
    with FakeIssuer(Behaviour(lifetime=3)) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer))
        issuer.behaviour.delay = 60
        while (response := client.get(proxy.url)).status_code == 200 and response.elapsed.total_seconds() < 1:
            pass
        # The last one found no living token and waited for as long as it may; those before were not held up.
        assert response.headers["X-OIDC-Proxy-Error"] == "issuer_unavailable"
        assert response.elapsed.total_seconds() < 15
        assert all(seen.authorized for seen in service.seen)


def test_a_rejected_credential_at_run_time_names_the_remedy(start: StartProxy, client: httpx.Client) -> None:
    with FakeIssuer(Behaviour(lifetime=2)) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer))
        issuer.end_sessions()
        while (response := client.get(proxy.url)).status_code == 200:
            pass
        assert (response.status_code, response.headers["X-OIDC-Proxy-Error"]) == (502, "credentials_rejected")
        assert "OPEN_ID_REFRESH_TOKEN" in response.json()["detail"]
        before = len(issuer.requests)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert client.get(proxy.url).status_code == 502
        assert len(issuer.requests) - before <= 3
        assert all(seen.authorized for seen in service.seen)


def test_an_upstream_that_is_down_gives_502(start: StartProxy, client: httpx.Client) -> None:
    with socket.socket() as unused, FakeIssuer() as issuer:
        unused.bind(("127.0.0.1", 0))
        for entry in ("launcher", "addon"):
            proxy = start(entry, f"http://127.0.0.1:{unused.getsockname()[1]}", settings_for(issuer))
            assert client.get(proxy.url).status_code == 502


def test_a_token_that_ends_during_an_upload_is_replaced_before_it_is_sent(
    start: StartProxy, client: httpx.Client
) -> None:
    with FakeIssuer(Behaviour(lifetime=2)) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer))

        def slowly() -> Iterator[bytes]:
            for _ in range(5):
                yield b"x" * 1000
                time.sleep(0.6)

        assert client.post(proxy.url, content=slowly()).status_code == 200
        assert service.seen[-1].authorized


# --- start and end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_rejected_credential_at_the_start_ends_it_with_the_remedy(entry: str, start: StartProxy) -> None:
    with FakeIssuer() as issuer:
        issuer.end_sessions()
        proxy = start(entry, "http://127.0.0.1:9", settings_for(issuer), wait=False)
        assert proxy.wait_until_ended() == 1
    assert "credentials_rejected" in proxy.output
    assert proxy.output.count("OPEN_ID_REFRESH_TOKEN") == 1
    assert "Traceback" not in proxy.output
    assert issuer.refresh_token not in proxy.output


def test_wrong_settings_end_the_addon_with_a_line_each(start: StartProxy) -> None:
    environment = {"OPEN_ID_CONNECT_URL": "ftp://x", "OPEN_ID_CONNECT_CLIENT_ID": "c"}
    proxy = start("addon", "http://127.0.0.1:9", environment, "--set", "oidc_typo=1", wait=False)
    assert proxy.wait_until_ended() == 1
    for name in ("OPEN_ID_CONNECT_URL: ", "OPEN_ID_REFRESH_TOKEN: ", "oidc_typo: "):
        assert sum(name in line for line in proxy.lines) == 1
    assert "Traceback" not in proxy.output


def test_the_addon_refuses_modes_and_options_in_which_it_would_not_protect(start: StartProxy) -> None:
    with FakeIssuer() as issuer:
        for arguments in (["--mode", "regular@127.0.0.2:0"], ["--ignore-hosts", ".*"], ["--map-remote", "/x/y/z"]):
            proxy = start("addon", "http://127.0.0.1:9", settings_for(issuer), *arguments, wait=False)
            assert proxy.wait_until_ended() == 1
            assert "OIDC add-on" in proxy.output


def test_options_come_before_the_environment_and_that_before_dotenv(
    start: StartProxy, base_environment: dict[str, str], client: httpx.Client
) -> None:
    with FakeIssuer() as issuer, Service(issuer) as service:
        wrong = settings_for(issuer, OPEN_ID_CONNECT_CLIENT_ID="wrong", OPEN_ID_REFRESH_TOKEN="wrong")
        right = ["--set", f"oidc_client_id={issuer.client_id}", "--set", f"refresh_token={issuer.refresh_token}"]
        for entry in ("launcher", "addon"):
            proxy = start(entry, service.url, wrong, *right)
            assert client.get(proxy.url).status_code == 200


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_ends_with_0_when_told_to(start: StartProxy, stop_signal: signal.Signals) -> None:
    with FakeIssuer() as issuer:
        proxy = start("launcher", "http://127.0.0.1:9", settings_for(issuer))
        proxy.process.send_signal(stop_signal)
        assert proxy.wait_until_ended() == 0
        assert "Traceback" not in proxy.output


def test_a_stop_does_not_wait_for_a_silent_issuer(start: StartProxy) -> None:
    with FakeIssuer(Behaviour(delay=60)) as issuer:
        proxy = start("launcher", "http://127.0.0.1:9", settings_for(issuer), wait=False)
        assert proxy.wait_for(re.compile(f"waiting for a token from {re.escape(issuer.url)}$"))
        assert len(issuer.requests) == 1
        began = time.monotonic()
        assert proxy.stop() == 0
        assert time.monotonic() - began < 10  # a moment for an answer that may have the only refresh token
        assert "Traceback" not in proxy.output


def test_a_port_in_use_is_told(start: StartProxy) -> None:
    with socket.socket() as taken, FakeIssuer() as issuer:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        proxy = start("launcher", "http://127.0.0.1:9", settings_for(issuer, PROXY_PORT=port), wait=False)
        assert proxy.wait_until_ended() == 1
        assert port in proxy.output
        assert "Traceback" not in proxy.output


def test_the_settings_may_stand_in_dotenv(
    base_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory, start: StartProxy
) -> None:
    # Through the printed token: what reads .env is the same for all commands.
    with FakeIssuer(client_secret="with ${braces} and # signs") as issuer:
        folder = tmp_path_factory.mktemp("dotenv")
        settings = {name: value for name, value in settings_for(issuer).items() if name.startswith("OPEN_ID_")}
        lines = [f"{name}='{value}'" for name, value in settings.items()]
        (folder / ".env").write_text("\n".join(lines))
        (folder / ".env").chmod(0o600)  # otherwise it warns
        done = subprocess.run(
            [sys.executable, ROOT / "run-mitmproxy.py", "token"],
            env=base_environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert issuer.accepts(done.stdout.removesuffix("\n"))
    assert done.stdout.count("\n") == 1
