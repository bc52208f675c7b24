"""Another token, and a second try, where the service refuses the first."""

from mitmproxy.http import HTTPFlow

from eoepca_security.proxy.policy import buffering
from eoepca_security.proxy.policy import headers as forwarding


def _may_be_repeated(flow: HTTPFlow) -> bool:
    """Tell whether all of the request is here, and none of its answer is there; mitmproxy replays no WebSockets."""
    request, response = flow.request, flow.response
    return (
        response is not None
        and request.raw_content is not None
        and response.raw_content is not None
        and len(request.raw_content) <= buffering.MAX_HELD
        and not forwarding.is_websocket(request)
    )
