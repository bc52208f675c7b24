"""What happens before the command line is imported. tests/end_to_end/test_command.py has what is missing."""

import sys

import pytest

from eoepca_security.proxy.cli import launch


def test_windows_is_told_what_works_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", ["oidc-proxy", "demo"])
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Windows Subsystem for Linux" in line
