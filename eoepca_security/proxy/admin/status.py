"""The proxy's status: its identity, its token's times and recent events. Never the token itself."""

import asyncio
import importlib.metadata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from prometheus_client import Metric

from eoepca_security.errors import IssuerUnavailable, TokenError
from eoepca_security.proxy.admin.recent_errors import RecentError
from eoepca_security.proxy.admin.ways import example, ways_in
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.policy import problem_details
from eoepca_security.proxy.policy.remedies import SEE_LOG, failure_remedy, needs_login, told
from eoepca_security.session.session import AccessToken
from eoepca_security.session.token_cycle import TokenCycle

_NOT_CONFIGURED: Final = IssuerUnavailable("the proxy is not configured", cause="not_configured")

READY_WAIT: Final = 0.8
"""Seconds that a readiness probe waits for a token; probes usually give up after one."""


@dataclass(frozen=True)
class AdminSource:
    """What the admin listener needs.

    `ready` returns None or why there is no token for a service, or for the session if given None. `services` returns
    the services' names, and `quit` stops the proxy.
    """

    ready: Callable[[str | None], Awaitable["Unready | None"]]
    services: Callable[[], Sequence[str]]
    status: Callable[[], Awaitable[Mapping[str, Any]]]
    families: Callable[[], Awaitable[Sequence[Metric]]]
    quit: Callable[[], None]


@dataclass(frozen=True)
class Unready:
    """Why there is no token, with the remedy. `code` is part of the public interface."""

    code: str
    detail: str


@dataclass(frozen=True)
class Answer:
    """The status of the service's last answer, and its time in epoch seconds."""

    status: int
    at: float


@dataclass(frozen=True)
class Refresh:
    """The last attempt to get a token: its end (epoch seconds), its duration and its error or None."""

    at: float
    seconds: float
    error: TokenError | None


@dataclass(frozen=True)
class ServiceState:
    """The state of one service, at the time of the State. `fault` is why it last did not answer, or None."""

    service: Service
    token: AccessToken | None = None
    error: TokenError | None = None
    last_refresh: Refresh | None = None
    last_answer: Answer | None = None
    fault: RecentError | None = None


@dataclass(frozen=True)
class State:
    """The state of one process at the time `at`. Times are in epoch seconds.

    `token` is the current one, `claims` are those of the last one. `session_ends_at` is when the session ends unless a
    refresh extends it, or None if the issuer did not say. `counts` come from `metrics.counts`. `services` are those of
    the settings.
    """

    at: float
    started_at: float
    listener: str
    upstream: str
    in_container: bool
    settings: Settings | None
    token: AccessToken | None
    claims: Mapping[str, Any]
    session_ends_at: float | None
    error: TokenError | None
    last_refresh: Refresh | None
    last_answer: Answer | None
    recent_errors: tuple[RecentError, ...]
    counts: Mapping[str, Mapping[str, int]]
    in_flight: int
    held_bytes: int
    browser_address: str | None = None
    services: tuple[ServiceState, ...] = ()

    @property
    def has_names(self) -> bool:
        """Whether its services have names, which a file gives them."""
        return self.settings is not None and self.settings.services_file is not None

    def remedy(self, error: TokenError, service: Service | None = None) -> str:
        """Return the remedy for an error that leaves the proxy or a service without a token."""
        whose = service if error is not self.error else None
        return failure_remedy(error, self.settings, whose, in_container=self.in_container)


async def unready(source: TokenCycle | None) -> TokenError | None:
    """Return why there is no current token, or None.

    This requests one if needed, so that an idle proxy is ready too.
    """
    if source is None:
        return _NOT_CONFIGURED
    asking = asyncio.ensure_future(source.token())
    await asyncio.wait({asking}, timeout=READY_WAIT)
    if not asking.done():
        asking.cancel()
        return source.error or IssuerUnavailable("waiting for the issuer")
    error = asking.exception()
    return error if error is None or isinstance(error, TokenError) else IssuerUnavailable(type(error).__name__)


def status(state: State) -> dict[str, Any]:
    """Return the state for JSON. Times are in epoch seconds, durations in seconds.

    `state` is `ready`, `degraded` (there is a token, but the last refresh failed), `failing` (there is no token),
    `idle` (the last token has expired, and nobody has asked for another) or `starting`. The proxy is `ready` in the
    first two and when it is idle: `/readyz` then gets a token, as the next request would, and `state` tells how that
    went. `problems` lists the current errors with title, detail, remedy, and whether they are about the `token` or the
    `service`; `recent_errors` is newest first. `session.login_needed` says when somebody has to log in: `now`,
    `later` (`session.ends_at`, unless a refresh extends the session), `unknown`, or `never`.

    All this is about the session, except for `problems`: with a file of services, those of a service have its name as
    `service`. Each of `services` has a `state`, `code` and `detail` of its own, which are about its token.
    """
    error = state.error
    name = _name(state.token, error if state.settings is not None else _NOT_CONFIGURED, state.last_refresh)
    return {
        "at": round(state.at, 3),
        "state": name,
        "ready": name in ("ready", "degraded", "idle"),
        "code": error.code if error is not None else None,
        "detail": told(error, state.remedy(error)) if error is not None else None,
        "problems": _problems(state),
        "listener": state.listener,
        "browser_address": state.browser_address,
        "upstream": state.upstream,
        "issuer": state.settings.issuer_url if state.settings is not None else None,
        "identity": {name: state.claims[name] for name in ("sub", "preferred_username") if name in state.claims},
        "session": {"login_needed": _login_needed(state), "ends_at": _rounded(state.session_ends_at)},
        "example": example(state.listener, state.settings) if state.settings is not None else None,
        "token": _token(state.token, state.at) if state.token is not None else None,
        "last_refresh": _refresh(state.last_refresh) if state.last_refresh is not None else None,
        **state.counts,
        "requests_in_flight": state.in_flight,
        "held_bytes": state.held_bytes,
        "services": [_service(one, state) for one in state.services],
        "recent_errors": [
            {"at": round(one.at, 3), "code": one.code, "detail": told(one.detail, one.remedy), "count": one.count}
            | _named(one.service)
            for one in state.recent_errors
        ],
        "uptime_seconds": round(state.at - state.started_at),
        "version": importlib.metadata.version("eoepca-security"),
    }


def _name(token: AccessToken | None, error: TokenError | None, last_refresh: Refresh | None) -> str:
    if error is not None:
        return "degraded" if token is not None else "failing"
    if token is not None:
        return "ready"
    return "idle" if last_refresh is not None else "starting"


def _service(one: ServiceState, state: State) -> dict[str, Any]:
    service, error, answer = one.service, one.error, one.last_answer
    return {
        "name": service.name,
        "addresses": list(ways_in(service, state.listener, state.settings)) if state.settings is not None else [],
        "upstream": f"{service.upstream}{service.path}",
        "token_kind": service.token,
        "state": _name(one.token, error, one.last_refresh),
        "code": error.code if error is not None else None,
        "detail": told(error, state.remedy(error, service)) if error is not None else None,
        "token": _token(one.token, state.at) if one.token is not None else None,
        "last_refresh": _refresh(one.last_refresh) if one.last_refresh is not None else None,
        "last_answer": {"at": round(answer.at, 3), "status": answer.status} if answer is not None else None,
    }


def _login_needed(state: State) -> str:
    if state.settings is not None and state.settings.grant == "client_credentials":
        return "never"
    if needs_login(state.error):
        return "now"
    return "unknown" if state.session_ends_at is None else "later"


def _problems(state: State) -> list[dict[str, str]]:
    if state.settings is None:
        text = "its settings are missing or wrong"
        return [_problem("token", "The proxy is not configured", text, SEE_LOG)]
    found = [_token_problem(state.error, state)] if state.error is not None else []
    if not state.has_names:
        fault = next((one for one in state.recent_errors if one.code.startswith("upstream_")), None)
        return [*found, *_answer_problems(fault, state.last_answer, state.settings)]
    for one in state.services:
        name = one.service.name
        # What the session lacks is no news about each of its services.
        if one.error is not None and one.error is not state.error:
            found.append(_token_problem(one.error, state, one.service) | _named(name))
        found += [problem | _named(name) for problem in _answer_problems(one.fault, one.last_answer, state.settings)]
    return found


def _token_problem(error: TokenError, state: State, service: Service | None = None) -> dict[str, str]:
    return _problem("token", problem_details.title(error.code), str(error), state.remedy(error, service))


def _answer_problems(fault: RecentError | None, last: Answer | None, settings: Settings) -> list[dict[str, str]]:
    if fault is not None and (last is None or last.at < fault.at):
        return [_problem("service", problem_details.title(fault.code), fault.detail, fault.remedy)]
    if last is not None and last.status == 401:
        return [
            _problem(
                "service",
                "The protected service refuses the token",
                "its last answer was 401",
                f"{settings.command.run('check')}: often the service expects another audience or issuer",
            )
        ]
    return []


def _problem(about: Literal["token", "service"], title: str, detail: str, remedy: str) -> dict[str, str]:
    return {"about": about, "title": title, "detail": detail, "remedy": remedy}


def _named(service: str) -> dict[str, str]:
    return {"service": service} if service else {}


def _token(token: AccessToken, now: float) -> dict[str, float]:
    return {
        "obtained_at": round(token.obtained_at, 3),
        "ends_at": round(token.ends_at, 3),
        "lifetime_seconds": round(token.ends_at - token.obtained_at, 3),
        "seconds_left": round(token.ends_at - now, 3),
    }


def _rounded(at: float | None) -> float | None:
    return round(at, 3) if at is not None else None


def _refresh(refresh: Refresh) -> dict[str, Any]:
    return {
        "at": round(refresh.at, 3),
        "seconds": round(refresh.seconds, 3),
        "result": refresh.error.code if refresh.error is not None else "success",
    }
