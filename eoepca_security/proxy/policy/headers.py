"""What of a client's request goes on to the protected service, and what the proxy adds."""

import base64
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from mitmproxy.http import Headers, Request

from eoepca_security.errors import TokenError
from eoepca_security.issuer.provider import Provider
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.session.session import AccessToken

SHOWN: Final = "Bearer (added by the proxy)"
"""What stands in a flow, and so in mitmproxy's console and files, in the place of the token."""

# RFC 9110 §7.6.1 and what preceded it. Transfer-Encoding is mitmproxy's to handle.
_HOP_BY_HOP: Final = frozenset(
    {
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"http2-settings",
        b"connection",
    }
)
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"host"})

_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH: Final = re.compile(rb"\*|/[^\x00-\x20\x7f]*")
_BREAK: Final = re.compile(rb"[\r\n\x00]")
# Some programs take these for spaces or line ends, as mitmproxy does around values, and others do not (RFC 9112 §2.2).
_ODD: Final = re.compile(rb"^[ \t]|[\r\x00\x0b\x0c]")

# What APISIX's openid-connect plugin sets, and so what a service behind it believes.
_APISIX: Final = frozenset({"x-access-token", "x-id-token", "x-raw-id-token", "x-refresh-token", "x-userinfo"})

logger = logging.getLogger(__name__)


def is_plain(lines: Iterable[bytes]) -> bool:
    """Tell whether the lines of an HTTP/1 head are the same lines to everybody: no folded ones, no odd line ends."""
    return not any(map(_ODD.search, lines))


def is_one_request(request: Request) -> bool:
    """Tell whether it stays one request as HTTP/1: no line breaks (mitmproxy 11 lets HTTP/2's pass), nor folded lines.

    Nor may `Connection` name the headers that say where the request ends and for whom it is.
    """
    data = request.data
    return (
        _METHOD.fullmatch(data.method) is not None
        # mitmproxy takes these in any case for what they are in capitals, and a service need not (RFC 9110 §9.1).
        and (data.method.isupper() or data.method.upper() not in (b"HEAD", b"CONNECT"))
        and (_PATH.fullmatch(data.path) is not None or (data.method == b"CONNECT" and not data.path))
        and data.http_version in (b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"HTTP/3")
        and _BREAK.search(b"".join(map(b"".join, data.headers.fields))) is None
        and _FRAMING.isdisjoint(_connection_options(data.headers))
    )


def is_websocket(request: Request) -> bool:
    """Tell whether the request asks for a WebSocket (RFC 6455 §4.1)."""
    return request.method == "GET" and request.headers.get("Upgrade", "").strip().lower() == "websocket"


def drop_hop_by_hop(request: Request) -> None:
    """Remove what concerns the client's connection to us only (RFC 9110 §7.6.1)."""
    headers = request.headers
    options = _connection_options(headers)
    dropped = _HOP_BY_HOP | options
    if is_websocket(request):
        dropped -= {b"upgrade"}
        kept = ["Upgrade"]
    else:
        dropped |= {b"upgrade"}
        kept = []
    # gRPC needs it, and is HTTP/2; over HTTP/1 it asks for trailers that mitmproxy cannot read.
    if not (request.is_http2 and headers.get("TE") == "trailers"):
        dropped |= {b"te"}
    headers.fields = tuple(field for field in headers.fields if field[0].lower() not in dropped)
    # mitmproxy looks here to see whether the client's connection is to stay.
    kept += [option.decode() for option in (b"close", b"keep-alive") if option in options]
    if kept:
        headers["Connection"] = ", ".join(kept)


def hide_credentials(headers: Headers) -> None:
    """Replace the client's own credentials, which go nowhere and are nobody's business."""
    # Also where mitmproxy has refused the name.
    if any(b"authorization" in name.lower() for name, _ in headers.fields):
        for name in tuple(headers):
            if name.strip().lower() in ("authorization", "proxy-authorization"):
                headers[name] = SHOWN


def drop_gateway_headers(headers: Headers) -> None:
    """Remove a client's copies of what only a gateway may say, also as CGI and WSGI would mistake them."""
    for name in tuple(headers.keys()):
        if name.lower().replace("_", "-") in _APISIX:
            headers.pop(name, None)


class ApisixHeaders:
    """What APISIX's openid-connect plugin sends besides the token: claims, as padded base64 of JSON."""

    def __init__(self) -> None:
        self._userinfo: tuple[str, Mapping[str, Any] | None] = ("", None)
        self._trouble = ""

    def learn(self, provider: Provider, token: str) -> None:
        """Ask the issuer about the user to whom `token` belongs; blocks. That it fails is no reason to stop."""
        claims = None
        try:
            claims = provider.userinfo(token)
        except TokenError as error:
            if str(error) != self._trouble:
                logger.warning("no X-Userinfo from the issuer, so it is what the access token says: %s", error)
            self._trouble = str(error)
        self._userinfo = (token, claims)

    def of(self, token: AccessToken) -> dict[str, str]:
        """Return the headers, without those for which there is nothing to say."""
        known_token, userinfo = self._userinfo
        if known_token != token.value or userinfo is None:
            userinfo = unverified_claims(token.value)
        claims = {"X-ID-Token": unverified_claims(token.id_token or ""), "X-Userinfo": userinfo}
        return {"X-Access-Token": token.value} | {name: _encoded(value) for name, value in claims.items() if value}


def _encoded(claims: Mapping[str, Any]) -> str:
    return base64.b64encode(json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()).decode()


def _connection_options(headers: Headers) -> frozenset[bytes]:
    values = [value for name, value in headers.fields if name.lower() == b"connection"]
    return frozenset(option.strip().lower() for value in values for option in value.split(b",") if option.strip())
