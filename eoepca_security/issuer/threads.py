"""Blocking functions in daemon threads, so that they delay neither the event loop nor the exit of the process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_daemon_thread(function: Callable[[], T]) -> "Future[T]":
    """Run a blocking function in a thread of its own, which does not delay the exit of the process.

    It cannot be cancelled. Raises RuntimeError when no thread can be started.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future


async def result_of(future: "Future[T]") -> T:
    """Await a thread's result in the running event loop. Cancelling the wait does not stop the thread.

    Unlike with `asyncio.wrap_future`, the thread may finish after the loop has closed.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Future[T] = loop.create_future()

    def settle() -> None:
        if waiting.cancelled():
            return
        if (error := future.exception()) is not None:
            waiting.set_exception(error)
        else:
            waiting.set_result(future.result())

    def notify(_: "Future[T]") -> None:
        # The loop may have closed by now; then nobody is waiting.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    future.add_done_callback(notify)
    return await waiting


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a daemon thread of its own and return its result.

    Unlike with `asyncio.to_thread`, a full pool does not delay it, and it does not delay the exit of the process.
    """
    return await result_of(in_daemon_thread(function))


class DaemonThreads(ThreadPoolExecutor):
    """An executor that runs each call in a thread of its own, which does not delay the exit of the process.

    asyncio resolves host names in its executor. With the default pool, a silent name server would block all other
    lookups, and the process would wait for it before it exits.
    """

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Run the function in a new thread."""
        return in_daemon_thread(lambda: function(*arguments, **options))
