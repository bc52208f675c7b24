"""Connections to the service that outlive the clients they were made for.

mitmproxy ends the connections to the service with the client's. Tools that connect for each request, as curl does, then
wait for TCP and TLS each time. Here a connection whose last exchange was clean is kept, with the layers that speak TLS
and HTTP on it as they are, so that it is as verified as when it was made, and goes to the next client.
"""

import asyncio
import collections
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final
from weakref import WeakValueDictionary

from mitmproxy.connection import Client, Connection, ConnectionState, Server
from mitmproxy.proxy.commands import OpenConnection, StartHook
from mitmproxy.proxy.events import Event
from mitmproxy.proxy.layer import CommandGenerator, Layer
from mitmproxy.proxy.layers.http import GetHttpConnection, GetHttpConnectionCompleted, HttpLayer, HttpStream
from mitmproxy.proxy.layers.http._http1 import Http1Client
from mitmproxy.proxy.layers.http._http2 import Http2Client, Http2Connection
from mitmproxy.proxy.mode_servers import ProxyConnectionHandler
from mitmproxy.proxy.server import ConnectionIO
from mitmproxy.proxy.server_hooks import ClientDisconnectedHook, ServerConnectionHookData, ServerDisconnectedHook
from mitmproxy.proxy.tunnel import TunnelLayer, TunnelState

from eoepca_security.proxy.patches import http_clients, http_stream, seams

MAX_IDLE: Final = 32
"""Most connections that are kept at a time."""

IDLE_TIMEOUT: Final = 30.0
"""Seconds that a connection is kept without use; services end theirs after a minute or so."""

MAX_AGE: Final = 300.0
"""Seconds after which a connection is not kept any more, so that a name's new address is noticed."""

CONNECT_TIMEOUT: Final = 10.0
"""Seconds that a connection to the service may take to be made, TLS included; the system waits for two minutes."""

MAX_QUEUED: Final = 64 * 1024
"""Bytes that may wait for an exchange whose hook or connection is not ready, or for an HTTP/2 peer that reads nothing;
then the proxy does not read on."""

MAX_CONNECTIONS: Final = 100
"""Most connections to the service that one HTTP/2 client has at a time; mitmproxy's five are used up by five event
streams."""

_HTTP2: Final = b"h2"


@dataclass
class Idle:
    """A connection that waits for its next client, and the first of its layers."""

    server: Server
    layer: Layer
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    opened_at: float
    watch: "asyncio.Task[None]" = field(init=False)


class Pool:
    """The idle connections of this process. `now` is in seconds, from any beginning."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._idle: list[Idle] = []
        self._now = now

    def take(self, wanted: GetHttpConnection) -> Idle | None:
        """Return the connection of this kind that was used last, for good, or None."""
        for idle in reversed(self._idle):
            if not idle.watch.done() and not _has_data(idle.reader) and wanted.connection_spec_matches(idle.server):
                self._idle.remove(idle)
                idle.watch.cancel()
                return idle
        return None

    def put(self, idle: Idle) -> None:
        """Keep a connection, if it is worth it."""
        if len(self._idle) >= MAX_IDLE or self._now() - idle.opened_at > MAX_AGE:
            idle.writer.close()
            return
        idle.watch = asyncio.get_running_loop().create_task(self._watch(idle))
        self._idle.append(idle)

    def clear(self) -> None:
        """End all idle connections: what is decided when one is made has changed."""
        for idle in self._idle:
            idle.watch.cancel()
            idle.writer.close()
        self._idle.clear()

    async def _watch(self, idle: Idle) -> None:
        try:
            async with asyncio.timeout(IDLE_TIMEOUT):
                # Whatever the service sends now is no answer to anything; its end is what mostly comes.
                await idle.reader.read(1)
        except (TimeoutError, OSError):
            pass
        self._idle.remove(idle)
        idle.writer.close()


def _has_data(reader: asyncio.StreamReader) -> bool:
    """Tell whether something has come that nobody has read: the end, or what belongs to no request."""
    return reader.at_eof() or bool(getattr(reader, "_buffer", b""))


def install(pool: Pool) -> None:
    """Keep the connections of this process in `pool` from now on."""

    class Handler(_PoolingHandler):
        _pool = pool

    seams.replace("mitmproxy.proxy.mode_servers", "ProxyConnectionHandler", Handler)
    seams.replace("mitmproxy.proxy.layers.http:HttpLayer", "get_connection", _get_connection)


_handlers: "WeakValueDictionary[Client, _PoolingHandler]" = WeakValueDictionary()
_make_connection = HttpLayer.get_connection


def _get_connection(layer: HttpLayer, event: GetHttpConnection, *, reuse: bool = True) -> Iterator[Any]:
    """Get a connection for a request: the client's own, an idle one, or a new one, in this order."""
    handler = _handlers.get(layer.context.client)
    if handler is not None:
        handler.http_layer = layer
        if reuse and not _has_own(layer, event) and (idle := handler.take(event)) is not None:
            layer.connections[idle.server] = idle.layer
            for around, stream in pairwise(layer.context.layers):
                # In a tunnel, what comes from the service has to find its way through the layers around it.
                if isinstance(around, HttpLayer) and isinstance(stream, HttpStream):
                    around.connections[idle.server] = stream
            stream = layer.command_sources.pop(event)
            yield from layer.event_to_child(stream, GetHttpConnectionCompleted(event, (idle.server, None)))
            return
    yield from _make_connection(layer, event, reuse=reuse)


def _has_own(layer: HttpLayer, event: GetHttpConnection) -> bool:
    return any(
        event.connection_spec_matches(connection)
        and (connection.connected or connection.error or connection in layer.waiting_for_establishment)
        for connection in layer.connections
    )


class _PoolingHandler(ProxyConnectionHandler):
    """Handles one client's connection; takes connections to the service from the pool, and gives them back."""

    _pool: Pool
    http_layer: HttpLayer | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)  # type: ignore[no-untyped-call]
        self.max_conns = collections.defaultdict(lambda: asyncio.Semaphore(MAX_CONNECTIONS))
        self._opened_at: dict[Server, float] = {}
        self._moved: asyncio.Event | None = None
        _handlers[self.client] = self

    async def handle_hook(self, hook: StartHook) -> None:
        """Run a hook, as mitmproxy does; at the client's end give back what others can use."""
        with self.timeout_watchdog.disarm():
            await self.master.addons.handle_lifecycle(hook)
            flow = getattr(hook, "flow", None)
            if flow is not None and flow.intercepted:
                await flow.wait_for_resume()
        if isinstance(hook, ClientDisconnectedHook):
            for server, io in list(self.transports.items()):
                if isinstance(server, Server):
                    await self._give_back(server, io)

    async def open_connection(self, command: OpenConnection) -> None:
        """Connect, as mitmproxy does, but not for ever."""
        watch = asyncio.create_task(_end_late(command.connection, asyncio.current_task()))
        try:
            await super().open_connection(command)
        finally:
            watch.cancel()

    async def server_event(self, event: Event) -> None:
        """Handle an event, and let those who wait for a change look again."""
        await super().server_event(event)
        if self._moved is not None:
            self._moved.set()

    async def drain_writers(self) -> None:
        """Wait as long as nobody takes what has been read: for the writers, as mitmproxy does, and for the layers."""
        await super().drain_writers()  # type: ignore[no-untyped-call]
        if self.http_layer is None:
            self.http_layer = next((each for each in self.layer.context.layers if isinstance(each, HttpLayer)), None)
        while self.http_layer is not None and self._is_ahead(self.http_layer):
            if self._moved is None or self._moved.is_set():
                self._moved = asyncio.Event()
            await self._moved.wait()

    def _is_ahead(self, http: HttpLayer) -> bool:
        """Tell whether what this task reads has nowhere to go at the moment."""
        # This runs after each read, and mostly nothing waits.
        streams = [stream for stream in http.streams.values() if self._may_wait(stream)]
        if not streams:
            return False
        task = asyncio.current_task()
        reads_client = self.transports[self.client].handler is task if self.client in self.transports else False
        for stream in streams:
            server = stream.context.server
            if not reads_client and (server not in self.transports or self.transports[server].handler is not task):
                continue
            receiver = server if reads_client else self.client
            if http_stream.queued(stream) > MAX_QUEUED or _unsent(http.connections.get(receiver), stream) > MAX_QUEUED:
                return True
        return False

    def _may_wait(self, stream: HttpStream) -> bool:
        return _HTTP2 in (self.client.alpn, stream.context.server.alpn) or http_stream.queued(stream) > MAX_QUEUED

    async def on_timeout(self) -> None:
        """Where nothing has come for long, tell those who wait for the service; end the rest, as mitmproxy does.

        An answer that has begun, or a WebSocket, may be quiet for as long as both sides are there.
        """
        streams = self.http_layer.streams.values() if self.http_layer is not None else ()
        quiet = {stream.context.server for stream in streams if http_stream.may_be_quiet(stream)}
        if quiet:
            self.timeout_watchdog.register_activity()
        waiting = [
            (server, io.handler)
            for server, io in self.transports.items()
            if isinstance(server, Server) and server not in quiet
        ]
        for server, handler in waiting:
            if handler is not None:
                http_stream.late.add(server)
                handler.cancel("timed out")
        await (self.timeout_watchdog.watch() if waiting or quiet else super().on_timeout())

    def take(self, event: GetHttpConnection) -> Idle | None:
        """Take a connection over from the pool."""
        idle = self._pool.take(event)
        if idle is None or self.http_layer is None:
            return None
        context = idle.layer.context
        context.client = self.client
        context.layers[:] = [*self.http_layer.context.layers, *context.layers]
        idle.server.state, idle.server.timestamp_end = ConnectionState.OPEN, None
        io = self.transports[idle.server] = ConnectionIO(reader=idle.reader, writer=idle.writer)
        self._opened_at[idle.server] = idle.opened_at
        io.handler = asyncio.get_running_loop().create_task(self._serve(idle))
        # Which may be cancelled before it begins, and would leave the connection to nobody.
        io.handler.add_done_callback(lambda _: io.writer.close() if io.writer is not None else None)
        return idle

    async def _serve(self, idle: Idle) -> None:
        # Two must not read at a time.
        await asyncio.wait([idle.watch])
        try:
            await self.handle_connection(idle.server)
        finally:
            await self.handle_hook(ServerDisconnectedHook(ServerConnectionHookData(idle.server, self.client)))

    async def _give_back(self, server: Server, io: ConnectionIO) -> None:
        layer = self.http_layer.connections.get(server) if self.http_layer is not None else None
        if self.http_layer is None or layer is None or io.handler is None or not _is_clean(server, layer, io):
            return
        reader, writer = io.reader, io.writer
        if not isinstance(reader, asyncio.StreamReader) or not isinstance(writer, asyncio.StreamWriter):
            return
        context = layer.context
        own = context.layers[len(self.http_layer.context.layers) :]
        # What reads from it here ends, and must neither close it nor tell the layers that it is closed.
        self.http_layer.connections[server] = _Nothing(self.http_layer.context.fork())
        io.writer = _Nobody()  # type: ignore[assignment]
        io.handler.cancel("kept for another client")
        try:
            await asyncio.wait([io.handler])
        except asyncio.CancelledError:
            writer.close()
            raise
        context.layers[:] = own
        opened_at = self._opened_at.get(server, time.monotonic())
        self._pool.put(Idle(server, layer, reader, writer, opened_at))


async def _end_late(connection: Connection, handler: "asyncio.Task[Any] | None") -> None:
    """Cancel what makes a connection when it takes too long; waiting for others to end does not count."""
    while handler is not None:
        began = connection.timestamp_start
        left = CONNECT_TIMEOUT - (time.time() - began if began is not None else 0)
        if left <= 0:
            break
        await asyncio.sleep(left)
    is_made = connection.timestamp_tls_setup if connection.tls else connection.connected
    if handler is not None and not is_made:
        handler.cancel(f"timed out after {CONNECT_TIMEOUT:.0f} s")


def _is_clean(server: Server, layer: Layer, io: ConnectionIO) -> bool:
    """Tell whether the last exchange on a connection is over, in both directions, and anybody's can follow."""
    http = layer.context.layers[-1]
    return (
        isinstance(http, Http1Client)
        and http.state == http.read_headers
        and http.request is None
        and not http.buf
        and server.state is ConnectionState.OPEN
        and server.via is None
        and server not in http_clients.personal
        and (not isinstance(layer, TunnelLayer) or layer.tunnel_state is TunnelState.OPEN)
        and isinstance(io.writer, asyncio.StreamWriter)
        and not io.writer.is_closing()
        and io.writer.transport.get_write_buffer_size() == 0
    )


def _unsent(layer: Layer | None, stream: HttpStream) -> int:
    """Return how many bytes of a stream an HTTP/2 connection keeps until its peer reads on."""
    http = layer.context.layers[-1] if layer is not None else None
    if not isinstance(http, Http2Connection):
        return 0
    stream_id = http.our_stream_id.get(stream.stream_id, 0) if isinstance(http, Http2Client) else stream.stream_id
    return sum(len(data) for data, _ in http.h2_conn.stream_buffers.get(stream_id, ()))


class _Nothing(Layer):
    """Takes the place of layers that have gone elsewhere."""

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        yield from ()


class _Nobody:
    """Takes the place of a writer that has gone elsewhere."""

    def close(self) -> None:
        """Do nothing."""

    def is_closing(self) -> bool:
        """Say that nothing can be written."""
        return True

    async def drain(self) -> None:
        """Do nothing."""
