"""A folder that goes when the last of the processes that use it goes, and what was left by those that were killed."""

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
    """A new folder in `place`, readable for this user alone. Processes that are forked from this one use it, too.

    Folders that nobody uses any more are removed before. Raises OSError when there can be none.
    """

    def __init__(self, place: Path) -> None:
        for left in place.glob(f"{_PREFIX}*"):
            _remove_unused(left)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        # The lock is held until all processes that have inherited the file are gone.
        self._file = (self.path / _IN_USE).open("wb")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Use it no longer; the last one that does removes it."""
        self._file.close()
        _remove_unused(self.path)


def _remove_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):
        # Everybody may make folders there.
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        with (folder / _IN_USE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
