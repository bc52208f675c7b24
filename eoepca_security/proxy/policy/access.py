"""May this request come in? May the token go there? Pure.

Whatever can reach the proxy acts with its identity, and on a desktop that is every web page. Two rules keep pages out:
a name that a stranger's DNS server gives to this machine is not an allowed `Host`, and what a browser says that another
site made it send is refused.
"""

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import Host, origin_of, parse_host, parse_origin

_PREFLIGHT_LIFETIME: Final = "600"
_SHARED: Final = {"Cross-Origin-Resource-Policy": "cross-origin"}

Values = Callable[[str], Sequence[str]]
"""Gives all the values of a header, one for each time that it was sent."""


@dataclass(frozen=True)
class Refusal:
    """Why a request does not come in; `code` is of the public interface."""

    code: str
    detail: str


class Guard:
    """The rules for one listener.

    `hosts` are names, with or without a port, under which clients may address it; `*` is every name. `origins` are the
    web origins that may use it though they are others. `ip_addresses` accepts any IP address for a name: none of them
    can be pointed elsewhere, but a browser does not say which site sent a plain GET there.
    """

    def __init__(self, hosts: Iterable[str], origins: Iterable[str] = (), *, ip_addresses: bool = False) -> None:
        hosts = frozenset(hosts)
        self._any_host = "*" in hosts
        self._hosts = frozenset(parse_host(host) for host in hosts - {"*"})
        self._origins = frozenset(parse_origin(origin) for origin in origins)
        self._ip_addresses = ip_addresses

    def refusal(self, scheme: str, hosts: Sequence[str], values: Values) -> Refusal | None:
        """Say why a request must not come in, or return None.

        `scheme` is the one that the client spoke; `hosts` are all the names by which the request addresses us: the
        `Host` header, HTTP/2's `:authority`, the authority of an absolute target.
        """
        try:
            (host,) = {parse_host(text) for text in hosts}
        except ValueError:
            host = None
        if host is None or len(values("Host")) > 1:
            return Refusal("host_not_allowed", "the request has no Host, several, or one that is no host name")
        if not self._is_allowed(host):
            return Refusal(
                "host_not_allowed",
                f"{printable(str(host), 100)} is not a name of this proxy: use localhost, or add it to "
                "PROXY_ALLOWED_HOSTS",
            )
        return self.cross_site(origin_of(scheme, host), values)

    def cross_site(self, own_origin: str, values: Values) -> Refusal | None:
        """Say whether a browser sent this for a page of another origin than `own_origin` and the allowed ones.

        Or for what would outlive the page: a service worker answers for the whole origin, and stays.
        """
        if values("Service-Worker"):
            return Refusal(
                "cross_site_request", "a browser wants to install a service worker, and the proxy takes none"
            )
        sites, origins = values("Sec-Fetch-Site"), values("Origin")
        if len(sites) > 1 or len(origins) > 1:
            return Refusal("cross_site_request", "Origin or Sec-Fetch-Site is there twice")
        sender = _parse(origins[0]) if origins else None
        if origins and sender not in (own_origin, *self._origins):
            return _foreign(origins[0])
        page = _page_elsewhere(values)
        return _foreign(page) if page and not self._is_allowed_origin(sender, values) else None

    def allowed_origin(self, values: Values) -> str | None:
        """Return the value of `Origin` when it is one of the allowed other origins."""
        origins = values("Origin")
        return origins[0] if len(origins) == 1 and _parse(origins[0]) in self._origins else None

    def sharing(self, method: str, values: Values) -> dict[str, str] | None:
        """Return the headers that share the answer with an allowed origin (Fetch §3.2, §3.6); None if none asks for it.

        `Vary` keeps a browser from taking the answer from its cache for a page of another origin.
        """
        if (origin := self.allowed_origin(values)) is not None:
            readable = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
            return _SHARED | readable | (self.preflight(method, values) or {})
        if not values("Origin") and self._is_allowed_origin(None, values):
            return _SHARED | {"Vary": "Origin, Referer"}
        return None

    def preflight(self, method: str, values: Values) -> dict[str, str] | None:
        """Return the headers that answer an allowed origin's CORS preflight (Fetch §3.2), or None if this is none."""
        asked = values("Access-Control-Request-Method")
        if method != "OPTIONS" or len(asked) != 1 or self.allowed_origin(values) is None:
            return None
        headers = {
            "Access-Control-Allow-Methods": asked[0],
            "Access-Control-Max-Age": _PREFLIGHT_LIFETIME,
        }
        if names := ", ".join(values("Access-Control-Request-Headers")):
            headers["Access-Control-Allow-Headers"] = names
        if "true" in values("Access-Control-Request-Private-Network"):
            headers["Access-Control-Allow-Private-Network"] = "true"
        return headers

    def _is_allowed(self, host: Host) -> bool:
        return (
            self._any_host
            or host in self._hosts
            or Host(host.name, None) in self._hosts
            or (self._ip_addresses and _is_ip_address(host.name))
        )

    def _is_allowed_origin(self, sender: str | None, values: Values) -> bool:
        if sender is None:
            # Browsers leave Origin out of plain GETs. What they put in its place a page can suppress, but not forge.
            referers = values("Referer")
            sender = _parse("/".join(referers[0].split("/", 3)[:3])) if len(referers) == 1 else None
        return sender in self._origins


def _parse(origin: str) -> str | None:
    try:
        return parse_origin(origin)
    except ValueError:
        return None


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _page_elsewhere(values: Values) -> str:
    """Return for which page of another origin a browser says that it asks (W3C Fetch Metadata), or nothing."""
    # A page can have something loaded ahead of a visit, and browsers say that it is for none, as if the user had asked.
    is_ahead = bool(values("Sec-Purpose"))
    match values("Sec-Fetch-Site"):
        case ["same-origin"]:
            return ""
        case [] | ["none"]:
            return "a page that it does not name, ahead of a visit" if is_ahead else ""
        case ["same-site"]:
            return "" if _leaves_its_page(values) and not is_ahead else "another port or name of the same site"
        case _:
            return "another site"


def _leaves_its_page(values: Values) -> bool:
    """Tell whether a browser is to show the answer in the place of its page, rather than in a part of it."""
    return values("Sec-Fetch-Mode") == ["navigate"] and values("Sec-Fetch-Dest") in ([], ["document"])


def _foreign(sender: str) -> Refusal:
    return Refusal(
        "cross_site_request",
        f"a browser sent this for {printable(sender, 100)}: if that may act with the proxy's identity, add its origin "
        "to PROXY_ALLOWED_ORIGINS",
    )
