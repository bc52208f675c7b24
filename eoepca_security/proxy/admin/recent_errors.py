"""The errors of the last while, each kind once."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from eoepca_security.oauth.text import printable

MAX_RECENT: Final = 20
"""How many different errors are remembered."""


@dataclass(frozen=True)
class RecentError:
    """An error that occurred `count` times, last `at` (epoch seconds); `code` is of the public interface.

    `detail` says what happened, `remedy` what to do about it, where `detail` does not.
    """

    code: str
    detail: str
    at: float
    count: int = 1
    remedy: str = ""


class RecentErrors:
    """The last errors of different kinds, newest first; `now` is epoch seconds."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._latest: deque[RecentError] = deque(maxlen=MAX_RECENT)

    def add(self, code: str, detail: str, remedy: str = "") -> None:
        """Remember an error; one that is remembered already is counted."""
        detail = printable(detail, 500)
        new = RecentError(code, detail, self._now(), remedy=printable(remedy, 500))
        for old in self._latest:
            if (old.code, old.detail) == (code, detail):
                self._latest.remove(old)
                new = replace(new, count=old.count + 1)
                break
        # A full one drops what is at its other end: the oldest.
        self._latest.appendleft(new)

    def latest(self) -> tuple[RecentError, ...]:
        """Return what is remembered."""
        return tuple(self._latest)
