"""Code written for EOEPCA's eoepca-security 2.0 runs as it is."""

import base64
import copy
import hashlib
import json
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket

from eoepca_security import Authentication, OIDCProxyScheme, Tokens
from eoepca_security.testing import FakeIssuer
from tests.support.fastapi import bearer, get, make_scheme, open_socket


@pytest.fixture(scope="module")
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(client_id="gateway") as issuer:
        yield issuer


def unsigned(issuer: FakeIssuer, access_token: str, **changes: Any) -> str:
    """Return what APISIX sends in X-ID-Token: base64 JSON, without a signature; `...` takes a claim away."""
    half = hashlib.sha256(access_token.encode()).digest()[:16]
    claims = {
        "iss": issuer.url,
        "sub": "u-1",
        "aud": "gateway",
        "exp": int(time.time()) + 60,
        "at_hash": base64.urlsafe_b64encode(half).rstrip(b"=").decode(),
        "name": "Alice Example",
        **changes,
    }
    return base64.b64encode(json.dumps({k: v for k, v in claims.items() if v is not ...}).encode()).decode()


def make_request(**headers: str) -> Request:
    pairs = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": pairs})


def make_hook(issuer: FakeIssuer, **arguments: Any) -> FastAPI:
    """Return a service that knows only the names of 2.0."""
    scheme = OIDCProxyScheme(
        openIdConnectUrl=f"{issuer.url}/.well-known/openid-configuration",
        audience="service",
        id_token_header="x-id-token",
        refresh_token_header="x-refresh-token",
        auth_token_header="Authorization",
        auth_token_in_authorization=True,
        scheme_name="behind the gateway",
        description="tokens from the gateway",
        **{"auto_error": True, **arguments},
    )

    async def authenticate(request: Request) -> Tokens | None:
        return await scheme(request)

    def user_of(tokens: Tokens | None) -> dict[str, Any]:
        if tokens is None or tokens["auth"] is None:
            raise HTTPException(418, "nobody")
        claims = dict(tokens["auth"].decoded["payload"])
        if tokens["id"] is not None:
            claims.update(tokens["id"].decoded)
        return {
            "id": claims["sub"],
            "name": claims["preferred_username"],
            "full_name": claims.get("name"),
            "access_token": tokens["auth"].raw,
            "id_token": tokens["id"].raw if tokens["id"] else None,
            "refresh_token": tokens["refresh"].raw if tokens["refresh"] else None,
        }

    app = FastAPI()

    @app.get("/")
    async def show(request: Request) -> dict[str, Any]:
        return user_of(await authenticate(request))

    @app.get("/depends")
    def depends(tokens: Tokens = Depends(scheme)) -> dict[str, Any]:  # noqa: B008  as 2.0's users wrote it
        return user_of(tokens)

    @app.websocket("/")
    async def socket(socket: WebSocket) -> None:
        user = user_of(await scheme(socket))
        await socket.accept()
        await socket.send_json(user)

    return app


@pytest.mark.parametrize("path", ["/", "/depends"])
async def test_a_hook_of_2_0_runs_unmodified_behind_apisix(issuer: FakeIssuer, path: str) -> None:
    token = issuer.issue()
    sent = unsigned(issuer, token)

    answer = await get(make_hook(issuer), {**bearer(token), "X-ID-Token": sent, "X-Refresh-Token": "r-1"}, path)

    assert answer.json() == {
        "id": "u-1",
        "name": "alice",
        "full_name": "Alice Example",
        "access_token": token,
        "id_token": sent,
        "refresh_token": "r-1",
    }


async def test_a_hook_of_2_0_runs_without_the_tokens_that_are_optional(issuer: FakeIssuer) -> None:
    answer = await get(make_hook(issuer), bearer(issuer.issue()))
    assert answer.status_code == 200
    assert (answer.json()["full_name"], answer.json()["id_token"], answer.json()["refresh_token"]) == (None,) * 3


async def test_called_directly_the_scheme_answers_as_in_a_dependency(issuer: FakeIssuer) -> None:
    app = make_hook(issuer)
    assert (await get(app)).status_code == (await get(app, path="/depends")).status_code == 401
    assert (await get(app)).headers["WWW-Authenticate"] == "Bearer"
    assert (await open_socket(app, bearer(issuer.issue())))["id"] == "u-1"
    assert await open_socket(app, {}) == 1008
    assert (await get(make_hook(issuer, auto_error=False))).status_code == 418
    assert (await make_scheme(issuer)(request=make_request(**bearer(issuer.issue()))))["claims"]["sub"] == "u-1"  # type: ignore[index]


async def test_the_switches_of_2_0_for_which_tokens_are_needed(issuer: FakeIssuer) -> None:
    token = issuer.issue()
    optional = make_scheme(issuer, require_auth_token=False)
    tokens = await optional(make_request())
    assert tokens is not None
    assert (tokens["auth"], tokens["id"], tokens["refresh"]) == (None, None, None)
    for switch in ("require_id_token", "require_refresh_token"):
        assert (await get(make_hook(issuer, **{switch: True}), bearer(token))).status_code == 401


async def test_the_names_of_2_0_are_known_by_index_get_and_in_but_not_listed(issuer: FakeIssuer) -> None:
    tokens = await make_scheme(issuer)(make_request(**bearer(issuer.issue())))
    assert tokens is not None
    for name in ("auth", "id", "refresh", "claims"):
        assert name in tokens
        assert tokens.get(name) is tokens[name]
    assert "other" not in tokens
    assert (tokens.get("other"), tokens.get("other", 1)) == (None, 1)
    with pytest.raises(KeyError, match="other"):
        tokens["other"]
    assert [*tokens] == ["claims", "access_token", "id_token", "refresh_token"]
    assert Tokens is Authentication


async def test_unsigned_claims_are_those_of_id_alone(issuer: FakeIssuer) -> None:
    token = issuer.issue()
    forged = unsigned(issuer, token, preferred_username="admin", scope="admin", realm_access={"roles": ["admin"]})
    tokens = await make_scheme(issuer)(make_request(**bearer(token), X_ID_Token=forged))
    assert tokens is not None

    assert tokens["id"].decoded["name"] == "Alice Example"
    # Verified claims take precedence.
    assert tokens["id"].decoded["preferred_username"] == "alice"
    assert tokens["id"].decoded.items() >= tokens["claims"].items()
    assert tokens["id_token"] is None
    assert tokens["claims"] == tokens.access_claims == tokens["auth"].decoded["payload"]
    assert "name" not in tokens["claims"]


@pytest.mark.parametrize(
    "changes",
    [{"iss": "https://other.example"}, {"sub": "u-2"}, {"exp": 1}, {"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"}]
    + [{name: ...} for name in ("iss", "sub", "exp", "at_hash")],
)
async def test_unsigned_claims_of_another_token_are_nobodys(issuer: FakeIssuer, changes: dict[str, Any]) -> None:
    token = issuer.issue()
    tokens = await make_scheme(issuer)(make_request(**bearer(token), X_ID_Token=unsigned(issuer, token, **changes)))
    assert tokens is not None
    assert tokens["id"] is None
    assert tokens.get("id", "default") is None


async def test_a_signed_id_token_is_shown_as_it_was_verified(issuer: FakeIssuer) -> None:
    token = issuer.issue(azp="gateway")
    id_token = issuer.id_token(token, nickname="ally")
    tokens = await make_scheme(issuer)(make_request(**bearer(token), X_ID_Token=id_token))
    assert tokens is not None
    assert tokens["id"].raw == id_token
    assert tokens["id"].decoded == tokens["id_token"]
    assert tokens["id"].decoded["nickname"] == "ally"


async def test_what_was_taken_from_the_result_does_not_change_who_it_is(issuer: FakeIssuer) -> None:
    tokens = await make_scheme(issuer)(make_request(**bearer(issuer.issue())))
    assert tokens is not None
    tokens["auth"].decoded["payload"]["sub"] = "admin"
    assert tokens.access_claims["sub"] == tokens["claims"]["sub"] == "u-1"


async def test_the_result_can_be_kept_until_later(issuer: FakeIssuer) -> None:
    token = issuer.issue()
    tokens = await make_scheme(issuer)(make_request(**bearer(token), X_ID_Token=unsigned(issuer, token)))
    assert tokens is not None
    for kept in (copy.copy(tokens), copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert kept["id"].decoded["name"] == "Alice Example"
        assert kept["auth"].raw == token


async def test_no_repr_shows_a_token(issuer: FakeIssuer) -> None:
    token = issuer.issue()
    id_token = unsigned(issuer, token)
    request = make_request(**bearer(token), X_ID_Token=id_token, X_Refresh_Token="refresh-secret")
    tokens = await make_scheme(issuer)(request)
    assert tokens is not None
    shown = [repr(tokens[name]) for name in ("auth", "id", "refresh")]
    assert shown == ["AuthToken()", "IDToken()", "RefreshToken()"]
    shown += [repr(tokens), str(tokens), repr(vars(tokens))]
    for secret in (*token.split("."), id_token, "refresh-secret"):
        assert not any(secret in text for text in shown)
