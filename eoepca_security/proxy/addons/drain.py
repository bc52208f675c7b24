"""Graceful shutdown: running requests get their answers, within a time limit."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Final

from mitmproxy.addons.proxyserver import Proxyserver

DRAIN_TIMEOUT: Final = 8.0
"""Seconds to wait for running requests. Docker kills after 10."""

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
"""The signals that stop the proxy; a second one stops it at once."""

SAME_SIGNAL: Final = 1.0
"""Seconds within which a second signal counts as the same: a signal to a process group reaches all its processes, and
some (uv, the supervisor of the workers) forward theirs."""

_CLOSING_TIMEOUT: Final = 1.0
_INTERVAL: Final = 0.02


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal, so that SIGHUP may say that it has closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def hold_hangup() -> None:
    """Let SIGHUP wait until there is a handler for it, unless it is ignored (nohup)."""
    with contextlib.suppress(AttributeError):
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def on_hangup(act: Callable[[], None]) -> None:
    """Do this on SIGHUP, unless it is ignored (nohup). One that was blocked so far arrives now."""
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, act)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def end_quietly() -> None:
    """Ignore further signals: asyncio and Python restore the default handlers while they shut down."""
    for number in STOP_SIGNALS:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


async def drain(server: Proxyserver, is_busy: Callable[[], bool]) -> bool:
    """Stop accepting connections, wait until the proxy is idle, and close all connections.

    Waits at most `DRAIN_TIMEOUT` seconds, or until a second signal. Returns whether there was a second signal.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    hurry = asyncio.Event()

    def signalled() -> None:
        if loop.time() - began > SAME_SIGNAL:
            hurry.set()

    await stop_listening(server)
    for number in STOP_SIGNALS:
        # Not supported on every platform, or outside the main thread.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, signalled)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_TIMEOUT):
            await asyncio.sleep(_INTERVAL)
            # asyncio has no event for an empty buffer.
            while not hurry.is_set() and (is_busy() or _unsent(server)):  # noqa: ASYNC110
                await asyncio.sleep(_INTERVAL)
    await disconnect(server)
    return hurry.is_set()


async def stop_listening(server: Proxyserver) -> None:
    """Stop accepting connections."""
    for instance in server.servers:
        if instance.is_running:
            await instance.stop()


async def disconnect(server: Proxyserver) -> None:
    """Close all connections of clients; what has been written to them still arrives."""
    for handler in tuple(server.connections.values()):
        client = handler.transports.get(handler.client)
        if client is not None and client.handler is not None:
            client.handler.cancel("the proxy stops")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSING_TIMEOUT):
            while server.connections:  # noqa: ASYNC110  as above
                await asyncio.sleep(_INTERVAL)


def _unsent(server: Proxyserver) -> bool:
    """Return whether part of an answer still has to be sent to a client."""
    for handler in server.connections.values():
        transports = handler.transports.get(handler.client)
        if transports is not None and isinstance(transports.writer, asyncio.StreamWriter):
            transport = transports.writer.transport
            if not transport.is_closing() and transport.get_write_buffer_size():
                return True
    return False
