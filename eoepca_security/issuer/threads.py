"""Blocking functions in daemon threads, for code that must neither block nor be held up at the end."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_daemon_thread(function: Callable[[], T]) -> "Future[T]":
    """Run a blocking function in a thread of its own, which does not hold up the end of the process.

    Nobody can cancel it. Raises RuntimeError when no thread can be started.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  it is raised where the result is awaited
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future


async def result_of(future: "Future[T]") -> T:
    """Wait in the running event loop for what a thread comes to; giving up the wait leaves the thread to itself.

    Unlike with `asyncio.wrap_future`, the thread may end when the loop is gone.
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

    def tell(_: "Future[T]") -> None:
        # The loop may be gone by now, and nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    future.add_done_callback(tell)
    return await waiting


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a daemon thread of its own and return its result.

    Unlike `asyncio.to_thread`, neither a full pool delays it nor does it delay the end of the process.
    """
    return await result_of(in_daemon_thread(function))


class DaemonThreads(ThreadPoolExecutor):
    """An executor that gives each call a thread of its own, which does not hold up the end of the process.

    asyncio looks names up in its executor: a name server that is silent would fill the usual pool, so that nothing else
    is looked up, and the process would wait for it before it ends.
    """

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Run the function in a new thread."""
        return in_daemon_thread(lambda: function(*arguments, **options))
