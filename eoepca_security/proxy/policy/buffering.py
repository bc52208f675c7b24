"""Which bodies the proxy buffers, so that it can send them again, and which it streams."""

from typing import Final

from eoepca_security.proxy.policy.headers import Fields, RequestHead, value_of

MAX_HELD: Final = 1024 * 1024
"""The longest body to buffer, in bytes. Longer bodies and those of unknown length are streamed."""

_MULTIPLEXED: Final = (b"HTTP/2.0", b"HTTP/3")
_DIGITS: Final = 18  # enough for any real length; Python refuses to parse thousands of digits


def streams_request(head: RequestHead) -> bool:
    """Return whether to stream a request's body instead of buffering it.

    Short bodies are buffered, so that the request can be sent again.
    """
    fields = head.headers.fields
    length = value_of(fields, b"content-length")
    if length is None:
        return head.http_version in _MULTIPLEXED or value_of(fields, b"transfer-encoding") is not None
    return _is_long(length)


def streams_response(status: int, fields: Fields) -> bool:
    """Return whether to stream a response's body: events, and bodies that may be large."""
    if status == 101:
        return False
    length = value_of(fields, b"content-length")
    if length is None:
        # A refused request may be sent again with another token, so do not forward this answer yet.
        return status != 401
    return _is_long(length)


def _is_long(length: bytes) -> bool:
    return not length.isdigit() or len(length) > _DIGITS or int(length) > MAX_HELD
