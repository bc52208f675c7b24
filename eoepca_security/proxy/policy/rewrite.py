"""One site under two names: the proxy's, by which its clients know the service, and the service's own. Pure.

The service is called by its own name (`Host`), so what a browser says about pages that came through the proxy has to
name the service, too: it would take them for another site's otherwise. And where the service sends a client on to
itself, the client has to come through the proxy again, as it has no token of its own. Bodies stay as they are.
"""

import re
from collections.abc import Mapping
from typing import Final

from eoepca_security.oauth.urls import parse_origin
from eoepca_security.proxy.policy.headers import Fields

ORIGIN: Final = "oidc_proxy_origin"
"""In a flow's metadata, the proxy's origin as the client knows it."""

SHARING: Final = "oidc_proxy_sharing"
"""There too, the headers that share the answer with an allowed origin, where one asks."""

# `Vary`: what an allowed origin asks for next must not come from the cache, and so without its headers.
_UNSHARED: Final = {"Cross-Origin-Resource-Policy": "same-origin", "Vary": "Origin, Sec-Fetch-Site"}

_ABOUT_SHARING: Final = (b"access-control-", b"cross-origin-resource-policy", b"timing-allow-origin")
_FOR_READERS: Final = (b"access-control-expose-headers", b"timing-allow-origin")

_OF_REQUESTS: Final = frozenset({b"origin", b"referer"})
_OF_RESPONSES: Final = frozenset({b"location", b"content-location"})  # RFC 9110 §10.2.2, §8.7


def naming_the_service(fields: Fields, proxy: str, service: str) -> Fields:
    """Return a request's fields with `Origin` and `Referer` as they would be had the page come from the service."""
    return _moved_in(fields, _OF_REQUESTS, proxy, service)


def naming_the_proxy(fields: Fields, proxy: str, service: str) -> Fields:
    """Return a response's fields, which lead to the proxy where they lead to the service."""
    return _moved_in(fields, _OF_RESPONSES, service, proxy)


def shared(fields: Fields, sharing: Mapping[str, str] | None) -> Fields:
    """Return a response's fields, shared with the origin in `sharing` and no other, whatever the service says."""
    kept = _FOR_READERS if sharing else ()
    added = tuple((header.encode(), value.encode()) for header, value in (sharing or _UNSHARED).items())
    passed = (field for field in fields if not (name := field[0].lower()).startswith(_ABOUT_SHARING) or name in kept)
    return (*passed, *added)


def _moved_in(fields: Fields, names: frozenset[bytes], old: str, new: str) -> Fields:
    # Most have none of them.
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
