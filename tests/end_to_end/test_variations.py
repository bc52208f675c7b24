"""Issuers differ; through all of these the service gets nothing but good tokens, for several token lifetimes."""

import concurrent.futures
import time
from dataclasses import dataclass, replace

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.processes import StartProxy
from tests.support.service import Service

SHORT = Behaviour(lifetime=3)
AWKWARD_SECRET = "s: %+ é&=~/?"
DURATION = 8.0

VARIATIONS = {
    "no refresh token returned": (replace(SHORT, refresh_tokens="omit"), None),
    "rotating": (replace(SHORT, refresh_tokens="rotate"), None),
    "opaque": (replace(SHORT, opaque=True), None),
    "no expires_in": (replace(SHORT, expires_in=False), None),
    "opaque without expires_in": (Behaviour(lifetime=70, opaque=True, expires_in=False), None),
    "clock 5 s ahead": (replace(SHORT, clock_offset=5), None),
    "clock 5 s ahead without expires_in": (replace(SHORT, clock_offset=5, expires_in=False), None),
    "clock 5 s behind without expires_in": (replace(SHORT, clock_offset=-5, expires_in=False), None),
    "Basic only": (replace(SHORT, auth_methods=("client_secret_basic",)), AWKWARD_SECRET),
    "POST only": (replace(SHORT, auth_methods=("client_secret_post",)), AWKWARD_SECRET),
    "client_secret_jwt only": (replace(SHORT, auth_methods=("client_secret_jwt",)), AWKWARD_SECRET * 3),
    "slow": (Behaviour(lifetime=6, delay=0.5), None),
}


@dataclass(frozen=True)
class Outcome:
    """What happened in `DURATION` seconds of requests."""

    statuses: list[int]
    all_authorized: bool
    token_requests: int
    output: str


@pytest.fixture(scope="module")
def outcomes(start: StartProxy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Run all variations side by side, each with a proxy of its own."""
    home = tmp_path_factory.mktemp("new-home")

    def run(variation: str) -> Outcome:
        behaviour, secret = VARIATIONS[variation]
        with FakeIssuer(behaviour, client_secret=secret) as issuer, Service(issuer) as service:
            # Twelve that make mitmproxy's CA together, in one new home.
            proxy = start("launcher", service.url, settings_for(issuer, HOME=str(home)))
            assert proxy.url, proxy.output
            statuses = []
            end = time.monotonic() + DURATION
            with httpx.Client(trust_env=False, timeout=20) as client:
                while time.monotonic() < end:
                    statuses.append(client.get(proxy.url).status_code)
                    time.sleep(0.05)
            authorized = all(seen.authorized for seen in service.seen) and len(service.seen) == len(statuses)
            proxy.stop()
            return Outcome(statuses, authorized, len(issuer.requests), proxy.output)

    with concurrent.futures.ThreadPoolExecutor(len(VARIATIONS)) as pool:
        return dict(zip(VARIATIONS, pool.map(run, VARIATIONS), strict=True))


@pytest.mark.parametrize("variation", VARIATIONS)
def test_all_requests_are_answered_and_nothing_naked_or_expired_arrives(
    variation: str, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[variation]
    assert set(outcome.statuses) == {200}, outcome.output
    assert outcome.all_authorized, outcome.output
    assert len(outcome.statuses) > 20


@pytest.mark.parametrize("variation", VARIATIONS)
def test_a_lifetime_sees_about_one_refresh(variation: str, outcomes: dict[str, Outcome]) -> None:
    behaviour, _ = VARIATIONS[variation]
    # JWTs count whole seconds, so up to one second of each lifetime is not usable; one more for the first token.
    lifetimes = DURATION / (behaviour.lifetime - 1)
    assert outcomes[variation].token_requests <= 1.5 * lifetimes + 1
