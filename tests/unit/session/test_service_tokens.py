"""Services that share a login: whose token is whose, who waits for whom, and whose errors are whose."""

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.session.file_store import MAX_FILE, TokenStore
from eoepca_security.session.service_tokens import (
    Sources,
    client_tokens,
    exchanged_tokens,
    id_tokens,
    refreshed_tokens,
    shared_tokens,
)
from eoepca_security.session.session import AccessToken, Purpose, RefreshSession, Stored
from eoepca_security.session.source import TokenSource
from tests.support.clock import START, Clock
from tests.support.issuer import Issuer
from tests.support.tokens import jwt_with


class RotatingIssuer:
    """Takes each refresh token once, and gives tokens that name their purpose."""

    def __init__(self) -> None:
        self.valid = "refresh-0"
        self.given = 0
        self.attempts: list[str] = []
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def give(self, purpose: str, refresh_token: str | None, *, scope: str | None = None) -> TokenResponse:
        with self.lock:
            self.attempts.append(purpose)
            if refresh_token != self.valid:
                raise CredentialsRejected("the issuer answered invalid_grant", issuer_error="invalid_grant")
            self.given += 1
            self.valid = f"refresh-{self.given}"
            self.asked.append(purpose)
            return TokenResponse(f"{purpose}-{self.given}", 60, self.valid, scope=scope)

    def own(self, refresh_token: str | None) -> TokenResponse:
        return self.give("own", refresh_token, scope="openid wide")

    def purpose(self, name: str) -> Purpose:
        return Purpose(name, lambda refresh_token, _scope: self.give(name, refresh_token))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer() -> RotatingIssuer:
    return RotatingIssuer()


def store_in(folder: Path) -> TokenStore:
    return TokenStore(folder / "store", issuer_url="https://issuer.example", client_id="client", origin=None)


def session_in(folder: Path, issuer: RotatingIssuer, clock: Clock) -> RefreshSession:
    return RefreshSession(issuer.own, "refresh-0", store=store_in(folder), now=clock)


# --- one refresh token for all -----------------------------------------------------------------------------------


def test_each_purpose_gets_its_own_token_and_each_refresh_token_is_used_once(
    tmp_path: Path, issuer: RotatingIssuer, clock: Clock
) -> None:
    session = session_in(tmp_path, issuer, clock)
    tokens = [session.renew(None), *(session.renew("", issuer.purpose(name)) for name in ("stac", "data"))]
    assert [token.value for token in tokens] == ["own-1", "stac-2", "data-3"]
    assert session.renew("own-1").value == "own-4"
    kept = store_in(tmp_path).read()
    assert kept is not None
    assert (kept.refresh_token, kept.access_token) == ("refresh-4", "own-4")
    assert {key: token.value for key, token in kept.for_services.items()} == {"stac": "stac-2", "data": "data-3"}


def test_another_process_takes_the_stored_token_of_its_own_purpose_only(
    tmp_path: Path, issuer: RotatingIssuer, clock: Clock
) -> None:
    one, other = session_in(tmp_path, issuer, clock), session_in(tmp_path, issuer, clock)
    one.renew(None)
    one.renew("", issuer.purpose("stac"))
    assert other.renew("", issuer.purpose("stac")).value == "stac-2"
    assert other.renew("").value == "own-1"
    assert other.renew("", issuer.purpose("data")).value == "data-3"
    assert issuer.asked == ["own", "stac", "data"]


def test_a_purpose_does_not_get_a_stored_token_that_is_almost_over(
    tmp_path: Path, issuer: RotatingIssuer, clock: Clock
) -> None:
    session = session_in(tmp_path, issuer, clock)
    session.renew(None)
    session.renew("", issuer.purpose("stac"))
    clock.time += 50
    assert session_in(tmp_path, issuer, clock).renew("", issuer.purpose("stac")).value == "stac-3"


def test_tokens_that_have_ended_are_not_kept(tmp_path: Path, issuer: RotatingIssuer, clock: Clock) -> None:
    session = session_in(tmp_path, issuer, clock)
    session.renew(None)
    session.renew("", issuer.purpose("stac"))
    clock.time += 61
    session.renew("own-1")
    kept = store_in(tmp_path).read()
    assert kept is not None
    assert kept.for_services == {}


def test_the_session_remembers_what_the_login_was_granted(tmp_path: Path, issuer: RotatingIssuer, clock: Clock) -> None:
    session_in(tmp_path, issuer, clock).renew(None)
    seen: list[str | None] = []

    def request(refresh_token: str | None, scope: str | None) -> TokenResponse:
        seen.append(scope)
        return issuer.give("stac", refresh_token, scope="narrow")

    later = session_in(tmp_path, issuer, clock)
    later.renew("", Purpose("stac", request))
    assert seen == ["openid wide"]
    assert later.scope == "openid wide"


def test_many_purposes_in_many_threads_never_use_a_refresh_token_twice(
    tmp_path: Path, issuer: RotatingIssuer, clock: Clock
) -> None:
    sessions = [session_in(tmp_path, issuer, clock) for _ in range(3)]
    sessions[0].renew(None)
    failed: list[Exception] = []

    def ask(session: RefreshSession, name: str) -> None:
        try:
            for _ in range(3):
                session.renew(None, issuer.purpose(name))
        except Exception as error:  # noqa: BLE001  the test says what it was
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(each, name)) for each in sessions for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert issuer.given == 1 + 27


def test_service_tokens_that_do_not_fit_into_the_file_are_left_out(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write(Stored("refresh", for_services={"stac": AccessToken("t" * MAX_FILE, START, START + 60)}))
    assert store.read() == Stored("refresh")


def test_damaged_service_tokens_are_reported(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write(Stored("refresh", "access", START, START + 60))
    content = store.place.read_text().rstrip()
    store.place.write_text(content.replace('"for_services": {}', '"for_services": []'))
    with pytest.raises(Exception, match="damaged"):
        store_in(tmp_path).read()


def test_no_repr_shows_a_token() -> None:
    shown = repr(Stored("secret", for_services={"stac": AccessToken("secret", START, START)}))
    assert "secret" not in shown
    assert "stac" in shown


# --- one cycle for each service ----------------------------------------------------------------------------------


async def test_shared_tokens_are_the_logins_and_are_renewed_together(clock: Clock) -> None:
    issuer = Issuer()
    login = TokenSource(issuer, refresh_token="first", now=clock)
    stac, data = (shared_tokens(login, now=clock, service=name) for name in ("stac", "data"))
    assert {(await source.token()).value for source in (login, stac, data)} == {"token-1"}
    clock.time += 61
    assert {(await source.token()).value for source in (data, stac, login)} == {"token-2"}
    assert len(issuer.asked) == 2


async def test_a_shared_token_that_one_service_must_not_use_is_still_the_others(clock: Clock) -> None:
    login = TokenSource(Issuer(), refresh_token="first", now=clock)

    def refuse(_token: str) -> None:
        raise TokenInvalid("not for this audience")

    strict = shared_tokens(login, now=clock, check=refuse, service="strict")
    with pytest.raises(TokenInvalid):
        await strict.token()
    assert (await shared_tokens(login, now=clock).token()).value == "token-1"
    assert login.error is None


async def test_an_exchange_has_the_logins_token_and_its_own_lifetime(clock: Clock) -> None:
    login = TokenSource(Issuer(lifetime=300), refresh_token="first", now=clock)
    subjects: list[str] = []

    def exchange(subject: str) -> TokenResponse:
        subjects.append(subject)
        return TokenResponse(f"exchanged-{len(subjects)}", 60)

    stac = exchanged_tokens(login, exchange, now=clock)
    assert (await stac.token()).value == "exchanged-1"
    clock.time += 61
    assert (await stac.token()).value == "exchanged-2"
    assert subjects == ["token-1", "token-1"]


async def test_a_slow_exchange_keeps_nobody_waiting(clock: Clock) -> None:
    gate = threading.Event()
    login = TokenSource(Issuer(), refresh_token="first", now=clock)

    def slow(_subject: str) -> TokenResponse:
        assert gate.wait(10)
        return TokenResponse("late", 60)

    slow_one = exchanged_tokens(login, slow, now=clock)
    waiting = asyncio.ensure_future(slow_one.token())
    try:
        fast_one = exchanged_tokens(login, lambda _: TokenResponse("soon", 60), now=clock)
        assert (await asyncio.wait_for(fast_one.token(), 5)).value == "soon"
        replaced = await asyncio.wait_for(login.replace("token-1"), 5)
        assert replaced is not None
        assert not waiting.done()
    finally:
        gate.set()
    assert (await waiting).value == "late"


async def test_an_exchange_is_tried_again_with_another_token_if_that_was_refused(clock: Clock) -> None:
    login = TokenSource(Issuer(), refresh_token="first", now=clock)

    def exchange(subject: str) -> TokenResponse:
        if subject == "token-1":
            raise CredentialsRejected("the issuer answered invalid_grant", cause="subject_token")
        return TokenResponse(f"for-{subject}", 60)

    assert (await exchanged_tokens(login, exchange, now=clock).token()).value == "for-token-2"


async def test_a_refused_exchange_is_the_services_own_error_and_costs_no_refresh(clock: Clock) -> None:
    issuer = Issuer()
    login = TokenSource(issuer, refresh_token="first", now=clock)

    def refuse(_subject: str) -> TokenResponse:
        raise CredentialsRejected("the issuer answered unauthorized_client", issuer_error="unauthorized_client")

    stac = exchanged_tokens(login, refuse, now=clock)
    sources = Sources(login, {"stac": stac})
    for _ in range(2):
        with pytest.raises(CredentialsRejected) as caught:
            await stac.token()
    assert login.error is None
    assert len(issuer.asked) == 1
    assert sources.is_own(caught.value, "stac")


async def test_the_logins_error_is_logged_once_and_ends_for_all_at_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    issuer = Issuer()
    issuer.answers = [IssuerUnavailable("away", retry_after=20)]
    login = TokenSource(issuer, refresh_token="first", now=clock)
    services = [
        shared_tokens(login, now=clock),
        exchanged_tokens(login, lambda subject: TokenResponse(f"for-{subject}", 60), now=clock),
    ]
    sources = Sources(login, {"shared": services[0], "exchange": services[1], "alone": login})
    with caplog.at_level(logging.WARNING, "eoepca_security.session.token_cycle"):
        for service in services:
            with pytest.raises(IssuerUnavailable, match="away") as caught:
                await service.token()
            assert [sources.is_own(caught.value, name) for name in sources.services] == [False, False, True]
    assert sum("away" in message for message in caplog.messages) == 1
    clock.time += 26
    assert [(await service.token()).value for service in services] == ["token-2", "for-token-2"]


async def test_refreshed_tokens_save_the_session_and_wait_for_a_login(
    tmp_path: Path, issuer: RotatingIssuer, clock: Clock
) -> None:
    login = TokenSource(issuer.own, refresh_token="refresh-0", store=store_in(tmp_path), now=clock)
    stac = refreshed_tokens(login, issuer.purpose("stac"), now=clock)
    # The login first, as its scope is needed.
    assert (await stac.token()).value == "stac-2"
    await login.finish()
    kept = store_in(tmp_path).read()
    assert kept is not None
    assert kept.refresh_token == "refresh-2"
    # Once the login is known to be rejected, nobody sends the dead refresh token again.
    issuer.valid = "gone"
    clock.time += 61
    with pytest.raises(CredentialsRejected):
        await login.token()
    with pytest.raises(CredentialsRejected):
        await stac.token()
    assert issuer.attempts.count("stac") == 1
    # A new login is found without a wait.
    issuer.valid = "refresh-new"
    store_in(tmp_path).write(Stored("refresh-new"))
    assert (await stac.token()).value.startswith("stac-")


async def test_id_tokens_come_with_the_login_and_end_by_themselves(clock: Clock) -> None:
    issuer = Issuer(lifetime=300)
    first, second = (jwt_with(sub="alice", exp=START + end) for end in (60, 120))
    issuer.answers = [TokenResponse("a", 300, id_token=first), TokenResponse("b", 300, id_token=second)]
    login = TokenSource(issuer, refresh_token="first", now=clock)
    source = id_tokens(login, now=clock)
    assert (await source.token()).value == first
    clock.time += 61
    assert (await source.token()).value == second


async def test_an_issuer_that_sends_no_id_token_is_named(clock: Clock) -> None:
    source = id_tokens(TokenSource(Issuer(), refresh_token="first", now=clock), now=clock)
    with pytest.raises(TokenInvalid) as raised:
        await source.token()
    assert raised.value.cause == "no_id_token"


async def test_client_tokens_need_no_login(clock: Clock) -> None:
    source = client_tokens(lambda: TokenResponse("for-stac", 60), now=clock)
    assert (await source.token()).value == "for-stac"


async def test_the_end_waits_for_a_services_refresh_but_not_for_an_exchange(
    tmp_path: Path, issuer: RotatingIssuer, clock: Clock
) -> None:
    gate, begun = threading.Event(), threading.Semaphore(0)
    login = TokenSource(issuer.own, refresh_token="refresh-0", store=store_in(tmp_path), now=clock)
    await login.token()

    def slow(refresh_token: str | None, _scope: str | None) -> TokenResponse:
        begun.release()
        assert gate.wait(10)
        return issuer.give("stac", refresh_token)

    def stuck(_subject: str) -> TokenResponse:
        begun.release()
        assert gate.wait(10)
        return TokenResponse("late", 60)

    stac = refreshed_tokens(login, Purpose("stac", slow), now=clock)
    data = exchanged_tokens(login, stuck, now=clock)
    waiting = asyncio.gather(stac.token(), data.token())
    for _ in range(2):
        assert await asyncio.to_thread(begun.acquire, timeout=10)
    finishing = asyncio.ensure_future(login.finish())
    await asyncio.sleep(0.05)
    assert not finishing.done()
    gate.set()
    await finishing
    kept = store_in(tmp_path).read()
    assert kept is not None
    assert kept.refresh_token == "refresh-2"
    await waiting


async def test_an_exchange_under_way_does_not_delay_the_end(clock: Clock) -> None:
    gate = threading.Event()
    login = TokenSource(Issuer(), refresh_token="first", now=clock)
    data = exchanged_tokens(login, lambda _: TokenResponse("late", 60) if gate.wait(10) else None, now=clock)  # type: ignore[arg-type, return-value]
    waiting = asyncio.ensure_future(data.token())
    await login.token()
    try:
        await asyncio.wait_for(login.finish(), 5)
        assert not waiting.done()
    finally:
        gate.set()
    await waiting
