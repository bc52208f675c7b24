"""What the proxy tells of itself: whose token it holds, for how long, and what happened lately. Never the token."""

import asyncio
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from eoepca_security.errors import IssuerUnavailable, TokenError
from eoepca_security.proxy.metrics import Metrics, counts
from eoepca_security.session import AccessToken
from eoepca_security.source import TokenSource
from eoepca_security.verify import unverified_claims

READY_WAIT: Final = 0.8
"""Seconds that a readiness probe waits for a token; probes usually give up after one."""


async def unready(source: TokenSource | None) -> TokenError | None:
    """Return why there is no token to send, or None when there is one.

    This asks for one, so that a proxy that nobody has used for a while is ready, too.
    """
    if source is None:
        return IssuerUnavailable("the proxy is not configured")
    asking = asyncio.ensure_future(source.token())
    await asyncio.wait({asking}, timeout=READY_WAIT)
    if not asking.done():
        asking.cancel()
        return source.failure or IssuerUnavailable("waiting for the issuer")
    error = asking.exception()
    return error if error is None or isinstance(error, TokenError) else IssuerUnavailable(type(error).__name__)


def status(source: TokenSource | None, metrics: Metrics, last_refresh: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the state as JSON has it; times are in epoch seconds, durations in seconds."""
    token = source.at_hand if source is not None else None
    failure = source.failure if source is not None else None
    claims = unverified_claims(token.value) if token is not None else {}
    return {
        "ready": token is not None,
        "code": failure.code if failure is not None else None,
        "detail": str(failure) if failure is not None else None,
        "identity": {name: claims[name] for name in ("sub", "preferred_username") if name in claims},
        "token": _times(token) if token is not None else None,
        "last_refresh": last_refresh,
        **counts(metrics.families()),
        "uptime_seconds": round(time.time() - metrics.started_at),
        "version": importlib.metadata.version("eoepca-security"),
    }


def together(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states of processes that share a session as one, but for what is counted elsewhere."""
    if not states:
        return {"ready": False, "processes": 0}
    # They take the token from each other, so one of them has the newest first.
    ahead = max(states, key=lambda state: state["token"]["ends_at"] if state["token"] else 0)
    troubled = next((state for state in states if state["code"]), ahead)
    refreshes = [state["last_refresh"] for state in states if state["last_refresh"]]
    return dict(ahead) | {
        "ready": all(state["ready"] for state in states),
        "code": troubled["code"],
        "detail": troubled["detail"],
        "last_refresh": max(refreshes, key=lambda refresh: float(refresh["at"]), default=None),
        "uptime_seconds": max(state["uptime_seconds"] for state in states),
        "requests_in_flight": sum(state["requests_in_flight"] for state in states),
        "processes": len(states),
    }


def _times(token: AccessToken) -> dict[str, float]:
    return {
        "obtained_at": round(token.obtained_at, 3),
        "ends_at": round(token.ends_at, 3),
        "lifetime_seconds": round(token.ends_at - token.obtained_at, 3),
        "seconds_left": round(token.ends_at - time.time(), 3),
    }
