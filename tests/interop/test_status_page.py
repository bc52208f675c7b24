"""The status page as a person sees it: in a real browser, with the real proxy behind it."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.environment import settings_for
from tests.support.processes import ProxyProcess, StartProxy
from tests.support.service import Service
from tests.support.waiting import eventually

pytest.importorskip("selenium")

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.support.browser import chromium

pytestmark = pytest.mark.browser

NAME = "<script>document.title='taken'</script>"
LIFETIME = 8


@dataclass
class Page:
    driver: Chrome
    proxy: ProxyProcess
    issuer: FakeIssuer
    admin: str

    def text(self, selector: str = "body") -> str:
        while True:
            # One that is being exchanged is found, and gone when it is read.
            with contextlib.suppress(StaleElementReferenceException):
                return str(self.driver.find_element(By.CSS_SELECTOR, selector).text)

    def shows(self, text: str, selector: str = "body") -> bool:
        # An element that is being exchanged is gone for a moment.
        return text in str(
            self.driver.execute_script("return document.querySelector(arguments[0])?.innerText", selector)
        )

    def command(self, name: str, **arguments: Any) -> None:
        self.driver.execute_cdp_cmd(name, arguments)

    def ask(self) -> int:
        return httpx.get(self.proxy.url, trust_env=False, timeout=20).status_code


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    logs = {"browser": "ALL", "performance": "ALL"}
    with chromium(tmp_path_factory.mktemp("profile"), goog__loggingPrefs=logs) as driver:
        yield driver


@pytest.fixture
def page(driver: Chrome, start: StartProxy) -> Iterator[Page]:
    behaviour = Behaviour(lifetime=LIFETIME, refresh_tokens="rotate")
    behaviour.claims |= {"preferred_username": NAME, "sub": "6f0c9a1e-2b1f-4c57-9a55-0c8f3f1b7e21"}
    with FakeIssuer(behaviour) as issuer, Service(issuer) as service:
        proxy = start("launcher", service.url, settings_for(issuer, PROXY_ADMIN="127.0.0.1:0"))
        match = proxy.wait_for(re.compile(r"admin listener at (http://\S+)"))
        assert match
        driver.get("about:blank")  # the page before looks for its proxy
        for log in ("browser", "performance"):
            driver.get_log(log)
        driver.get(match[1])
        yield Page(driver, proxy, issuer, match[1])
        proxy.stop()


def left(page: Page) -> int:
    """Return the seconds until the token expires; 0 while there is none."""
    shown = re.search(r"Expires\s.*\(in (\d+) s\)", page.text("#token"))
    return int(shown[1]) if shown else 0


def test_the_times_move_and_begin_anew_with_a_refresh(page: Page) -> None:
    first = left(page)
    eventually(lambda: left(page) < first)
    ended = threading.Event()

    def keep_asking() -> None:
        while not ended.wait(0.2):
            page.ask()

    asking = threading.Thread(target=keep_asking)
    asking.start()
    seen = [left(page)]

    def has_risen() -> bool:
        seen.append(left(page))
        return seen[-1] > seen[-2]

    try:
        eventually(has_risen, timeout=30)
        assert not page.shows("1 success", "#token")
        again = left(page)
        eventually(lambda: left(page) < again)
    finally:
        ended.set()
        asking.join()
    assert page.shows("Ready", "#state strong")
    times = page.text("#token")
    assert re.search(r"Last refresh\s.*\(\d+ s ago\)|Last refresh\s.*\(now\)", times), times
    assert re.search(r"2xx, success\s+\d", page.text("#requests"))


def test_what_was_selected_stays_selected_while_nothing_changes(page: Page) -> None:
    select = "getSelection().selectAllChildren(document.querySelector('h1')); return getSelection().toString()"
    selected = page.driver.execute_script(select)
    asked = "return performance.getEntriesByType('resource').filter((one) => one.initiatorType === 'fetch').length"
    eventually(lambda: page.driver.execute_script(asked) >= 2)
    assert NAME in selected
    assert page.driver.execute_script("return getSelection().toString()") == selected


def test_a_name_is_text_and_nothing_else_is_loaded_or_complained_about(page: Page) -> None:
    assert NAME in page.text("h1")
    assert page.driver.title == "Ready - OIDC proxy"
    asked = "return performance.getEntriesByType('resource').filter((one) => one.initiatorType === 'fetch').length"
    eventually(lambda: page.driver.execute_script(asked) >= 2)
    events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"}
    # A browser without a window shows no icon.
    assert urls - {f"{page.admin}/icon.svg"} == {f"{page.admin}/{path}" for path in ("", "status.css", "status.js")}
    assert page.driver.get_log("browser") == []


def rejected(handler: Handler) -> bool:
    handler.answer(400, {"error": "invalid_grant", "error_description": "Token is not active"})
    return True


def test_an_error_shows_its_remedy_and_goes_when_it_is_over(page: Page) -> None:
    page.issuer.behaviour.fault = rejected
    eventually(lambda: page.ask() == 502, timeout=30)
    # While the last token lived the page had the remedy already, with another state.
    eventually(lambda: page.shows("No token", "#state strong"))
    assert page.shows("run-mitmproxy.py login", "#state .problem")
    assert [box.is_displayed() for box in page.driver.find_elements(By.CLASS_NAME, "box")] == [False, True]
    assert re.search(r"Next login\s+now", page.text("#lead"))
    assert page.driver.title == "No token - OIDC proxy"
    assert "Token is not active" in page.text("#errors")
    page.issuer.behaviour.fault = None
    eventually(lambda: page.ask() == 200, timeout=30)
    eventually(lambda: page.shows("Ready", "#state") and not page.driver.find_elements(By.CLASS_NAME, "problem"))


def test_it_says_when_the_proxy_is_not_reachable_any_more(page: Page) -> None:
    assert not page.driver.find_element(By.ID, "lost").is_displayed()
    assert page.proxy.stop() == 0
    eventually(lambda: page.shows("The proxy is unreachable", "#lost"))
    assert not page.driver.find_element(By.ID, "state").is_displayed()
    assert page.driver.title == "Unreachable - OIDC proxy"


def test_the_command_to_try_can_be_copied_and_the_button_stays_in_focus(page: Page) -> None:
    copied = f"curl -i {page.proxy.url}/"
    page.driver.find_element(By.CSS_SELECTOR, ".command button").click()
    eventually(lambda: page.shows("Copied.", "#copied"))
    page.command("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == copied
    assert page.ask() == 200
    eventually(lambda: page.shows("2xx, success", "#requests"))
    assert page.driver.execute_script("return document.activeElement.textContent") == "Copy"
    page.driver.execute_script("navigator.clipboard.writeText = () => Promise.reject(new Error('not here'))")
    page.driver.find_element(By.CSS_SELECTOR, ".command button").click()
    eventually(lambda: page.shows("selected", "#copied"))
    assert page.driver.execute_script("return getSelection().toString()") == copied


def brightness(page: Page, property_name: str, selector: str) -> float:
    """Return the relative luminance (WCAG 2.2) of a colour."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    colour = re.findall(r"[\d.]+", page.driver.execute_script(script, selector, property_name))[:3]
    parts = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in _shares(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def _shares(colour: list[str]) -> list[float]:
    return [float(part) / 255 for part in colour]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_or_dark_and_readable_without_scrolling_sideways_on_a_phone(scheme: str, page: Page) -> None:
    page.issuer.behaviour.fault = rejected
    eventually(lambda: page.ask() == 502, timeout=30)
    eventually(lambda: page.shows("Remedy", ".problem"))
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.command("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
    try:
        assert page.driver.execute_script("return innerWidth") == 360
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == 360
        ground = brightness(page, "backgroundColor", "body")
        assert ground > 0.5 if scheme == "light" else ground < 0.1
        for selector, around in (
            ("h1 span", "body"),
            (".subject", "body"),
            ("#state strong", "#state"),
            (".sign", "#state"),
            (".problem p", "#state"),
            (".command code", ".command code"),
            ("button", "button"),
            ("#token dt", "#token"),
            ("#errors li p", "#errors"),
            ("footer p", "body"),
            ("footer a", "body"),
        ):
            shown = contrast(brightness(page, "color", selector), brightness(page, "backgroundColor", around))
            assert shown >= 4.5, (selector, shown)
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")


def test_without_its_script_it_is_complete(page: Page) -> None:
    page.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.driver.get(page.admin)
        assert NAME in page.text("h1")
        assert not page.driver.find_element(By.CSS_SELECTOR, ".command button").is_displayed()
        command = page.driver.find_element(By.CSS_SELECTOR, ".command code")
        assert (command.text, command.value_of_css_property("user-select")) == (f"curl -i {page.proxy.url}/", "all")
        assert re.search(r"Expires\s+\d\d:\d\d:\d\d \S+ \(in \d+ s\)", page.text("#token"))
    finally:
        page.command("Emulation.setScriptExecutionDisabled", value=False)


def test_it_has_landmarks_and_says_little_aloud(page: Page) -> None:
    def count(selector: str) -> int:
        return len(page.driver.find_elements(By.CSS_SELECTOR, selector))

    assert [count(landmark) for landmark in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    assert count("main > section") == count("main > section > h2")
    assert count("[role=status], [role=alert], [aria-live]") == 3
    assert count("[role=status] time") == 0
    assert count("button:not([aria-label]), [tabindex]") == 0
