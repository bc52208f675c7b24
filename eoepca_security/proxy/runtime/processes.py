"""Runs several processes: the workers, and one with the admin listener."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from eoepca_security.errors import SettingsError
from eoepca_security.proxy.addons.configuration import SAME_AS_BEFORE
from eoepca_security.proxy.addons.drain import has_terminal, on_hangup
from eoepca_security.proxy.admin.worker_states import Channel, Workers
from eoepca_security.proxy.config.loading import reread_services
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

        from eoepca_security.proxy.admin import server  # noqa: F401, PLC0415  before forking

    first = bind_sockets(settings.port, bind_host(settings.host))
    # Resolve port 0 once, so that all processes report the same port.
    settings = replace(settings, port=first[0].getsockname()[1])
    ports = [service.port for service in settings.services if service.port is not None]
    listeners = {settings.port: first} | {port: bind_sockets(port, bind_host(settings.host)) for port in ports}
    lines = [Channel.make() for _ in range(settings.workers)]
    proxy = _Proxy(settings, arguments, confdir, log_format, folder, listeners, lines)
    parts = [Part(partial(proxy.work, number)) for number in range(settings.workers)]
    if settings.admin is not None:
        parts.append(Part(proxy.run_admin, is_worker=False))
    # Otherwise each process's garbage collector scans, and so copies, the shared memory.
    settle_memory()
    reread = proxy.reread if settings.services_file is not None and not has_terminal() else None
    return supervise(parts, on_end=proxy.close_listeners, on_worker_exit=proxy.on_worker_exit, on_hangup=reread)


@dataclass
class _Proxy:
    """What the supervisor and its processes do. `settings` are those in force; SIGHUP may change their services."""

    settings: Settings
    arguments: Sequence[str]
    confdir: str
    log_format: str
    folder: PrivateFolder | None
    listeners: Mapping[int, Sequence[socket.socket]]
    lines: Sequence[Channel]
    supervisor: int = field(default_factory=os.getpid)

    def work(self, number: int, is_first: bool, lifeline: int) -> int:
        worker = Worker(
            self.listeners,
            self.lines[number],
            lifeline,
            self.end_all,
            leads=is_first and number == 0,
            keeps_files=number == 0,
        )
        settings = replace(self.settings, admin=None)
        code = _run(settings, self.arguments, self.confdir, None, self.log_format, worker)
        self._leave_orphaned()
        return code

    def run_admin(self, is_first: bool, lifeline: int) -> int:
        from eoepca_security.proxy.admin.server import Admin  # noqa: PLC0415  as above

        self.close_listeners()
        log_plainly(self.log_format)
        workers = Workers(self.settings, self.lines, self.end_all)

        def follow() -> None:
            # The supervisor has found it right.
            with contextlib.suppress(SettingsError):
                workers.settings, _ = reread_services(workers.settings)

        asyncio.run(_serve_admin(Admin(self.settings, workers.subject()), lifeline, follow))
        self._leave_orphaned()
        return 0

    def end_all(self) -> None:
        if os.getppid() == self.supervisor:
            os.kill(self.supervisor, QUIT)

    def close_listeners(self) -> None:
        for sockets in self.listeners.values():
            for listener in sockets:
                listener.close()

    def on_worker_exit(self, number: int, fate: str) -> None:
        workers = self.settings.workers
        what = f"worker {number + 1} of {workers}" if number < workers else "the admin listener"
        print_error(f"{what} {fate}; starting another", self.log_format)

    def reread(self) -> bool:
        """Read the services again; return whether they are right, so that the workers should do the same."""
        try:
            self.settings, _ = reread_services(self.settings)
        except SettingsError as error:
            for line in (*error.problems, SAME_AS_BEFORE):
                print_error(line, self.log_format)
            return False
        return True

    def _leave_orphaned(self) -> None:
        if self.folder is not None and os.getppid() != self.supervisor:
            self.folder.leave()


async def _serve_admin(admin: "Admin", lifeline: int, follow: Callable[[], None]) -> None:
    """Run the admin listener until this process must stop or the supervisor is gone. `follow` is called on SIGHUP."""
    end, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    on_hangup(follow)
    loop.add_reader(lifeline, end.set)
    admin.start()
    await end.wait()
