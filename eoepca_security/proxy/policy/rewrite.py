"""Rewrites headers that name the site, which has two names: the proxy's and the service's own. Pure.

The service gets its own name in `Host`, so `Origin` and `Referer` of pages that came through the proxy must name the
service too: otherwise it treats them as another site's. When the service redirects to itself, the client must come
through the proxy again, because it has no token. Bodies are not changed.
"""

import re
from collections.abc import Mapping
from typing import Final

from eoepca_security.oauth.urls import parse_origin
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
_OF_RESPONSES: Final = frozenset({b"location", b"content-location"})  # RFC 9110 §10.2.2, §8.7


def naming_the_service(fields: Fields, proxy: str, service: str) -> Fields:
    """Return a request's fields with `Origin` and `Referer` as if the page had come from the service."""
    return _moved_in(fields, _OF_REQUESTS, proxy, service)


def naming_the_proxy(fields: Fields, proxy: str, service: str) -> Fields:
    """Return a response's fields, with locations at the service changed to the proxy."""
    return _moved_in(fields, _OF_RESPONSES, service, proxy)


def shared(fields: Fields, sharing: Mapping[str, str] | None) -> Fields:
    """Return a response's fields, shared only with the origin in `sharing`, regardless of the service's own headers."""
    kept = _FOR_READERS if sharing else ()
    added = tuple((header.encode(), value.encode()) for header, value in (sharing or _UNSHARED).items())
    passed = (field for field in fields if not (name := field[0].lower()).startswith(_ABOUT_SHARING) or name in kept)
    return (*passed, *added)


def _moved_in(fields: Fields, names: frozenset[bytes], old: str, new: str) -> Fields:
    # Most messages have none of them.
    if names.isdisjoint([name.lower() for name, _ in fields]):
        return fields
    return tuple((name, _moved(value, old, new) if name.lower() in names else value) for name, value in fields)


def _moved(value: bytes, old: str, new: str) -> bytes:
    match = re.match(rb"[A-Za-z]+://[^/?#]*", value)
    if match is None:
        return value
    try:
        is_old = parse_origin(match[0].decode("latin-1")) == parse_origin(old)
    except ValueError:
        return value
    return new.encode() + value[match.end() :] if is_old else value
