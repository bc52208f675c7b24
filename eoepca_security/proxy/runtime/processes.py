"""Runs several processes: the workers, and one with the admin listener."""

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from eoepca_security.proxy.admin.worker_states import Channel, Workers
from eoepca_security.proxy.config.port_check import bind_host
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.patches.hook_cache import settle_memory
from eoepca_security.proxy.patches.lazy_imports import without_cas
from eoepca_security.proxy.runtime.logs import log_plainly
from eoepca_security.proxy.runtime.mitmdump import Worker, _run
from eoepca_security.proxy.runtime.output import print_error
from eoepca_security.proxy.runtime.private_folder import PrivateFolder
from eoepca_security.proxy.runtime.supervisor import QUIT, Part, supervise

if TYPE_CHECKING:
    from eoepca_security.proxy.admin.server import Admin


def run_workers(
    settings: Settings, arguments: Sequence[str], confdir: str, log_format: str, folder: PrivateFolder | None
) -> int:
    """Run several workers that listen on the same sockets, and a process with the admin listener.

    If the supervisor is killed, the last remaining process removes the folder.
    """
    with without_cas():
        from tornado.netutil import bind_sockets  # noqa: PLC0415

        from eoepca_security.proxy.admin.server import Admin  # noqa: PLC0415  before forking

    first = bind_sockets(settings.port, bind_host(settings.host))
    supervisor = os.getpid()
    # Resolve port 0 once, so that all processes report the same port.
    settings = replace(settings, port=first[0].getsockname()[1])
    ports = [service.port for service in settings.services if service.port is not None]
    listeners = {settings.port: first} | {port: bind_sockets(port, bind_host(settings.host)) for port in ports}
    lines = [Channel.make() for _ in range(settings.workers)]

    def end_all() -> None:
        if os.getppid() == supervisor:
            os.kill(supervisor, QUIT)

    def close_listeners() -> None:
        for sockets in listeners.values():
            for listener in sockets:
                listener.close()

    def work(number: int, is_first: bool, lifeline: int) -> int:
        worker = Worker(listeners, lines[number], lifeline, end_all, leads=is_first and number == 0)
        code = _run(replace(settings, admin=None), arguments, confdir, None, log_format, worker)
        _leave_orphaned(folder, supervisor)
        return code

    def run_admin(is_first: bool, lifeline: int) -> int:
        close_listeners()
        log_plainly(log_format)
        admin = Admin(settings, Workers(settings, lines, end_all).subject())
        asyncio.run(_serve_admin(admin, lifeline))
        _leave_orphaned(folder, supervisor)
        return 0

    def on_worker_exit(number: int, fate: str) -> None:
        what = f"worker {number + 1} of {settings.workers}" if number < settings.workers else "the admin listener"
        print_error(f"{what} {fate}; starting another", log_format)

    parts = [Part(partial(work, number)) for number in range(settings.workers)]
    if settings.admin is not None:
        parts.append(Part(run_admin, is_worker=False))
    # Otherwise each process's garbage collector scans, and so copies, the shared memory.
    settle_memory()
    return supervise(parts, on_end=close_listeners, on_worker_exit=on_worker_exit)


def _leave_orphaned(folder: PrivateFolder | None, supervisor: int) -> None:
    if folder is not None and os.getppid() != supervisor:
        folder.leave()


async def _serve_admin(admin: "Admin", lifeline: int) -> None:
    """Run the admin listener until this process must stop or the supervisor is gone."""
    end, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    loop.add_reader(lifeline, end.set)
    admin.start()
    await end.wait()
