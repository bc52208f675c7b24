"""Blocking functions in daemon threads, for code that must neither block nor be held up at the end."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

T = TypeVar("T")


def in_daemon_thread(function: Callable[[], T]) -> "Future[T]":
    """Run a blocking function in a thread of its own, which does not hold up the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  it is raised where the result is awaited
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future


class DaemonThreads(ThreadPoolExecutor):
    """An executor that gives each call a thread of its own, which does not hold up the end of the process.

    asyncio looks names up in its executor: a name server that is silent would fill the usual pool, so that nothing else
    is looked up, and the process would wait for it before it ends.
    """

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Run the function in a new thread."""
        return in_daemon_thread(lambda: function(*arguments, **options))


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a daemon thread of its own and return its result.

    Unlike `asyncio.to_thread`, neither a full pool delays it nor does it delay the end of the process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("T", result))

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:  # noqa: BLE001  it is raised where the result is awaited
            error = caught
        # The loop may be gone by now, and nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="token-request", daemon=True).start()
    return await future
