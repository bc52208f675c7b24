"""The supervisor: starts several processes for one listener, replaces those that die, and stops them all.

It forks them after importing everything and starting to listen. All processes accept from the same queue, so a process
that dies loses no waiting connection.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from eoepca_security.proxy.addons.drain import SAME_SIGNAL

END_TIMEOUT: Final = 12.0
"""Seconds that the processes have to stop before they are killed."""

MAX_DELAY: Final = 5.0
"""The longest delay in seconds before restarting a process that keeps failing."""

QUIT: Final = signal.SIGUSR1
"""Tells the supervisor to stop. Unlike with other signals, a second one does not stop it at once."""

_SETTLED_AFTER: Final = 30.0
_CRASHED: Final = 70  # sysexits.h: an internal software error

# Exit codes of a first start that cannot succeed: an error, or wrong settings.
_HOPELESS: Final = (1, 2)


@dataclass
class Part:
    """What one process runs, and its history.

    `run` returns an exit code. Its arguments are whether this is the first start, and a file descriptor that reaches
    its end when this part must stop or the supervisor is gone. Parts that are not workers stop last.
    """

    run: Callable[[bool, int], int]
    is_worker: bool = True
    starts: int = field(default=0, init=False)
    failures: int = field(default=0, init=False)
    started_at: float = field(default=0.0, init=False)


def supervise(
    parts: Sequence[Part],
    *,
    on_end: Callable[[], None],
    on_worker_exit: Callable[[int, str], None],
    on_hangup: Callable[[], bool] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Run each part in a process of its own until one of them or a signal stops them all; return the exit code.

    `on_end` is called when the supervisor begins to stop, and `on_worker_exit` with the index and fate of each part
    that died. `on_hangup` is called on SIGHUP, and returns whether all parts get that signal, too, which is blocked
    when they start; without it, SIGHUP stops them.
    """
    return _Supervisor(parts, on_end, on_worker_exit, on_hangup, now).run()


class _Supervisor:
    def __init__(
        self,
        parts: Sequence[Part],
        on_end: Callable[[], None],
        on_worker_exit: Callable[[int, str], None],
        on_hangup: Callable[[], bool] | None,
        now: Callable[[], float],
    ) -> None:
        self._parts = parts
        self._on_end = on_end
        self._on_worker_exit = on_worker_exit
        self._on_hangup = on_hangup
        self._now = now
        self._running: dict[int, Part] = {}
        self._due: dict[float, Part] = {}
        self._exit_code: int | None = None
        self._are_others_ending = False
        self._ends_since = self._killed_at = float("inf")
        self._signals = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, QUIT}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # otherwise it must outlive the terminal (nohup)
            self._signals.add(signal.SIGHUP)
        # Closing these pipes tells the workers (True) and the other parts (False) to stop, also if the supervisor is
        # killed. Signals would be ambiguous: they can come from elsewhere, and a second one means to stop at once.
        self._lifelines = {True: os.pipe(), False: os.pipe()}

    def run(self) -> int:
        # Wait for signals instead of handling them, so that none is missed and none interrupts other work.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        for part in self._parts:
            self._start(part)
        while self._running or self._due:
            received = signal.sigtimedwait(self._signals, self._patience())
            if received is not None and received.si_signo == signal.SIGHUP and self._on_hangup is not None:
                if self._exit_code is None and self._on_hangup():
                    self._send(signal.SIGHUP)
            elif received is not None and received.si_signo != signal.SIGCHLD:
                if received.si_signo != QUIT and self._now() - self._ends_since > SAME_SIGNAL:
                    self._send(signal.SIGTERM)
                self._end(0)
            self._reap()
            self._start_due()
            if self._now() >= self._killed_at:
                self._send(signal.SIGKILL)
                self._killed_at = float("inf")
        return self._exit_code or 0

    def _patience(self) -> float:
        return max(0.0, min([*self._due, self._killed_at, self._now() + 60]) - self._now())

    def _start(self, part: Part) -> None:
        is_first = part.starts == 0
        part.starts += 1
        part.started_at = self._now()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        try:
            pid = os.fork()
        except OSError:
            if is_first:
                raise
            self._replace(part, "cannot be started")
            return
        if pid:
            self._running[pid] = part
            return
        code = _CRASHED
        try:
            # Only the supervisor gets a Ctrl-C from the terminal: for the workers it would be a second signal.
            os.setpgid(0, 0)
            for _, end in self._lifelines.values():
                os.close(end)
            # SIGHUP waits until the part has a handler for it: without one, it would end the process.
            kept_back = {signal.SIGHUP} if self._on_hangup is not None else set()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals - kept_back)
            code = part.run(is_first, self._lifelines[part.is_worker][0])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else _CRASHED
        except BaseException:  # noqa: BLE001  the forked process must not return into the supervisor's code
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            part = self._running.pop(pid, None)
            if part is not None:
                self._has_ended(part, os.waitstatus_to_exitcode(status))

    def _has_ended(self, part: Part, code: int) -> None:
        if self._exit_code is not None:
            self._end_others()
        elif code == 0 or (part.starts == 1 and code in _HOPELESS):
            self._end(code)
        else:
            self._replace(part, f"was ended by {signal.Signals(-code).name}" if code < 0 else "failed")

    def _replace(self, part: Part, fate: str) -> None:
        lived = self._now() - part.started_at
        part.failures = 1 if lived > _SETTLED_AFTER else part.failures + 1
        delay = 0.0 if part.failures == 1 else min(2.0 ** (part.failures - 2), MAX_DELAY)
        self._due[self._now() + delay] = part
        # Standard error may be closed.
        with contextlib.suppress(Exception):
            self._on_worker_exit(self._parts.index(part), fate)

    def _start_due(self) -> None:
        for at in [at for at in self._due if at <= self._now()]:
            self._start(self._due.pop(at))

    def _end(self, code: int) -> None:
        if self._exit_code is None:
            self._exit_code = code
            self._ends_since = self._now()
            self._killed_at = self._ends_since + END_TIMEOUT
            self._due.clear()
            self._on_end()
            os.close(self._lifelines[True][1])
            self._end_others()

    def _end_others(self) -> None:
        """Stop the other parts once no worker is left."""
        if not any(part.is_worker for part in self._running.values()) and not self._are_others_ending:
            self._are_others_ending = True
            os.close(self._lifelines[False][1])

    def _send(self, number: int) -> None:
        for pid in self._running:
            os.kill(pid, number)
