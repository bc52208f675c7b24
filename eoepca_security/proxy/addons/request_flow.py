"""The steps of one request.

mitmproxy forwards a request whose hook raises. So each request has an error response while we decide about it.
"""

from mitmproxy.flow import Error
from mitmproxy.http import HTTPFlow, RequestData

from eoepca_security.oauth.text import printable
from eoepca_security.proxy.addons import admission
from eoepca_security.proxy.addons.destinations import destination_of
from eoepca_security.proxy.addons.forward_mode import ForwardMode
from eoepca_security.proxy.addons.injection import Injection
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.settings import Service
from eoepca_security.proxy.patches import messages
from eoepca_security.proxy.patches.http_stream import tunnel_of
from eoepca_security.proxy.policy.apisix import without_gateway_headers
from eoepca_security.proxy.policy.buffering import streams_request, streams_response
from eoepca_security.proxy.policy.clearance import Clearance, clear, clearance
from eoepca_security.proxy.policy.destination import Destination
from eoepca_security.proxy.policy.headers import (
    Fields,
    with_connection_close,
    with_hidden_credentials,
    without_hop_by_hop,
)
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL, ERROR_HEADER, SERVICE, without_quotes
from eoepca_security.proxy.policy.rewrite import (
    ORIGIN,
    SHARING,
    naming_the_proxy,
    naming_the_service,
    shared,
    with_forwarded,
    with_locations,
    with_usable_cookies,
    without_cookies,
)


class RequestFlow:
    """Decides about each request before any of it leaves, and adapts its answer."""

    def __init__(self, state: State, forward_mode: ForwardMode) -> None:
        self._state = state
        self._forward_mode = forward_mode
        self._injection = Injection(state)

    async def requestheaders(self, flow: HTTPFlow) -> None:
        """Clear the request for its destination, or answer it."""
        await self._decide(flow)
        if flow.response is None:
            flow.request.stream = streams_request(flow.request.data)
        # Do not ask the client to continue with a body that is not wanted, nor in HTTP/1.0 (RFC 9110 §10.1.1).
        if flow.response is not None or flow.request.http_version == "HTTP/1.0":
            flow.request.headers.pop("Expect", None)

    async def _decide(self, flow: HTTPFlow) -> None:
        # mitmproxy also calls this for requests that it has already refused.
        if flow.error is not None or flow.response is not None:
            _hide_credentials(flow)
            flow.metadata |= _code_of(flow)
            return
        # Fail closed: nothing leaves without a token. Requests are answered, never killed: when mitmproxy 12 kills a
        # request whose body is still arriving, it leaves the connection open, and the client hangs.
        flow.response = messages.last_resort()
        if (answer := self._forward_mode.answer(flow)) is not None:
            _hide_credentials(flow)
            flow.response = answer
            return
        where = destination_of(flow, self._state)
        if where.is_elsewhere:
            _pass_on(flow, where)
            return
        if name := self._state.name_of(where.service):
            flow.metadata[SERVICE] = name
        _hide_credentials(flow)
        if (answer := admission.answer(flow, where, self._state)) is not None:
            flow.response = answer
            return
        self._rewrite(flow, where)
        await self._injection.authorize(flow, where)

    def _rewrite(self, flow: HTTPFlow, where: Destination) -> None:
        """Turn the client's request into the one for the service."""
        request = flow.request
        fields = without_hop_by_hop(request.data)
        if self._drops_cookies():
            fields = without_cookies(fields)
        if self._state.apisix:
            fields = without_gateway_headers(fields)
        if where.called is not None:
            scheme = "https" if flow.client_conn.tls else "http"
            # A replay keeps the origin of its first run.
            proxy = flow.metadata.setdefault(ORIGIN, f"{scheme}://{request.host_header}")
            fields = naming_the_service(fields, proxy, where.target.origin, where.called.path)
            if where.service is not None and where.service.forwarded:
                fields = with_forwarded(fields, proxy)
            _direct(request.data, where)
        request.headers.fields = fields
        request.host_header = where.target.authority
        if not (request.is_http2 or request.is_http3):
            # An absolute target (RFC 9112 §3.2.2) would be forwarded as it is.
            request.authority = ""

    async def request(self, flow: HTTPFlow) -> None:
        """Authorize a buffered request again: the token may have expired while its body arrived."""
        is_ours = flow.error is None and flow.response is None and flow.request.raw_content is not None
        if is_ours:
            await self._injection.renew(flow)

    def responseheaders(self, flow: HTTPFlow) -> None:
        """Restrict who may read the answer, rewrite locations, and close kept connections when the proxy stops."""
        response, sent = flow.response, clearance(flow.request)
        if response is None:
            return
        if sent is not None and not sent.headers:
            response.stream = response.status_code != 101  # it goes elsewhere, and nobody sends it again
            return
        if self._drops_cookies():
            response.headers.fields = without_cookies(response.headers.fields)
        if response.status_code == 101:
            return
        # First, as mitmproxy passes the answer on if the rest raises.
        fields = response.headers.fields = shared(response.headers.fields, flow.metadata.get(SHARING))
        if sent is not None and (proxy := flow.metadata.get(ORIGIN)) is not None:
            fields = with_usable_cookies(self._locations(flow, fields, sent, proxy), proxy, _prefix(sent))
        if self._state.is_ending and not (flow.request.is_http2 or flow.request.is_http3):
            fields = with_connection_close(fields)
        response.headers.fields = fields
        response.stream = streams_response(response.status_code, fields)

    def _locations(self, flow: HTTPFlow, fields: Fields, sent: Clearance, proxy: str) -> Fields:
        """Return an answer's fields with locations that lead the client to the proxy again."""
        routes, called, service = self._state.routes, sent.called, sent.service
        if routes is None or called is None or service is None:
            return naming_the_proxy(fields, proxy, sent.target.origin)
        own_port, path = flow.client_conn.sockname[1], flow.request.path
        shared_port = self._state.settings.port if self._state.settings is not None else 0

        def way_in(wanted: Service) -> str | None:
            if wanted == called:  # another object after the services were read again
                return proxy
            return routes.way_in(wanted, called=called, proxy=proxy, own_port=own_port, shared_port=shared_port)

        def location(url: bytes) -> bytes:
            return routes.location(url, called=called, came_from=service, path=path, way_in=way_in)

        return with_locations(fields, location)

    def _drops_cookies(self) -> bool:
        return self._state.settings is not None and self._state.settings.cookies == "drop"

    async def token_refused(self, flow: HTTPFlow) -> None:
        """Get another token after the service refused this one, and send the request again if possible."""
        await self._injection.replace(flow)


def _pass_on(flow: HTTPFlow, where: Destination) -> None:
    """Clear a request for a host that gets no token, and change only what a proxy must (RFC 9110 §7.6)."""
    request = flow.request
    request.headers.fields = without_hop_by_hop(request.data)
    if tunnel_of(request) is None and flow.is_replay is None:
        # The target says which host it is for (RFC 9112 §3.2.2).
        request.host_header = where.target.authority
    clear(request, Clearance(where.target))
    flow.response = None


def _code_of(flow: HTTPFlow) -> dict[str, str]:
    """Return the metadata for a request that mitmproxy has refused or answered."""
    if flow.error is not None:
        was_killed = flow.error.msg == Error.KILLED_MESSAGE
        return {} if was_killed else {CODE: "bad_request", DETAIL: printable(without_quotes(flow.error.msg))}
    code = flow.response.headers.get(ERROR_HEADER) if flow.response is not None else None
    return {CODE: code} if code else {}


def _direct(head: RequestData, where: Destination) -> None:
    """Let a request go to its destination. mitmproxy's own setters would also change `Host`, which comes later."""
    head.scheme, head.host, head.port = where.target.scheme.encode(), where.target.host, where.target.port
    head.path = where.path.encode("utf-8", "surrogateescape")


def _prefix(sent: Clearance) -> str:
    """Return the path that the service has before the path of each request of the client."""
    return sent.called.path if sent.called is not None else ""


def _hide_credentials(flow: HTTPFlow) -> None:
    headers = flow.request.headers
    headers.fields = with_hidden_credentials(headers.fields)
