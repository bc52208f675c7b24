"""When the proxy reads its services again."""

import asyncio
import os
import signal
from unittest.mock import Mock

from eoepca_security.proxy.addons.drain import on_hangup
from eoepca_security.proxy.addons.lifecycle import Lifecycle
from eoepca_security.proxy.addons.state import State
from tests.support.waiting import settled


async def test_what_is_read_last_stays_however_long_it_takes_to_read() -> None:
    file, used, are_read = [1], list[int](), asyncio.Event()

    async def reread() -> None:
        content = file[-1]
        if content == 1:
            await are_read.wait()
        used.append(content)

    lifecycle = Lifecycle(
        State(lambda: None),
        Mock(),
        on_started=lambda _listener, _error: None,
        on_unloaded=lambda _master: None,
        on_reread=reread,
    )
    loop = asyncio.get_running_loop()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    on_hangup(lifecycle._reread)
    try:
        for content in (1, 2, 3):
            file.append(content)
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.01)
        are_read.set()
        await settled(lambda: used[-1:] == [3])
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)
    # Signals that come meanwhile ask for the same.
    assert used == [1, 3]
