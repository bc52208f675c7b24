"""Whose cookies reach whom on one machine, in a real browser: it keeps them apart by name, not by port.

Run with `uv run --group interop pytest -m browser tests/interop/test_cookies.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import settings_for
from tests.support.processes import StartProxy
from tests.support.service import echo_one_message

pytest.importorskip("selenium")

from selenium.webdriver import Chrome

from tests.support.browser import chromium

pytestmark = pytest.mark.browser

SOCKET = """
    const done = arguments[0];
    const socket = new WebSocket(`ws://${location.host}/socket`);
    socket.onopen = () => socket.send('hello');
    socket.onmessage = (event) => done(event.data);
    socket.onerror = () => done(null);
"""


@dataclass
class Program:
    """A program on this machine that sets a cookie, and the names of those that reached it last."""

    name: str
    cookies: set[str] = field(default_factory=set)

    def server(self) -> LocalServer:
        program = self

        class ProgramHandler(Handler):
            def respond(self) -> None:
                if self.path == "/favicon.ico":
                    self.answer(404, b"")
                    return
                program.cookies = set(SimpleCookie(self.headers.get("Cookie")))
                cookie = f"{program.name}{self.path.strip('/')}=1; Path=/; HttpOnly"
                if self.path == "/socket":
                    echo_one_message(self, [(b"Set-Cookie", cookie.encode())])
                else:
                    self.answer(200, b"<!doctype html>", {"Content-Type": "text/html", "Set-Cookie": cookie})

        return LocalServer(ProgramHandler)


@dataclass(frozen=True)
class Machine:
    """Two programs on one machine, one of which is a protected service behind the proxy."""

    driver: Chrome
    service: Program
    other: Program
    proxy_url: str
    browser_url: str
    other_url: str

    def opens(self, program: Program, url: str) -> set[str]:
        """Open a page; return the names of the cookies that it was asked for with."""
        self.driver.get(url)
        return program.cookies


@pytest.fixture
def machine(request: pytest.FixtureRequest, start: StartProxy, tmp_path: Path) -> Iterator[Machine]:
    service, other = Program("ours"), Program("theirs")
    with (
        FakeIssuer() as issuer,
        service.server() as protected,
        other.server() as server,
        chromium(tmp_path / "profile") as driver,
    ):
        environment = settings_for(issuer, PROXY_ADMIN="127.0.0.1:0", PROXY_COOKIES=request.param)
        proxy = start("launcher", protected.url, environment)
        admin = proxy.wait_for(re.compile(r"admin listener at (http://\S+)"))
        assert admin
        browser_url = httpx.get(f"{admin[1]}/status", trust_env=False).json()["browser_address"]
        shared = proxy.url.replace("127.0.0.1", "localhost")
        yield Machine(driver, service, other, shared, browser_url, f"http://localhost:{server.port}")


@pytest.mark.parametrize("machine", ["pass"], indirect=True)
def test_under_one_name_programs_get_each_others_cookies(machine: Machine) -> None:
    machine.opens(machine.other, machine.other_url)
    assert machine.opens(machine.service, machine.proxy_url) == {"theirs"}
    assert machine.driver.execute_async_script(SOCKET) == "hello"
    assert machine.opens(machine.other, machine.other_url) == {"theirs", "ours", "ourssocket"}


@pytest.mark.parametrize("machine", ["pass"], indirect=True)
def test_under_a_name_of_its_own_the_proxy_has_its_own_cookies(machine: Machine) -> None:
    assert re.fullmatch(r"http://service\.localhost:\d+", machine.browser_url)
    machine.opens(machine.other, machine.other_url)
    assert machine.opens(machine.service, machine.browser_url) == set()
    assert machine.driver.execute_async_script(SOCKET) == "hello"
    assert machine.service.cookies == {"ours"}
    assert machine.opens(machine.service, machine.browser_url) == {"ours", "ourssocket"}
    assert machine.opens(machine.other, machine.other_url) == {"theirs"}


@pytest.mark.parametrize("machine", ["drop"], indirect=True)
def test_dropped_cookies_reach_nobody_even_under_one_name(machine: Machine) -> None:
    machine.opens(machine.other, machine.other_url)
    assert machine.opens(machine.service, machine.proxy_url) == set()
    assert machine.driver.execute_async_script(SOCKET) == "hello"
    assert machine.service.cookies == set()
    assert machine.opens(machine.other, machine.other_url) == {"theirs"}
