"""Ending: what is waited for, and for how long."""

import asyncio
import signal
import socket
import threading
import time
from typing import Any

import pytest
from mitmproxy.addons.proxyserver import Proxyserver

from eoepca_security.issuer.threads import DaemonThreads
from eoepca_security.proxy.addons import drain as lifecycle
from eoepca_security.proxy.addons.drain import drain


class Instance:
    def __init__(self, *, is_running: bool) -> None:
        self.is_running = is_running
        self.stopped = 0

    async def stop(self) -> None:
        self.stopped += 1


def server_with(*instances: Instance) -> Proxyserver:
    server = Proxyserver()
    server.servers = instances  # type: ignore[assignment]
    return server


async def test_it_waits_until_nothing_is_served_and_no_longer() -> None:
    listening, never_started = Instance(is_running=True), Instance(is_running=False)
    busy = [True, True, True]
    assert not await drain(server_with(listening, never_started), lambda: bool(busy) and busy.pop())
    assert busy == []
    assert (listening.stopped, never_started.stopped) == (1, 0)


async def test_it_waits_no_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "DRAIN_TIMEOUT", 0.1)
    await asyncio.wait_for(drain(server_with(), lambda: True), 5)


async def test_a_second_signal_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "SAME_SIGNAL", -1)
    ending = asyncio.ensure_future(drain(server_with(), lambda: True))
    await asyncio.sleep(0)
    signal.raise_signal(signal.SIGTERM)
    assert await asyncio.wait_for(ending, 5)


async def test_the_same_signal_that_comes_twice_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "DRAIN_TIMEOUT", 0.1)
    ending = asyncio.ensure_future(drain(server_with(), lambda: True))
    await asyncio.sleep(0)
    signal.raise_signal(signal.SIGTERM)
    assert not await asyncio.wait_for(ending, 5)


def test_the_bound_leaves_docker_time() -> None:
    assert lifecycle.DRAIN_TIMEOUT + lifecycle._CLOSING_TIMEOUT < 10


async def test_names_that_are_never_found_hold_up_no_others_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    real = socket.getaddrinfo

    def lookup(host: str, *rest: Any, **options: Any) -> Any:
        if host == "silent.example":
            never.wait(30)
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(DaemonThreads())
    waiting = [asyncio.ensure_future(loop.getaddrinfo("silent.example", 80)) for _ in range(50)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(loop.getaddrinfo("127.0.0.1", 80), 5)
    with pytest.raises(socket.gaierror):
        await asyncio.wait_for(loop.getaddrinfo("127.0.0.1", "no such service"), 5)
    for task in waiting:
        task.cancel()
    began = time.monotonic()
    await loop.shutdown_default_executor()
    assert time.monotonic() - began < 2
    never.set()
