"""From nothing to a 200 through the proxy, with a person at Keycloak's pages: a real Chromium plays one.

Run with `uv run --group browser pytest -m browser -n 0 tests/interop`; needs Java, Maven, and Debian's chromium and
chromium-driver.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import pytest

from eoepca_security.testing.local_server import Handler, LocalServer
from tests.interop.kc_process import Child, accepts, running
from tests.interop.kc_server import AUDIENCE, INTERACTIVE, REALM, USERNAME, Keycloak
from tests.interop.kc_service import Service
from tests.support.network import free_port

pytest.importorskip("selenium")

from selenium.common.exceptions import WebDriverException

from tests.interop.kc_browser import grant, log_in, wait_for, wait_for_text
from tests.support.browser import ARGUMENTS, attached, chromium

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [
    pytest.mark.interop,
    pytest.mark.browser,
    pytest.mark.timeout(1000),
]

LAUNCHER = Path(__file__).parents[2] / "run-mitmproxy.py"
SECONDS = 60.0


class BlankPage(Handler):
    """Some page on this machine."""

    def respond(self) -> None:
        self.answer(200, b"<!doctype html><title>elsewhere</title>", {"Content-Type": "text/html"})


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
            "OPEN_ID_CONNECT_URL": keycloak.issuer(REALM),
            "OPEN_ID_CONNECT_CLIENT_ID": INTERACTIVE.client_id,
            "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE,
            "REMOTE_PROTECTED_DOMAIN": service.url,
            "REMOTE_PROTECTED_ENDPOINT": "/whoami",
            "PROXY_PORT": str(self.port),
            "PROXY_ADMIN": "off",
        }

    def runs(self, *arguments: str, browser: str = "true") -> Child:
        """Run a command; the `browser` that it opens does nothing by default."""
        log = self._folder / f"{'-'.join(arguments)}.log"
        command = [sys.executable, str(LAUNCHER), *arguments]
        return self._stack.enter_context(running(command, self._env | {"BROWSER": browser}, self._folder, log))

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


def command_lines() -> list[str]:
    """Return the command lines of all processes, as every user of the machine can see them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


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


def test_the_browser_that_opens_gets_an_address_that_tells_others_nothing(newcomer: Newcomer, tmp_path: Path) -> None:
    port = free_port()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    opener = shlex.join(["chromium", *ARGUMENTS, profile, f"--remote-debugging-port={port}"])
    login = newcomer.runs("login", "--browser", browser=f"{opener} %s")
    login.wait_until(lambda: accepts(port), SECONDS)
    with attached(port) as driver:
        wait_for(driver, "username")
        query = query_of(driver.current_url)
        lines = command_lines()
        log_in(driver)
        wait_for_text(driver, "You are logged in")
    opened = [line for line in lines if profile in line and "/login/" in line]
    assert opened
    assert not any(query[name] in line for line in lines for name in ("state", "nonce", "code_challenge"))
    assert not any(query[name] in login.output() for name in ("state", "nonce", "code_challenge"))
    assert url_in(login) not in " ".join(lines)
    assert_a_session_that_works(newcomer, login)


EMBED = """
    const [url, done] = arguments;
    const image = document.createElement('img');
    image.onload = image.onerror = () => done(1);
    image.src = url;
    document.body.append(image);
"""


def test_only_a_visit_comes_back_and_only_the_first_of_several_tabs(newcomer: Newcomer, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    login = newcomer.runs("login", "--browser", browser=f"sh -c 'echo \"$1\" > {opened}' sh %s")
    first = url_in(login)
    login.wait_until(lambda: opened.exists() and opened.read_text().endswith("\n"), SECONDS)
    with LocalServer(BlankPage) as elsewhere, chromium(tmp_path / "profile") as driver:
        driver.get(first)
        wait_for(driver, "username")
        page = driver.current_url
        query = query_of(page)
        stolen = f"{query['redirect_uri']}?{urlencode({'state': query['state'], 'code': 'of-mallory'})}"
        driver.get(elsewhere.url)
        driver.execute_async_script(EMBED, stolen)
        driver.get(first)
        wait_for_text(driver, "works only once")
        tab = driver.current_window_handle
        driver.switch_to.new_window("tab")
        driver.get(opened.read_text().strip())
        wait_for(driver, "username")
        assert query_of(driver.current_url)["state"] == query["state"]
        log_in(driver)
        wait_for_text(driver, "You are logged in")
        assert_a_session_that_works(newcomer, login)
        # The other tab is of no use any more.
        driver.switch_to.window(tab)
        with pytest.raises(WebDriverException, match="ERR_CONNECTION_REFUSED"):
            driver.get(stolen)


def test_the_answer_of_another_issuer_is_refused(newcomer: Newcomer, tmp_path: Path) -> None:
    login = newcomer.runs("login", "--browser")
    with chromium(tmp_path / "profile") as driver:
        driver.get(url_in(login))
        wait_for(driver, "username")
        query = query_of(driver.current_url)
        answer = {"state": query["state"], "code": "of-mallory", "iss": "https://evil.example"}
        driver.get(f"{query['redirect_uri']}?{urlencode(answer)}")
        wait_for_text(driver, "Login failed")
    assert login.exit_code(SECONDS) == 1, login.output()
    assert "came back from another issuer" in login.output()
    assert newcomer.does("token")[0] == 2


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
