"""Answers requests that must not or need not be forwarded."""

from mitmproxy.http import HTTPFlow, Response

from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.patches import messages
from eoepca_security.proxy.patches.http_stream import is_misframed
from eoepca_security.proxy.policy.access import Refusal
from eoepca_security.proxy.policy.destination import Destination
from eoepca_security.proxy.policy.headers import is_one_request
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL
from eoepca_security.proxy.policy.rewrite import SHARING


def answer(flow: HTTPFlow, where: Destination, state: State) -> Response | None:
    """Return the proxy's own answer to a request, or None to forward it."""
    request = flow.request
    if not is_one_request(request.data) or is_misframed(request):
        return _refuse(flow, Refusal("bad_request", "servers could disagree about its meaning"))
    # A replay was accepted before, or comes from the user of mitmproxy's console.
    if flow.is_replay is None:
        # Before the headers are rewritten for the service: its own origin may be an allowed one.
        if (sharing := state.guard.sharing(request.method, request.headers.get_all)) is not None:
            flow.metadata[SHARING] = sharing
        if (refusal := _refusal(flow, where, state)) is not None:
            return _refuse(flow, refusal)
    if state.guard.preflight(request.method, request.headers.get_all) is not None:
        return Response.make(204)
    if (ending := _termination(flow, where, state)) is not None:
        return ending
    return _refuse(flow, where.refusal) if where.refusal is not None else None


def _refuse(flow: HTTPFlow, refusal: Refusal) -> Response:
    flow.metadata |= {CODE: refusal.code, DETAIL: refusal.detail}
    return messages.answer(refusal.code, refusal.detail, method=flow.request.method)


def _refusal(flow: HTTPFlow, where: Destination, state: State) -> Refusal | None:
    request, values = flow.request, flow.request.headers.get_all
    if not where.is_reverse:
        return state.guard.cross_site(where.target.origin, values)
    authority = [request.authority] if request.authority else []
    return state.guard.refusal(_scheme(flow), [*authority, *values("Host")], values)


def _termination(flow: HTTPFlow, where: Destination, state: State) -> Response | None:
    request, endpoint = flow.request, state.settings.termination_endpoint if state.settings is not None else None
    if endpoint is None or not where.is_reverse:
        return None
    path = request.path.partition("?")[0]
    if not endpoint.is_at(_scheme(flow), request.host_header or "", path):
        return None
    if request.method != "POST" and not endpoint.any_method:
        detail = (
            "this ends the proxy; to do that, send POST, or set PROXY_TERMINATION_ENDPOINT to "
            f"http://0.0.0.0{endpoint.path} to let every method do it"
        )
        refused = _refuse(flow, Refusal("method_not_allowed", detail))
        refused.headers["Allow"] = "POST"
        return refused
    # The proxy drains first, so this request still gets its answer.
    state.end_all()
    body = b"" if request.method == "HEAD" else b"ending\n"
    return Response.make(200, body, {"Content-Type": "text/plain; charset=utf-8"})


def _scheme(flow: HTTPFlow) -> str:
    """Return the scheme that the client used."""
    return "https" if flow.client_conn.tls else "http"
