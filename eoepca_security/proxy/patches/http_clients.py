"""The last step before a request leaves: nothing does without a clearance, and credentials are added here only.

mitmproxy forwards a request whose hook failed, and shows a flow's headers in its console, in dumps and in mitmweb. So
credentials never stand in a flow, and the layers that write requests to a connection are replaced by ones that add them
to what they send, on the connection that the clearance is for and on no other.
"""

import logging
import re
import time
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar
from weakref import WeakSet

from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h11 import EndOfMessage, LocalProtocolError
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer, blank_line_regex
from mitmproxy.connection import Connection, ConnectionState
from mitmproxy.http import Request, Response
from mitmproxy.net.http import http1
from mitmproxy.net.http.validate import validate_headers
from mitmproxy.proxy.commands import CloseConnection, CloseTcpConnection, Log, RequestWakeup, SendData, StartHook
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.events import ConnectionClosed, DataReceived, Event, Start, Wakeup
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import (
    HttpEvent,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    RequestTrailers,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._http1 import Http1Client, Http1Server
from mitmproxy.proxy.layers.http._http2 import Http2Client, Http2Server
from mitmproxy.proxy.layers.http._http3 import Http3Client
from mitmproxy.proxy.layers.http._http_h2 import BufferedH2Connection
from mitmproxy.proxy.layers.tls import ClientTLSLayer
from mitmproxy.proxy.mode_specs import ReverseMode
from mitmproxy.proxy.tunnel import TunnelState

from eoepca_security.proxy.patches import client_timeout, seams
from eoepca_security.proxy.patches.messages import (
    answer_to_probe,
    authentication_required,
    error_answer,
    last_answer,
    with_headers,
)
from eoepca_security.proxy.policy.access import PROBE_HOST, Refusal
from eoepca_security.proxy.policy.clearance import clearance
from eoepca_security.proxy.policy.destination import Target
from eoepca_security.proxy.policy.headers import (
    answer_without_hop_by_hop,
    is_one_request,
    is_plain,
    repaired,
    with_connection_close,
    without_framing,
)
from eoepca_security.proxy.policy.problem_details import MALFORMED

MAX_HEAD: Final = 256 * 1024
"""Longest head of a request or an answer, in bytes; also longest line or trailers between and after chunks, and most
that is kept of what a client sends ahead, before it has the answer to its request."""

LINGER: Final = 5.0
"""Seconds for which what a client still sends after the last answer is read and dropped: if the connection ended before
that, the client might not get to read the answer."""

MAX_INTERIM: Final = 20
"""Most interim answers (1xx) that a service may give to one request."""

_STALLED: Final = "no more of its body came for {:.0f} s"

_CUT_SHORT: Final = "the client closed its side of the connection before it had the answer"

_EMPTY_LINES: Final = re.compile(rb"(?:\r?\n)*")
_PREFACE: Final = b"PRI * HTTP/2.0\r\n"

_HEAD_FRAMES: Final = (1, 9)  # HEADERS, CONTINUATION (RFC 9113 §6)

_INTERIM: Final = frozenset({100, *range(102, 200)})

logger = logging.getLogger(__name__)


personal: Final[WeakSet[Connection]] = WeakSet()
"""Connections to servers that have had a client's own credentials, or none. Some programs (NTLM) take a connection for
its user's, so no other client may have it."""

_origin_form: WeakSet[Request] = WeakSet()
_read_request_head = http1.read_request_head
_read_response_head = http1.read_response_head


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
    seams.replace(http, "Http2Server", _Http2Server)
    seams.replace("mitmproxy.proxy.layers", "ClientTLSLayer", _ClientTLSLayer)
    seams.replace("mitmproxy.addons.next_layer", "ClientTLSLayer", _ClientTLSLayer)
    seams.replace("mitmproxy.net.http.http1", "read_request_head", read_request_head)
    seams.replace("mitmproxy.net.http.http1", "read_response_head", read_response_head)
    seams.replace(http1, "make_error_response", last_answer)
    seams.replace("mitmproxy.addons.proxyauth", "make_auth_required_response", authentication_required)
    # mitmproxy raises on trailers, and the client hangs. A proxy may drop them (RFC 9110 §6.5.1).
    seams.replace(http1, "ChunkedReader", _ChunkedReader)


def read_request_head(lines: list[bytes]) -> Request:
    """Read the head of an HTTP/1 request; raises ValueError for one that others may read differently (RFC 9112 §11.2).

    Then mitmproxy ends the connection: nobody knows where its body ends, and so where the next request begins.
    """
    request = _read_request_head(lines)
    validate_headers(request)
    # HTTP/2 has another kind of head.
    if request.is_http2 or request.is_http3:
        raise ValueError("the request's version is not HTTP/1")
    if not (is_plain(lines) and is_one_request(request.data)):
        raise ValueError("the request is not well-formed")
    return request


def read_response_head(lines: list[bytes]) -> Response:
    """Read the head of an HTTP/1 answer; raises ValueError for one that is malformed and cannot be repaired."""
    return _read_response_head(list(repaired(lines)))


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
        self._server = context.server
        address = context.server.address or ("", 0)
        self._target = Target("https" if context.server.tls else "http", address[0].lower(), address[1])
        self._has_detour = context.server.via is not None
        self._shut = False

    def open(self, event: _AnyEvent) -> _AnyEvent | None:
        if isinstance(event, RequestHeaders):
            ready = None if self._has_detour else outgoing(event.request, self._target)
            self._shut = self._shut or ready is None
            if ready is not None:
                if ready is event.request:  # without our credentials
                    personal.add(self._server)
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
            yield from self._give_up(f"its head is longer than {MAX_HEAD // 1024} KiB")
            return
        commands = super().read_headers(event)
        for command in commands:
            if isinstance(command, Log):
                # mitmproxy's text quotes the data, which may repeat the token.
                yield Log("the service sent data that belongs to no request, so the connection ends")
                continue
            if not (isinstance(command, ReceiveHttp) and isinstance(command.event, ResponseHeaders)):
                yield command
                continue
            if command.event.response.status_code not in _INTERIM:
                try:
                    command.event = self._passed_on(command.event)
                except ValueError as error:
                    commands.close()
                    yield from self._give_up(str(error))
                    return
                yield command
                continue
            # mitmproxy takes it for the answer, and the answer for that to the next request (RFC 9110 §15.2).
            commands.close()
            self.response = None
            self._interim += 1
            if self._interim > MAX_INTERIM:
                yield from self._give_up(f"more than {MAX_INTERIM} interim answers")
            else:
                yield from self.read_headers(DataReceived(self.conn, b""))
            return

    def _passed_on(self, event: ResponseHeaders) -> ResponseHeaders:
        """Return the answer as clients may see it; mitmproxy decides by the service's own how this connection goes on.

        Raises ValueError for an answer that must not be passed on.
        """
        response = event.response
        method = self.request.data.method if self.request is not None else b""
        if response.status_code in (204, 304) and "Transfer-Encoding" in response.headers:
            # What follows may be content that should not be there, or the next answer.
            self.response = with_headers(response, with_connection_close(response.data.headers.fields))
        fields = answer_without_hop_by_hop(response.data.headers.fields, response.status_code)
        made = with_headers(response, without_framing(fields, method, response.status_code))
        return ResponseHeaders(event.stream_id, made, event.end_stream)

    def _give_up(self, reason: str) -> CommandGenerator[None]:
        """End the connection to a service whose answer is malformed, for this reason."""
        if self.stream_id is None:
            raise RuntimeError("there is no request")
        self.state = self.done
        yield CloseConnection(self.conn)
        error = ResponseProtocolError(self.stream_id, f"{MALFORMED}: {reason}", ResponseProtocolError.code)
        yield ReceiveHttp(error)


def _framed(request: Request, *, end_stream: bool) -> Request:
    """Return the request so that HTTP/1 tells where it ends: HTTP/2 has no need of a length (RFC 9112 §6.3).

    It has our version, not the client's (RFC 9110 §2.5).
    """
    if request.http_version == "HTTP/1.0":
        return _with_our_version(with_headers(request, request.data.headers.fields))
    if end_stream or not (request.is_http2 or request.is_http3) or "Content-Length" in request.headers:
        return request
    return with_headers(request, (*request.data.headers.fields, (b"transfer-encoding", b"chunked")))


def _for_client(request: Request, response: Response) -> Response:
    """Return the answer so that this HTTP/1 client can tell where it ends (RFC 9112 §6.3)."""
    fields = response.data.headers.fields
    if response.status_code == 101 or (request.method == "CONNECT" and 200 <= response.status_code < 300):
        return response
    framed = without_framing(fields, request.data.method, response.status_code)
    is_old = request.http_version == "HTTP/1.0"
    if is_old:
        # It ends with the connection, which a proxy does not keep for such clients in any case (RFC 9112 §9.3).
        framed = tuple(field for field in framed if field[0].lower() != b"transfer-encoding")
    if (
        is_old
        or http1.connection_close(request.http_version, request.headers)
        or _ends_with_connection(request, response)
    ):
        framed = with_connection_close(framed)
    if framed == fields and response.http_version != "HTTP/1.0":
        return response
    made = with_headers(response, framed)
    return _with_our_version(made) if made.http_version == "HTTP/1.0" else made


def _ends_with_connection(request: Request, response: Response) -> bool:
    names = {name.lower() for name, _ in response.data.headers.fields}
    if b"content-length" in names and b"transfer-encoding" not in names:
        return False  # as for most; what follows takes ten times as long
    try:
        return http1.expected_http_body_size(request, response) == -1
    except ValueError:  # an add-on has put in something
        return False


_AnyMessage = TypeVar("_AnyMessage", Request, Response)


def _with_our_version(copied: _AnyMessage) -> _AnyMessage:
    copied.data.http_version = b"HTTP/1.1"
    return copied


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
    _linger: RequestWakeup | None = None
    _head_timer: RequestWakeup | None = None
    _body_timer: RequestWakeup | None = None
    _moved_at = 0.0
    _skipped = 0
    _has_refused = False

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        if self._linger is not None:
            # What still comes is nobody's request.
            is_over = isinstance(event, ConnectionClosed) or (
                isinstance(event, Wakeup) and event.command is self._linger
            )
            if is_over and self.conn.state is not ConnectionState.CLOSED:
                yield CloseConnection(self.conn)
            return
        if isinstance(event, DataReceived):
            self._moved_at = time.monotonic()
        for command in self._wake(event) if isinstance(event, Wakeup) else super()._handle_event(event):
            if isinstance(command, CloseConnection) and command.connection is self.conn and self._may_linger(event):
                self._linger = RequestWakeup(LINGER)
                yield CloseTcpConnection(self.conn, half_close=True)
                yield self._linger
            else:
                yield command
        if not (self.state == self.read_headers and (self.buf or self._skipped)):
            self._head_timer = None
        elif self._head_timer is None and self.conn.state is ConnectionState.OPEN:
            self._head_timer = RequestWakeup(client_timeout.limit())
            yield self._head_timer
        # One at a time, which goes on from one request to the next.
        if self.state == self.read_body and self._body_timer is None:
            self._body_timer = RequestWakeup(client_timeout.limit())
            yield self._body_timer

    def _wake(self, event: Wakeup) -> CommandGenerator[None]:
        if event.command is self._head_timer and self.buf:
            yield from self._refuse(408, f"its head took longer than {client_timeout.limit():.0f} s")
        elif event.command is self._head_timer:
            # Empty lines are no request, and what nobody has asked for could be taken for the next answer.
            yield CloseConnection(self.conn)
        elif event.command is self._body_timer:
            self._body_timer = None
            if self.state != self.read_body or self._is_our_turn():
                return
            if left := client_timeout.left(self.context.client, self._moved_at):
                self._body_timer = RequestWakeup(left)
                yield self._body_timer
            else:
                yield from self._give_up_body()

    def _is_our_turn(self) -> bool:
        """Tell whether a client that has not sent all of its body may wait: for leave to do so, or for an answer."""
        if self.response is not None:
            return not self.response_done
        return self.request is not None and _awaits_leave(self.request)

    def _give_up_body(self) -> CommandGenerator[None]:
        reason = _STALLED.format(client_timeout.limit())
        self.state = self.done
        yield from self._say(reason, 408)
        yield CloseConnection(self.conn)
        yield ReceiveHttp(RequestProtocolError(self.stream_id, reason, RequestProtocolError.code))

    def _may_linger(self, event: Event) -> bool:
        return self.state != self.passthrough and not isinstance(event, ConnectionClosed)

    def send(self, event: HttpEvent) -> CommandGenerator[None]:
        if isinstance(event, ResponseHeaders) and self.request is not None:
            event = ResponseHeaders(event.stream_id, _for_client(self.request, event.response), event.end_stream)
        yield from super().send(event)
        if self.response is not None and self.response.status_code == 100:
            self.response = None  # it is still to come
            self._moved_at = time.monotonic()  # the client's turn begins now

    def read_headers(self, event: Any) -> CommandGenerator[None]:
        self._skip_empty_lines()
        if bytes(self.buf)[: len(_PREFACE)] == _PREFACE:
            yield from self._refuse(505, "HTTP/2 works over TLS only: use https:// or HTTP/1.1")
            return
        if _is_too_long(self.buf) or self._skipped > MAX_HEAD:
            yield from self._refuse(431, f"its head is longer than {MAX_HEAD // 1024} KiB")
            return
        is_reverse = isinstance(self.context.client.proxy_mode, ReverseMode)  # where the form is all the same
        commands = super().read_headers(event)
        for command in commands:
            if isinstance(command, SendData) and not self._has_refused:
                # Nothing else is sent while a head is read.
                yield self._refused()
            elif isinstance(command, Log):
                # mitmproxy's text quotes the head, which may have the client's credentials.
                yield Log("the head of a client's request is malformed or incomplete")
                continue
            elif isinstance(command, ReceiveHttp) and isinstance(command.event, RequestHeaders):
                self._skipped = 0
                request = command.event.request
                if request.headers.get("Host") == PROBE_HOST:
                    # It becomes no flow, so that it shows in no metric, log or console.
                    commands.close()
                    self.state = self.done
                    yield SendData(self.conn, answer_to_probe())
                    yield CloseConnection(self.conn)
                    return
                if not is_reverse and not request.data.authority:
                    _origin_form.add(request)
            yield command

    def _skip_empty_lines(self) -> None:
        """Pass over empty lines before a request (RFC 9112 §2.2)."""
        match = _EMPTY_LINES.match(bytes(self.buf))
        if match is not None and match[0]:
            self._skipped += len(match[0])
            self.buf.maybe_extract_at_most(len(match[0]))

    def _refused(self) -> RequestRefusedHook:
        self._has_refused = True
        return RequestRefusedHook(Refusal("bad_request", "the head of a request is malformed or too long"))

    def _refuse(self, status: int, reason: str) -> CommandGenerator[None]:
        self.state = self.done
        yield self._refused()
        yield SendData(self.conn, last_answer(status, reason))
        yield CloseConnection(self.conn)

    def read_body(self, event: Event) -> CommandGenerator[None]:
        for command in super().read_body(event):
            if isinstance(command, CloseConnection) and command.connection is self.conn:
                yield from self._say(_CUT_SHORT if isinstance(event, ConnectionClosed) else "its body is malformed")
            yield command

    def wait(self, event: Event) -> CommandGenerator[None]:
        is_too_much = isinstance(event, DataReceived) and len(self.buf) > MAX_HEAD
        if isinstance(event, ConnectionClosed):
            yield from self._say(_CUT_SHORT)
        yield from super().wait(ConnectionClosed(self.conn) if is_too_much else event)

    def _say(self, reason: str, status: int = 400) -> CommandGenerator[None]:
        """Say why the connection ends without an answer, if none has begun and the client may still read."""
        if self.response is None and self.conn.state & ConnectionState.CAN_WRITE:
            yield SendData(self.conn, last_answer(status, reason))


def _awaits_leave(request: Request) -> bool:
    """Tell whether a client waits to be told to continue (RFC 9110 §10.1.1); then mitmproxy drops the header."""
    return bool(request.headers.get("Expect", "").lower() == "100-continue")


@dataclass
class _Unsent:
    """A request whose body a client still has to send, and when it last sent some (`time.monotonic`)."""

    request: Request
    moved_at: float


class _H2Connection(BufferedH2Connection):
    """Knows since when (`time.monotonic`) the client has read nothing of a stream with more to read."""

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config)
        self.to_read: dict[int, float] = {}

    def send_data(self, stream_id: int, data: Any, end_stream: bool = False, pad_length: None = None) -> None:
        super().send_data(stream_id, data, end_stream, pad_length)
        if stream_id in self.stream_buffers:
            self.to_read.setdefault(stream_id, time.monotonic())

    def stream_window_updated(self, stream_id: int) -> bool:
        has_read = super().stream_window_updated(stream_id)
        if stream_id not in self.stream_buffers:
            self.to_read.pop(stream_id, None)
        elif has_read:
            self.to_read[stream_id] = time.monotonic()
        return has_read


class _Http2Server(Http2Server):
    h2_conn: _H2Connection
    _head_timer: RequestWakeup | None = None
    _body_timer: RequestWakeup | None = None
    _last_head = 0

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.h2_conn = _H2Connection(self.h2_conf)
        self._to_send: dict[int, _Unsent] = {}

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        if isinstance(event, Wakeup):
            if event.command is self._head_timer:
                yield from self.protocol_error("the head of a request takes too long", ErrorCodes.ENHANCE_YOUR_CALM)
            elif event.command is self._body_timer:
                yield from self._look()
            return
        for command in super()._handle_event(event):
            if isinstance(command, ReceiveHttp):
                self._note(command.event)
            yield command
        if (
            isinstance(event, ResponseHeaders)
            and event.response.status_code == 100
            and event.stream_id in self._to_send
        ):
            self._to_send[event.stream_id].moved_at = time.monotonic()  # the client's turn begins now
        is_owed = self._to_send or self.h2_conn.to_read
        if is_owed and self._body_timer is None and self.conn.state is ConnectionState.OPEN:
            self._body_timer = RequestWakeup(client_timeout.limit())
            yield self._body_timer
        head = self.h2_conn.highest_inbound_stream_id
        if not self._is_in_head() or head != self._last_head:
            self._head_timer, self._last_head = None, head
        if self._head_timer is None and self._is_in_head() and self.conn.state is ConnectionState.OPEN:
            self._head_timer = RequestWakeup(client_timeout.limit())
            yield self._head_timer

    def _note(self, event: HttpEvent) -> None:
        """Note what a client has begun to send, and how it goes on."""
        if isinstance(event, RequestHeaders):
            if not event.end_stream:
                self._to_send[event.stream_id] = _Unsent(event.request, time.monotonic())
        elif isinstance(event, RequestData):
            if (part := self._to_send.get(event.stream_id)) is not None:
                part.moved_at = time.monotonic()
        elif isinstance(event, RequestEndOfMessage | RequestProtocolError):
            self._to_send.pop(event.stream_id, None)

    def _look(self) -> CommandGenerator[None]:
        """Give up the streams whose client does not move."""
        limit = next_look = client_timeout.limit()
        for stream_id, part in list(self._to_send.items()):
            if self.is_closed(stream_id):
                del self._to_send[stream_id]
            elif self._is_our_turn(stream_id, part.request):
                continue
            elif left := client_timeout.left(self.context.client, part.moved_at):
                next_look = min(next_look, left)
            else:
                yield from self._give_up(stream_id, _STALLED.format(limit), part.request)
        for stream_id, moved_at in list(self.h2_conn.to_read.items()):
            if self.is_closed(stream_id):
                del self.h2_conn.to_read[stream_id]
            elif (left := moved_at + limit - time.monotonic()) > 0:
                next_look = min(next_look, left)
            else:
                yield from self._give_up(stream_id, f"the client read nothing of its answer for {limit:.0f} s")
        self._body_timer = RequestWakeup(next_look) if self._to_send or self.h2_conn.to_read else None
        if self._body_timer is not None:
            yield self._body_timer

    def _is_our_turn(self, stream_id: int, request: Request) -> bool:
        has_begun = self.h2_conn.streams[stream_id].state_machine.headers_sent
        return self.is_open_for_us(stream_id) if has_begun else _awaits_leave(request)

    def _give_up(self, stream_id: int, reason: str, request: Request | None = None) -> CommandGenerator[None]:
        """Reset a stream, after an answer to the request where none has begun (RFC 9113 §8.1)."""
        self._to_send.pop(stream_id, None)
        self.h2_conn.to_read.pop(stream_id, None)
        self.streams.pop(stream_id, None)
        has_begun = self.h2_conn.streams[stream_id].state_machine.headers_sent
        if request is not None and not has_begun:
            answer = error_answer(408, reason, method=request.method)
            fields = [(name.lower(), value) for name, value in answer.headers.fields]
            self.h2_conn.send_headers(stream_id, [(b":status", b"408"), *fields])
            self.h2_conn.send_data(stream_id, answer.raw_content or b"", end_stream=True)
        if not self.is_closed(stream_id):
            self.h2_conn.reset_stream(stream_id, ErrorCodes.CANCEL if has_begun else ErrorCodes.NO_ERROR)
        yield SendData(self.conn, self.h2_conn.data_to_send())
        yield ReceiveHttp(RequestProtocolError(stream_id, reason, RequestProtocolError.code))

    def _is_in_head(self) -> bool:
        """Tell whether a head has begun to arrive, or the connection's own, and is not complete."""
        frames: Any = self.h2_conn.incoming_buffer
        data = frames._data if hasattr(frames, "_data") else frames.data
        is_cut = len(data) > 3 and data[3] in _HEAD_FRAMES
        return bool(frames._headers_buffer or frames._preamble_len or is_cut)


class _ClientTLSLayer(ClientTLSLayer):
    _timer: RequestWakeup | None = None

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        if isinstance(event, Start):
            self._timer = RequestWakeup(client_timeout.limit())
            yield self._timer
        if isinstance(event, Wakeup) and event.command is self._timer:
            if self.tunnel_state is TunnelState.ESTABLISHING:
                yield from self.on_handshake_error("the handshake takes too long")
                yield from self._handshake_finished("the handshake takes too long")
            return
        yield from super()._handle_event(event)


class _ChunkedReader(ChunkedReader):
    def __call__(self, buf: Any) -> Any:
        event = super().__call__(buf)
        if event is None and len(buf) > MAX_HEAD:
            raise LocalProtocolError("chunk extensions or trailers are too long")
        return EndOfMessage() if isinstance(event, EndOfMessage) else event
