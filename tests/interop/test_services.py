"""Several services behind one login, through the launcher, with real issuers and services of one audience each."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from eoepca_security import OIDCProxyScheme
from eoepca_security.testing import FakeIssuer
from tests.interop import issuer_oidc_provider
from tests.interop.issuer import AUDIENCE, Issuer
from tests.interop.issuer_oidc_provider import OTHER_AUDIENCE
from tests.interop.issuer_user import User
from tests.interop.kc_audiences import EXCHANGING, NARROWING, OPENEO, S3, SERVICES, STAC
from tests.interop.kc_process import Child
from tests.interop.kc_server import PASSWORD, ROTATING_REALM, USERNAME, Client, Keycloak
from tests.interop.kc_service import serving
from tests.support.fastapi import make_app

pytest.importorskip("stac_fastapi.api")

from stac_fastapi.api.middleware import ProxyHeaderMiddleware

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1000)]

REALM = ROTATING_REALM  # where the second use of a refresh token ends the session
LIFETIME = 4
LIFETIMES = 10


@pytest.fixture(scope="module")
def short_tokens(services: Keycloak) -> Iterator[None]:
    for lifetime in (LIFETIME, None):
        for client in (EXCHANGING, NARROWING):
            (found,) = services.admin("GET", f"{REALM}/clients?clientId={client.client_id}")
            attributes = {**found["attributes"], "access.token.lifespan": "" if lifetime is None else str(lifetime)}
            services.admin("PUT", f"{REALM}/clients/{found['id']}", {**found, "attributes": attributes})
        if lifetime is not None:
            yield


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def openeo(app: ASGIApp) -> ASGIApp:
    """Take `Bearer oidc/PROVIDER/TOKEN`, as the API of openEO has it, and nothing else."""

    async def take(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        given = dict(scope["headers"]).get(b"authorization", b"")
        if given.startswith(b"Bearer oidc/eoepca/"):
            headers.append((b"authorization", b"Bearer " + given.removeprefix(b"Bearer oidc/eoepca/")))
        await app({**scope, "headers": headers}, receive, send)

    return take


def serve_all(stack: ExitStack, issuer: str, audiences: Mapping[str, str]) -> dict[str, str]:
    """Run a service for each audience; return the URLs by the names that they have at the proxy."""
    urls = {}
    for name, audience in audiences.items():
        app: ASGIApp = make_app(OIDCProxyScheme(openIdConnectUrl=issuer, audience=audience))
        urls[name] = stack.enter_context(serving(openeo(app) if name == "openeo" else app))
    return urls


def user_with(
    stack: ExitStack, folder: Path, text: str, issuer: str, client: Client, refresh_token: str | None, **more: str
) -> User:
    (folder / "services.toml").write_text(text)
    settings = {
        "OPEN_ID_CONNECT_URL": issuer,
        "OPEN_ID_CONNECT_CLIENT_ID": client.client_id,
        "PROXY_SERVICES": str(folder / "services.toml"),
        "REMOTE_PROTECTED_ENDPOINT": "/",
        **({"OPEN_ID_CONNECT_CLIENT_SECRET": client.secret} if client.secret is not None else {}),
        **({"OPEN_ID_REFRESH_TOKEN": refresh_token} if refresh_token is not None else {}),
        **more,
    }
    return User(folder, settings, stack)


def log_in(keycloak: Keycloak, client: Client, scope: str) -> str:
    form = {**client.form(), "grant_type": "password", "username": USERNAME, "password": PASSWORD, "scope": scope}
    url = f"{keycloak.issuer(REALM)}/protocol/openid-connect/token"
    return str(httpx.post(url, data=form, trust_env=False, timeout=10).raise_for_status().json()["refresh_token"])


def asks(user: User, name: str, path: str = "/") -> httpx.Response:
    headers = {"Host": f"{name}.localhost:{user.port}"}
    return httpx.get(f"http://127.0.0.1:{user.port}{path}", headers=headers, trust_env=False, timeout=20)


def all_is_well(user: User) -> None:
    """Have `check` go through all services."""
    wrong = {name: step for name, step in user.checks().items() if step["status"] not in ("ok", "skipped")}
    assert wrong == {}


def serve_for(user: User, seconds: float, names: tuple[str, ...], proxy: Child) -> None:
    """Have each service asked all the time, from three sides; every answer must be 200."""
    until = time.monotonic() + seconds

    def ask(name: str) -> int:
        count = 0
        with httpx.Client(trust_env=False, timeout=20) as client:
            while time.monotonic() < until:
                answer = client.get(f"http://127.0.0.1:{user.port}/", headers={"Host": f"{name}.localhost"})
                assert answer.status_code == 200, f"{name}: {answer.text}\n{proxy.output()}"
                count += 1
        return count

    with ThreadPoolExecutor(3 * len(names)) as threads:
        counts = list(threads.map(ask, names * 3))
    assert min(counts) > seconds


EXCHANGE = """
[service.stac]
url = "{stac}"
token = "exchange"
audience = "stac-api"
scope = "stac-api"

[service.openeo]
url = "{openeo}"
token = "exchange"
audience = "openeo-api"
format = "Bearer oidc/eoepca/{{token}}"

[service.s3]
url = "{s3}"
token = "exchange"
audience = "s3-api"
"""

NARROW = """
[service.stac]
url = "{stac}"
token = "scope"
scope = "stac-api"
audience = "stac-api"

[service.openeo]
url = "{openeo}"
token = "scope"
scope = "openeo-api"
audience = "openeo-api"
format = "Bearer oidc/eoepca/{{token}}"
"""


@pytest.mark.usefixtures("short_tokens")
def test_three_services_get_what_keycloak_exchanges_for_each(
    services: Keycloak, stack: ExitStack, tmp_path: Path
) -> None:
    issuer, names = services.issuer(REALM), ("stac", "openeo", "s3")
    urls = serve_all(stack, issuer, dict(zip(names, SERVICES, strict=True)))
    refresh_token = log_in(services, EXCHANGING, "openid")
    user = user_with(stack, tmp_path, EXCHANGE.format(**urls), issuer, EXCHANGING, refresh_token)
    proxy = user.serves()
    for name, audience in zip(names, (STAC, OPENEO, S3), strict=True):
        answer = asks(user, name)
        assert answer.status_code == 200, answer.text + proxy.output()
        assert answer.json()["claims"]["aud"] == audience
    serve_for(user, 3 * LIFETIME, names, proxy)
    all_is_well(user)


@pytest.mark.usefixtures("short_tokens")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_public_client_narrows_for_each_service_for_ten_lifetimes(
    services: Keycloak, stack: ExitStack, tmp_path: Path, workers: str
) -> None:
    issuer, names = services.issuer(REALM), ("stac", "openeo")
    urls = serve_all(stack, issuer, dict(zip(names, SERVICES, strict=False)))
    refresh_token = log_in(services, NARROWING, f"openid offline_access {STAC} {OPENEO}")
    user = user_with(stack, tmp_path, NARROW.format(**urls), issuer, NARROWING, refresh_token, PROXY_WORKERS=workers)
    proxy = user.serves()
    serve_for(user, LIFETIMES * LIFETIME, names, proxy)
    assert "rejected" not in proxy.output()
    # Reuse would have ended the session.
    all_is_well(user)
    for arguments in ((), ("--service", "stac")):
        code, output, errors = user.does("token", *arguments)
        assert (code, output.count("\n")) == (0, 1), errors


def test_oidc_provider_gives_each_resource_its_own(stack: ExitStack, tmp_path: Path, node: Issuer) -> None:
    names = {"stac": AUDIENCE, "data": OTHER_AUDIENCE}
    urls = serve_all(stack, node.url, names)
    text = "".join(
        f'[service.{name}]\nurl = "{urls[name]}"\ntoken = "resource"\nresource = "{names[name]}"\n' for name in names
    )
    client = Client(node.settings["OPEN_ID_CONNECT_CLIENT_ID"])
    user = user_with(stack, tmp_path, text, node.url, client, None)
    assert "Logged in as " in user.logs_in(node.person, *node.device_options)
    all_is_well(user)
    proxy = user.serves()
    for name, audience in names.items():
        answer = asks(user, name)
        assert answer.status_code == 200, answer.text + proxy.output()
        assert answer.json()["claims"]["aud"] == audience
    serve_for(user, 2 * node.lifetime, tuple(names), proxy)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with issuer_oidc_provider.jwt_and_public(tmp_path_factory.mktemp("node")) as issuer:
        yield issuer


def test_links_in_bodies_lead_back_to_the_proxy(stack: ExitStack, tmp_path: Path) -> None:
    issuer = stack.enter_context(FakeIssuer())
    app = FastAPI()

    @app.get("/")
    def root(request: Request) -> dict[str, str]:
        return {"self": str(request.url), "items": str(request.url_for("items"))}

    @app.get("/items")
    def items(request: Request) -> dict[str, str]:
        return {"root": str(request.url_for("root"))}

    # uvicorn takes the scheme from what proxies say, and stac-fastapi the host.
    app.add_middleware(ProxyHeaderMiddleware)
    url = stack.enter_context(serving(ProxyHeadersMiddleware(app, trusted_hosts="127.0.0.1")))  # type: ignore[arg-type]
    text = f'[service.stac]\nurl = "{url}"\nforwarded = true\n'
    client = Client(issuer.client_id)
    user = user_with(stack, tmp_path, text, issuer.url, client, issuer.refresh_token)
    user.serves()
    own = f"http://stac.localhost:{user.port}"
    assert asks(user, "stac").json() == {"self": f"{own}/", "items": f"{own}/items"}
    assert asks(user, "stac", "/items").json() == {"root": f"{own}/"}
