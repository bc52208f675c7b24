"""What the proxy tells of itself: whose token it holds, for how long, and what happened lately. Never the token."""

import asyncio
import importlib.metadata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import Metric

from eoepca_security.errors import IssuerUnavailable, TokenError
from eoepca_security.proxy.admin.recent_errors import RecentError
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.policy import problem_details
from eoepca_security.proxy.policy.remedies import SEE_LOG, failure_remedy, told
from eoepca_security.session.session import AccessToken
from eoepca_security.session.source import TokenSource

READY_WAIT: Final = 0.8
"""Seconds that a readiness probe waits for a token; probes usually give up after one."""


@dataclass(frozen=True)
class AdminSource:
    """What the admin listener tells of: `ready` gives None or why there is no token, `quit` ends the proxy."""

    ready: Callable[[], Awaitable["Unready | None"]]
    status: Callable[[], Awaitable[Mapping[str, Any]]]
    families: Callable[[], Awaitable[Sequence[Metric]]]
    quit: Callable[[], None]


@dataclass(frozen=True)
class Unready:
    """Why there is no token, and what to do about it; `code` is of the public interface."""

    code: str
    detail: str


@dataclass(frozen=True)
class Answer:
    """The status of the service's last answer, and when it came, in epoch seconds."""

    status: int
    at: float


@dataclass(frozen=True)
class Refresh:
    """How the last attempt to get a token went: when it ended (epoch seconds), how long it took, and its failure."""

    at: float
    seconds: float
    failure: TokenError | None


@dataclass(frozen=True)
class State:
    """What one process knows of itself at a moment, `at`; times are in epoch seconds.

    `token` is the one that is good to send now, `claims` what the last one said. `counts` is as metrics.py has them.
    """

    at: float
    started_at: float
    listener: str
    upstream: str
    in_container: bool
    settings: Settings | None
    token: AccessToken | None
    claims: Mapping[str, Any]
    failure: TokenError | None
    last_refresh: Refresh | None
    last_answer: Answer | None
    recent_errors: tuple[RecentError, ...]
    counts: Mapping[str, Mapping[str, int]]
    in_flight: int


async def unready(source: TokenSource | None) -> TokenError | None:
    """Return why there is no token to send, or None when there is one.

    This asks for one, so that a proxy that nobody has used for a while is ready, too.
    """
    if source is None:
        return IssuerUnavailable("the proxy is not configured", cause="not_configured")
    asking = asyncio.ensure_future(source.token())
    await asyncio.wait({asking}, timeout=READY_WAIT)
    if not asking.done():
        asking.cancel()
        return source.error or IssuerUnavailable("waiting for the issuer")
    error = asking.exception()
    return error if error is None or isinstance(error, TokenError) else IssuerUnavailable(type(error).__name__)


def status(state: State) -> dict[str, Any]:
    """Return the state as JSON has it; times are in epoch seconds, durations in seconds.

    `state` is `ready`, `degraded` (there is a token, but the last refresh failed), `failing` (there is none),
    `idle` (the last token has ended, and nobody has asked for another) or `starting`. `problems` says in words what is
    wrong now and what to do about it; `recent_errors` is newest first.
    """
    failure, remedy = state.failure, ""
    if failure is not None:
        remedy = failure_remedy(failure, state.settings, in_container=state.in_container)
    return {
        "at": round(state.at, 3),
        "state": _name(state),
        "ready": state.token is not None,
        "code": failure.code if failure is not None else None,
        "detail": told(failure, remedy) if failure is not None else None,
        "problems": _problems(state, remedy),
        "listener": state.listener,
        "upstream": state.upstream,
        "issuer": state.settings.issuer_url if state.settings is not None else None,
        "identity": {name: state.claims[name] for name in ("sub", "preferred_username") if name in state.claims},
        "token": _token(state.token, state.at) if state.token is not None else None,
        "last_refresh": _refresh(state.last_refresh) if state.last_refresh is not None else None,
        **state.counts,
        "requests_in_flight": state.in_flight,
        "recent_errors": [
            {"at": round(one.at, 3), "code": one.code, "detail": told(one.detail, one.remedy), "count": one.count}
            for one in state.recent_errors
        ],
        "uptime_seconds": round(state.at - state.started_at),
        "version": importlib.metadata.version("eoepca-security"),
    }


def _name(state: State) -> str:
    if state.failure is not None or state.settings is None:
        return "degraded" if state.token is not None else "failing"
    if state.token is not None:
        return "ready"
    return "idle" if state.last_refresh is not None else "starting"


def _problems(state: State, remedy: str) -> list[dict[str, str]]:
    found = []
    if state.settings is None:
        found.append(_problem("The proxy is not configured", "its settings are missing or wrong", SEE_LOG))
    elif state.failure is not None:
        found.append(_problem(problem_details.title(state.failure.code), str(state.failure), remedy))
    last = state.last_answer
    fault = next((one for one in state.recent_errors if one.code.startswith("upstream_")), None)
    if fault is not None and (last is None or last.at < fault.at):
        found.append(_problem(problem_details.title(fault.code), fault.detail, fault.remedy))
    elif last is not None and last.status == 401:
        found.append(
            _problem(
                "The protected service refuses the token",
                "its last answer was 401",
                "run `run-mitmproxy.py check`: often the token is not for the audience, or from the issuer, that the "
                "service expects",
            )
        )
    return found


def _problem(title: str, detail: str, remedy: str) -> dict[str, str]:
    return {"title": title, "detail": detail, "remedy": remedy}


def _token(token: AccessToken, now: float) -> dict[str, float]:
    return {
        "obtained_at": round(token.obtained_at, 3),
        "ends_at": round(token.ends_at, 3),
        "lifetime_seconds": round(token.ends_at - token.obtained_at, 3),
        "seconds_left": round(token.ends_at - now, 3),
    }


def _refresh(refresh: Refresh) -> dict[str, Any]:
    return {
        "at": round(refresh.at, 3),
        "seconds": round(refresh.seconds, 3),
        "result": refresh.failure.code if refresh.failure is not None else "success",
    }
