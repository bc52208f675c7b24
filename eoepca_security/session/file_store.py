"""TokenStore: the session on disk, so that restarts and other processes keep a rotated refresh token.

A folder that only its owner can enter holds a JSON file and a lock file for each session. A session is written to disk
before its tokens are used, so a killed process loses at most an answer that was still in transit.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from eoepca_security.errors import IssuerUnavailable, StoreError
from eoepca_security.oauth.protocol import read_text
from eoepca_security.oauth.strict_json import parse_object
from eoepca_security.oauth.urls import WELL_KNOWN, discovery_url
from eoepca_security.session.session import AccessToken, Stored

VERSION: Final = 1
MAX_FILE: Final = 1024 * 1024
"""The longest file that is read, in bytes."""

_ROOM: Final = 16 * 1024
"""The smallest size of a file, in bytes, so that the next version fits in the same space."""

LOCK_TIMEOUT: Final = 22.0
"""How long to wait for the lock, in seconds: another process may hold it while it asks the issuer."""

# Temporary errors, which say nothing about the folder.
_TEMPORARY: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})

_TYPES: Final[dict[str, Any]] = {
    "refresh_token": str,
    "access_token": str | None,
    "obtained_at": float,
    "ends_at": float,
    "session_ends_at": float | None,
    "id_token": str | None,
    "rejected": bool,
    "scope": str | None,
    "for_services": dict,
}

# The characters of a header's value (RFC 6750 §2.1), and of a form's (RFC 6749 appendix A).
_SENDABLE: Final = {"access_token": "[!-~]+", "id_token": "[!-~]+", "refresh_token": "[ -~]+", "scope": "[ -~]+"}

logger = logging.getLogger(__name__)


def folder_problem(folder: Path) -> str | None:
    """Return why the session must not be kept in `folder`, with the remedy, or None. It need not exist.

    Its owner must be this user or root, and it must not be writable for all users: they could replace or remove the
    session. A group may be able to write: that is how Kubernetes makes volumes writable (`fsGroup`). An empty folder
    of this user is fine, because the store closes it.
    """
    try:
        status = folder.stat()
        return None if _is_for_us(folder, status) else _problem_of(folder, status)
    except OSError:
        return None


def _problem_of(folder: Path, status: os.stat_result) -> str | None:
    if not hasattr(os, "geteuid"):  # Windows has other means
        return None
    if not _is_own(status) and status.st_uid != 0:
        return f"{folder} belongs to another user (uid {status.st_uid}): choose a folder of your own"
    if status.st_mode & 0o002:
        is_shared = status.st_mode & stat.S_ISVTX or not _is_own(status)
        remedy = f"choose {folder}/session, which is then made for you" if is_shared else "set its mode to 0700"
        return f"all users can write to {folder}: {remedy}"
    return None


def _is_for_us(folder: Path, status: os.stat_result) -> bool:
    """Return whether somebody made this folder for the store, without closing it to others."""
    is_open = status.st_mode & 0o077 and not status.st_mode & stat.S_ISVTX
    return bool(is_open) and _is_own(status) and not any(folder.iterdir())


def _is_own(status: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


class TokenStore:
    """The session of one client at one issuer, in `folder`.

    `origin` is the refresh token from the settings, or None. Each has its own session: another token in the settings
    starts another session. Errors to read or write raise StoreError, and a file that cannot be read is never
    overwritten: the caller continues in memory.
    """

    def __init__(self, folder: Path, *, issuer_url: str, client_id: str, origin: str | None) -> None:
        # Both forms name the same issuer. A query selects another one: policies of Azure AD B2C do not share sessions.
        issuer = discovery_url(issuer_url).removesuffix(WELL_KNOWN)
        identity = "\n".join((issuer, client_id, origin or ""))
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._folder = folder
        self._file = folder / f"{name}.json"
        self._next = folder / f"{name}.next"
        self._lock_file = folder / f"{name}.lock"
        self._serial = 0
        self._owner = {"issuer": issuer, "client_id": client_id}

    @property
    def place(self) -> Path:
        """The session's file, which may not exist."""
        return self._file

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the session for this process. The lock of a dead process is free.

        Raises StoreError when it cannot be locked, and IssuerUnavailable when another process holds it too long.
        """
        try:
            self._prepare_folder()
            self._check_lock_file()
            lock = FileLock(self._lock_file, timeout=LOCK_TIMEOUT, mode=0o600)
            lock.acquire()
        except Timeout:
            raise IssuerUnavailable(f"another process has held {self._lock_file} for {LOCK_TIMEOUT:g} s") from None
        except OSError as error:
            if error.errno in _TEMPORARY:
                # Without the lock, we could use a token that another process is replacing.
                raise IssuerUnavailable(f"{self._lock_file} cannot be locked now ({error.strerror})") from None
            raise StoreError(f"{self._lock_file} cannot be locked ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()

    def changed_at(self) -> int:
        """Return a number that changes whenever a process writes the session; 0 when there is none."""
        try:
            return self._file.stat().st_mtime_ns
        except OSError:
            return 0

    def read(self) -> Stored | None:
        """Return the session, or None; raises StoreError."""
        session, self._serial = self._read(self._file)
        # A process that was killed just before it moved the new version into place had written it already.
        with contextlib.suppress(StoreError):
            successor, serial = self._read(self._next)
            if successor is not None and serial > self._serial:
                session, self._serial = successor, serial
        return session

    def write(self, session: Stored) -> None:
        """Replace the session atomically, and return when it is on disk; raises StoreError."""
        data = self._serialized(session)
        if len(data) > MAX_FILE:
            data = self._serialized(replace(session, for_services={}))  # which can be fetched again
        if len(data) > MAX_FILE:
            raise StoreError(f"{self._file} cannot be written (the tokens are too long)")
        try:
            self._prepare_folder()
            self._fill(self._next, data)
            self._next.replace(self._file)
            self._serial += 1
            self._sync_folder()
        except OSError as error:
            raise StoreError(f"{self._file} cannot be written ({error.strerror})") from None
        # Reserve space for the next version, in case the disk is full by then.
        with contextlib.suppress(OSError, StoreError):
            self._fill(self._next, bytes(len(data)))

    def _serialized(self, session: Stored) -> bytes:
        members = {"version": VERSION, "serial": self._serial + 1, **self._owner, **asdict(session)}
        return json.dumps(members).encode().ljust(_ROOM)

    def _fill(self, path: Path, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            _check_file(path, os.fstat(descriptor))
            os.fchmod(descriptor, 0o600)
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(descriptor)

    def _read(self, path: Path) -> tuple[Stored | None, int]:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None, 0
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror})") from None
        try:
            self._check_mode(path, descriptor)
            return self._parse(os.read(descriptor, MAX_FILE + 1))
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror})") from None
        finally:
            os.close(descriptor)

    def forget(self) -> None:
        """Remove the session, if any; raises StoreError."""
        try:
            for file in (self._next, self._file):
                file.unlink(missing_ok=True)
            self._serial = 0
            self._sync_folder()
        except OSError as error:
            raise StoreError(f"{self._file} cannot be removed ({error.strerror})") from None

    def _prepare_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._folder.stat()
        # A folder with other files, or one like /tmp, is not ours to change.
        if _is_for_us(self._folder, status):
            self._folder.chmod(0o700)
            status = self._folder.stat()
        if problem := _problem_of(self._folder, status):
            raise StoreError(problem)

    def _check_lock_file(self) -> None:
        # The lock follows links, and empties the file.
        with contextlib.suppress(FileNotFoundError):
            _check_file(self._lock_file, self._lock_file.lstat())

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Not every file system can sync a folder.
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _check_mode(self, path: Path, descriptor: int) -> None:
        status = os.fstat(descriptor)
        _check_file(path, status)
        if status.st_mode & 0o077:
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, 0o600)
            closed = os.fstat(descriptor).st_mode & 0o077 == 0
            now = "its mode is now 0600" if closed else "set its mode to 0600"
            logger.warning("other users could read %s: %s; consider logging in again", self._file, now)

    def _parse(self, data: bytes) -> tuple[Stored, int]:
        try:
            members = parse_object(data if len(data) <= MAX_FILE else b"")
        except ValueError:
            raise StoreError(f"{self._file} is damaged: remove it") from None
        if members.get("version") != VERSION:
            raise StoreError(f"{self._file} is from another version of this program: use that, or remove the file")
        if {name: members.get(name) for name in self._owner} != self._owner:
            raise StoreError(f"{self._file} belongs to another issuer or client: remove it")
        # Older versions do not write these.
        members = {"rejected": False, "for_services": {}} | members
        values: dict[str, Any] = {name: members.get(name) for name in _TYPES}
        if not all(isinstance(value, _TYPES[name]) for name, value in values.items()) or not _is_sendable(values):
            raise StoreError(f"{self._file} is damaged: remove it")
        # Those that cannot be used are fetched again, which is no reason to lose the session.
        kept = {key: _token(token) for key, token in values["for_services"].items()}
        values["for_services"] = {key: token for key, token in kept.items() if token is not None}
        serial = members.get("serial")
        return Stored(**values), serial if isinstance(serial, int) else 0


def _is_sendable(values: Mapping[str, Any]) -> bool:
    """Return whether the tokens and the scope are as issuers send them: access and ID tokens go into headers."""
    return all(
        values[name] is None or read_text(values[name], pattern) is not None for name, pattern in _SENDABLE.items()
    )


def _token(members: object) -> AccessToken | None:
    if not isinstance(members, dict):
        return None
    value, obtained_at, ends_at = read_text(members.get("value")), members.get("obtained_at"), members.get("ends_at")
    if value is None or not (isinstance(obtained_at, float) and isinstance(ends_at, float)):
        return None
    return AccessToken(value, obtained_at, ends_at)


def _check_file(path: Path, status: os.stat_result) -> None:
    """Raise StoreError for a file that is not one of ours: another user may have put it there."""
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path} is not a regular file: remove it")
    if not _is_own(status):
        raise StoreError(f"{path} belongs to another user (uid {status.st_uid}): remove it, or run as that user")
    # A file that another process has just replaced has none.
    if status.st_nlink > 1:
        raise StoreError(f"{path} has another name (a hard link), so others may read or change it: remove it")
