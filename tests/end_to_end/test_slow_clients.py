"""Clients that stop in the middle of what they do, beside those that are merely slow, or wait."""

import contextlib
import itertools
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
import wsproto
import wsproto.events

from eoepca_security.testing import FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import RawServer
from tests.support.network import http as response
from tests.support.processes import ProxyProcess, StartProxy, admin_of
from tests.support.raw_http import assert_refused, launch, port_of, read_all, statuses
from tests.support.waiting import eventually

LIMIT = 1
PAUSE = 0.3
LONG = 1.6
MIB = 1024 * 1024
H = b"Host: localhost\r\n"
UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@dataclass
class Service:
    """Does what the target says.

    `over` counts the connections on which the proxy hung up, and `flooded` the bytes of the last flood that it read.
    """

    over: list[str] = field(default_factory=list)
    flooded: int = 0

    def __call__(self, server: RawServer, connection: socket.socket) -> None:  # noqa: C901  one case for each target
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := connection.recv(1)):
                return
            head += data
        target = head.split()[1].decode()
        try:
            match target:
                case "/flood":
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1024 * MIB))
                    self.flooded = 0
                    while not server.stopping.is_set():
                        self.flooded += connection.send(bytes(65536))
                case "/events":
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                    server.stopping.wait(LONG)
                    connection.sendall(b"data: late\n\n")
                case "/reads-late":
                    server.stopping.wait(LONG)
                    received = len(read_upload(connection))
                    connection.sendall(response(b"%d" % received))
                case "/talk":
                    connection.sendall(b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n2\r\nhi\r\n")
                    connection.sendall(b"2\r\nok\r\n0\r\n\r\n" if read_upload(connection) else b"")
                case "/socket":
                    echo(connection, head)
                case "/upload":
                    received = len(read_upload(connection))
                    connection.sendall(response(b"%d" % received))
                case _:
                    connection.sendall(response(b"next"))
            server.wait_for_end(connection)
        except OSError:
            pass
        finally:
            self.over.append(target)


def read_upload(connection: socket.socket) -> bytes:
    """Read a chunked body; a length is not needed here."""
    body = b""
    while not body.endswith(b"0\r\n\r\n"):
        data = connection.recv(MIB)
        if not data:
            raise ConnectionResetError
        body += data
    return body


def echo(connection: socket.socket, head: bytes) -> None:
    """Accept a WebSocket, and send back all messages."""
    service = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    service.receive_data(head)
    while True:
        for event in service.events():
            if isinstance(event, wsproto.events.Request):
                connection.sendall(service.send(wsproto.events.AcceptConnection()))
            elif isinstance(event, wsproto.events.TextMessage):
                connection.sendall(
                    service.send(wsproto.events.TextMessage(event.data, event.frame_finished, event.message_finished))
                )
            elif isinstance(event, wsproto.events.CloseConnection):
                return
        service.receive_data(connection.recv(65536) or None)


@dataclass
class Setup:
    proxy: ProxyProcess
    service: Service
    service_port: int
    is_launcher: bool

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port_of(self.proxy)), 20)

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.proxy.process.pid}/fd").iterdir())

    @contextlib.contextmanager
    def leaving_nothing(self, target: str = "") -> Iterator[None]:
        """Check that all of an exchange is released, and that the service saw its end if it saw any of it."""
        eventually(lambda: self.status("requests_in_flight") == 0)
        before = self.descriptors()
        yield
        eventually(lambda: self.status("requests_in_flight") == 0 and self.descriptors() <= before)
        eventually(lambda: self.status("held_bytes") == 0)
        eventually(lambda: not target or target in self.service.over)

    def status(self, name: str) -> int:
        if "admin" not in self.proxy.output:
            return 0
        with httpx.Client(trust_env=False) as client:
            return int(client.get(f"{admin_of(self.proxy)}/status").json()[name])


@pytest.fixture(scope="module", params=["launcher", pytest.param("addon", marks=pytest.mark.soak)])
def running(request: pytest.FixtureRequest, start: StartProxy) -> Iterator[Setup]:
    service = Service()
    with FakeIssuer() as issuer, RawServer(service) as server:
        environment = settings_for(issuer, PROXY_CLIENT_TIMEOUT=str(LIMIT), PROXY_ADMIN="127.0.0.1:0")
        proxy = launch(start, request.param, f"http://127.0.0.1:{server.port}", environment)
        yield Setup(proxy, service, server.port, request.param == "launcher")


@pytest.fixture
def setup(running: Setup) -> Setup:
    running.service.over.clear()
    return running


STALLED = {
    "held": (b"Content-Length: 10\r\n\r\nhalf", ""),
    "streamed": (CHUNKED + b"\r\n4\r\nhalf\r\n", "/upload"),
    "none of it": (b"Content-Length: 10\r\n\r\n", ""),
    "a handshake": (UPGRADE + b"Content-Length: 10\r\n\r\nhalf", ""),
    "after 100": (b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n", ""),
}


@pytest.mark.parametrize(("rest", "target"), STALLED.values(), ids=STALLED)
def test_a_body_that_stops_moving_is_given_up(rest: bytes, target: str, setup: Setup) -> None:
    with setup.leaving_nothing(target), setup.connect() as client:
        client.sendall(b"POST /upload HTTP/1.1\r\n" + H + rest)
        answer = read_all(client).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert_refused(answer, 408)
        assert f"no more of its body came for {LIMIT} s".encode() in answer


def test_so_is_one_that_nobody_wants(setup: Setup) -> None:
    with setup.leaving_nothing(), setup.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 10\r\n\r\nhalf")
        assert statuses(read_all(client)) == [403]


def test_an_upload_that_moves_is_not(setup: Setup) -> None:
    with setup.connect() as client:
        client.sendall(b"POST /upload HTTP/1.1\r\n" + H + b"Connection: close\r\n" + CHUNKED + b"\r\n")
        ends = time.monotonic() + LONG
        while time.monotonic() < ends:
            client.sendall(b"1\r\nx\r\n")
            time.sleep(PAUSE)
        client.sendall(b"0\r\n\r\n")
        assert statuses(read_all(client)) == [200]


def test_nor_is_one_that_waits_for_a_service_that_does_not_read(setup: Setup) -> None:
    with setup.connect() as client:
        client.sendall(b"POST /reads-late HTTP/1.1\r\n" + H + b"Connection: close\r\n" + CHUNKED + b"\r\n")
        size = 32 * MIB
        client.sendall(b"%x\r\n%s\r\n" % (size, bytes(size)))  # far more than all that stands between
        client.sendall(b"0\r\n\r\n")
        answer = read_all(client)
        assert statuses(answer) == [200]
        assert int(answer.rpartition(b"\n")[2]) > size


def test_who_has_part_of_the_answer_may_wait_with_the_rest_of_the_request(setup: Setup) -> None:
    with setup.connect() as client:
        client.sendall(b"POST /talk HTTP/1.1\r\n" + H + b"Connection: close\r\n" + CHUNKED + b"\r\n")
        answer = client.recv(65536)
        time.sleep(LONG)
        client.sendall(b"0\r\n\r\n")
        assert (answer + read_all(client)).endswith(b"2\r\nok\r\n0\r\n\r\n")


def test_events_may_be_as_rare_as_the_service_wants(setup: Setup) -> None:
    with httpx.Client(trust_env=False) as client, client.stream("GET", f"{setup.proxy.url}/events") as answer:
        assert next(answer.iter_text()) == "data: late\n\n"


@pytest.mark.parametrize("reads", [0, 200_000], ids=["nothing", "a part"])
def test_an_answer_that_nobody_reads_is_given_up(reads: int, setup: Setup) -> None:
    with setup.leaving_nothing("/flood"), setup.connect() as client:
        client.sendall(b"GET /flood HTTP/1.1\r\n" + H + b"\r\n")
        while reads > 0:
            reads -= len(client.recv(65536))
        eventually(lambda: "/flood" in setup.service.over)


def test_an_answer_that_is_read_slowly_is_not(setup: Setup) -> None:
    with setup.connect() as client:
        client.sendall(b"GET /flood HTTP/1.1\r\n" + H + b"\r\n")
        ends = time.monotonic() + LONG
        while time.monotonic() < ends:
            assert client.recv(MIB)
            time.sleep(0.05)
        rest = 64 * MIB  # far more than all that stands between
        while rest > 0:
            data = client.recv(MIB)
            assert data
            rest -= len(data)


# --- WebSockets --------------------------------------------------------------------------------------------------


class Conversation:
    """A WebSocket through the proxy."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.ws = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        stream.sendall(self.ws.send(wsproto.events.Request(host="localhost", target="/socket")))
        assert isinstance(self.next(), wsproto.events.AcceptConnection)

    def next(self) -> wsproto.events.Event:
        while True:
            for event in self.ws.events():
                return event
            self.ws.receive_data(self.stream.recv(65536) or None)

    def heard(self) -> str:
        text = ""
        while isinstance(event := self.next(), wsproto.events.TextMessage):
            text += event.data
            if event.message_finished:
                break
        return text


BEGUN = {
    "a head": lambda _: bytes([0x81]),
    "a frame": lambda ws: ws.send(wsproto.events.TextMessage("x" * 100))[:-50],
    "a message": lambda ws: ws.send(wsproto.events.TextMessage("x", message_finished=False)),
    "an empty one": lambda ws: ws.send(wsproto.events.TextMessage("", message_finished=False)),
    "a ping": lambda ws: ws.send(wsproto.events.Ping(b"payload"))[:-3],
}


@pytest.mark.parametrize("begin", BEGUN.values(), ids=BEGUN)
def test_a_message_that_stops_moving_ends_the_conversation(begin: object, setup: Setup) -> None:
    with setup.leaving_nothing("/socket"), setup.connect() as stream:
        conversation = Conversation(stream)
        assert callable(begin)
        stream.sendall(begin(conversation.ws))
        end = conversation.next()
        assert isinstance(end, wsproto.events.CloseConnection)
        assert (end.code, end.reason) == (1008, f"no more of the message came for {LIMIT} s")
        assert stream.recv(1) == b""


def test_between_messages_both_sides_may_be_silent(setup: Setup) -> None:
    with setup.connect() as stream:
        conversation = Conversation(stream)
        time.sleep(LONG)
        stream.sendall(conversation.ws.send(wsproto.events.TextMessage("still there")))
        assert conversation.heard() == "still there"
        message = conversation.ws.send(wsproto.events.TextMessage("slow"))
        for piece in (message[:1], message[1:4], message[4:8], message[8:9], message[9:]):
            time.sleep(PAUSE)
            stream.sendall(piece)
        assert conversation.heard() == "slow"


# --- HTTP/2 ------------------------------------------------------------------------------------------------------


class Http2:
    """A connection of HTTP/2 to the proxy that never grants more than the first window of each stream by itself."""

    def __init__(self, plain: socket.socket) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # mitmproxy's own CA
        context.set_alpn_protocols(["h2"])
        self.stream = context.wrap_socket(plain, server_hostname="localhost")
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.http.initiate_connection()
        self.events: list[h2.events.Event] = []

    def begin(self, stream_id: int, method: str, path: str, *, ends: bool = True) -> None:
        pseudo = {":method": method, ":scheme": "https", ":authority": "localhost", ":path": path}
        self.http.send_headers(stream_id, list(pseudo.items()), end_stream=ends)
        self.flush()

    def flush(self) -> None:
        self.stream.sendall(self.http.data_to_send())

    def next(self, kind: type[h2.events.Event], stream_id: int) -> h2.events.Event:
        """Return the next event of this kind on this stream, and forget those before."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if isinstance(event, kind) and getattr(event, "stream_id", 0) == stream_id:
                    return event
            self.events += self.http.receive_data(self.stream.recv(65536))
            self.flush()


def header(event: h2.events.Event, name: str) -> str:
    assert isinstance(event, h2.events.ResponseReceived)
    return {str(key): str(value) for key, value in event.headers or ()}[name]


def test_in_http2_only_the_stream_that_stops_is_given_up(setup: Setup) -> None:
    with setup.leaving_nothing("/upload"), setup.connect() as plain:
        client = Http2(plain)
        client.begin(1, "POST", "/upload", ends=False)
        client.http.send_data(1, b"half")
        client.begin(3, "GET", "/events")
        assert header(client.next(h2.events.ResponseReceived, 3), ":status") == "200"
        ended = client.next(h2.events.ResponseReceived, 1)
        assert (header(ended, ":status"), header(ended, "x-oidc-proxy-error")) == ("408", "bad_request")
        body = client.next(h2.events.DataReceived, 1)
        assert isinstance(body, h2.events.DataReceived)
        assert json.loads(body.data or b"")["detail"].startswith("no more of its body came")
        client.next(h2.events.StreamReset, 1)
        late = client.next(h2.events.DataReceived, 3)
        assert isinstance(late, h2.events.DataReceived)
        assert late.data == b"data: late\n\n"
        client.stream.close()


def test_in_http2_an_upload_that_moves_and_an_answer_that_is_read_go_on(setup: Setup) -> None:
    with setup.connect() as plain:
        client = Http2(plain)
        client.begin(1, "POST", "/upload", ends=False)
        client.begin(3, "GET", "/flood")
        assert header(client.next(h2.events.ResponseReceived, 3), ":status") == "200"
        ends = time.monotonic() + LONG
        for stream_id in itertools.cycle((0, 3)):
            client.http.send_data(1, b"x")
            # In small parts: the window of the connection and that of the stream.
            client.http.increment_flow_control_window(1000, stream_id or None)
            client.flush()
            if time.monotonic() > ends:
                break
            time.sleep(PAUSE / 2)
        client.http.end_stream(1)
        client.flush()
        assert header(client.next(h2.events.ResponseReceived, 1), ":status") == "200"
        client.stream.close()


def test_in_http2_a_stream_that_is_not_read_is_given_up(setup: Setup) -> None:
    with setup.leaving_nothing("/flood"), setup.connect() as plain:
        client = Http2(plain)
        client.begin(1, "GET", "/flood")
        assert header(client.next(h2.events.ResponseReceived, 1), ":status") == "200"
        client.next(h2.events.StreamReset, 1)
        assert not setup.is_launcher or setup.service.flooded < 16 * MIB
        client.http.increment_flow_control_window(MIB)
        client.begin(3, "GET", "/")
        assert header(client.next(h2.events.ResponseReceived, 3), ":status") == "200"
        client.stream.close()


# --- whether somebody is there -----------------------------------------------------------------------------------


def test_the_system_asks_both_sides_of_a_quiet_connection_whether_they_are_there(setup: Setup) -> None:
    def timers(port: int, column: int) -> set[str]:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {row[5][:2] for row in rows if row[3] == "01" and int(row[column].partition(":")[2], 16) == port}

    with setup.connect() as stream:
        Conversation(stream)
        # 02 is the timer for the next probe, that on the proxy's side: the client has none.
        eventually(lambda: timers(stream.getsockname()[1], 2) == {"02"})
        eventually(lambda: "02" in timers(setup.service_port, 2))
