"""Fixtures: a controllable issuer, a recording service, and the real proxy as a process between them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
from xdist.scheduler import LoadScopeScheduling

from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.tls import write_certificate

ROOT = Path(__file__).parent.parent
STARTED = re.compile(r"listening at http://127\.0\.0\.1:(\d+) -> ")


@dataclass(frozen=True)
class Seen:
    """A request as it arrived at the service."""

    method: str
    target: str
    authorization: list[str]
    headers: Mapping[str, str]
    body_length: int
    authorized: bool


class Service:
    """The protected service: accepts one Bearer token that the issuer issued and that has not expired."""

    def __init__(self, issuer: FakeIssuer) -> None:
        self.seen: list[Seen] = []
        self._server = LocalServer(self._handler(issuer))
        self.url = self._server.url

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def _handler(self, issuer: FakeIssuer) -> type[Handler]:
        seen = self.seen

        class ServiceHandler(Handler):
            def respond(self) -> None:
                length = len(self.read_body())
                given = self.headers.get_all("Authorization") or []
                authorized = len(given) == 1 and issuer.accepts(given[0].removeprefix("Bearer "))
                seen.append(Seen(self.command, self.path, given, dict(self.headers), length, authorized))
                self.answer(200 if authorized else 401, {"path": self.path, "length": length})

        return ServiceHandler


@dataclass
class ProxyProcess:
    """The proxy as its users run it; `url` is empty when it ended before it listened."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        self.process.stdout.close()
        with self._changed:
            self.lines.append("<end of output>")
            self._changed.notify_all()

    @property
    def output(self) -> str:
        """Everything it has printed so far."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: re.Pattern[str], timeout: float = 75) -> re.Match[str] | None:
        """Wait for a line; None when the output ended without it."""

        def found() -> bool:
            return any(pattern.search(line) for line in self.lines) or "<end of output>" in self.lines

        with self._changed:
            assert self._changed.wait_for(found, timeout), f"no {pattern.pattern!r} in:\n{self.output}"
        return next((match for line in self.lines if (match := pattern.search(line))), None)

    def wait_until_started(self) -> Self:
        match = self.wait_for(STARTED)
        self.url = f"http://127.0.0.1:{match[1]}" if match else ""
        return self

    def wait_until_ended(self, timeout: float = 30) -> int:
        """Return its exit code, once all of its output is here."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def stop_in_haste(self) -> int:
        """Tell it to end again and again until it does; return its exit code."""
        while True:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.wait_until_ended(0.1)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait_until_ended(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


StartProxy = Callable[..., ProxyProcess]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`, give a worker all that shares what a session starts once (see `_group`)."""
    if config.getvalue("dist") != "loadgroup":
        return None
    # xdist's own, which goes by marks, does nothing with pytest 9.2.
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = _group
    return scheduling


def _group(nodeid: str) -> str:
    """Return what a test belongs to: the tests of one Keycloak, a row of the issuers' table, or its file."""
    file, _, test = nodeid.partition("::")
    if "/test_keycloak" in file or file.endswith("/test_apache.py"):
        return "keycloak"
    return f"{file}{test[test.find('[') :]}" if file.endswith("/test_issuers.py") else file


def settings_for(issuer: FakeIssuer, **more: str) -> dict[str, str]:
    """Return the environment that makes a proxy a client of `issuer`."""
    environment = {
        "OPEN_ID_CONNECT_URL": issuer.url,
        "OPEN_ID_CONNECT_CLIENT_ID": issuer.client_id,
        "OPEN_ID_REFRESH_TOKEN": issuer.refresh_token,
        "PROXY_ADMIN": "off",
        "OPEN_ID_TOKEN_STORE": "none",
        **({"OPEN_ID_CONNECT_CLIENT_SECRET": issuer.client_secret} if issuer.client_secret is not None else {}),
    }
    return environment | more


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder; mitmproxy makes its own CA in it once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def base_environment(home: Path) -> dict[str, str]:
    """The environment of child processes: nothing of ours, no proxies."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def start(base_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartProxy]:
    """Start the launcher, or mitmdump with the add-on (in regular mode where there is no service's URL).

    All are stopped at the end of the module, and must not have crashed on the way.
    """
    started: list[ProxyProcess] = []

    def start_proxy(
        entry: str, service_url: str, environment: Mapping[str, str], *arguments: str, wait: bool = True
    ) -> ProxyProcess:
        environment = dict(environment)
        if entry == "launcher":
            command = [sys.executable, str(ROOT / "run-mitmproxy.py"), "serve", "--", *arguments]
            environment = {"PROXY_PORT": "0", "REMOTE_PROTECTED_DOMAIN": service_url, **environment}
        else:
            mitmdump = str(Path(sys.executable).parent / "mitmdump")
            mode = f"reverse:{service_url}" if service_url else "regular"
            command = [mitmdump, "-s", str(ROOT / "mitmproxy-oidc-addon.py")]
            command += ["--mode", f"{mode}@127.0.0.1:{environment.get('PROXY_PORT', '0')}", *arguments]
        proxy = ProxyProcess(run_process(command, base_environment | environment, tmp_path_factory.mktemp("cwd")))
        started.append(proxy)
        return proxy.wait_until_started() if wait else proxy

    yield start_proxy
    for proxy in started:
        proxy.stop()
        proxy.wait_until_ended()
    crashes = [proxy.output for proxy in started if "has crashed" in proxy.output or "Traceback" in proxy.output]
    assert not crashes, "\n\n".join(crashes)


def run_process(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=dict(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 and localhost, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    write_certificate(path)
    return path


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """An HTTP client that goes straight to where it is sent."""
    with httpx.Client(trust_env=False, timeout=20) as http:
        yield http


def eventually(condition: Callable[[], bool], timeout: float = 15) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
