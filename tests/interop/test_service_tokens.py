"""Tokens for several services from one session: what real issuers give, and what docs/issuers.md says of them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from eoepca_security import OIDCProxyScheme
from eoepca_security.errors import CredentialsRejected, TokenInvalid
from eoepca_security.issuer.ca_trust import trust
from eoepca_security.issuer.provider import Provider
from eoepca_security.issuer.transport import HttpTransport
from eoepca_security.oauth import protocol
from eoepca_security.oauth.protocol import TokenResponse, narrow_scope
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.policy.remedies import exchange_remedy
from tests.interop import issuer_oidc_provider
from tests.interop.issuer import AUDIENCE, Issuer
from tests.interop.issuer_oidc_provider import OTHER_AUDIENCE
from tests.interop.kc_audiences import EXCHANGING, NARROWING, OPENEO, S3, SERVICES, STAC, add_client
from tests.interop.kc_server import PASSWORD, ROTATING_REALM, USERNAME, Client, Keycloak
from tests.support.fastapi import bearer, get, make_app

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1000)]

REALM = ROTATING_REALM  # where the second use of a refresh token ends the session


@pytest.fixture
def network() -> HttpTransport:
    return HttpTransport(trust())


def make_provider(url: str, client: Client, network: HttpTransport) -> Provider:
    return Provider(url, protocol.Client(client.client_id, client.secret), network)


def log_in(keycloak: Keycloak, client: Client, scope: str) -> dict[str, Any]:
    form = {**client.form(), "grant_type": "password", "username": USERNAME, "password": PASSWORD, "scope": scope}
    url = f"{keycloak.issuer(REALM)}/protocol/openid-connect/token"
    return dict(httpx.post(url, data=form, trust_env=False, timeout=10).raise_for_status().json())


def audiences(token: str) -> set[str]:
    named = unverified_claims(token).get("aud", [])
    return {named} if isinstance(named, str) else set(named)


# --- Keycloak, exchange -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["openid", "openid offline_access"])
async def test_keycloak_gives_each_service_a_token_that_no_other_accepts(
    services: Keycloak, network: HttpTransport, scope: str
) -> None:
    url = services.issuer(REALM)
    provider = make_provider(url, EXCHANGING, network)
    session = provider.request_token(log_in(services, EXCHANGING, scope)["refresh_token"])
    # With the scope that is optional, the login's token does not have its audience.
    assert audiences(session.access_token) == {OPENEO, S3, "account"}

    tokens = {
        STAC: provider.exchange_token(session.access_token, audience=STAC, scope=STAC),
        OPENEO: provider.exchange_token(session.access_token, audience=OPENEO, scope="openid offline_access"),
        S3: provider.exchange_token(session.access_token, audience=S3),
    }

    schemes = {name: OIDCProxyScheme(openIdConnectUrl=url, audience=name) for name in SERVICES}
    for name, scheme in schemes.items():
        app = make_app(scheme)
        answers = {other: (await get(app, bearer(token.access_token))).status_code for other, token in tokens.items()}
        assert answers == {other: 200 if other == name else 401 for other in SERVICES}
    assert {audience: audiences(token.access_token) for audience, token in tokens.items()} == {
        audience: {audience} for audience in SERVICES
    }
    users = {unverified_claims(token.access_token)["sub"] for token in (session, *tokens.values())}
    assert len(users) == 1
    # The session goes on: an exchange uses no refresh token up, and gives none.
    assert {token.refresh_token for token in tokens.values()} == {None}
    assert provider.request_token(session.refresh_token).access_token


def refusal(provider: Provider, token: str, **target: str) -> tuple[str | None, str | None, str | None, str]:
    """Its code, its text, its cause and the remedy."""
    with pytest.raises(CredentialsRejected) as caught:
        provider.exchange_token(token, **target)
    error = caught.value
    remedy = exchange_remedy(error, "CLIENT", target.get("audience")) or ""
    return error.issuer_error, error.description, error.cause, remedy


def test_keycloak_says_why_it_does_not_exchange(services: Keycloak, network: HttpTransport) -> None:
    provider = make_provider(services.issuer(REALM), EXCHANGING, network)
    refused = partial(refusal, provider, log_in(services, EXCHANGING, "openid")["access_token"])

    assert refused(audience="no-such-api")[:3] == ("invalid_client", "Audience not found", "unknown_audience")
    code, said, cause, remedy = refused(audience=STAC)
    assert (code, said, cause) == ("invalid_request", f"Requested audience not available: {STAC}", "no_audience")
    assert f"with {STAC} as Included Client Audience" in remedy
    code, said, cause, remedy = refused(audience=STAC, scope="nonsense")
    assert (code, said, cause) == ("invalid_scope", "Invalid scopes: nonsense", None)
    assert "set `scope` of the service" in remedy


def test_keycloak_exchanges_only_for_clients_with_the_switch_and_a_secret(
    services: Keycloak, network: HttpTransport
) -> None:
    off, public = Client("switch-off", "test-only-client-secret"), Client("public-with-switch")
    add_client(services, REALM, off)
    add_client(services, REALM, public, **{"standard.token.exchange.enabled": "true"})

    def refused(client: Client) -> tuple[str | None, str | None, str | None, str]:
        provider = make_provider(services.issuer(REALM), client, network)
        return refusal(provider, log_in(services, client, "openid")["access_token"], audience=OPENEO)

    code, said, cause, remedy = refused(off)
    assert (code, cause) == ("invalid_request", "no_exchange")
    assert said == "Standard token exchange is not enabled for the requested client"
    assert "Clients > CLIENT > Settings > Capability config > Standard Token Exchange" in remedy
    code, said, cause, remedy = refused(public)
    assert (code, cause) == ("invalid_client", "public_client")
    assert said == "Public client is not allowed to exchange token"
    assert "turn on Client authentication" in remedy
    code, said, cause, remedy = refused(NARROWING)
    assert (code, cause) == ("invalid_request", "no_exchange")


def test_keycloak_exchanges_only_tokens_of_the_same_client_and_of_a_session_that_lasts(
    services: Keycloak, network: HttpTransport
) -> None:
    provider = make_provider(services.issuer(REALM), EXCHANGING, network)
    foreign = log_in(services, NARROWING, "openid")["access_token"]
    code, said, cause, _ = refusal(provider, foreign, audience=OPENEO)
    assert (code, said) == ("access_denied", "Client is not within the token audience")
    assert cause == "subject_token"

    login = log_in(services, EXCHANGING, "openid")
    services.logout(REALM, EXCHANGING, login["refresh_token"])
    assert refusal(provider, login["access_token"], audience=OPENEO)[:3] == (
        "invalid_request",
        "Invalid token",
        "subject_token",
    )


def test_keycloak_does_not_look_at_the_resource_so_the_audience_has_to_be_checked(
    services: Keycloak, network: HttpTransport
) -> None:
    provider = make_provider(services.issuer(REALM), EXCHANGING, network)
    login = log_in(services, EXCHANGING, "openid")

    token = provider.exchange_token(login["access_token"], resource="https://stac.example").access_token
    assert audiences(token) == audiences(login["access_token"])
    with pytest.raises(TokenInvalid, match="audience"):
        provider.verify(token, "https://stac.example")
    refreshed = provider.request_token(login["refresh_token"], resource="https://stac.example").access_token
    assert audiences(refreshed) == audiences(login["access_token"])


# --- Keycloak, narrower scope -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", " offline_access"])
def test_keycloak_narrows_each_refresh_and_widens_again(services: Keycloak, network: HttpTransport, more: str) -> None:
    provider = make_provider(services.issuer(REALM), NARROWING, network)
    wide = f"openid{more} {STAC} {OPENEO}"
    refresh_token = log_in(services, NARROWING, wide)["refresh_token"]

    def refresh(scope: str | None) -> set[str]:
        """The token's scopes and audiences that tell the services apart."""
        nonlocal refresh_token
        response = provider.request_token(refresh_token, scope=scope)
        assert response.refresh_token not in (None, refresh_token)
        refresh_token = response.refresh_token
        scopes = str(unverified_claims(response.access_token)["scope"]).split()
        found = audiences(response.access_token) & {STAC, OPENEO}
        assert found == {STAC, OPENEO} & set(scopes)
        return found

    assert refresh(narrow_scope(STAC, wide)) == {STAC}
    assert refresh(narrow_scope(OPENEO, wide)) == {OPENEO}
    assert refresh(wide) == {STAC, OPENEO}
    assert refresh(narrow_scope(STAC, wide)) == {STAC}
    assert refresh(None) == {STAC, OPENEO}
    # A wrong scope does not use the refresh token up.
    with pytest.raises(CredentialsRejected, match="invalid_scope"):
        refresh("nonsense")
    assert refresh(narrow_scope(OPENEO, wide)) == {OPENEO}


def test_keycloak_leaves_out_what_the_login_did_not_have(services: Keycloak, network: HttpTransport) -> None:
    provider = make_provider(services.issuer(REALM), NARROWING, network)
    refresh_token = log_in(services, NARROWING, f"openid {STAC}")["refresh_token"]

    token = provider.request_token(refresh_token, scope=f"openid {OPENEO}").access_token
    assert not audiences(token) & {STAC, OPENEO}
    assert OPENEO not in unverified_claims(token)["scope"]


# --- oidc-provider, resource --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with issuer_oidc_provider.jwt_and_public(tmp_path_factory.mktemp("node")) as issuer:
        yield issuer


def log_in_for_both(node: Issuer) -> dict[str, Any]:
    """Log in by device for two resources."""
    post = partial(httpx.post, trust_env=False, timeout=10)
    document = httpx.get(f"{node.url}/.well-known/openid-configuration", trust_env=False, timeout=10).json()
    client = {"client_id": node.settings["OPEN_ID_CONNECT_CLIENT_ID"]}
    form = {**client, "scope": "openid offline_access read", "resource": [AUDIENCE, OTHER_AUDIENCE]}
    device = post(document["device_authorization_endpoint"], data=form).raise_for_status().json()
    node.person(device["verification_uri_complete"])
    grant = "urn:ietf:params:oauth:grant-type:device_code"
    form = {**client, "grant_type": grant, "device_code": device["device_code"]}
    return dict(post(document["token_endpoint"], data=form).raise_for_status().json())


@pytest.fixture
def provider(node: Issuer, network: HttpTransport) -> Provider:
    return make_provider(node.url, Client(node.settings["OPEN_ID_CONNECT_CLIENT_ID"]), network)


async def test_oidc_provider_gives_a_token_for_each_resource(node: Issuer, provider: Provider) -> None:
    refresh_token = log_in_for_both(node)["refresh_token"]
    for audience, other in ((AUDIENCE, OTHER_AUDIENCE), (OTHER_AUDIENCE, AUDIENCE), (AUDIENCE, OTHER_AUDIENCE)):
        response = provider.request_token(refresh_token, resource=audience)
        assert response.refresh_token not in (None, refresh_token)
        refresh_token = response.refresh_token
        answers = [
            (await get(make_app(OIDCProxyScheme(openIdConnectUrl=node.url, audience=name)), bearer(token))).status_code
            for token in [response.access_token]
            for name in (audience, other)
        ]
        assert answers == [200, 401]


def test_a_wrong_resource_ends_the_session_at_oidc_provider(node: Issuer, provider: Provider) -> None:
    refresh_token = log_in_for_both(node)["refresh_token"]

    with pytest.raises(CredentialsRejected) as caught:
        provider.request_token(refresh_token, resource="https://nobody.example")
    assert caught.value.issuer_error == "invalid_target"
    # It is used up by that, so the next use is a reuse.
    with pytest.raises(CredentialsRejected) as caught:
        provider.request_token(refresh_token, resource=AUDIENCE)
    assert caught.value.issuer_error == "invalid_grant"


def test_oidc_provider_narrows_each_refresh_and_widens_again(node: Issuer, provider: Provider) -> None:
    wide = "openid offline_access read"
    response = TokenResponse("", refresh_token=log_in_for_both(node)["refresh_token"])
    for scope, granted in (("openid", None), (wide, "read"), ("openid", None), (None, "read")):
        response = provider.request_token(response.refresh_token, scope=scope, resource=AUDIENCE)
        assert unverified_claims(response.access_token).get("scope") == granted
