"""Files with tokens, as programs read them that no proxy reaches: real processes."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.processes import ROOT, ProxyProcess, StartProxy, run_process
from tests.support.waiting import eventually

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(Behaviour(refresh_tokens="rotate")) as issuer:
        yield issuer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    return folder / "token"


@dataclass
class Reader:
    """Reads the file every 20 ms in its `with` block, and looks at each token as a service would."""

    path: Path
    issuer: FakeIssuer
    margin: float = 0
    tokens: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._end.wait(0.02):
            try:
                token = self.path.read_text()
            except FileNotFoundError:
                self.problems.append("missing")
                continue
            now = time.time()
            if not self.issuer.accepts(token):
                self.problems.append(f"not accepted: {token!r}")
            elif (left := unverified_claims(token)["exp"] - now) < self.margin:
                self.problems.append(f"good for {left:.2f} s only")
            if token not in self.tokens[-1:]:
                self.tokens.append(token)


def good(path: Path, issuer: FakeIssuer) -> bool:
    return path.exists() and issuer.accepts(path.read_text())


# --- there and good ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "margin", "workers"),
    [
        (3, 0.2, "1"),
        pytest.param(10, 0.5, "1", marks=pytest.mark.soak),
        pytest.param(10, 0.5, "3", marks=pytest.mark.soak),
    ],
)
def test_a_reader_never_finds_it_missing_partial_or_expired(
    start: StartProxy, issuer: FakeIssuer, path: Path, tmp_path: Path, count: int, margin: float, workers: str
) -> None:
    issuer.behaviour.lifetime = 4
    given = {"OPEN_ID_TOKEN_FILE": str(path), "OPEN_ID_TOKEN_FILE_MARGIN": "1", "PROXY_WORKERS": workers}
    store = {"OPEN_ID_TOKEN_STORE": str(tmp_path / "store")}
    proxy = start("launcher", NOWHERE, settings_for(issuer, **given, **store))
    eventually(path.exists)
    with Reader(path, issuer, margin=margin) as reader:
        eventually(lambda: len(reader.tokens) > count, timeout=60)
    assert reader.problems == []
    assert len(set(reader.tokens)) == len(reader.tokens)
    assert issuer.reuses == 0
    # Nobody else has asked for tokens: one for each file, and what the workers had at their start.
    assert len(issuer.requests) <= len(reader.tokens) + 1 + int(workers)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert proxy.stop() == 0
    assert list(path.parent.iterdir()) == []
    assert not any(token in proxy.output for token in reader.tokens)


def test_with_workers_one_process_writes_also_after_it_was_killed(
    start: StartProxy, issuer: FakeIssuer, path: Path, tmp_path: Path
) -> None:
    issuer.behaviour.lifetime = 20
    given = {"OPEN_ID_TOKEN_FILE": str(path), "PROXY_WORKERS": "2", "OPEN_ID_TOKEN_STORE": str(tmp_path / "store")}
    proxy = start("launcher", NOWHERE, settings_for(issuer, **given))
    eventually(path.exists)
    children = Path(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children")

    def processes() -> list[int]:
        return [int(child) for child in children.read_text().split()]

    def replace_first() -> None:
        before = processes()
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: before[0] not in processes() and len(processes()) == 2)

    _, second = processes()
    with Reader(path, issuer) as reader:
        written = path.stat().st_mtime_ns
        replace_first()
        eventually(lambda: path.stat().st_mtime_ns != written)
        written = path.stat().st_mtime_ns
        assert processes()[0] == second
        replace_first()
        os.kill(processes()[0], signal.SIGTERM)  # the one that writes: all end
        assert proxy.wait_until_ended() == 0
    assert reader.tokens == reader.tokens[:1]
    assert set(reader.problems) <= {"missing"}  # at the end
    assert list(path.parent.iterdir()) == []


def test_the_mode_may_let_others_read_it(start: StartProxy, issuer: FakeIssuer, path: Path) -> None:
    given = {"OPEN_ID_TOKEN_FILE": str(path), "OPEN_ID_TOKEN_FILE_MODE": "0644"}
    proxy = start("launcher", NOWHERE, settings_for(issuer, **given))
    eventually(lambda: good(path, issuer))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert proxy.stop() == 0
    assert not path.exists()


def test_the_add_on_alone_keeps_it_too(start: StartProxy, issuer: FakeIssuer, path: Path) -> None:
    proxy = start("addon", NOWHERE, settings_for(issuer), "--set", f"oidc_token_file={path}")
    eventually(lambda: good(path, issuer))
    assert proxy.stop() == 0
    assert not path.exists()


# --- when it goes ------------------------------------------------------------------------------------------------


def test_it_stays_while_the_issuer_is_away_until_its_token_ends(
    start: StartProxy, issuer: FakeIssuer, path: Path
) -> None:
    issuer.behaviour.lifetime = 4
    start("launcher", NOWHERE, settings_for(issuer, OPEN_ID_TOKEN_FILE=str(path)))
    eventually(path.exists)
    issuer.behaviour.down = True
    ends_at = unverified_claims(path.read_text())["exp"]
    with Reader(path, issuer) as reader:
        time.sleep(max(ends_at - time.time() - 0.3, 0))
    assert reader.problems == []
    eventually(lambda: not path.exists())
    assert time.time() - ends_at < 1
    issuer.behaviour.down = False
    eventually(lambda: good(path, issuer), timeout=40)


def test_it_goes_when_the_credentials_are_rejected_and_comes_back_after_a_login(
    start: StartProxy, issuer: FakeIssuer, path: Path, tmp_path: Path, base_environment: dict[str, str]
) -> None:
    issuer.behaviour.lifetime = 8
    environment = settings_for(issuer, OPEN_ID_TOKEN_FILE=str(path), OPEN_ID_TOKEN_STORE=str(tmp_path / "store"))
    proxy = start("launcher", NOWHERE, environment)
    eventually(path.exists)
    token = path.read_text()
    issuer.end_sessions()
    eventually(lambda: not path.exists())
    assert unverified_claims(token)["exp"] > time.time()
    assert "credentials_rejected" in proxy.output
    issuer.behaviour.login.interval = 0.1
    environment |= base_environment | {"OPEN_ID_REFRESH_TOKEN": ""}
    command = [sys.executable, str(ROOT / "run-mitmproxy.py"), "login"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=60, stdout=subprocess.DEVNULL)
    eventually(lambda: good(path, issuer))


def test_a_proxy_that_is_killed_leaves_at_most_its_last_token(
    start: StartProxy, issuer: FakeIssuer, path: Path
) -> None:
    environment = settings_for(issuer, OPEN_ID_TOKEN_FILE=str(path))
    proxy = start("launcher", NOWHERE, environment)
    eventually(path.exists)
    last = path.read_text()
    proxy.process.kill()
    proxy.wait_until_ended()
    assert [file.read_text() for file in path.parent.iterdir()] == [last]
    # A successor that gets no token removes it, as it cannot know whose it is.
    proxy = start("launcher", NOWHERE, environment | {"OPEN_ID_REFRESH_TOKEN": "unknown"}, wait=False)
    assert proxy.wait_until_ended() == 1
    assert not path.exists()


def test_bad_places_are_exit_2_with_a_line_each(start: StartProxy, issuer: FakeIssuer, path: Path) -> None:
    (path.parent / "link").symlink_to(path)
    os.mkfifo(path.parent / "pipe")
    for place, says in (
        (path.parent, "is a folder"),
        (path.parent / "link", "is a symbolic link"),
        (path.parent / "pipe", "is not a regular file"),
        (path / "nowhere", "does not exist"),
    ):
        proxy = start("launcher", NOWHERE, settings_for(issuer, OPEN_ID_TOKEN_FILE=str(place)), wait=False)
        assert proxy.wait_until_ended() == 2
        (line, _) = proxy.lines
        assert line.startswith("OPEN_ID_TOKEN_FILE: ")
        assert says in line
    assert issuer.requests == []


# --- without a proxy ---------------------------------------------------------------------------------------------


@pytest.fixture
def watch(base_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., ProxyProcess]]:
    """Start `token --file PATH --watch`."""
    started: list[ProxyProcess] = []

    def start_watch(path: Path, environment: Mapping[str, str]) -> ProxyProcess:
        command = [sys.executable, str(ROOT / "run-mitmproxy.py"), "token", "--file", str(path), "--watch"]
        started.append(ProxyProcess(run_process(command, base_environment | dict(environment), tmp_path)))
        return started[-1]

    yield start_watch
    for one in started:
        one.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_keeps_it_without_a_proxy_until_a_signal(
    watch: Callable[..., ProxyProcess], issuer: FakeIssuer, path: Path, number: int
) -> None:
    issuer.behaviour.lifetime = 2
    command = watch(path, settings_for(issuer))
    eventually(path.exists)
    with Reader(path, issuer) as reader:
        eventually(lambda: len(reader.tokens) > 3)
    assert reader.problems == []
    command.process.send_signal(number)
    assert command.wait_until_ended() == 0
    assert list(path.parent.iterdir()) == []
    assert command.lines[:-1] == [f"keeping a current token in {path}; Ctrl-C ends that, and removes it"]


def test_the_command_ends_with_1_if_its_first_token_is_refused(
    watch: Callable[..., ProxyProcess], issuer: FakeIssuer, path: Path
) -> None:
    path.write_text("left")
    command = watch(path, settings_for(issuer, OPEN_ID_REFRESH_TOKEN="unknown"))
    assert command.wait_until_ended() == 1
    (line, _) = command.lines
    assert line.startswith("credentials_rejected: ")
    assert not path.exists()


def test_the_command_waits_for_an_issuer_that_is_away(
    watch: Callable[..., ProxyProcess], issuer: FakeIssuer, path: Path
) -> None:
    issuer.behaviour.down = True
    command = watch(path, settings_for(issuer))
    assert command.wait_for(re.compile(r"no new access token \(issuer_unavailable\): .*; "))
    issuer.behaviour.down = False
    eventually(lambda: good(path, issuer), timeout=40)
    issuer.end_sessions()
    assert command.process.poll() is None
