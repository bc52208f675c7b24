"""Checks whether the proxy can listen on an address."""

import errno
import os
import socket
from dataclasses import dataclass
from typing import Final

from eoepca_security.proxy.config.settings import Address

USE_LOCAL: Final = "use 127.0.0.1, or 0.0.0.0 for all"
"""The remedy for an address that is not on this machine."""


@dataclass(frozen=True)
class Obstacle:
    """Why nothing can listen on an address. `is_foreign` is true when the address is not on this machine."""

    detail: str
    is_foreign: bool


def bind_host(host: str) -> str:
    """Return the host to bind to: `::` means all addresses of both families, which asyncio and tornado write as ""."""
    return "" if host == "::" else host


def cannot_listen(host: str, port: int) -> Obstacle | None:
    """Return why nothing can listen on `host` and `port`, or None."""
    if host == "::":
        # Both families, see `bind_host`.
        return _cannot_bind(host, port) or _cannot_bind("0.0.0.0", port)  # noqa: S104  only a trial
    return _cannot_bind(host, port)


def _cannot_bind(host: str, port: int) -> Obstacle | None:
    foreign = Obstacle(f"{host!r} is not an address of this machine", is_foreign=True)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        return foreign
    try:
        with socket.create_server(address[:2], family=family):
            return None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return foreign
        # Python's own message repeats the address.
        reason = os.strerror(error.errno) if error.errno else str(error)
        return Obstacle(f"cannot listen on {Address(host, port)} ({reason})", is_foreign=False)
