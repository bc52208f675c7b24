"""Which bodies are held in memory, so that they can be sent again, and which pass through as they come."""

from typing import Final

from mitmproxy.http import Request, Response

MAX_HELD: Final = 1024 * 1024
"""Longest body, in bytes, that is held in memory; longer ones, and those of unknown length, are passed on in parts."""

_DIGITS: Final = 18  # of any length that there can be; Python does not read thousands


def streams_request(request: Request) -> bool:
    """Tell whether a request's body is to pass through as it comes, rather than be held until it is complete.

    One that is held can be sent again, so short ones are.
    """
    length = request.headers.get("Content-Length")
    if length is None:
        return "Transfer-Encoding" in request.headers or request.is_http2 or request.is_http3
    return _is_long(length)


def streams_response(response: Response) -> bool:
    """Tell whether an answer's body is to pass through as it comes: events, and what may be large."""
    if response.status_code == 101:
        return False
    length = response.headers.get("Content-Length")
    if length is None:
        # Whoever is refused may be asked again with another token, so this is not on its way to the client yet.
        return response.status_code != 401
    return _is_long(length)


def _is_long(length: str) -> bool:
    return not length.isdecimal() or len(length) > _DIGITS or int(length) > MAX_HELD
