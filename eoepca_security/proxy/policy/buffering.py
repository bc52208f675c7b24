"""Which bodies the proxy buffers, so that it can send them again, which it streams, and how much it holds of them."""

from typing import Final

from eoepca_security.proxy.policy.headers import Fields, RequestHead, value_of

MAX_HELD: Final = 1024 * 1024
"""The longest body to buffer, in bytes: of a request, or of an answer that refuses the token. Longer bodies and those
of unknown length are streamed."""

MAX_WHOLE: Final = 64 * 1024
"""The longest other answer, and the longest WebSocket message, in bytes, that passes as a whole and not in parts."""

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
    return _is_long(length, MAX_HELD)


def streams_response(status: int, fields: Fields) -> bool:
    """Return whether to stream a response's body: events, and bodies that may be large."""
    if status == 101:
        return False
    length = value_of(fields, b"content-length")
    if length is None:
        # A refused request may be sent again with another token, so do not forward this answer yet.
        return status != 401
    return _is_long(length, MAX_HELD if status == 401 else MAX_WHOLE)


def _is_long(length: bytes, limit: int) -> bool:
    return not length.isdigit() or len(length) > _DIGITS or int(length) > limit


class Budget:
    """How many bytes of bodies a process may hold at a time (`limit`), and holds (`held`)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0


class Share:
    """What one exchange holds of a budget, in bytes. It gives back what is left when nobody refers to it any more."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def resize(self, size: int) -> bool:
        """Hold this many bytes from now on; return False and change nothing if that is more than the budget has."""
        growth = size - self.size
        if growth > 0 and self._budget.held + growth > self._budget.limit:
            return False
        self._budget.held += growth
        self.size = size
        return True

    def __del__(self) -> None:
        self._budget.held -= self.size
