"""Which of several services a request is for. Pure.

A service must get no other service's token. Where several share scheme, host and port, only the path tells them apart,
and servers read some paths in different ways: they may decode them, twice even, resolve dots, merge slashes, ignore
case or what follows a semicolon. So a path is refused unless it leads to the same service in each of these ways.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from urllib.parse import unquote

from eoepca_security.oauth.urls import DEFAULT_PORTS, LOOPBACK_NAMES, Host, parse_host
from eoepca_security.proxy.config.services import DEFAULT
from eoepca_security.proxy.config.settings import Service, Site
from eoepca_security.proxy.policy.rewrite import is_of_origin

_MAX_DECODINGS: Final = 4

# Control characters, which some programs remove or stop at; Microsoft's %uXXXX; and UTF-8 in more bytes than needed,
# whose bytes are surrogates here.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f]|%[uU][0-9A-Fa-f]{4}|[\udcc0\udcc1]|\udce0[\udc80-\udc9f]|\udcf0[\udc80-\udc8f]"
)
_SLASHES: Final = re.compile(r"[/\\]")
_SEGMENT_END: Final = re.compile(r"[;?#]")

# Scheme, authority, path, and query with fragment, of a URL or a relative reference (RFC 3986 appendix B).
_REFERENCE: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)?(//[^/?#]*)?([^?#]*)(.*)", re.DOTALL)


class AmbiguousPath(ValueError):
    """Servers could read a path in different ways, so it is unclear which service it belongs to."""


@dataclass(frozen=True)
class Routes:
    """The ways to the services."""

    services: tuple[Service, ...]

    def named(self, name: str) -> Service | None:
        """Return the service of this name, or None."""
        return self._by_name.get(name)

    def owner(self, port: int) -> Service | None:
        """Return the service that a port of the proxy is for, or None."""
        return self._by_port.get(port)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names by which clients can call a service on the listener that all share."""
        own = [name for service in self.services for name in (service.own_name, *service.hosts)]
        return ("localhost", *own) if self._unnamed is not None else tuple(own)

    def called(self, host: Host, proxy_port: int) -> Service | None:
        """Return the service that a client calls, or None.

        `host` is what the client calls the proxy, which must be an allowed name; `proxy_port` is the port where the
        proxy accepted the connection, whatever the client calls it.

        At a service's own port, every name will do but those of other services: their pages and cookies would mix. At
        the port that all share, a service has its names, and `default`, or else the only service, has all other ones.
        A `*.localhost` that is none of the services is a mistake, unless `default` is the only one.
        """
        named, owner = self._by_host.get(host.name), self.owner(proxy_port)
        if owner is not None:
            return owner if named in (None, owner) else None
        if named is None and host.name.endswith(".localhost") and self.services != (self._by_name.get(DEFAULT),):
            return None
        return named or self._unnamed

    def route(self, called: Service, path: str) -> tuple[Service, str]:
        """Return the service that a request is for, whose token it gets, and the path to ask that service for.

        `path` is the request's own, with its query. The service is another one than the client `called` if that one's
        path is inside the path of the other. Raises AmbiguousPath.
        """
        if self._is_alone(called):
            return called, path
        # `OPTIONS *` is about all services of the server (RFC 9110 §7.1).
        service = self._serving(called.site, called.path + path) if path.startswith("/") else None
        if service is None:
            raise AmbiguousPath
        return service, called.path + path

    def at(self, scheme: str, host: str, port: int, path: str) -> Service | None:
        """Return the service that a forward-mode request is for, or None; raises AmbiguousPath.

        `path` is that of the request, with its query. An IPv6 address in `host` has no brackets.
        """
        return self._serving(Site(scheme, host.lower(), port), path)

    def at_site(self, scheme: str, host: str, port: int) -> tuple[Service, ...]:
        """Return the services at this address. An IPv6 address in `host` has no brackets."""
        return self._by_site.get(Site(scheme, host.lower(), port), ())

    def location(
        self, url: bytes, *, called: Service, came_from: Service, path: str, way_in: Callable[[Service], str | None]
    ) -> bytes:
        """Return a `Location` so that the client comes through the proxy again if it leads to a service.

        `called` is the service that the client called, and `came_from` the one that answered when asked for `path`.
        `way_in` returns the proxy's origin for a service as this client can use it, or None.

        What leads to no service, such as a path beside the service's own, becomes or stays an address of the real
        server, where the client has no token. What a service alone on its host says about itself without naming the
        host stays as it is: there, the client's paths are the service's.
        """
        scheme, authority, target, rest = _REFERENCE.findall(url.decode("latin-1"))[0]
        if not authority and (scheme or not target or self._is_alone(came_from)):
            return url
        site = self._site(scheme, authority, came_from) if authority else came_from.site
        if site is None:
            return url
        # After a change of the services, the one that answered may be none of them any more, or not at this site.
        at_site = self._by_site.get(site)
        if not authority or (at_site is not None and not self._is_alone(at_site[0])):
            # As the client will do.
            base = path.partition("?")[0].encode("utf-8", "surrogateescape").decode("latin-1")
            target = _resolved("/" if authority else base, target)
        try:
            service = self._serving(site, target)
        except AmbiguousPath:
            service = None
        origin = way_in(service) if service is not None else None
        if service is None or origin is None:
            return url if authority else f"{came_from.upstream}{target}{rest}".encode("latin-1")
        inside = target.removeprefix(service.path) or ("/" if service.path else "")
        # Stay relative where that is possible: `//` would begin the name of a host.
        is_relative = not authority and service == called and not inside.startswith(("//", "/\\"))
        return f"{'' if is_relative else origin}{inside}{rest}".encode("latin-1")

    def way_in(self, wanted: Service, *, called: Service, proxy: str, own_port: int, shared_port: int) -> str | None:
        """Return the proxy's origin for a service, for a client that calls another one; None if it may have no way.

        `proxy` is the origin that the client uses now, `own_port` the port where the proxy accepted that, and
        `shared_port` the one that all services share.
        """
        scheme, _, authority = proxy.partition("://")
        name, port = parse_host(authority)
        # Where something forwards the port, the proxy does not know what its other ports are called.
        is_mapped = (port or DEFAULT_PORTS[scheme]) != own_port
        is_local = name in LOOPBACK_NAMES or name.endswith(".localhost")
        if called.port == own_port:
            if is_mapped or (wanted.port is None and not is_local):
                return None
            own_name = Host(wanted.own_name, shared_port)
            return f"{scheme}://{own_name if wanted.port is None else Host(name, wanted.port)}"
        if is_local:
            return f"{scheme}://{Host(wanted.own_name, port)}"
        if name in called.hosts and wanted.hosts:
            return f"{scheme}://{Host(wanted.hosts[0], port)}"
        return f"{scheme}://{name}:{wanted.port}" if wanted.port is not None and not is_mapped else None

    @cached_property
    def _by_name(self) -> Mapping[str, Service]:
        return {service.name: service for service in self.services}

    @cached_property
    def _by_port(self) -> Mapping[int, Service]:
        return {service.port: service for service in self.services if service.port is not None}

    @cached_property
    def _by_host(self) -> Mapping[str, Service]:
        return {name: service for service in self.services for name in (service.own_name, *service.hosts)}

    @cached_property
    def _by_site(self) -> Mapping[Site, tuple[Service, ...]]:
        """The services at each site, the longest path first."""
        by_site: dict[Site, tuple[Service, ...]] = {}
        for service in sorted(self.services, key=lambda service: len(service.path), reverse=True):
            by_site[service.site] = (*by_site.get(service.site, ()), service)
        return by_site

    @cached_property
    def _most_read(self) -> Mapping[str, str]:
        return {service.path: _as_most_read(service.path) for service in self.services}

    @cached_property
    def _unnamed(self) -> Service | None:
        """The service that names have which are nobody's."""
        return self.services[0] if len(self.services) == 1 else self._by_name.get(DEFAULT)

    def _is_alone(self, service: Service) -> bool:
        """Return whether all paths at the service's site are its own."""
        return not service.path and len(self._by_site.get(service.site, ())) <= 1

    def _site(self, scheme: str, authority: str, came_from: Service) -> Site | None:
        """Return the site that a URL in an answer means, or None if it is no service's."""
        scheme, authority = scheme.rstrip(":").lower() or came_from.site.scheme, authority.removeprefix("//")
        try:
            name, port = parse_host(authority)
            is_own = is_of_origin(scheme, authority, came_from.upstream, is_downgraded=True)
        except ValueError:
            return None
        site = Site(scheme, name.strip("[]"), port or DEFAULT_PORTS.get(scheme, 0))
        if site in self._by_site:
            return site
        return came_from.site if is_own else None

    def _serving(self, site: Site, path: str) -> Service | None:
        """Return the service that a path at a site belongs to, or None; raises AmbiguousPath."""
        services = self._by_site.get(site, ())
        if not services or self._is_alone(services[0]):
            return next(iter(services), None)
        path = path.partition("?")[0]
        as_sent = next((one for one in services if f"{path}/".startswith(f"{one.path}/")), None)
        most_read = _as_most_read(path)
        # A service's path has nothing to decode, so that whoever reads less finds no third one.
        as_read = next((one for one in services if most_read.startswith(self._most_read[one.path])), None)
        if as_sent is not as_read:
            raise AmbiguousPath
        return as_sent


def _as_most_read(path: str) -> str:
    """Return a path as the server reads it that changes most, with a slash at both ends; raises AmbiguousPath.

    Dots are refused, because where they lead depends on what else is read.
    """
    for _ in range(_MAX_DECODINGS):
        decoded = unicodedata.normalize("NFKC", unquote(path, errors="surrogateescape"))
        if decoded == path:
            break
        path = decoded
    else:
        raise AmbiguousPath
    if _UNSAFE.search(path) is not None:
        raise AmbiguousPath
    segments = [_SEGMENT_END.split(segment, maxsplit=1)[0] for segment in _SLASHES.split(path)]
    if any("." in segment and not segment.strip(" .") for segment in segments):
        raise AmbiguousPath
    # Windows ignores spaces and dots at the end of a name.
    folders = [name for segment in segments if (name := segment.rstrip(" .").lower())]
    return "/".join(["", *folders, ""])


def _resolved(base: str, path: str) -> str:
    """Return a path relative to the path `base` without dots (RFC 3986 §5.2.4)."""
    if not path.startswith("/"):
        path = f"{base.rpartition('/')[0]}/{path}"
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
