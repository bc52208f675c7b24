"""One login: whichever process uses it, its newest refresh token is used, once, and is on the disk first."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.protocol import MAX_LIFETIME, TokenResponse
from eoepca_security.session.file_store import TokenStore
from eoepca_security.session.session import DEFAULT_LIFETIME, RefreshSession, token_end
from tests.support.clock import START, Clock
from tests.support.tokens import jwt_with


@pytest.mark.parametrize(
    ("response", "end"),
    [
        # It counts from some moment within the two seconds.
        (TokenResponse("opaque", expires_in=60), START + 60),
        (TokenResponse("opaque", expires_in=6), START + 2 + 6 - 0.6),
        (TokenResponse("opaque"), START + DEFAULT_LIFETIME),
        (TokenResponse(jwt_with(exp=START + 300)), START + 300),
        (TokenResponse(jwt_with(exp=START + 300, iat=START)), START + 300),
        # Both are said: the earlier counts.
        (TokenResponse(jwt_with(exp=START + 300, iat=START), expires_in=60), START + 2 + 60),
        (TokenResponse(jwt_with(exp=START + 30, iat=START), expires_in=60), START + 30),
        # The issuer's clock is ahead or behind: only the difference of its claims is used, less the lost fraction.
        (TokenResponse(jwt_with(exp=START + 65, iat=START + 5)), START + 59),
        (TokenResponse(jwt_with(exp=START + 55, iat=START - 5)), START + 59),
        (TokenResponse(jwt_with(exp=START + 65, iat=START + 5), expires_in=60), START + 59),
        # Issued long ago, and kept by the issuer.
        (TokenResponse(jwt_with(exp=START + 100, iat=START - 3500)), START + 100),
        # Claims that are no times.
        (TokenResponse(jwt_with(exp="soon", iat=START), expires_in=60), START + 60),
        (TokenResponse(jwt_with(exp=True), expires_in=60), START + 60),
        (TokenResponse(jwt_with(exp=10**400), expires_in=60), START + 60),
        (TokenResponse(jwt_with(exp=START + 60, iat="now")), START + 60),
        # A number for "for ever", which timers and calendars cannot express.
        (TokenResponse(jwt_with(exp=9_467_000_000_000)), START + 2 + MAX_LIFETIME),
        (TokenResponse(jwt_with(exp=10**400, iat=START)), START + 2 + MAX_LIFETIME),
        (TokenResponse(jwt_with(exp=START + 60, iat=-(10**400))), START + 60),
    ],
)
def test_the_end_of_a_token_is_reckoned_rather_too_early_than_too_late(response: TokenResponse, end: float) -> None:
    assert token_end(response, sent_at=START, received_at=START + 2) == pytest.approx(end)


class StrictIssuer:
    """Accepts each refresh token once."""

    def __init__(self) -> None:
        self.valid = "rt-0"
        self.count = 0
        self.reuses = 0
        self.lose_answers = 0
        self.before_answer: Callable[[], object] = lambda: None

    def __call__(self, refresh_token: str | None) -> TokenResponse:
        if refresh_token != self.valid:
            self.reuses += 1
            raise CredentialsRejected("invalid_grant")
        self.count += 1
        self.valid = f"rt-{self.count}"
        self.before_answer()
        if self.lose_answers:
            self.lose_answers -= 1
            raise IssuerUnavailable("timed out", was_sent=True)
        return TokenResponse(f"at-{self.count}", 60, self.valid, refresh_expires_in=1800)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer() -> StrictIssuer:
    return StrictIssuer()


def session(issuer: StrictIssuer, clock: Clock, folder: Path | None, token: str | None = "rt-0") -> RefreshSession:
    store = None
    if folder is not None:
        store = TokenStore(folder, issuer_url="https://issuer.example", client_id="client", origin=token)
    return RefreshSession(issuer, token, store=store, now=clock)


def test_a_restart_with_the_original_token_continues_the_session(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    for count in range(1, 5):
        assert session(issuer, clock, tmp_path).renew(None).value == f"at-{count}"
    assert issuer.reuses == 0


def test_the_successor_is_on_the_disk_before_its_token_is_used(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    first = session(issuer, clock, tmp_path)
    first.renew(None)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["refresh_token"] == "rt-1"


@pytest.mark.parametrize("stored", [True, False])
def test_a_successor_that_came_with_a_bad_access_token_is_not_lost(
    stored: bool, issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    def spoilt() -> None:
        error = TokenInvalid("no access_token")
        error.refresh_token = issuer.valid
        raise error

    folder = tmp_path if stored else None
    mine = session(issuer, clock, folder)
    issuer.before_answer = spoilt
    with pytest.raises(TokenInvalid):
        mine.renew(None)
    issuer.before_answer = lambda: None
    # After a restart, where that is possible.
    again = session(issuer, clock, folder) if stored else mine
    assert again.renew("at-0").value == "at-2"
    assert issuer.reuses == 0


@pytest.mark.parametrize("to_disk", [True, False])
def test_a_session_that_moves_keeps_what_it_has(
    to_disk: bool, issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    mine = session(issuer, clock, None if to_disk else tmp_path)
    mine.renew(None)
    store = TokenStore(tmp_path, issuer_url="https://issuer.example", client_id="client", origin="rt-0")
    mine.continue_with(issuer, store if to_disk else None)
    assert mine.renew("at-1").value == "at-2"
    assert (json.loads(next(tmp_path.glob("*.json")).read_text())["refresh_token"] == "rt-2") == to_disk
    assert issuer.reuses == 0


def test_an_id_token_is_shared_too(clock: Clock, tmp_path: Path) -> None:
    class Issuer(StrictIssuer):
        def __call__(self, refresh_token: str | None) -> TokenResponse:
            return replace(super().__call__(refresh_token), id_token="id-1")

    issuer = Issuer()
    assert session(issuer, clock, tmp_path).renew(None).id_token == "id-1"
    assert session(issuer, clock, tmp_path).renew("another").id_token == "id-1"
    assert issuer.count == 1


def test_a_different_token_in_the_settings_wins_over_the_store(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    session(issuer, clock, tmp_path).renew(None)
    issuer.valid = "new-login"
    assert session(issuer, clock, tmp_path, "new-login").renew(None).value == "at-2"
    assert issuer.reuses == 0


def test_processes_take_turns_and_share_what_one_of_them_got(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    one, two = session(issuer, clock, tmp_path), session(issuer, clock, tmp_path)
    first = one.renew(None).value
    second = two.renew(None).value
    assert (first, second) == ("at-1", "at-2")
    clock.time += 55
    # The second's is older than the first's by now, so one of them asks and the other one finds its answer.
    assert two.renew("at-2").value == "at-3"
    shared = one.renew("at-1")
    assert (shared.value, shared.obtained_at, shared.ends_at) == ("at-3", START + 55, START + 115)
    assert (issuer.count, issuer.reuses) == (3, 0)


def test_one_that_has_no_token_to_replace_may_take_what_another_process_got(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    session(issuer, clock, tmp_path).renew(None)
    assert session(issuer, clock, tmp_path).renew("").value == "at-1"


def test_an_old_token_of_another_process_is_not_taken_over(issuer: StrictIssuer, clock: Clock, tmp_path: Path) -> None:
    one, two = session(issuer, clock, tmp_path), session(issuer, clock, tmp_path)
    one.renew(None)
    two.renew(None)
    clock.time += 50
    assert one.renew("at-1").value == "at-3"


def test_many_threads_use_each_refresh_token_once(issuer: StrictIssuer, clock: Clock, tmp_path: Path) -> None:
    sessions = [session(issuer, clock, tmp_path) for _ in range(4)]

    def work(mine: RefreshSession) -> None:
        for _ in range(5):
            mine.renew(None)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in sessions for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (issuer.count, issuer.reuses) == (40, 0)


def test_a_store_that_cannot_be_used_is_told_once_and_the_session_goes_on(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    broken = session(issuer, clock, occupied)
    assert [broken.renew(None).value for _ in range(3)] == ["at-1", "at-2", "at-3"]
    assert caplog.text.count("only in memory") == 1


def test_what_is_stored_is_used_even_where_it_cannot_be_locked_or_written(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    session(issuer, clock, tmp_path).renew(None)
    mine = session(issuer, clock, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("eoepca_security.session.file_store.FileLock.acquire", read_only)
        patch.setattr(TokenStore, "_fill", read_only)
        assert mine.renew(None).value == "at-2"
        assert mine.renew(None).value == "at-3"
        assert mine.is_unsaved
    mine.save()
    assert session(issuer, clock, tmp_path).renew(None).value == "at-4"
    assert issuer.reuses == 0


def test_a_lock_that_fails_once_makes_no_old_memory_count_as_new(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = session(issuer, clock, tmp_path), session(issuer, clock, tmp_path)
    one.renew(None)
    two.renew(None)
    with monkeypatch.context() as patch:
        patch.setattr(
            "eoepca_security.session.file_store.FileLock.acquire", lambda _: (_ for _ in ()).throw(OSError(24, "files"))
        )
        with pytest.raises(IssuerUnavailable):
            one.renew(None)
    two.renew(None)
    assert one.renew(None).value == "at-4"
    assert issuer.reuses == 0


def test_a_damaged_file_is_not_overwritten(issuer: StrictIssuer, clock: Clock, tmp_path: Path) -> None:
    session(issuer, clock, tmp_path).renew(None)
    (file,) = tmp_path.glob("*.json")
    file.write_text("cut o")
    damaged = session(issuer, clock, tmp_path, "rt-0")
    issuer.valid = "rt-0"
    damaged.renew(None)
    damaged.renew(None)
    assert file.read_text() == "cut o"


def test_a_disk_that_is_full_for_a_while_gets_the_session_later(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    mine = session(issuer, clock, tmp_path)
    mine.renew(None)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        assert mine.renew(None).value == "at-2"
    assert mine.renew(None).value == "at-3"
    assert session(issuer, clock, tmp_path).renew(None).value == "at-4"
    assert issuer.reuses == 0


def test_a_new_login_in_the_store_is_noticed_and_used(issuer: StrictIssuer, clock: Clock, tmp_path: Path) -> None:
    mine = session(issuer, clock, tmp_path)
    mine.renew(None)
    issuer.valid = "relogin"
    with pytest.raises(CredentialsRejected):
        mine.renew(None)
    assert not mine.has_news()
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text()) | {"refresh_token": "relogin"}
    file.write_text(json.dumps(content))
    assert mine.has_news()
    assert mine.renew(None).value == "at-2"
    assert not mine.has_news()


def test_a_lost_answer_is_asked_for_again_with_the_same_token(issuer: StrictIssuer, clock: Clock) -> None:
    mine = session(issuer, clock, None)
    issuer.lose_answers = 1
    issuer.before_answer = lambda: setattr(issuer, "valid", "rt-0")  # it was not used up
    with pytest.raises(IssuerUnavailable):
        mine.renew(None)
    assert mine.renew(None).value == "at-2"


def test_when_a_lost_answer_had_the_only_token_that_is_said(issuer: StrictIssuer, clock: Clock) -> None:
    mine = session(issuer, clock, None)
    issuer.lose_answers = 1
    with pytest.raises(IssuerUnavailable):
        mine.renew(None)
    with pytest.raises(CredentialsRejected, match="answer to the previous refresh was lost"):
        mine.renew(None)


def test_the_end_of_the_session_is_known_where_the_issuer_says_it(
    issuer: StrictIssuer, clock: Clock, tmp_path: Path
) -> None:
    mine = session(issuer, clock, tmp_path)
    assert mine.ends_at is None
    mine.renew(None)
    assert mine.ends_at == START + 1800
