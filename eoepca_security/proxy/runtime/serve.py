"""Running mitmdump in this process, with our add-on as an instance in it."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mitmproxy.options import CONF_DIR, Options
from mitmproxy.tools import cmdline
from mitmproxy.tools import main as mitmproxy_main
from mitmproxy.tools.dump import DumpMaster

from eoepca_security.errors import CredentialsRejected, SettingsError, TokenError
from eoepca_security.issuer.transport import ca_bundle
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.admin.worker_states import Crew, Line, answer
from eoepca_security.proxy.config.port_check import cannot_listen
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import ADMIN, CA_FILE, PORT, TOKEN_STORE, UPSTREAM, WORKERS
from eoepca_security.proxy.patches import certificate_authority, connection_pool
from eoepca_security.proxy.patches.hook_cache import settle_memory
from eoepca_security.proxy.patches.lazy_imports import without_cas
from eoepca_security.proxy.runtime.logs import complain, log_plainly, set_format
from eoepca_security.proxy.runtime.private_folder import FolderForNow
from eoepca_security.proxy.runtime.supervisor import QUIT, Part, share_listeners, supervise

if TYPE_CHECKING:
    from eoepca_security.proxy.admin.server import Admin

OnStarted = Callable[[DumpMaster, str, TokenError | None], None]

MEMORY: Final = Path("/dev/shm")  # noqa: S108  in it, a folder that only we can read
"""Where processes share what is to be kept in memory only."""


@dataclass(frozen=True)
class Worker:
    """What one of several processes is given: the sockets to listen on, and how it is asked about its state.

    `lifeline` is a file descriptor that ends when the process that started this one is gone. `end` ends them all. Only
    one, and only once, `leads`: it tells of the start, and ends the proxy where the credentials are rejected then.
    """

    listeners: Sequence[socket.socket]
    line: Line
    lifeline: int
    end: Callable[[], None]
    leads: bool


def run(
    settings: Settings, extra: Sequence[str] = (), on_started: OnStarted | None = None, log_format: str = "text"
) -> int:
    """Run the proxy until it is told to stop; return the exit code.

    `extra` are mitmdump's own arguments. `on_started` is called in the event loop once the first refresh has ended; not
    with several workers. `log_format` is one of `logs.FORMATS`.
    A rejected credential ends the start with exit code 1.
    """
    if settings.upstream is None:
        raise SettingsError(f"{UPSTREAM.env}: is required")
    if problem := _taken_address(settings):
        complain(problem, log_format)
        return 1
    with _upstream_trust(settings) as trust_arguments, _writable_confdir() as confdir:
        arguments = [*trust_arguments, *extra]
        if settings.workers == 1:
            return _run(settings, arguments, confdir, on_started, log_format)
        with _shared_session(settings) as (shared, folder):
            return _run_workers(shared, arguments, confdir, log_format, folder)


def _run(
    settings: Settings,
    arguments: Sequence[str],
    confdir: str,
    on_started: OnStarted | None,
    log_format: str,
    worker: Worker | None = None,
) -> int:
    exit_code, starting = 0, True
    leads = worker is None or worker.leads

    def is_told_elsewhere(record: logging.LogRecord) -> bool:
        is_rejection = f"({CredentialsRejected.code})" in record.getMessage()
        return starting and (is_rejection or (not leads and record.levelno < logging.ERROR))

    class Master(DumpMaster):
        def __init__(self, options: Options) -> None:
            super().__init__(options)
            # Ours rather than mitmproxy's defaults, which arguments and its config file may change: our start-up line
            # and what goes wrong, not a line for every connection and request.
            options.update(termlog_verbosity="alert", flow_detail=0, confdir=confdir)
            set_format(self, log_format, without=is_told_elsewhere)
            self.event_loop.set_exception_handler(_ignore_cancelled)
            addon = OIDCAuthProxy(settings, self._started, joins=not leads, end=worker.end if worker else None)
            self.addons.add(addon)
            addon.begin()
            # Where mitmproxy has scripts: behind its authentication of clients, ahead of what shows and saves flows.
            chain = self.addons.chain
            chain.insert(chain.index(self.addons.get("scriptloader")) + 1, chain.pop())
            connection_pool.install(connection_pool.Pool())
            if worker is not None:
                share_listeners((settings.host, settings.port), worker.listeners)
                answer(worker.line, addon.subject())
                self.event_loop.add_reader(worker.lifeline, self._orphaned, worker.lifeline)

        def _orphaned(self, lifeline: int) -> None:
            self.event_loop.remove_reader(lifeline)
            self.shutdown()  # type: ignore[no-untyped-call]

        def _started(self, listener: str, failure: TokenError | None) -> None:
            nonlocal exit_code, starting
            starting = False
            settle_memory()
            if isinstance(failure, CredentialsRejected) and leads:
                exit_code = 1
                complain(f"{failure.code}: {failure}", log_format)
                super().shutdown()  # type: ignore[no-untyped-call]
            elif on_started is not None:
                on_started(self, listener, failure)

    own = [
        *("--mode", f"reverse:{settings.upstream}"),
        *("--listen-host", settings.host, "--listen-port", str(settings.port)),
        *(["--ssl-insecure"] if settings.tls_no_verify else []),
    ]
    certificate_authority.read_quickly()
    try:
        mitmproxy_main.run(Master, cmdline.mitmdump, [*own, *arguments], _filters)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        return 0
    return exit_code


def _run_workers(
    settings: Settings, arguments: Sequence[str], confdir: str, log_format: str, folder: FolderForNow | None
) -> int:
    """Run several processes that listen on the same sockets, and one for the admin listener.

    When the supervisor is killed, the last process that is left removes the folder.
    """
    with without_cas():
        from tornado.netutil import bind_sockets  # noqa: PLC0415

        from eoepca_security.proxy.admin.server import Admin  # noqa: PLC0415  before the processes part

    listeners = bind_sockets(settings.port, settings.host)
    supervisor = os.getpid()
    # Which one of the others could not have, but all know.
    settings = replace(settings, port=listeners[0].getsockname()[1])
    lines = [Line.make() for _ in range(settings.workers)]

    def end_all() -> None:
        if os.getppid() == supervisor:
            os.kill(supervisor, QUIT)

    def close_listeners() -> None:
        for listener in listeners:
            listener.close()

    def work(number: int, is_first: bool, lifeline: int) -> int:
        worker = Worker(listeners, lines[number], lifeline, end_all, leads=is_first and number == 0)
        code = _run(replace(settings, admin=None), arguments, confdir, None, log_format, worker)
        _leave_orphaned(folder, supervisor)
        return code

    def tell(is_first: bool, lifeline: int) -> int:
        close_listeners()
        log_plainly(log_format)
        admin = Admin(settings, Crew(settings, lines, end_all).subject())
        asyncio.run(_serve_admin(admin, lifeline))
        _leave_orphaned(folder, supervisor)
        return 0

    def mourn(number: int, fate: str) -> None:
        what = f"worker {number + 1} of {settings.workers}" if number < settings.workers else "the admin listener"
        complain(f"{what} {fate}; another takes its place", log_format)

    parts = [Part(partial(work, number)) for number in range(settings.workers)]
    if settings.admin is not None:
        parts.append(Part(tell, is_worker=False))
    # What is there already is neither looked through nor, so, copied by each of them.
    settle_memory()
    return supervise(parts, on_end=close_listeners, mourn=mourn)


def _leave_orphaned(folder: FolderForNow | None, supervisor: int) -> None:
    if folder is not None and os.getppid() != supervisor:
        folder.leave()


async def _serve_admin(admin: "Admin", lifeline: int) -> None:
    """Run the admin listener until this process is told to end, or is on its own."""
    end, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    loop.add_reader(lifeline, end.set)
    admin.start()
    await end.wait()


@contextlib.contextmanager
def _shared_session(settings: Settings) -> Iterator[tuple[Settings, FolderForNow | None]]:
    """Let processes share the session also where it is to be kept in memory only: in a folder for now, in memory."""
    if settings.grant != "refresh_token":
        yield settings, None
        return
    if settings.token_store is not None:
        # Processes that go on in memory, each for itself, would use the same refresh token twice.
        try:
            settings.token_store.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=settings.token_store) as probe:
                probe.write(bytes(8192))
                probe.flush()
        except OSError as error:
            raise SettingsError(
                f"{TOKEN_STORE.env}: {settings.token_store} cannot be written to ({error.strerror}), and several "
                f"processes share the session there: mend that, or set {WORKERS.env} to 1"
            ) from None
        yield settings, None
        return
    try:
        folder = FolderForNow(MEMORY)
    except OSError as error:
        raise SettingsError(
            f"{WORKERS.env}: several processes share the session through the token store, and there is no place in "
            f"memory for one ({error.strerror}): set {TOKEN_STORE.env} to a folder, or this to 1"
        ) from None
    try:
        yield replace(settings, token_store=folder.path), folder
    finally:
        folder.leave()


def _taken_address(settings: Settings) -> str | None:
    if problem := cannot_listen(settings.host, settings.port):
        return f"{PORT.env}: {problem}"
    admin = settings.admin if settings.admin_is_set else None
    if admin is not None and (problem := cannot_listen(admin.host, admin.port, ADMIN)):
        return f"{ADMIN.env}: {problem}"
    return None


@contextlib.contextmanager
def _writable_confdir() -> Iterator[str]:
    """Give the folder in which mitmproxy keeps the CA that it makes: its usual one, or one for now in its place."""
    usual = Path(CONF_DIR).expanduser()
    try:
        usual.mkdir(parents=True, exist_ok=True)
        writable = os.access(usual, os.W_OK)
    except (OSError, RuntimeError):
        writable = False
    if writable:
        certificate_authority.make(usual)
        yield CONF_DIR
        return
    try:
        temporary = tempfile.TemporaryDirectory(prefix="mitmproxy-")
    except OSError:
        raise SettingsError(
            f"TMPDIR: mitmproxy needs a folder for its own CA, and neither this nor {usual} can be written to: set it "
            "to one that can, or mount one at /tmp"
        ) from None
    with temporary as folder:
        yield folder


def _ignore_cancelled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep early patch releases of Python 3.11 and 3.12 from reporting connections that end with the program."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Apply mitmdump's filter expression, as mitmdump itself does."""
    expression = " ".join(arguments.filter_args)
    names = ("save_stream_filter", "readfile_filter", "dumper_filter")
    return dict.fromkeys(names, expression) if expression else {}


@contextlib.contextmanager
def _upstream_trust(settings: Settings) -> Iterator[list[str]]:
    """Give the arguments with which mitmproxy trusts the system's CAs and `TLS_CA_FILE`; alone it trusts certifi's."""
    paths = ssl.get_default_verify_paths()
    folder = ["--set", f"ssl_verify_upstream_trusted_confdir={paths.capath}"] if paths.capath else []
    if settings.ca_file is None:
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={paths.cafile}"] if paths.cafile else []
        return
    with contextlib.ExitStack() as stack:
        try:
            # mitmproxy wants a file that holds all.
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".pem"))
            file.write(ca_bundle(settings.ca_file))
            file.flush()
        except OSError as error:
            raise SettingsError(
                f"{CA_FILE.env}: cannot be joined with the system's CAs ({error.strerror}): set TMPDIR to a folder "
                "that can be written to"
            ) from None
        yield [*folder, "--set", f"ssl_verify_upstream_trusted_ca={file.name}"]
