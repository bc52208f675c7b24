"""Blocking functions in threads of their own, and who waits for them."""

import asyncio
import threading

import pytest

from eoepca_security.issuer.threads import in_daemon_thread, in_thread, result_of


async def test_a_result_and_an_error_come_to_who_waits() -> None:
    assert await in_thread(lambda: 7) == 7

    def fail() -> None:
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        await in_thread(fail)


async def test_several_wait_for_one_thread_and_one_that_gives_up_ends_nothing() -> None:
    gate = threading.Event()
    future = in_daemon_thread(lambda: gate.wait(10))
    waiting = [asyncio.ensure_future(result_of(future)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait({waiting[0]})
    assert waiting[0].cancelled()
    gate.set()
    assert await asyncio.gather(*waiting[1:]) == [True, True]


async def test_what_was_asked_for_is_done_even_when_nobody_waits_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    done, started = threading.Event(), list[threading.Thread]()

    def start_later(thread: threading.Thread) -> None:
        started.append(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_later)
        waiting = asyncio.ensure_future(in_thread(done.set))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
    started[0].start()
    assert await asyncio.to_thread(done.wait, 10)


def test_a_thread_may_end_after_its_loop(caplog: pytest.LogCaptureFixture) -> None:
    gate, before = threading.Event(), set(threading.enumerate())
    future = in_daemon_thread(lambda: gate.wait(10))
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(result_of(future))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert future.result(0) is True
    assert not caplog.records
    assert not waiting.done()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_no_thread_holds_up_the_end_of_the_process() -> None:
    gate = threading.Event()
    before = set(threading.enumerate())
    future = in_daemon_thread(lambda: gate.wait(10))
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    gate.set()
    assert future.result(10) is True
