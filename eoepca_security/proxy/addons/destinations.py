"""Translates where mitmproxy is about to send a request into a `Destination`, on which `policy` decides."""

from functools import lru_cache
from typing import Final

from mitmproxy import ctx
from mitmproxy.http import HTTPFlow
from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode, ReverseMode

from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import parse_host
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.policy.access import Refusal, listed
from eoepca_security.proxy.policy.destination import Destination, Target, may_inject
from eoepca_security.proxy.policy.routing import AmbiguousPath, Routes

_AMBIGUOUS: Final = Refusal(
    "bad_request", "it is unclear which service its path belongs to: send it without dots, encoded slashes and the like"
)


def destination_of(flow: HTTPFlow, state: State) -> Destination:
    """Return the request's destination: a service's, its mode's, or in forward mode the host that the client names."""
    request, mode, routes = flow.request, flow.client_conn.proxy_mode, state.routes
    is_reverse = isinstance(mode, ReverseMode)
    served = is_served(mode, state.settings)
    if isinstance(mode, ReverseMode) and routes is None:
        target = _target(mode.scheme, mode.address[0], mode.address[1])
        return Destination(target, request.path, is_reverse, served, state.default, state.default)
    # A replay has been through here before, so it names the service's own address and path.
    if is_reverse and routes is not None and flow.is_replay is None:
        return _behind(flow, routes, is_served=served)
    target = _target(request.scheme, request.host, request.port)
    service, refusal = None, None
    try:
        service = routes.at(target.scheme, target.host, target.port, request.path) if routes is not None else None
    except AmbiguousPath:
        refusal = _AMBIGUOUS
    if service is None and may_inject(state.settings, target.scheme, target.host, target.port):
        service = state.default
    return Destination(target, request.path, is_reverse, served, service, service if is_reverse else None, refusal)


def _behind(flow: HTTPFlow, routes: Routes, *, is_served: bool) -> Destination:
    request, named = flow.request, flow.request.authority or flow.request.host_header or ""
    nowhere = Target("", "", 0)
    try:
        called = routes.called(parse_host(named), flow.client_conn.sockname[1])
    except ValueError:
        called = None
    if called is None:
        refusal = Refusal("host_not_allowed", f"{printable(named, 100)} is not {_remedy(flow, routes)}")
        return Destination(nowhere, request.path, True, is_served, refusal=refusal)
    try:
        service, path = routes.route(called, request.path)
    except AmbiguousPath:
        return Destination(nowhere, request.path, True, is_served, called=called, refusal=_AMBIGUOUS)
    return Destination(_target(*service.site), path, True, is_served, service, called)


def _remedy(flow: HTTPFlow, routes: Routes) -> str:
    """Return what a client's name for the proxy is not, and which one to use."""
    port = flow.client_conn.sockname[1]
    if (owner := routes.owner(port)) is not None:
        return f"a name of {owner.name}, which this port is for: use localhost:{port}, or {owner.own_name}:{port}"
    return f"a service of this proxy: use {listed(routes.names)}"


def is_served(mode: ProxyMode, settings: Settings | None) -> bool:
    """Return whether the proxy serves this mode. A flow that is replayed from a file has a mode of its own."""
    return protects(mode, settings) and mode.full_spec in ctx.options.mode


def gets_a_token(state: State, host: str, port: int) -> bool:
    """Return whether requests to this address may get a token in forward mode."""
    settings, routes = state.settings, state.routes
    return any(
        may_inject(settings, scheme, host, port) or (routes is not None and bool(routes.at_site(scheme, host, port)))
        for scheme in ("http", "https")
    )


def protects(mode: ProxyMode, settings: Settings | None) -> bool:
    """Return whether the add-on supports this mode, so it knows where requests go."""
    if isinstance(mode, RegularMode):
        return settings is not None and bool(settings.inject_hosts or settings.services)
    return isinstance(mode, ReverseMode) and mode.scheme in ("http", "https")


@lru_cache(1024)
def _target(scheme: str, host: str, port: int) -> Target:
    return Target(scheme, host.lower(), port)
