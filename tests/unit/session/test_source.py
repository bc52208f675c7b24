"""When tokens are fetched, with the clock in the test's hand and no network."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, StoreError, TokenError, TokenInvalid
from eoepca_security.oauth.protocol import MAX_LIFETIME, TokenResponse
from eoepca_security.session.session import AccessToken, Stored
from eoepca_security.session.source import TokenSource
from eoepca_security.session.token_cycle import FORCED_INTERVAL, refresh_time
from tests.support.clock import START, Clock
from tests.support.issuer import Issuer
from tests.support.tokens import jwt_with
from tests.support.waiting import settled


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def source(issuer: Issuer, clock: Clock) -> TokenSource:
    return TokenSource(issuer, refresh_token="first", now=clock)


# --- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifetime", [1.0, 3.0, 60.0, 300.0, 86_400.0])
@pytest.mark.parametrize("chance", [0.0, 0.999])
def test_windows_follow_the_lifetime(lifetime: float, chance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: chance)
    token = AccessToken("t", START, START + lifetime)
    refresh_at = refresh_time(token, latency=0)
    assert refresh_at < token.expires_at < token.ends_at
    assert refresh_at - START > 0.84 * lifetime  # or one lifetime would see several refreshes
    assert token.ends_at - token.expires_at <= 5


def test_a_slow_issuer_is_asked_earlier_but_not_all_the_time() -> None:
    token = AccessToken("t", START, START + 6)
    assert token.expires_at - refresh_time(token, latency=1.5) > 1.5
    assert refresh_time(token, latency=100) == START + 3


# --- when to refresh ---------------------------------------------------------------------------------------------


async def test_a_token_is_used_until_it_is_due(source: TokenSource, issuer: Issuer, clock: Clock) -> None:
    assert (await source.token()).value == "token-1"
    clock.time += 49
    assert (await source.token()).value == "token-1"
    assert issuer.asked == ["first"]


async def test_a_due_token_is_served_while_the_next_one_is_fetched(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    await source.token()
    clock.time += 53
    issuer.gate.clear()
    assert [(await source.token()).value for _ in range(5)] == ["token-1"] * 5
    await settled(lambda: len(issuer.asked) == 2)
    issuer.gate.set()
    await settled(lambda: source._refresh is None)
    assert (await source.token()).value == "token-2"
    assert len(issuer.asked) == 2


async def test_an_expired_token_is_not_served(source: TokenSource, issuer: Issuer, clock: Clock) -> None:
    await source.token()
    clock.time += 56  # the last five seconds are not used: the request has yet to arrive
    assert (await source.token()).value == "token-2"


async def test_a_clock_that_is_set_back_does_not_prolong_a_token(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    await source.token()
    clock.time -= 3600
    assert (await source.token()).value == "token-2"


async def test_all_who_wait_share_one_refresh(source: TokenSource, issuer: Issuer) -> None:
    issuer.gate.clear()
    waiting = [asyncio.create_task(source.token()) for _ in range(100)]
    await settled(lambda: len(issuer.asked) == 1)
    issuer.gate.set()
    assert {token.value for token in await asyncio.gather(*waiting)} == {"token-1"}
    assert len(issuer.asked) == 1


async def test_all_who_wait_share_its_failure(source: TokenSource, issuer: Issuer) -> None:
    issuer.answers = [CredentialsRejected("no")]
    failures = await asyncio.gather(*(source.token() for _ in range(50)), return_exceptions=True)
    assert {str(failure) for failure in failures} == {"no"}
    assert len(issuer.asked) == 1


async def test_one_who_gives_up_does_not_end_the_refresh(source: TokenSource, issuer: Issuer) -> None:
    issuer.gate.clear()
    impatient, patient = asyncio.create_task(source.token()), asyncio.create_task(source.token())
    await settled(lambda: len(issuer.asked) == 1)
    impatient.cancel()
    issuer.gate.set()
    assert (await patient).value == "token-1"
    assert len(issuer.asked) == 1


async def test_waiting_does_not_block_the_event_loop(source: TokenSource, issuer: Issuer) -> None:
    issuer.gate.clear()
    waiting = asyncio.create_task(source.token())
    await settled(lambda: len(issuer.asked) == 1)  # runs in this loop, while the issuer does not answer
    issuer.gate.set()
    assert (await waiting).value == "token-1"


async def test_nobody_waits_for_ever(source: TokenSource, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eoepca_security.session.token_cycle.MAX_WAIT", 0.05)
    issuer.gate.clear()
    with pytest.raises(IssuerUnavailable, match="in time"):
        await source.token()
    # Who comes when the wait is over does not wait again.
    monkeypatch.setattr("eoepca_security.session.token_cycle.PATIENCE", 60.0)
    with pytest.raises(IssuerUnavailable, match="in time"):
        await asyncio.wait_for(source.token(), 5)
    issuer.gate.set()
    await settled(lambda: source._refresh is None)
    assert (await source.token()).value == "token-1"  # the same refresh, which went on
    assert len(issuer.asked) == 1


async def test_a_refused_token_costs_one_wait_and_not_two(
    source: TokenSource, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await source.token()
    monkeypatch.setattr("eoepca_security.session.token_cycle.MAX_WAIT", 0.5)
    issuer.gate.clear()
    monkeypatch.setattr(source, "_token", None)
    started = time.monotonic()
    with pytest.raises(IssuerUnavailable, match="in time"):
        await source.replace(token.value)
    assert time.monotonic() - started < 0.9
    issuer.gate.set()
    await settled(lambda: source._refresh is None)


async def test_a_token_that_ends_while_it_is_checked_is_not_given(issuer: Issuer, clock: Clock) -> None:
    def check(_: str) -> None:
        clock.time += 60

    source = TokenSource(issuer, refresh_token="first", check=check, now=clock)
    with pytest.raises(IssuerUnavailable, match="expired"):
        await source.token()


async def test_a_refresh_that_never_ends_is_given_up(
    source: TokenSource, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eoepca_security.session.token_cycle._GIVE_UP", 0.05)
    issuer.gate.clear()
    with pytest.raises(IssuerUnavailable, match="did not answer"):
        await source.token()
    issuer.gate.set()


# --- refresh tokens ----------------------------------------------------------------------------------------------


async def test_a_rotated_refresh_token_is_used_from_then_on(source: TokenSource, issuer: Issuer, clock: Clock) -> None:
    issuer.answers = [TokenResponse("a", expires_in=60, refresh_token="second")]
    for _ in range(3):
        await source.token()
        clock.time += 60
    # No new one came with the later answers, so the second is kept.
    assert issuer.asked == ["first", "second", "second"]
    assert source.rotated


async def test_the_same_refresh_token_coming_back_is_no_rotation(source: TokenSource, issuer: Issuer) -> None:
    issuer.answers = [TokenResponse("a", expires_in=60, refresh_token="first")]
    await source.token()
    assert not source.rotated


async def test_a_rotated_refresh_token_is_kept_when_the_access_token_is_refused(issuer: Issuer, clock: Clock) -> None:
    def check(token: str) -> None:
        if token == "bad":
            raise TokenInvalid("not for us")

    source = TokenSource(issuer, refresh_token="first", check=check, now=clock)
    issuer.answers = [TokenResponse("bad", expires_in=60, refresh_token="second")]
    with pytest.raises(TokenInvalid):
        await source.token()
    clock.time += 60
    await source.token()
    assert issuer.asked == ["first", "second"]


async def test_a_source_that_continues_another_has_its_refresh_token(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    issuer.answers = [TokenResponse("a", expires_in=60, refresh_token="second", refresh_expires_in=600)]
    await source.token()
    other = Issuer()
    successor = TokenSource(other, refresh_token="first", now=clock, continues=source)
    source.retire()
    assert source._keep_alive is not None
    assert source._keep_alive.cancelled()
    assert (await successor.token()).value == "token-1"
    assert other.asked == ["second"]


# --- the initial access token ------------------------------------------------------------------------------------


async def test_an_initial_access_token_is_used_while_it_lives(issuer: Issuer, clock: Clock) -> None:
    initial = jwt_with(exp=START + 100, iat=START - 200)
    source = TokenSource(issuer, refresh_token="first", access_token=initial, now=clock)
    clock.time += 50
    assert (await source.token()).value == initial
    clock.time += 60
    assert (await source.token()).value == "token-1"


async def test_an_initial_access_token_without_a_sensible_end_lives_as_long_as_a_calendar_goes(
    issuer: Issuer, clock: Clock
) -> None:
    source = TokenSource(issuer, access_token=jwt_with(exp=9_467_000_000_000), now=clock)

    token = await source.token()
    assert token.ends_at == clock() + MAX_LIFETIME
    assert datetime.fromtimestamp(token.ends_at, UTC).year < 9999


async def test_an_initial_access_token_that_has_ended_is_not_used(issuer: Issuer, clock: Clock) -> None:
    source = TokenSource(issuer, access_token=jwt_with(exp=START - 1, iat=START - 61), now=clock)
    assert (await source.token()).value == "token-1"


async def test_an_initial_access_token_has_to_pass_the_check_too(issuer: Issuer, clock: Clock) -> None:
    failures: list[TokenError] = [IssuerUnavailable("no keys"), TokenInvalid("not for us")]

    def check(token: str) -> None:
        if token == "initial" and failures:
            raise failures.pop(0)

    source = TokenSource(issuer, access_token="initial", check=check, now=clock)
    with pytest.raises(IssuerUnavailable, match="no keys"):  # that says nothing of the token
        await source.token()
    clock.time += 1
    assert (await source.token()).value == "token-1"
    assert failures == []


# --- failures ----------------------------------------------------------------------------------------------------


async def test_a_failing_background_refresh_leaves_the_living_token_in_use(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    await source.token()
    clock.time += 53
    issuer.answers = [IssuerUnavailable("down")]
    assert (await source.token()).value == "token-1"
    await settled(lambda: source._refresh is None)
    assert (await source.token()).value == "token-1"
    assert len(issuer.asked) == 2  # the retry is not due yet


async def test_the_next_request_waits_for_a_retry_that_is_due_soon(source: TokenSource, issuer: Issuer) -> None:
    issuer.answers = [IssuerUnavailable("down")]
    with pytest.raises(IssuerUnavailable, match="down"):
        await source.token()
    assert (await source.token()).value == "token-2"


async def test_retries_become_rarer_and_requests_in_between_fail_at_once(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    issuer.answers = [IssuerUnavailable("down") for _ in range(100)]
    end = START + 60
    while clock.time < end:
        with pytest.raises(IssuerUnavailable, match="down"):
            await source.token()
        clock.time += 1.3  # longer than anybody waits for a retry
    assert 5 <= len(issuer.asked) <= 12


async def test_retry_after_is_honoured_up_to_a_bound(source: TokenSource, issuer: Issuer, clock: Clock) -> None:
    issuer.answers = [IssuerUnavailable("busy", retry_after=20), IssuerUnavailable("busy", retry_after=1e9)]
    with pytest.raises(IssuerUnavailable):
        await source.token()
    assert source.retry_after() == 20
    clock.time += 18
    with pytest.raises(IssuerUnavailable):
        await source.token()
    assert len(issuer.asked) == 1
    clock.time += 2
    with pytest.raises(IssuerUnavailable):
        await source.token()
    assert source.retry_after() == 300


async def test_a_clock_that_is_set_back_after_a_failure_delays_no_retry(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    issuer.answers = [CredentialsRejected("no") for _ in range(4)]
    for _ in range(4):
        with pytest.raises(CredentialsRejected):
            await source.token()
        clock.time += 60
    clock.time -= 3600
    assert source.retry_after() == 1
    assert (await source.token()).value == "token-5"


async def test_a_rejected_credential_is_tried_again_but_seldom(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    issuer.answers = [CredentialsRejected("no") for _ in range(100)]
    end = START + 3
    while clock.time < end:
        with pytest.raises(CredentialsRejected):
            await source.token()
        clock.time += 0.5
    assert len(issuer.asked) <= 4


async def test_a_failure_is_logged_once_and_so_is_its_end(
    source: TokenSource, issuer: Issuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    issuer.answers = [IssuerUnavailable("down"), IssuerUnavailable("down"), CredentialsRejected("no")]
    for _ in range(3):
        with pytest.raises(TokenError):
            await source.token()
        clock.time += 5
    first = await source.token()
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "down" in message] == ["no new access token (issuer_unavailable): down"]
    assert sum("no new access token (credentials_rejected)" in message for message in messages) == 1
    assert messages[-1] == "access tokens are available"
    issuer.answers = [IssuerUnavailable("down")]
    clock.time = first.ends_at
    with pytest.raises(TokenError):
        await source.token()
    clock.time += 5
    await source.token()
    assert caplog.messages[-1] == "access tokens are available again"


async def test_a_log_that_raises_costs_nothing(
    source: TokenSource, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emit(*_: object) -> None:
        raise UnicodeEncodeError("ascii", "\N{SNOWMAN}", 0, 1, "the terminal has no such letter")

    monkeypatch.setattr("eoepca_security.session.token_cycle.logger.warning", emit)
    monkeypatch.setattr("eoepca_security.session.token_cycle.PATIENCE", 0.0)
    issuer.answers = [CredentialsRejected("no"), CredentialsRejected("no")]
    for _ in range(5):
        with pytest.raises(CredentialsRejected):
            await source.token()
    assert len(issuer.asked) == 1  # the backoff was noted


async def test_an_unexpected_error_is_an_answer_too_and_shows_no_values(
    source: TokenSource, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.answers = [RuntimeError("first")]  # an error whose text has the refresh token in it
    with pytest.raises(IssuerUnavailable, match="RuntimeError") as failure:
        await source.token()
    assert "first" not in str(failure.value)
    assert "first" not in caplog.text
    assert (await source.token()).value == "token-2"


async def test_a_token_that_is_nearly_over_on_arrival_is_followed_by_another(
    source: TokenSource, issuer: Issuer
) -> None:
    issuer.answers = [TokenResponse("brief", expires_in=0.1, refresh_token="second")]
    assert (await source.token()).value == "token-2"
    assert issuer.asked == ["first", "second"]


async def test_the_log_has_an_error_as_it_is_described_and_as_data(
    issuer: Issuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    rejected = CredentialsRejected("no", issuer_error="invalid_grant")
    issuer.answers = [rejected]
    source = TokenSource(issuer, refresh_token="first", now=clock, describe=lambda error: f"{error}; mind the gap")
    with pytest.raises(CredentialsRejected):
        await source.token()
    [record] = caplog.records
    assert record.getMessage() == "no new access token (credentials_rejected): no; mind the gap"
    assert vars(record)["error"] is rejected


async def test_a_token_that_is_expired_on_arrival_is_not_served(source: TokenSource, issuer: Issuer) -> None:
    issuer.answers = [TokenResponse(jwt_with(exp=START, iat=START)) for _ in range(3)]
    with pytest.raises(TokenInvalid, match="already expired") as caught:
        await source.token()
    assert caught.value.cause == "clock"


# --- a service that refuses a token ------------------------------------------------------------------------------


async def test_a_refused_token_is_replaced_at_most_once_in_a_while(
    source: TokenSource, issuer: Issuer, clock: Clock
) -> None:
    issuer.lifetime = 10_000
    first = (await source.token()).value
    replaced = await asyncio.gather(*(source.replace(first) for _ in range(20)))
    assert {token.value for token in replaced if token is not None} == {"token-2"}
    assert None not in replaced
    assert len(issuer.asked) == 2
    # Somebody is late with a refusal of the first: there is a newer one already.
    assert (await source.replace(first)) == replaced[0]
    # And the newer one is refused, too.
    assert await source.replace("token-2") is None
    clock.time += FORCED_INTERVAL
    token = await source.replace("token-2")
    assert token is not None
    assert token.value == "token-3"
    assert len(issuer.asked) == 3


async def test_a_token_that_cannot_be_replaced_stays_in_use(source: TokenSource, issuer: Issuer, clock: Clock) -> None:
    await source.token()
    issuer.answers = [IssuerUnavailable("down")]
    assert await source.replace("token-1") is None
    assert (await source.token()).value == "token-1"


# --- an idle session ---------------------------------------------------------------------------------------------


async def test_an_idle_session_is_kept_alive_and_no_more_than_that(issuer: Issuer) -> None:
    # On the real clock, as the loop's timers are.
    def answer(number: int) -> TokenResponse:
        return TokenResponse(f"t-{number}", expires_in=0.5, refresh_token=f"r-{number}", refresh_expires_in=2)

    issuer.answers = [answer(1), IssuerUnavailable("a hiccup"), answer(2), TokenResponse("t-3", expires_in=0.5)]
    source = TokenSource(issuer, refresh_token="first")
    await source.token()
    started = time.monotonic()
    # Nobody asks: after 70 % of the session's life comes the refresh that fails, its retry, and after as long again
    # one that says nothing of an end, so there is nothing to keep alive any more.
    await settled(lambda: len(issuer.asked) == 4)
    assert issuer.asked == ["first", "r-1", "r-1", "r-2"]
    assert time.monotonic() - started > 2.5
    await settled(lambda: source._refresh is None)
    assert source._keep_alive is not None
    assert source._keep_alive.cancelled()


async def test_a_session_whose_first_token_was_given_is_kept_alive_too(issuer: Issuer, clock: Clock) -> None:
    class Kept(Disk):
        def read(self) -> Stored | None:
            return Stored("kept", session_ends_at=START + 600)

    initial = jwt_with(exp=START + 100, iat=START)
    source = TokenSource(issuer, refresh_token="first", access_token=initial, store=Kept(), now=clock)
    assert (await source.token()).value == initial
    await settled(lambda: source._refresh is None)
    assert source._keep_alive is not None
    assert not source._keep_alive.cancelled()
    source.retire()


# --- what could not be saved -------------------------------------------------------------------------------------


class Disk:
    """A store whose disk may be full."""

    place = "disk"

    def __init__(self) -> None:
        self.full = False
        self.kept: list[Stored] = []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def read(self) -> Stored | None:
        return self.kept[-1] if self.kept else None

    def write(self, session: Stored) -> None:
        if self.full:
            raise StoreError("the disk is full")
        self.kept.append(session)

    def changed_at(self) -> int:
        return len(self.kept)


@pytest.mark.parametrize("at_the_end", [True, False])
async def test_what_could_not_be_saved_is_saved_as_soon_as_it_can(
    at_the_end: bool, issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eoepca_security.session.source._SAVE_INTERVAL", 60 if at_the_end else 0.01)
    disk = Disk()
    disk.full = True
    source = TokenSource(issuer, refresh_token="first", store=disk, now=clock)
    issuer.answers = [TokenResponse("a", expires_in=60, refresh_token="second")]
    await source.token()
    assert disk.kept == []
    disk.full = False
    if at_the_end:
        await source.finish()
    else:
        await settled(lambda: bool(disk.kept))
    assert [stored.refresh_token for stored in disk.kept] == ["second"]
    source.retire()


async def test_a_store_that_hangs_does_not_hold_up_a_refusal(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    class Hanging(Disk):
        hangs = False

        def changed_at(self) -> int:
            assert not self.hangs or gate.wait(10)
            return 1

    monkeypatch.setattr("eoepca_security.session.token_cycle.PATIENCE", 0.05)
    store = Hanging()
    source = TokenSource(issuer, refresh_token="first", store=store, now=clock)
    issuer.answers = [CredentialsRejected("no") for _ in range(9)]
    with pytest.raises(CredentialsRejected):
        await source.token()
    store.hangs = True
    for _ in range(3):
        with pytest.raises(CredentialsRejected):
            await asyncio.wait_for(source.token(), 5)
    gate.set()


# --- what others may know ----------------------------------------------------------------------------------------


async def test_refreshes_are_told_of_and_the_token_at_hand_is_one_to_send(issuer: Issuer, clock: Clock) -> None:
    told: list[TokenError | None] = []
    source = TokenSource(issuer, refresh_token="first", now=clock, observe=lambda error, _seconds: told.append(error))
    assert source.at_hand is None
    issuer.answers = [IssuerUnavailable("down")]
    with pytest.raises(IssuerUnavailable):
        await source.token()
    assert str(source.error) == "down"
    token = await source.token()
    assert source.at_hand is token
    assert source.error is None
    assert [error and error.code for error in told] == ["issuer_unavailable", None]
    clock.time += 60
    assert source.at_hand is None
