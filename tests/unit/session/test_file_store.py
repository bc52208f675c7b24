"""The session on disk: what is written, and what happens when the disk is not as it should be."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eoepca_security.errors import IssuerUnavailable, StoreError
from eoepca_security.session.file_store import TokenStore, _problem_of, folder_problem
from eoepca_security.session.session import AccessToken, Stored

SESSION = Stored("refresh-canary", "access-canary", 1000.0, 1060.0, 2800.0)


def store_in(folder: Path, client_id: str = "client", origin: str | None = "first") -> TokenStore:
    return TokenStore(folder, issuer_url="https://issuer.example", client_id=client_id, origin=origin)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "eoepca-security"


@pytest.fixture
def file(folder: Path) -> Path:
    """A file with a session in it."""
    store_in(folder).write(SESSION)
    (path,) = folder.glob("*.json")
    return path


def test_what_is_written_is_read_back(folder: Path) -> None:
    store = store_in(folder)
    assert store.read() is None
    store.write(SESSION)
    assert store.read() == SESSION
    assert store_in(folder).read() == SESSION


def test_each_session_has_a_file_of_its_own(folder: Path) -> None:
    store_in(folder).write(SESSION)
    assert store_in(folder, client_id="other").read() is None
    # A different token in the settings begins a session of its own.
    assert store_in(folder, origin="second").read() is None
    assert store_in(folder, origin=None).read() is None


@pytest.mark.parametrize("end", ["", "/", "/.well-known/openid-configuration"])
def test_all_spellings_of_an_issuer_are_one(folder: Path, end: str) -> None:
    store_in(folder).write(SESSION)
    again = TokenStore(folder, issuer_url=f"https://issuer.example{end}", client_id="client", origin="first")
    assert again.read() == SESSION


@pytest.mark.parametrize("query", ["", "?p=other", "?p=B2C_1_login&x=y"])
def test_queries_that_differ_keep_sessions_apart(folder: Path, query: str) -> None:
    url = "https://issuer.example/.well-known/openid-configuration"
    TokenStore(folder, issuer_url=f"{url}?p=B2C_1_login", client_id="client", origin="first").write(SESSION)

    again = TokenStore(folder, issuer_url=f"{url}/?p=B2C_1_login", client_id="client", origin="first")
    other = TokenStore(folder, issuer_url=f"{url}{query}", client_id="client", origin="first")

    assert (again.read(), other.read()) == (SESSION, None)


def test_a_session_is_forgotten(folder: Path, file: Path) -> None:
    store = store_in(folder)
    assert store.place == file
    other = store_in(folder, client_id="other")
    other.write(SESSION)
    # As a process leaves it that is killed before it puts the successor in place.
    file.with_suffix(".next").write_bytes(file.read_bytes().replace(b'"serial": 1', b'"serial": 7'))
    assert store.read() == SESSION
    for _ in range(2):
        with store.locked():
            store.forget()
        assert (store.read(), store.changed_at()) == (None, 0)
    assert other.read() == SESSION


def test_what_cannot_be_forgotten_is_told(folder: Path, file: Path) -> None:
    file.unlink()
    file.mkdir()
    with pytest.raises(StoreError, match="cannot be removed"):
        store_in(folder).forget()


def test_only_the_owner_can_look(folder: Path) -> None:
    old = os.umask(0)
    try:
        store = store_in(folder)
        with store.locked():
            store.write(SESSION)
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_folder_that_was_made_for_it_is_closed_and_one_with_other_uses_left_alone(tmp_path: Path) -> None:
    for name, others, mode in (("empty", [], 0o700), ("used", ["a file"], 0o755)):
        folder = tmp_path / name
        folder.mkdir()
        folder.chmod(0o755)
        for other in others:
            (folder / other).write_text("")
        store_in(folder).write(SESSION)
        assert folder.stat().st_mode & 0o777 == mode


def test_no_name_tells_a_token_and_no_temporary_file_stays(folder: Path, file: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {file.name, file.with_suffix(".next").name}
    assert b"canary" not in file.with_suffix(".next").read_bytes()
    assert "canary" not in repr(SESSION)


def test_a_change_is_noticed(folder: Path) -> None:
    store = store_in(folder)
    assert store.changed_at() == 0
    store.write(SESSION)
    before = store.changed_at()
    assert before != 0
    os.utime(next(folder.glob("*.json")), ns=(before + 1, before + 1))
    assert store.changed_at() != before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (b'{"version": 1, "refresh_tok', "damaged"),
        (b"[]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b" " * 1_100_000 + b"{}", "damaged"),
        (b'{"version": 2}', "version"),
        (b"{}", "version"),
        (b'{"version": 1}', "another issuer"),
    ],
)
def test_a_file_that_cannot_be_understood_is_told_and_left_alone(file: Path, content: bytes, says: str) -> None:
    file.write_bytes(content)
    with pytest.raises(StoreError, match=says):
        store_in(file.parent).read()
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("refresh_token", ""),
        ("refresh_token", None),
        ("access_token", 5),
        ("access_token", "a\r\nX-Other: b"),
        ("id_token", "a b"),
        ("refresh_token", "a\ud800"),
        ("scope", "a\nb"),
        ("ends_at", "soon"),
        ("obtained_at", None),
        ("session_ends_at", "never"),
        ("rejected", "yes"),
    ],
)
def test_a_file_with_a_wrong_value_is_told(file: Path, member: str, value: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {member: value}))
    with pytest.raises(StoreError, match="damaged"):
        store_in(file.parent).read()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"value": value} for value in ("a\r\nX-Other: b", "a b", "\ud800", "\u00e9", "", None)),
        {"ends_at": "soon"},
        {"obtained_at": None},
    ],
)
def test_a_services_token_that_cannot_be_used_is_forgotten_and_the_session_stays(
    file: Path, wrong: dict[str, object]
) -> None:
    right = {"value": "token", "obtained_at": 1.0, "ends_at": 2.0}
    tokens = {"right": right, "wrong": right | wrong, "none": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"for_services": tokens}))
    assert store_in(file.parent).read() == replace(SESSION, for_services={"right": AccessToken("token", 1.0, 2.0)})


def test_a_file_of_a_version_that_did_not_note_rejections_is_read(file: Path) -> None:
    members = json.loads(file.read_text())
    assert members.pop("rejected") is False
    file.write_text(json.dumps(members))
    assert store_in(file.parent).read() == SESSION


def test_a_file_that_others_can_read_is_closed_to_them(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.chmod(0o644)
    assert store_in(file.parent).read() == SESSION
    assert file.stat().st_mode & 0o777 == 0o600
    assert "other users could read" in caplog.text


def test_a_file_of_somebody_else_is_not_believed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    with pytest.raises(StoreError, match="another user"):
        store_in(file.parent).read()


def test_a_folder_a_link_or_a_pipe_in_the_place_of_the_file_is_told(file: Path, tmp_path: Path) -> None:
    file.unlink()
    file.mkdir()
    with pytest.raises(StoreError):
        store_in(file.parent).read()
    with pytest.raises(StoreError):
        store_in(file.parent).write(SESSION)
    file.rmdir()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError):
        store_in(file.parent).read()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(StoreError, match="not a regular file"):
        store_in(file.parent).read()


# --- what other users could have put there ---


def status(mode: int, uid: int) -> os.stat_result:
    return os.stat_result((0o040000 | mode, 1, 1, 2, uid, uid, 0, 0, 0, 0))


def refresh(store: TokenStore) -> None:
    """Do what a process does when it refreshes."""
    with store.locked():
        store.read()
        store.write(Stored("new", "new", 0.0, 1.0))


OWN = 1000


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o2775, 0o2770, 0o500])
@pytest.mark.parametrize("uid", [OWN, 0])
def test_a_folder_of_this_user_or_root_is_used(mode: int, uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OWN)
    assert _problem_of(Path("/s"), status(mode, uid)) is None


@pytest.mark.parametrize(
    ("mode", "uid", "says"),
    [
        (0o700, 1001, "/s belongs to another user (uid 1001): choose a folder of your own"),
        (0o777, 1001, "/s belongs to another user (uid 1001): choose a folder of your own"),
        (0o777, OWN, "all users can write to /s: set its mode to 0700"),
        (0o1777, OWN, "all users can write to /s: choose /s/session, which is then made for you"),
        (0o1777, 0, "all users can write to /s: choose /s/session, which is then made for you"),  # /tmp
        (0o2777, 0, "all users can write to /s: choose /s/session, which is then made for you"),  # emptyDir
    ],
)
def test_a_folder_that_others_control_is_not(mode: int, uid: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OWN)
    assert _problem_of(Path("/s"), status(mode, uid)) == says
    monkeypatch.delattr(os, "geteuid")  # as on Windows
    assert _problem_of(Path("/s"), status(mode, uid)) is None


def test_a_folder_that_all_can_write_to_is_not_touched(folder: Path, file: Path) -> None:
    folder.chmod(0o777)
    content = file.read_bytes()
    store = store_in(folder)
    assert folder_problem(folder) == f"all users can write to {folder}: set its mode to 0700"
    with pytest.raises(StoreError, match="all users can write"), store.locked():
        pass
    with pytest.raises(StoreError, match="all users can write"):
        store.write(SESSION)
    assert file.read_bytes() == content
    folder.chmod(0o700)
    assert folder_problem(folder) is None


def test_a_new_folder_in_one_that_all_can_write_to_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o2777)
    folder = tmp_path / "session"
    assert folder_problem(folder) is None
    store_in(folder).write(SESSION)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder_problem(folder) is None


def test_a_folder_like_tmp_is_not_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    assert folder_problem(tmp_path) is not None
    with pytest.raises(StoreError, match="all users can write"):
        store_in(tmp_path).write(SESSION)
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777


def test_an_empty_folder_of_this_user_is_no_problem_because_it_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "made-for-us"
    folder.mkdir()
    folder.chmod(0o777)
    assert folder_problem(folder) is None
    store_in(folder).write(SESSION)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("suffix", [".json", ".next", ".lock"])
@pytest.mark.parametrize("make_link", [Path.hardlink_to, Path.symlink_to])
def test_a_link_leads_to_no_other_file(
    suffix: str, make_link: Callable[[Path, Path], None], file: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(content := file.read_bytes())
    victim.chmod(0o644)
    link = file.with_suffix(suffix)
    link.unlink(missing_ok=True)
    make_link(link, victim)
    store = store_in(file.parent)
    with contextlib.suppress(StoreError):
        refresh(store)
    with contextlib.suppress(StoreError):
        store.write(Stored("new", "new", 0.0, 1.0))
    assert (victim.read_bytes(), victim.stat().st_mode & 0o777) == (content, 0o644)


@pytest.mark.parametrize("suffix", [".json", ".next", ".lock"])
def test_a_hard_link_is_told(suffix: str, file: Path, tmp_path: Path) -> None:
    store, link = store_in(file.parent), file.with_suffix(suffix)
    with store.locked():
        pass
    link.touch()
    link.rename(tmp_path / "victim")
    link.hardlink_to(tmp_path / "victim")
    with pytest.raises(StoreError, match=rf"{suffix} has another name \(a hard link\)"):
        refresh(store)


def test_what_others_put_in_the_place_of_the_next_version_does_not_undo_the_one_that_was_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, replace, successor = store_in(file.parent), Path.replace, Stored("new", "new", 0.0, 1.0)
    (tmp_path / "victim").write_text("untouched")

    def plant(path: Path, target: Path) -> Path:
        moved = replace(path, target)
        path.hardlink_to(tmp_path / "victim")
        return moved

    monkeypatch.setattr(Path, "replace", plant)
    store.write(successor)
    assert (tmp_path / "victim").read_text() == "untouched"
    assert store.read() == successor


def test_a_file_that_is_replaced_while_it_is_read_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, opened = store_in(file.parent), os.open

    def open_and_replace(path: Path, *arguments: int) -> int:
        descriptor = opened(path, *arguments)
        if path == file:
            monkeypatch.undo()
            store_in(file.parent).write(SESSION)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_replace)
    assert store.read() == SESSION


def test_a_store_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    store = store_in(tmp_path / "occupied")
    with pytest.raises(StoreError, match="cannot be written"):
        store.write(SESSION)
    with pytest.raises(StoreError, match="cannot be locked"), store.locked():
        pass


def test_a_full_disk_leaves_the_old_session(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: Path, __: bytes) -> None:
        raise OSError(28, "No space left on device")

    store = store_in(folder)
    monkeypatch.setattr(store, "_fill", no_space)
    with pytest.raises(StoreError, match="No space left"):
        store.write(Stored("new", "new", 0.0, 1.0))
    assert store_in(folder).read() == SESSION


def test_room_for_the_next_session_is_kept(file: Path) -> None:
    assert file.with_suffix(".next").stat().st_size >= file.stat().st_size
    assert file.with_suffix(".next").stat().st_blocks >= file.stat().st_blocks


def test_half_a_successor_of_a_dead_process_is_in_nobodys_way(file: Path) -> None:
    store = store_in(file.parent)
    file.with_suffix(".next").write_bytes(file.read_bytes()[:200])
    assert store.read() == SESSION
    store.write(SESSION)
    assert store_in(file.parent).read() == SESSION


def test_a_successor_that_was_written_but_not_put_in_place_is_the_session(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    store, successor = store_in(file.parent), Stored("new", "new", 0.0, 1.0)
    store.read()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            store.write(successor)
    again = store_in(file.parent)
    assert again.read() == successor
    # And is not taken for a newer one than what comes after it.
    again.write(SESSION)
    assert store_in(file.parent).read() == SESSION


def test_a_session_that_could_not_be_read_back_is_not_written(file: Path) -> None:
    with pytest.raises(StoreError, match="too long"):
        store_in(file.parent).write(Stored("r" * 1_100_000))
    assert store_in(file.parent).read() == SESSION


def test_a_mode_that_cannot_be_changed_is_told_and_the_session_read(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    file.chmod(0o644)
    monkeypatch.setattr(os, "fchmod", refuse)
    assert store_in(file.parent).read() == SESSION
    assert "set its mode to 0600" in caplog.text


@pytest.mark.parametrize(("number", "kind"), [(errno.EMFILE, IssuerUnavailable), (errno.EROFS, StoreError)])
def test_a_lock_that_fails_for_the_moment_is_tried_again(
    number: int, kind: type[Exception], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr("eoepca_security.session.file_store.FileLock.acquire", fail)
    with pytest.raises(kind), store_in(file.parent).locked():
        pass


# --- the lock ----------------------------------------------------------------------------------------------------


def test_the_lock_is_held_by_one_at_a_time(folder: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with store_in(folder).locked():
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


HOLDER = """
import sys
from pathlib import Path
from eoepca_security.session.file_store import TokenStore
with TokenStore(Path(sys.argv[1]), issuer_url="https://issuer.example", client_id="client", origin="first").locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_holds_the_lock_too_long_is_told_of_and_a_dead_one_does_not_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eoepca_security.session.file_store.LOCK_TIMEOUT", 0.2)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(IssuerUnavailable, match="another process"), store_in(folder).locked():
            pass
        holder.kill()
        holder.wait()
        with store_in(folder).locked():
            pass
