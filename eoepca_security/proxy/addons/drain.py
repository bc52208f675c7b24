"""Ending without cutting anybody off: requests that are being served get their answers, within a bound."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Final

from mitmproxy.addons.proxyserver import Proxyserver

DRAIN_TIMEOUT: Final = 8.0
"""Seconds that the end waits for requests that are being served; docker kills after 10."""

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
"""What ends the proxy, and when it comes a second time, at once."""

SAME_SIGNAL: Final = 1.0
"""Seconds in which a second one is taken for the same: a signal to a group of processes reaches each of them, and some
(uv, the supervisor of several workers) pass theirs on."""

_CLOSING_TIMEOUT: Final = 1.0
_INTERVAL: Final = 0.02


def end_with_the_terminal(end: Callable[[], None]) -> None:
    """Let the end of the terminal end the process like any other signal, unless it is to outlive that (nohup)."""
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, end)


def end_quietly() -> None:
    """Take no notice of signals that still come: asyncio and Python restore what they do by default as they end."""
    for number in STOP_SIGNALS:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


async def drain(server: Proxyserver, is_busy: Callable[[], bool]) -> bool:
    """Stop accepting connections, wait until nothing keeps us busy, and close all connections.

    Waits for `DRAIN_TIMEOUT` seconds at most, and no more after a second signal; returns whether there was one.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    hurry = asyncio.Event()

    def signalled() -> None:
        if loop.time() - began > SAME_SIGNAL:
            hurry.set()

    for instance in server.servers:
        if instance.is_running:
            await instance.stop()
    for number in STOP_SIGNALS:
        # Not everywhere, and not outside the main thread.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, signalled)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_TIMEOUT):
            await asyncio.sleep(_INTERVAL)
            # There is no event for a buffer that is empty.
            while not hurry.is_set() and (is_busy() or _unsent(server)):  # noqa: ASYNC110
                await asyncio.sleep(_INTERVAL)
    for handler in tuple(server.connections.values()):
        client = handler.transports.get(handler.client)
        if client is not None and client.handler is not None:
            client.handler.cancel("the proxy ends")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSING_TIMEOUT):
            while server.connections:  # noqa: ASYNC110  as above
                await asyncio.sleep(_INTERVAL)
    return hurry.is_set()


def _unsent(server: Proxyserver) -> bool:
    """Tell whether a client has not been sent all of its answer."""
    for handler in server.connections.values():
        transports = handler.transports.get(handler.client)
        if transports is not None and isinstance(transports.writer, asyncio.StreamWriter):
            transport = transports.writer.transport
            if not transport.is_closing() and transport.get_write_buffer_size():
                return True
    return False
