"""What HTTP the proxy speaks with clients and services that use all of it, or not quite."""

import base64
import contextlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import RawServer, free_port
from tests.support.network import http as response
from tests.support.processes import ProxyProcess, StartProxy
from tests.support.raw_http import ENTRIES, assert_refused, launch, port_of, read_all, send, statuses
from tests.support.service import Http2Service, http2_ask
from tests.support.waiting import eventually

H = b"Host: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"2\r\nok\r\n0\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n"

# Both as small as a slow machine allows.
HURRY = {"PROXY_CLIENT_TIMEOUT": "1"}
HURRIED = """
from eoepca_security.proxy.patches import http_stream
http_stream.HOLD_TIMEOUT = 1.0
"""


@dataclass
class Service:
    """Answers each target with the bytes in `answers`, `/held` once it is released, and all others with `next`."""

    answers: dict[str, bytes] = field(default_factory=dict)
    waiting: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def __call__(self, server: RawServer, connection: socket.socket) -> None:
        while True:
            server.read_request(connection)
            target = server.requests[-1].split()[1].decode()
            if target == "/held":
                self.waiting.set()
                self.release.wait(10)
            answer = self.answers.get(target, response(b"next"))
            connection.sendall(answer)
            if b"connection: close" in answer.lower() or b"HTTP/1.0" in answer:
                return


@dataclass
class Setup:
    proxy: ProxyProcess
    service: Service
    server: RawServer
    entry: str

    def said(self, answer: bytes, path: str = "/x", method: str = "GET") -> bytes:
        """Return how a client gets an answer, and after that the next one, on one connection."""
        self.service.answers[path] = answer
        return send(self.proxy, f"{method} {path} HTTP/1.1\r\n".encode() + H + b"\r\n" + NEXT)

    @property
    def next_requests(self) -> int:
        return sum(request.startswith(b"GET /next") for request in self.server.requests)

    @property
    def last(self) -> bytes:
        return self.server.requests[-1]


@pytest.fixture(scope="module", params=ENTRIES)
def running(
    request: pytest.FixtureRequest, start: StartProxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    service = Service()
    hurried = tmp_path_factory.mktemp("script") / "hurried.py"
    hurried.write_text(HURRIED)
    with FakeIssuer() as issuer, RawServer(service) as server:
        environment = settings_for(issuer, PROXY_TERMINATION_ENDPOINT="/end-it") | HURRY
        url = f"http://127.0.0.1:{server.port}"
        proxy = launch(start, request.param, url, environment, "-s", str(hurried))
        yield Setup(proxy, service, server, request.param)


@pytest.fixture
def setup(running: Setup) -> Setup:
    running.service.answers.clear()
    running.service.waiting.clear()
    running.service.release.clear()
    return running


def fields(head: bytes) -> dict[str, str]:
    return {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head.decode().split("\r\n"))
    }


def assert_coded(answer: tuple[int, dict[str, str], bytes], status: int, code: str) -> None:
    """Check that an answer over HTTP/2 has the usual form."""
    assert (answer[0], answer[1]["x-oidc-proxy-error"], answer[1]["content-type"]) == (
        status,
        code,
        "application/problem+json",
    )
    assert json.loads(answer[2])["code"] == code


# --- where an answer ends ------------------------------------------------------------------------------------------

WITHOUT_CONTENT = {
    "304 chunked": ("GET", b"HTTP/1.1 304 Not Modified\r\n" + CHUNKED + b"\r\n"),
    "304 chunked, with its chunks": ("GET", b"HTTP/1.1 304 Not Modified\r\n" + CHUNKED + b"\r\n" + CHUNKS),
    "304 with a length": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    "204 chunked": ("GET", b"HTTP/1.1 204 No Content\r\n" + CHUNKED + b"\r\n0\r\n\r\n"),
    "204 with a length": ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"),
    "204 with content": ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello"),
    "204 without a length": ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n"),
    "HEAD chunked": ("HEAD", b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n"),
    "HEAD with a length": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
    "HEAD without a length": ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
    "HEAD with content": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
    "HEAD refused": ("HEAD", b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 5\r\n\r\n"),
}


@pytest.mark.parametrize(("method", "answer"), WITHOUT_CONTENT.values(), ids=WITHOUT_CONTENT)
def test_what_has_no_content_ends_with_its_head_and_the_next_answer_is_the_next(
    method: str, answer: bytes, setup: Setup
) -> None:
    received = setup.said(answer, method=method)
    head, _, rest = received.partition(b"\r\n\r\n")
    assert statuses(received) == [int(answer.split()[1]), 200]
    assert rest.startswith(b"HTTP/1.1 200 ")
    assert rest.endswith(b"\r\n\r\nnext")
    assert "transfer-encoding" not in fields(head)
    length = None if b" 204 " in answer else fields(answer.partition(b"\r\n\r\n")[0]).get("content-length")
    assert fields(head).get("content-length") == length
    status, _, content = http2_ask(port_of(setup.proxy), {}, path="/x", method=method)
    assert (status, content) == (int(answer.split()[1]), b"")


@pytest.mark.parametrize(
    "head",
    [
        b"HEAD / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"HEAD /end-it HTTP/1.1\r\n" + H + b"\r\n",
    ],
)
def test_nor_do_answers_of_the_proxys_own_to_head(head: bytes, setup: Setup) -> None:
    received = send(setup.proxy, head + NEXT)
    assert len(statuses(received)) == 2
    assert received.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 200 ")


BODIES = {
    "chunked": b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "until the end": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "chunked refusal": b"HTTP/1.1 401 Unauthorized\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "chunked 304": b"HTTP/1.1 304 Not Modified\r\n" + CHUNKED + b"\r\n",
}


@pytest.mark.parametrize("answer", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\nContent-Length: 1\r\n"])
def test_a_client_of_http_1_0_gets_what_it_can_read(answer: bytes, more: bytes, setup: Setup) -> None:
    setup.service.answers["/x"] = answer
    body = b"x" if more.startswith(b"Expect") else b""
    received = send(setup.proxy, b"POST /x HTTP/1.0\r\n" + H + more + b"\r\n" + body)
    head, _, rest = received.partition(b"\r\n\r\n")
    assert statuses(received) == [int(answer.split()[1])]
    assert rest == (b"" if b" 304 " in answer else b"ok")
    assert "transfer-encoding" not in fields(head)
    assert fields(head)["connection"] == "close"
    assert setup.last.startswith(b"POST /x HTTP/1.1\r\n")
    assert b"expect" not in setup.last.lower()


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_client_of_http_1_0_gets_the_end_of_an_early_answer_too(entry: str, start: StartProxy) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\n" + CHUNKED + b"\r\n" + CHUNKS)
        server.wait_for_end(connection)

    with FakeIssuer() as issuer, RawServer(script) as service:
        proxy = start(entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        answer = send(proxy, b"PUT /x HTTP/1.0\r\n" + H + b"Content-Length: 3000000\r\n\r\n" + b"x" * 1000)
        assert statuses(answer) == [413]
        assert answer.endswith(b"\r\n\r\nok")


def test_a_client_of_http_1_0_opens_no_websocket(setup: Setup) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n"
    assert statuses(send(setup.proxy, b"GET / HTTP/1.0\r\n" + H + upgrade + b"\r\n")) == [200]
    assert b"upgrade:" not in setup.last.lower()


def test_a_service_of_http_1_0_costs_the_client_no_connection(setup: Setup) -> None:
    received = setup.said(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert statuses(received) == [200, 200]
    assert received.count(b"HTTP/1.0") == 0


# --- headers that concern one connection ---------------------------------------------------------------------------


def test_what_concerns_the_services_connection_is_not_passed_on(setup: Setup) -> None:
    lines = [
        "Connection: close, X-Hop",
        "X-Hop: 1",
        "Keep-Alive: timeout=5",
        "Proxy-Connection: keep-alive",
        "Upgrade: h2,h2c",
        "X-Other: 1",
    ]
    received = setup.said(response(b"ok", *lines))
    head, _, rest = received.partition(b"\r\n\r\n")
    left = fields(head)
    assert left["x-other"] == "1"
    assert not {"connection", "x-hop", "keep-alive", "proxy-connection", "upgrade"} & set(left)
    # The client's connection goes on, and the service's, which it said that it ends, is not used again.
    assert rest.startswith(b"okHTTP/1.1 200 ")
    assert http2_ask(port_of(setup.proxy), {}, path="/x")[0] == 200


def test_a_connection_that_ends_is_announced(setup: Setup) -> None:
    setup.service.answers["/x"] = response(b"ok")
    request = b"GET /x HTTP/1.1\r\n" + H
    closing = send(setup.proxy, request + b"Connection: close\r\n\r\n")
    setup.service.answers["/x"] = BODIES["until the end"]
    until_the_end = send(setup.proxy, request + b"\r\n")
    for answer in (closing, until_the_end):
        assert fields(answer.partition(b"\r\n\r\n")[0])["connection"] == "close"


# --- what is malformed ---------------------------------------------------------------------------------------------

BEGIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
REPAIRED = {
    "space before the colon": (BEGIN + b"X-A : 1\r\n\r\nok", "1"),
    "tab before the colon": (BEGIN + b"X-A\t:1\r\n\r\nok", "1"),
    "folded": (BEGIN + b"X-A: 1\r\n 2\r\n\t 3\r\n\r\nok", "1 2 3"),
    "folded first": (BEGIN + b"X-A:\r\n 1\r\n\r\nok", "1"),
    "space before the length's colon": (b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length : 2\r\n\r\nok", "1"),
    "folded length": (b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length:\r\n 2\r\n\r\nok", "1"),
    "line feeds": (b"HTTP/1.1 200 OK\nX-A: 1\nContent-Length: 2\n\nok", "1"),
}


@pytest.mark.parametrize(("answer", "value"), REPAIRED.values(), ids=REPAIRED)
def test_answers_that_can_be_repaired_are(answer: bytes, value: str, setup: Setup) -> None:
    received = setup.said(answer)
    head, _, rest = received.partition(b"\r\n\r\n")
    assert statuses(received) == [200, 200]
    assert fields(head)["x-a"] == value
    assert rest.startswith(b"okHTTP/1.1 200 ")
    status, headers, content = http2_ask(port_of(setup.proxy), {}, path="/x")
    assert (status, headers["x-a"], content) == (200, value, b"ok")


MALFORMED = {
    "NUL in a value": BEGIN + b"X: a\0b\r\n\r\nok",
    "CR in a value": BEGIN + b"X: a\rb\r\n\r\nok",
    "CR in a location": b"HTTP/1.1 302 Found\r\nContent-Length: 2\r\nLocation: /a\rSet-Cookie: x=y\r\n\r\nok",
    "NUL in a location": b"HTTP/1.1 302 Found\r\nContent-Length: 2\r\nLocation: /a\0\r\n\r\nok",
    "CR in the status line": b"HTTP/1.1 200 OK\rX: y\r\nContent-Length: 2\r\n\r\nok",
    "NUL in the status line": b"HTTP/1.1 200 O\0K\r\nContent-Length: 2\r\n\r\nok",
    "CR in a folded line": BEGIN + b"X: a\r\n \rb\r\n\r\nok",
    "CR before the line's end": BEGIN + b"X: a\r\r\n\r\nok",
    "vertical tab in the coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKS,
    "folded before all headers": b"HTTP/1.1 200 OK\r\n X: y\r\nContent-Length: 2\r\n\r\nok",
    "no colon": BEGIN + b"X\r\n\r\nok",
    "name with a space": BEGIN + b"X Y: z\r\n\r\nok",
    "folded lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n 2\r\n\r\nok",
    "length beyond 63 bits": b"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\nok",
    "length beyond 64 bits": b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551617\r\n\r\nok",
    "length not to be passed on": BEGIN + b"Connection: content-length\r\n\r\nok",
    "coding not to be passed on": b"HTTP/1.1 200 OK\r\nConnection: transfer-encoding\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "signed status": b"HTTP/1.1 +200 OK\r\nContent-Length: 2\r\n\r\nok",
    "long status": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.0 chunked": b"HTTP/1.0 200 OK\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "interim answers": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 21 + response(b"ok"),
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_answers_that_cannot_be_repaired_are_a_fault_of_the_service(answer: bytes, setup: Setup) -> None:
    received = setup.said(answer)
    head, _, rest = received.partition(b"\r\n\r\n")
    assert statuses(received) == [502, 200]
    assert fields(head)["x-oidc-proxy-error"] == "upstream_unavailable"
    problem = json.loads(rest[: int(fields(head)["content-length"])])
    assert (problem["code"], problem["status"]) == ("upstream_unavailable", 502)
    assert_coded(http2_ask(port_of(setup.proxy), {}, path="/x"), 502, "upstream_unavailable")


def test_the_most_interim_answers_are_twenty(setup: Setup) -> None:
    assert statuses(setup.said(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20 + response(b"ok"))) == [200, 200]


# --- what clients do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [b"\r\n", b"\n", b"\r\n\r\n\n\r\n"])
def test_empty_lines_before_a_request_are_passed_over(ahead: bytes, setup: Setup) -> None:
    request = b"POST /x HTTP/1.1\r\n" + H + b"Content-Length: 1\r\n\r\nx"
    assert statuses(send(setup.proxy, ahead + request + ahead + request + ahead + NEXT)) == [200, 200, 200]
    # As old browsers did after a body.
    assert statuses(send(setup.proxy, request + ahead, ahead + NEXT)) == [200, 200]


BAD_CHUNKS = [b"x\r\n", b"-1\r\n", b"1 1\r\n", b"2\r\nokX", b"ffffffffffffffffffffff\r\n"]


@pytest.mark.parametrize("chunk", BAD_CHUNKS)
def test_a_malformed_chunked_body_is_refused_in_words(chunk: bytes, setup: Setup) -> None:
    before = setup.next_requests
    assert_refused(send(setup.proxy, b"POST /held HTTP/1.1\r\n" + H + CHUNKED + b"\r\n" + chunk + NEXT), 400)
    assert setup.next_requests == before


def test_a_request_that_is_cut_short_is_refused_in_words(setup: Setup) -> None:
    for framing, body in ((b"Content-Length: 5\r\n", b"abc"), (CHUNKED, b"5\r\nabc")):
        answer = send(setup.proxy, b"POST /held HTTP/1.1\r\n" + H + framing + b"\r\n" + body, half_close=True)
        assert_refused(answer, 400)


def test_a_client_that_closes_its_side_before_the_answer_is_told_so(setup: Setup) -> None:
    with socket.create_connection(("127.0.0.1", port_of(setup.proxy)), 10) as stream:
        stream.sendall(b"GET /held HTTP/1.1\r\n" + H + b"\r\n")
        assert setup.service.waiting.wait(10)
        stream.shutdown(socket.SHUT_WR)
        answer = read_all(stream)
    setup.service.release.set()
    assert_refused(answer, 400)
    assert b"before it had the answer" in answer


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_probe_without_a_host_gets_a_coded_answer(version: bytes, setup: Setup) -> None:
    answer = send(setup.proxy, b"GET / HTTP/%s\r\nConnection: close\r\n\r\n" % version)
    assert_refused(answer, 403, "host_not_allowed")


def test_http_2_without_tls_is_refused_in_words(setup: Setup) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    answer = send(setup.proxy, preface)
    assert_refused(answer, 505)
    assert b"HTTP/2 works over TLS only" in answer


@contextlib.contextmanager
def connected(setup: Setup, protocol: str) -> Iterator[socket.socket]:
    """Connect to the proxy, with TLS if `protocol` names one that goes with it."""
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(socket.create_connection(("127.0.0.1", port_of(setup.proxy)), 10))
        if protocol != "plain":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # mitmproxy's own CA
            context.set_alpn_protocols([protocol])
            stream = opened.enter_context(context.wrap_socket(stream))
        yield stream


@pytest.mark.parametrize("protocol", ["plain", "http/1.1"])
@pytest.mark.parametrize("start_", [b"G", b"GET / HTTP/1.1\r\n" + H, NEXT.replace(b"close", b"keep-alive") + b"GET /"])
def test_a_head_that_takes_too_long_is_given_up(protocol: str, start_: bytes, setup: Setup) -> None:
    with connected(setup, protocol) as stream:
        stream.sendall(start_)
        answer = read_all(stream)
    assert_refused(answer[answer.rindex(b"HTTP/1.1 ") :], 408)


def test_an_empty_line_without_a_request_is_given_up_without_an_answer(setup: Setup) -> None:
    with connected(setup, "plain") as stream:
        stream.sendall(b"\r\n")
        assert read_all(stream) == b""


HEADERS_FRAME = b"\0\0\5\1\0\0\0\0\1"


@pytest.mark.parametrize("start_", [b"PRI", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0" + HEADERS_FRAME])
def test_so_it_is_in_http_2(start_: bytes, setup: Setup) -> None:
    with connected(setup, "h2") as stream:
        stream.sendall(start_)
        read_all(stream)


@pytest.mark.parametrize("start_", [b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
def test_so_is_a_handshake(start_: bytes, setup: Setup) -> None:
    with connected(setup, "plain") as stream:
        stream.sendall(start_)
        read_all(stream)


def test_so_is_a_handshake_inside_a_tunnel(start: StartProxy) -> None:
    with FakeIssuer() as issuer:
        proxy = start("addon", "", settings_for(issuer, PROXY_INJECT_HOSTS="service.example") | HURRY)
        with socket.create_connection(("127.0.0.1", port_of(proxy)), 10) as stream:
            stream.sendall(b"CONNECT service.example:443 HTTP/1.1\r\nHost: service.example:443\r\n\r\n")
            assert b" 200 " in stream.recv(65536)
            stream.sendall(b"\x16\x03\x01")
            assert read_all(stream) == b""


def test_a_client_may_take_its_time_between_requests(setup: Setup) -> None:
    with connected(setup, "plain") as stream, connected(setup, "plain") as late:
        stream.sendall(NEXT.replace(b"close", b"keep-alive"))
        assert stream.recv(65536)
        # Until somebody else has had its time.
        late.sendall(b"GET")
        assert statuses(read_all(late)) == [408]
        stream.sendall(NEXT)
        assert statuses(read_all(stream)) == [200]


@pytest.mark.parametrize(("status", "method", "expected"), [(200, "GET", 502), (304, "GET", 304), (200, "HEAD", 200)])
def test_a_head_of_http_2_that_ends_the_stream_has_no_length(
    status: int, method: str, expected: int, start: StartProxy, certificate: Path
) -> None:
    with FakeIssuer() as issuer, Http2Service(certificate, [status], [("content-length", "5")]) as service:
        proxy = start("launcher", service.url, settings_for(issuer, TLS_CA_FILE=str(certificate)))
        answer = http2_ask(port_of(proxy), {}, method=method)
        assert answer[0] == expected
        if expected == 502:
            assert_coded(answer, 502, "upstream_unavailable")


# --- an answer that is held back while the token is replaced -------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("framing", [b"", CHUNKED, b"Content-Length: 1000\r\n"], ids=["end", "chunked", "length"])
def test_a_refusal_that_trickles_reaches_the_client(
    entry: str, framing: bytes, start: StartProxy, tmp_path: Path
) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(b"HTTP/1.1 401 Unauthorized\r\n" + framing + b"\r\n")
        piece = b"1\r\nx\r\n" if framing == CHUNKED else b"x"
        while not server.stopping.wait(0.1):
            connection.sendall(piece)

    hurried = tmp_path / "hurried.py"
    hurried.write_text(HURRIED)
    with FakeIssuer() as issuer, RawServer(script) as service:
        proxy = launch(start, entry, f"http://127.0.0.1:{service.port}", settings_for(issuer), "-s", str(hurried))
        with httpx.stream("GET", proxy.url, trust_env=False, timeout=20) as answer:
            assert answer.status_code == 401
            assert next(answer.iter_raw()).startswith(b"x")
        assert len(service.requests) == 1


# --- two families --------------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("entry", ["launcher", "workers"])
def test_two_colons_listen_on_both_families(entry: str, start: StartProxy) -> None:
    port, admin = free_port(), free_port()
    with FakeIssuer() as issuer, RawServer(Service()) as server:
        environment = settings_for(
            issuer, PROXY_HOST="::", PROXY_PORT=str(port), PROXY_ADMIN=f"[::]:{admin}", **ENTRIES[entry]
        )
        proxy = start("launcher", f"http://127.0.0.1:{server.port}", environment, wait=False)
        assert proxy.wait_for(re.compile(r"listening at http://\S+ -> "))
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/", trust_env=False).content == b"next"
            assert httpx.get(f"http://{host}:{admin}/livez", trust_env=False).status_code == 200
        if entry == "launcher":
            environment["PROXY_ADMIN"] = "off"
            second = start("launcher", f"http://127.0.0.1:{server.port}", environment, wait=False)
            assert second.wait_until_ended() == 1
            assert "cannot listen on" in second.output


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_port_that_is_taken_in_one_family_is_taken(start: StartProxy) -> None:
    with FakeIssuer() as issuer, socket.create_server(("0.0.0.0", 0)) as taken:
        environment = settings_for(issuer, PROXY_HOST="::", PROXY_PORT=str(taken.getsockname()[1]))
        proxy = start("launcher", "http://127.0.0.1:9", environment, wait=False)
        assert proxy.wait_until_ended() == 1
        assert "cannot listen on" in proxy.output


# --- a service that speaks TLS -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_sessions_and_redirects_of_an_https_service_work_over_http(
    entry: str, start: StartProxy, certificate: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    service = Service()
    with FakeIssuer() as issuer, RawServer(service, context) as server:
        proxy = launch(
            start,
            entry,
            f"https://127.0.0.1:{server.port}",
            settings_for(issuer, TLS_CA_FILE=str(certificate), PROXY_ALLOWED_HOSTS="localhost,127.0.0.1"),
        )
        own = f"127.0.0.1:{server.port}"
        for name, value, expected in (
            ("Location", f"//{own}/a", f"{proxy.url}/a"),
            ("Location", f"http://{own}/a", f"{proxy.url}/a"),
            ("Refresh", f"0; url=https://{own}/a", f"0; url={proxy.url}/a"),
            ("Location", "http://127.0.0.1:9/", "http://127.0.0.1:9/"),
        ):
            service.answers["/x"] = response(b"", f"{name}: {value}", status=302)
            assert httpx.get(f"{proxy.url}/x", trust_env=False).headers[name] == expected
        service.answers["/x"] = response(
            b"", "Set-Cookie: session=1; Path=/; Domain=127.0.0.1; Secure; SameSite=None; HttpOnly"
        )
        with httpx.Client(trust_env=False) as client:
            answer = client.get(f"{proxy.url}/x")
            assert answer.headers["Set-Cookie"] == "session=1; Path=/; HttpOnly"
            client.get(f"{proxy.url}/y")
        assert b"session=1" in server.requests[-1]
        # A client that speaks TLS to the proxy keeps the cookie as it is.
        over_tls = http2_ask(port_of(proxy), {}, path="/x")
        assert over_tls[1]["set-cookie"] == "session=1; Path=/; Secure; SameSite=None; HttpOnly"


# --- the proxy's own answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "method"),
    [
        ({"content-length": "5"}, "POST"),
        ({"content-length": "9223372036854775808"}, "POST"),
        ({"x(y": "z"}, "GET"),
    ],
    ids=["length without content", "length beyond 63 bits", "name"],
)
def test_http_2_requests_are_refused_in_words(headers: dict[str, str], method: str, setup: Setup) -> None:
    before = len(setup.server.requests)
    assert_coded(http2_ask(port_of(setup.proxy), headers, method=method), 400, "bad_request")
    assert len(setup.server.requests) == before


def test_the_off_switch_says_how_to_use_it(setup: Setup) -> None:
    answer = send(setup.proxy, b"GET /end-it HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n")
    assert_refused(answer, 405, "method_not_allowed")
    assert fields(answer.partition(b"\r\n\r\n")[0])["allow"] == "POST"
    assert "POST" in json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_who_has_no_password_gets_a_coded_answer(entry: str, start: StartProxy) -> None:
    with FakeIssuer() as issuer, RawServer(Service()) as server:
        url = f"http://127.0.0.1:{server.port}"
        proxy = launch(start, entry, url, settings_for(issuer), "--proxyauth", "name:password")
        answer = send(proxy, NEXT)
        assert_refused(answer, 401, "proxy_authentication_required")
        assert fields(answer.partition(b"\r\n\r\n")[0])["www-authenticate"].startswith("Basic ")
        head = send(proxy, NEXT.replace(b"GET", b"HEAD"))
        assert head.endswith(b"\r\n\r\n")
        assert server.requests == []
        basic = b"Authorization: Basic %s\r\n\r\n" % base64.b64encode(b"name:password")
        assert statuses(send(proxy, NEXT.removesuffix(b"\r\n") + basic)) == [200]


def test_so_does_who_connects_through_a_forward_proxy(start: StartProxy) -> None:
    with FakeIssuer() as issuer:
        environment = settings_for(issuer, PROXY_INJECT_HOSTS="service.example")
        proxy = start("addon", "", environment, "--proxyauth", "name:password")
        for request in (
            b"CONNECT service.example:443 HTTP/1.1\r\nHost: service.example:443\r\nConnection: close\r\n\r\n",
            b"GET http://service.example/ HTTP/1.1\r\nHost: service.example\r\nConnection: close\r\n\r\n",
        ):
            answer = send(proxy, request)
            assert b"proxy-authenticate: basic" in answer.lower()
            assert_refused(answer, 407, "proxy_authentication_required")
        nowhere = send(proxy, b"GET / HTTP/1.0\r\n\r\n")
        assert b"x-oidc-proxy-error: bad_request" in nowhere.lower()
        assert statuses(nowhere) == [400]


# --- clients that go away, and services that repeat the token -------------------------------------------------------


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_client_that_leaves_while_the_proxy_connects_crashes_nothing(start: StartProxy, entry: str) -> None:
    with FakeIssuer() as issuer, contextlib.ExitStack() as opened:
        # Its queue is full, so that it does not even accept.
        deaf = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            client = opened.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(deaf.getsockname())
        proxy = launch(start, entry, f"http://127.0.0.1:{deaf.getsockname()[1]}", settings_for(issuer))
        answer = send(proxy, b"POST / HTTP/1.1\r\n" + H + CHUNKED + b"\r\n" + CHUNKS, half_close=True)
        assert_refused(answer, 400)
        assert "has crashed" not in proxy.output


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_what_is_logged_of_malformed_messages_quotes_none_of_them(start: StartProxy, entry: str) -> None:
    def repeat(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        (authorization,) = re.findall(rb"(?i)\r\nauthorization: ([^\r]*)", server.requests[-1])
        connection.sendall(response(b"ok") + authorization)
        connection.recv(1)  # until the proxy ends the connection

    with FakeIssuer() as issuer, RawServer(repeat) as service:
        url = f"http://127.0.0.1:{service.port}"
        proxy = launch(start, entry, url, settings_for(issuer), "--set", "termlog_verbosity=info")
        assert statuses(send(proxy, b"GET / HTTP/1.1\r\n" + H + b"\r\n", NEXT)) == [200, 200]
        send(proxy, b"GET / HTTP/1.1\r\n" + H + b"Authorization: Bearer the-clients-own\r\n", half_close=True)
        proxy.stop()
    assert "data that belongs to no request" in proxy.output
    assert "malformed or incomplete" in proxy.output
    assert "eyJ" not in proxy.output
    assert "the-clients-own" not in proxy.output


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_nothing_is_sent_again_for_a_client_that_has_gone(start: StartProxy, entry: str) -> None:
    def refuse(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

    with FakeIssuer() as issuer, RawServer(refuse) as service:
        proxy = launch(start, entry, f"http://127.0.0.1:{service.port}", settings_for(issuer))
        issuer.behaviour.delay = 1.5
        with socket.create_connection(("127.0.0.1", port_of(proxy)), 10) as client:
            client.sendall(b"POST /pay HTTP/1.1\r\n" + H + b"Content-Length: 2\r\n\r\nok")
            # The service has refused the token, and the issuer is asked for another one.
            eventually(lambda: len(issuer.requests) == 2)
        # The end waits for the issuer's answer.
        proxy.stop()
        assert len(service.requests) == 1
