"""The way of one request.

mitmproxy goes on with a request whose hook raises. So a request has an answer, an error, while it is decided about.
"""

from mitmproxy.http import HTTPFlow

from eoepca_security.proxy.addons import admission
from eoepca_security.proxy.addons.destinations import destination_of
from eoepca_security.proxy.addons.injection import Injection
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.patches import messages
from eoepca_security.proxy.policy.apisix import without_gateway_headers
from eoepca_security.proxy.policy.buffering import streams_request, streams_response
from eoepca_security.proxy.policy.clearance import Clearance, clear, clearance
from eoepca_security.proxy.policy.destination import Destination
from eoepca_security.proxy.policy.headers import with_hidden_credentials, without_hop_by_hop
from eoepca_security.proxy.policy.rewrite import ORIGIN, SHARING, naming_the_proxy, naming_the_service, shared


class RequestFlow:
    """Decides about each request before any of it leaves, and adapts its answer."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._injection = Injection(state)

    async def requestheaders(self, flow: HTTPFlow) -> None:
        """Clear the request for its destination, or answer it."""
        await self._decide(flow)
        if flow.response is None:
            flow.request.stream = streams_request(flow.request.data)
        else:
            # Nobody is asked to go on with a body.
            flow.request.headers.pop("Expect", None)

    async def _decide(self, flow: HTTPFlow) -> None:
        # mitmproxy calls this for requests that it has refused already, too.
        if flow.error is not None or flow.response is not None:
            _hide_credentials(flow)
            return
        # Whatever goes wrong: without a token nothing leaves. Requests are answered, never killed: mitmproxy 12 leaves
        # the connection open when it kills a request whose body is still arriving, and its client hangs.
        flow.response = messages.last_resort()
        where = destination_of(flow, self._state.settings)
        if where.is_elsewhere:
            clear(flow.request, Clearance(where.target))
            flow.response = None
            return
        _hide_credentials(flow)
        if (answer := admission.answer(flow, where, self._state)) is not None:
            flow.response = answer
            return
        self._rewrite(flow, where)
        await self._injection.authorize(flow, where)

    def _rewrite(self, flow: HTTPFlow, where: Destination) -> None:
        """Make of the client's request the one that the service is to see."""
        request = flow.request
        fields = without_hop_by_hop(request.data)
        if self._state.apisix is not None:
            fields = without_gateway_headers(fields)
        if where.is_reverse:
            scheme = "https" if flow.client_conn.tls else "http"
            # A replay has the name that the client used from the first time.
            proxy = flow.metadata.setdefault(ORIGIN, f"{scheme}://{request.host_header}")
            fields = naming_the_service(fields, proxy, where.target.origin)
        request.headers.fields = fields
        request.host_header = where.target.authority
        if not (request.is_http2 or request.is_http3):
            # An absolute target (RFC 9112 §3.2.2) would be forwarded as it is.
            request.authority = ""

    async def request(self, flow: HTTPFlow) -> None:
        """Authorize again what was held back until its body was complete: the token may have ended meanwhile."""
        is_ours = flow.error is None and flow.response is None and flow.request.raw_content is not None
        if is_ours and not self._injection.is_current(flow.request):
            where = destination_of(flow, self._state.settings)
            if not where.is_elsewhere:
                await self._injection.authorize(flow, where)

    def responseheaders(self, flow: HTTPFlow) -> None:
        """Say who may read the answer, lead to the proxy, and say on kept connections when the proxy ends."""
        response, sent = flow.response, clearance(flow.request)
        is_elsewhere = sent is not None and not sent.headers
        if response is None or response.status_code == 101 or is_elsewhere:
            return
        fields = shared(response.headers.fields, flow.metadata.get(SHARING))
        if sent is not None and (proxy := flow.metadata.get(ORIGIN)) is not None:
            fields = naming_the_proxy(fields, proxy, sent.target.origin)
        if self._state.is_ending and not (flow.request.is_http2 or flow.request.is_http3):
            fields = (*(field for field in fields if field[0].lower() != b"connection"), (b"Connection", b"close"))
        response.headers.fields = fields
        response.stream = streams_response(response.status_code, fields)

    async def token_refused(self, flow: HTTPFlow) -> None:
        """Get another token where the service refuses this one, and have the request sent again where that can be."""
        await self._injection.replace(flow)

    def websocket_message(self, flow: HTTPFlow) -> None:
        """Keep a long conversation from piling up in memory."""
        if flow.websocket is not None:
            del flow.websocket.messages[:-1]


def _hide_credentials(flow: HTTPFlow) -> None:
    headers = flow.request.headers
    headers.fields = with_hidden_credentials(headers.fields)
