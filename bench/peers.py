"""The proxy's peers in the benchmark: a service, a slow link, and clients that keep it busy.

Each runs in its own process, `python peers.py service|relay|load|http2 …`, so that they do not share processor time.
"""

import asyncio
import base64
import hashlib
import json
import ssl
import sys
import time

import h2.connection
import h2.events

SMALL = b"hello, this is a small answer of the protected service\n"
CHUNK = b"x" * 65536
EVENTS = 5
EVENT_GAP = 0.3


class Service(asyncio.Protocol):
    """Answers `/small`, `/large/<bytes>`, `/events` and uploads; trusts its clients to send valid HTTP/1.1.

    It accepts WebSockets and ignores their messages.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._data = b""
        self._left = 0
        self._chunked = False
        self._is_websocket = False
        self._resumed = asyncio.Event()
        self._resumed.set()

    def pause_writing(self) -> None:
        self._resumed.clear()

    def resume_writing(self) -> None:
        self._resumed.set()

    def data_received(self, data: bytes) -> None:
        if self._is_websocket:
            return
        if self._left > 0:
            self._left -= len(data)
            if self._left <= 0:
                self._answer(b"/")
            return
        if self._chunked:
            self._data = (self._data + data)[-5:]
            if self._data == b"0\r\n\r\n":
                self._chunked, self._data = False, b""
                self._answer(b"/")
            return
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head, self._data = self._data[:end], self._data[end + 4 :]
            lower = head.lower()
            if b"\r\nupgrade: websocket" in lower:
                self._accept(head.partition(b"\r\nSec-WebSocket-Key: ")[2].partition(b"\r\n")[0])
                return
            length = lower.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0].strip()
            self._left = int(length or 0) - len(self._data) if length and int(length) else 0
            self._chunked = b"\r\ntransfer-encoding: chunked" in lower
            if self._left > 0 or self._chunked:
                self._data = self._data[-5:] if self._chunked else b""
                return
            if length and int(length):
                self._data = b""
            self._answer(head.split(b" ", 2)[1])

    def _accept(self, key: bytes) -> None:
        self._is_websocket = True
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        self._write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )

    def _answer(self, path: bytes) -> None:
        if path.startswith(b"/large/"):
            self._task = asyncio.get_running_loop().create_task(self._send_large(int(path[7:])))
        elif path == b"/events":
            self._task = asyncio.get_running_loop().create_task(self._send_events())
        else:
            self._write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(SMALL), SMALL))

    def _write(self, data: bytes) -> None:
        assert isinstance(self._transport, asyncio.WriteTransport)
        self._transport.write(data)

    async def _send_large(self, size: int) -> None:
        self._write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while size > 0:
            await self._resumed.wait()
            self._write(CHUNK[: min(size, len(CHUNK))])
            size -= len(CHUNK)
            await asyncio.sleep(0)

    async def _send_events(self) -> None:
        self._write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(EVENTS):
            event = b"data: %r\n\n" % time.time()
            self._write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(EVENT_GAP)
        self._write(b"0\r\n\r\n")


async def service(port: int, certificate: str = "") -> None:
    """Run the service, with TLS if there is a certificate file."""
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    server = await asyncio.get_running_loop().create_server(Service, "127.0.0.1", port, ssl=context)
    await server.serve_forever()


async def relay(port: int, target: int, delay: float) -> None:
    """Forward bytes with `delay` seconds each way; the first ones also wait as long as a TCP handshake."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, opened_at: float) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def send() -> None:
            while True:
                at, data = await queue.get()
                await asyncio.sleep(max(at - loop.time(), 0))
                if not data:
                    writer.close()
                    return
                writer.write(data)

        sending = loop.create_task(send())
        data = b"-"
        while data:
            try:
                data = await reader.read(65536)
            except OSError:
                data = b""
            queue.put_nowait((max(loop.time(), opened_at + 2 * delay) + delay, data))
        await sending

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened_at = asyncio.get_running_loop().time()
        remote_reader, remote_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(
            pump(reader, remote_writer, opened_at), pump(remote_reader, writer, 0), return_exceptions=True
        )

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


class Client(asyncio.Protocol):
    """Sends the same request again as soon as its answer arrives."""

    request = b""
    stop_at = 0.0
    most = 0

    def __init__(self, latencies: list[float], failures: list[str]) -> None:
        self._latencies = latencies
        self._failures = failures
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        assert isinstance(self._transport, asyncio.WriteTransport)
        self._data, self._size = b"", 0
        self._sent_at = time.perf_counter()
        self._transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._size and (end := self._data.find(b"\r\n\r\n")) >= 0:
            length = self._data[:end].lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            self._size = end + 4 + int(length)
        if not self._size or len(self._data) < self._size:
            return
        now = time.perf_counter()
        self._latencies.append(now - self._sent_at)
        if self._data[9:12] != b"200":
            self._failures.append(self._data[:200].decode("latin-1"))
        if now < self.stop_at and not 0 < self.most <= len(self._latencies):
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if time.perf_counter() < self.stop_at and not 0 < self.most <= len(self._latencies):
            self._failures.append(f"the connection ended early: {error!r}")
        if not self.ended.done():
            self.ended.set_result(None)


async def http2(port: int, requests: int, at_a_time: int = 20) -> None:
    """Send small requests over HTTP/2, `at_a_time` on one connection; print the duration in seconds as JSON."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # mitmproxy's own CA
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    head = {":method": "GET", ":scheme": "https", ":authority": "localhost", ":path": "/small"}
    started, sent, done = time.perf_counter(), 0, 0
    while done < requests:
        while sent < requests and sent - done < at_a_time:
            connection.send_headers(1 + 2 * sent, list(head.items()), end_stream=True)
            sent += 1
        writer.write(connection.data_to_send())
        data = await reader.read(65536)
        if not data:
            raise SystemExit("the connection ended")
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                assert dict(event.headers or ())[b":status"] == b"200", event.headers
            elif isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            elif isinstance(event, h2.events.StreamEnded):
                done += 1
    print(json.dumps({"seconds": time.perf_counter() - started}))
    writer.close()


async def load(port: int, connections: int, seconds: float, requests: int = 0) -> None:
    """Keep `connections` busy for some seconds, or for a number of `requests`; print the results as JSON."""
    latencies: list[float] = []
    failures: list[str] = []
    Client.request = b"GET /small HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port
    started = time.perf_counter()
    Client.stop_at, Client.most = started + seconds, requests
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: Client(latencies, failures), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*(client.ended for client in clients))
    latencies.sort()
    print(
        json.dumps(
            {
                "requests": len(latencies),
                "seconds": time.perf_counter() - started,
                "p50": latencies[len(latencies) // 2],
                "p99": latencies[int(len(latencies) * 0.99)],
                "failures": failures[:3],
            }
        )
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["service", port, *certificate]:
            asyncio.run(service(int(port), *certificate))
        case ["relay", port, target, delay]:
            asyncio.run(relay(int(port), int(target), float(delay)))
        case ["load", port, connections, seconds, requests]:
            asyncio.run(load(int(port), int(connections), float(seconds), int(requests)))
        case ["http2", port, requests]:
            asyncio.run(http2(int(port), int(requests)))
        case _:
            sys.exit(__doc__)
