"""Rewrites headers that name the site, which has two names: the proxy's and the service's own. Pure.

The service gets its own name in `Host`, so `Origin` and `Referer` of pages that came through the proxy must name the
service too: otherwise it treats them as another site's. When the service redirects to itself, the client must come
through the proxy again, because it has no token. Bodies are not changed.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

from eoepca_security.oauth.urls import DEFAULT_PORTS, parse_host
from eoepca_security.proxy.policy.headers import Fields

ORIGIN: Final = "oidc_proxy_origin"
"""The key in a flow's metadata for the proxy's origin as the client knows it."""

SHARING: Final = "oidc_proxy_sharing"
"""The key in a flow's metadata for the headers that share the answer with an allowed origin."""

# `Vary` keeps the cache from using this answer for an allowed origin, which needs other headers.
_UNSHARED: Final = {"Cross-Origin-Resource-Policy": "same-origin", "Vary": "Origin, Sec-Fetch-Site"}

_ABOUT_SHARING: Final = (b"access-control-", b"cross-origin-resource-policy", b"timing-allow-origin")
_FOR_READERS: Final = (b"access-control-expose-headers", b"timing-allow-origin")

_OF_REQUESTS: Final = frozenset({b"origin", b"referer"})
_OF_RESPONSES: Final = frozenset({b"location", b"content-location", b"refresh"})  # RFC 9110 §10.2.2, §8.7

Rewrite = Callable[[bytes], bytes]
"""Returns a URL as it should be instead."""

_URL: Final = re.compile(rb"([A-Za-z]+:)?//([^/?#]*)")
_REFRESH: Final = re.compile(rb"""(\s*[0-9.]+\s*[;,]\s*(?:url\s*=\s*)?(["']?))(.*)""", re.IGNORECASE | re.DOTALL)

_IS_FORWARDED: Final = re.compile(rb"(x[-_])?forwarded([-_]|$)", re.IGNORECASE)

_COOKIES: Final = frozenset({b"cookie", b"set-cookie"})

# Cookies of these names have to be `Secure` (RFC 6265bis §4.1.3).
_ALWAYS_SECURE: Final = (b"__secure-", b"__host-", b"__http-", b"__host-http-")
_NEEDS_SECURE: Final = (b"secure", b"partitioned", b"samesite=none")


def naming_the_service(fields: Fields, proxy: str, service: str, prefix: str = "") -> Fields:
    """Return a request's fields with `Origin` and `Referer` as if the page had come from the service.

    `prefix` is the path that the service has before the path of each request: empty, or like `/api`.
    """

    def rewritten(name: bytes, value: bytes) -> bytes:
        # An origin has no path.
        return _moved(value, proxy, service if name == b"origin" else service + prefix)

    return _with_values(fields, _OF_REQUESTS, rewritten)


def naming_the_proxy(fields: Fields, proxy: str, service: str) -> Fields:
    """Return a response's fields, with locations at the service changed to the proxy.

    This includes the `http://` address of an https service: many services do not know about the TLS in front of them.
    """
    return with_locations(fields, lambda url: _moved(url, service, proxy, is_downgraded=True))


def with_locations(fields: Fields, rewrite: Rewrite) -> Fields:
    """Return a response's fields with `rewrite` applied to the URLs that the client should go to."""

    def rewritten(name: bytes, value: bytes) -> bytes:
        return _refresh(value, rewrite) if name == b"refresh" else rewrite(value)

    return _with_values(fields, _OF_RESPONSES, rewritten)


def with_forwarded(fields: Fields, proxy: str) -> Fields:
    """Return a request's fields that tell the service the proxy's origin, for the links in its answers.

    They are those of RFC 7239 and the ones that most frameworks read. The client's own say nothing any more.
    """
    # RFC 7239 §4 wants quotes around a host with a port. stac-fastapi does not read those; others read both.
    scheme, _, authority = proxy.partition("://")
    port = parse_host(authority).port or DEFAULT_PORTS[scheme]
    added = {
        "Forwarded": f"host={authority};proto={scheme}",
        "X-Forwarded-Host": authority,
        "X-Forwarded-Port": str(port),
        "X-Forwarded-Proto": scheme,
    }
    kept = (field for field in fields if not _IS_FORWARDED.match(field[0]))
    return (*kept, *((name.encode(), value.encode()) for name, value in added.items()))


def without_cookies(fields: Fields) -> Fields:
    """Return the fields of a request or a response without its cookies (RFC 6265)."""
    return tuple(field for field in fields if field[0].lower() not in _COOKIES)


def with_usable_cookies(fields: Fields, proxy: str, prefix: str = "") -> Fields:
    """Return a response's fields with cookies that clients accept from `proxy` and send back to it.

    `Domain` names the service, so it is removed. So are `Secure` and what depends on it if the client uses http, unless
    the cookie's name requires `Secure`: some browsers accept such cookies from localhost. `Path` loses the service's
    `prefix`. A path outside of it, which the client cannot name, becomes `/`.
    """
    if not any(name.lower() == b"set-cookie" for name, _ in fields):
        return fields
    dropped = _NEEDS_SECURE if proxy.startswith("http://") else ()
    return tuple(
        (name, _usable(value, dropped, prefix.encode()) if name.lower() == b"set-cookie" else value)
        for name, value in fields
    )


def _usable(cookie: bytes, dropped: tuple[bytes, ...], prefix: bytes) -> bytes:
    pair, *attributes = cookie.split(b";")
    if pair.strip().lower().startswith(_ALWAYS_SECURE):
        dropped = ()
    kept = [a for a in attributes if (plain := re.sub(rb"\s", b"", a).lower()) not in dropped and not _is_domain(plain)]
    return b";".join([pair, *(_without_prefix(attribute, prefix) for attribute in kept)])


def _without_prefix(attribute: bytes, prefix: bytes) -> bytes:
    name, _, value = attribute.partition(b"=")
    path = value.strip()
    if not prefix or name.strip().lower() != b"path" or not path.startswith(b"/"):
        return attribute
    return name + b"=" + (path.removeprefix(prefix) if path.startswith(prefix + b"/") else b"/")


def _is_domain(attribute: bytes) -> bool:
    return attribute.partition(b"=")[0] == b"domain"


def shared(fields: Fields, sharing: Mapping[str, str] | None) -> Fields:
    """Return a response's fields, shared only with the origin in `sharing`, regardless of the service's own headers."""
    kept = _FOR_READERS if sharing else ()
    added = tuple((header.encode(), value.encode()) for header, value in (sharing or _UNSHARED).items())
    passed = (field for field in fields if not (name := field[0].lower()).startswith(_ABOUT_SHARING) or name in kept)
    return (*passed, *added)


def _with_values(fields: Fields, names: frozenset[bytes], rewritten: Callable[[bytes, bytes], bytes]) -> Fields:
    # Most messages have none of them.
    if names.isdisjoint([name.lower() for name, _ in fields]):
        return fields
    return tuple(
        (name, rewritten(lower, value) if (lower := name.lower()) in names else value) for name, value in fields
    )


def _refresh(value: bytes, rewrite: Rewrite) -> bytes:
    match = _REFRESH.fullmatch(value)
    if match is None:
        return value
    begin, quote, rest = match.groups()
    url, end_quote, end = rest.partition(quote) if quote else (rest, b"", b"")
    return begin + rewrite(url) + end_quote + end


def _moved(value: bytes, old: str, new: str, *, is_downgraded: bool = False) -> bytes:
    match = _URL.match(value)
    if match is None:
        return value
    scheme = (match[1] or b"").decode("latin-1").lower().rstrip(":")
    try:
        is_old = is_of_origin(scheme, match[2].decode("latin-1"), old, is_downgraded=is_downgraded)
    except ValueError:
        return value
    return new.encode() + value[match.end() :] if is_old else value


def is_of_origin(scheme: str, authority: str, origin: str, *, is_downgraded: bool = False) -> bool:
    """Tell whether a URL, whose scheme may be missing, is of `origin`; raises ValueError for one that is none.

    With `is_downgraded`, the `http://` address of an https origin is too.
    """
    own_scheme, _, own_authority = origin.partition("://")
    host, own = parse_host(authority), parse_host(own_authority)
    port, own_port = host.port or DEFAULT_PORTS.get(scheme or own_scheme), own.port or DEFAULT_PORTS.get(own_scheme)
    if (scheme or own_scheme) == own_scheme:
        return (host.name, port) == (own.name, own_port)
    by_default = host.port in (None, 80) and own_port == 443
    is_http = is_downgraded and (scheme, own_scheme) == ("http", "https")
    return is_http and host.name == own.name and (by_default or host.port == own_port)
