"""The launcher against a real Keycloak, before a service that verifies tokens on its own.

Run with `pytest -m interop tests/interop`; needs Java and Maven, takes about four minutes.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import jwt
import pytest
from fastapi import Depends, FastAPI, Security

from eoepca_security import OIDCProxyScheme, require_roles
from tests.interop.kc_process import Child, accepts, running
from tests.interop.kc_server import (
    AUDIENCE,
    CONFIDENTIAL,
    INNER_REALM,
    OUTER_ISSUER,
    PUBLIC,
    REALM,
    ROTATING_REALM,
    USERNAME,
    Client,
    Keycloak,
    Tokens,
)
from tests.interop.kc_service import Seen, Service, running_service
from tests.support.fastapi import bearer, make_app
from tests.support.fastapi import get as get_from
from tests.support.network import free_port

# The first test waits for the download and the start of Keycloak too; each wait inside has a deadline of its own.
pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1000)]

LAUNCHER = Path(__file__).parents[2] / "run-mitmproxy.py"
WATCH_SECONDS = 135.0  # more than two lifetimes of an access token
PACE_SECONDS = 1.0
LISTEN_SECONDS = 30.0
EXIT_SECONDS = 30.0
ANSWER_SECONDS = 20.0  # the proxy itself gives up after 15


@dataclass(frozen=True)
class Answer:
    """What a caller got from the proxy; status 0 when it got nothing."""

    status: int
    text: str
    username: str | None = None
    jti: str | None = None


@dataclass(frozen=True)
class Watch:
    """A session watched for longer than its access tokens live."""

    login: Tokens
    answers: list[Answer]
    seen: list[Seen]
    output: str


@dataclass(frozen=True)
class Proxy:
    """A launcher that serves."""

    url: str
    child: Child


@dataclass(frozen=True)
class Launch:
    """The settings one run of the launcher gets, and the folder it runs in."""

    folder: Path
    issuer: str
    client: Client
    upstream: str
    refresh_token: str | None = None
    grant: str = "refresh_token"

    def env(self, port: int) -> dict[str, str]:
        """The whole environment: nothing of the caller's settings may reach the launcher."""
        settings = {
            "OPEN_ID_CONNECT_URL": self.issuer,
            "OPEN_ID_CONNECT_CLIENT_ID": self.client.client_id,
            "OPEN_ID_CONNECT_CLIENT_SECRET": self.client.secret,
            "OPEN_ID_CONNECT_GRANT": self.grant,
            "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE,
            "OPEN_ID_REFRESH_TOKEN": self.refresh_token,
            "OPEN_ID_TOKEN_STORE": "none",
            "REMOTE_PROTECTED_DOMAIN": self.upstream,
            "PROXY_PORT": str(port),
            "PROXY_ADMIN": "off",
        }
        given = {name: value for name, value in settings.items() if value is not None}
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONUNBUFFERED": "1", **given}

    def start(self, port: int) -> AbstractContextManager[Child]:
        """Run `serve`, which is the default verb."""
        log = self.folder / f"launcher-{port}.log"
        return running([sys.executable, str(LAUNCHER)], self.env(port), self.folder, log)

    def exit(self) -> tuple[int, str]:
        """Exit code and output of a `serve` that is expected to give up."""
        with self.start(free_port()) as child:
            return child.exit_code(EXIT_SECONDS), child.output()

    def serve(self, stack: ExitStack) -> Proxy:
        """Start `serve`, wait for its listener, and leave it running until `stack` closes."""
        port = free_port()
        child = stack.enter_context(self.start(port))
        child.wait_until(lambda: accepts(port), LISTEN_SECONDS)
        return Proxy(f"http://127.0.0.1:{port}", child)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def watches(keycloak: Keycloak, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Watch]:
    """Two sessions watched side by side, because watching takes minutes: a request to each, every second."""
    sessions = {"confidential": (REALM, CONFIDENTIAL), "rotating": (ROTATING_REALM, PUBLIC)}
    logins: dict[str, Tokens] = {}
    services: dict[str, Service] = {}
    proxies: dict[str, Proxy] = {}
    answers: dict[str, list[Answer]] = {name: [] for name in sessions}
    with ExitStack() as stack:
        for name, (realm, client) in sessions.items():
            issuer = keycloak.issuer(realm)
            folder = tmp_path_factory.mktemp("launcher")
            services[name] = stack.enter_context(running_service(issuer, AUDIENCE))
            logins[name] = keycloak.login(realm, client)
            launch = Launch(folder, issuer, client, services[name].url, logins[name].refresh_token)
            proxies[name] = launch.serve(stack)
        caller = stack.enter_context(httpx.Client(trust_env=False, timeout=ANSWER_SECONDS))
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            for name, proxy in proxies.items():
                answers[name].append(whoami(caller, proxy.url))
            time.sleep(PACE_SECONDS)
    return {
        name: Watch(logins[name], answers[name], services[name].seen, proxies[name].child.output()) for name in sessions
    }


def whoami(caller: httpx.Client, url: str) -> Answer:
    try:
        response = caller.get(f"{url}/whoami")
    except httpx.HTTPError as error:
        return Answer(0, repr(error))
    if response.status_code != 200:
        return Answer(response.status_code, response.text)
    body = response.json()
    return Answer(200, response.text, body["username"], body["jti"])


def get(url: str, token: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(f"{url}/whoami", headers=headers, trust_env=False, timeout=ANSWER_SECONDS)


def assert_tells_no_secret(output: str, *secrets: str | None) -> None:
    leaked = [secret for secret in secrets if secret and secret in output]
    assert not leaked, output
    assert "eyJ" not in output, output  # how every JWT begins


# What the tests below take for granted of the realms and the service


@pytest.mark.parametrize("client", [CONFIDENTIAL, PUBLIC], ids=lambda client: client.client_id)
def test_refresh_token_may_be_used_again_without_rotation(keycloak: Keycloak, client: Client) -> None:
    login = keycloak.login(REALM, client)
    answers = [keycloak.refresh(REALM, client, login.refresh_token) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.json()["expires_in"] for answer in answers] == [pytest.approx(60, abs=2)] * 2


def test_refresh_token_may_be_used_once_with_rotation(keycloak: Keycloak) -> None:
    login = keycloak.login(ROTATING_REALM, PUBLIC)
    answers = [keycloak.refresh(ROTATING_REALM, PUBLIC, login.refresh_token) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert answers[1].json()["error"] == "invalid_grant"


def test_service_accepts_its_own_realm_only(keycloak: Keycloak, service: Service) -> None:
    accepted = get(service.url, keycloak.login(REALM, PUBLIC).access_token)
    assert (accepted.status_code, accepted.json()["username"]) == (200, USERNAME)
    assert get(service.url, keycloak.login(ROTATING_REALM, PUBLIC).access_token).status_code == 401
    assert get(service.url).status_code == 401
    assert len(service.faults()) == 2


# The scheme


async def test_scheme_tells_the_kinds_of_tokens_apart(keycloak: Keycloak) -> None:
    login = keycloak.login(REALM, PUBLIC)
    issuer_url = keycloak.issuer(REALM)
    app = make_app(
        OIDCProxyScheme(
            openIdConnectUrl=issuer_url,
            audience=AUDIENCE,
            authorized_parties=[PUBLIC.client_id],
            require_id_token=True,
            require_refresh_token=True,
        )
    )
    headers = {"X-ID-Token": login.id_token, "X-Refresh-Token": login.refresh_token}

    found = (await get_from(app, {**bearer(login.access_token), **headers})).json()

    assert (found["claims"]["preferred_username"], found["claims"]["azp"]) == (USERNAME, PUBLIC.client_id)
    assert found["id_token"]["aud"] == PUBLIC.client_id
    for audience in (AUDIENCE, PUBLIC.client_id, "account", issuer_url):
        other = make_app(OIDCProxyScheme(openIdConnectUrl=issuer_url, audience=audience))
        for token in (login.id_token, login.refresh_token):
            assert (await get_from(other, bearer(token))).status_code == 401
    for stranger in (keycloak.login(ROTATING_REALM, PUBLIC), keycloak.login(REALM, CONFIDENTIAL)):
        assert (await get_from(app, {**bearer(stranger.access_token), **headers})).status_code == 401


async def test_scheme_reads_scopes_and_roles(keycloak: Keycloak) -> None:
    scheme = OIDCProxyScheme(openIdConnectUrl=keycloak.issuer(REALM), audience=AUDIENCE)
    app, headers = FastAPI(), bearer(keycloak.login(REALM, PUBLIC).access_token)
    for path, dependency in {
        "/profile": Security(scheme, scopes=["openid", "profile"]),
        "/unknown-scope": Security(scheme, scopes=["nobody-has-this"]),
        "/realm": Depends(require_roles(scheme, "offline_access")),
        "/account": Depends(require_roles(scheme, "view-profile", client="account")),
        "/admin": Depends(require_roles(scheme, "admin")),
    }.items():
        app.get(path, dependencies=[dependency])(lambda: None)

    statuses = {route: (await get_from(app, headers, route)).status_code for route in app.openapi()["paths"]}

    assert statuses == {"/profile": 200, "/unknown-scope": 403, "/realm": 200, "/account": 200, "/admin": 403}


# The launcher


def test_client_credentials_grant(keycloak: Keycloak, service: Service, stack: ExitStack, tmp_path: Path) -> None:
    launch = Launch(tmp_path, keycloak.issuer(REALM), CONFIDENTIAL, service.url, grant="client_credentials")
    proxy = launch.serve(stack)
    response = get(proxy.url)
    assert response.status_code == 200, f"{response.text}\n{proxy.child.output()}"
    assert response.json()["azp"] == CONFIDENTIAL.client_id
    assert_tells_no_secret(proxy.child.output(), CONFIDENTIAL.secret)


def test_an_issuer_at_an_inner_address_is_known_by_its_outer_name(keycloak: Keycloak, tmp_path: Path) -> None:
    login = keycloak.login(INNER_REALM, CONFIDENTIAL)
    inner = Launch(tmp_path, keycloak.issuer(INNER_REALM), CONFIDENTIAL, "http://127.0.0.1:9", login.refresh_token)

    def token(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, LAUNCHER, "token"],
            env=inner.env(free_port()) | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=EXIT_SECONDS,
            check=False,
        )

    unnamed = token()
    assert unnamed.returncode == 1
    assert f"names another issuer, {OUTER_ISSUER}" in unnamed.stderr
    assert "OPEN_ID_CONNECT_ISSUER" in unnamed.stderr

    # The audience is set, so the token's issuer is verified too.
    named = token(OPEN_ID_CONNECT_ISSUER=OUTER_ISSUER)
    assert named.returncode == 0, named.stderr
    claims = jwt.decode(named.stdout.strip(), options={"verify_signature": False})
    assert claims["iss"] == OUTER_ISSUER


def test_token_prints_one_token(keycloak: Keycloak, service: Service, tmp_path: Path) -> None:
    login = keycloak.login(REALM, CONFIDENTIAL)
    launch = Launch(tmp_path, keycloak.issuer(REALM), CONFIDENTIAL, service.url, login.refresh_token)
    try:
        done = subprocess.run(
            [sys.executable, LAUNCHER, "token"],
            env=launch.env(free_port()),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=EXIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{error}\n{error.stdout!r}\n{error.stderr!r}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert done.stdout.count(".") == 2, done.stdout + done.stderr
    response = get(service.url, done.stdout.strip())
    assert (response.status_code, response.json().get("username")) == (200, USERNAME), response.text
    assert_tells_no_secret(done.stderr, CONFIDENTIAL.secret, login.refresh_token)


def test_session_that_was_logged_out_ends_the_start(keycloak: Keycloak, service: Service, tmp_path: Path) -> None:
    login = keycloak.login(REALM, CONFIDENTIAL)
    keycloak.logout(REALM, CONFIDENTIAL, login.refresh_token)
    code, output = Launch(tmp_path, keycloak.issuer(REALM), CONFIDENTIAL, service.url, login.refresh_token).exit()
    assert code == 1, output
    assert "OPEN_ID_REFRESH_TOKEN" in output or "login" in output, output
    assert "Traceback" not in output, output
    assert_tells_no_secret(output, CONFIDENTIAL.secret, login.refresh_token)


def test_wrong_client_secret_ends_the_start(keycloak: Keycloak, service: Service, tmp_path: Path) -> None:
    login = keycloak.login(REALM, CONFIDENTIAL)
    client = Client(CONFIDENTIAL.client_id, "not-the-client-secret")
    code, output = Launch(tmp_path, keycloak.issuer(REALM), client, service.url, login.refresh_token).exit()
    assert code == 1, output
    assert "OPEN_ID_CONNECT_CLIENT_SECRET" in output, output
    assert "Traceback" not in output, output
    assert_tells_no_secret(output, client.secret, login.refresh_token)


def test_realm_that_does_not_exist_is_an_unavailable_issuer(
    keycloak: Keycloak, service: Service, stack: ExitStack, tmp_path: Path
) -> None:
    login = keycloak.login(REALM, CONFIDENTIAL)
    before = len(service.seen)
    launch = Launch(tmp_path, keycloak.issuer("nowhere"), CONFIDENTIAL, service.url, login.refresh_token)
    proxy = launch.serve(stack)
    response = get(proxy.url)
    told = f"{response.text}\n{proxy.child.output()}"
    assert (response.status_code, response.headers.get("X-OIDC-Proxy-Error")) == (503, "issuer_unavailable"), told
    assert "Retry-After" in response.headers, told
    assert response.headers["Content-Type"] == "application/problem+json", told
    assert len(service.seen) == before, told
    assert_tells_no_secret(told, CONFIDENTIAL.secret, login.refresh_token)


@pytest.mark.parametrize("name", ["confidential", "rotating"])
def test_session_outlives_its_access_tokens(watches: dict[str, Watch], name: str) -> None:
    watch = watches[name]
    bad = [answer for answer in watch.answers if (answer.status, answer.username) != (200, USERNAME)]
    assert not bad, f"{bad}\n{watch.output}"
    assert len(watch.answers) > 100, watch.output
    faults = [seen for seen in watch.seen if seen.fault is not None]
    assert not faults, f"{faults}\n{watch.output}"
    # Three lifetimes are the fewest; many more would mean a refresh with every request.
    tokens = {answer.jti for answer in watch.answers}
    assert 3 <= len(tokens) <= 8, f"{len(tokens)} tokens\n{watch.output}"
    assert_tells_no_secret(watch.output, CONFIDENTIAL.secret, watch.login.refresh_token)


def test_service_refuses_what_has_expired(watches: dict[str, Watch], service: Service) -> None:
    # Shows that the watch would have noticed: this token was good when the watch began.
    response = get(service.url, watches["confidential"].login.access_token)
    assert (response.status_code, response.json()["detail"]) == (401, "Signature has expired")
