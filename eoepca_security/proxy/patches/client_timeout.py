"""How long a client may keep the proxy waiting, and what tells that it does.

A client that sends nothing is late with what it has begun only if nothing of it waits here to be read: where the
service is slower than the client, the proxy does not read on. What a client does not read, and whether it is there at
all, the operating system watches.
"""

import asyncio
import contextlib
import socket
import time
from typing import Final
from weakref import WeakKeyDictionary

from mitmproxy.connection import Client

DEFAULT: Final = 60.0

_PROBES: Final = 4

_seconds = DEFAULT
_streams: WeakKeyDictionary[Client, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = WeakKeyDictionary()


def set_limit(seconds: float) -> None:
    """Give all clients of this process this time from now on."""
    global _seconds  # noqa: PLW0603  there is one for each process, as of the patches that use it
    _seconds = seconds


def limit() -> float:
    """Return the seconds that a client has for the next part of what it has begun."""
    return _seconds


def watch(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Watch a client's connection: the system ends it when the client is gone, or reads nothing for too long."""
    _streams[client] = reader, writer
    # Half of the time is for the client to be silent, and half for answers to several probes, as one may be lost.
    keep_alive(writer, idle=_seconds / 2, interval=_seconds / 2 / _PROBES)
    with contextlib.suppress(OSError, AttributeError):  # Linux only; it counts while the client's window is shut, too
        _set(writer, socket.TCP_USER_TIMEOUT, int(_seconds * 1000))


def keep_alive(writer: asyncio.StreamWriter, *, idle: float = DEFAULT, interval: float = DEFAULT / _PROBES) -> None:
    """Have the system ask whether the other side is still there, after `idle` seconds without a word from it."""
    connection = writer.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not all systems have all of these.
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", _PROBES)):
        with contextlib.suppress(OSError, AttributeError):
            _set(writer, getattr(socket, name), max(1, round(value)))


def left(client: Client, moved_at: float) -> float:
    """Return the seconds that a client has left, given when (`time.monotonic`) the last of it was read; 0 if none."""
    remaining = moved_at + _seconds - time.monotonic()
    if remaining > 0:
        return remaining
    return _seconds if _has_sent_more(client) else 0.0


def _has_sent_more(client: Client) -> bool:
    streams = _streams.get(client)
    if streams is None:
        return False
    reader, writer = streams
    transport = writer.transport
    is_paused = isinstance(transport, asyncio.ReadTransport) and not (transport.is_reading() or transport.is_closing())
    return bool(getattr(reader, "_buffer", b"")) or is_paused


def _set(writer: asyncio.StreamWriter, option: int, value: int) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, value)
