"""Waiting for what happens elsewhere: in a thread, in another process, in the background."""

import asyncio
import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool], timeout: float = 15) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


async def settled(condition: Callable[[], bool]) -> None:
    """Wait for what a background refresh does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
