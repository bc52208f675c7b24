"""The page /docs of a FastAPI service, as docs/fastapi.md sets it up: a person logs in there, in a real Chromium.

Run with `uv run --group interop pytest -m browser -n 0 tests/interop/test_keycloak_swagger_ui.py`; needs Java, Maven,
npm, and Debian's chromium and chromium-driver.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.interop.kc_server import AUDIENCE, REALM, USERNAME, Keycloak
from tests.interop.kc_service import serving
from tests.support.processes import ROOT

pytest.importorskip("selenium")

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.interop.kc_browser import log_in
from tests.support.browser import PAGE_SECONDS, chromium

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.browser, pytest.mark.timeout(1000)]

SWAGGER_UI = "swagger-ui-dist@5.35.0"
CDN = b"https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/"


def with_own_swagger_ui(app: ASGIApp, folder: Path) -> ASGIApp:
    """Return the application with Swagger UI's files from a folder; the page loads them from a CDN otherwise."""
    files = StaticFiles(directory=folder)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_changed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [field for field in message["headers"] if field[0] != b"content-length"]
            elif "body" in message:
                message["body"] = message["body"].replace(CDN, b"/swagger-ui/")
            await send(message)

        if scope["path"].startswith("/swagger-ui/"):
            await files(dict(scope, path=scope["path"].removeprefix("/swagger-ui")), receive, send)
        else:
            await app(scope, receive, send_changed if scope["path"] == "/docs" else send)

    return call


def app_of_the_page(keycloak: Keycloak) -> Any:
    page = (ROOT / "docs" / "fastapi.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?swagger_ui_init_oauth.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("https://keycloak.example/realms/eoepca", keycloak.issuer(REALM))
    namespace: dict[str, Any] = {}
    exec(code.replace('audience="my-service"', f'audience="{AUDIENCE}"'), namespace)
    return namespace["app"]


def client_of_the_page(url: str) -> dict[str, Any]:
    return {
        "clientId": "my-service-docs",
        "publicClient": True,
        "standardFlowEnabled": True,
        "implicitFlowEnabled": False,
        "directAccessGrantsEnabled": False,
        "redirectUris": [f"{url}/docs/oauth2-redirect"],
        "webOrigins": [url],
        "attributes": {"pkce.code.challenge.method": "S256"},
        "protocolMappers": [
            {
                "name": "audience",
                "protocol": "openid-connect",
                "protocolMapper": "oidc-audience-mapper",
                "config": {"included.custom.audience": AUDIENCE, "access.token.claim": "true"},
            }
        ],
    }


def find(driver: Chrome, css: str, text: str = "") -> WebElement:
    """Wait for a visible element with this text."""

    def found(driver: Any) -> Any:
        elements = driver.find_elements(By.CSS_SELECTOR, css)
        return next((each for each in elements if each.is_displayed() and text in each.text), None)

    element = WebDriverWait(driver, PAGE_SECONDS).until(found, f"no {css} with {text!r}")
    assert isinstance(element, WebElement)
    return element


def test_a_person_logs_in_on_the_page_and_calls_the_service(keycloak: Keycloak, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    assert npm is not None, "npm is needed to download Swagger UI"
    install = [npm, "install", "--ignore-scripts", "--no-save", "--no-audit", "--no-fund", SWAGGER_UI]
    subprocess.run(install, cwd=tmp_path, check=True, timeout=180, capture_output=True)
    app = with_own_swagger_ui(app_of_the_page(keycloak), tmp_path / "node_modules" / "swagger-ui-dist")
    with serving(app) as url, chromium(tmp_path / "profile") as driver:
        keycloak.admin("POST", f"{REALM}/clients", client_of_the_page(url))
        driver.get(f"{url}/docs")
        find(driver, ".opblock-summary-control", "/me").click()
        find(driver, ".try-out__btn").click()
        find(driver, ".execute").click()
        find(driver, ".live-responses-table .response-col_status", "401")

        find(driver, ".auth-wrapper .authorize").click()
        flow = find(driver, ".auth-container", "OIDCProxyScheme (OAuth2, authorization_code with PKCE)")
        page = driver.current_window_handle
        flow.find_element(By.CSS_SELECTOR, ".authorize").click()
        WebDriverWait(driver, PAGE_SECONDS).until(lambda driver: len(driver.window_handles) == 2)
        driver.switch_to.window(next(handle for handle in driver.window_handles if handle != page))
        log_in(driver)
        WebDriverWait(driver, PAGE_SECONDS).until(lambda driver: len(driver.window_handles) == 1)
        driver.switch_to.window(page)
        find(driver, ".auth-container", "Authorized")
        find(driver, ".close-modal").click()

        find(driver, ".execute").click()
        find(driver, ".live-responses-table .response-col_status", "200")
        find(driver, ".live-responses-table tbody .response-col_description", USERNAME)
