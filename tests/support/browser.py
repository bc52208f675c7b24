"""A real Chromium without a window."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

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
def chromium(profile: Path, *arguments: str, **capabilities: object) -> Iterator[Chrome]:
    """Run Debian's Chromium with an empty profile, and with these arguments besides the usual ones."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (*ARGUMENTS, *arguments, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    for name, value in capabilities.items():
        options.set_capability(name.replace("__", ":"), value)
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(PAGE_SECONDS)
        yield driver
    finally:
        driver.quit()


@contextmanager
def attached(port: int) -> Iterator[Chrome]:
    """Drive a Chromium that something else has started with `--remote-debugging-port`, and that it ends."""
    options = ChromeOptions()
    options.debugger_address = f"127.0.0.1:{port}"
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(PAGE_SECONDS)
        yield driver
    finally:
        driver.quit()
