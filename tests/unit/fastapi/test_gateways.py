"""What gateways send, as files in `gateways/`, and what the scheme makes of it."""

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from eoepca_security.testing import FakeIssuer
from tests.support.fastapi import get, make_app, make_scheme
from tests.support.processes import ROOT

CASES: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text()) for file in (ROOT / "tests" / "gateways").glob("*.json")
}


@pytest.fixture(scope="module")
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(client_id="gateway") as issuer:
        yield issuer


def as_sent(issuer: FakeIssuer, access_claims: dict[str, Any]) -> dict[str, str]:
    access_token = issuer.issue(azp="gateway", typ="Bearer", **access_claims)  # as Keycloak has it
    id_token = issuer.id_token(access_token, nickname="ally?>")
    id_claims = jwt.decode(id_token, options={"verify_signature": False})
    return {
        "access_token": access_token,
        "access_payload": access_token.split(".")[1],
        "id_token": id_token,
        "id_claims": base64.b64encode(json.dumps(id_claims).encode()).decode(),
        "userinfo": base64.b64encode(json.dumps({"sub": "u-1", "nickname": "of userinfo"}).encode()).decode(),
        "refresh_token": issuer.refresh_token,
        "of_the_gateway": gateways_own_token(),
    }


def gateways_own_token() -> str:
    """Return what a gateway says of the user in its own name."""
    now = int(time.time())
    claims = {"iss": "service.example", "aud": "service.example", "sub": "u-1", "iat": now, "exp": now + 60}
    return jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), "ES256", {"kid": "gateway"})


def test_there_are_gateways() -> None:
    named = {name.partition("-")[0] for name in CASES}
    assert named == {"apisix", "envoy", "mod_auth_openidc", "nginx", "oauth2", "pomerium", "traefik"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_documentation_has_the_settings_and_the_arguments(name: str) -> None:
    case = CASES[name]
    text = " ".join((ROOT / "docs" / "gateways.md").read_text().split())
    missing = [setting for setting in case["settings"] if setting not in text]
    if "status" not in case:
        arguments = {name: value for name, value in case["scheme"].items() if not name.startswith("require_")}
        written = [
            f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in arguments.items()
        ]
        missing += [argument for argument in written if argument not in text]
    assert case["source"].split()[0] in ("recorded", "made")
    assert case["settings"]
    assert not missing


@pytest.mark.parametrize("name", sorted(CASES))
async def test_what_a_gateway_sends(name: str, issuer: FakeIssuer) -> None:
    case = CASES[name]
    tokens = as_sent(issuer, case.get("access_claims", {}))
    headers = {name: value.format(**tokens) for name, value in case["headers"].items()}

    answer = await get(make_app(make_scheme(issuer, **case["scheme"])), headers)

    assert answer.status_code == case.get("status", 200), answer.text
    if answer.status_code == 200:
        found = answer.json()
        assert {name: found["claims"].get(name) for name in case["claims"]} == case["claims"]
        assert (found["id_token"] is not None) == case["id_token"]
        assert found["access_token"] == tokens["access_token"]
        assert found["refresh_token"] == (
            tokens["refresh_token"] if case["scheme"].get("require_refresh_token") else None
        )
