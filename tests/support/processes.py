"""The proxy, and other programs, as processes that tests start and watch."""

import contextlib
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parent.parent.parent
STARTED = re.compile(r"listening at http://127\.0\.0\.1:(\d+) -> ")
ADMIN = re.compile(r"admin listener at (http://\S+)")


@dataclass
class ProxyProcess:
    """The proxy as its users run it; `url` is empty when it ended before it listened."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        self.process.stdout.close()
        with self._changed:
            self.lines.append("<end of output>")
            self._changed.notify_all()

    @property
    def output(self) -> str:
        """Everything it has printed so far."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: re.Pattern[str], timeout: float = 75) -> re.Match[str] | None:
        """Wait for a line; None when the output ended without it."""

        def found() -> bool:
            return any(pattern.search(line) for line in self.lines) or "<end of output>" in self.lines

        with self._changed:
            assert self._changed.wait_for(found, timeout), f"no {pattern.pattern!r} in:\n{self.output}"
        return next((match for line in self.lines if (match := pattern.search(line))), None)

    def wait_until_started(self) -> Self:
        match = self.wait_for(STARTED)
        self.url = f"http://127.0.0.1:{match[1]}" if match else ""
        return self

    def wait_until_ended(self, timeout: float = 30) -> int:
        """Return its exit code, once all of its output is here."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def stop_in_haste(self) -> int:
        """Tell it to end again and again until it does; return its exit code."""
        while True:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.wait_until_ended(0.1)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait_until_ended(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


StartProxy = Callable[..., ProxyProcess]


def run_process(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=dict(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def admin_of(proxy: ProxyProcess) -> str:
    match = proxy.wait_for(ADMIN)
    assert match, proxy.output
    return match[1]
