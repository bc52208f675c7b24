"""Bodies that stream, answers that do not wait, and connections that are kept, with real processes."""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import settings_for
from tests.support.network import RawServer, replies
from tests.support.network import http as response
from tests.support.processes import ROOT, ProxyProcess, StartProxy, admin_of
from tests.support.raw_http import port_of
from tests.support.service import http2_get
from tests.support.waiting import eventually

DOWN = 96 * 1024 * 1024
UP = 64 * 1024 * 1024
GROWTH = 48 * 1024 * 1024


class Streams:
    """A service with large answers, events, and a count of its connections."""

    def __init__(self) -> None:
        self.connections: set[int] = set()
        self.bodies: list[int] = []
        self.go_on = threading.Event()
        self.server = LocalServer(self._handler())

    def _handler(self) -> type[Handler]:
        streams = self

        class StreamsHandler(Handler):
            def respond(self) -> None:
                streams.connections.add(self.client_address[1])
                size = sum(len(part) for part in body_of(self))
                streams.bodies.append(size)
                self._body = b""
                match self.path:
                    case "/large":
                        self._head("application/octet-stream", f"Content-Length: {DOWN}")
                        for _ in range(DOWN // 65536):
                            self.wfile.write(b"x" * 65536)
                    case "/events":
                        self._head("text/event-stream", "Transfer-Encoding: chunked")
                        self.wfile.write(b"9\r\ndata: 1\n\n\r\n")
                        streams.go_on.wait(20)
                        self.wfile.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")
                    case _:
                        self.answer(200, {"size": size})

            def _head(self, media_type: str, *lines: str) -> None:
                self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\n".encode())
                self.wfile.write("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n")

        return StreamsHandler


def body_of(handler: Handler) -> Iterator[bytes]:
    if handler.headers.get("Transfer-Encoding") == "chunked":
        while size := int(handler.rfile.readline(), 16):
            yield handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return
    left = int(handler.headers.get("Content-Length") or 0)
    while left > 0:
        part = handler.rfile.read(min(left, 65536))
        left -= len(part)
        yield part


@pytest.fixture(scope="module", params=["launcher", "addon"])
def setup(request: pytest.FixtureRequest, start: StartProxy) -> Iterator[tuple[ProxyProcess, Streams]]:
    streams = Streams()
    with FakeIssuer() as issuer, streams.server:
        yield start(request.param, streams.server.url, settings_for(issuer)), streams


@pytest.fixture(scope="module", params=["launcher", "addon"])
def serviceless(request: pytest.FixtureRequest, start: StartProxy) -> ProxyProcess:
    """A proxy whose service is down."""
    with FakeIssuer(Behaviour(lifetime=600)) as issuer:
        return start(request.param, "http://127.0.0.1:9", settings_for(issuer))


def connect(proxy: ProxyProcess) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", int(proxy.url.rpartition(":")[2]), timeout=20)


def talk(proxy: ProxyProcess, *parts: bytes) -> bytes:
    """Send `parts`, one after each head of an answer to those before; return all that came."""
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), 10) as stream:
        received = b""
        for number, part in enumerate(parts, 1):
            stream.sendall(part)
            while len(re.findall(rb"HTTP/1\.1 \d+ .*?\r\n\r\n\{.*?\}", received, re.S)) < number:
                data = stream.recv(65536)
                if not data:
                    return received
                received += data
        return received


def memory(proxy: ProxyProcess) -> int:
    lines = Path(f"/proc/{proxy.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


# --- streaming ---------------------------------------------------------------------------------------------------


def test_large_bodies_pass_in_parts(setup: tuple[ProxyProcess, Streams]) -> None:
    proxy, _ = setup
    connection = connect(proxy)
    connection.request("GET", "/small")
    connection.getresponse().read()
    before = peak = memory(proxy)
    connection.request("GET", "/large")
    answer, size = connection.getresponse(), 0
    while part := answer.read(4 * 1024 * 1024):
        size += len(part)
        peak = max(peak, memory(proxy))
    assert size == DOWN

    def body() -> Iterator[bytes]:
        nonlocal peak
        for _ in range(UP // 1024 // 1024):
            peak = max(peak, memory(proxy))
            yield b"x" * 1024 * 1024

    for headers in ({"Content-Length": str(UP)}, {"Transfer-Encoding": "chunked"}):
        connection.request("PUT", "/up", body=body(), headers=headers, encode_chunked="Transfer-Encoding" in headers)
        assert json.loads(connection.getresponse().read()) == {"size": UP}
    assert peak - before < GROWTH
    connection.close()


def test_events_pass_at_once(setup: tuple[ProxyProcess, Streams], client: httpx.Client) -> None:
    proxy, streams = setup
    streams.go_on.clear()
    with client.stream("GET", f"{proxy.url}/events") as answer:
        lines = answer.iter_lines()
        # The second comes only after this one has been seen.
        assert next(lines) == "data: 1"
        streams.go_on.set()
        assert [line for line in lines if line] == ["data: 2"]


# --- answers that do not wait ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"POST /x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 10\r\n",
        b"POST /x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 5000000\r\n",
        b"POST /x HTTP/1.1\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n",
        b"POST /x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 10\r\nExpect: 100-continue\r\n",
    ],
)
def test_a_refusal_does_not_wait_for_the_body(head: bytes, setup: tuple[ProxyProcess, Streams]) -> None:
    proxy, _ = setup
    answer = talk(proxy, head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"host_not_allowed" in answer


def test_after_a_refusal_the_connection_serves_the_next_request(setup: tuple[ProxyProcess, Streams]) -> None:
    proxy, _ = setup
    refused = b"POST /x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 5\r\n\r\n"
    answer = talk(proxy, refused, b"abcdeGET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"403", b"200"]


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nab",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\nab",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_a_service_that_is_down_is_told_of_in_the_usual_form(request_: bytes, serviceless: ProxyProcess) -> None:
    answer = talk(serviceless, request_)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"X-OIDC-Proxy-Error: upstream_unavailable\r\n" in answer
    problem = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert (problem["code"], problem["status"]) == ("upstream_unavailable", 502)
    assert "REMOTE_PROTECTED_DOMAIN" in problem["detail"]


def test_after_that_the_connection_serves_the_next_request(serviceless: ProxyProcess) -> None:
    chunked = b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = talk(serviceless, chunked, b"2\r\nab\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"502", b"502"]
    assert httpx.head(serviceless.url, trust_env=False).headers["X-OIDC-Proxy-Error"] == "upstream_unavailable"


@pytest.mark.parametrize("entry", ["launcher", "addon"])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200", b"SSH-2.0-x\r\n\r\n"])
def test_a_service_that_hangs_up_is_told_of_too(entry: str, said: bytes, start: StartProxy) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(said)

    with FakeIssuer() as issuer, RawServer(script) as service:
        proxy = start(entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        answer = httpx.post(proxy.url, content=b"x", trust_env=False)
        assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (502, "upstream_unavailable")


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_request_that_comes_before_the_first_token_waits_for_it(
    entry: str, start: StartProxy, tmp_path: Path, client: httpx.Client
) -> None:
    # In a new home, where mitmproxy has no certificate authority yet.
    streams = Streams()
    with FakeIssuer(Behaviour(delay=1.5)) as issuer, streams.server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = settings_for(issuer, HOME=str(tmp_path), PROXY_PORT=str(port))
        proxy = start(entry, streams.server.url, environment, wait=False)
        proxy.url = f"http://127.0.0.1:{port}"

        def answered() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                return client.get(proxy.url).status_code == 200
            return False

        eventually(answered)
        assert proxy.wait_until_started().url
        assert client.get(proxy.url).status_code == 200
        assert "rror" not in proxy.output


# --- connections that are kept -----------------------------------------------------------------------------------


def once(server: RawServer, connection: socket.socket) -> None:
    """Answer one request and hang up when the next one is there, as a service does that was about to anyway."""
    server.read_request(connection)
    connection.sendall(response(b"{}"))
    server.read_request(connection)


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_connection_that_the_service_ends_costs_no_request_that_can_be_repeated(
    entry: str, start: StartProxy, client: httpx.Client
) -> None:
    with FakeIssuer() as issuer, RawServer(once) as service:
        proxy = start(entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        assert [client.get(proxy.url).status_code for _ in range(4)] == [200] * 4
        assert client.put(proxy.url, content=b"x").status_code == 200
        # Twice may be once too often, so that is for the client to decide.
        assert client.post(proxy.url, content=b"x").headers["X-OIDC-Proxy-Error"] == "upstream_unavailable"
        tokens = {re.search(rb"(?i)authorization: bearer \S+", head) is not None for head in service.requests}
        assert tokens == {True}


def test_clients_one_after_the_other_share_a_connection_to_the_service(start: StartProxy) -> None:
    streams = Streams()
    with FakeIssuer() as issuer, streams.server:
        proxy = start("launcher", streams.server.url, settings_for(issuer))

        def ask() -> bool:
            """Tell whether two new clients made no new connection."""
            before = len(streams.connections)
            answers = [httpx.get(proxy.url, trust_env=False).status_code for _ in range(2)]
            return answers == [200, 200] and len(streams.connections) == before

        eventually(ask)


def test_a_connection_whose_exchange_was_broken_off_is_not_kept(start: StartProxy) -> None:
    streams = Streams()
    with FakeIssuer() as issuer, streams.server:
        proxy = start("launcher", streams.server.url, settings_for(issuer))
        connection = connect(proxy)
        connection.request("GET", "/large")
        connection.getresponse().read(1000)
        connection.close()
        first = set(streams.connections)
        assert httpx.get(proxy.url, trust_env=False).json() == {"size": 0}
        assert len(streams.connections - first) == 1


def test_a_connection_that_ended_while_nobody_used_it_costs_nothing(start: StartProxy) -> None:
    with FakeIssuer() as issuer, RawServer(replies(response(b"{}"))) as service:
        proxy = start("launcher", f"http://127.0.0.1:{service.port}", settings_for(issuer))
        assert [httpx.get(proxy.url, trust_env=False).status_code for _ in range(5)] == [200] * 5


def test_a_kept_connection_is_as_verified_as_a_new_one(start: StartProxy, certificate: Path) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        while True:
            server.read_request(connection)
            connection.sendall(response(b"{}"))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with FakeIssuer() as issuer, RawServer(script, context) as service:
        url = f"https://127.0.0.1:{service.port}"
        proxy = start("launcher", url, settings_for(issuer, TLS_CA_FILE=str(certificate)))

        def ask() -> bool:
            before = service.connections
            answers = [httpx.get(proxy.url, trust_env=False).status_code for _ in range(2)]
            return answers == [200, 200] and service.connections == before

        eventually(ask)
        untrusting = start("launcher", url, settings_for(issuer))
        served = len(service.requests)
        answers = [httpx.get(untrusting.url, trust_env=False) for _ in range(2)]
        assert {answer.headers["X-OIDC-Proxy-Error"] for answer in answers} == {"upstream_unavailable"}
        assert "TLS_CA_FILE" in answers[0].json()["detail"]
        assert len(service.requests) == served


# --- services with manners of their own --------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_interim_answers_are_not_taken_for_the_answer(entry: str, start: StartProxy, client: httpx.Client) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        while True:
            server.read_request(connection)
            number = len(server.requests)
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n")
            server.stopping.wait(0.2 if number < 7 else 0)
            connection.sendall(response(b'{"number": %d}' % number))

    with FakeIssuer() as issuer, RawServer(script) as service:
        proxy = start(entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        assert [client.get(proxy.url).json()["number"] for _ in range(3)] == [1, 2, 3]
        assert [httpx.get(proxy.url, trust_env=False).json()["number"] for _ in range(3)] == [4, 5, 6]
        # However many there are on a connection, which may be kept for long.
        assert [client.get(proxy.url).json()["number"] for _ in range(16)] == list(range(7, 23))


@pytest.mark.parametrize("entry", ["launcher", "addon"])
@pytest.mark.parametrize(
    "early",
    [
        b"HTTP/1.1 413 Too Large\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
        b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 413 Too Large\r\n\r\nno",
    ],
)
def test_an_answer_to_half_an_upload_ends(entry: str, early: bytes, start: StartProxy) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(early)
        if b"\r\n\r\nno" not in early or b"Length" in early:
            server.wait_for_end(connection)

    with FakeIssuer() as issuer, RawServer(script) as service:
        proxy = start(entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        connection = connect(proxy)
        connection.putrequest("PUT", "/x")
        connection.putheader("Content-Length", "3000000")
        connection.endheaders(b"x" * 1000)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (413, b"no")
        connection.close()


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_service_that_hangs_up_in_the_middle_of_a_short_answer_is_told_of(entry: str, start: StartProxy) -> None:
    with FakeIssuer() as issuer, RawServer(replies(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")) as service:
        proxy = start(entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        answer = httpx.get(proxy.url, trust_env=False)
        assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (502, "upstream_unavailable")


@pytest.mark.parametrize("entry", ["launcher", "addon"])
@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nBad name: x\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 999 Unheard of\r\nContent-Length: 2\r\n\r\nok",
        b"SSH-2.0-x\r\n\r\n",
    ],
)
def test_an_answer_that_is_who_knows_what_is_not_passed_on(entry: str, said: bytes, start: StartProxy) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(said)
        server.wait_for_end(connection)

    with FakeIssuer() as issuer, RawServer(script) as service:
        proxy = start(entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        with httpx.Client(trust_env=False) as client:
            for method, content in (("GET", None), ("PUT", b"x"), ("PUT", b"x" * 3_000_000), ("GET", None)):
                answer = client.request(method, proxy.url, content=content)
                assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (502, "upstream_unavailable")
                assert "fix the service" in answer.json()["detail"]
        assert http2_get(int(proxy.url.rpartition(":")[2]), {}) == 502


def test_a_repeated_request_whose_answer_is_not_passed_on_counts_as_an_error(
    start: StartProxy, client: httpx.Client
) -> None:
    refusal = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"

    def script(server: RawServer, connection: socket.socket) -> None:
        while True:
            server.read_request(connection)
            connection.sendall(refusal if len(server.requests) == 1 else b"HTTP/1.1 999 Unheard of\r\n\r\n")

    with FakeIssuer() as issuer, RawServer(script) as service:
        url = f"http://127.0.0.1:{service.port}"
        proxy = start("launcher", url, settings_for(issuer, PROXY_ADMIN="127.0.0.1:0"))
        assert client.get(proxy.url).headers["X-OIDC-Proxy-Error"] == "upstream_unavailable"
        assert len(service.requests) == 2
        told = client.get(f"{admin_of(proxy)}/status").json()
        assert told["errors"] == {"upstream_unavailable": 1}
        assert "unexpected status 999" in told["recent_errors"][0]["detail"]


@pytest.mark.parametrize("trailers", [False, True])
def test_over_http2_a_body_of_unknown_length_stays_one_body(
    trailers: bool, setup: tuple[ProxyProcess, Streams]
) -> None:
    proxy, streams = setup
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    streams.bodies.clear()
    assert (
        http2_get(int(proxy.url.rpartition(":")[2]), {}, method="POST", body=[smuggled, b"x" * 1000], trailers=trailers)
        == 200
    )
    eventually(lambda: bool(streams.bodies))
    assert streams.bodies == [len(smuggled) + 1000]


def test_clients_that_go_away_at_any_moment_leave_no_connection_behind(start: StartProxy) -> None:
    streams = Streams()
    with FakeIssuer() as issuer, streams.server:
        proxy = start("launcher", streams.server.url, settings_for(issuer))
        port = int(proxy.url.rpartition(":")[2])

        def sockets() -> int:
            links = Path(f"/proc/{proxy.process.pid}/fd")
            return sum(link.readlink().name.startswith("socket:") for link in links.iterdir() if link.is_symlink())

        for number in range(400):
            with socket.create_connection(("127.0.0.1", port)) as stream:
                stream.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                if number % 3:
                    stream.settimeout(0.002 * (number % 4) + 0.0001)
                    with contextlib.suppress(TimeoutError):
                        stream.recv(100)
        # What is kept at most, and what listens.
        eventually(lambda: sockets() <= 32 + 8)
        assert httpx.get(proxy.url, trust_env=False).status_code == 200


def test_events_and_websockets_may_be_quiet_for_longer_than_a_service_may_be_silent(
    start: StartProxy, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("from mitmproxy.proxy import server\nserver.TCP_TIMEOUT = 1\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    arguments = ["--set", "tcp_timeout=1"] if int(version("mitmproxy").partition(".")[0]) >= 12 else []
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    events = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    def rare(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        is_socket = b"websocket" in server.requests[-1].lower()
        connection.sendall(switch if is_socket else events)
        server.stopping.wait(2.5)
        connection.sendall(b"\x81\x04late" if is_socket else b"data: late\n\n")

    upgrade = b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    with FakeIssuer() as issuer, RawServer(rare) as service, contextlib.ExitStack() as opened:
        proxy = start("launcher", f"http://127.0.0.1:{service.port}", settings_for(issuer, PYTHONPATH=path), *arguments)
        clients = []
        for connection in (upgrade + b"Connection: Upgrade\r\n", b"Connection: close\r\n"):
            clients.append(opened.enter_context(socket.create_connection(("127.0.0.1", port_of(proxy)), 10)))
            clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + connection + b"\r\n")
        for client in clients:
            answer = b""
            while data := client.recv(65536):
                answer += data
            assert b"late" in answer


def test_a_service_that_stays_silent_is_told_of_in_time(start: StartProxy, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from eoepca_security.proxy.patches import connection_pool\n"
        "from mitmproxy.proxy import server\n"
        "connection_pool.CONNECT_TIMEOUT, server.TCP_TIMEOUT = 1.0, 1\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def silent(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        server.wait_for_end(connection)

    # An option from mitmproxy 12 on.
    arguments = ["--set", "tcp_timeout=1"] if int(version("mitmproxy").partition(".")[0]) >= 12 else []
    with contextlib.ExitStack() as opened:
        issuer = opened.enter_context(FakeIssuer())
        service = opened.enter_context(RawServer(silent))
        # Its queue is full, so that it does not even accept.
        deaf = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            client = opened.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(deaf.getsockname())
        for port, reason in ((deaf.getsockname()[1], b": timed out"), (service.port, b": no answer: timed out")):
            proxy = start("launcher", f"http://127.0.0.1:{port}", settings_for(issuer, PYTHONPATH=path), *arguments)
            answer = talk(proxy, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b" 504 " in answer.splitlines()[0]
            assert b"X-OIDC-Proxy-Error: upstream_timeout\r\n" in answer
            assert reason in answer
        assert len(service.requests) == 1
