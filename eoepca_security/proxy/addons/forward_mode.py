"""Forward mode: who may use the proxy, what is a request to it, and which connections pass untouched."""

from typing import Final
from weakref import WeakSet

from mitmproxy import ctx
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.connection import Client
from mitmproxy.http import HTTPFlow, Request, Response
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers import TCPLayer
from mitmproxy.proxy.mode_specs import RegularMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.tls import ClientHelloData

from eoepca_security.oauth.urls import EVERYWHERE, is_loopback
from eoepca_security.proxy.addons.destinations import gets_a_token, is_served
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.patches import messages
from eoepca_security.proxy.patches.http_clients import is_origin_form
from eoepca_security.proxy.patches.http_stream import connect_above, connect_first, is_misframed, tunnel_of
from eoepca_security.proxy.policy.access import Refusal
from eoepca_security.proxy.policy.headers import is_one_request
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL
from eoepca_security.proxy.policy.proxy_password import is_right

_AMBIGUOUS: Final = Refusal("bad_request", "servers could disagree about its meaning")
_TO_ITSELF: Final = Refusal(
    "bad_request",
    "this is a forward proxy: call the service by its own address, and name this proxy in the tool's proxy settings "
    "(HTTP_PROXY, HTTPS_PROXY)",
)
_PASSWORD: Final = Refusal(
    "proxy_authentication_required", "send the user name and password in PROXY_AUTH_FILE (Basic authentication)"
)
_WRONG_PASSWORD: Final = Refusal(_PASSWORD.code, "the user name and password are not those in PROXY_AUTH_FILE")


class ForwardMode:
    """Decides about each tunnel (CONNECT), and about each request before all others do.

    mitmproxy goes on when a hook raises. So a tunnel and what comes through it count for nothing until they have been
    accepted, and no connection is made for a client that has not shown the password.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._accepted: WeakSet[Request] = WeakSet()
        self._known: WeakSet[Client] = WeakSet()

    def tls_clienthello(self, data: ClientHelloData) -> None:
        """Speak HTTP/1 with clients that call the proxy itself over TLS: mitmproxy cannot open tunnels in HTTP/2."""
        client = data.context.client
        if isinstance(client.proxy_mode, RegularMode) and connect_above(data.context.layers) is None:
            client.alpn = b"http/1.1"

    def http_connect(self, flow: HTTPFlow) -> None:
        """Accept a tunnel, or refuse it (RFC 9110 §9.3.6)."""
        if flow.response is not None:  # another add-on has refused it
            return
        flow.response = messages.last_resort()
        request, mode = flow.request, flow.client_conn.proxy_mode
        if not is_served(mode, self._state.settings):
            return
        if (refusal := self._refusal(flow)) is not None:
            flow.response = _refuse(flow, refusal)
            return
        if not gets_a_token(self._state, request.host, request.port):
            connect_first(request)
        self._accepted.add(request)
        flow.response = None

    def answer(self, flow: HTTPFlow) -> Response | None:
        """Return the proxy's own answer to a request in forward mode, or None to go on with it."""
        if not isinstance(flow.client_conn.proxy_mode, RegularMode) or flow.is_replay is not None:
            return None
        connect = tunnel_of(flow.request)
        if connect is None:
            refusal = self._refusal(flow)
        elif connect not in self._accepted:
            refusal = _PASSWORD
        else:
            refusal = None if _is_clear(flow.request) else _AMBIGUOUS
        return _refuse(flow, refusal) if refusal is not None else None

    def next_layer(self, data: NextLayer) -> None:
        """Pass tunnels to hosts that get no token through untouched."""
        context, address = data.context, data.context.server.address
        if data.layer is not None or address is None or not isinstance(context.client.proxy_mode, RegularMode):
            return
        connect = connect_above(context.layers)
        if connect in self._accepted and not gets_a_token(self._state, *address[:2]):
            data.layer = TCPLayer(context, ignore=True)

    def server_connect(self, data: ServerConnectionHookData) -> None:
        """Make no connection for a client that has not shown the password, whatever has gone wrong before."""
        server = ctx.master.addons.get("proxyserver")
        is_client = isinstance(server, Proxyserver) and data.client.id in server.connections  # and not a replay
        if is_client and self._password(data.client) is not None and data.client not in self._known:
            data.server.error = "the client has not sent the proxy's password"

    def _refusal(self, flow: HTTPFlow) -> Refusal | None:
        """Return why a request to the proxy, which is not in a tunnel, is refused, or None."""
        request, client = flow.request, flow.client_conn
        values = request.headers.get_all("Proxy-Authorization")
        request.headers.pop("Proxy-Authorization", None)
        password = self._password(client)
        if password is not None:
            if not is_right(password, values):
                return _WRONG_PASSWORD if values else _PASSWORD
            self._known.add(client)
        if not _is_clear(request):
            return _AMBIGUOUS
        if is_origin_form(request) or _is_own(request, client):
            return _TO_ITSELF
        return None

    def _password(self, client: Client) -> str | None:
        settings = self._state.settings
        return settings.proxy_auth if settings is not None and isinstance(client.proxy_mode, RegularMode) else None


def _refuse(flow: HTTPFlow, refusal: Refusal) -> Response:
    flow.metadata |= {CODE: refusal.code, DETAIL: refusal.detail}
    method = flow.request.method
    if refusal.code == _PASSWORD.code:
        return messages.password_required(refusal.detail, method=method)
    return messages.answer(refusal.code, refusal.detail, method=method)


def _is_clear(request: Request) -> bool:
    return is_one_request(request.data) and not is_misframed(request)


def _is_own(request: Request, client: Client) -> bool:
    """Return whether a request is for the address where the proxy accepted it."""
    host, port = client.sockname[:2]
    wanted = request.host.lower()
    names_us = wanted in (host, *EVERYWHERE) or is_loopback(wanted) or wanted.endswith(".localhost")
    return request.port == port and names_us
