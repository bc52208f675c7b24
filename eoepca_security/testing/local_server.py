"""A small HTTP server on a free loopback port, in a thread: for the embedded issuer, the demo and tests."""

import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class Handler(BaseHTTPRequestHandler):
    """A request handler that keeps connections alive, writes no log, and answers with JSON."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds until an idle connection is closed
    disable_nagle_algorithm = True

    def respond(self) -> None:
        """Answer the request, with any method."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        # The base class looks up do_<METHOD>.
        if name.startswith("do_"):
            return self.respond
        raise AttributeError(name)

    def log_message(self, *_: object) -> None:
        """Log nothing: the client is on the same machine and reports its own errors."""

    def handle_one_request(self) -> None:
        """Serve the next request of this connection."""
        self._body: bytes | None = None
        super().handle_one_request()

    def read_body(self) -> bytes:
        """Return the request's body, of at most 1 MiB."""
        if self._body is None:
            length = int(self.headers.get("Content-Length") or 0)
            self._body = self.rfile.read(min(length, 1024 * 1024))
            # Otherwise the rest of the body is read as the next request.
            self.close_connection = self.close_connection or length > len(self._body)
        return self._body

    def answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send `body`: bytes as they are, anything else as JSON."""
        self.read_body()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Close the connections that clients keep open."""
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """Log nothing when a client disconnects early."""


class LocalServer:
    """Serves a handler class for the duration of its `with` block."""

    def __init__(self, handler: type[Handler], port: int = 0) -> None:
        self._server = _Quiet(("127.0.0.1", port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """The server's URL, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
