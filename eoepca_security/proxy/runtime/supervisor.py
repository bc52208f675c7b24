"""Several processes that serve one listener, and the one that starts them, replaces those that die, and ends them all.

They are forked from a process that has imported everything and listens already: a connection waits in the one queue
until any of them takes it, so none is lost when one of them dies before that.
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
"""Seconds that the processes have to end when they are told to; then they are killed."""

MAX_DELAY: Final = 5.0
"""Longest time in seconds before the next attempt to replace a process that ends again and again."""

QUIT: Final = signal.SIGUSR1
"""Tells the supervisor to end; unlike others a second one does not mean haste."""

_SETTLED_AFTER: Final = 30.0
_CRASHED: Final = 70  # sysexits.h: an internal software error

# The first start ends with these where it cannot succeed: a fault, wrong settings.
_HOPELESS: Final = (1, 2)


@dataclass
class Part:
    """What one process does, and how that went so far.

    `run` returns an exit code. It is told whether this is the first time, and given a file descriptor that reaches its
    end when this part is to end, or the supervisor is gone. Parts that are no workers end last.
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
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Run all parts, each in a process of its own, until one of them or a signal ends them; return the exit code.

    `on_end` is called when the end begins, `mourn` with the number and the fate of each part that died.
    """
    return _Supervisor(parts, on_end, on_worker_exit, now).run()


class _Supervisor:
    def __init__(
        self,
        parts: Sequence[Part],
        on_end: Callable[[], None],
        on_worker_exit: Callable[[int, str], None],
        now: Callable[[], float],
    ) -> None:
        self._parts = parts
        self._on_end = on_end
        self._on_worker_exit = on_worker_exit
        self._now = now
        self._running: dict[int, Part] = {}
        self._due: dict[float, Part] = {}
        self._exit_code: int | None = None
        self._are_others_ending = False
        self._ends_since = self._killed_at = float("inf")
        self._signals = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, QUIT}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # it is to outlive the terminal otherwise (nohup)
            self._signals.add(signal.SIGHUP)
        # Their ends tell workers, and the others, that they are to end, or that we are gone, however that came about. A
        # signal may come from elsewhere, too, and a second one means haste.
        self._lifelines = {True: os.pipe(), False: os.pipe()}

    def run(self) -> int:
        # Waited for instead of handled: nothing is missed, and nothing happens at a bad time.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        for part in self._parts:
            self._start(part)
        while self._running or self._due:
            received = signal.sigtimedwait(self._signals, self._patience())
            if received is not None and received.si_signo != signal.SIGCHLD:
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
            # A Ctrl-C at the terminal is ours to pass on; as a second signal it would end them at once.
            os.setpgid(0, 0)
            for _, end in self._lifelines.values():
                os.close(end)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
            code = part.run(is_first, self._lifelines[part.is_worker][0])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else _CRASHED
        except BaseException:  # noqa: BLE001  nothing may return to what the other process does
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
        # Nobody may be there to read it.
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
        """Let those that are no workers end once no worker is left."""
        if not any(part.is_worker for part in self._running.values()) and not self._are_others_ending:
            self._are_others_ending = True
            os.close(self._lifelines[False][1])

    def _send(self, number: int) -> None:
        for pid in self._running:
            os.kill(pid, number)
