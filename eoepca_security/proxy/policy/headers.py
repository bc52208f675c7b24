"""What of a client's request goes on to the protected service."""

import re
from collections.abc import Iterable
from typing import Final, Protocol

Fields = tuple[tuple[bytes, bytes], ...]
"""Header fields in the order in which they came: names, in whatever case, and values."""

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

_CREDENTIALS: Final = frozenset({b"authorization", b"proxy-authorization"})

_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH: Final = re.compile(rb"\*|/[^\x00-\x20\x7f]*")
_BREAK: Final = re.compile(rb"[\r\n\x00]")
# Some programs take these for spaces or line ends, as mitmproxy does around values, and others do not (RFC 9112 §2.2).
_ODD: Final = re.compile(rb"^[ \t]|[\r\x00\x0b\x0c]")


def is_plain(lines: Iterable[bytes]) -> bool:
    """Tell whether the lines of an HTTP/1 head are the same lines to everybody: no folded ones, no odd line ends."""
    return not any(map(_ODD.search, lines))


class HasFields(Protocol):
    """Whatever has header fields."""

    @property
    def fields(self) -> Fields:
        """The header fields."""


class RequestHead(Protocol):
    """The head of a request; mitmproxy's `Request.data` is one."""

    @property
    def method(self) -> bytes:
        """As it was sent."""

    @property
    def path(self) -> bytes:
        """Path and query, `*`, or nothing with CONNECT."""

    @property
    def http_version(self) -> bytes:
        """As in `HTTP/1.1`."""

    @property
    def headers(self) -> HasFields:
        """The header fields."""


def value_of(fields: Fields, name: bytes) -> bytes | None:
    """Return the values of a field as one (RFC 9110 §5.3), or None where there is none; `name` is in lower case."""
    values = [value for given, value in fields if given.lower() == name]
    return b", ".join(values) if values else None


def is_one_request(head: RequestHead) -> bool:
    """Tell whether it stays one request as HTTP/1: no line breaks (mitmproxy 11 lets HTTP/2's pass), nor folded lines.

    Nor may `Connection` name the headers that say where the request ends and for whom it is.
    """
    return (
        _METHOD.fullmatch(head.method) is not None
        # mitmproxy takes these in any case for what they are in capitals, and a service need not (RFC 9110 §9.1).
        and (head.method.isupper() or head.method.upper() not in (b"HEAD", b"CONNECT"))
        and (_PATH.fullmatch(head.path) is not None or (head.method == b"CONNECT" and not head.path))
        and head.http_version in (b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"HTTP/3")
        and _BREAK.search(b"".join(map(b"".join, head.headers.fields))) is None
        and _FRAMING.isdisjoint(_connection_options(head.headers.fields))
    )


def is_websocket(head: RequestHead) -> bool:
    """Tell whether the request asks for a WebSocket (RFC 6455 §4.1)."""
    return head.method == b"GET" and (value_of(head.headers.fields, b"upgrade") or b"").strip().lower() == b"websocket"


def without_hop_by_hop(head: RequestHead) -> Fields:
    """Return the fields without those that concern the client's connection to us only (RFC 9110 §7.6.1)."""
    fields = head.headers.fields
    options = _connection_options(fields)
    dropped = _HOP_BY_HOP | options
    if is_websocket(head):
        dropped -= {b"upgrade"}
        kept = [b"Upgrade"]
    else:
        dropped |= {b"upgrade"}
        kept = []
    # gRPC needs it, and is HTTP/2; over HTTP/1 it asks for trailers that mitmproxy cannot read.
    if not (head.http_version == b"HTTP/2.0" and value_of(fields, b"te") == b"trailers"):
        dropped |= {b"te"}
    # mitmproxy looks here to see whether the client's connection is to stay.
    kept += [option for option in (b"close", b"keep-alive") if option in options]
    connection = ((b"Connection", b", ".join(kept)),) if kept else ()
    return (*(field for field in fields if field[0].lower() not in dropped), *connection)


def with_hidden_credentials(fields: Fields) -> Fields:
    """Return the fields with a placeholder for the client's own credentials, which are nobody's business."""
    # Also where mitmproxy has refused the name.
    if not any(b"authorization" in name.lower() for name, _ in fields):
        return fields
    # One for each name, however often it was sent.
    hidden = {name.lower(): (name, PLACEHOLDER.encode()) for name, _ in fields if name.strip().lower() in _CREDENTIALS}
    return (*(field for field in fields if field[0].lower() not in hidden), *hidden.values())


def _connection_options(fields: Fields) -> frozenset[bytes]:
    values = [value for name, value in fields if name.lower() == b"connection"]
    return frozenset(option.strip().lower() for value in values for option in value.split(b",") if option.strip())
