"""Which bodies are held in memory, so that they can be sent again, and which pass through as they come."""

from typing import Final

from eoepca_security.proxy.policy.headers import Fields, RequestHead, value_of

MAX_HELD: Final = 1024 * 1024
"""Longest body, in bytes, that is held in memory; longer ones, and those of unknown length, are passed on in parts."""

_MULTIPLEXED: Final = (b"HTTP/2.0", b"HTTP/3")
_DIGITS: Final = 18  # of any length that there can be; Python does not read thousands


def streams_request(head: RequestHead) -> bool:
    """Tell whether a request's body is to pass through as it comes, rather than be held until it is complete.

    One that is held can be sent again, so short ones are.
    """
    fields = head.headers.fields
    length = value_of(fields, b"content-length")
    if length is None:
        return head.http_version in _MULTIPLEXED or value_of(fields, b"transfer-encoding") is not None
    return _is_long(length)


def streams_response(status: int, fields: Fields) -> bool:
    """Tell whether an answer's body is to pass through as it comes: events, and what may be large."""
    if status == 101:
        return False
    length = value_of(fields, b"content-length")
    if length is None:
        # Whoever is refused may be asked again with another token, so this is not on its way to the client yet.
        return status != 401
    return _is_long(length)


def _is_long(length: bytes) -> bool:
    return not length.isdigit() or len(length) > _DIGITS or int(length) > MAX_HELD
