"""What commands write: at a terminal and elsewhere."""

import io
import threading

import pytest

from eoepca_security.proxy.runtime import output
from eoepca_security.proxy.runtime.output import say, waiting, wrapped
from tests.support.waiting import eventually

LONG = "word " * 30 + "end"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch: pytest.MonkeyPatch, patience: float = 0.02) -> Terminal:
    """Let this be a terminal; not a fixture, as pytest sets the streams again before each test."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(output, "PATIENCE", patience)
    return terminal


def test_lines_wrap_at_words_and_what_is_copied_stays_in_one_piece() -> None:
    assert wrapped("one two three", 9) == "one two\nthree"
    assert wrapped("one two three", 9, indent=4) == "one\n    two\n    three"
    command = "`oidc-proxy login --env-file mine`"
    assert wrapped(f"first run {command}, then wait", 20) == f"first run\n{command},\nthen wait"
    assert wrapped("  https://issuer.example/device?user_code=A", 20) == "  https://issuer.example/device?user_code=A"
    assert wrapped("https://issuer.example/a-long-address", 10) == "https://issuer.example/a-long-address"
    assert wrapped("short", 80) == "short"
    assert wrapped("", 80) == ""


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("200", 80)])
def test_a_terminal_gets_lines_of_at_most_80_characters(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    say(f"first\n{LONG}", err=True)
    lines = terminal.getvalue().splitlines()
    assert lines[0] == "first"
    assert len(lines) > 2
    assert max(map(len, lines)) <= width
    assert " ".join(lines[1:]) == LONG


def test_a_pipe_gets_lines_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say(LONG)
    say(LONG, err=True)
    with waiting("waiting for nothing"):
        pass
    assert capsys.readouterr() == (f"{LONG}\n", f"{LONG}\n")


def test_a_terminal_shows_a_wait_and_then_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    with waiting(f"waiting for {LONG}"):
        eventually(lambda: terminal.getvalue() != "")
        shown = terminal.getvalue()
    assert shown.startswith("waiting for word")
    assert len(shown) < 30
    assert terminal.getvalue() == f"{shown}\r\x1b[K"


def test_a_short_wait_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_terminal(monkeypatch, patience=60)
    before = threading.active_count()
    with waiting("waiting"):
        pass
    eventually(lambda: threading.active_count() <= before)
    assert terminal.getvalue() == ""
