"""What a page of another origin gets to read through the proxy, in a real browser with its real cache.

Run with `uv run --group interop pytest -m browser tests/interop/test_foreign_pages.py`.
"""

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import settings_for
from tests.support.processes import StartProxy
from tests.support.service import echo_one_message
from tests.support.waiting import eventually

pytest.importorskip("selenium")

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.support.browser import chromium

pytestmark = pytest.mark.browser

PLAIN_NAME = "earth.test"  # of which browsers tell no site, as it is neither https nor this machine
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FILES = {
    "/data.tif": ("image/tiff", b"II*\0" + bytes(100)),
    "/data.png": ("image/png", base64.b64decode(PNG)),
    "/data.js": ("text/javascript", b"window.secret = 42"),
    "/worker.js": ("text/javascript", b"self.secret = 42"),
    "/data.json": ("application/json", b'{"secret": 42}'),
    "/page": ("text/html", b"<title>the service</title>"),
}
OPEN_TO_ALL = {
    "Cache-Control": "public, max-age=600",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "X-Number-Matched",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Number-Matched": "7",
}

# Each returns what the page has got of the URL, or null.
FETCH = "fetch(url, {cache: 'force-cache'}).then((answer) => answer.text()).then(done, () => done(null))"
LOAD = """
    const element = document.createElement(%r);
    element.onload = () => done(%s);
    element.onerror = () => done(null);
    element.src = url;
    document.body.append(element);
"""
IMAGE = LOAD % ("img", "element.naturalWidth")
SCRIPT = LOAD % ("script", "window.secret")
REGISTER = "navigator.serviceWorker.register(url).then(() => done('registered'), () => done(null))"
EXPOSED = "fetch(url).then((answer) => done(answer.headers.get('X-Number-Matched')), () => done(null))"
AHEAD = """
    const rules = document.createElement('script');
    rules.type = 'speculationrules';
    const rule = {source: 'list', urls: [arguments[0]], eagerness: 'immediate'};
    rules.textContent = JSON.stringify({[arguments[1]]: [rule]});
    document.head.append(rules);
"""
SOCKET = """
    const socket = new WebSocket(url.replace('http', 'ws'));
    socket.onopen = () => socket.send('hello');
    socket.onmessage = (event) => done(event.data);
    socket.onerror = () => done(null);
"""


@dataclass
class World:
    """The proxy's port, those of two sites' pages, one of them allowed, and what reached the service."""

    driver: Chrome
    admin: str
    proxy: int
    foreign: int
    allowed: int
    seen: list[str]
    _numbers: Iterator[int] = field(default_factory=count)

    def new_url(self, path: str, host: str = "localhost") -> str:
        """Return a URL at the proxy that is in no cache yet."""
        return f"http://{host}:{self.proxy}{path}?{next(self._numbers)}"

    def visit(self, port: int, host: str = "localhost") -> None:
        self.driver.get(f"http://{host}:{port}/page")

    def run(self, script: str, url: str) -> Any:
        return self.driver.execute_async_script(f"const [url, done] = arguments; {script}", url)

    def has_reached_the_service(self, url: str) -> bool:
        return url.partition(f":{self.proxy}")[2] in self.seen

    def refusals(self, reason: str) -> int:
        """Return how many requests the proxy has refused for a reason."""
        errors = httpx.get(f"{self.admin}/status", trust_env=False).json()["recent_errors"]
        return sum(error["count"] for error in errors if reason in error["detail"])

    def by_address_bar(self, url: str) -> None:
        self.driver.get(url)
        eventually(lambda: self.has_reached_the_service(url))

    def by_window(self, url: str) -> None:
        self.visit(self.foreign)
        (page,) = self.driver.window_handles
        self.driver.execute_script("window.open(arguments[0])", url)
        eventually(lambda: len(self.driver.window_handles) == 2)
        self.driver.switch_to.window(next(one for one in self.driver.window_handles if one != page))
        eventually(lambda: self.has_reached_the_service(url))
        eventually(lambda: bool(self.driver.execute_script("return document.readyState === 'complete'")))
        self.driver.close()
        self.driver.switch_to.window(page)


def handler_of(seen: list[str]) -> type[Handler]:
    class DataHandler(Handler):
        def respond(self) -> None:
            seen.append(self.path)
            path = self.path.partition("?")[0]
            if path == "/socket":
                echo_one_message(self)
                return
            media_type, body = FILES.get(path, ("text/plain", b""))
            self.answer(200, body, {"Content-Type": media_type, **OPEN_TO_ALL})

    return DataHandler


@pytest.fixture(scope="module")
def world(start: StartProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    seen: list[str] = []
    with (
        FakeIssuer() as issuer,
        LocalServer(handler_of(seen)) as service,
        LocalServer(handler_of([])) as foreign,
        LocalServer(handler_of([])) as allowed,
        chromium(tmp_path_factory.mktemp("profile"), "--host-resolver-rules=MAP *.test 127.0.0.1") as driver,
    ):
        environment = settings_for(
            issuer,
            PROXY_ADMIN="127.0.0.1:0",
            PROXY_ALLOWED_HOSTS=f"localhost,127.0.0.1,{PLAIN_NAME}",
            PROXY_ALLOWED_ORIGINS=f"http://localhost:{allowed.port},http://app.test:{allowed.port}",
        )
        proxy = start("launcher", service.url, environment)
        admin = proxy.wait_for(re.compile(r"admin listener at (http://\S+)"))
        assert admin
        yield World(driver, admin[1], int(proxy.url.rpartition(":")[2]), foreign.port, allowed.port, seen)


DATA = ["/data.png", "/data.js", "/data.json"]


@pytest.mark.parametrize("path", [*DATA, "/data.tif"])
def test_a_page_of_another_port_reads_nothing_that_the_user_looked_at(world: World, path: str) -> None:
    url = world.new_url(path)
    world.by_address_bar(url)
    world.visit(world.foreign)
    assert world.run(FETCH, url) is None
    assert world.run(SCRIPT, url) is None
    assert world.run(IMAGE, url) is None
    assert world.run(FETCH, url) is None


@pytest.mark.parametrize("path", DATA)
def test_a_page_of_another_port_reads_nothing_that_it_opened(world: World, path: str) -> None:
    url = world.new_url(path)
    world.by_window(url)
    assert world.run(FETCH, url) is None
    assert world.run(SCRIPT, url) is None
    assert world.run(IMAGE, url) is None


@pytest.mark.parametrize("path", [*DATA, "/data.tif"])
def test_a_page_of_another_port_sends_nothing_to_the_service(world: World, path: str) -> None:
    url = world.new_url(path)
    world.visit(world.foreign)
    for script in (IMAGE, SCRIPT, FETCH):
        assert world.run(script, url) is None
    assert world.run(SOCKET, socket := world.new_url("/socket")) is None
    assert not world.has_reached_the_service(url)
    assert not world.has_reached_the_service(socket)


@pytest.mark.parametrize("path", [*DATA, "/data.tif"])
def test_a_page_of_any_site_reads_nothing_under_a_plain_name(world: World, path: str) -> None:
    for load in (IMAGE, SCRIPT):
        url = world.new_url(path, PLAIN_NAME)
        world.visit(world.foreign, "evil.test")
        assert world.run(load, url) is None
        # Nothing tells that a page of another site asks, so it is let in: but this is all that comes of it.
        assert world.has_reached_the_service(url)
        assert world.run(FETCH, url) is None
        assert world.run(load, url) is None
    world.visit(world.foreign, f"other.{PLAIN_NAME}")
    assert world.run(FETCH, world.new_url(path, PLAIN_NAME)) is None


@pytest.mark.parametrize(("page", "host"), [("localhost", "localhost"), ("app.test", PLAIN_NAME)])
def test_an_allowed_origin_reads_on_whatever_the_cache_holds_and_no_other_reads_then(
    world: World, page: str, host: str
) -> None:
    for first, data in ((None, "/data.png"), (IMAGE, "/data.png"), (FETCH, "/data.png")):
        url = world.new_url(data, host)
        if first is None:
            world.by_address_bar(url)
        world.visit(world.allowed, page)
        if first is not None:
            assert world.run(first, url)
        assert world.run(FETCH, url)
        assert world.run(IMAGE, url) == 1
        world.visit(world.foreign, page)
        assert world.run(FETCH, url) is None
        assert world.run(IMAGE, url) is None
        world.visit(world.allowed, page)
        assert world.run(IMAGE, url) == 1
    script = world.new_url("/data.js", host)
    assert world.run(SCRIPT, script) == 42
    assert world.run(EXPOSED, script) == "7"
    assert world.run(SOCKET, world.new_url("/socket", host)) == "hello"
    world.visit(world.foreign, page)
    assert world.run(SCRIPT, script) is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", PLAIN_NAME])
def test_the_services_own_pages_work_and_use_the_cache(world: World, host: str) -> None:
    world.visit(world.proxy, host)
    assert world.driver.title == "the service"
    for script, path, expected in (
        (IMAGE, "/data.png", 1),
        (SCRIPT, "/data.js", 42),
        (FETCH, "/data.json", '{"secret": 42}'),
        (SOCKET, "/socket", "hello"),
    ):
        url = world.new_url(path, host)
        assert world.run(script, url) == expected
        before = len(world.seen)
        if path != "/socket":
            assert world.run(script, url) == expected
            assert len(world.seen) == before


def follow(world: World, url: str) -> None:
    make = "const a = document.createElement('a'); a.id = a.textContent = 'to'; a.href = arguments[0];"
    world.driver.execute_script(f"{make} document.body.append(a)", url)
    world.driver.find_element(By.ID, "to").click()
    eventually(lambda: world.driver.current_url == url)


def test_a_link_on_a_page_of_another_port_leads_to_the_service(world: World) -> None:
    url = world.new_url("/page")
    world.visit(world.foreign)
    follow(world, url)
    assert world.driver.title == "the service"
    assert world.has_reached_the_service(url)


def frame(world: World, url: str) -> None:
    add = "const e = document.createElement('iframe'); e.onload = () => done(1); e.src = url; document.body.append(e)"
    assert world.run(add, url) == 1


@pytest.mark.parametrize("load", [frame, lambda world, url: world.run(LOAD % ("embed", "1"), url)])
def test_a_frame_on_a_page_of_another_port_does_not(world: World, load: Callable[[World, str], object]) -> None:
    url = world.new_url("/page")
    world.visit(world.foreign)
    load(world, url)
    assert not world.has_reached_the_service(url)
    world.visit(world.allowed)
    frame(world, url)
    assert world.has_reached_the_service(url)


@pytest.mark.parametrize("kind", ["prefetch", "prerender"])
@pytest.mark.parametrize("site", ["localhost", "evil.test"])
def test_nothing_is_loaded_ahead_of_a_visit_for_a_page_of_another_origin(world: World, site: str, kind: str) -> None:
    url, before = world.new_url("/page"), world.refusals("prefetch")
    world.visit(world.foreign, site)
    world.driver.execute_script(AHEAD, url, kind)
    eventually(lambda: world.refusals("prefetch") > before or world.has_reached_the_service(url))
    assert not world.has_reached_the_service(url)


def test_no_service_worker_stays_behind(world: World) -> None:
    world.visit(world.proxy)
    url = world.new_url("/worker.js")
    assert world.run(REGISTER, url) is None
    assert not world.has_reached_the_service(url)
    world.visit(world.foreign)
    assert world.run(REGISTER, f"http://localhost:{world.foreign}/worker.js") == "registered"
