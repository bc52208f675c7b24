"""One site under two names: the proxy's, by which its clients know the service, and the service's own. Pure.

The service is called by its own name (`Host`), so what a browser says about pages that came through the proxy has to
name the service, too: it would take them for another site's otherwise. And where the service sends a client on to
itself, the client has to come through the proxy again, as it has no token of its own. Bodies stay as they are.
"""

import re
from typing import Final

from mitmproxy.http import Headers

from eoepca_security.proxy.guard import parse_origin

ORIGIN: Final = "oidc_proxy_origin"
"""In a flow's metadata, the proxy's origin as the client knows it."""

_OF_REQUESTS: Final = ("Origin", "Referer")
_OF_RESPONSES: Final = ("Location", "Content-Location")  # RFC 9110 §10.2.2, §8.7


def name_the_service(headers: Headers, proxy: str, service: str) -> None:
    """Make of a request's `Origin` and `Referer` what they would be had the page come from the service."""
    _replace(headers, _OF_REQUESTS, proxy, service)


def name_the_proxy(headers: Headers, proxy: str, service: str) -> None:
    """Lead to the proxy where a response leads to the service."""
    _replace(headers, _OF_RESPONSES, service, proxy)


def _replace(headers: Headers, names: tuple[str, ...], old: str, new: str) -> None:
    for name in names:
        if name in headers:
            headers.set_all(name, [_moved(value, old, new) for value in headers.get_all(name)])


def _moved(url: str, old: str, new: str) -> str:
    match = re.match(r"[A-Za-z]+://[^/?#]*", url)
    try:
        return new + url[match.end() :] if match and parse_origin(match[0]) == parse_origin(old) else url
    except ValueError:
        return url
