"""Servers that misbehave on purpose, byte by byte, for tests of what talks to them; and ports that are free or not."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit

PATIENCE = 5.0
"""Seconds after which something that should have happened counts as not happening."""


class RawServer:
    """Runs `script` with each connection to a free loopback port, in a thread, while its `with` block lasts.

    `requests` are the heads and bodies that `read_request` read; `ended` is set when a client has gone away.
    """

    def __init__(self, script: "Callable[[RawServer, socket.socket], None]", tls: ssl.SSLContext | None = None) -> None:
        self._script = script
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self.requests: list[bytes] = []
        self.connections = 0
        self.ended = threading.Event()
        self.stopping = threading.Event()
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/realms/test"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.stopping.set()
            for connection in [self._listener, *self._open]:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        # Nothing is closed before its thread has ended: its number could become another connection's.
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for connection in [self._listener, *self._open]:
            connection.close()

    def read_request(self, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += _receive(connection)
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while len(body) < int((lengths or [b"0"])[0]):
            body += _receive(connection)
        self.requests.append(head + b"\r\n\r\n" + body)

    def wait_for_end(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(65536):
                pass
        self.ended.set()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self.stopping.is_set():
                    connection.close()
                    return
                self.connections += 1
                self._open.append(connection.dup())
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, plain: socket.socket) -> None:
        # What the client makes of a connection that breaks is the client's test; here it only ends the script.
        with contextlib.suppress(OSError), plain, self._secure(plain) as connection:
            try:
                self._script(self, connection)
            finally:
                # Closing does not hang up while there is the duplicate.
                connection.shutdown(socket.SHUT_RDWR)

    def _secure(self, plain: socket.socket) -> socket.socket:
        return self._tls.wrap_socket(plain, server_side=True) if self._tls else plain


def replies(*pieces: bytes, keep_open: bool = False) -> Callable[[RawServer, socket.socket], None]:
    """Read a request, send `pieces`, and hang up, or with `keep_open` wait until the client does."""

    def script(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        for piece in pieces:
            connection.sendall(piece)
        if keep_open:
            server.wait_for_end(connection)

    return script


def drips(start: bytes, piece: bytes, interval: float = 0.05) -> Callable[[RawServer, socket.socket], None]:
    """Read a request, send `start` and then `piece` every `interval` seconds for as long as the client listens."""

    def script(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(start)
        try:
            while not server.stopping.wait(interval):
                connection.sendall(piece)
        finally:
            server.ended.set()

    return script


def says_nothing(server: RawServer, connection: socket.socket) -> None:
    """Wait until the client hangs up."""
    server.wait_for_end(connection)


def http(body: bytes, *headers: str, status: int = 200) -> bytes:
    """Return an HTTP response whose length is given as it is."""
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionResetError
    return data


def free_port() -> int:
    """Return a loopback TCP port that nothing listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def accepts(url: str) -> bool:
    """Tell whether something accepts connections where a URL leads."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port), 1).close()
    except OSError:
        return False
    return True
