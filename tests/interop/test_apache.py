"""The scheme behind a real gateway: Debian's Apache with mod_auth_openidc, and logins at Keycloak.

Run with `pytest -m interop tests/interop/test_apache.py`; needs Java, Maven, and Debian's libapache2-mod-auth-openidc.
"""

import html
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, Request, build_opener

import fastapi
import httpx
import pytest
from fastapi import Depends, FastAPI

from eoepca_security import OIDCProxyScheme
from tests.interop.gw_apache import running_apache
from tests.interop.kc_process import accepts, running
from tests.interop.kc_server import AUDIENCE, CONFIDENTIAL, GATEWAY, PASSWORD, REALM, USERNAME, Keycloak
from tests.interop.kc_service import serving
from tests.support.network import free_port

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1000)]

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "gateways"
SECONDS = 30.0

FORGED = dict.fromkeys(("OIDC_access_token", "OIDC_id_token", "OIDC-Access-Token", "OIDC_CLAIM_sub"), "forged")


def fixture(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    return found


@pytest.fixture
def gateway(request: pytest.FixtureRequest, keycloak: Keycloak, tmp_path: Path) -> Iterator[str]:
    """Apache with the settings of a golden fixture, before a service with its arguments."""
    case = fixture(request.param)
    scheme = OIDCProxyScheme(openIdConnectUrl=keycloak.issuer(REALM), audience=AUDIENCE, **case["scheme"])
    app = FastAPI()

    @app.get("/{path:path}")
    async def who(request: fastapi.Request, found: Annotated[dict[str, Any], Depends(scheme)]) -> dict[str, Any]:
        return {**found, "headers": dict(request.headers)}

    tmp_path.chmod(0o755)
    with (
        serving(app) as service,
        running_apache(tmp_path, keycloak.issuer(REALM), service, case["settings"]) as url,
    ):
        yield url


class Browser:
    """Follows redirects and keeps cookies; as browsers do, it takes loopback for a secure connection."""

    def __init__(self) -> None:
        cookies = CookieJar(DefaultCookiePolicy(secure_protocols=("http", "https")))
        self._opener = build_opener(ProxyHandler({}), HTTPCookieProcessor(cookies))

    def get(self, url: str, headers: Mapping[str, str] | None = None, data: bytes | None = None) -> tuple[int, str]:
        """Return the status and the body."""
        try:
            answer = self._opener.open(Request(url, data, {"Accept": "text/html", **(headers or {})}), timeout=SECONDS)
        except HTTPError as error:
            answer = error
        with answer:
            return answer.status, answer.read().decode()

    def log_in(self, url: str) -> tuple[int, str]:
        """Go where the gateway sends us, fill in Keycloak's form, and come back."""
        _, page = self.get(url)
        form = re.search(r'<form[^>]* action="([^"]+)"', page)
        assert form is not None, page
        filled_in = urlencode({"username": USERNAME, "password": PASSWORD}).encode()
        return self.get(html.unescape(form[1]), data=filled_in)


def assert_as_recorded(name: str, found: dict[str, Any]) -> None:
    """What came is what the golden file says, and the scheme found in it what it should."""
    case, came = fixture(name), found["headers"]
    assert (found["claims"]["preferred_username"], found["claims"]["aud"][0]) == (USERNAME, AUDIENCE)
    assert (found["id_token"] is not None) == case["id_token"]
    assert not set(FORGED.values()) & set(came.values())
    filled_in = {
        "{access_token}": found["access_token"],
        "Bearer {access_token}": f"Bearer {found['access_token']}",
        "{refresh_token}": found["refresh_token"],
        "alice": USERNAME,
        "u-1": found["claims"]["sub"],
    }
    for header, template in case["headers"].items():
        assert came.get(header.lower()) == filled_in.get(template, came[header.lower()]), header


@pytest.mark.parametrize("gateway", ["mod_auth_openidc"], indirect=True)
def test_a_login(gateway: str) -> None:
    browser = Browser()
    for status, body in (browser.log_in(f"{gateway}/catalogue"), browser.get(f"{gateway}/catalogue", FORGED)):
        assert status == 200, body
        found = json.loads(body)
        assert_as_recorded("mod_auth_openidc", found)
        assert (found["claims"]["azp"], found["id_token"]["aud"]) == (GATEWAY.client_id, GATEWAY.client_id)
        assert found["headers"]["oidc_id_token"].count(".") == 2


@pytest.mark.parametrize("gateway", ["mod_auth_openidc-bearer"], indirect=True)
def test_a_tool_that_cannot_log_in_and_a_browser_that_can(gateway: str, keycloak: Keycloak, tmp_path: Path) -> None:
    status, body = Browser().get(f"{gateway}/catalogue", {"Accept": "application/json"})
    assert status == 401, body
    status, body = Browser().log_in(f"{gateway}/catalogue")
    assert status == 200, body
    assert json.loads(body)["claims"]["azp"] == GATEWAY.client_id

    with running_proxy(tmp_path, keycloak, gateway) as proxy:
        answer = httpx.get(f"{proxy}/catalogue", headers=FORGED, trust_env=False, timeout=SECONDS)

    assert answer.status_code == 200, answer.text
    assert_as_recorded("mod_auth_openidc-bearer", answer.json())
    assert answer.json()["claims"]["azp"] == CONFIDENTIAL.client_id


@contextmanager
def running_proxy(folder: Path, keycloak: Keycloak, upstream: str) -> Iterator[str]:
    port = free_port()
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONUNBUFFERED": "1",
        "OPEN_ID_CONNECT_URL": keycloak.issuer(REALM),
        "OPEN_ID_CONNECT_CLIENT_ID": CONFIDENTIAL.client_id,
        "OPEN_ID_CONNECT_CLIENT_SECRET": str(CONFIDENTIAL.secret),
        "OPEN_ID_REFRESH_TOKEN": keycloak.login(REALM, CONFIDENTIAL).refresh_token,
        "OPEN_ID_TOKEN_STORE": "none",
        "REMOTE_PROTECTED_DOMAIN": upstream,
        "PROXY_PORT": str(port),
        "PROXY_ADMIN": "off",
    }
    with running([sys.executable, str(ROOT / "run-mitmproxy.py")], env, folder, folder / "proxy.log") as child:
        child.wait_until(lambda: accepts(port), SECONDS)
        yield f"http://127.0.0.1:{port}"
