"""Child processes whose output is kept in a file and whose whole process group ends with the test."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.1
STOP_SECONDS = 20.0


class ChildError(Exception):
    """A child ended or hung when it should not have; the message carries its output."""


@dataclass(frozen=True)
class Child:
    """A running process and the file that takes its stdout and stderr."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Poll `condition` until it holds; raise ChildError when the process ends or `seconds` pass before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise ChildError(f"ended with exit code {self.process.returncode}:\n{self.output()}")
            if time.monotonic() > deadline:
                raise ChildError(f"not ready after {seconds:.0f} s:\n{self.output()}")
            time.sleep(POLL_SECONDS)

    def exit_code(self, seconds: float) -> int:
        """Wait for the process to end by itself; raise ChildError when it does not within `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ChildError(f"still running after {seconds:.0f} s:\n{self.output()}") from None

    def stop(self) -> None:
        """End the process group: SIGTERM, and SIGKILL for what is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)


@contextmanager
def running(command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Iterator[Child]:
    """Run `command` in a process group of its own and stop it on the way out."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    child = Child(process, log)
    try:
        yield child
    finally:
        child.stop()


def accepts(port: int) -> bool:
    """Whether something on loopback accepts connections on `port`."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True
