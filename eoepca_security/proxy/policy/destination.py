"""Where a request goes, and whether it may carry the token."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from eoepca_security.oauth.urls import DEFAULT_PORTS, Host, is_loopback, parse_host
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.policy.access import Refusal


@dataclass(frozen=True)
class Target:
    """Where a connection goes. The host is in lower case."""

    scheme: str
    host: str
    port: int

    @cached_property
    def authority(self) -> str:
        """Host and port as in a URL, without the scheme's default port (RFC 9110 §4.2.3)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if DEFAULT_PORTS.get(self.scheme) == self.port else f"{host}:{self.port}"

    @cached_property
    def origin(self) -> str:
        """Scheme and authority (RFC 6454 §6.2)."""
        return f"{self.scheme}://{self.authority}"


@dataclass(frozen=True)
class Destination:
    """Where a request goes.

    `path` is what to ask for there, with the query. `is_reverse`: to a service behind the proxy; otherwise (forward
    mode) to the host that the client names. `service` gets the request; it is None in forward mode for a host that gets
    no token, and where `refusal` says why the request goes nowhere. `called` is the service whose name the client used,
    or None in forward mode. `is_served`: the add-on supports the request's mode.
    """

    target: Target
    path: str
    is_reverse: bool
    is_served: bool
    service: Service | None = None
    called: Service | None = None
    refusal: Refusal | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it goes, in forward mode, to a host that gets no token."""
        return self.is_served and not self.is_reverse and self.service is None and self.refusal is None


def may_inject(settings: Settings | None, scheme: str, host: str, port: int) -> bool:
    """Return whether a forward-mode connection goes to one of the settings' hosts, and nobody else can read it."""
    hosts = [parse_host(host) for host in settings.inject_hosts] if settings is not None else []
    return may_get_token(hosts, scheme, host, port)


def may_get_token(inject_hosts: Collection[Host], scheme: str, host: str, port: int) -> bool:
    """Return whether a forward-mode connection goes to one of these hosts, and nobody else can read it."""
    return (scheme == "https" or (scheme == "http" and is_loopback(host))) and any(
        allowed.name.strip("[]") == host.lower() and (allowed.port or DEFAULT_PORTS[scheme]) == port
        for allowed in inject_hosts
    )
