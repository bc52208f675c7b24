"""The last step before a request leaves: nothing does without a clearance, and credentials are added here only.

mitmproxy forwards a request whose hook failed, and shows a flow's headers in its console, in dumps and in mitmweb. So
credentials never stand in a flow, and the layers that write requests to a connection are replaced by ones that add them
to what they send, on the connection that the clearance is for and on no other.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar
from weakref import WeakSet

from h11 import EndOfMessage, LocalProtocolError
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer, blank_line_regex
from mitmproxy.connection import ConnectionState
from mitmproxy.http import Request
from mitmproxy.net.http import http1
from mitmproxy.net.http.validate import validate_headers
from mitmproxy.proxy.commands import CloseConnection, CloseTcpConnection, RequestWakeup, SendData, StartHook
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.events import ConnectionClosed, DataReceived, Event, Wakeup
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    HttpEvent,
    RequestHeaders,
    RequestTrailers,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Server
from mitmproxy.proxy.layers.http._http2 import Http2Client
from mitmproxy.proxy.layers.http._http3 import Http3Client
from mitmproxy.proxy.mode_specs import ReverseMode

from eoepca_security.proxy.patches import seams
from eoepca_security.proxy.patches.messages import last_answer, with_headers
from eoepca_security.proxy.policy.access import Refusal
from eoepca_security.proxy.policy.clearance import clearance
from eoepca_security.proxy.policy.destination import Target
from eoepca_security.proxy.policy.headers import is_one_request, is_plain
from eoepca_security.proxy.policy.problem_details import MALFORMED

MAX_HEAD: Final = 256 * 1024
"""Longest head of a request or an answer, in bytes; also longest line or trailers between and after chunks, and most
that is kept of what a client sends ahead, before it has the answer to its request."""

LINGER: Final = 5.0
"""Seconds for which what a client still sends after the last answer is read and dropped: if the connection ended before
that, the client might not get to read the answer."""

MAX_INTERIM: Final = 20
"""Most interim answers (1xx) that a service may give to one request."""

_INTERIM: Final = frozenset({100, *range(102, 200)})

logger = logging.getLogger(__name__)


_origin_form: WeakSet[Request] = WeakSet()
_read_request_head = http1.read_request_head


@dataclass
class RequestRefusedHook(StartHook):
    """A client's request was refused before it became a flow."""

    refusal: Refusal
    blocking = False


def install() -> None:
    """Put our layers in the place of mitmproxy's, for all connections of this process that are made from now on."""
    http, http1 = "mitmproxy.proxy.layers.http", "mitmproxy.proxy.layers.http._http1"
    seams.replace(http, "Http1Client", _Http1Client)
    seams.replace(http, "Http2Client", _Http2Client)
    seams.replace(http, "Http3Client", _Http3Client)
    seams.replace(http, "Http1Server", _Http1Server)
    seams.replace("mitmproxy.net.http.http1", "read_request_head", read_request_head)
    seams.replace(http1, "make_error_response", last_answer)
    # mitmproxy raises on trailers, and the client hangs. A proxy may drop them (RFC 9110 §6.5.1).
    seams.replace(http1, "ChunkedReader", _ChunkedReader)


def read_request_head(lines: list[bytes]) -> Request:
    """Read the head of an HTTP/1 request; raises ValueError for one that others may read differently (RFC 9112 §11.2).

    Then mitmproxy ends the connection: nobody knows where its body ends, and so where the next request begins.
    """
    request = _read_request_head(lines)
    validate_headers(request)
    if not (is_plain(lines) and is_one_request(request.data)):
        raise ValueError("the request is not well-formed")
    return request


def is_origin_form(request: Request) -> bool:
    """Tell whether an HTTP/1 request came without an absolute target (RFC 9112 §3.2.1); mitmproxy forgets it."""
    return request in _origin_form


def outgoing(request: Request, target: Target) -> Request | None:
    """Return the request as it goes to `target`, or None when it must not."""
    given = clearance(request)
    if given is None or given.target != target:
        return None
    if not given.headers:
        return request
    kept = [field for field in request.data.headers.fields if field[0].lower() not in given.names]
    return with_headers(request, (*kept, *given.fields))


def _is_too_long(buffer: ReceiveBuffer) -> bool:
    """Tell whether the head that begins here is too long, empty lines before it included."""
    return len(buffer) > MAX_HEAD and blank_line_regex.search(bytes(buffer)[:MAX_HEAD].lstrip(b"\r\n")) is None


_AnyEvent = TypeVar("_AnyEvent", bound=Event)


class _Gate:
    """Replaces the headers event by what may leave; where nothing may, ends the client's connection."""

    def __init__(self, context: Context) -> None:
        address = context.server.address or ("", 0)
        self._target = Target("https" if context.server.tls else "http", address[0].lower(), address[1])
        self._has_detour = context.server.via is not None
        self._shut = False

    def open(self, event: _AnyEvent) -> _AnyEvent | None:
        if isinstance(event, RequestHeaders):
            ready = None if self._has_detour else outgoing(event.request, self._target)
            self._shut = self._shut or ready is None
            if ready is not None:
                return replace(event, request=ready)
            logger.error("a request to %s was held back: it was not cleared for it", self._target.host)
        return None if self._shut and isinstance(event, HttpEvent) else event


class _Http1Client(Http1Client):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._gate = _Gate(context)
        self._interim = 0

    def send(self, event: HttpEvent) -> CommandGenerator[None]:
        ready = self._gate.open(event)
        if ready is None:
            yield CloseConnection(self.context.client)
        elif isinstance(ready, RequestHeaders):
            self._interim = 0
            ready.request = _framed(ready.request, end_stream=ready.end_stream)
            yield from super().send(ready)
        # mitmproxy cannot write trailers. A proxy may drop them (RFC 9110 §6.5.1).
        elif not isinstance(ready, RequestTrailers):
            yield from super().send(ready)

    def read_headers(self, event: Any) -> CommandGenerator[None]:
        if self.request is not None and self.stream_id is not None and _is_too_long(self.buf):
            reason = f"{MALFORMED}: its head is longer than {MAX_HEAD // 1024} KiB"
            self.state = self.done
            yield CloseConnection(self.conn)
            yield ReceiveHttp(ResponseProtocolError(self.stream_id, reason, ResponseProtocolError.code))
            return
        commands = super().read_headers(event)
        for command in commands:
            if not (isinstance(command, ReceiveHttp) and _is_interim(command.event)):
                yield command
                continue
            # mitmproxy takes it for the answer, and the answer for that to the next request (RFC 9110 §15.2).
            commands.close()
            self.response = None
            self._interim += 1
            if self._interim > MAX_INTERIM:
                yield CloseConnection(self.conn)
                yield CloseConnection(self.context.client)
            else:
                yield from self.read_headers(DataReceived(self.conn, b""))
            return


def _is_interim(event: HttpEvent) -> bool:
    return isinstance(event, ResponseHeaders) and event.response.status_code in _INTERIM


def _framed(request: Request, *, end_stream: bool) -> Request:
    """Return the request so that HTTP/1 tells where it ends: HTTP/2 has no need of a length (RFC 9112 §6.3)."""
    if end_stream or not (request.is_http2 or request.is_http3) or "Content-Length" in request.headers:
        return request
    return with_headers(request, (*request.data.headers.fields, (b"transfer-encoding", b"chunked")))


class _Http2Client(Http2Client):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._gate = _Gate(context)

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        if isinstance(event, RequestHeaders):
            # A request that is sent again, on a connection that is kept, is another stream there.
            self.our_stream_id.pop(event.stream_id, None)
        yield from super()._handle_event(event)

    # Not _handle_event: that puts events aside and gets them again.
    def _handle_event2(self, event: Event) -> CommandGenerator[None]:
        if (ready := self._gate.open(event)) is not None:
            yield from super()._handle_event2(ready)
        else:
            yield CloseConnection(self.context.client)


class _Http3Client(Http3Client):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._gate = _Gate(context)

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        if (ready := self._gate.open(event)) is not None:
            yield from super()._handle_event(ready)
        else:
            yield CloseConnection(self.context.client)


class _Http1Server(Http1Server):
    _lingers = False
    _has_refused = False

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        if self._lingers:
            # What still comes is nobody's request.
            if isinstance(event, ConnectionClosed | Wakeup) and self.conn.state is not ConnectionState.CLOSED:
                yield CloseConnection(self.conn)
            return
        for command in super()._handle_event(event):
            if isinstance(command, CloseConnection) and command.connection is self.conn and self._may_linger(event):
                self._lingers = True
                yield CloseTcpConnection(self.conn, half_close=True)
                yield RequestWakeup(LINGER)
            else:
                yield command

    def _may_linger(self, event: Event) -> bool:
        return self.state != self.passthrough and not isinstance(event, ConnectionClosed)

    def read_headers(self, event: Any) -> CommandGenerator[None]:
        is_reverse = isinstance(self.context.client.proxy_mode, ReverseMode)  # where the form is all the same
        for command in self._refuse() if _is_too_long(self.buf) else super().read_headers(event):
            if isinstance(command, SendData) and not self._has_refused:
                # Nothing else is sent while a head is read.
                self._has_refused = True
                yield RequestRefusedHook(Refusal("bad_request", "the head of a request is malformed or too long"))
            elif not is_reverse and isinstance(command, ReceiveHttp) and isinstance(command.event, RequestHeaders):
                request = command.event.request
                if not request.data.authority:
                    _origin_form.add(request)
            yield command

    def _refuse(self) -> CommandGenerator[None]:
        self.state = self.done
        yield SendData(self.conn, last_answer(431, f"its head is longer than {MAX_HEAD // 1024} KiB"))
        yield CloseConnection(self.conn)

    def wait(self, event: Event) -> CommandGenerator[None]:
        is_too_much = isinstance(event, DataReceived) and len(self.buf) > MAX_HEAD
        yield from super().wait(ConnectionClosed(self.conn) if is_too_much else event)


class _ChunkedReader(ChunkedReader):
    def __call__(self, buf: Any) -> Any:
        event = super().__call__(buf)
        if event is None and len(buf) > MAX_HEAD:
            raise LocalProtocolError("chunk extensions or trailers are too long")
        return EndOfMessage() if isinstance(event, EndOfMessage) else event
