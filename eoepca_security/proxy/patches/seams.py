"""The register of all that this package replaces or relies on inside mitmproxy and the libraries under it.

Such names may move in any release, so `check` looks at all of them before `replace` replaces the first one: no proxy
runs half patched. This module must not import mitmproxy, because `lazy_imports` has to run first.
"""

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import reduce
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple

TESTED: Final = "12.2.3" if sys.version_info >= (3, 12) else "11.0.2"
"""The version of mitmproxy that the tests run with on this Python."""

REMEDY: Final = f"install mitmproxy {TESTED}, with which it is tested"


class Moved(SystemExit):
    """A name has moved. It ends the program with its line and exit code 1, unless somebody catches it."""


class Row(NamedTuple):
    """One name: the file that needs it, relative to `eoepca_security/proxy`, and what has to hold.

    `owner` is `module` or `module:Class`. `signatures` are those that are good, without annotations; there are none for
    what is not called. `users` are functions that have to look the name up there, as only then ours is used.
    """

    file: str
    owner: str
    name: str
    signatures: tuple[str, ...]
    users: tuple[str, ...]


# A file of ours; the owners whose names it needs; their names, with signatures where they are called, and after `<` who
# looks them up.
_EARLY: Final = """
patches/lazy_imports.py
    mitmproxy.proxy.utils expect(*event_types)
    mitmproxy.http:MessageData __post_init__(self)
    ssl:SSLContext load_default_certs(self, purpose=Ellipsis) < create_default_context
"""

# h2 renamed it with the version that mitmproxy 12 uses.
_FRAME_DATA: Final = "data" if TESTED.startswith("11.") else "_data"

_TLS_OPTIONS: Final = (
    "method, min_version, max_version, cipher_list, ecdh_curve, verify, ca_path, ca_pemfile, client_cert, "
    "legacy_server_connect"
)

_ROWS: Final = f"""
patches/http_clients.py
    mitmproxy.proxy.layers.http
        Http1Client(context); Http2Client(context) < HttpClient._handle_event HttpLayer._handle_event
        Http3Client(context) < HttpClient._handle_event HttpLayer._handle_event
        Http1Server(context); Http2Server(context) < HttpLayer._handle_event
    mitmproxy.proxy.layers.http._http1:Http1Client
        send(self, event) < Http1Connection._handle_event
        read_headers(self, event) < Http1Connection.start Http1Connection.mark_done
        __init__(self, context); done(self, event)
        buf conn context request response state stream_id
    mitmproxy.proxy.layers.http._http1:Http1Server
        _handle_event(self, event) < mitmproxy.proxy.layer:Layer.handle_event
        send(self, event) < Http1Connection._handle_event
        read_headers(self, event) < Http1Connection.start Http1Connection.mark_done
        read_body(self, event) < Http1Server.read_headers
        wait(self, event) < Http1Server.mark_done
        done(self, event); passthrough(self, event)
        buf conn context request response response_done state stream_id
    mitmproxy.proxy.layers.http._http1
        make_error_response(status_code, message='') < Http1Server.send Http1Server.read_headers
        ChunkedReader() < make_body_reader
    mitmproxy.proxy.layers.http._http2:Http2Server
        _handle_event(self, event) < mitmproxy.proxy.layer:Layer.handle_event
        protocol_error(self, message, error_code=Ellipsis)
        is_closed(self, stream_id); is_open_for_us(self, stream_id)
        __init__(self, context)
        conn h2_conf h2_conn streams
    mitmproxy.proxy.layers.http._http_h2:BufferedH2Connection
        __init__(self, config)
        send_data(self, stream_id, data, end_stream=False, pad_length=None)
        stream_window_updated(self, stream_id) < BufferedH2Connection.receive_data
        stream_buffers
    h2.stream:H2StreamStateMachine headers_sent
    h2.connection:H2Connection highest_inbound_stream_id incoming_buffer
    h2.frame_buffer:FrameBuffer _headers_buffer _preamble_len {_FRAME_DATA}
    mitmproxy.proxy.layers.http._http2:Http2Client
        _handle_event(self, event) < mitmproxy.proxy.layer:Layer.handle_event
        _handle_event2(self, event) < Http2Client._handle_event
        our_stream_id < Http2Client._handle_event
        __init__(self, context)
    mitmproxy.proxy.layers.http._http3:Http3Client
        _handle_event(self, event) < mitmproxy.proxy.layer:Layer.handle_event
        __init__(self, context)
    mitmproxy.proxy.layers ClientTLSLayer(context) < mitmproxy.addons.next_layer:NextLayer._setup_explicit_http_proxy
    mitmproxy.addons.next_layer ClientTLSLayer(context) < NextLayer._setup_reverse_proxy NextLayer._next_layer
    mitmproxy.proxy.layers.tls:ClientTLSLayer
        _handle_event(self, event) < mitmproxy.proxy.layer:Layer.handle_event
        on_handshake_error(self, err) < mitmproxy.proxy.tunnel:TunnelLayer._handle_event
        _handshake_finished(self, err) < mitmproxy.proxy.tunnel:TunnelLayer._handle_event
        tunnel_state
    mitmproxy.proxy.tunnel:TunnelState ESTABLISHING
    mitmproxy.addons.proxyauth make_auth_required_response(is_proxy) < ProxyAuth.authenticate_http
    mitmproxy.net.http.http1
        read_request_head(lines) < mitmproxy.proxy.layers.http._http1:Http1Server.read_headers
        read_response_head(lines) < mitmproxy.proxy.layers.http._http1:Http1Client.read_headers
        connection_close(http_version, headers) < mitmproxy.proxy.layers.http._http1:Http1Connection.mark_done
        expected_http_body_size(request, response=None)
    mitmproxy.net.http.validate validate_headers(message)
    mitmproxy.proxy.layers.http._base ReceiveHttp(event)
    mitmproxy.proxy.layers.http._events
        RequestHeaders(stream_id, request, end_stream, replay_flow=None); RequestTrailers(stream_id, trailers)
        RequestData(stream_id, data); RequestEndOfMessage(stream_id)
        RequestProtocolError(stream_id, message, code) | (stream_id, message, code=400)
        ResponseHeaders(stream_id, response, end_stream=False); HttpEvent(stream_id)
        ResponseProtocolError(stream_id, message, code) | (stream_id, message, code=502)
    mitmproxy.proxy.layers.http._events:ResponseProtocolError code
    mitmproxy.proxy.commands
        CloseConnection(connection); CloseTcpConnection(connection, half_close=False); SendData(connection, data)
        Log(message, level=20); RequestWakeup(delay); StartHook(*args, **kwargs)
    mitmproxy.proxy.events ConnectionClosed(connection); DataReceived(connection, data); Start(); Wakeup(command)
    mitmproxy.proxy.context:Context client server
    mitmproxy.connection:Server address tls via
    h11._readers:ChunkedReader __call__(self, buf)
    h11._receivebuffer:ReceiveBuffer __len__(self); __bytes__(self)
    h11._receivebuffer blank_line_regex < ReceiveBuffer.maybe_extract_lines
patches/http_stream.py
    mitmproxy.proxy.layers.http
        HttpStream(context, stream_id) < HttpLayer.make_stream
        DropStream(stream_id); SendHttp(event, connection)
    mitmproxy.proxy.layers.http:HttpStream
        handle_connect(self) < HttpStream.state_wait_for_request_headers
        handle_connect_regular(self) < HttpStream.handle_connect
        _handle_event(self, event) < mitmproxy.proxy.layer:Layer.handle_event
        state_wait_for_request_headers(self, event) < HttpStream._handle_event
        state_wait_for_response_headers(self, event) < HttpStream.state_wait_for_request_headers
        start_request_stream(self) < HttpStream.state_wait_for_request_headers
        start_response_stream(self) < HttpStream.state_wait_for_response_headers
        state_consume_response_body(self, event) < HttpStream.state_wait_for_response_headers
        send_response(self, already_streamed=False) < HttpStream.state_consume_response_body
        __init__(self, context, stream_id)
        make_server_connection(self) < HttpStream.state_consume_request_body HttpStream.start_request_stream
        handle_protocol_error(self, event) < HttpStream._handle_event HttpStream.make_server_connection
        check_invalid(self, request) < HttpStream.state_wait_for_response_headers
        check_killed(self, emit_error_hook) < HttpStream.state_wait_for_request_headers
        flow_done(self) < HttpStream.send_response
        state_done(self, _); state_errored(self, _)
        state_consume_request_body(self, event); state_stream_request_body(self, event)
        state_stream_response_body(self, event)
        passthrough(self, event) < HttpStream.flow_done
        flow < HttpStream.state_wait_for_request_headers
        client_state context response_body_buf server_state stream_id
    mitmproxy.proxy.utils:ReceiveBuffer __bytes__(self); __len__(self); clear(self)
    mitmproxy.proxy.layers.http._events
        RequestData(stream_id, data); RequestEndOfMessage(stream_id)
        ResponseData(stream_id, data); ResponseEndOfMessage(stream_id)
        ResponseHeaders(stream_id, response, end_stream=False)
        RequestProtocolError(stream_id, message, code) | (stream_id, message, code=400)
    mitmproxy.proxy.layers.http._events:RequestProtocolError code
    mitmproxy.proxy.layers.http._events:ResponseProtocolError code
    mitmproxy.proxy.layers.http._hooks HttpRequestHeadersHook(flow); HttpResponseHeadersHook(flow)
    mitmproxy.proxy.commands RequestWakeup(delay); OpenConnection(connection)
    mitmproxy.proxy.context:Context layers
    mitmproxy.proxy.events Wakeup(command)
    mitmproxy.net.http.status_codes NO_RESPONSE
    mitmproxy.net.http.http1 expected_http_body_size(request, response=None)
    mitmproxy.proxy.layers.websocket WebsocketLayer(context, flow) < mitmproxy.proxy.layers.http:HttpStream.flow_done
    mitmproxy.proxy.layers.websocket:WebsocketLayer
        relay_messages(self, event) < WebsocketLayer.start
        done(self, _) < WebsocketLayer.relay_messages
        _handle_event client_ws server_ws < WebsocketLayer.start
        __init__(self, context, flow)
    mitmproxy.proxy.layers.websocket WebsocketMessageHook(flow) < WebsocketLayer.relay_messages
    mitmproxy.proxy.layers.websocket:WebsocketConnection
        send2(self, event)
        _events conn frame_buf
    wsproto.connection:Connection _proto
    wsproto.frame_protocol:FrameProtocol _frame_decoder _message_decoder extensions
    wsproto.frame_protocol:FrameDecoder buffer header
    wsproto.frame_protocol:MessageDecoder opcode
    wsproto.events
        CloseConnection(code, reason=None)
        BytesMessage(data, frame_finished=True, message_finished=True)
        TextMessage(data, frame_finished=True, message_finished=True)
patches/connection_pool.py
    mitmproxy.proxy.mode_servers ProxyConnectionHandler(master, r, w, options, mode) < ServerInstance.handle_stream
    mitmproxy.proxy.mode_servers:ProxyConnectionHandler
        handle_hook(self, hook) < mitmproxy.proxy.server:ConnectionHandler.hook_task
        open_connection(self, command) < mitmproxy.proxy.server:ConnectionHandler.server_event
        on_timeout(self) < mitmproxy.proxy.server:ConnectionHandler.__init__
        server_event(self, event) < mitmproxy.proxy.server:ConnectionHandler.handle_connection
        drain_writers(self) < mitmproxy.proxy.server:ConnectionHandler.handle_connection
        max_conns < mitmproxy.proxy.server:ConnectionHandler.open_connection
        __init__(self, master, r, w, options, mode); handle_connection(self, connection)
        client layer master timeout_watchdog transports
    mitmproxy.proxy.server:TimeoutWatchdog disarm(self); register_activity(self); watch(self)
    mitmproxy.proxy.server ConnectionIO(handler=None, reader=None, writer=None)
    mitmproxy.proxy.server_hooks
        ClientDisconnectedHook(client); ServerConnectionHookData(server, client); ServerDisconnectedHook(data)
    mitmproxy.proxy.layers.http:HttpLayer
        get_connection(self, event, *, reuse=True) < HttpLayer.event_to_child HttpLayer.register_connection
        event_to_child(self, child, event)
        command_sources connections context streams waiting_for_establishment
    mitmproxy.proxy.layers.http:GetHttpConnection connection_spec_matches(self, connection)
    mitmproxy.proxy.layers.http GetHttpConnectionCompleted(command, reply)
    mitmproxy.proxy.layer:Layer
        _handle_event(self, event) < Layer.handle_event
        context _paused_event_queue
    mitmproxy.proxy.layers.http._http2:Http2Connection h2_conn
    mitmproxy.proxy.layers.http._http2:Http2Client our_stream_id
    mitmproxy.proxy.layers.http._http_h2:BufferedH2Connection stream_buffers
    mitmproxy.proxy.layers.http._http_h2 SendH2Data(data, end_stream)
    mitmproxy.proxy.context:Context
        fork(self)
        layers
    mitmproxy.connection:Server connected error state timestamp_end timestamp_start timestamp_tls_setup
    mitmproxy.proxy.tunnel:TunnelLayer tunnel_state
    mitmproxy.proxy.tunnel:TunnelState OPEN
    asyncio:StreamReader _buffer
patches/client_timeout.py
    asyncio:StreamReader _buffer
patches/hook_cache.py
    mitmproxy.addonmanager:AddonManager
        handle_lifecycle(self, event) < mitmproxy.proxy.mode_servers:ProxyConnectionHandler.handle_hook
        trigger_event(self, event) < AddonManager.handle_lifecycle mitmproxy.master:Master.running
        register(self, addon) < AddonManager.add mitmproxy.addons.script:Script.loadscript
        remove(self, addon) < mitmproxy.addons.script:Script.loadscript
        _iter_hooks(self, addon, event) < AddonManager.invoke_addon
        clear(self)
        __class__ chain master
    mitmproxy.addonmanager safecall() < AddonManager.trigger_event
    mitmproxy.hooks UpdateHook(flows)
    mitmproxy.hooks:Hook name < Hook.__init_subclass__
patches/header_lookup.py
    mitmproxy.http:Headers
        get_all(self, name); get(self, key, default=None); __getitem__(self, key); __contains__(self, key)
        fields
    mitmproxy.optmanager:_Option
        current(self) < OptManager.__getattr__
        _default value
    mitmproxy.optmanager unset < _Option.current
patches/messages.py
    mitmproxy.addons.proxyauth REALM
    mitmproxy.http:MessageData __dict__ headers
    mitmproxy.http:Request __dict__ data
    mitmproxy.http:Response __dict__ data
patches/certificate_authority.py
    mitmproxy.certs load_pem_private_key(data, password) < CertStore.from_files CertStore.add_cert_file
    mitmproxy.certs:CertStore create_store(path, basename, key_size, organization=None, cn=None)
    mitmproxy.addons.tlsconfig:TlsConfig
        configure(self, updated)
        certstore
    mitmproxy.options CONF_BASENAME KEY_SIZE
patches/service_tls.py
    mitmproxy.net.tls
        create_proxy_server_context(*, {_TLS_OPTIONS}) < mitmproxy.addons.tlsconfig:TlsConfig.tls_start_server
        Verify
patches/shared_listeners.py
    mitmproxy.proxy.mode_servers:AsyncioServerInstance
        listen(self, host, port) < AsyncioServerInstance._start
        handle_stream(self, reader, writer=None)
runtime/mitmdump.py
    mitmproxy.tools.main run(master_cls, make_parser, arguments, extra=None)
    mitmproxy.tools.cmdline mitmdump(opts)
runtime/environment.py
    mitmproxy.options CONF_DIR
runtime/logs.py
    mitmproxy.addons.termlog:TermLog logger
addons/lifecycle.py
    mitmproxy.master:Master event_loop should_exit
    mitmproxy.optmanager:OptManager deferred
addons/connections.py
    mitmproxy.addons.proxyserver:Proxyserver connections
    mitmproxy.proxy.mode_servers:ProxyConnectionHandler transports
addons/forward_mode.py
    mitmproxy.addons.proxyserver:Proxyserver connections
    mitmproxy.proxy.context:Context layers
addons/drain.py
    mitmproxy.addons.proxyserver:Proxyserver connections servers
"""

# What is loaded when somebody uses it, or never; the start does not wait for it, and the tests check it.
_LATE: Final = """
patches/lazy_imports.py
    mitmproxy.flowfilter TFilter
    mitmproxy.command_lexer quote(val); unquote(x)
    mitmproxy.addons.onboardingapp app(environ, start_response)
    werkzeug.security safe_join(directory, *untrusted)
"""


def _parse(text: str) -> Iterator[Row]:
    file = owner = ""
    for line in filter(None, text.splitlines()):
        if not line.startswith("    "):
            file = line
            continue
        if not line.startswith("        "):
            owner, _, line = line.strip().partition(" ")  # noqa: PLW2901
        names, _, users = line.partition(" < ")
        for entry in names.split("; ") if "(" in names else names.split():
            name, _, signatures = entry.strip().partition("(")
            given = f"({signatures}".split(" | ") if signatures else ()
            yield Row(file, owner, name, tuple(given), tuple(users.split()))


# What `python -O` leaves out of mitmproxy cannot be replaced, and need not be.
EARLY: Final = tuple(row for row in _parse(_EARLY) if __debug__ or row.name != "__post_init__")
ROWS: Final = tuple(_parse(_ROWS))
LATE: Final = tuple(_parse(_LATE))

_REPLACEABLE: Final = {(row.owner, row.name): rows for rows in (ROWS, EARLY) for row in rows}
_checked: Final[set[Row]] = set()


def check(rows: Iterable[Row] = ROWS) -> None:
    """Raise Moved for the first row that does not hold. What has been checked once in this process is not again.

    Raises ModuleNotFoundError without mitmproxy.
    """
    for row in rows:
        if row not in _checked:
            try:
                wrong = _wrong(row)
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                if isinstance(error, ModuleNotFoundError) and error.name == "mitmproxy":
                    raise  # it has not moved: nobody installed it
                wrong = f"{_dotted(row)} is gone, or is something else ({error})"
            if wrong is not None:
                raise Moved(f"{_versions(row)}: {wrong}, which eoepca_security/proxy/{row.file} needs: {REMEDY}")
            _checked.add(row)


def replace(owner: str, name: str, new: Any, *, of: Any = None) -> Any:
    """Put `new` in the place of a name in the register, and return what stood there.

    `of` is the instance of the owner that gets it, where not all do. Raises KeyError for a name without a row, and
    Moved where any row does not hold; then nothing is replaced.
    """
    rows = _REPLACEABLE[owner, name]
    check(rows)
    place = _find(owner) if of is None else of
    old = getattr(place, name)
    setattr(place, name, new)
    return old


def signature_of(value: Any) -> str:
    """Return the parameters as the register has them: no annotations, and Ellipsis for defaults that are not plain."""
    parameters = []
    for given in inspect.signature(getattr(value, "__func__", value)).parameters.values():
        is_plain = given.default is given.empty or type(given.default) in (str, int, bool, tuple, type(None))
        parameters.append(given.replace(annotation=given.empty, default=given.default if is_plain else ...))
    return str(inspect.Signature(parameters))


def _wrong(row: Row) -> str | None:
    owner = _find(row.owner)
    values = [vars(place)[row.name] for place in _places(owner) if row.name in vars(place)]
    if not values and (row.signatures or not (row.users or _is_set(owner, row.name))):
        return f"{_dotted(row)} is gone"
    if row.signatures and (found := signature_of(values[0])) not in row.signatures:
        return f"{_dotted(row)} takes {found}, not {' or '.join(row.signatures)}"
    for user in row.users:
        function = _find(user if ":" in user else f"{row.owner.partition(':')[0]}:{user}")
        if not _looks_up(inspect.unwrap(getattr(function, "__func__", function)), owner, row.name):
            return f"{_dotted(row)} is not what {user.replace(':', '.')} uses"
    return None


def _dotted(row: Row) -> str:
    return f"{row.owner.replace(':', '.')}.{row.name}"


def _find(path: str) -> Any:
    module, _, names = path.partition(":")
    return reduce(getattr, filter(None, names.split(".")), importlib.import_module(module))


def _places(owner: Any) -> tuple[Any, ...]:
    return inspect.getmro(owner) if inspect.isclass(owner) else (owner,)


def _is_set(owner: Any, name: str) -> bool:
    """Tell whether a constructor sets the attribute."""
    makers = [vars(place).get("__init__") for place in _places(owner)]
    return any(name in _names(maker.__code__) for maker in makers if isinstance(maker, FunctionType))


def _looks_up(function: FunctionType, owner: Any, name: str) -> bool:
    """Tell whether a function gets the name where `replace` puts it: as a global, or through its module, or a class."""
    names = _names(function.__code__)
    known = function.__globals__
    if name not in names or not isinstance(owner, ModuleType):
        return name in names
    return known is vars(owner) or any(known.get(other) is owner for other in names)


def _names(code: CodeType) -> set[str]:
    inner = (_names(value) for value in code.co_consts if isinstance(value, CodeType))
    return set(code.co_names).union(*inner)


def _versions(row: Row) -> str:
    """Say whose names they are, mitmproxy's version included."""
    from importlib import metadata  # noqa: PLC0415  takes long, and is needed once at most

    mitmproxy = f"mitmproxy {metadata.version('mitmproxy')}"
    package = row.owner.partition(":")[0].partition(".")[0]
    if package == "mitmproxy":
        return mitmproxy
    if package in sys.stdlib_module_names:
        return f"{package} of Python {sys.version_info.major}.{sys.version_info.minor} under {mitmproxy}"
    return f"{package} {metadata.version(package)} under {mitmproxy}"
