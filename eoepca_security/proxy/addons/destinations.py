"""Translates where mitmproxy is about to send a request into a `Destination`, on which `policy` decides."""

from functools import lru_cache

from mitmproxy import ctx
from mitmproxy.http import HTTPFlow
from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode, ReverseMode

from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.policy.destination import Destination, Target, may_inject


def destination_of(flow: HTTPFlow, settings: Settings | None) -> Destination:
    """Return the request's destination: its mode's, or in forward mode the host that mitmproxy will connect to."""
    request, mode = flow.request, flow.client_conn.proxy_mode
    is_reverse = isinstance(mode, ReverseMode)
    if isinstance(mode, ReverseMode):
        target = _target(mode.scheme, mode.address[0], mode.address[1])
    else:
        target = _target(request.scheme, request.host, request.port)
    is_protected = protects(mode, settings)
    is_elsewhere = is_protected and not is_reverse and not may_inject(settings, target.scheme, target.host, target.port)
    # A flow that is replayed from a file has its own mode.
    return Destination(target, is_reverse, is_elsewhere, is_protected and mode.full_spec in ctx.options.mode)


def protects(mode: ProxyMode, settings: Settings | None) -> bool:
    """Return whether the add-on supports this mode, so it knows where requests go."""
    if isinstance(mode, RegularMode):
        return settings is not None and bool(settings.inject_hosts)
    return isinstance(mode, ReverseMode) and mode.scheme in ("http", "https")


@lru_cache(64)
def _target(scheme: str, host: str, port: int) -> Target:
    return Target(scheme, host.lower(), port)
