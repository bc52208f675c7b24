"""Which parts of a client's request the protected service gets, and which parts of its answer the client gets."""

import re
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

Fields = tuple[tuple[bytes, bytes], ...]
"""Header fields in the order of arrival: names, in any case, and values."""

PLACEHOLDER: Final = "Bearer (added by the proxy)"
"""Replaces the token in flows, and so in mitmproxy's console and files."""

# RFC 9110 §7.6.1 and its predecessors. mitmproxy handles Transfer-Encoding.
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

_MAX_LENGTH: Final = 2**63 - 1

_CREDENTIALS: Final = frozenset({b"authorization", b"proxy-authorization"})

_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH: Final = re.compile(rb"\*|/[^\x00-\x20\x7f]*")
_BREAK: Final = re.compile(rb"[\r\n\x00]")
# Programs disagree on whether these are spaces or line ends; mitmproxy strips them around values (RFC 9112 §2.2).
_ODD: Final = re.compile(rb"^[ \t]|[\r\x00\x0b\x0c]", re.MULTILINE)
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] +[0-9]{3}(?:[ \t].*)?")
_REPAIRABLE: Final = re.compile(rb"^[ \t]|^[^:\n]*[ \t]:", re.MULTILINE)


def is_plain(lines: Iterable[bytes]) -> bool:
    """Return whether all programs read the same lines in an HTTP/1 head: no folded lines, no unusual line ends."""
    return _ODD.search(b"\n".join(lines)) is None


def repaired(lines: Sequence[bytes]) -> Sequence[bytes]:
    """Return the lines of an answer's head so that all programs read the same lines.

    Folded lines become one line (RFC 9112 §5.2), and spaces before a colon are removed (§5.1). Raises ValueError for a
    head that cannot be repaired.
    """
    if lines and _STATUS_LINE.fullmatch(lines[0]) is None:
        raise ValueError("the status line is malformed")
    if _REPAIRABLE.search(b"\n".join(lines[1:])) is not None:
        whole = [[lines[0]]]
        for line in lines[1:]:
            if line[:1] not in (b" ", b"\t"):
                name, colon, value = line.partition(b":")
                whole.append([name.rstrip(b" \t") + colon + value])
            elif len(whole) > 1:
                whole[-1][-1] = whole[-1][-1].rstrip(b" \t")
                whole[-1].append(line.strip(b" \t"))
            else:
                raise ValueError("the first header line begins with a space")
        lines = [b" ".join(parts) for parts in whole]
    if not is_plain(lines):
        raise ValueError("a header has a control character")
    return lines


class HasFields(Protocol):
    """An object with header fields."""

    @property
    def fields(self) -> Fields:
        """The header fields."""


class RequestHead(Protocol):
    """The head of a request, e.g. mitmproxy's `Request.data`."""

    @property
    def method(self) -> bytes:
        """The method, as sent."""

    @property
    def path(self) -> bytes:
        """Path and query, `*`, or empty for CONNECT."""

    @property
    def http_version(self) -> bytes:
        """The version, e.g. `HTTP/1.1`."""

    @property
    def headers(self) -> HasFields:
        """The header fields."""


def value_of(fields: Fields, name: bytes) -> bytes | None:
    """Return the values of a field, joined (RFC 9110 §5.3), or None; `name` is in lower case."""
    values = [value for given, value in fields if given.lower() == name]
    return b", ".join(values) if values else None


def has_usable_length(fields: Fields) -> bool:
    """Return whether `Content-Length`, if there is one, fits into 63 bits (RFC 9110 §8.6)."""
    length = value_of(fields, b"content-length")
    return length is None or (length.isdigit() and len(length) < 20 and int(length) <= _MAX_LENGTH)


def is_one_request(head: RequestHead) -> bool:
    """Return whether all servers read this as one request in HTTP/1.

    It must have no line breaks in its fields (mitmproxy 11 accepts them in HTTP/2), and `Connection` must not name the
    headers that define the end and the host of the request.
    """
    return (
        _METHOD.fullmatch(head.method) is not None
        # mitmproxy ignores the case of these, but services may not (RFC 9110 §9.1).
        and (head.method.isupper() or head.method.upper() not in (b"HEAD", b"CONNECT"))
        and (_PATH.fullmatch(head.path) is not None or (head.method == b"CONNECT" and not head.path))
        and head.http_version in (b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"HTTP/3")
        and _BREAK.search(b"".join(map(b"".join, head.headers.fields))) is None
        and _FRAMING.isdisjoint(_connection_options(head.headers.fields))
        and has_usable_length(head.headers.fields)
    )


def check_answer(fields: Fields) -> None:
    """Raise ValueError for an answer that programs could read differently; see `is_one_request`."""
    if _BREAK.search(b"".join(map(b"".join, fields))) is not None:
        raise ValueError("a header has a line break or NUL")
    if not has_usable_length(fields):
        raise ValueError("its Content-Length is not a usable number")


def is_websocket(head: RequestHead) -> bool:
    """Return whether the request asks for a WebSocket (RFC 6455 §4.1)."""
    return (
        head.method == b"GET"
        # Servers ignore Upgrade in HTTP/1.0 (RFC 9110 §7.8).
        and head.http_version == b"HTTP/1.1"
        and (value_of(head.headers.fields, b"upgrade") or b"").strip().lower() == b"websocket"
    )


def without_hop_by_hop(head: RequestHead) -> Fields:
    """Return the fields without those for the client's connection to us (RFC 9110 §7.6.1)."""
    fields = head.headers.fields
    options = _connection_options(fields)
    dropped = _HOP_BY_HOP | options
    if is_websocket(head):
        dropped -= {b"upgrade"}
        kept = [b"Upgrade"]
    else:
        dropped |= {b"upgrade"}
        kept = []
    # gRPC, over HTTP/2, needs `TE: trailers`. Over HTTP/1, mitmproxy cannot read the trailers.
    if not (head.http_version == b"HTTP/2.0" and value_of(fields, b"te") == b"trailers"):
        dropped |= {b"te"}
    # mitmproxy needs these to decide whether to keep the client's connection open.
    kept += [option for option in (b"close", b"keep-alive") if option in options]
    connection = ((b"Connection", b", ".join(kept)),) if kept else ()
    return (*(field for field in fields if field[0].lower() not in dropped), *connection)


def answer_without_hop_by_hop(fields: Fields, status: int) -> Fields:
    """Return an answer's fields without those for the service's connection to us (RFC 9110 §7.6.1).

    Raises ValueError if `Connection` names a header that defines the end of the answer.
    """
    options = _connection_options(fields)
    if not _FRAMING.isdisjoint(options):
        raise ValueError("its Connection names a header that defines its end")
    dropped = _HOP_BY_HOP | options | {b"te", b"upgrade"}
    if status == 101:
        dropped -= {b"upgrade"}
    kept = tuple(field for field in fields if field[0].lower() not in dropped)
    return (*kept, (b"Connection", b"Upgrade")) if status == 101 else kept


def has_no_content(method: bytes, status: int) -> bool:
    """Return whether an answer ends with its head, whatever its headers say (RFC 9112 §6.3)."""
    return method == b"HEAD" or status < 200 or status in (204, 304)


def without_framing(fields: Fields, method: bytes, status: int) -> Fields:
    """Return an answer's fields without those that announce content, if it cannot have any.

    A length stays, because it is that of the answer to a GET (RFC 9110 §8.6), except with 204, which must have none.
    """
    if not has_no_content(method, status) or status == 101:
        return fields
    dropped = {b"transfer-encoding", b"content-length"} if status == 204 else {b"transfer-encoding"}
    return tuple(field for field in fields if field[0].lower() not in dropped)


def with_connection_close(fields: Fields) -> Fields:
    """Return the fields with `Connection: close` (RFC 9112 §9.6)."""
    return (*(field for field in fields if field[0].lower() != b"connection"), (b"Connection", b"close"))


def with_hidden_credentials(fields: Fields) -> Fields:
    """Return the fields with a placeholder instead of the client's own credentials."""
    # `in`, because names that mitmproxy refuses, e.g. with spaces, can hold credentials too.
    if not any(b"authorization" in name.lower() for name, _ in fields):
        return fields
    # One placeholder for each name, even if it was sent several times.
    hidden = {name.lower(): (name, PLACEHOLDER.encode()) for name, _ in fields if name.strip().lower() in _CREDENTIALS}
    return (*(field for field in fields if field[0].lower() not in hidden), *hidden.values())


def _connection_options(fields: Fields) -> frozenset[bytes]:
    values = [value for name, value in fields if name.lower() == b"connection"]
    return frozenset(option.strip().lower() for value in values for option in value.split(b",") if option.strip())
