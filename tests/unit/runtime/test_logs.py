"""What log lines look like: for people at a terminal and for machines."""

import json
import logging
import re

import pytest
from mitmproxy.log import ALERT

from eoepca_security.proxy.addons.lifecycle import IN_BROWSER, STARTED, STATUS_PAGE, TRY
from eoepca_security.proxy.runtime.logs import QUIET, JsonFormatter, NoRepeats, TerminalFormatter
from eoepca_security.proxy.runtime.output import print_error


def record(message: str, *args: object, level: int = logging.WARNING, name: str = "x") -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, message, args, None)


def test_a_json_line() -> None:
    line = JsonFormatter().format(record("a %s\nb", '"q"'))
    assert "\n" not in line
    members = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", members.pop("time"))
    assert members == {"level": "warning", "logger": "x", "message": 'a "q"\nb'}


def test_the_start_as_json_has_its_parts() -> None:
    started = logging.LogRecord("x", 21, "", 0, STARTED, ("http://127.0.0.1:1", "https://s", "alice", 60), None)
    started.levelname = "ALERT"
    members = json.loads(JsonFormatter().format(started))
    assert members["level"] == "info"
    assert (
        members["message"]
        == "OIDC proxy listening at http://127.0.0.1:1 -> https://s as alice; access tokens live 60 s"
    )
    assert {name: members[name] for name in ("listener", "upstream", "identity", "lifetime")} == {
        "listener": "http://127.0.0.1:1",
        "upstream": "https://s",
        "identity": "alice",
        "lifetime": 60,
    }


def test_an_exception_as_json() -> None:
    try:
        raise ValueError("v")  # noqa: TRY301
    except ValueError as error:
        failed = logging.LogRecord("x", logging.ERROR, "", 0, "m", None, (ValueError, error, error.__traceback__))
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    assert "ValueError: v" in json.loads(line)["exception"]


@pytest.mark.parametrize("identity", ["alice (sub u-1)", "[red]alice[/red]", "a" * 200])
def test_the_start_at_a_terminal_is_a_summary(identity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = TerminalFormatter().format(record(STARTED, "http://127.0.0.1:1", "https://s.example", identity, 60))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert all(len(line) <= 60 for line in plain.splitlines())
    shown = re.sub(r"[│\s]", "", plain)
    for part in ("http://127.0.0.1:1", "https://s.example", identity.replace(" ", ""), "60s"):
        assert part in shown
    assert "a line" in TerminalFormatter().format(record("a line"))


def test_the_summary_has_the_address_for_browsers_if_there_is_one() -> None:
    started = record(STARTED, "http://127.0.0.1:1", "https://s.example", "alice", 60)
    assert "in a browser" not in TerminalFormatter().format(started)
    started.more = {
        IN_BROWSER: "http://s.localhost:1",
        STATUS_PAGE: "http://127.0.0.1:2/",
        TRY: "curl -i http://localhost:1/",
    }
    shown = TerminalFormatter().format(started)
    assert re.search(r"in a browser.*http://s\.localhost:1", shown)
    assert re.search(r"status page.*http://127\.0\.0\.1:2/", shown)
    assert re.search(r"try.*curl -i http://localhost:1/", shown)


@pytest.mark.parametrize(
    ("level", "name"), [(ALERT, "info   "), (logging.WARNING, "warning"), (logging.ERROR, "error  ")]
)
def test_a_line_at_a_terminal_has_time_and_level_and_wraps_below_its_message(
    level: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = record("the service says %s", "nothing " * 20, level=level)
    said.client = ("127.0.0.1", 1)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", TerminalFormatter().format(said)).splitlines()
    assert re.match(rf"\d\d:\d\d:\d\d {name} \[127\.0\.0\.1:1\] the service says nothing", lines[0])
    assert len(lines) > 1
    assert all(len(line) <= 80 for line in lines)
    assert all(line.startswith(f"{'':17}nothing") for line in lines[1:])


def test_nothing_is_said_twice_in_a_row_until_it_is_news() -> None:
    now = [1000.0]
    repeats = NoRepeats(lambda: now[0])
    assert repeats.filter(record("down"))
    assert not repeats.filter(record("down"))
    assert repeats.filter(record("down", name="another"))
    assert repeats.filter(record("down again", level=logging.ERROR))
    assert repeats.filter(record("down"))
    now[0] += QUIET - 1
    assert not repeats.filter(record("down"))
    now[0] += QUIET + 1
    assert repeats.filter(record("down"))
    for _ in range(2):
        assert repeats.filter(record("detail", level=logging.INFO))


def test_what_ends_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("PROXY_PORT: taken", "text")
    assert capsys.readouterr().err == "PROXY_PORT: taken\n"
    print_error("PROXY_PORT: taken", "json")
    members = json.loads(capsys.readouterr().err)
    assert (members["level"], members["message"]) == ("error", "PROXY_PORT: taken")
