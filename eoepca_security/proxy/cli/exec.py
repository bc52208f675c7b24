"""`exec`: runs a command whose requests to the services get their tokens, by a proxy that only the command can use."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.tools.dump import DumpMaster

from eoepca_security.errors import SettingsError, TokenError
from eoepca_security.proxy.addons.addresses import ca_for_clients
from eoepca_security.proxy.addons.drain import disconnect, has_terminal, stop_listening
from eoepca_security.proxy.cli.exec_environment import environment, inherited_proxies, joined_cas
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.policy.remedies import command_remedy, runs_in_container, told
from eoepca_security.proxy.runtime.output import say
from eoepca_security.proxy.runtime.serve import run as run_proxy

INTERRUPTED: Final = 130
NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
"""The exit codes of a shell."""

FORWARDED: Final = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""The signals that the command gets from us."""

FROM_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)
"""The signals that the terminal sends to all processes in the foreground."""

STOPS: Final = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""The signals of job control. We stop when the command does, and not before: it may want to do something first."""

PYTHON_IGNORES: Final = (signal.SIGPIPE, signal.SIGXFSZ)

_TOKENS: Final = logging.getLogger("eoepca_security.session.token_cycle")


def run(settings: Settings, command: Sequence[str]) -> int:
    """Run a command with the proxy, and return its exit code, or 128 + n if signal n ended it.

    The command is not started without a token: then the code is 1. Raises SettingsError.
    """
    if names := list(inherited_proxies(os.environ)):
        unset = " ".join(f"-u {name}" for name in names)
        raise SettingsError(
            f"{names[0]}: names another proxy, which the requests of the command cannot go through as well: unset it, "
            f"with `env {unset}` before this command"
        )
    password = f"exec:{secrets.token_hex(32)}"
    # Files with tokens are kept by a proxy for others: we would remove them at the end.
    services = tuple(replace(service, token_file=None) for service in settings.services)
    settings = replace(settings, proxy_auth=password, services=services)
    # The first error is ours to tell.
    _TOKENS.setLevel(logging.ERROR)
    with _private_folder() as folder:
        child = _Child(settings, command, folder / "cas.pem")
        # Standard output is the command's own. The proxy only shows warnings and errors.
        with contextlib.redirect_stdout(sys.stderr):
            code = run_proxy(settings, ["--set", "termlog_verbosity=warn"], on_started=child.start)
        return child.wait(code)


class _Child:
    """The command, as a process in our own process group: the terminal treats it as if there were no proxy."""

    def __init__(self, settings: Settings, command: Sequence[str], ca_file: Path) -> None:
        self._settings = settings
        self._command = command
        self._ca_file = ca_file
        every = (*FORWARDED, *STOPS)
        self._ignored = {number for number in every if signal.getsignal(number) is signal.SIG_IGN}
        self._pid: int | None = None
        self._code: int | None = None
        self._watcher: threading.Thread | None = None

    def start(self, master: DumpMaster, proxy_url: str, error: TokenError | None) -> None:
        """Start the command, in the event loop of the proxy, which ends with it."""
        _TOKENS.setLevel(logging.NOTSET)
        try:
            if error is not None:
                ended = replace(self._settings, command=self._settings.command.ended)
                remedy = command_remedy(error, ended, in_container=runs_in_container())
                say(f"{error.code}: {told(error, remedy)}", err=True)
                return
            self._take_signals(master.event_loop)
            self._pid = self._spawn(proxy_url)
            if self._pid is not None:
                self._watcher = threading.Thread(target=self._watch, args=(master, self._pid), daemon=True)
                self._watcher.start()
        finally:
            if self._pid is None:  # whatever went wrong
                self._code = self._code or 1
                master.shutdown()

    def wait(self, proxy_code: int) -> int:
        """Wait until the command has ended, and return the exit code. `proxy_code` is that of the proxy."""
        if self._watcher is not None:
            self._watcher.join()
        if self._code is not None:
            return self._code
        return proxy_code or INTERRUPTED  # while we waited for a token

    def _spawn(self, proxy_url: str) -> int | None:
        """Start the process and return its ID; if that fails, say why, and return None."""
        scheme, _, address = proxy_url.partition("://")
        try:
            more = [file for file in (self._settings.ca_file, ca_for_clients()) if file is not None]
            self._ca_file.write_bytes(joined_cas(os.environ, *more))
        except OSError as error:
            say(f"TMPDIR: cannot write the CAs for the command ({error.strerror}): set it to another folder", err=True)
            return None
        url = f"{scheme}://{self._settings.proxy_auth}@{address}"
        variables = environment(os.environ, self._settings, url, self._ca_file)
        defaults = {*STOPS, *PYTHON_IGNORES} - self._ignored
        try:
            return os.posix_spawnp(self._command[0], list(self._command), variables, setsigdef=defaults)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            say(f"{self._command[0]}: cannot be started: {reason}", err=True)
            self._code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
            return None

    def _take_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pass signals on. What is ignored now (nohup) stays so, in the command too."""
        for number in FORWARDED:
            if number in self._ignored:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
            else:
                loop.add_signal_handler(number, self._forward, number)
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)

    def _forward(self, number: signal.Signals) -> None:
        if self._pid is None or self._code is not None or (number in FROM_TERMINAL and _is_in_foreground()):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._pid, number)

    def _watch(self, master: DumpMaster, pid: int) -> None:
        """Wait for the end of the command in a thread, and stop and go on with it as a shell expects of a job."""
        changes = os.WUNTRACED | os.WCONTINUED
        _, status = os.waitpid(pid, changes)
        while not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            changed = 0
            if os.WIFSTOPPED(status) and has_terminal():  # otherwise nobody would let us go on
                # To this thread, so that it has stopped before the next line.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
                # A shell lets the command go on together with us, and it may have stopped again since.
                changed, status = os.waitpid(pid, changes | os.WNOHANG)
                if changed == 0:
                    os.kill(pid, signal.SIGCONT)
            if changed == 0:
                _, status = os.waitpid(pid, changes)
        code = os.waitstatus_to_exitcode(status)
        self._code = code if code >= 0 else 128 - code
        with contextlib.suppress(RuntimeError):  # the proxy has ended before
            asyncio.run_coroutine_threadsafe(_end(master), master.event_loop)


async def _end(master: DumpMaster) -> None:
    """End the proxy without waiting for requests of what the command may have left running."""
    server = master.addons.get("proxyserver")
    if isinstance(server, Proxyserver):
        await stop_listening(server)
        await disconnect(server)
    master.shutdown()


def _is_in_foreground() -> bool:
    """Return whether this process group is the one in the foreground of its terminal, which sends signals to all."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="oidc-proxy-")
    except OSError as error:
        raise SettingsError(
            f"TMPDIR: a file with CAs for the command needs a writable folder ({error.strerror}): set it to one"
        ) from None
    with folder as path:
        yield Path(path)
