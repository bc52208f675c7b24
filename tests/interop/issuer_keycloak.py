"""Keycloak, the current one and an old one, with refresh tokens that are valid once."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.interop.issuer import AUDIENCE, LIFETIME, PASSWORD, USERNAME, Endpoints, Issuer, key_pair
from tests.interop.issuer_person import visit
from tests.interop.kc_server import OLDEST, OLDEST_JAVA_MAJORS, Keycloak, running_keycloak
from tests.support.waiting import eventually

REALM = "eoepca-issuers"
SECRET = "test-only-client-secret-of-some-length"
YES = {("accept", ""), ("accept", "Yes")}
AUTHENTICATORS = {
    "client_secret_basic": "client-secret",
    "client_secret_post": "client-secret",
    "client_secret_jwt": "client-secret-jwt",
    "private_key_jwt": "client-jwt",
}


@contextmanager
def current(folder: Path) -> Iterator[Issuer]:
    realm, clients = _realm(folder)
    with running_keycloak(folder, [realm]) as keycloak:
        yield _issuer(keycloak, clients)


@contextmanager
def oldest(folder: Path) -> Iterator[Issuer]:
    realm, clients = _realm(folder)
    with running_keycloak(folder, [realm], version=OLDEST, java_majors=OLDEST_JAVA_MAJORS) as keycloak:
        yield _issuer(keycloak, clients)


def _issuer(keycloak: Keycloak, clients: Mapping[str, Mapping[str, str]]) -> Issuer:
    url = keycloak.issuer(REALM)
    endpoints = Endpoints.of(url)
    return Issuer(
        url=url,
        settings={"OPEN_ID_CONNECT_CLIENT_ID": "eoepca-login", "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE},
        user_of=partial(endpoints.user_of_jwt, claim="preferred_username"),
        person=partial(visit, knows={"username": USERNAME, "password": PASSWORD}, says_yes=YES),
        revoke=partial(_revoke, keycloak),
        rotate_keys=partial(_rotate_keys, keycloak, endpoints),
        audience=AUDIENCE,
        clients=clients,
    )


def _revoke(keycloak: Keycloak) -> None:
    (user,) = keycloak.admin("GET", f"{REALM}/users?username={USERNAME}")
    keycloak.admin("POST", f"{REALM}/users/{user['id']}/logout")
    # It counts in seconds, and spares a refresh token that was given in the same one.
    second = int(time.time())
    eventually(lambda: int(time.time()) > second)
    keycloak.admin("POST", f"{REALM}/users/{user['id']}/logout")


def _rotate_keys(keycloak: Keycloak, endpoints: Endpoints) -> None:
    before = endpoints.signing_kids()
    config = {"priority": ["200"], "enabled": ["true"], "active": ["true"], "algorithm": ["RS256"]}
    component = {
        "name": "newer",
        "providerId": "rsa-generated",
        "providerType": "org.keycloak.keys.KeyProvider",
        "config": config,
    }
    keycloak.admin("POST", f"{REALM}/components", component)
    assert endpoints.signing_kids() > before


def _realm(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The realm, and the launcher's settings for its clients that act for themselves."""
    mapper = {
        "name": "audience",
        "protocol": "openid-connect",
        "protocolMapper": "oidc-audience-mapper",
        "config": {"included.custom.audience": AUDIENCE, "access.token.claim": "true", "id.token.claim": "false"},
    }
    people = {
        "clientId": "eoepca-login",
        "publicClient": True,
        "redirectUris": ["http://127.0.0.1/*"],
        "attributes": {
            "oauth2.device.authorization.grant.enabled": "true",
            "pkce.code.challenge.method": "S256",
        },
        "protocolMappers": [mapper],
    }
    key_file, public_key = key_pair(folder)
    machines, settings = [], {}
    for method, authenticator in AUTHENTICATORS.items():
        client_id = f"eoepca-{method}"
        machine: dict[str, Any] = {
            "clientId": client_id,
            "clientAuthenticatorType": authenticator,
            "serviceAccountsEnabled": True,
            "standardFlowEnabled": False,
            "secret": SECRET,
            "protocolMappers": [mapper],
        }
        credential = {"OPEN_ID_CONNECT_CLIENT_SECRET": SECRET}
        if method == "private_key_jwt":
            jwks = json.dumps({"keys": [public_key]})
            machine["attributes"] = {"use.jwks.string": "true", "jwks.string": jwks}
            credential = {"OPEN_ID_CONNECT_CLIENT_KEY_FILE": str(key_file)}
        machines.append(machine)
        settings[method] = {"OPEN_ID_CONNECT_CLIENT_ID": client_id, "OPEN_ID_CONNECT_CLIENT_AUTH": method, **credential}
    user = {
        "username": USERNAME,
        "enabled": True,
        "email": "alice@example.org",
        "emailVerified": True,
        "firstName": "Alice",
        "lastName": "Example",
        "credentials": [{"type": "password", "value": PASSWORD, "temporary": False}],
        "realmRoles": ["offline_access"],
    }
    realm = {
        "realm": REALM,
        "enabled": True,
        "sslRequired": "none",
        "accessTokenLifespan": LIFETIME,
        "revokeRefreshToken": True,
        "refreshTokenMaxReuse": 0,
        "clients": [people, *machines],
        "users": [user],
    }
    return realm, settings
