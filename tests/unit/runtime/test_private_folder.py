"""A folder that is there as long as anybody uses it."""

import os
from pathlib import Path

from eoepca_security.proxy.runtime.private_folder import PrivateFolder


def test_the_last_one_that_leaves_removes_it(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path)
    (folder.path / "session.json").write_text("secret")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    # As a process that is forked has it.
    inherited = os.dup(folder._file.fileno())
    folder.leave()
    assert (folder.path / "session.json").exists()
    PrivateFolder(tmp_path).leave()
    assert (folder.path / "session.json").exists()
    os.close(inherited)
    PrivateFolder(tmp_path).leave()
    assert not folder.path.exists()


def test_what_is_no_such_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "in-use").touch()
    (tmp_path / "oidc-proxy-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "oidc-proxy-new").mkdir()
    PrivateFolder(tmp_path).leave()
    assert (tmp_path / "elsewhere" / "in-use").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "oidc-proxy-link", "oidc-proxy-new"}
