"""What docs/issuers.md says of Keycloak's ways, asked of Keycloak itself."""

from typing import Any

import httpx
import pytest
from kc_server import AUDIENCE, PASSWORD, PUBLIC, REALM, USERNAME, Client, Keycloak

from eoepca_security.verify import unverified_claims

pytest_plugins = ["kc_fixtures"]
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


def test_an_offline_session_outlives_the_sign_out_of_its_user(keycloak: Keycloak) -> None:
    online, offline = (
        log_in(keycloak, PUBLIC, scope)["refresh_token"] for scope in ("openid", "openid offline_access")
    )
    (user,) = keycloak.admin("GET", f"{REALM}/users?username={USERNAME}")
    keycloak.admin("POST", f"{REALM}/users/{user['id']}/logout")
    assert [keycloak.refresh(REALM, PUBLIC, token).status_code for token in (online, offline)] == [400, 200]
    keycloak.admin("DELETE", f"{REALM}/users/{user['id']}/consents/{PUBLIC.client_id}")
    answer = keycloak.refresh(REALM, PUBLIC, offline)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
