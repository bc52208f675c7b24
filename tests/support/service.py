"""A service that writes down what reaches it, and answers in all the ways that a proxy has to get through."""

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import h2.config
import h2.connection
import h2.events
import wsproto
import wsproto.events
from hyperframe.frame import ContinuationFrame, HeadersFrame

from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer


@dataclass(frozen=True)
class Received:
    """A request as it arrived, its headers in their order."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def values(self, name: str) -> list[str]:
        return [value for given, value in self.headers if given.lower() == name.lower()]

    @property
    def names(self) -> set[str]:
        return {name.lower() for name, _ in self.headers}


@dataclass
class Recorder:
    """The service; `requests` are those so far."""

    requests: list[Received] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def server(self, tls: ssl.SSLContext | None = None) -> LocalServer:
        """Return a server that writes down here what it gets. With `tls`, its `url` is right but for the scheme."""
        recorder = self

        class RecorderHandler(Handler):
            def respond(self) -> None:
                received = Received(self.command, self.path, list(self.headers.items()), self.read_body())
                recorder.requests.append(received)
                parts = urlsplit(self.path)
                match parts.path:
                    case "/slow":
                        recorder.waiting.release()
                        time.sleep(float(parse_qs(parts.query)["seconds"][0]))
                        self.answer(200, {"slow": True})
                    case "/held":
                        recorder.waiting.release()
                        recorder.release.wait(20)
                        self.answer(200, b"x" * 4_000_000, {"Content-Type": "application/octet-stream"})
                    case "/redirect":
                        self.answer(302, b"", {"Location": "http://127.0.0.1:9/elsewhere"})
                    case "/moved":
                        self.answer(201, {}, {"Location": f"http://{self.headers['Host']}/jobs/1"})
                    case "/cors":
                        self.answer(
                            200,
                            {},
                            {
                                "Access-Control-Allow-Origin": "*",
                                "Access-Control-Allow-Credentials": "true",
                                "Access-Control-Allow-Methods": "*",
                                "Access-Control-Expose-Headers": "Link",
                                "Cross-Origin-Resource-Policy": "same-site",
                                "Timing-Allow-Origin": "*",
                                "Vary": "A",
                            },
                        )
                    case "/trailers":
                        self.wfile.write(
                            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n"
                            b"2\r\nok\r\n0\r\nX-T: t\r\n\r\n"
                        )
                    case "/socket":
                        echo_one_message(self)
                    case _:
                        self.answer(200, {"length": len(received.body)})

        server = LocalServer(RecorderHandler)
        if tls is not None:
            server._server.socket = tls.wrap_socket(server._server.socket, server_side=True)
        return server


def echo_one_message(handler: BaseHTTPRequestHandler, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Accept a WebSocket with these headers, send back the first message, and close."""
    connection = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    connection.initiate_upgrade_connection(
        [(name.encode(), value.encode()) for name, value in handler.headers.items()], handler.path
    )
    handler.wfile.write(connection.send(wsproto.events.AcceptConnection(extra_headers=list(headers))))
    while True:
        for event in connection.events():
            if isinstance(event, wsproto.events.TextMessage):
                handler.wfile.write(connection.send(wsproto.events.TextMessage(data=event.data)))
                handler.wfile.write(connection.send(wsproto.events.CloseConnection(code=1000)))
                handler.close_connection = True
                return
        connection.receive_data(handler.connection.recv(65536))


def websocket_echo(port: int, text: str, headers: list[tuple[bytes, bytes]], host: str = "localhost") -> str | int:
    """Open a WebSocket at the proxy; return what comes back for `text`, or the status when it is refused."""
    connection = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    with socket.create_connection(("127.0.0.1", port), 10) as stream:
        request = wsproto.events.Request(host=host, target="/socket", extra_headers=headers)
        stream.sendall(connection.send(request))
        while data := stream.recv(65536):
            connection.receive_data(data)
            for event in connection.events():
                if isinstance(event, wsproto.events.AcceptConnection):
                    stream.sendall(connection.send(wsproto.events.TextMessage(data=text)))
                elif isinstance(event, wsproto.events.RejectConnection):
                    return event.status_code
                elif isinstance(event, wsproto.events.TextMessage):
                    return event.data
    raise AssertionError("the connection ended without an answer")


def exchange(port: int, request: bytes) -> bytes:
    """Send bytes to the proxy and return its answer, or nothing when it ended the connection."""
    answer = b""
    with contextlib.suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        while data := connection.recv(65536):
            answer += data
            head, _, body = answer.partition(b"\r\n\r\n")
            lengths = re.findall(rb"\r\ncontent-length: ([0-9]+)", head.lower())
            if lengths and len(body) >= int(lengths[0]):
                break
    return answer


def http2_get(port: int, headers: dict[str, str], authority: str = "localhost", **how: Any) -> int:
    """Ask the proxy over HTTP/2, as `http2_ask` does, and return the status, 0 when it ended the connection."""
    return http2_ask(port, headers, authority, **how)[0]


def http2_ask(
    port: int,
    headers: dict[str, str],
    authority: str = "localhost",
    *,
    server_name: str = "localhost",
    tunnel_to: str | None = None,
    tunnel_headers: bytes = b"",
    method: str = "GET",
    path: str = "/",
    body: Sequence[bytes] = (),
    trailers: bool = False,
) -> tuple[int, dict[str, str], bytes]:
    """Ask the proxy over HTTP/2 and return status, headers and body; the status is 0 when it ended the connection.

    `server_name` is what TLS asks for; with `tunnel_to` all that goes through a CONNECT, which
    also has `tunnel_headers`. A `body` has no length.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # mitmproxy's own CA
    context.set_alpn_protocols(["h2"])
    config = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False)
    connection = h2.connection.H2Connection(config)
    pseudo = {":method": method, ":scheme": "https", ":authority": authority, ":path": path}
    status, received, content = 0, dict[str, str](), b""
    with contextlib.ExitStack() as opened:
        plain = opened.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        if tunnel_to is not None:
            plain.sendall(f"CONNECT {tunnel_to} HTTP/1.1\r\nHost: {tunnel_to}\r\n".encode() + tunnel_headers + b"\r\n")
            assert b" 200 " in plain.recv(4096)
        stream = opened.enter_context(context.wrap_socket(plain, server_hostname=server_name))
        assert stream.selected_alpn_protocol() == "h2"
        with contextlib.suppress(ConnectionResetError):
            connection.initiate_connection()
            connection.send_headers(1, list((pseudo | headers).items()), end_stream=not body)
            for part in body:
                connection.send_data(1, part)
            if trailers:
                connection.send_headers(1, [("x-t", "1")], end_stream=True)
            elif body:
                connection.end_stream(1)
            stream.sendall(connection.data_to_send())
            while data := stream.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        received = {str(name): str(value) for name, value in event.headers or ()}
                        status = int(received[":status"])
                    elif isinstance(event, h2.events.DataReceived):
                        content += event.data or b""
                    elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                        return status, received, content
                stream.sendall(connection.data_to_send())
    return status, received, content


def http2_continuations(port: int, block: bytes, most: int) -> int:
    """Begin a header block and go on with it until the proxy ends the connection; return how many frames it took."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # mitmproxy's own CA
    context.set_alpn_protocols(["h2"])
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain) as stream:
        stream.sendall(connection.data_to_send() + HeadersFrame(1, data=block).serialize())
        frame = ContinuationFrame(1, data=block).serialize()
        for number in range(most):
            try:
                stream.sendall(frame)
            except OSError:
                return number
    return most


class Http2Service:
    """A TLS server that speaks HTTP/2 only and writes requests down, and the names by which TLS asked for it.

    Its answers have the statuses given, one after the other, and then 200; and these headers.
    """

    def __init__(
        self, certificate: Path, statuses: Sequence[int] = (), headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._statuses, self._headers = list(statuses), list(headers)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._context.set_alpn_protocols(["h2"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self.names: list[str | None] = []
        self.requests: list[Received] = []
        self._context.sni_callback = lambda _socket, name, _context: self.names.append(name)

    def __enter__(self) -> "Http2Service":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        with contextlib.suppress(OSError), plain, self._context.wrap_socket(plain, server_side=True) as stream:
            connection.initiate_connection()
            stream.sendall(connection.data_to_send())
            while data := stream.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        headers = [(str(name), str(value)) for name, value in event.headers or ()]
                        self.requests.append(Received("", "", headers))
                        status = self._statuses.pop(0) if self._statuses else 200
                        head = [(":status", str(status)), *self._headers]
                        connection.send_headers(event.stream_id or 0, head, end_stream=True)
                stream.sendall(connection.data_to_send())


@dataclass(frozen=True)
class Seen:
    """A request as it arrived at the service."""

    method: str
    target: str
    authorization: list[str]
    headers: Mapping[str, str]
    body_length: int
    authorized: bool


class Service:
    """The protected service: accepts one Bearer token that the issuer issued and that has not expired."""

    def __init__(self, issuer: FakeIssuer) -> None:
        self.seen: list[Seen] = []
        self._server = LocalServer(self._handler(issuer))
        self.url = self._server.url

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def _handler(self, issuer: FakeIssuer) -> type[Handler]:
        seen = self.seen

        class ServiceHandler(Handler):
            def respond(self) -> None:
                length = len(self.read_body())
                given = self.headers.get_all("Authorization") or []
                authorized = len(given) == 1 and issuer.accepts(given[0].removeprefix("Bearer "))
                seen.append(Seen(self.command, self.path, given, dict(self.headers), length, authorized))
                self.answer(200 if authorized else 401, {"path": self.path, "length": length})

        return ServiceHandler
