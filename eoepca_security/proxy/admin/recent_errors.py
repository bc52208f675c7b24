"""The most recent errors, each kind once."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from eoepca_security.oauth.text import printable

MAX_RECENT: Final = 20
"""How many different errors are kept."""


@dataclass(frozen=True)
class RecentError:
    """An error that occurred `count` times, last `at` (epoch seconds). `code` is part of the public interface.

    `detail` says what happened. `remedy` is empty if `detail` includes it. `service` is the name of the service that it
    is about, or empty.
    """

    code: str
    detail: str
    at: float
    count: int = 1
    remedy: str = ""
    service: str = ""


class RecentErrors:
    """The last errors of different kinds, newest first. `now` returns epoch seconds."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._latest: deque[RecentError] = deque(maxlen=MAX_RECENT)

    def add(self, code: str, detail: str, remedy: str = "", service: str = "") -> RecentError:
        """Record an error, or count it if it is already recorded; return what is recorded now."""
        detail = printable(detail, 500)
        new = RecentError(code, detail, self._now(), remedy=printable(remedy, 500), service=service)
        for old in self._latest:
            if (old.code, old.detail, old.service) == (code, detail, service):
                self._latest.remove(old)
                new = replace(new, count=old.count + 1)
                break
        # A full deque drops the oldest at its other end.
        self._latest.appendleft(new)
        return new

    def latest(self) -> tuple[RecentError, ...]:
        """Return the recorded errors."""
        return tuple(self._latest)
