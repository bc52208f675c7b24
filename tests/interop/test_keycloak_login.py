"""From nothing to a 200 through the proxy, with a person at Keycloak's pages: a real Chromium plays one.

Run with `uv run --group browser pytest -m browser -n 0 tests/interop`; needs Java, Maven, and Debian's chromium and
chromium-driver.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.interop.kc_process import Child, accepts, running
from tests.interop.kc_server import AUDIENCE, INTERACTIVE, REALM, USERNAME, Keycloak
from tests.interop.kc_service import Service
from tests.support.network import free_port

pytest.importorskip("selenium")

from tests.interop.kc_browser import grant, log_in, wait_for_text
from tests.support.browser import chromium

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [
    pytest.mark.interop,
    pytest.mark.browser,
    pytest.mark.timeout(1000),
]

LAUNCHER = Path(__file__).parents[2] / "run-mitmproxy.py"
SECONDS = 60.0


class Newcomer:
    """Somebody with a client and a service, and no token."""

    def __init__(self, folder: Path, keycloak: Keycloak, service: Service, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.port = free_port()
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONUNBUFFERED": "1",
            "BROWSER": "true",  # nothing opens by itself
            "OPEN_ID_CONNECT_URL": keycloak.issuer(REALM),
            "OPEN_ID_CONNECT_CLIENT_ID": INTERACTIVE.client_id,
            "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE,
            "REMOTE_PROTECTED_DOMAIN": service.url,
            "REMOTE_PROTECTED_ENDPOINT": "/whoami",
            "PROXY_PORT": str(self.port),
            "PROXY_ADMIN": "off",
        }

    def runs(self, *arguments: str) -> Child:
        log = self._folder / f"{'-'.join(arguments)}.log"
        command = [sys.executable, str(LAUNCHER), *arguments]
        return self._stack.enter_context(running(command, self._env, self._folder, log))

    def does(self, *arguments: str) -> tuple[int, str]:
        child = self.runs(*arguments)
        return child.exit_code(SECONDS), child.output()

    def asks_through_the_proxy(self) -> httpx.Response:
        proxy = self.runs("serve")
        proxy.wait_until(lambda: accepts(self.port), SECONDS)
        return httpx.get(f"http://127.0.0.1:{self.port}/whoami", trust_env=False, timeout=20)


@pytest.fixture
def newcomer(keycloak: Keycloak, service: Service, tmp_path: Path) -> Iterator[Newcomer]:
    with ExitStack() as stack:
        yield Newcomer(tmp_path, keycloak, service, stack)


def url_in(login: Child) -> str:
    login.wait_until(lambda: re.search(r"^  http\S+$", login.output(), re.MULTILINE) is not None, SECONDS)
    return str(re.findall(r"^  (http\S+)$", login.output(), re.MULTILINE)[0])


def assert_a_session_that_works(newcomer: Newcomer, login: Child) -> None:
    assert login.exit_code(SECONDS) == 0, login.output()
    assert f"Logged in as {USERNAME} (sub " in login.output()
    assert "eyJ" not in login.output()
    code, output = newcomer.does("check")
    assert code == 0, output
    response = newcomer.asks_through_the_proxy()
    assert (response.status_code, response.json()["username"]) == (200, USERNAME), response.text


def test_by_device(newcomer: Newcomer, tmp_path: Path) -> None:
    code, output = newcomer.does("check")
    assert code == 1, output
    assert "run-mitmproxy.py login" in output
    login = newcomer.runs("login")
    with chromium(tmp_path / "profile") as driver:
        driver.get(url_in(login))
        log_in(driver)
        grant(driver)
        wait_for_text(driver, "Device Login Successful")
    assert_a_session_that_works(newcomer, login)


def test_by_browser_and_out_again(newcomer: Newcomer, tmp_path: Path) -> None:
    login = newcomer.runs("login", "--browser")
    with chromium(tmp_path / "profile") as driver:
        driver.get(url_in(login))
        log_in(driver)
        shown = wait_for_text(driver, "You are logged in")
        assert f"as {USERNAME} (sub " in shown
        driver.save_screenshot(str(tmp_path / "page.png"))
        errors = [entry for entry in driver.get_log("browser") if "favicon" not in entry["message"]]
        assert errors == []
    assert_a_session_that_works(newcomer, login)
    code, output = newcomer.does("logout")
    assert code == 0, output
    assert "The issuer has ended the session" in output
    code, output = newcomer.does("token")
    assert code == 2, output
