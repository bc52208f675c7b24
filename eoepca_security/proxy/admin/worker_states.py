"""Merges the states of several processes: the admin listener's process asks, and each worker answers."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import Metric

from eoepca_security.errors import IssuerUnavailable
from eoepca_security.proxy.admin.metrics import counts, from_json, lasting, merged, to_json
from eoepca_security.proxy.admin.recent_errors import MAX_RECENT
from eoepca_security.proxy.admin.status import READY_WAIT, AdminSource, State, Unready, status
from eoepca_security.proxy.config.settings import Address, Settings

ANSWER_TIMEOUT: Final = READY_WAIT + 0.1
"""Seconds to wait for a process's answer before leaving it out. Probes usually give up after one second."""

SILENT_TIMEOUT: Final = 0.2
"""The same for a process that did not answer the last time."""

_MAX_SIZE: Final = 128 * 1024

_SILENCE: Final = IssuerUnavailable("none of the proxy's processes answered")


@dataclass(frozen=True)
class Channel:
    """Connects the asking process with one worker, and with the workers that replace it.

    Both ends are open in all processes, so a question can be older than the worker that reads it. That is why answers
    carry the question's number.
    """

    asking: socket.socket
    answering: socket.socket

    @classmethod
    def make(cls) -> "Channel":
        """Create a channel. Call this before forking."""
        # Datagrams, so that a process that dies does not leave half an answer.
        asking, answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (asking, answering):
            end.setblocking(False)
        return cls(asking, answering)


def answer(line: Channel, subject: AdminSource) -> None:
    """Answer all questions in the running event loop, until it closes."""
    loop = asyncio.get_running_loop()
    answering: set[asyncio.Task[None]] = set()

    def asked() -> None:
        with contextlib.suppress(OSError, ValueError):
            question = json.loads(line.answering.recv(_MAX_SIZE))
            task = loop.create_task(_answer(line, subject, question["number"], question["about"]))
            answering.add(task)
            task.add_done_callback(answering.discard)

    loop.add_reader(line.answering, asked)


async def _answer(line: Channel, subject: AdminSource, number: int, about: str) -> None:
    content: Any
    if about == "readiness":
        error = await subject.ready()
        content = [error.code, error.detail] if error is not None else None
    else:
        content = {"status": await subject.status(), "families": to_json(await subject.families())}
    with contextlib.suppress(OSError):
        # The buffer may be full if the asking process gave up. Its next question makes room again.
        line.answering.send(json.dumps({"number": number, "pid": os.getpid(), "content": content}).encode())


@dataclass
class Workers:
    """All workers, seen as one."""

    settings: Settings
    lines: Sequence[Channel]
    quit: Callable[[], None]
    _number: int = field(default=0, init=False)
    _last: dict[Channel, tuple[int, list[Metric]]] = field(default_factory=dict, init=False)
    _past: list[Metric] = field(default_factory=list, init=False)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _asking: dict[str, "asyncio.Task[dict[Channel, Any]]"] = field(default_factory=dict, init=False)
    _silent_lines: set[Channel] = field(default_factory=set, init=False)

    def subject(self) -> AdminSource:
        """Return what the admin listener needs."""
        return AdminSource(self.ready, self.status, self.families, self.quit)

    async def ready(self) -> Unready | None:
        """Return why an answering worker has no token, or None if all have one."""
        answers = await self._ask("readiness")
        if not answers:
            return Unready(_SILENCE.code, str(_SILENCE))
        rejected = next((answer["content"] for answer in answers.values() if answer["content"]), None)
        return Unready(*rejected) if rejected else None

    async def status(self) -> Mapping[str, Any]:
        """Return the merged state for JSON."""
        answers = await self._tell()
        states = [answer["content"]["status"] for answer in answers.values()] or [self._silent()]
        return merged_states(states) | {"processes": len(answers)} | counts(self._counted(answers))

    async def families(self) -> Sequence[Metric]:
        """Return the metrics, including the counts of workers that have ended."""
        return self._counted(await self._tell())

    def _silent(self) -> dict[str, Any]:
        now = time.time()
        return status(
            State(
                at=now,
                started_at=now,
                listener=f"http://{Address(self.settings.host, self.settings.port)}",
                upstream=self.settings.upstream or "",
                in_container=False,
                settings=self.settings,
                token=None,
                claims={},
                session_ends_at=None,
                error=_SILENCE,
                last_refresh=None,
                last_answer=None,
                recent_errors=(),
                counts={},
                in_flight=0,
                held_bytes=0,
            )
        )

    async def _tell(self) -> dict[Channel, Any]:
        answers = await self._ask("state")
        for line, answer in answers.items():
            pid, families = self._last.get(line, (answer["pid"], []))
            if pid != answer["pid"]:
                self._past = merged([self._past, lasting(families)])
            self._last[line] = answer["pid"], from_json(answer["content"]["families"])
        return answers

    def _counted(self, answers: Mapping[Channel, Any]) -> list[Metric]:
        silent = [lasting(families) for line, (_, families) in self._last.items() if line not in answers]
        return merged([*(self._last[line][1] for line in answers), *silent, self._past])

    async def _ask(self, about: str) -> dict[Channel, Any]:
        """Ask all workers. Callers that ask the same at the same time share the answers."""
        asking = self._asking.get(about)
        if asking is None or asking.done():
            asking = self._asking[about] = asyncio.get_running_loop().create_task(self._ask_all(about))
        return await asyncio.shield(asking)

    async def _ask_all(self, about: str) -> dict[Channel, Any]:
        # One question at a time: a reader takes any answer that arrives, also one to another question.
        async with self._turn:
            self._number += 1
            answers = await asyncio.gather(*(self._ask_one(line, self._number, about) for line in self.lines))
        heard = {line: answer for line, answer in zip(self.lines, answers, strict=True) if answer is not None}
        self._silent_lines = set(self.lines) - set(heard)
        return heard

    async def _ask_one(self, line: Channel, number: int, about: str) -> Any:
        loop = asyncio.get_running_loop()
        # BlockingIOError: it has not read earlier questions. TimeoutError is an OSError too. ValueError: not JSON.
        with contextlib.suppress(OSError, ValueError):
            async with asyncio.timeout(SILENT_TIMEOUT if line in self._silent_lines else ANSWER_TIMEOUT):
                line.asking.send(json.dumps({"number": number, "about": about}).encode())
                while True:
                    answer = json.loads(await loop.sock_recv(line.asking, _MAX_SIZE))
                    if answer["number"] == number:
                        return answer
        return None


# As `/readyz`, which wants a token from each of them. `idle` comes last: an idle process says nothing about others that
# share its session.
_WORST_FIRST: Final = ("failing", "starting", "degraded", "ready", "idle")


def merged_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state for processes that share a session. Its counts must come from the merged metrics."""
    # The processes share the newest token, but one of them has it first.
    ahead = max(states, key=lambda state: state["token"]["ends_at"] if state["token"] else 0)
    worst = min(states, key=lambda state: _WORST_FIRST.index(state["state"]))
    sessions = [state["session"] for state in states]
    refreshes = [state["last_refresh"] for state in states if state["last_refresh"]]
    problems = {problem["title"]: problem for state in states for problem in state["problems"]}
    errors: dict[tuple[str, str], dict[str, Any]] = {}
    for error in sorted((error for state in states for error in state["recent_errors"]), key=lambda error: error["at"]):
        before = errors.pop((error["code"], error["detail"]), {"count": 0})
        errors[error["code"], error["detail"]] = dict(error) | {"count": error["count"] + before["count"]}
    return dict(ahead) | {
        "at": max(state["at"] for state in states),
        "state": worst["state"],
        "ready": worst["ready"],
        "code": worst["code"],
        "detail": worst["detail"],
        "session": next((session for session in sessions if session["login_needed"] == "now"), ahead["session"]),
        "problems": list(problems.values()),
        "last_refresh": max(refreshes, key=lambda refresh: float(refresh["at"]), default=None),
        "recent_errors": list(reversed(errors.values()))[:MAX_RECENT],
        "uptime_seconds": max(state["uptime_seconds"] for state in states),
        "requests_in_flight": sum(state["requests_in_flight"] for state in states),
        "held_bytes": sum(state["held_bytes"] for state in states),
        "processes": len(states),
    }
