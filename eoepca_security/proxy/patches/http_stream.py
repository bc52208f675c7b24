"""One request and its answer: answers that do not wait for what is still to come, and those for a service that fails.

mitmproxy reads the whole body of a request before it sends an answer that an add-on has made, and tells of a service
that fails in HTML. The streams here answer at once, and in the form that clients of ours know.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import wsproto.events
from mitmproxy.connection import Connection, Server
from mitmproxy.http import HTTPFlow, Request, Response
from mitmproxy.net.http.http1 import expected_http_body_size
from mitmproxy.net.http.status_codes import NO_RESPONSE
from mitmproxy.net.http.validate import validate_headers
from mitmproxy.proxy.commands import CloseConnection, Command, OpenConnection, RequestWakeup, StartHook
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.events import DataReceived, Event, Wakeup
from mitmproxy.proxy.layer import CommandGenerator, Layer
from mitmproxy.proxy.layers import websocket
from mitmproxy.proxy.layers.http import DropStream, HttpStream, SendHttp
from mitmproxy.proxy.layers.http._events import (
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
)
from mitmproxy.proxy.layers.http._hooks import HttpRequestHeadersHook, HttpResponseHeadersHook
from mitmproxy.proxy.layers.websocket import WebsocketConnection
from mitmproxy.proxy.mode_specs import RegularMode
from wsproto.events import BytesMessage, TextMessage
from wsproto.frame_protocol import Opcode

from eoepca_security.proxy.config.settings import HELD_BYTES
from eoepca_security.proxy.patches import client_timeout, messages, seams
from eoepca_security.proxy.patches.hook_cache import collect
from eoepca_security.proxy.policy.buffering import MAX_HELD, MAX_WHOLE, Budget, Share
from eoepca_security.proxy.policy.clearance import clearance
from eoepca_security.proxy.policy.headers import check_answer, has_no_content, is_websocket, value_of
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL, MALFORMED, REMEDY, SERVICE, upstream_error

_FRAME: Final = 64  # bytes that a frame of a WebSocket message takes beside its content

_SLICE: Final = 4096  # bytes of compressed messages that are unpacked at a time

_POLICY: Final = 1008  # RFC 6455 §7.4.1: no code fits better

MAX_DISCARDED: Final = 1024 * 1024 * 1024
"""Longest rest of a request, in bytes, that is read after its answer; then the connection ends. Most clients look at an
answer only when they have sent everything, and would never see it if the connection ended before that."""

HOLD_TIMEOUT: Final = 5.0
"""Seconds for which an answer that refuses the token (401) may take to arrive; then it passes as it comes, and the
request is not sent again."""

_MULTIPLEXED: Final = (b"h2", b"h3")

_GARBAGE: Final = 16 * 1024 * 1024
"""Bytes of long bodies that may wait to be collected: streams refer to themselves, and the collector runs by numbers of
objects, however large they are."""

# RFC 9110 §9.2.2: doing these twice is no different from doing them once.
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})

budget: Final = Budget(HELD_BYTES)
"""What this process holds of bodies."""

late: WeakSet[Connection] = WeakSet()
"""Connections that were ended because nothing came from the service for too long."""

_misframed: WeakSet[Request] = WeakSet()

_tunnels: WeakKeyDictionary[Request, Request] = WeakKeyDictionary()

_connects_first: WeakSet[Request] = WeakSet()

_used: WeakSet[Connection] = WeakSet()

_garbage = 0


def install() -> None:
    """Put our streams in the place of mitmproxy's, for all connections of this process that are made from now on."""
    seams.replace("mitmproxy.proxy.layers.http", "HttpStream", Stream)
    seams.replace("mitmproxy.proxy.layers.websocket", "WebsocketLayer", _WebSocket)


def is_misframed(request: Request) -> bool:
    """Tell whether a request ended with its head and named another length than 0 (RFC 9113 §8.1.1)."""
    return request in _misframed


def tunnel_of(request: Request) -> Request | None:
    """Return the CONNECT request of the tunnel that a request came through, or None."""
    return _tunnels.get(request)


def connect_above(layers: Sequence[Layer]) -> Request | None:
    """Return the CONNECT request of the tunnel that `layers` are in, or None; the innermost layer is the last one."""
    return next((layer.flow.request for layer in reversed(layers) if isinstance(layer, Stream)), None)


def connect_first(request: Request) -> None:
    """Connect before this CONNECT request is answered.

    The answer can then tell that it fails, and a server that speaks first is heard.
    """
    _connects_first.add(request)


def may_be_quiet(stream: HttpStream) -> bool:
    """Tell whether the service has begun its answer, which may be a stream of events, or has opened a WebSocket."""
    return bool(stream.server_state == stream.state_stream_response_body or stream._handle_event == stream.passthrough)


def queued(stream: HttpStream) -> int:
    """Return how many bytes have come for a stream that waits: for a hook, or for a connection."""
    size = 0
    for layer in (stream, stream.child_layer):
        if layer is not None:
            for event in layer._paused_event_queue:
                size += len(getattr(event, "data", b""))
    return size


def _check(request: Request, answer: Response, *, ends: bool) -> None:
    """Raise ValueError where an answer must not be passed on; `ends` says that it has no content."""
    validate_headers(answer)
    check_answer(answer.data.headers.fields)
    if ends and not has_no_content(request.data.method, answer.status_code) and _names_content(answer):
        raise ValueError("its Content-Length is not that of its content")
    switches = answer.status_code == 101 and is_websocket(request.data)
    if not (switches or 200 <= answer.status_code <= 599):
        # mitmproxy crashes when it has to pass a 101 on to an HTTP/2 client.
        raise ValueError(f"unexpected status {answer.status_code}")


def _names_content(message: Request | Response) -> bool:
    return bool(message.headers.get("Content-Length", "0") != "0")


def _status(error: ResponseProtocolError) -> int | None:
    """Return the status of the answer that mitmproxy gives for an error, if any; in mitmproxy 11 it is the code."""
    code: Any = error.code
    if isinstance(code, int):
        return None if code == NO_RESPONSE else code
    status: int | None = code.http_status_code()
    return status


def _each(
    commands: CommandGenerator[None], pass_on: Callable[[Command], CommandGenerator[Any]]
) -> CommandGenerator[None]:
    """Pass on each of the commands with `pass_on`, which may do so with others; it returns the reply."""
    reply: Any = None
    while True:
        try:
            command = commands.send(reply)
        except StopIteration:
            return
        reply = yield from pass_on(command)


@dataclass
class TokenRefusedHook(StartHook):
    """The service refuses the token (401): the request is sent again where the hook leaves the flow without an answer.

    Where that cannot be, as the answer is on its way to the client, nobody waits for the hook.
    """

    flow: HTTPFlow


class Stream(HttpStream):
    """A stream that answers as soon as there is an answer."""

    _discarded = 0
    _has_ended = False
    _was_used = False
    _was_repeated = False
    _was_refused = False
    _has_begun = False
    _ends_with_head = False
    _hold_timer: RequestWakeup | None = None

    def __init__(self, context: Context, stream_id: int) -> None:
        super().__init__(context, stream_id)
        self._share = Share(budget)

    def _handle_event(self, event: Event) -> CommandGenerator[None]:
        # No generator itself: there are a dozen events for each request.
        if isinstance(event, Wakeup):
            return self._wake(event)
        if isinstance(event, ResponseData) and self._has_no_content():
            return self.state_blamed(event)  # what a service sends in spite of RFC 9112 §6.3 goes nowhere
        commands = super()._handle_event(event)
        return _each(commands, self._in_words) if self.context.client.alpn in _MULTIPLEXED else commands

    def _wake(self, event: Wakeup) -> CommandGenerator[None]:
        if event.command is self._hold_timer and self.server_state == self.state_consume_response_body:
            yield from self._stop_holding()

    def _in_words(self, command: Command) -> CommandGenerator[Any]:
        """Replace mitmproxy's own HTML in HTTP/2 and HTTP/3 by answers in our form; `last_answer` is for HTTP/1."""
        event = command.event if isinstance(command, SendHttp) else None
        if isinstance(event, ResponseHeaders) and event.response.status_code != 100:
            self._has_begun = True
        if not isinstance(event, ResponseProtocolError) or self._has_begun or not self._is_multiplexed():
            return (yield command)
        if (status := _status(event)) is None:
            return (yield command)
        self._has_begun = True
        answer = messages.error_answer(status, event.message, method=self.flow.request.method)
        yield SendHttp(ResponseHeaders(self.stream_id, answer), self.context.client)
        yield SendHttp(ResponseData(self.stream_id, answer.raw_content or b""), self.context.client)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
        return None

    def _is_multiplexed(self) -> bool:
        return self.flow.request.is_http2 or self.flow.request.is_http3

    def _has_no_content(self) -> bool:
        response = self.flow.response
        return (
            response is not None
            and response.status_code != 101
            and has_no_content(self.flow.request.data.method, response.status_code)
        )

    def state_wait_for_request_headers(self, event: RequestHeaders) -> CommandGenerator[None]:
        """Answer without waiting for the body where the hooks have left an answer."""
        request = event.request
        if isinstance(self.context.client.proxy_mode, RegularMode):
            connect = connect_above(self.context.layers[:-1])
            if connect is not None:
                _tunnels[request] = connect
        if event.end_stream and (request.is_http2 or request.is_http3) and _names_content(request):
            _misframed.add(request)
        commands = super().state_wait_for_request_headers(event)
        yield from commands if event.end_stream else _each(commands, self._held_or_streamed)
        if self._is_in(self.state_consume_request_body) and not event.end_stream and self.flow.response is not None:
            yield from self._answer()

    def handle_connect(self) -> CommandGenerator[None]:
        """Open a tunnel, each with a server of its own: one that fails leaves its mark on the connection's."""
        self.context.server = self.flow.server_conn = Server(address=None)
        yield from super().handle_connect()

    def handle_connect_regular(self) -> CommandGenerator[None]:
        """Open a tunnel in forward mode."""
        if self.flow.response is None and self.flow.request in _connects_first:
            reason = yield OpenConnection(self.context.server)
            if reason:
                self._set_blame(reason)
        yield from super().handle_connect_regular()  # type: ignore[no-untyped-call]

    def _held_or_streamed(self, command: Command) -> CommandGenerator[Any]:
        """Stream a body that would be held, where the process holds enough already."""
        reply = yield command
        request, is_unanswered = self.flow.request, self.flow.response is None and self.flow.error is None
        if isinstance(command, HttpRequestHeadersHook) and is_unanswered and not request.stream:
            length = value_of(request.data.headers.fields, b"content-length") or b""
            request.stream = not self._share.resize(int(length) if length.isdigit() else 0)
        return reply

    def start_request_stream(self) -> CommandGenerator[None]:
        """Begin to stream the request; what follows an answer to it is discarded."""
        yield from super().start_request_stream()
        if self._is_in(self.state_errored) and self.server_state == self.state_done:
            self.client_state = self.state_discard_request_body

    def state_discard_request_body(self, event: Event) -> CommandGenerator[None]:
        """Read what the client still sends, so that it gets to read the answer, but not for ever."""
        if isinstance(event, RequestData):
            self._discarded += len(event.data)
            if self._discarded > MAX_DISCARDED:
                yield CloseConnection(self.context.client)
                self.client_state = self.state_errored
        elif isinstance(event, RequestEndOfMessage):
            self.client_state = self.state_done
            if self._has_ended:
                yield DropStream(self.stream_id)
            else:
                yield from self.flow_done()

    def state_wait_for_response_headers(self, event: ResponseHeaders) -> CommandGenerator[None]:
        """Look at the head of an answer; what refuses the token is held, but not for ever."""
        self._ends_with_head = event.end_stream
        yield from super().state_wait_for_response_headers(event)
        is_held = self.server_state == self.state_consume_response_body and not event.end_stream
        if is_held and self.flow.response is not None and self.flow.response.status_code == 401:
            self._hold_timer = RequestWakeup(HOLD_TIMEOUT)
            yield self._hold_timer

    def start_response_stream(self) -> CommandGenerator[None]:
        """Begin to stream the answer."""
        yield from super().start_response_stream()
        if self._is_refusal():
            hook = TokenRefusedHook(self.flow)
            hook.blocking = False
            yield hook

    def state_consume_response_body(self, event: Event) -> CommandGenerator[None]:
        """Hold the answer, but not more than may be held: then it is streamed after all."""
        response = self.flow.response
        if response is None:
            raise RuntimeError("there is no answer")
        if isinstance(event, ResponseData):
            is_long = len(self.response_body_buf) + len(event.data) > MAX_HELD
            if is_long or not self._share.resize(self._share.size + len(event.data)):
                yield from self._stop_holding()
                yield from self.state_stream_response_body(event)
                return
        if isinstance(event, ResponseEndOfMessage) and self._is_refusal():
            response.data.content = bytes(self.response_body_buf)
            yield TokenRefusedHook(self.flow)
            if (yield from self.check_killed(True)):
                return  # the client has gone meanwhile, so nothing is sent again for it
            if self.flow.response is None:
                self._forget_answer()
                self.server_state = self.state_wait_for_response_headers
                yield from self._send_again()
                return
        yield from super().state_consume_response_body(event)

    def _stop_holding(self) -> CommandGenerator[None]:
        """Stream an answer that was held so far."""
        if self.flow.response is None:
            raise RuntimeError("there is no answer")
        held = bytes(self.response_body_buf)
        self._forget_answer()
        self.flow.response.stream = True
        yield from self.start_response_stream()
        if held:
            yield from self.state_stream_response_body(ResponseData(self.stream_id, held))

    def _forget_answer(self) -> None:
        self._share.resize(self._share.size - len(self.response_body_buf))
        self.response_body_buf.clear()

    def _let_go(self) -> None:
        """Give back what the stream holds."""
        global _garbage  # noqa: PLW0603  there is one for each process, as of the patches
        if self._share.size > MAX_WHOLE:
            _garbage += self._share.size
        self._share.resize(0)
        if _garbage > _GARBAGE:
            _garbage = 0
            collect()

    def flow_done(self) -> CommandGenerator[None]:
        """End the exchange."""
        yield from super().flow_done()
        self._let_go()

    def check_killed(self, emit_error_hook: bool) -> CommandGenerator[bool]:
        """Tell whether the exchange has been killed, and end it."""
        is_killed = yield from super().check_killed(emit_error_hook)
        if is_killed:
            self._let_go()
        return is_killed

    def _is_refusal(self) -> bool:
        """Tell whether the token was refused, once for each request."""
        response = self.flow.response
        if self._was_refused or response is None or response.status_code != 401:
            return False
        self._was_refused = True
        return True

    def send_response(self, already_streamed: bool = False) -> CommandGenerator[None]:
        """Send the answer, and end it even where the service did not want all of the request."""
        if not already_streamed and self.flow.response is not None and self._has_no_content():
            self.flow.response.data.content = b""
        yield from super().send_response(already_streamed)
        if self.server_state != self.state_done or not self._is_in(self.state_stream_request_body):
            return
        yield self._hang_up("the answer came early")
        if self._is_multiplexed():
            self.client_state = self.state_done
            yield from self.flow_done()
            return
        self.flow.live = False
        self._has_ended = True
        self.client_state = self.state_discard_request_body
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)
        request, response = self.flow.request, self.flow.response
        is_old = request.http_version == "HTTP/1.0"
        if response is not None and (is_old or expected_http_body_size(request, response) == -1):
            yield CloseConnection(self.context.client)

    def make_server_connection(self) -> CommandGenerator[bool]:
        """Get a connection to the service, and note whether it has served before."""
        ok = yield from super().make_server_connection()
        if ok:
            self._was_used = self.context.server in _used
            _used.add(self.context.server)
        return ok

    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> CommandGenerator[None]:
        """Answer for a service that cannot be reached or hangs up, unless asking again helps."""
        has_begun = self.server_state in (self.state_stream_response_body, self.state_errored)
        if not isinstance(event, ResponseProtocolError) or has_begun:
            yield from super().handle_protocol_error(event)
            self._let_go()
        elif self.server_state in (self.state_done, self.state_blamed):
            return  # the client has its answer
        elif self._may_repeat() and self.flow.response is None and event.message == "server closed connection":
            yield from self._repeat()
        else:
            yield from self._blame("no answer: timed out" if self.context.server in late else event.message)

    def check_invalid(self, request: bool) -> CommandGenerator[bool]:
        """Answer for a service whose answer does not say for certain what it is, or where it ends."""
        if request or self.flow.response is None:
            return (yield from super().check_invalid(request))
        try:
            _check(self.flow.request, self.flow.response, ends=self._ends_with_head)
        except ValueError as error:
            # What else comes on this connection may be anything.
            yield self._hang_up("the answer is malformed")
            yield from self._blame(f"{MALFORMED}: {error}")
            self.server_state = self.state_blamed
            return True
        return False

    def state_blamed(self, _: Event) -> CommandGenerator[None]:
        """Take no notice of what the service still sends."""
        yield from ()

    def _hang_up(self, reason: str) -> SendHttp:
        """Return the command that ends the connection to the service, of which nobody can use the rest."""
        error = RequestProtocolError(self.stream_id, reason, RequestProtocolError.code)
        return SendHttp(error, self.context.server)

    def _blame(self, reason: str) -> CommandGenerator[None]:
        """Answer that the service failed."""
        self._set_blame(reason)
        yield from self._answer()

    def _set_blame(self, reason: str) -> None:
        request = self.flow.request
        fault = upstream_error(
            f"{request.host}:{request.port}",
            reason,
            is_plain=request.scheme == "http",
            service=self.flow.metadata.get(SERVICE, ""),
        )
        self.flow.response = messages.answer(fault.code, fault.detail, method=request.method)
        self.flow.metadata |= {CODE: fault.code, DETAIL: fault.reason, REMEDY: fault.remedy}
        sent = clearance(request)
        if sent is None or not sent.headers:
            # It went elsewhere, which is no error of a service.
            self.flow.response = messages.answer(fault.code, fault.reason, method=request.method)
            del self.flow.metadata[DETAIL], self.flow.metadata[REMEDY]

    def _is_in(self, state: Any) -> bool:
        return bool(self.client_state == state)

    def _answer(self) -> CommandGenerator[None]:
        """Send the answer that stands in the flow, however much of the request is still to come."""
        if self.flow.response is None:
            raise RuntimeError("there is no answer")
        self.flow.response.timestamp_start = time.time()
        yield HttpResponseHeadersHook(self.flow)
        if (yield from self.check_killed(True)):
            return
        if not self._is_in(self.state_done):
            # HTTP/1 has to read on, or it would take the rest for the next request.
            self.client_state = self.state_done if self._is_multiplexed() else self.state_discard_request_body
        yield from self.send_response()
        if self._is_multiplexed():
            self.client_state = self.state_errored  # takes what still comes, and does nothing
        elif self._is_in(self.state_discard_request_body):
            self.flow.live = False
            self._has_ended = True
            self._let_go()
            yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)

    def _may_repeat(self) -> bool:
        """Tell whether the service has merely ended a connection that it kept, while our request was on its way."""
        request = self.flow.request
        return (
            self._was_used
            and not self._was_repeated
            and self.context.server not in late
            and self._is_in(self.state_done)
            and request.raw_content is not None
            and request.data.method in _IDEMPOTENT
        )

    def _repeat(self) -> CommandGenerator[None]:
        self._was_repeated = True
        yield from self._send_again()

    def _send_again(self) -> CommandGenerator[None]:
        if not (yield from self.make_server_connection()):
            return
        request, server = self.flow.request, self.context.server
        content = request.raw_content
        yield SendHttp(RequestHeaders(self.stream_id, request, end_stream=not content), server)
        if content:
            yield SendHttp(RequestData(self.stream_id, content), server)
        yield SendHttp(RequestEndOfMessage(self.stream_id), server)


class _WebSocket(websocket.WebsocketLayer):
    """A WebSocket that holds no long messages: these pass in parts, as they come, and hooks do not see them."""

    _timer: RequestWakeup | None = None
    _moved_at = 0.0

    def __init__(self, context: Context, flow: HTTPFlow) -> None:
        super().__init__(context, flow)
        self._share = Share(budget)
        self._in_parts: set[WebsocketConnection] = set()

    def relay_messages(self, event: Event) -> CommandGenerator[None]:
        if isinstance(event, Wakeup):
            yield from self._wake(event)
            return
        if isinstance(event, DataReceived):
            if event.connection is self.context.client:
                self._moved_at = time.monotonic()
            # Compressed, a message may be a thousand times as long.
            size = _SLICE if self.client_ws._proto.extensions else len(event.data)
            for start in range(0, len(event.data), max(1, size)):
                yield from self._relay_some(DataReceived(event.connection, event.data[start : start + size]))
        else:
            yield from self._relay_some(event)
        if self._timer is None and self._is_in_message():
            self._timer = RequestWakeup(client_timeout.limit())
            yield self._timer

    def _relay_some(self, event: Event) -> CommandGenerator[None]:
        if self._handle_event == self.done:
            return
        yield from _each(super().relay_messages(event), self._without_history)
        if self._handle_event == self.done:
            self._share.resize(0)
            return
        for side, other in ((self.server_ws, self.client_ws), (self.client_ws, self.server_ws)):
            is_long = side in self._in_parts or _size(side) > MAX_WHOLE
            if is_long or not self._share.resize(_size(self.server_ws) + _size(self.client_ws)):
                yield from self._pass_on(side, other)
        self._share.resize(_size(self.server_ws) + _size(self.client_ws))

    def _without_history(self, command: Command) -> CommandGenerator[Any]:
        """Keep no complete messages, and do not take the end of a long one for one."""
        if not isinstance(command, websocket.WebsocketMessageHook) or self.flow.websocket is None:
            return (yield command)
        messages = self.flow.websocket.messages
        side = self.client_ws if messages[-1].from_client else self.server_ws
        if side in self._in_parts:
            self._in_parts.remove(side)
        else:
            yield command
        messages.clear()
        return None

    def _pass_on(self, side: WebsocketConnection, other: WebsocketConnection) -> CommandGenerator[None]:
        """Send what has come of a message without waiting for the rest."""
        content = b"".join(side.frame_buf)
        side.frame_buf = [b""]
        if not content:
            return
        self._in_parts.add(side)
        is_text = side._proto._message_decoder.opcode is Opcode.TEXT
        part = TextMessage(content.decode(), False, False) if is_text else BytesMessage(content, False, False)
        yield other.send2(part)

    def done(self, _: Event) -> CommandGenerator[None]:
        """Take no notice of what still comes; mitmproxy's own expects no timers."""
        yield from ()

    def _wake(self, event: Wakeup) -> CommandGenerator[None]:
        """End the conversation if the client does not go on with its message; between messages it may be silent."""
        if event.command is not self._timer:
            return
        self._timer = None
        if not self._is_in_message():
            return
        if left := client_timeout.left(self.context.client, self._moved_at):
            self._timer = RequestWakeup(left)
            yield self._timer
            return
        reason = f"no more of the message came for {client_timeout.limit():.0f} s"
        self.client_ws._events.append(wsproto.events.CloseConnection(_POLICY, reason))
        yield from self._relay_some(DataReceived(self.client_ws.conn, b""))

    def _is_in_message(self) -> bool:
        """Tell whether a message of the client has begun, or a frame, and is not complete."""
        if self._handle_event == self.done:
            return False
        frames, message = self.client_ws._proto._frame_decoder, self.client_ws._proto._message_decoder
        return bool(frames.header or len(frames.buffer) or message.opcode is not None)


def _size(side: WebsocketConnection) -> int:
    """Return how many bytes are held of a message that is not complete."""
    return sum(map(len, side.frame_buf)) + (len(side.frame_buf) - 1) * _FRAME
