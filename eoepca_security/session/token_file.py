"""A file with a usable access token and nothing else, for programs that read it from there.

`TokenFile` writes and removes the file. `TokenFileKeeper` decides when.
"""

import asyncio
import contextlib
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from eoepca_security.errors import CredentialsRejected, SecurityError, TokenError
from eoepca_security.issuer.threads import in_thread
from eoepca_security.session.session import AccessToken
from eoepca_security.session.token_cycle import BRIEF, TokenCycle, log

MODE: Final = 0o600
"""The mode of the file, unless set."""

MARGIN: Final = 30
"""Seconds for which a token in the file is good at least, unless set."""

_MAX_FILE: Final = 1024 * 1024
_MAX_LEAD: Final = 30.0
_LOOK: Final = 2.0
_TICK: Final = 5.0
_LAST_REMOVAL: Final = 1.0


class TokenFileError(SecurityError):
    """The file cannot be written or removed. The message has the remedy."""


def place_problem(path: Path) -> str | None:
    """Return why a token must not be kept in the file `path`, with the remedy, or None.

    Other users may be able to write to its folder if that is sticky (`/tmp`), or if it is root's, as an `emptyDir` of
    Kubernetes is: they can neither read the file nor lead us elsewhere. An older file with a token is replaced.
    """
    try:
        with _opened(path) as folder:
            _check_target(path, folder)
            if not os.access(path.parent, os.W_OK | os.X_OK):
                return f"{path.parent} is not writable: make it writable, or choose another folder"
    except TokenFileError as error:
        return str(error)
    return None


class TokenFile:
    """Writes the file, always as a whole, and removes it. All methods block, and may raise TokenFileError.

    `mode` is who may read it. Not safe for use by several threads at once.
    """

    def __init__(self, path: Path, mode: int = MODE) -> None:
        self.path = path
        self._mode = mode
        self._own: tuple[int, ...] | None = None

    def take_over(self) -> bool:
        """Take over the file of a process that was killed, and remove its traces; return whether there is a file."""
        with _opened(self.path) as folder:
            for name in os.listdir(folder):  # noqa: PTH208  no path leads to what is open
                if re.fullmatch(rf"{re.escape(self._prefix)}[0-9a-f]{{16}}", name):
                    with contextlib.suppress(OSError):  # another user's, say
                        os.unlink(name, dir_fd=folder)
            status = _check_target(self.path, folder)
        self._own = _identity(status) if status is not None else None
        return status is not None

    def write(self, token: str) -> None:
        """Replace the file by one with this token."""
        # Nobody can know the name before, and O_EXCL follows no link.
        temporary = self._prefix + secrets.token_hex(8)
        with _opened(self.path) as folder:
            _check_kind(self.path, folder)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(token.encode())
                    file.flush()
                    os.fchmod(descriptor, self._mode)
                    own = _identity(os.fstat(descriptor))
                os.replace(temporary, self.path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
        self._own = own

    def remove(self) -> None:
        """Remove the file, unless another process has replaced it since."""
        with _opened(self.path) as folder, contextlib.suppress(FileNotFoundError):
            if self._own == _identity(os.lstat(self.path.name, dir_fd=folder)):
                os.unlink(self.path.name, dir_fd=folder)
        self._own = None

    @property
    def _prefix(self) -> str:
        return f".{self.path.name[:40]}."


class TokenFileKeeper:
    """Keeps a usable token of `tokens` in `file`, from `start` to `stop`.

    While the issuer answers, the token is good for `margin` seconds, but at most for a quarter of its lifetime. The
    file is removed when its token ends, when the issuer rejects the credentials, and at the end. It stays there while
    the issuer is away and its token is good.

    `login` is the source of the tokens of the login, whose rejection concerns all. `now` returns epoch seconds.
    """

    def __init__(
        self,
        file: TokenFile,
        tokens: TokenCycle,
        login: TokenCycle,
        *,
        margin: float = MARGIN,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._tokens = tokens
        self._login = login
        self._margin = margin
        self._now = now
        self._held: AccessToken | None = None
        self._ends_at: float | None = None  # what is in the file; None if there is no file
        self._seen: str | None = None
        self._ask_at = 0.0
        self._latency = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._problem: str | None = None
        self._woken = asyncio.Event()
        self._is_ending = False
        self._running: asyncio.Task[None] | None = None

    def start(self, after: "asyncio.Task[None] | None" = None) -> None:
        """Begin, when the keeper that had the same file before has ended."""
        self._running = asyncio.get_running_loop().create_task(self._run(after))

    def wake(self) -> None:
        """Look at the tokens now: there has been an attempt to get one."""
        self._woken.set()

    def use(self, tokens: TokenCycle, login: TokenCycle) -> None:
        """Go on with other sources of the same tokens."""
        self._tokens, self._login = tokens, login
        self.wake()

    def stop(self) -> "asyncio.Task[None]":
        """Ask for no more tokens, and remove the file. The task ends when that is done, or takes too long."""
        self._is_ending = True
        self.wake()
        return asyncio.get_running_loop().create_task(self._ended())

    async def _ended(self) -> None:
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=_LAST_REMOVAL)

    async def _run(self, after: "asyncio.Task[None] | None") -> None:
        if after is not None:
            await asyncio.wait({after})
        if await self._attempt(self._file.take_over):
            # Nobody knows whose token that is, or when it ends. The first attempt to get one decides.
            self._ends_at = math.inf
        while not self._is_ending:
            self._woken.clear()
            await self._settle()
            if self._asking is None and self._now() >= self._ask_at:
                self._ask_at = self._now() + _TICK
                self._asking = asyncio.get_running_loop().create_task(self._ask())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience()):
                    await self._woken.wait()
        if self._asking is not None:
            self._asking.cancel()
        await self._attempt(self._file.remove)

    async def _settle(self) -> None:
        """Make the file what the sources of tokens have become."""
        now, token = self._now(), self._tokens.at_hand
        if _is_rejected(self._tokens) or _is_rejected(self._login):
            self._seen = token.value if token is not None else self._seen
            self._ask_at = min(self._ask_at, now + _LOOK)
            await self._remove()
        elif token is not None and token.value != self._seen:
            if await self._attempt(lambda: self._file.write(token.value)):
                self._problem = None
                self._held, self._seen, self._ends_at = token, token.value, token.ends_at
                self._ask_at = max(due(token, margin=self._margin, latency=self._latency), now + BRIEF)
        elif self._ends_at is not None and now >= self._ends_at:
            await self._remove()
        elif self._held is not None and self._held.obtained_at > now + 1:
            self._ask_at = min(self._ask_at, now + _LOOK)  # the clock was set back

    async def _remove(self) -> None:
        if self._ends_at is not None and await self._attempt(self._file.remove):
            self._held = self._ends_at = None

    async def _ask(self) -> None:
        """Have the sources get another token. `_settle` then finds it, whoever has asked for it."""
        began, before = self._now(), self._seen
        try:
            if self._login is not self._tokens and _is_rejected(self._login):
                # It may live again, after a new login.
                own = self._login.at_hand
                await self._login.newer(own.value if own is not None else None)
            token = await self._tokens.newer(before)
        except TokenError as error:
            # After a rejection, look for a new login meanwhile.
            longest = _LOOK if isinstance(error, CredentialsRejected) else math.inf
            self._ask_at = self._now() + min(self._tokens.retry_after(), longest)
            if self._ends_at == math.inf:
                self._ends_at = 0.0
        else:
            now = self._now()
            self._latency = now - began
            if token.value == before:
                # Some issuers give the same one again until shortly before its end.
                self._ask_at = now + max(1.0, (token.ends_at - now) / 4)
                self._seen = before if self._held is not None else None
        finally:
            self._asking = None
            self.wake()

    def _patience(self) -> float:
        """Return the seconds until there is something to do. They are few, because the clock may be set meanwhile."""
        times = [self._now() + _TICK]
        times += [self._ends_at] if self._ends_at is not None else []
        times += [self._ask_at] if self._asking is None else []
        return max(min(times) - self._now(), 0.0)

    async def _attempt(self, act: Callable[[], bool | None]) -> bool:
        """Do something with the file, in a thread; return whether that worked. Warn once if not: it is tried again."""
        try:
            return await in_thread(act) is not False
        except TokenFileError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001  if the keeper ended here, an old token would stay
            problem = f"unexpected {type(error).__name__}"
        if problem != self._problem:
            log(f"the token file cannot be kept up to date: {problem}")
        self._problem = problem
        return False


def due(token: AccessToken, *, margin: float, latency: float) -> float:
    """Return when to fetch the next token, in epoch seconds, so that it is there when this one is good for `margin`.

    `latency` is how long the issuer takes, in seconds.
    """
    lifetime = token.ends_at - token.obtained_at
    lead = max(1.5 * latency, min(0.1 * lifetime, _MAX_LEAD))
    return token.ends_at - min(min(margin, lifetime / 4) + lead, lifetime / 2)


def _is_rejected(tokens: TokenCycle) -> bool:
    # Without a session there is nothing to reject: an initial token is good until its end.
    return isinstance(tokens.error, CredentialsRejected) and tokens.error.cause != "no_session"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open the file's folder, once it is checked; raises TokenFileError, also for errors in the block.

    What happens in the folder that was opened cannot be led elsewhere.
    """
    try:
        for part in (path.parent, *path.parent.parents):
            status = part.lstat()
            if stat.S_ISLNK(status.st_mode) and not _is_trusted(status):
                raise TokenFileError(f"{part} is a link of another user (uid {status.st_uid}): choose another folder")
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _check_folder(path.parent, os.fstat(folder))
            yield folder
        finally:
            os.close(folder)
    except FileNotFoundError:
        raise TokenFileError(f"{path.parent} does not exist: create it, or choose another folder") from None
    except OSError as error:
        raise TokenFileError(f"{path} cannot be used ({error.strerror}): choose another one") from None


def _check_folder(folder: Path, status: os.stat_result) -> None:
    if not _is_trusted(status):
        raise TokenFileError(f"{folder} belongs to another user (uid {status.st_uid}): choose a folder of your own")
    if status.st_mode & 0o002 and not status.st_mode & stat.S_ISVTX and status.st_uid != 0:
        raise TokenFileError(f"all users can write to {folder}: set its mode to 0700")


def _check_kind(path: Path, folder: int) -> os.stat_result | None:
    """Return the status of the file that is to be replaced, or None if there is none; raises TokenFileError."""
    try:
        status = os.lstat(path.name or ".", dir_fd=folder)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode):
        raise TokenFileError(f"{path} is a symbolic link: remove it, or choose the file that it leads to")
    if stat.S_ISDIR(status.st_mode):
        raise TokenFileError(f"{path} is a folder: choose a file in it, such as {path / 'token'}")
    if not stat.S_ISREG(status.st_mode):
        raise TokenFileError(f"{path} is not a regular file: remove it, or choose another one")
    if status.st_uid != os.geteuid():
        raise TokenFileError(f"{path} belongs to another user (uid {status.st_uid}): choose another one")
    return status


def _check_target(path: Path, folder: int) -> os.stat_result | None:
    """Like `_check_kind`, and look into the file: a wrong name must not cost anybody a file."""
    status = _check_kind(path, folder)
    if status is None:
        return None
    descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    with os.fdopen(descriptor, "rb") as file:
        if not re.fullmatch(rb"[!-~]*", file.read(_MAX_FILE + 1)) or status.st_size > _MAX_FILE:
            raise TokenFileError(f"{path} has something else in it than a token: choose another one, or remove it")
    return status


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _identity(status: os.stat_result) -> tuple[int, ...]:
    # Numbers of files are used again, so they are not enough.
    return status.st_dev, status.st_ino, status.st_mtime_ns
