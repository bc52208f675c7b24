"""A login in the store takes over from a refresh token in the settings that the issuer has rejected."""

import base64
import json
import logging
from pathlib import Path

import pytest

from eoepca_security.errors import CredentialsRejected
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.session.file_store import TokenStore
from eoepca_security.session.session import RefreshSession, Stored
from tests.support.clock import Clock


class Users:
    """An issuer with the session of several users, which accepts each refresh token once, and then kills the session.

    `valid` has the user of each valid refresh token, `sent` all refresh tokens that were sent.
    """

    def __init__(self) -> None:
        self.valid = {"given": "alice", "login": "alice"}
        self.error = "invalid_grant"
        self.sent: list[str | None] = []
        self.opaque = False

    def __call__(self, refresh_token: str | None) -> TokenResponse:
        assert refresh_token is not None
        assert refresh_token not in self.sent or refresh_token not in self.valid, "a used token was sent again"
        self.sent.append(refresh_token)
        user = self.valid.pop(refresh_token, None)
        if user is None:
            raise CredentialsRejected(f"the issuer answered {self.error}", issuer_error=self.error)
        successor = f"{refresh_token}+"
        self.valid[successor] = user
        claims = base64.urlsafe_b64encode(json.dumps({"sub": user, "n": len(self.sent)}).encode()).decode().rstrip("=")
        return TokenResponse(f"opaque-{len(self.sent)}" if self.opaque else f"e30.{claims}.c2ln", 60, successor)

    def ends(self, user: str) -> None:
        self.valid = {token: owner for token, owner in self.valid.items() if owner != user}


@pytest.fixture
def issuer() -> Users:
    return Users()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store(folder: Path, origin: str | None) -> TokenStore:
    return TokenStore(folder, issuer_url="https://issuer.example", client_id="client", origin=origin)


def session(issuer: Users, clock: Clock, folder: Path, token: str = "given") -> RefreshSession:
    return RefreshSession(issuer, token, store=store(folder, token), logins=store(folder, None), now=clock)


def log_in(folder: Path, token: str = "login", origin: str | None = None) -> None:
    place = store(folder, origin)
    with place.locked():
        place.read()
        place.write(Stored(token))


def rejected(session: RefreshSession) -> CredentialsRejected:
    with pytest.raises(CredentialsRejected) as caught:
        session.renew(None)
    return caught.value


@pytest.mark.parametrize("opaque", [False, True])
def test_a_login_is_noticed_and_takes_over(
    opaque: bool, issuer: Users, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.opaque = opaque
    mine = session(issuer, clock, tmp_path)
    last = mine.renew(None).value
    del issuer.valid["given+"]
    rejected(mine)
    assert not mine.has_news()
    log_in(tmp_path)
    assert mine.has_news()
    with caplog.at_level(logging.WARNING):
        token = mine.renew(last)
    assert mine.login_took_over
    assert not mine.has_news()
    assert "continuing with the stored login of " in caplog.text
    # From then on, the rejected token is not sent again, and the login's are used in their order.
    assert mine.renew(token.value).value != token.value
    assert issuer.sent == ["given", "given+", "given+", "login", "login+"]
    # It is said once.
    assert len(caplog.records) == 1


def test_a_later_start_and_other_processes_do_not_send_the_rejected_token_again(
    issuer: Users, clock: Clock, tmp_path: Path
) -> None:
    first, other = session(issuer, clock, tmp_path), session(issuer, clock, tmp_path)
    token = first.renew(None)
    assert other.renew("").value == token.value
    del issuer.valid["given+"]
    log_in(tmp_path)
    token = first.renew(token.value)
    # A process that runs, too, shares the login's token; so does one that starts.
    assert other.renew("stale").value == token.value
    assert session(issuer, clock, tmp_path).renew("").value == token.value
    again = session(issuer, clock, tmp_path)
    again.renew(None)
    assert issuer.sent == ["given", "given+", "login"]
    clock.time += 50
    again.renew(token.value)
    assert issuer.sent == ["given", "given+", "login", "login+"]


def test_a_token_that_never_worked_is_tried_once(issuer: Users, clock: Clock, tmp_path: Path) -> None:
    log_in(tmp_path)
    for _ in range(2):
        assert session(issuer, clock, tmp_path, "dead").renew("").value
    assert issuer.sent == ["dead", "login"]


def test_a_login_of_another_user_does_not_take_over(issuer: Users, clock: Clock, tmp_path: Path) -> None:
    issuer.valid["login"] = "bob"
    mine = session(issuer, clock, tmp_path)
    mine.renew(None)
    issuer.ends("alice")
    log_in(tmp_path)
    for someone in (mine, session(issuer, clock, tmp_path)):
        error = rejected(someone)
        assert (error.cause, "of another user, bob" in str(error)) == ("other_user", True)
        assert not someone.has_news()
    # When alice logs in, it is noticed. Later, bob does: his login does not take over from hers.
    issuer.valid |= {"alice-2": "alice", "bob-2": "bob"}
    log_in(tmp_path, "alice-2")
    assert mine.has_news()
    token = mine.renew(None)
    log_in(tmp_path, "bob-2")
    with pytest.raises(CredentialsRejected, match="of another user, bob"):
        mine.renew(token.value)


@pytest.mark.parametrize("error", ["invalid_client", "unauthorized_client", "invalid_scope"])
def test_what_is_not_the_sessions_fault_leaves_the_login_alone(
    error: str, issuer: Users, clock: Clock, tmp_path: Path
) -> None:
    issuer.error = error
    log_in(tmp_path)
    mine = session(issuer, clock, tmp_path, "dead")
    assert rejected(mine).issuer_error == error
    assert issuer.sent == ["dead"]
    # Nor does the login that was there count as news, which would be a reason to ask the issuer again at once.
    assert not mine.has_news()


@pytest.mark.parametrize("copied", ["given", "given+"])
def test_a_login_with_a_used_token_of_the_session_is_not_used(
    copied: str, issuer: Users, clock: Clock, tmp_path: Path
) -> None:
    mine = session(issuer, clock, tmp_path)
    mine.renew(None)
    issuer.ends("alice")
    log_in(tmp_path, copied)
    rejected(mine)
    assert issuer.sent == ["given", "given+"]


def test_a_newer_token_in_the_settings_comes_before_the_login(issuer: Users, clock: Clock, tmp_path: Path) -> None:
    log_in(tmp_path)
    session(issuer, clock, tmp_path, "dead").renew(None)
    issuer.valid["newer"] = "alice"
    newer = session(issuer, clock, tmp_path, "newer")
    newer.renew(None)
    assert not newer.login_took_over
    assert issuer.sent == ["dead", "login", "newer"]


def test_a_login_with_the_same_settings_comes_before_the_other_one(issuer: Users, clock: Clock, tmp_path: Path) -> None:
    log_in(tmp_path)
    mine = session(issuer, clock, tmp_path, "dead")
    token = mine.renew(None)
    issuer.valid["mine"] = "alice"
    log_in(tmp_path, "mine", origin="dead")
    for someone in (mine, session(issuer, clock, tmp_path, "dead")):
        someone.renew(token.value)
        assert not someone.login_took_over
    assert issuer.sent == ["dead", "login", "mine"]


def test_after_a_logout_the_token_in_the_settings_is_tried_again(issuer: Users, clock: Clock, tmp_path: Path) -> None:
    log_in(tmp_path)
    mine = session(issuer, clock, tmp_path)
    token = mine.renew(None)
    issuer.ends("alice")
    issuer.valid["login"] = "alice"
    token = mine.renew(token.value)
    store(tmp_path, None).forget()
    # The access token of the rejected session, which is stored, is not young any more.
    assert rejected(session(issuer, clock, tmp_path)).issuer_error == "invalid_grant"
    with pytest.raises(CredentialsRejected, match="invalid_grant"):
        mine.renew(token.value)


def test_a_takeover_that_cannot_be_noted_is_remembered(
    issuer: Users, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(tmp_path)
    mine = session(issuer, clock, tmp_path, "dead")
    write = TokenStore.write

    def write_unless_mine(place: TokenStore, what: Stored) -> None:
        if what.refresh_token != "dead":
            write(place, what)

    monkeypatch.setattr(TokenStore, "write", write_unless_mine)
    token = mine.renew(None)
    mine.renew(token.value)
    assert issuer.sent == ["dead", "login", "login+"]


def test_a_login_that_is_rejected_too_is_told_and_asked_for_no_more_often_than_any(
    issuer: Users, clock: Clock, tmp_path: Path
) -> None:
    log_in(tmp_path)
    mine = session(issuer, clock, tmp_path)
    mine.renew(None)
    issuer.ends("alice")
    assert rejected(mine).issuer_error == "invalid_grant"
    assert not mine.has_news()
    issuer.valid["again"] = "alice"
    log_in(tmp_path, "again")
    assert mine.has_news()
    assert mine.renew(None).value
    assert mine.login_took_over
