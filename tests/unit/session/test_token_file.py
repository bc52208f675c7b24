"""Files with a token: how they are written, where they may be, and how long they are there."""

import asyncio
import contextlib
import logging
import os
import re
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.session.service_tokens import exchanged_tokens, shared_tokens
from eoepca_security.session.session import AccessToken
from eoepca_security.session.source import TokenSource
from eoepca_security.session.token_cycle import TokenCycle
from eoepca_security.session.token_file import TokenFile, TokenFileError, TokenFileKeeper, due, place_problem
from tests.support.clock import START, Clock
from tests.support.issuer import Issuer
from tests.support.waiting import settled

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "token"


@pytest.fixture
def file(path: Path) -> TokenFile:
    return TokenFile(path)


# --- the file ----------------------------------------------------------------------------------------------------


def test_it_has_the_token_alone_and_only_its_owner_can_read_it(file: TokenFile, path: Path) -> None:
    file.write("the-token")
    assert path.read_bytes() == b"the-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_the_mode_is_the_one_that_is_set_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        TokenFile(path, 0o644).write("the-token")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_reader_of_the_old_file_keeps_the_old_token(file: TokenFile, path: Path) -> None:
    file.write("old")
    with path.open() as reader:
        file.write("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_what_a_killed_process_left_is_removed_and_what_others_have_is_not(file: TokenFile, path: Path) -> None:
    left = path.with_name(f".token.{'0' * 16}")
    others = [path.with_name(name) for name in (".token.x", f".tokens.{'0' * 16}", "token.txt")]
    for one in (left, *others):
        one.write_text("x")
    assert not file.take_over()
    assert not left.exists()
    assert all(one.exists() for one in others)


def test_a_file_that_another_process_has_replaced_is_not_removed(file: TokenFile, path: Path) -> None:
    file.write("mine")
    TokenFile(path).write("theirs")
    file.remove()
    assert path.read_text() == "theirs"


def test_a_file_that_was_taken_over_is_removed(file: TokenFile, path: Path) -> None:
    path.write_text("of-a-killed-process")
    assert file.take_over()
    file.remove()
    assert not path.exists()
    file.remove()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    file: TokenFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(TokenFileError, match="No space left on device"):
        file.write("new-canary")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


# --- bad places --------------------------------------------------------------------------------------------------


def test_a_new_name_and_an_older_token_are_good_places(path: Path) -> None:
    assert place_problem(path) is None
    for text in ("", "an-older.token_x-"):
        path.write_text(text)
        assert place_problem(path) is None


@pytest.mark.parametrize("text", ["[service.a]\n", "a b", "token\n", "é", "x" * (1024 * 1024 + 1)])
def test_a_file_with_something_else_is_a_bad_place(path: Path, text: str) -> None:
    path.write_text(text)
    problem = place_problem(path)
    assert problem == f"{path} has something else in it than a token: choose another one, or remove it"


def test_folders_pipes_and_links_are_bad_places(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, says in (
        ("folder", "is a folder"),
        ("pipe", "is not a regular file"),
        ("link", "is a symbolic link"),
        ("dangling", "is a symbolic link"),
        ("nowhere/token", "nowhere does not exist"),
        ("target/token", "cannot be used (Not a directory)"),
        ("x" * 256, "cannot be used (File name too long)"),
    ):
        problem = place_problem(tmp_path / name)
        assert problem is not None
        assert says in problem
        with pytest.raises(TokenFileError, match=re.escape(says)):
            TokenFile(tmp_path / name).write("the-token")
    assert place_problem(Path("/")) is not None
    assert (tmp_path / "target").read_text() == "x"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("mode", "owner", "says"),
    [
        (0o700, None, None),
        (0o2770, None, None),  # a pod's volume with fsGroup
        (0o1777, None, None),  # /tmp
        (0o777, None, "all users can write to "),
        pytest.param(0o1777, 0, None, marks=needs_root),
        pytest.param(0o777, 0, None, marks=needs_root),  # a pod's emptyDir
        pytest.param(0o700, 12345, "belongs to another user (uid 12345)", marks=needs_root),
        pytest.param(0o1777, 12345, "belongs to another user (uid 12345)", marks=needs_root),
    ],
)
def test_whose_folder_it_may_be(
    tmp_path: Path, mode: int, owner: int | None, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    if owner is not None:
        os.chown(folder, owner, owner)
    elif os.geteuid() == 0:  # as if this user were not root
        os.chown(folder, 1000, 1000)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    problem = place_problem(folder / "token")
    assert problem is None if says is None else problem is not None and says in problem


@needs_root
def test_a_file_or_link_of_another_user_is_never_used(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    shared.chmod(0o1777)
    own.mkdir()
    (own / "token").write_text("precious")
    planted = shared / "planted"
    planted.write_text("")
    os.chown(planted, 12345, 12345)
    for name, target in (("link", own / "token"), ("folder", own)):
        (shared / name).symlink_to(target)
        os.chown(shared / name, 12345, 12345, follow_symlinks=False)
    for path, says in (
        (planted, "belongs to another user"),
        (shared / "link", "is a symbolic link"),
        (shared / "folder" / "token", f"{shared / 'folder'} is a link of another user (uid 12345)"),
    ):
        problem = place_problem(path)
        assert problem is not None
        assert says in problem
        with pytest.raises(TokenFileError, match=re.escape(says)):
            TokenFile(path).write("canary")
    assert (own / "token").read_text() == "precious"
    assert planted.read_text() == ""
    assert list(own.iterdir()) == [own / "token"]


def test_a_folder_that_is_not_writable_is_a_bad_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert place_problem(path) == (f"{path.parent} is not writable: make it writable, or choose another folder")


# --- when the next token is fetched ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lifetime", "margin", "latency", "before_end"),
    [
        (3600, 30, 0.1, 60),
        (300, 30, 0.1, 60),
        (60, 30, 0.1, 21),  # a quarter of the lifetime, and a tenth for the issuer
        (4, 1, 0.1, 1.4),
        (4, 1, 0.6, 1.9),
        (4, 30, 100, 2),  # half of the lifetime at most
        (3600, 900, 0, 930),
        (3600, 86400, 0, 930),
    ],
)
def test_the_next_token_is_fetched_before_the_margin(
    lifetime: float, margin: float, latency: float, before_end: float
) -> None:
    token = AccessToken("x", START, START + lifetime)
    assert due(token, margin=margin, latency=latency) == pytest.approx(START + lifetime - before_end)


# --- keeping it --------------------------------------------------------------------------------------------------


class Kept:
    """A kept file, a clock in the test's hand, and the issuer behind it."""

    def __init__(self, path: Path, login: Issuer, tokens: TokenCycle | None = None) -> None:
        self.path = path
        self.clock = Clock()
        self.issuer = login
        self.login = TokenSource(login, refresh_token="first", now=self.clock, observe=self._observe)
        self.keeper = TokenFileKeeper(TokenFile(path), self.login, self.login, now=self.clock)

    def _observe(self, *_: object) -> None:
        self.keeper.wake()

    def content(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    async def has(self, content: str | None) -> None:
        await settled(lambda: self.content() == content)

    def at(self, seconds: float) -> None:
        """Set the clock, and let the keeper notice."""
        self.clock.time = START + seconds
        self.keeper.wake()

    async def rest(self) -> None:
        """Let the keeper do what it has to do now."""
        for _ in range(20):
            await asyncio.sleep(0.005)


@pytest.fixture
async def kept(path: Path) -> AsyncIterator[Kept]:
    kept = Kept(path, Issuer())
    yield kept
    await kept.keeper.stop()
    assert list(path.parent.glob(".token.*")) == []


async def test_a_token_is_there_though_nobody_asks_and_its_successor_before_the_margin(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    kept.at(38)
    await kept.rest()
    assert kept.content() == "token-1"
    kept.at(39.1)
    await kept.has("token-2")
    assert len(kept.issuer.asked) == 2


async def test_at_the_end_the_file_is_removed(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    await kept.keeper.stop()
    assert kept.content() is None
    kept.at(100)
    await kept.rest()
    assert len(kept.issuer.asked) == 1


async def test_while_the_issuer_is_away_the_file_stays_until_its_token_ends(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    kept.issuer.answers = [IssuerUnavailable("it is away", retry_after=300)]
    for seconds in (40.0, 59.9):
        kept.at(seconds)
        await kept.rest()
        assert kept.content() == "token-1"
    assert len(kept.issuer.asked) == 2
    kept.at(60)
    await kept.has(None)
    kept.at(341)
    await kept.has("token-3")


async def test_a_rejection_removes_the_file_at_once_though_its_token_would_be_good(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    kept.issuer.answers = [CredentialsRejected("it is over"), IssuerUnavailable("it is away", retry_after=9)]
    # Whatever the reason for the attempt, here a refused token.
    await kept.login.replace("token-1")
    await kept.has(None)
    kept.at(3)
    await settled(lambda: len(kept.issuer.asked) == 3)
    await kept.rest()
    assert kept.content() is None
    kept.at(12)
    await kept.has("token-4")


async def test_the_same_token_is_good_again_when_the_issuer_gives_it_again(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    kept.issuer.answers = [CredentialsRejected("it is confused"), TokenResponse("token-1", expires_in=59)]
    await kept.login.replace("token-1")
    await kept.has(None)
    kept.at(3)
    await kept.has("token-1")


async def test_an_issuer_that_gives_the_same_token_again_is_not_hammered(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    kept.issuer.answers = [TokenResponse("token-1", expires_in=20) for _ in range(50)]
    kept.at(40)
    await kept.rest()
    assert len(kept.issuer.asked) == 2
    assert kept.content() == "token-1"
    kept.at(44)
    await kept.rest()
    assert len(kept.issuer.asked) == 2
    kept.at(45.1)
    await settled(lambda: len(kept.issuer.asked) == 3)


async def test_a_token_that_a_request_has_fetched_is_in_the_file_too(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    await kept.login.replace("token-1")
    await kept.has("token-2")


async def test_an_initial_token_without_a_session_stays_until_it_ends(path: Path) -> None:
    kept = Kept(path, Issuer())
    kept.issuer.answers = [CredentialsRejected("there is no session", cause="no_session") for _ in range(9)]
    kept.login = TokenSource(kept.issuer, access_token="initial", now=kept.clock)
    kept.keeper = TokenFileKeeper(TokenFile(path), kept.login, kept.login, now=kept.clock)
    kept.keeper.start()
    await kept.has("initial")
    kept.at(45)
    await settled(lambda: len(kept.issuer.asked) == 1)
    await kept.rest()
    assert kept.content() == "initial"
    kept.at(60)
    await kept.has(None)
    await kept.keeper.stop()


async def test_a_file_of_a_killed_process_stays_until_there_is_a_token(kept: Kept) -> None:
    kept.path.write_text("left")
    kept.issuer.gate.clear()
    kept.keeper.start()
    await settled(lambda: len(kept.issuer.asked) == 1)
    assert kept.content() == "left"
    kept.issuer.gate.set()
    await kept.has("token-1")


async def test_a_file_of_a_killed_process_is_removed_when_there_is_no_token(kept: Kept) -> None:
    kept.path.write_text("left")
    kept.issuer.answers = [IssuerUnavailable("it is away", retry_after=60)]
    kept.keeper.start()
    await kept.has(None)


async def test_a_clock_that_was_set_back_does_not_keep_an_old_token(kept: Kept) -> None:
    kept.keeper.start()
    await kept.has("token-1")
    kept.at(-3600)
    await kept.rest()
    kept.at(-3597)
    await kept.has("token-2")


async def test_a_place_that_has_gone_bad_is_told_once_and_tried_again(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    kept = Kept(path, Issuer())
    await asyncio.to_thread(path.mkdir)
    kept.keeper.start()
    for _ in range(3):
        await kept.rest()
        kept.keeper.wake()
    assert [record.getMessage() for record in caplog.records] == [
        f"the token file cannot be kept up to date: {path} is a folder: choose a file in it, such as {path}/token"
    ]
    await asyncio.to_thread(path.rmdir)
    kept.keeper.wake()
    await kept.has("token-1")
    assert len(kept.issuer.asked) == 1
    await kept.keeper.stop()
    assert "token-1" not in caplog.text


async def test_what_nobody_expected_is_told_without_the_token(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("canary")

    with monkeypatch.context() as patched:
        patched.setattr(TokenFile, "write", fail)
        kept.keeper.start()
        await settled(lambda: "cannot be kept up to date: unexpected RuntimeError" in caplog.text)
    assert "canary" not in caplog.text
    kept.keeper.wake()
    await kept.has("token-1")


# --- a service's own token ---------------------------------------------------------------------------------------


class KeptForService(Kept):
    """A kept file with tokens that are exchanged for the login's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Issuer(lifetime=600))
        self.exchange = Issuer()
        self.tokens = exchanged_tokens(self.login, self._exchange, now=self.clock, observe=self._observe)
        self.keeper = TokenFileKeeper(TokenFile(path), self.tokens, self.login, now=self.clock)

    def _exchange(self, subject: str) -> TokenResponse:
        return TokenResponse(f"exchanged-{self.exchange(subject).access_token}", expires_in=60)


@pytest.fixture
async def service(path: Path) -> AsyncIterator[KeptForService]:
    kept = KeptForService(path)
    kept.keeper.start()
    await kept.has("exchanged-token-1")
    yield kept
    await kept.keeper.stop()


async def test_a_services_token_is_renewed_by_itself(service: KeptForService) -> None:
    service.at(40)
    await service.has("exchanged-token-2")
    assert service.exchange.asked == ["token-1", "token-1"]


async def test_a_service_that_gets_no_token_more_has_no_file(service: KeptForService) -> None:
    service.exchange.answers = [CredentialsRejected("it may not exchange", issuer_error="unauthorized_client")]
    service.at(40)
    await service.has(None)
    service.at(43)
    await service.has("exchanged-token-3")


async def test_the_end_of_the_login_is_that_of_all_its_files(service: KeptForService) -> None:
    service.issuer.answers = [CredentialsRejected("it is over")]
    with contextlib.suppress(CredentialsRejected):
        await service.login.newer("token-1")
    await service.has(None)
    service.at(3)
    await service.has("exchanged-token-2")
    assert service.exchange.asked[-1] == "token-3"


async def test_other_sources_of_the_same_tokens_leave_the_file_as_it_is(service: KeptForService) -> None:
    service.keeper.use(shared_tokens(service.login, now=service.clock), service.login)
    await service.rest()
    assert service.content() == "exchanged-token-1"
    service.at(40)
    await settled(lambda: (service.content() or "").startswith("token-"))


async def test_the_next_keeper_of_a_file_begins_when_the_last_one_has_ended(service: KeptForService) -> None:
    following = TokenFileKeeper(TokenFile(service.path), service.login, service.login, now=service.clock)
    following.start(after=service.keeper.stop())
    await service.has("token-1")
    await following.stop()
    assert service.content() is None
