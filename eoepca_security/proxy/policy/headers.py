"""What of a client's request goes on to the protected service, and what the proxy adds."""

import logging
import re
from collections.abc import Iterable
from typing import Final, TypeVar

from mitmproxy.http import Headers, Request, Response

PLACEHOLDER: Final = "Bearer (added by the proxy)"
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
                headers[name] = PLACEHOLDER


def _connection_options(headers: Headers) -> frozenset[bytes]:
    values = [value for name, value in headers.fields if name.lower() == b"connection"]
    return frozenset(option.strip().lower() for value in values for option in value.split(b",") if option.strip())


AnyMessage = TypeVar("AnyMessage", Request, Response)

Fields = tuple[tuple[bytes, bytes], ...]


def with_headers(message: AnyMessage, fields: Fields) -> AnyMessage:
    """Return a copy of the message with these headers; all else is shared. mitmproxy's own takes ten times as long."""
    headers = object.__new__(Headers)
    headers.fields = fields
    data = object.__new__(type(message.data))
    data.__dict__.update(message.data.__dict__)
    data.headers = headers
    copied = object.__new__(type(message))
    copied.__dict__.update(message.__dict__)
    copied.data = data
    return copied
