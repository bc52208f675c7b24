"""Merges the states of several processes: the admin listener's process asks, and each worker answers."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import Metric

from eoepca_security.errors import IssuerUnavailable
from eoepca_security.proxy.admin.metrics import counts, from_json, lasting, merged, to_json
from eoepca_security.proxy.admin.recent_errors import MAX_RECENT
from eoepca_security.proxy.admin.status import READY_WAIT, AdminSource, ServiceState, State, Unready, status
from eoepca_security.proxy.admin.ways import destination
from eoepca_security.proxy.config.services import services_of
from eoepca_security.proxy.config.settings import Address, Settings

ANSWER_TIMEOUT: Final = READY_WAIT + 0.1
"""Seconds to wait for a process's answer before leaving it out. Probes usually give up after one second."""

SILENT_TIMEOUT: Final = 0.2
"""The same for a process that did not answer the last time."""

_MAX_SIZE: Final = 128 * 1024
_MAX_PART: Final = _MAX_SIZE // 2 - 1024  # a part of a text may double when it is put into JSON
_MAX_PARTS: Final = 256

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
    answering = _Answering(line, subject)
    asyncio.get_running_loop().add_reader(line.answering, answering.asked)


class _Answering:
    """Answers questions as text, of which it sends the first part. More are sent when the asking process wants them.

    So a long answer needs no more room in the channel than a short one.
    """

    def __init__(self, line: Channel, subject: AdminSource) -> None:
        self._line = line
        self._subject = subject
        self._tasks: set[asyncio.Task[None]] = set()
        self._long: tuple[int, str] = 0, ""

    def asked(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            question = json.loads(self._line.answering.recv(_MAX_SIZE))
            task = asyncio.get_running_loop().create_task(self._answer(question))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, question: Mapping[str, Any]) -> None:
        number, start = question["number"], 0
        match question["about"]:
            case "rest":
                known, text = self._long
                start = question["from"]
                if known != question["of"]:
                    return
            case "readiness":
                error = await self._subject.ready(question["service"])
                text = json.dumps([error.code, error.detail] if error is not None else None)
            case _:
                families = to_json(await self._subject.families())
                text = json.dumps({"status": await self._subject.status(), "families": families})
        end = start + _MAX_PART
        if start == 0 and end < len(text):
            self._long = number, text
        part = {"number": number, "pid": os.getpid(), "part": text[start:end], "is_last": end >= len(text)}
        with contextlib.suppress(OSError):
            # The buffer may be full if the asking process gave up. Its next question makes room again.
            self._line.answering.send(json.dumps(part).encode())


@dataclass
class Workers:
    """All workers, seen as one."""

    settings: Settings
    lines: Sequence[Channel]
    quit: Callable[[], None]
    _number: int = field(default=0, init=False)
    _last: dict[Channel, tuple[int, list[Metric]]] = field(default_factory=dict, init=False)
    _past: list[Metric] = field(default_factory=list, init=False)
    _asking: dict[tuple[str, str | None], "asyncio.Task[dict[Channel, Any]]"] = field(default_factory=dict, init=False)
    _waiting: dict[int, "asyncio.Future[Mapping[str, Any]]"] = field(default_factory=dict, init=False)
    _silent_lines: set[Channel] = field(default_factory=set, init=False)

    def subject(self) -> AdminSource:
        """Return what the admin listener needs."""
        return AdminSource(self.ready, self.services, self.status, self.families, self.quit)

    def services(self) -> Sequence[str]:
        """Return the services' names."""
        return [service.name for service in services_of(self.settings)]

    async def ready(self, service: str | None = None) -> Unready | None:
        """Return why an answering worker has no token for a service or the session, or None if all have one."""
        answers = await self._ask("readiness", service)
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
                upstream=destination(self.settings) if self.settings.services else "",
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
                services=tuple(ServiceState(service, error=_SILENCE) for service in self.settings.services),
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

    async def _ask(self, about: str, service: str | None = None) -> dict[Channel, Any]:
        """Ask all workers. Callers that ask the same at the same time share the answers."""
        asking = self._asking.get((about, service))
        if asking is None or asking.done():
            loop = asyncio.get_running_loop()
            asking = self._asking[about, service] = loop.create_task(self._ask_all(about, service))
        return await asyncio.shield(asking)

    async def _ask_all(self, about: str, service: str | None) -> dict[Channel, Any]:
        answers = await asyncio.gather(*(self._ask_one(line, about, service) for line in self.lines))
        heard = {line: answer for line, answer in zip(self.lines, answers, strict=True) if answer is not None}
        self._silent_lines = set(self.lines) - set(heard)
        return heard

    async def _ask_one(self, line: Channel, about: str, service: str | None) -> dict[str, Any] | None:
        asyncio.get_running_loop().add_reader(line.asking, self._hear, line)
        # BlockingIOError: it has not read earlier questions. TimeoutError is an OSError too. ValueError: not JSON.
        with contextlib.suppress(OSError, ValueError):
            async with asyncio.timeout(SILENT_TIMEOUT if line in self._silent_lines else ANSWER_TIMEOUT):
                first = await self._answered(line, {"about": about, "service": service})
                parts, is_last = [first["part"]], first["is_last"]
                while not is_last and len(parts) < _MAX_PARTS:
                    rest = {"about": "rest", "of": first["number"], "from": len(parts) * _MAX_PART}
                    following = await self._answered(line, rest)
                    parts.append(following["part"])
                    is_last = following["is_last"]
                return {"pid": first["pid"], "content": json.loads("".join(parts))}
        return None

    async def _answered(self, line: Channel, question: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ask one question, and wait for its answer."""
        self._number += 1
        number = self._number
        waiting: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            line.asking.send(json.dumps({"number": number, **question}).encode())
            return await waiting
        finally:
            del self._waiting[number]

    def _hear(self, line: Channel) -> None:
        """Hand an answer to whoever waits for it; answers may come too late, or to a process that has ended."""
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads(line.asking.recv(_MAX_SIZE))
            waiting = self._waiting.get(answer["number"])
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)


# As `/readyz`, which wants a token from each of them. `idle` comes last: an idle process says nothing about others that
# share its session.
_WORST_FIRST: Final = ("failing", "starting", "degraded", "ready", "idle")


# A process fetches a token for a service once it gets a request for it.
_WORST_SERVICE_FIRST: Final = ("failing", "degraded", "ready", "idle", "starting")


def merged_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state for processes that share a session. Its counts must come from the merged metrics."""
    # The processes share the newest token, but one of them has it first.
    ahead = _ahead(states)
    worst = min(states, key=lambda state: _WORST_FIRST.index(state["state"]))
    sessions = [state["session"] for state in states]
    problems = {(one.get("service"), one["title"]): one for state in states for one in state["problems"]}
    errors: dict[tuple[str, str, str], dict[str, Any]] = {}
    for error in sorted((error for state in states for error in state["recent_errors"]), key=lambda error: error["at"]):
        key = error["code"], error["detail"], error.get("service", "")
        before = errors.pop(key, {"count": 0})
        errors[key] = dict(error) | {"count": error["count"] + before["count"]}
    return dict(ahead) | {
        "at": max(state["at"] for state in states),
        "state": worst["state"],
        "ready": worst["ready"],
        "code": worst["code"],
        "detail": worst["detail"],
        "session": next((session for session in sessions if session["login_needed"] == "now"), ahead["session"]),
        "problems": list(problems.values()),
        "last_refresh": _latest(state["last_refresh"] for state in states),
        "recent_errors": list(reversed(errors.values()))[:MAX_RECENT],
        "uptime_seconds": max(state["uptime_seconds"] for state in states),
        "requests_in_flight": sum(state["requests_in_flight"] for state in states),
        "held_bytes": sum(state["held_bytes"] for state in states),
        "services": [_merged_service(one) for one in _by_name(states)],
        "processes": len(states),
    }


def _by_name(states: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return for each service its state in each process."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for service in (service for state in states for service in state["services"]):
        found.setdefault(service["name"], []).append(service)
    return list(found.values())


def _merged_service(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state for a service in several processes, each of which may have a token of its own for it."""
    ahead, worst = _ahead(states), min(states, key=lambda state: _WORST_SERVICE_FIRST.index(state["state"]))
    return dict(ahead) | {
        "state": worst["state"],
        "code": worst["code"],
        "detail": worst["detail"],
        "last_refresh": _latest(state["last_refresh"] for state in states),
        "last_answer": _latest(state["last_answer"] for state in states),
    }


def _ahead(states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(states, key=lambda state: state["token"]["ends_at"] if state["token"] else 0)


def _latest(events: Iterable[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    return max((event for event in events if event is not None), key=lambda event: float(event["at"]), default=None)
