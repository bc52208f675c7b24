"""What a hostile client hides in a body, and what a hostile service or client sends without end."""

import contextlib
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import wsproto
import wsproto.events
from wsproto.extensions import PerMessageDeflate

from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import RawServer
from tests.support.network import http as response
from tests.support.processes import ProxyProcess, StartProxy
from tests.support.raw_http import ENTRIES, assert_refused, launch, port_of, send, statuses
from tests.support.service import Http2Service, Recorder, http2_continuations, http2_get
from tests.support.waiting import eventually

MIB = 1024 * 1024
HEAD = 256 * 1024
GROWTH = 64 * MIB

H = b"Host: localhost\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + H + b"\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(SMUGGLED)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
GENUINE = b"GET /genuine HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n"


@dataclass
class Setup:
    proxy: ProxyProcess
    recorder: Recorder

    @property
    def targets(self) -> list[str]:
        return [received.target for received in self.recorder.requests]


@pytest.fixture(scope="module", params=ENTRIES)
def running(request: pytest.FixtureRequest, start: StartProxy) -> Iterator[Setup]:
    recorder = Recorder()
    with FakeIssuer() as issuer, recorder.server() as service:
        environment = settings_for(
            issuer, PROXY_ALLOWED_ORIGINS="https://app.example", PROXY_TERMINATION_ENDPOINT="/end-it"
        )
        yield Setup(launch(start, request.param, service.url, environment), recorder)


@pytest.fixture
def setup(running: Setup) -> Setup:
    running.recorder.requests.clear()
    return running


def memory(proxy: ProxyProcess) -> int:
    """Return what the process holds now, and its workers."""
    processes = [proxy.process.pid]
    for pid in processes:
        processes += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    lines = [line for pid in processes for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


# --- where a refused request ends --------------------------------------------------------------------------------

POST = b"POST / HTTP/1.1\r\n"
DOUBTFUL = {
    "folded length": POST + H + b"X: y\r\n " + LENGTH,
    "folded with a tab": POST + H + b"X: y\r\n\t" + LENGTH,
    "folded coding": POST + H + b"X: y\r\n " + CHUNKED,
    "folded first": POST + b" X: y\r\n" + H + LENGTH,
    "folded length value": POST + H + b"Content-Length:\r\n %d\r\n" % len(SMUGGLED),
    "bare CR": POST + H + b"X: y\r" + LENGTH,
    "bare CR before the line's end": POST + H + LENGTH.replace(b"\r\n", b"\r\r\n"),
    "bare CR before the value": POST + H + LENGTH.replace(b": ", b":\r "),
    "bare CR in the start line": b"POST /\rX HTTP/1.1\r\n" + H + LENGTH,
    "NUL": POST + H + b"X: \0\r\n" + LENGTH,
    "NUL in the coding": POST + H + b"Transfer-Encoding: \0chunked\r\n",
    "vertical tab in the coding": POST + H + b"Transfer-Encoding: \x0bchunked\r\n",
    "form feed after the coding": POST + H + b"Transfer-Encoding: chunked\x0c\r\n",
    "vertical tab in the length": POST + H + LENGTH.replace(b": ", b": \x0b"),
    "two lengths": POST + H + LENGTH + b"Content-Length: 0\r\n",
    "the same length twice": POST + H + LENGTH + LENGTH,
    "list of lengths": POST + H + b"Content-Length: 0, 0\r\n",
    "signed length": POST + H + LENGTH.replace(b": ", b": +"),
    "length in hex": POST + H + b"Content-Length: 0x0\r\n",
    "length with zeros": POST + H + LENGTH.replace(b": ", b": 00"),
    "length beyond 63 bits": POST + H + b"Content-Length: 9223372036854775808\r\n",
    "length beyond 64 bits": POST + H + b"Content-Length: 18446744073709551617\r\n",
    "another kind of version": b"POST / HTTP/2.0\r\n" + H + LENGTH,
    "length and coding": POST + H + b"Content-Length: 0\r\n" + CHUNKED,
    "two codings": POST + H + CHUNKED + CHUNKED,
    "another coding": POST + H + b"Transfer-Encoding: gzip\r\n",
    "coding identity": POST + H + b"Transfer-Encoding: identity\r\n" + LENGTH,
    "unknown coding": POST + H + b"Transfer-Encoding: xchunked\r\n",
    "chunked not last": POST + H + b"Transfer-Encoding: chunked, gzip\r\n",
    "coding in HTTP/1.0": b"POST / HTTP/1.0\r\n" + H + CHUNKED,
    "coding with a space": POST + H + b"Transfer-Encoding : chunked\r\n",
    "length with a space": POST + H + LENGTH.replace(b":", b" :"),
    "length with a tab": POST + H + LENGTH.replace(b":", b"\t:"),
    "name with a space": POST + H + b"X Y: z\r\n" + LENGTH,
    "no colon": POST + H + b"X\r\n" + LENGTH,
    "length not to be passed on": POST + H + b"Connection: content-length\r\n" + LENGTH,
    "coding not to be passed on": POST + H + b"Connection: Transfer-Encoding\r\n" + CHUNKED,
    "another version": b"POST / HTTP/1.2\r\n" + H + LENGTH,
    "no version": b"POST /\r\n" + H + LENGTH,
    "head in lower case": b"head / HTTP/1.1\r\n" + H + LENGTH,
    "method with a quote": b'PO"ST / HTTP/1.1\r\n' + H + LENGTH,
    "space in the target": b"POST /a b HTTP/1.1\r\n" + H + LENGTH,
    "of a web page": POST + H + b"Origin: https://evil.example\r\nX: y\r\n " + LENGTH,
    "of an allowed page": b"OPTIONS / HTTP/1.1\r\n" + H + b"Origin: https://app.example\r\n"
    b"Access-Control-Request-Method: PUT\r\nX: y\r\n " + LENGTH,
    "shutdown endpoint": b"GET /end-it HTTP/1.1\r\n" + H + b"X: y\r\n " + LENGTH,
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\n" + H + b"X: y\r\n " + LENGTH,
}


@pytest.mark.parametrize("head", DOUBTFUL.values(), ids=DOUBTFUL)
def test_after_a_head_that_may_be_misread_nothing_is_a_request(head: bytes, setup: Setup) -> None:
    assert_refused(send(setup.proxy, head + b"\r\n" + SMUGGLED + GENUINE), 400)
    assert_refused(send(setup.proxy, head + b"\r\n", SMUGGLED), 400)
    both = send(setup.proxy, GENUINE.replace(b"Connection: close\r\n", b"") + head + b"\r\n" + SMUGGLED + GENUINE)
    assert_refused(both[both.rindex(b"HTTP/1.1 ") :], 400)
    assert statuses(both) == [200, 400]
    assert setup.targets == ["/genuine"]


def test_who_sends_much_with_it_gets_to_read_the_answer(setup: Setup) -> None:
    body = SMUGGLED * (16 * MIB // len(SMUGGLED))
    assert_refused(send(setup.proxy, DOUBTFUL["folded length"] + b"\r\n" + body), 400)
    assert setup.targets == []


REFUSED = {
    403: b"POST / HTTP/1.1\r\nHost: evil.example\r\n",
    204: b"OPTIONS / HTTP/1.1\r\n" + H + b"Origin: https://app.example\r\nAccess-Control-Request-Method: PUT\r\n",
    405: b"PUT /end-it HTTP/1.1\r\n" + H,
}


@pytest.mark.parametrize("status", [403, 204, 405])
@pytest.mark.parametrize(("framing", "body"), [(LENGTH, SMUGGLED), (CHUNKED, CHUNKS)], ids=["length", "chunked"])
def test_where_it_is_certain_the_body_is_dropped_and_the_connection_stays(
    status: int, framing: bytes, body: bytes, setup: Setup
) -> None:
    head = REFUSED[status] + framing + b"\r\n"
    for parts in ([head + body + GENUINE], [head, body + GENUINE], [head + body, GENUINE]):
        assert statuses(send(setup.proxy, *parts)) == [status, 200]
    assert setup.targets == ["/genuine"] * 3


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_same_holds_for_answers_without_a_token_and_for_mitmproxys_own(entry: str, start: StartProxy) -> None:
    recorder = Recorder()
    with FakeIssuer(Behaviour(down=True)) as issuer, recorder.server() as service:
        down = launch(start, entry, service.url, settings_for(issuer))
        locked = launch(start, entry, service.url, settings_for(issuer), "--proxyauth", "name:password")
        for proxy, status in ((down, 503), (locked, 401)):
            for framing, body in ((LENGTH, SMUGGLED), (CHUNKED, CHUNKS)):
                assert statuses(send(proxy, POST + H + framing + b"\r\n", body + GENUINE)) == [status, status]
            for head in ("folded length", "bare CR", "vertical tab in the coding"):
                assert_refused(send(proxy, DOUBTFUL[head] + b"\r\n" + SMUGGLED), 400)
    assert recorder.requests == []


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("framing", "body"), [(LENGTH, SMUGGLED), (CHUNKED, CHUNKS)], ids=["length", "chunked"])
def test_what_comes_with_the_off_switch_is_dropped(entry: str, framing: bytes, body: bytes, start: StartProxy) -> None:
    recorder = Recorder()
    with FakeIssuer() as issuer, recorder.server() as service:
        proxy = launch(start, entry, service.url, settings_for(issuer, PROXY_TERMINATION_ENDPOINT="/end-it"))
        answer = send(proxy, b"POST /end-it HTTP/1.1\r\n" + H + framing + b"\r\n" + body)
        assert statuses(answer) == [200]
        assert proxy.wait_until_ended() == 0
    assert recorder.requests == []


# --- what has no end ---------------------------------------------------------------------------------------------


def flood(proxy: ProxyProcess, start: bytes, piece: bytes, size: int = 160 * MIB) -> tuple[bytes, int]:
    """Send `piece` again and again until the proxy ends the connection; return its answer and by how much it grew."""
    before = peak = memory(proxy)
    with socket.create_connection(("127.0.0.1", port_of(proxy)), 10) as stream:
        with contextlib.suppress(ConnectionError):
            stream.sendall(start)
            for _ in range(size // len(piece)):
                stream.sendall(piece)
                if len(piece) > 4096:
                    peak = max(peak, memory(proxy))
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := stream.recv(65536):
                answer += data
    return answer, max(peak, memory(proxy)) - before


ENDLESS_HEADS = {
    "start line": (b"GET /", b"x" * MIB),
    "line": (b"GET / HTTP/1.1\r\nHost: evil.example\r\nX: ", b"x" * MIB),
    "block": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n", b"X: y\r\n" * (MIB // 6)),
    "folds": (b"GET / HTTP/1.1\r\nX: y\r\n", b" y\r\n" * (MIB // 4)),
    "blank lines": (b"", b"\r\n" * (MIB // 2)),
}


@pytest.mark.parametrize(("start_", "piece"), ENDLESS_HEADS.values(), ids=ENDLESS_HEADS)
def test_an_endless_head_is_refused_before_it_is_read(start_: bytes, piece: bytes, setup: Setup) -> None:
    answer, growth = flood(setup.proxy, start_, piece)
    assert_refused(answer, 431)
    assert growth < GROWTH
    assert setup.targets == []


def test_heads_may_have_256_kib(setup: Setup) -> None:
    # The service takes no longer lines.
    lines = b"".join(b"X: %s\r\n" % (b"x" * 50_000) for _ in range(5))
    start_, end = b"GET /genuine HTTP/1.1\r\n" + H + b"Connection: close\r\n" + lines + b"X: ", b"\r\n\r\n"
    rest = HEAD - len(start_ + end)
    assert statuses(send(setup.proxy, start_ + b"x" * rest + end)) == [200]
    assert_refused(send(setup.proxy, start_ + b"x" * (rest + 1) + end), 431)
    assert setup.targets == ["/genuine"]


@pytest.mark.parametrize("head", [POST + H, POST + b"Host: evil.example\r\n"], ids=["passed on", "refused"])
@pytest.mark.parametrize(
    ("start_", "piece"),
    [
        (b"1;", b"x" * MIB),
        (b"0\r\nX: ", b"x" * MIB),
        (b"0\r\n", b"X: y\r\n" * (MIB // 6)),
    ],
    ids=["extension", "trailer", "trailers"],
)
def test_endless_lines_between_chunks_end_the_connection(
    head: bytes, start_: bytes, piece: bytes, setup: Setup
) -> None:
    _, growth = flood(setup.proxy, head + CHUNKED + b"\r\n" + start_, piece)
    assert growth < GROWTH


def test_who_sends_ahead_without_end_loses_the_connection(setup: Setup) -> None:
    slow = b"GET /slow?seconds=3 HTTP/1.1\r\n" + H + b"\r\n"
    answer, growth = flood(setup.proxy, slow, SMUGGLED * (MIB // len(SMUGGLED)))
    assert answer == b""
    # The first one may not have left when the connection ended.
    assert set(setup.targets) <= {"/slow?seconds=3"}
    assert growth < GROWTH


def serving(begin: bytes, piece: bytes = b"", end: bytes = b"", *, first: int = 0) -> Callable[..., None]:
    """Answer with `begin`, `piece` without end and `end`, from the request of this number on; before with 200."""

    def script(server: RawServer, connection: socket.socket) -> None:
        while True:
            server.read_request(connection)
            if len(server.requests) > first:
                connection.sendall(begin)
                while piece and not server.stopping.is_set():
                    connection.sendall(piece)
                connection.sendall(end)
            else:
                connection.sendall(response(b"{}"))

    return script


def serve_and(
    start: StartProxy,
    entry: str,
    script: Callable[[RawServer, socket.socket], None],
    use: Callable[[ProxyProcess], None],
) -> Sequence[bytes]:
    with FakeIssuer() as issuer, RawServer(script) as service:
        use(launch(start, entry, f"http://127.0.0.1:{service.port}", settings_for(issuer)))
        return service.requests


ENDLESS_ANSWERS = {
    "start line": (b"HTTP/1.1 200 ", b"x" * MIB),
    "line": (b"HTTP/1.1 200 OK\r\nX: ", b"x" * MIB),
    "block": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * (MIB // 6)),
    "folds": (b"HTTP/1.1 200 OK\r\nX: y\r\n", b" y\r\n" * (MIB // 4)),
    "interim answer": (b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\nHTTP/1.1 103 Early Hints\r\nX: ", b"x" * MIB),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("begin", "piece"), ENDLESS_ANSWERS.values(), ids=ENDLESS_ANSWERS)
def test_an_endless_head_of_an_answer_is_a_fault_of_the_service(
    entry: str, begin: bytes, piece: bytes, start: StartProxy
) -> None:
    def use(proxy: ProxyProcess) -> None:
        with httpx.Client(trust_env=False, timeout=20) as client:
            assert client.get(proxy.url).status_code == 200
            before = memory(proxy)
            for method, content in (("GET", None), ("PUT", b"x" * 3_000_000), ("GET", None)):
                answer = client.request(method, proxy.url, content=content)
                assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (502, "upstream_unavailable")
                assert "its head is longer than 256 KiB" in answer.json()["detail"]
            assert memory(proxy) - before < GROWTH

    serve_and(start, entry, serving(begin, piece, first=1), use)


def test_heads_of_answers_may_have_256_kib(start: StartProxy) -> None:
    begin, end = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: ", b"\r\n\r\n"
    rest = HEAD - len(begin + end)

    def use(proxy: ProxyProcess, status: int) -> None:
        assert statuses(send(proxy, GENUINE)) == [status]

    serve_and(start, "launcher", serving(begin + b"x" * rest + end), lambda proxy: use(proxy, 200))
    serve_and(start, "launcher", serving(begin + b"x" * (rest + 1) + end), lambda proxy: use(proxy, 502))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("begin", "piece"),
    [(b"2\r\nok\r\n1;", b"x" * MIB), (b"2\r\nok\r\n0\r\nX: ", b"x" * MIB)],
    ids=["extension", "trailer"],
)
@pytest.mark.parametrize("status", [b"200 OK", b"401 Unauthorized"])
def test_endless_lines_between_the_chunks_of_an_answer_end_it(
    entry: str, status: bytes, begin: bytes, piece: bytes, start: StartProxy
) -> None:
    def use(proxy: ProxyProcess) -> None:
        assert httpx.get(proxy.url, trust_env=False).status_code == 200
        before = memory(proxy)
        answer = send(proxy, GENUINE)
        assert statuses(answer) == ([200] if status == b"200 OK" else [502])
        assert memory(proxy) - before < GROWTH

    serve_and(start, entry, serving(b"HTTP/1.1 %s\r\n%s\r\n%s" % (status, CHUNKED, begin), piece, first=1), use)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"", b"x" * MIB), (CHUNKED, b"100000\r\n%s\r\n" % (b"x" * MIB))],
    ids=["until the end", "chunked"],
)
def test_an_endless_refusal_of_the_token_passes_in_parts(
    entry: str, head: bytes, piece: bytes, start: StartProxy
) -> None:
    def use(proxy: ProxyProcess) -> None:
        assert httpx.get(proxy.url, trust_env=False).status_code == 200
        before = peak = memory(proxy)
        with httpx.stream("GET", proxy.url, trust_env=False, timeout=20) as answer:
            assert answer.status_code == 401
            size = 0
            for part in answer.iter_raw():
                size += len(part)
                peak = max(peak, memory(proxy))
                if size > 160 * MIB:
                    break
        assert peak - before < GROWTH

    requests = serve_and(start, entry, serving(b"HTTP/1.1 401 Unauthorized\r\n" + head + b"\r\n", piece, first=1), use)
    assert len(requests) == 2


def test_a_refusal_that_was_too_long_to_hold_still_costs_the_token(start: StartProxy) -> None:
    def use(proxy: ProxyProcess) -> None:
        tokens: set[bytes] = set()

        def another() -> bool:
            tokens.update(re.findall(rb"Bearer (\S+)", b"".join(service.requests)))
            with httpx.stream("GET", proxy.url, trust_env=False) as answer:
                return next(answer.iter_raw()) is not None and len(tokens) > 1

        eventually(another)

    script = serving(b"HTTP/1.1 401 Unauthorized\r\n\r\n", b"x" * MIB)
    with FakeIssuer() as issuer, RawServer(script) as service:
        use(start("launcher", f"http://127.0.0.1:{service.port}", settings_for(issuer)))


@pytest.mark.parametrize("entry", ["launcher", pytest.param("addon", marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", [wsproto.events.BytesMessage, wsproto.events.TextMessage])
def test_a_long_websocket_message_passes_in_parts(
    entry: str, kind: type[wsproto.events.BytesMessage | wsproto.events.TextMessage], start: StartProxy
) -> None:
    part, parts = ("ä" * (MIB // 2) if kind is wsproto.events.TextMessage else bytes(MIB)), 100

    def script(server: RawServer, connection: socket.socket) -> None:
        service = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
        server.read_request(connection)
        service.receive_data(server.requests[-1])
        assert [type(event) for event in service.events()] == [wsproto.events.Request]
        connection.sendall(service.send(wsproto.events.AcceptConnection(extensions=[PerMessageDeflate()])))
        connection.sendall(service.send(wsproto.events.TextMessage("short")))
        for number in range(parts):
            connection.sendall(service.send(kind(part, message_finished=number == parts - 1)))  # type: ignore[arg-type]
        connection.sendall(service.send(wsproto.events.TextMessage("short again")))
        server.wait_for_end(connection)

    def use(proxy: ProxyProcess) -> None:
        client, before, peak = wsproto.WSConnection(wsproto.ConnectionType.CLIENT), memory(proxy), 0
        with socket.create_connection(("127.0.0.1", port_of(proxy)), 20) as stream:
            offer = wsproto.events.Request(host="localhost", target="/", extensions=[PerMessageDeflate()])
            stream.sendall(client.send(offer))
            lengths, frames = [0], 0
            while len(lengths) < 4:
                client.receive_data(stream.recv(65536) or None)
                for event in client.events():
                    if isinstance(event, wsproto.events.BytesMessage | wsproto.events.TextMessage):
                        assert len(lengths) != 2 or isinstance(event, kind)
                        lengths[-1] += len(event.data)
                        frames += event.frame_finished
                        lengths += [0] if event.message_finished else []
                peak = max(peak, memory(proxy))
        assert lengths == [len("short"), parts * len(part), len("short again"), 0]
        assert frames > 3
        assert peak - before < GROWTH

    serve_and(start, entry, script, use)


@pytest.mark.parametrize("entry", ENTRIES)
def test_heads_in_http2_have_limits_in_both_directions(entry: str, start: StartProxy, certificate: Path) -> None:
    much = [(f"x-{number}", "y" * 1000) for number in range(100)]
    with FakeIssuer() as issuer, Http2Service(certificate, headers=much) as service:
        proxy = launch(start, entry, service.url, settings_for(issuer, TLS_CA_FILE=str(certificate)))
        assert http2_get(port_of(proxy), {}) == 502
        assert len(service.requests) == 1
        before = memory(proxy)
        assert http2_get(port_of(proxy), dict(much)) == 0
        assert http2_continuations(port_of(proxy), bytes(16_384), 160 * MIB // 16_384) < 160 * MIB // 16_384
        assert memory(proxy) - before < GROWTH
        assert len(service.requests) == 1


# --- the answer after a refused token ----------------------------------------------------------------------------


def test_another_refusal_than_401_is_the_services_answer(start: StartProxy) -> None:
    def use(proxy: ProxyProcess) -> None:
        assert httpx.get(proxy.url, trust_env=False).status_code == 403

    assert len(serve_and(start, "launcher", serving(response(b"no", status=403)), use)) == 1


LARGE = b"x" * 3 * MIB
AGAIN = {
    "length": (response(b"ok"), b"ok"),
    "chunked": (b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n2\r\nok\r\n0\r\n\r\n", b"ok"),
    "large": (response(LARGE), LARGE),
    "refused again": (response(b"no", status=401), b"no"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("good", "expected"), AGAIN.values(), ids=AGAIN)
@pytest.mark.parametrize("refusal", [b"Content-Length: 2\r\n\r\nno", b"Content-Length: 0\r\nConnection: close\r\n\r\n"])
def test_after_another_token_the_whole_answer_comes(
    entry: str, good: bytes, expected: bytes, refusal: bytes, start: StartProxy
) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        while True:
            server.read_request(connection)
            if len(server.requests) > 1:
                connection.sendall(good)
                continue
            connection.sendall(b"HTTP/1.1 401 Unauthorized\r\n" + refusal)
            if b"close" in refusal:
                return

    def use(proxy: ProxyProcess) -> None:
        with httpx.Client(trust_env=False) as client:
            assert client.post(proxy.url, content=b"body").content == expected
            assert client.get(proxy.url).content == expected

    first, second, _ = serve_and(start, entry, script, use)
    assert first.endswith(b"\r\n\r\nbody")
    assert second.endswith(b"\r\n\r\nbody")
    assert re.findall(rb"Bearer (\S+)", first) != re.findall(rb"Bearer (\S+)", second)


@pytest.mark.parametrize("entry", ENTRIES)
def test_after_another_token_http2_asks_again_on_the_same_connection(
    entry: str, start: StartProxy, certificate: Path
) -> None:
    with FakeIssuer() as issuer, Http2Service(certificate, [401]) as service:
        proxy = launch(start, entry, service.url, settings_for(issuer, TLS_CA_FILE=str(certificate)))
        assert http2_get(port_of(proxy), {"content-length": "4"}, method="POST", body=[b"body"]) == 200
        first, second = service.requests
        assert first.values("Authorization") != second.values("Authorization")
        assert len(service.names) == 1
