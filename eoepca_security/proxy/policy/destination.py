"""Where a request goes, and whether the token belongs there."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from weakref import WeakSet

from mitmproxy.http import HTTPFlow, Request
from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode, ReverseMode

from eoepca_security.oauth.urls import DEFAULT_PORTS, Host, is_loopback, parse_host
from eoepca_security.proxy.config.settings import Settings


@dataclass(frozen=True)
class Target:
    """Where a connection goes; the host in lower case."""

    scheme: str
    host: str
    port: int

    @cached_property
    def authority(self) -> str:
        """Host and port as they stand in a URL, without the scheme's own port (RFC 9110 §4.2.3)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if DEFAULT_PORTS.get(self.scheme) == self.port else f"{host}:{self.port}"

    @cached_property
    def origin(self) -> str:
        """Scheme and authority (RFC 6454 §6.2)."""
        return f"{self.scheme}://{self.authority}"


def is_protected(mode: ProxyMode, settings: Settings | None) -> bool:
    """Tell whether the add-on knows in this mode where requests go."""
    if isinstance(mode, RegularMode):
        return settings is not None and bool(settings.inject_hosts)
    return isinstance(mode, ReverseMode) and mode.scheme in ("http", "https")


def _target(flow: HTTPFlow) -> Target:
    """Return where the request goes: what its mode says, and in forward mode where it is about to be connected to."""
    mode = flow.client_conn.proxy_mode
    if isinstance(mode, ReverseMode):
        return _known_target(mode.scheme, mode.address[0], mode.address[1])
    return _known_target(flow.request.scheme, flow.request.host, flow.request.port)


@lru_cache(64)
def _known_target(scheme: str, host: str, port: int) -> Target:
    return Target(scheme, host.lower(), port)


def _is_elsewhere(flow: HTTPFlow, settings: Settings | None) -> bool:
    """Tell whether a request in forward mode is to a host that gets no token."""
    mode = flow.client_conn.proxy_mode
    if not isinstance(mode, RegularMode) or not is_protected(mode, settings):
        return False
    target = _target(flow)
    return not _may_inject(settings, target.scheme, (target.host, target.port))


def _may_inject(settings: Settings | None, scheme: str, address: tuple[str, int]) -> bool:
    hosts = [parse_host(host) for host in settings.inject_hosts] if settings is not None else []
    return may_get_token(hosts, scheme, *address[:2])


_origin_form: WeakSet[Request] = WeakSet()


def is_origin_form(request: Request) -> bool:
    """Tell whether an HTTP/1 request came without an absolute target (RFC 9112 §3.2.1); mitmproxy forgets it."""
    return request in _origin_form


def may_get_token(inject_hosts: Collection[Host], scheme: str, host: str, port: int) -> bool:
    """Tell whether a connection in forward mode is to one of these hosts, and cannot be read on the way."""
    return (scheme == "https" or (scheme == "http" and is_loopback(host))) and any(
        allowed.name.strip("[]") == host.lower() and (allowed.port or DEFAULT_PORTS[scheme]) == port
        for allowed in inject_hosts
    )
