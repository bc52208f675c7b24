"""The proxy's status: its identity, its token's times and recent events. Never the token itself."""

import asyncio
import importlib.metadata
import shlex
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from prometheus_client import Metric

from eoepca_security.errors import IssuerUnavailable, TokenError
from eoepca_security.oauth.urls import EVERYWHERE
from eoepca_security.proxy.admin.recent_errors import RecentError
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.policy import problem_details
from eoepca_security.proxy.policy.remedies import SEE_LOG, failure_remedy, needs_login, told
from eoepca_security.session.session import AccessToken
from eoepca_security.session.source import TokenSource

READY_WAIT: Final = 0.8
"""Seconds that a readiness probe waits for a token; probes usually give up after one."""


@dataclass(frozen=True)
class AdminSource:
    """What the admin listener needs. `ready` returns None or why there is no token; `quit` stops the proxy."""

    ready: Callable[[], Awaitable["Unready | None"]]
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
class State:
    """The state of one process at the time `at`. Times are in epoch seconds.

    `token` is the current one, `claims` are those of the last one. `session_ends_at` is when the session ends unless a
    refresh extends it, or None if the issuer did not say. `counts` come from `metrics.counts`.
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


async def unready(source: TokenSource | None) -> TokenError | None:
    """Return why there is no current token, or None.

    This requests one if needed, so that an idle proxy is ready too.
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
    """Return the state for JSON. Times are in epoch seconds, durations in seconds.

    `state` is `ready`, `degraded` (there is a token, but the last refresh failed), `failing` (there is no token),
    `idle` (the last token has expired, and nobody has asked for another) or `starting`. The proxy is `ready` in the
    first two and when it is idle: `/readyz` then gets a token, as the next request would, and `state` tells how that
    went. `problems` lists the current errors with title, detail, remedy, and whether they are about the `token` or the
    `service`; `recent_errors` is newest first. `session.login_needed` says when somebody has to log in: `now`,
    `later` (`session.ends_at`, unless a refresh extends the session), `unknown`, or `never`.
    """
    name = _name(state)
    error, remedy = state.error, ""
    if error is not None:
        remedy = failure_remedy(error, state.settings, in_container=state.in_container)
    return {
        "at": round(state.at, 3),
        "state": name,
        "ready": name in ("ready", "degraded", "idle"),
        "code": error.code if error is not None else None,
        "detail": told(error, remedy) if error is not None else None,
        "problems": _problems(state, remedy),
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
        "recent_errors": [
            {"at": round(one.at, 3), "code": one.code, "detail": told(one.detail, one.remedy), "count": one.count}
            for one in state.recent_errors
        ],
        "uptime_seconds": round(state.at - state.started_at),
        "version": importlib.metadata.version("eoepca-security"),
    }


def _name(state: State) -> str:
    if state.error is not None or state.settings is None:
        return "degraded" if state.token is not None else "failing"
    if state.token is not None:
        return "ready"
    return "idle" if state.last_refresh is not None else "starting"


def _login_needed(state: State) -> str:
    if state.settings is not None and state.settings.grant == "client_credentials":
        return "never"
    if needs_login(state.error):
        return "now"
    return "unknown" if state.session_ends_at is None else "later"


def example(listener: str, settings: Settings) -> str:
    """Return a command that sends a request through the proxy at `listener`, by a name that it answers to."""
    if settings.inject_hosts:
        ca = "~/.mitmproxy/mitmproxy-ca-cert.pem"
        return f"curl --proxy {listener} --cacert {ca} {shlex.quote(f'https://{settings.inject_hosts[0]}/')}"
    base, parts = on_this_machine(listener), urlsplit(listener)
    names = settings.allowed_hosts
    if names and not {"*", "localhost", parts.hostname} & set(names):
        base = f"http://{names[0]}" if ":" in names[0].rpartition("]")[2] else f"http://{names[0]}:{parts.port}"
    return f"curl -i {shlex.quote(base + settings.endpoint)}"


def on_this_machine(listener: str) -> str:
    """Return the URL of a listener for a client on this machine: nobody can call all addresses at once."""
    parts = urlsplit(listener)
    return f"http://localhost:{parts.port}" if parts.hostname in EVERYWHERE else listener


def _problems(state: State, remedy: str) -> list[dict[str, str]]:
    found = []
    if state.settings is None:
        found.append(_problem("token", "The proxy is not configured", "its settings are missing or wrong", SEE_LOG))
    elif state.error is not None:
        found.append(_problem("token", problem_details.title(state.error.code), str(state.error), remedy))
    last = state.last_answer
    upstream = next((one for one in state.recent_errors if one.code.startswith("upstream_")), None)
    if upstream is not None and (last is None or last.at < upstream.at):
        found.append(_problem("service", problem_details.title(upstream.code), upstream.detail, upstream.remedy))
    elif last is not None and last.status == 401 and state.settings is not None:
        found.append(
            _problem(
                "service",
                "The protected service refuses the token",
                "its last answer was 401",
                f"{state.settings.command.run('check')}: often the service expects another audience or issuer",
            )
        )
    return found


def _problem(about: Literal["token", "service"], title: str, detail: str, remedy: str) -> dict[str, str]:
    return {"about": about, "title": title, "detail": detail, "remedy": remedy}


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
