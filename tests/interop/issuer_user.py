"""Somebody who uses the launcher, and the protected service that they want something from."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from eoepca_security.testing.local_server import Handler, LocalServer
from tests.interop.kc_process import Child, accepts, running
from tests.support.network import free_port

LAUNCHER = Path(__file__).parents[2] / "run-mitmproxy.py"
SECONDS = 60.0


@dataclass(frozen=True)
class Service:
    """A protected service that tells callers who they are; `seen` has a number for each of the tokens it accepted."""

    url: str
    seen: list[str] = field(default_factory=list)


@contextmanager
def running_service(user_of: Callable[[str], str | None]) -> Iterator[Service]:
    seen: list[str] = []

    class ServiceHandler(Handler):
        def respond(self) -> None:
            given = self.headers.get_all("Authorization") or []
            token = given[0].removeprefix("Bearer ") if len(given) == 1 else ""
            user = user_of(token) if token else None
            if user is not None:
                seen.append(hashlib.sha256(token.encode()).hexdigest())
            self.answer(401 if user is None else 200, {"user": user})

    with LocalServer(ServiceHandler) as server:
        yield Service(server.url, seen)


@dataclass(frozen=True)
class User:
    """One person's folder and settings, and how many seconds they leave between two commands."""

    folder: Path
    settings: Mapping[str, str]
    stack: ExitStack
    pace: float = 0.0
    port: int = field(default_factory=free_port)

    def begins(self, *arguments: str) -> Child:
        """Start the launcher; it ends with the test."""
        time.sleep(self.pace)
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}-{arguments[0]}.log"
        return self.stack.enter_context(running(self._command(*arguments), self._env(), self.folder, log))

    def does(self, *arguments: str) -> tuple[int, str, str]:
        """Run the launcher to its end; exit code, stdout and stderr."""
        time.sleep(self.pace)
        done = subprocess.run(
            self._command(*arguments),
            env=self._env(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def checks(self) -> dict[str, dict[str, Any]]:
        """The steps of `check`, by their names."""
        _, output, errors = self.does("check", "--json")
        assert output, errors
        return {step["name"]: step for step in json.loads(output)["steps"]}

    def token(self) -> str:
        """What `token` prints."""
        code, output, errors = self.does("token")
        assert (code, output.count("\n")) == (0, 1), output + errors
        return output.strip()

    def logs_in(self, person: Callable[[str], str], *options: str) -> str:
        """Log in with a person at the issuer's pages; what the launcher said."""
        login = self.begins("login", *options)
        login.wait_until(lambda: re.search(r"^  http\S+$", login.output(), re.MULTILINE) is not None, SECONDS)
        shown = re.findall(r"^  (http\S+)$", login.output(), re.MULTILINE)[0]
        page = person(shown)
        try:
            code = login.exit_code(SECONDS)
        except Exception as error:
            error.add_note(page)
            raise
        assert code == 0, login.output() + page
        return login.output()

    def kept(self) -> dict[str, Any]:
        """The session in the store."""
        (kept,) = self.folder.glob("store/*.json")
        return dict(json.loads(kept.read_text()))

    def refresh_token(self) -> str:
        return str(self.kept()["refresh_token"])

    def serves(self) -> Child:
        """Start the proxy and wait until it listens."""
        proxy = self.begins("serve")
        proxy.wait_until(lambda: accepts(self.port), SECONDS)
        return proxy

    def asks(self) -> httpx.Response:
        """Ask the service for something through the proxy."""
        return httpx.get(f"http://127.0.0.1:{self.port}/whoami", trust_env=False, timeout=20)

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(LAUNCHER), *arguments]

    def _env(self) -> dict[str, str]:
        # All of it: nothing of the caller's settings may reach the launcher.
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "BROWSER": "true",  # nothing opens by itself
            "OPEN_ID_TOKEN_STORE": str(self.folder / "store"),
            "REMOTE_PROTECTED_ENDPOINT": "/whoami",
            "PROXY_PORT": str(self.port),
            "PROXY_ADMIN": "off",
            **self.settings,
        }
