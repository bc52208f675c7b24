"""The launcher and the scheme with each issuer: the rows and columns of the table in docs/issuers.md.

Run with `uv run pytest -m interop -n 2 --dist loadgroup tests/interop/test_issuers.py`; `-k oidc-provider` chooses.
`-m slow_issuers` runs those that have to be built.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import jwt
import pytest

from eoepca_security import OIDCProxyScheme
from eoepca_security.oauth.verify import unverified_claims
from tests.interop import (
    issuer_canaille,
    issuer_glewlwyd,
    issuer_hydra,
    issuer_keycloak,
    issuer_oidc_provider,
    issuer_spring,
    kc_server,
)
from tests.interop.issuer import USERNAME, Issuer
from tests.interop.issuer_user import Service, User, running_service
from tests.interop.kc_process import Child
from tests.support.fastapi import bearer, get, make_app
from tests.support.waiting import eventually

pytest_plugins = ["tests.interop.issuer_table"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

ISSUERS: dict[str, Callable[[Path], AbstractContextManager[Issuer]]] = {
    f"Canaille {issuer_canaille.VERSION}": issuer_canaille.confidential,
    f"Glewlwyd {issuer_glewlwyd.VERSION}": issuer_glewlwyd.confidential,
    f"Keycloak {kc_server.VERSION}": issuer_keycloak.current,
    f"Keycloak {kc_server.OLDEST}": issuer_keycloak.oldest,
    f"oidc-provider {issuer_oidc_provider.VERSION}, JWT": issuer_oidc_provider.jwt_and_public,
    f"oidc-provider {issuer_oidc_provider.VERSION}, opaque": issuer_oidc_provider.opaque_and_key,
}
SLOW_ISSUERS: dict[str, Callable[[Path], AbstractContextManager[Issuer]]] = {
    f"Ory Hydra {issuer_hydra.VERSION}": issuer_hydra.public,
    f"Spring Authorization Server {issuer_spring.VERSION}": issuer_spring.confidential,
}


@pytest.fixture(
    scope="session",
    params=[
        *(pytest.param(begin, id=name) for name, begin in ISSUERS.items()),
        *(pytest.param(begin, id=name, marks=pytest.mark.slow_issuers) for name, begin in SLOW_ISSUERS.items()),
    ],
)
def issuer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with request.param(tmp_path_factory.mktemp("issuer")) as issuer:
        yield issuer


@pytest.fixture(scope="session")
def service(issuer: Issuer) -> Iterator[Service]:
    with running_service(issuer.user_of) as service:
        yield service


@pytest.fixture
def user(issuer: Issuer, service: Service, tmp_path: Path) -> Iterator[User]:
    """Somebody who has the settings, and no session."""
    with ExitStack() as stack:
        yield _user(issuer, service, tmp_path, stack)


@pytest.fixture
def member(user: User, issuer: Issuer) -> User:
    """Somebody who has logged in."""
    _log_in(user, issuer)
    return user


def _user(issuer: Issuer, service: Service, folder: Path, stack: ExitStack, **more: str) -> User:
    settings = {"OPEN_ID_CONNECT_URL": issuer.url, "REMOTE_PROTECTED_DOMAIN": service.url, **issuer.settings, **more}
    return User(folder, settings, stack, issuer.pace)


def _log_in(user: User, issuer: Issuer) -> str:
    way = ("--browser",) if "test_login_by_browser" not in issuer.lacks else ()
    return user.logs_in(issuer.person, *way, *(issuer.login_options if way else ()))


def _is_served(user: User, proxy: Child) -> bool:
    answer = user.asks()
    assert answer.status_code == 200, f"{answer.text}\n{proxy.output()}"
    return bool(answer.json() == {"user": USERNAME})


@pytest.fixture(autouse=True)
def _is_for_this_issuer(request: pytest.FixtureRequest, issuer: Issuer) -> None:
    reason = issuer.lacks.get(request.node.originalname)
    if reason is not None:
        pytest.skip(reason)


def test_discovery(user: User) -> None:
    steps = user.checks()
    assert steps["discovery"]["status"] == "ok", steps
    assert (steps["token"]["status"], "run-mitmproxy.py login" in steps["token"]["remedy"]) == ("fault", True), steps


def test_login_by_device(user: User, issuer: Issuer) -> None:
    said = user.logs_in(issuer.person, *issuer.device_options)
    assert "Logged in as " in said
    assert user.refresh_token() not in said
    assert issuer.user_of(user.token()) == USERNAME
    # Keycloak's answers have no date, so there is no clock to compare.
    assert {name: step["status"] for name, step in user.checks().items() if step["status"] != "ok"} in (
        {},
        {"clock": "skipped"},
    )


def test_login_by_browser(user: User, issuer: Issuer) -> None:
    said = user.logs_in(issuer.person, "--browser", *issuer.login_options)
    assert "Logged in as " in said
    assert user.refresh_token() not in said
    assert issuer.user_of(user.token()) == USERNAME
    # Keycloak's answers have no date, so there is no clock to compare.
    assert {name: step["status"] for name, step in user.checks().items() if step["status"] != "ok"} in (
        {},
        {"clock": "skipped"},
    )


def test_refresh(member: User, issuer: Issuer, service: Service) -> None:
    proxy, before = member.serves(), set(service.seen)
    eventually(lambda: _is_served(member, proxy) and len(set(service.seen) - before) >= 2, 4 * issuer.lifetime)
    assert re.search(r"Traceback|rejected|unavailable", proxy.output()) is None, proxy.output()


def test_rotation(
    member: User,
    issuer: Issuer,
    tmp_path: Path,
    service: Service,
    stack: ExitStack,
    record_property: Callable[[str, str], None],
) -> None:
    first = member.refresh_token()
    proxy = member.serves()
    together = [member.begins("token") for _ in range(3)]
    assert [child.exit_code(60) for child in together] == [0, 0, 0], [child.output() for child in together]
    assert _is_served(member, proxy)
    assert member.refresh_token() != first
    # With all of that, no token was used twice: that would have ended the session.
    assert issuer.user_of(member.token()) == USERNAME
    thief = _user(issuer, service, tmp_path, stack, OPEN_ID_REFRESH_TOKEN=first, OPEN_ID_TOKEN_STORE="none")
    code, output, errors = thief.does("token")
    assert (code, output) == (1, ""), errors
    assert errors.startswith(f"{issuer.refusal}: "), errors
    outcome = "is refused" if member.does("token")[0] == 0 else "ends the session"
    record_property("says", f"yes; reuse {outcome}")


def test_revocation(member: User, issuer: Issuer, record_property: Callable[[str, str], None]) -> None:
    proxy = member.serves()
    assert _is_served(member, proxy)
    issuer.revoke()
    eventually(lambda: member.asks().headers.get("X-OIDC-Proxy-Error") == issuer.refusal, 3 * issuer.lifetime)
    answer = member.asks()
    assert answer.status_code == (502 if issuer.refusal == "credentials_rejected" else 503)
    assert "run-mitmproxy.py login" in answer.json()["detail"]
    assert member.does("token")[0] == 1
    steps = member.checks()
    assert "fault" in {steps[name]["status"] for name in ("client", "token")}, steps
    _log_in(member, issuer)
    eventually(lambda: member.asks().status_code == 200, 60)
    record_property("says", f"`{issuer.refusal}`")


def test_logout(member: User, issuer: Issuer, tmp_path: Path, service: Service, stack: ExitStack) -> None:
    refresh_token = member.refresh_token()
    code, said, errors = member.does("logout")
    assert (code, "The issuer has ended the session" in said) == (0, True), said + errors
    other = _user(issuer, service, tmp_path, stack, OPEN_ID_REFRESH_TOKEN=refresh_token, OPEN_ID_TOKEN_STORE="none")
    code, said, errors = other.does("token")
    assert (code, errors.partition(":")[0]) == (1, issuer.refusal), said + errors


async def test_key_rotation(member: User, issuer: Issuer, service: Service) -> None:
    old = member.token()
    app = make_app(OIDCProxyScheme(openIdConnectUrl=issuer.url, audience=issuer.audience or "any"))
    if issuer.audience is not None:
        assert (await get(app, bearer(old))).status_code == 200
    proxy = member.serves()
    # With a token that has just come, so that the proxy does not refresh while an issuer restarts.
    kept = member.kept()
    eventually(lambda: _is_served(member, proxy) and member.kept() != kept, 2 * issuer.lifetime)
    issuer.rotate_keys()
    new, before = member.token(), set(service.seen)
    if issuer.audience is not None:
        assert jwt.get_unverified_header(new)["kid"] != jwt.get_unverified_header(old)["kid"]
        assert [(await get(app, bearer(token))).status_code for token in (old, new)] == [200, 200]
    # The proxy knows the old keys only, and gets a token of the new one while it serves.
    eventually(lambda: _is_served(member, proxy) and len(set(service.seen) - before) >= 2, 3 * issuer.lifetime)
    # The ID token of a login is verified, too.
    assert "Logged in as " in _log_in(member, issuer)


async def test_scheme(member: User, issuer: Issuer, record_property: Callable[[str, str], None]) -> None:
    assert issuer.audience is not None
    access_token, kept = member.token(), member.kept()
    app = make_app(OIDCProxyScheme(openIdConnectUrl=issuer.url, audience=issuer.audience))
    found = await get(app, bearer(access_token))
    assert (found.status_code, found.json()["claims"]["sub"]) == (200, unverified_claims(access_token)["sub"])
    others = [kept["refresh_token"]]
    if kept.get("id_token"):
        others.append(kept["id_token"])
        found = await get(app, {**bearer(access_token), "X-ID-Token": kept["id_token"]})
        assert (found.status_code, found.json()["id_token"]["sub"]) == (200, unverified_claims(access_token)["sub"])
    client_id = member.settings["OPEN_ID_CONNECT_CLIENT_ID"]
    for audience in (issuer.audience, issuer.url, client_id, "account"):
        other = make_app(OIDCProxyScheme(openIdConnectUrl=issuer.url, audience=audience))
        accepted = [token for token in others if (await get(other, bearer(token))).status_code != 401]
        # An ID token is for the client. If nothing marks it, a service with that audience cannot refuse it.
        assert accepted == (others[1:] if audience == client_id and not issuer.marks_id_tokens else [])
    if not issuer.marks_id_tokens:
        record_property("says", "yes, if the audience is not a client")
    strict = OIDCProxyScheme(openIdConnectUrl=issuer.url, audience="another-service")
    assert (await get(make_app(strict), bearer(access_token))).status_code == 401
    strict = OIDCProxyScheme(openIdConnectUrl=issuer.url, audience=issuer.audience, authorized_parties=[client_id])
    # Where the token does not say to whom it was issued, nobody is let in.
    says_client = not unverified_claims(access_token).keys().isdisjoint({"azp", "client_id"})
    assert (await get(make_app(strict), bearer(access_token))).status_code == (200 if says_client else 401)


def test_client_authentication(
    issuer: Issuer, service: Service, tmp_path: Path, stack: ExitStack, record_property: Callable[[str, str], None]
) -> None:
    for settings in issuer.clients.values():
        client = _user(issuer, service, tmp_path, stack, OPEN_ID_CONNECT_GRANT="client_credentials", **settings)
        assert client.token()
        if "OPEN_ID_CONNECT_CLIENT_SECRET" in settings:
            wrong = {**client.settings, "OPEN_ID_CONNECT_CLIENT_SECRET": "wrong-secret-of-the-same-good-length"}
            code, output, errors = User(tmp_path, wrong, stack).does("token")
            assert (code, output, errors.partition(":")[0]) == (1, "", issuer.refusal), errors
            assert "OPEN_ID_CONNECT_CLIENT_SECRET" in errors
    record_property("says", ", ".join(f"`{method}`" for method in issuer.clients))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
