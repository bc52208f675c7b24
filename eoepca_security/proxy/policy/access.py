"""Which requests the proxy accepts. Pure.

Anything that can reach the proxy acts with its identity, and on a desktop that includes every web page. Two rules keep
pages out: `Host` must be an allowed name, so a foreign DNS name that points to this machine is refused, and so is a
request that, according to the browser, another site caused.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import ANY_LOCALHOST, Host, origin_of, parse_host, parse_origin

PROBE_HOST: Final = "check.invalid"
"""The `Host` with which `check` asks whether a proxy listens on a port. No DNS name ends like this (RFC 6761 §6.4)."""

_PREFLIGHT_LIFETIME: Final = "600"
_LOCALHOST_NAME: Final = re.compile(r"[a-z0-9_-]+\.localhost")
_MAX_LISTED: Final = 100
_SHARED: Final = {"Cross-Origin-Resource-Policy": "cross-origin"}

Values = Callable[[str], Sequence[str]]
"""Returns all values of a header, one for each time that it was sent."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused. `code` is part of the public interface."""

    code: str
    detail: str


class Guard:
    """The access rules of one listener.

    `hosts` are the names that clients may use, with or without a port; `*.localhost` allows every name with one label
    before it, and `*` every name. `names` are those that a refusal suggests. `origins` are the foreign
    web origins that may use it. `ip_addresses` also allows any IP address as the host: DNS cannot redirect an address,
    but browsers do not say which site sent a plain GET to it.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        origins: Iterable[str] = (),
        *,
        ip_addresses: bool = False,
        names: Sequence[str] = ("localhost",),
    ) -> None:
        hosts = frozenset(hosts)
        self._any_host = "*" in hosts
        self._any_localhost = ANY_LOCALHOST in hosts
        self._hosts = frozenset(parse_host(host) for host in hosts - {"*", ANY_LOCALHOST})
        self._origins = frozenset(parse_origin(origin) for origin in origins)
        self._ip_addresses = ip_addresses
        self._names = names

    def refusal(self, scheme: str, hosts: Sequence[str], values: Values) -> Refusal | None:
        """Return why a request must be refused, or None.

        `scheme` is the scheme that the client used. `hosts` are all names for us in the request: the `Host` header,
        HTTP/2's `:authority`, the authority of an absolute target.
        """
        try:
            (host,) = {parse_host(text) for text in hosts}
        except ValueError:
            host = None
        if host is None or len(values("Host")) > 1:
            return Refusal("host_not_allowed", "the request has no Host, several, or an invalid one")
        if not self.allows(host):
            return Refusal(
                "host_not_allowed",
                f"{printable(str(host), 100)} is not an allowed name of this proxy: use {listed(self._names)}, or add "
                "it to PROXY_ALLOWED_HOSTS",
            )
        return self.cross_site(origin_of(scheme, host), values)

    def cross_site(self, own_origin: str, values: Values) -> Refusal | None:
        """Return why a browser's request must be refused, or None.

        Refuses requests for pages of foreign origins that are not allowed, and for service workers, which answer for
        the whole origin and outlive the page.
        """
        if values("Service-Worker"):
            return Refusal(
                "cross_site_request", "a browser wants to install a service worker, which the proxy does not allow"
            )
        sites, origins = values("Sec-Fetch-Site"), values("Origin")
        if len(sites) > 1 or len(origins) > 1:
            return Refusal("cross_site_request", "the request has Origin or Sec-Fetch-Site twice")
        sender = _parse(origins[0]) if origins else None
        if origins and sender not in (own_origin, *self._origins):
            return _foreign(origins[0])
        page = _page_elsewhere(values)
        return _foreign(page) if page and not self._is_allowed_origin(sender, values) else None

    def allowed_origin(self, values: Values) -> str | None:
        """Return the value of `Origin` if it is an allowed foreign origin, else None."""
        origins = values("Origin")
        return origins[0] if len(origins) == 1 and _parse(origins[0]) in self._origins else None

    def sharing(self, method: str, values: Values) -> dict[str, str] | None:
        """Return the headers that share the answer with an allowed origin (Fetch §3.2, §3.6), or None.

        `Vary` keeps a browser from using the cached answer for a page of another origin.
        """
        if (origin := self.allowed_origin(values)) is not None:
            readable = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
            return _SHARED | readable | (self.preflight(method, values) or {})
        if not values("Origin") and self._is_allowed_origin(None, values):
            return _SHARED | {"Vary": "Origin, Referer"}
        return None

    def preflight(self, method: str, values: Values) -> dict[str, str] | None:
        """Return the headers that answer an allowed origin's CORS preflight (Fetch §3.2); None for other requests."""
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

    def allows(self, host: Host) -> bool:
        """Return whether clients may use this name."""
        return (
            self._any_host
            or host in self._hosts
            or Host(host.name, None) in self._hosts
            or (self._any_localhost and _LOCALHOST_NAME.fullmatch(host.name) is not None)
            or (self._ip_addresses and _is_ip_address(host.name))
        )

    def _is_allowed_origin(self, sender: str | None, values: Values) -> bool:
        if sender is None:
            # Browsers omit Origin in plain GETs. A page can suppress Referer, but not forge it.
            referers = values("Referer")
            sender = _parse("/".join(referers[0].split("/", 3)[:3])) if len(referers) == 1 else None
        return sender in self._origins


def listed(names: Sequence[str]) -> str:
    """Return the names for a message: all of them, unless there are very many."""
    shown = ", ".join(names[:_MAX_LISTED])
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return shown if len(names) == 1 else f"one of {shown}{more}"


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
    """Describe the foreign page that caused the request, according to W3C Fetch Metadata; empty if there is none."""
    # For a page's prefetch, browsers send `none`, as if the user had asked.
    is_ahead = bool(values("Sec-Purpose"))
    match values("Sec-Fetch-Site"):
        case ["same-origin"]:
            return ""
        case [] | ["none"]:
            return "an unnamed page's prefetch" if is_ahead else ""
        case ["same-site"]:
            return "" if _leaves_its_page(values) and not is_ahead else "another port or name of the same site"
        case _:
            return "another site"


def _leaves_its_page(values: Values) -> bool:
    """Return whether the browser will replace the whole page with the answer, rather than embed it."""
    return values("Sec-Fetch-Mode") == ["navigate"] and values("Sec-Fetch-Dest") in ([], ["document"])


def _foreign(sender: str) -> Refusal:
    return Refusal(
        "cross_site_request",
        f"a browser sent this for {printable(sender, 100)}: to let it act with the proxy's identity, add its origin to "
        "PROXY_ALLOWED_ORIGINS",
    )
