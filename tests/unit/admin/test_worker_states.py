"""Several processes as one: the answers to questions, and how they are put together."""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import Metric

from eoepca_security.errors import CredentialsRejected
from eoepca_security.proxy.admin import worker_states
from eoepca_security.proxy.admin.metrics import Metrics, counts, exposition, from_json, merged, to_json
from eoepca_security.proxy.admin.page import page
from eoepca_security.proxy.admin.recent_errors import RecentError
from eoepca_security.proxy.admin.status import AdminSource, Answer, Refresh, ServiceState, Unready, status
from eoepca_security.proxy.admin.worker_states import Channel, Workers, answer
from eoepca_security.proxy.config.services import MAX_SERVICES
from eoepca_security.session.session import AccessToken
from tests.support.services import DATA, PLAIN, STAC, with_services
from tests.support.state import NOW, SETTINGS, STATE


class Process:
    """What a process that serves requests would tell; several of them in this one."""

    def __init__(self, name: str, ends_at: float) -> None:
        self.failures: dict[str | None, Unready] = {}
        self.metrics = Metrics(lambda: 2, lambda: 2)
        self.names: list[str] | None = None
        self.metrics.token_ends(ends_at)
        self.state = replace(
            STATE,
            claims={"sub": name},
            token=AccessToken(name, ends_at - 60, ends_at),
            last_refresh=Refresh(ends_at - 60, 0.1, None),
        )

    def subject(self) -> AdminSource:
        return AdminSource(self._ready, list, self._status, self._families, lambda: None)

    async def _ready(self, service: str | None) -> Unready | None:
        return self.failures.get(service)

    async def _status(self) -> Mapping[str, Any]:
        return status(self.state)

    async def _families(self) -> list[Metric]:
        return self.metrics.families(self.names)


@pytest.fixture
def lines() -> Iterator[list[Channel]]:
    lines = [Channel.make() for _ in range(2)]
    yield lines
    for line in lines:
        line.asking.close()
        line.answering.close()


async def test_processes_are_told_of_as_one(lines: list[Channel]) -> None:
    processes = [Process("one", 1000.0), Process("other", 2000.0)]
    for line, process in zip(lines, processes, strict=True):
        answer(line, process.subject())
        process.metrics.request_ended(200)
        process.metrics.refreshed(None, 0.3)
    processes[0].metrics.request_ended(502, "credentials_rejected")
    mishap = RecentError("issuer_unavailable", "it is down", NOW - 60, 3)
    for process, at in zip(processes, (NOW - 60, NOW - 30), strict=True):
        process.state = replace(process.state, recent_errors=(replace(mishap, at=at),))
    processes[0].state = replace(processes[0].state, token=None, error=CredentialsRejected("log in"))
    crew = Workers(SETTINGS, lines, lambda: None)

    told = await crew.status()
    assert (told["processes"], told["requests_in_flight"], told["listener"]) == (2, 4, "http://127.0.0.1:8080")
    assert (told["identity"], told["token"]["ends_at"], told["last_refresh"]["at"]) == ({"sub": "other"}, 2000, 1940)
    assert (told["state"], told["ready"], told["code"]) == ("failing", False, "credentials_rejected")
    assert told["detail"].startswith("log in; ")
    assert len(told["problems"]) == 1
    assert told["recent_errors"] == [{"at": NOW - 30, "code": "issuer_unavailable", "detail": "it is down", "count": 6}]
    assert (told["requests"], told["errors"]) == ({"2xx": 2, "5xx": 1}, {"credentials_rejected": 1})
    assert told["refreshes"] == {"success": 2}
    assert "other" in page(told)

    text = exposition(await crew.families(), "")[0].decode()
    assert 'oidc_proxy_requests_total{code="",status_class="2xx"} 2.0\n' in text
    assert 'oidc_proxy_refresh_duration_seconds_bucket{le="0.5"} 2.0\n' in text
    assert "oidc_proxy_refresh_duration_seconds_sum 0.6\n" in text
    assert "oidc_proxy_token_expiry_timestamp_seconds 2000.0\n" in text
    assert "oidc_proxy_requests_in_flight 4.0\n" in text
    created = min(s.value for p in processes for f in p.metrics.families() for s in f.samples if "created" in s.name)
    assert created in {s.value for family in await crew.families() for s in family.samples}


async def test_they_are_ready_when_all_that_answer_are(lines: list[Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_states, "ANSWER_TIMEOUT", 0.1)
    crew, processes = Workers(SETTINGS, lines, lambda: None), [Process("a", 1.0), Process("b", 1.0)]
    silent = await crew.ready()
    assert silent is not None
    assert silent.code == "issuer_unavailable"
    told = await crew.status()
    assert (told["ready"], told["processes"], told["state"]) == (False, 0, "failing")
    assert "none of the proxy" in page(told)
    answer(lines[0], processes[0].subject())
    assert await crew.ready() is None  # and the questions that it found waiting have confused nobody
    answer(lines[1], processes[1].subject())
    assert await crew.ready() is None
    processes[1].failures[None] = Unready("credentials_rejected", "log in again")
    assert await crew.ready() == processes[1].failures[None]


async def test_questions_at_the_same_time_get_their_own_answers(lines: list[Channel]) -> None:
    for line, process in zip(lines, (Process("a", 1.0), Process("b", 1.0)), strict=True):
        answer(line, process.subject())
    crew = Workers(SETTINGS, lines, lambda: None)
    answers = await asyncio.gather(*(crew.status() if i % 2 else crew.ready() for i in range(10)))
    assert all(a is None for a in answers[::2])
    assert all(isinstance(a, Mapping) and a["processes"] == 2 for a in answers[1::2])


async def test_a_process_that_reads_nothing_holds_nobody_up(lines: list[Channel]) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            lines[1].asking.send(b"unread")
    answer(lines[0], Process("a", 1.0).subject())
    assert await Workers(SETTINGS, lines, lambda: None).ready() is None


async def test_whoever_asks_the_same_shares_the_answer(lines: list[Channel]) -> None:
    process, asked = Process("a", 1.0), 0

    async def count(_: str | None) -> Unready | None:
        nonlocal asked
        asked += 1
        return None

    answer(lines[0], replace(process.subject(), ready=count))
    crew = Workers(SETTINGS, lines[:1], lambda: None)
    assert await asyncio.gather(*(crew.ready() for _ in range(15))) == [None] * 15
    assert asked == 1


async def test_what_is_no_answer_is_passed_over(lines: list[Channel]) -> None:
    lines[0].answering.send(b'{"number": 1, "cut')
    answered = await Workers(SETTINGS, lines[:1], lambda: None).ready()
    assert answered is not None
    assert answered.code == "issuer_unavailable"


async def test_what_is_no_question_is_passed_over(lines: list[Channel]) -> None:
    answer(lines[0], Process("a", 1.0).subject())
    lines[0].asking.send(b"what?")
    assert await Workers(SETTINGS, lines[:1], lambda: None).ready() is None


async def test_the_counts_of_a_process_that_is_gone_stay(lines: list[Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    crew, before, after = Workers(SETTINGS, lines[:1], lambda: None), Process("a", 1.0), Process("a", 2.0)
    for _ in range(3):
        before.metrics.request_ended(200)
    answer(lines[0], before.subject())
    assert counts(await crew.families())["requests"] == {"2xx": 3}
    asyncio.get_running_loop().remove_reader(lines[0].answering)

    monkeypatch.setattr(worker_states, "ANSWER_TIMEOUT", 0.1)
    silent = await crew.families()
    assert counts(silent)["requests"] == {"2xx": 3}
    assert "oidc_proxy_requests_in_flight" not in {family.name for family in silent}
    # The one that takes its place has another number.
    monkeypatch.setattr(os, "getpid", lambda: -1)
    answer(lines[0], after.subject())
    after.metrics.request_ended(200)
    for _ in range(2):
        assert counts(await crew.families())["requests"] == {"2xx": 4}


def test_families_survive_json() -> None:
    metrics = Metrics(lambda: 1, lambda: 1)
    metrics.request_ended(404)
    metrics.refreshed(None, 0.2)
    families = from_json(json.loads(json.dumps(to_json(metrics.families()))))
    assert exposition(families, "") == exposition(metrics.families(), "")
    assert exposition(merged([families]), "") == exposition(families, "")


async def test_readiness_of_one_service_is_asked_of_each_process(lines: list[Channel]) -> None:
    processes = [Process("a", 1.0), Process("b", 1.0)]
    for line, process in zip(lines, processes, strict=True):
        answer(line, process.subject())
    processes[1].failures["stac"] = Unready("credentials_rejected", "it may not exchange")
    crew = Workers(with_services(), lines, lambda: None)
    assert list(crew.services()) == ["stac", "data", "plain"]
    answers = await asyncio.gather(*(crew.ready(name) for name in (None, "stac", "data")))
    assert answers == [None, processes[1].failures["stac"], None]


async def test_a_service_that_takes_its_time_holds_up_no_other_question(lines: list[Channel]) -> None:
    process, released = Process("a", 1.0), asyncio.Event()

    async def ready(name: str | None) -> Unready | None:
        if name == "stac":
            await released.wait()
        return None

    answer(lines[0], replace(process.subject(), ready=ready))
    crew = Workers(with_services(), lines[:1], lambda: None)
    slow = asyncio.ensure_future(crew.ready("stac"))
    await asyncio.sleep(0)
    assert await crew.ready() is None
    assert (await crew.status())["processes"] == 1
    assert not slow.done()
    released.set()
    assert await slow is None


async def test_services_of_several_processes_are_told_of_as_one(lines: list[Channel]) -> None:
    refused = CredentialsRejected("it may not exchange")
    fault = RecentError("upstream_unavailable", "refused", NOW - 5, 1, "check url", "data")
    states = (
        (
            ServiceState(STAC, AccessToken("x", NOW, NOW + 60), None, Refresh(NOW, 0.1, None), Answer(200, NOW - 1)),
            ServiceState(DATA, fault=fault),
            ServiceState(PLAIN),
        ),
        (
            ServiceState(STAC, None, refused, Refresh(NOW - 1, 0.1, refused), Answer(401, NOW - 9)),
            ServiceState(DATA, fault=replace(fault, at=NOW - 4)),
            ServiceState(PLAIN, AccessToken("y", NOW, NOW + 60)),
        ),
    )
    for line, services in zip(lines, states, strict=True):
        process = Process("a", 1.0)
        process.state = replace(process.state, settings=with_services(), services=services)
        answer(line, process.subject())
    told = await Workers(with_services(), lines, lambda: None).status()
    stac, data, plain = told["services"]
    assert (stac["state"], stac["code"], stac["token"]["ends_at"]) == ("failing", "credentials_rejected", NOW + 60)
    assert (stac["last_refresh"]["at"], stac["last_answer"]["status"]) == (NOW, 200)
    # The other one has no request for it yet.
    assert plain["state"] == "ready"
    assert data["state"] == "starting"
    problems = [(problem["service"], problem["title"]) for problem in told["problems"]]
    assert sorted(name for name, _ in problems) == ["data", "stac", "stac"]
    assert "<h3>" in page(told)


@pytest.mark.parametrize("number", [1, MAX_SERVICES])
async def test_an_answer_about_very_many_services_arrives(number: int, lines: list[Channel]) -> None:
    services = [replace(STAC, name=f"s{n}-{'x' * 50}", path=f"/{'y' * 500}") for n in range(number)]
    states = tuple(ServiceState(one, error=CredentialsRejected('"' * 400)) for one in services)
    for line in lines:
        process = Process("a", 1.0)
        process.names = [one.name for one in services]
        process.state = replace(process.state, settings=with_services(*services), services=states)
        for one in services:
            process.metrics.refreshed(None, 0.1, one.name)
            process.metrics.request_ended(200, service=one.name)
        answer(line, process.subject())
    crew = Workers(with_services(*services), lines, lambda: None)
    told, families = await asyncio.gather(crew.status(), crew.families())
    assert told["processes"] == 2
    assert len(told["services"]) == number
    assert told["requests"] == {"2xx": 2 * number}
    assert f'service="{services[-1].name}",status_class="2xx"}} 2.0' in exposition(families, "")[0].decode()


async def test_an_answer_without_end_is_given_up(lines: list[Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_states, "_MAX_PARTS", 2)
    process = Process("a", 1.0)
    process.state = replace(process.state, claims={"sub": "x" * 200_000})
    answer(lines[0], process.subject())
    assert (await Workers(SETTINGS, lines[:1], lambda: None).status())["processes"] == 0


async def test_services_are_listed_when_no_process_answers(
    lines: list[Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_states, "ANSWER_TIMEOUT", 0.1)
    told = await Workers(with_services(), lines, lambda: None).status()
    assert [(one["name"], one["state"]) for one in told["services"]] == [
        ("stac", "failing"),
        ("data", "failing"),
        ("plain", "failing"),
    ]
    assert len(told["problems"]) == 1
    assert told["upstream"] == "3 services"
