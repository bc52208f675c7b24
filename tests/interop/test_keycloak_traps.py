"""What docs/issuers.md says of Keycloak's ways, asked of Keycloak itself."""

from typing import Any

import httpx
import pytest

from eoepca_security.oauth.verify import unverified_claims
from tests.interop.kc_server import AUDIENCE, PASSWORD, PUBLIC, REALM, USERNAME, Client, Keycloak

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1000)]


def log_in(keycloak: Keycloak, client: Client, scope: str) -> dict[str, Any]:
    form = {**client.form(), "grant_type": "password", "username": USERNAME, "password": PASSWORD, "scope": scope}
    url = f"{keycloak.issuer(REALM)}/protocol/openid-connect/token"
    answer = httpx.post(url, data=form, trust_env=False, timeout=10)
    return dict(answer.raise_for_status().json())


def test_everybody_has_the_audience_account_and_no_other_without_a_mapper(keycloak: Keycloak) -> None:
    client = {"clientId": "plain", "publicClient": True, "directAccessGrantsEnabled": True}
    keycloak.admin("POST", f"{REALM}/clients", client)
    assert unverified_claims(log_in(keycloak, Client("plain"), "openid")["access_token"])["aud"] == "account"
    audiences = unverified_claims(log_in(keycloak, PUBLIC, "openid")["access_token"])["aud"]
    assert sorted(audiences) == sorted(["account", AUDIENCE])


def test_a_session_ends_after_half_an_hour_unless_it_is_an_offline_one(keycloak: Keycloak) -> None:
    assert log_in(keycloak, PUBLIC, "openid")["refresh_expires_in"] == 30 * 60
    assert log_in(keycloak, PUBLIC, "openid offline_access")["refresh_expires_in"] == 0


def test_the_sign_out_of_a_user_ends_offline_sessions_too(keycloak: Keycloak) -> None:
    refresh_token = log_in(keycloak, PUBLIC, "openid offline_access")["refresh_token"]
    assert keycloak.refresh(REALM, PUBLIC, refresh_token).status_code == 200
    (user,) = keycloak.admin("GET", f"{REALM}/users?username={USERNAME}")
    keycloak.admin("POST", f"{REALM}/users/{user['id']}/logout")
    answer = keycloak.refresh(REALM, PUBLIC, refresh_token)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
