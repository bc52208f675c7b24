"""A temporary folder that several processes share; the last one removes it."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

_PREFIX: Final = "oidc-proxy-"
_IN_USE: Final = "in-use"


class PrivateFolder:
    """A new folder in `place`, readable only by this user. Forked processes use it too.

    It first removes unused folders that killed processes left behind. Raises OSError when it cannot create the folder.
    """

    def __init__(self, place: Path) -> None:
        for left in place.glob(f"{_PREFIX}*"):
            _remove_unused(left)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        # The lock is held until all processes that inherited the file have exited.
        self._file = (self.path / _IN_USE).open("wb")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Stop using the folder. The last process removes it."""
        self._file.close()
        _remove_unused(self.path)


def _remove_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):
        # Any user may create folders there.
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        with (folder / _IN_USE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
