"""A real Chromium without a window, and what a person does in it at Keycloak's pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kc_server import PASSWORD, USERNAME
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

PAGE_SECONDS = 60.0

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # it does not start as root otherwise
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=900,700",
)


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """Run Debian's Chromium with an empty profile."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(PAGE_SECONDS)
        yield driver
    finally:
        driver.quit()


def log_in(driver: Chrome) -> None:
    """Fill in Keycloak's login form."""
    wait_for(driver, "username")
    driver.find_element(By.ID, "username").send_keys(USERNAME)
    driver.find_element(By.ID, "password").send_keys(PASSWORD)
    driver.find_element(By.ID, "kc-login").click()


def grant(driver: Chrome) -> None:
    """Say yes to what the device asks for."""
    wait_for(driver, "kc-oauth")
    driver.find_element(By.NAME, "accept").click()


def wait_for(driver: Chrome, element: str) -> None:
    WebDriverWait(driver, PAGE_SECONDS).until(
        lambda driver: driver.find_elements(By.ID, element), f"no #{element} in:\n{driver.page_source}"
    )


def wait_for_text(driver: Chrome, text: str) -> str:
    """Wait until the page shows a text, and return all it shows."""
    WebDriverWait(driver, PAGE_SECONDS).until(lambda driver: text in driver.page_source, text)
    return str(driver.find_element(By.TAG_NAME, "body").text)
