import asyncio
import base64
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.security import SecurityScopes
from starlette.requests import HTTPConnection

import eoepca_security
import eoepca_security.issuer.provider
from eoepca_security import Client, HttpTransport, OIDCProxyScheme, Provider, SettingsError, require_roles, trust
from eoepca_security.issuer.provider import FAILURE_PAUSE, KEYS_LIFETIME, KEYS_STALE, RETRY_INTERVAL
from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.clock import Clock
from tests.support.fastapi import bearer, get, make_app, make_scheme, open_socket

LONG = 10**6  # seconds: longer than any test's clock goes


@pytest.fixture(scope="module")
def issuer() -> Iterator[FakeIssuer]:
    """An issuer that no test changes."""
    with FakeIssuer(client_id="gateway") as issuer:
        yield issuer


@pytest.fixture
def own_issuer() -> Iterator[FakeIssuer]:
    """An issuer that a test may change."""
    with FakeIssuer(client_id="gateway") as issuer:
        yield issuer


@pytest.fixture(scope="module")
def app(issuer: FakeIssuer) -> FastAPI:
    return make_app(make_scheme(issuer))


def unsigned(claims: Any, *, url_safe: bool = False, padded: bool = True) -> str:
    data = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    return text if padded else text.rstrip("=")


def id_claims(issuer: FakeIssuer, access_token: str, **changes: Any) -> dict[str, Any]:
    """Return the claims that APISIX would send of an ID token; `...` takes one away."""
    half = hashlib.sha256(access_token.encode()).digest()[:16]
    claims = {
        "iss": issuer.url,
        "sub": "u-1",
        "exp": int(time.time()) + 60,
        "at_hash": base64.urlsafe_b64encode(half).rstrip(b"=").decode(),
        "nickname": "ally?>",
        **changes,
    }
    return {name: value for name, value in claims.items() if value is not ...}


# --- the table of the contract ------------------------------------------------------------------------------------


async def test_a_good_token_yields_its_claims(issuer: FakeIssuer, app: FastAPI) -> None:
    token = issuer.issue(scope="read")

    answer = await get(app, bearer(token))

    assert answer.status_code == 200
    found = answer.json()
    assert (found["claims"]["sub"], found["claims"]["preferred_username"], found["claims"]["scope"]) == (
        "u-1",
        "alice",
        "read",
    )
    assert {**found, "claims": ...} == {"claims": ..., "access_token": token, "id_token": None, "refresh_token": None}


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer ", "bearer", "Basic YTpi", "Token x", "DPoP x", "eyJhbGciOi.e.s", "Bearer\tx"]
)
async def test_no_token(issuer: FakeIssuer, app: FastAPI, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}

    answer = await get(app, headers)
    silent = await get(make_app(make_scheme(issuer, auto_error=False)), headers)

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert (silent.status_code, silent.json()) == (200, None)


@pytest.mark.parametrize("name", ["Authorization", "authorization", "AUTHORIZATION"])
@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", " Bearer {} "])
async def test_the_scheme_and_the_header_are_spelled_in_any_case(
    issuer: FakeIssuer, app: FastAPI, name: str, form: str
) -> None:
    assert (await get(app, {name: form.format(issuer.issue())})).status_code == 200


async def test_a_bad_token(issuer: FakeIssuer, app: FastAPI) -> None:
    headers = bearer(issuer.issue(aud="other"))

    answer = await get(app, headers)
    silent = await get(make_app(make_scheme(issuer, auto_error=False)), headers)

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert answer.json() == {"detail": "the token is not for the audience service"}
    assert (silent.status_code, silent.json()) == (200, None)


@pytest.mark.parametrize("header", ["Authorization", "X-ID-Token", "X-Refresh-Token"])
@pytest.mark.parametrize("same", [True, False])
async def test_a_header_that_is_sent_twice(issuer: FakeIssuer, app: FastAPI, header: str, same: bool) -> None:
    token = issuer.issue()
    headers: list[tuple[str, str | bytes]] = [
        ("Authorization", f"Bearer {token}"),
        (header, "x"),
        (header.lower(), "x"),
    ]
    headers = headers if header != "Authorization" else headers[:1] * 2 if same else headers[:2]

    answer = await get(app, headers)
    silent = await get(make_app(make_scheme(issuer, auto_error=False)), headers)

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (400, 'Bearer error="invalid_request"')
    assert (silent.status_code, silent.json()) == (200, None)


@pytest.mark.parametrize(
    "claims",
    [
        {"scope": "read write"},
        {"scope": "other write read"},
        {"scp": ["write", "read"]},
        {"scp": "read write"},
        {"scope": "read", "scp": ["write", 1, None]},
    ],
)
async def test_scopes_that_are_there(issuer: FakeIssuer, app: FastAPI, claims: dict[str, Any]) -> None:
    assert (await get(app, bearer(issuer.issue(**claims)), "/scoped")).status_code == 200


@pytest.mark.parametrize(
    "claims",
    [
        {},
        *({"scope": v} for v in ("", "read", "readwrite", "read,write", "read\twrite", ["read"], 1, None, {"read": 1})),
    ]
    + [{"scp": v} for v in ("read", ["read"], ["read write"], [["read", "write"]], {"read": 1, "write": 1}, True)],
)
async def test_a_scope_that_is_missing(issuer: FakeIssuer, app: FastAPI, claims: dict[str, Any]) -> None:
    headers = bearer(issuer.issue(**claims))

    answer = await get(app, headers, "/scoped")
    silent = await get(make_app(make_scheme(issuer, auto_error=False)), headers, "/scoped")

    challenge = 'Bearer error="insufficient_scope", scope="read write"'
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (403, challenge)
    assert (silent.status_code, silent.json()) == (200, None)


@pytest.mark.parametrize("auto_error", [True, False])
async def test_an_unreachable_issuer(own_issuer: FakeIssuer, auto_error: bool) -> None:
    app = make_app(make_scheme(own_issuer, auto_error=auto_error))
    own_issuer.behaviour.down = True

    answer = await get(app, bearer(own_issuer.issue()))

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert own_issuer.url not in answer.text


async def test_what_an_unreachable_issuer_says_of_retrying_is_passed_on_within_bounds(own_issuer: FakeIssuer) -> None:
    def fault(handler: Handler) -> bool:
        handler.answer(503, {}, {"Retry-After": "7" if len(asked) % 2 else "100000"})
        asked.append(handler.path)
        return True

    asked = ["first"]
    own_issuer.behaviour.fault = fault
    for seconds in ("7", "30"):
        answer = await get(make_app(make_scheme(own_issuer)), bearer(own_issuer.issue()))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, seconds)


async def test_on_a_websocket(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    silent = make_app(make_scheme(own_issuer, auto_error=False))
    token = own_issuer.issue()
    own_issuer.behaviour.down = True
    assert await open_socket(app, bearer(token)) == 1013
    assert await open_socket(silent, bearer(token)) == 1013
    own_issuer.behaviour.down = False
    await asyncio.sleep(FAILURE_PAUSE)

    assert (await open_socket(app, bearer(token)))["claims"]["sub"] == "u-1"
    for headers in ({}, bearer("x"), bearer(own_issuer.issue(exp=1))):
        assert await open_socket(app, headers) == 1008
        assert await open_socket(silent, headers) is None
    assert await open_socket(app, bearer(token), "/realm-role") == 1008


# --- headers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{0}, Bearer {0}", "{0},{0}", "{0} {0}", "{0};", '"{0}"', "{0}=", "{0}\t"])
async def test_a_token_with_anything_besides_is_bad(issuer: FakeIssuer, app: FastAPI, form: str) -> None:
    answer = await get(app, bearer(form.format(issuer.issue())))

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')


@pytest.mark.parametrize("header", ["Authorization", "X-ID-Token", "X-Refresh-Token"])
@pytest.mark.parametrize("value", [b"a.\xff.b", "é.é.é".encode(), b"a.b.\x00c", b"x.y." + b"z" * 1_000_000])
async def test_odd_bytes_are_a_bad_token(issuer: FakeIssuer, app: FastAPI, header: str, value: bytes) -> None:
    genuine = f"Bearer {issuer.issue()}".encode()
    prefix = b"Bearer " if header == "Authorization" else b""
    others: list[tuple[str, str | bytes]] = [("Authorization", genuine)] if header != "Authorization" else []

    answer = await get(app, [*others, (header, prefix + value)])

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')


async def test_underscored_variants_are_other_headers(issuer: FakeIssuer) -> None:
    scheme = make_scheme(issuer, auth_token_header="X-Access-Token", auth_token_in_authorization=False)
    token = issuer.issue()
    variants = {"X_Access_Token": token, "X-Access_Token": token, **bearer(token)}

    assert (await get(make_app(scheme), variants)).status_code == 401
    assert (
        await get(make_app(scheme), {"X-Access-Token": token, "X_Access_Token": "x", "X_ID_Token": "a.b.c"})
    ).json()["id_token"] is None


@pytest.mark.parametrize(
    ("arguments", "value", "status"),
    [
        ({"auth_token_header": "X-Access-Token"}, "{}", 200),
        ({"auth_token_header": "X-Access-Token"}, "Bearer {}", 200),
        ({"auth_token_header": "X-Access-Token", "auth_token_in_authorization": False}, "{}", 200),
        ({"auth_token_header": "X-Access-Token", "auth_token_in_authorization": False}, "Bearer {}", 401),
        ({"auth_token_in_authorization": False}, "{}", 200),
        ({"auth_token_in_authorization": False}, "Bearer {}", 401),
    ],
)
async def test_the_header_of_the_access_token_can_be_chosen(
    issuer: FakeIssuer, arguments: dict[str, Any], value: str, status: int
) -> None:
    app = make_app(make_scheme(issuer, **arguments))
    name = arguments.get("auth_token_header", "Authorization")

    assert (await get(app, {name: value.format(issuer.issue())})).status_code == status


async def test_the_refresh_token_is_handed_on(issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(issuer, require_refresh_token=True))
    headers = bearer(issuer.issue())

    missing = await get(app, headers)

    assert (missing.status_code, missing.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert (await get(app, {**headers, "X-Refresh-Token": "r-1"})).json()["refresh_token"] == "r-1"


async def test_without_required_token_a_request_is_anonymous_but_a_bad_token_is_bad(issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(issuer, require_auth_token=False))
    silent = make_app(make_scheme(issuer, require_auth_token=False, auto_error=False))

    anonymous = await get(app)

    nothing: dict[str, Any] = {"claims": {}, "access_token": None, "id_token": None, "refresh_token": None}
    assert (anonymous.status_code, anonymous.json()) == (200, nothing)
    assert (await get(silent)).json() is None
    assert (await get(silent, {"X-Refresh-Token": "r-1"})).json() is None
    assert (await get(app, bearer("x"))).status_code == 401
    assert (await get(app, bearer(issuer.issue()))).json()["claims"]["sub"] == "u-1"
    assert (await get(app, {}, "/scoped")).headers["WWW-Authenticate"] == "Bearer"
    for protected in (app, silent):
        assert (await get(protected, {}, "/realm-role")).status_code == 401


# --- tokens that are bound to a key -------------------------------------------------------------------------------


BINDINGS: list[Any] = [{"jkt": "x"}, {"x5t#S256": "x"}, {}, None, "x", []]


@pytest.mark.parametrize("cnf", BINDINGS)
async def test_a_bound_token_is_refused_unless_a_gateway_has_verified_it(
    issuer: FakeIssuer, app: FastAPI, cnf: object
) -> None:
    behind_gateway = make_app(make_scheme(issuer, bound_tokens="gateway"))
    headers = bearer(issuer.issue(cnf=cnf))

    answer, silent = await get(app, headers), await get(make_app(make_scheme(issuer, auto_error=False)), headers)

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert "bound to a key (cnf)" in answer.json()["detail"]
    assert silent.json() is None
    assert await open_socket(app, headers) == 1008
    assert (await get(behind_gateway, headers)).json()["claims"]["cnf"] == cnf
    assert (await get(behind_gateway, bearer(issuer.issue()))).status_code == 200
    assert (await get(behind_gateway, bearer(issuer.issue(cnf=cnf, token_use="id")))).status_code == 401


@pytest.mark.parametrize("cnf", BINDINGS)
async def test_a_bound_id_token_is_refused_where_it_stands_alone(issuer: FakeIssuer, cnf: object) -> None:
    alone = {"require_auth_token": False, "authorized_parties": ["gateway"]}
    access_token = issuer.issue(azp="gateway")
    headers = {"X-ID-Token": issuer.id_token(access_token, cnf=cnf)}

    answer = await get(make_app(make_scheme(issuer, **alone)), headers)

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert (await get(make_app(make_scheme(issuer, **alone, bound_tokens="gateway")), headers)).status_code == 200
    beside = await get(make_app(make_scheme(issuer)), {**headers, **bearer(access_token)})
    assert beside.json()["id_token"]["cnf"] == cnf


# --- ID tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA"])
async def test_a_signed_id_token_joins_its_claims_and_overrides_none(algorithm: str) -> None:
    with FakeIssuer(client_id="gateway", algorithm=algorithm) as issuer:
        access_token = issuer.issue(azp="gateway", email="verified@example")
        id_token = issuer.id_token(access_token, nickname="ally", email="other@example")

        found = (await get(make_app(make_scheme(issuer)), {**bearer(access_token), "X-ID-Token": id_token})).json()

    assert (found["claims"]["nickname"], found["claims"]["email"]) == ("ally", "verified@example")
    assert (found["claims"]["aud"], found["id_token"]["aud"]) == ("service", "gateway")


@pytest.mark.parametrize("audience", ["gateway", "service", "party", ["x", "party"]])
async def test_the_client_of_an_id_token_is_a_known_one(issuer: FakeIssuer, audience: object) -> None:
    app = make_app(make_scheme(issuer, authorized_parties=["gateway", "party"]))
    access_token = issuer.issue(azp="gateway")
    headers = {**bearer(access_token), "X-ID-Token": issuer.id_token(access_token, aud=audience, azp="party")}

    assert (await get(app, headers)).status_code == 200


BAD_ID_TOKENS: dict[str, dict[str, Any]] = {
    "another client": {"aud": "other"},
    "no client": {"aud": []},
    "azp of another client": {"azp": "other"},
    "odd azp": {"azp": ["gateway"]},
    "another user": {"sub": "u-2"},
    "another issuer": {"iss": "https://evil.example"},
    "another access token": {"at_hash": "A" * 22},
    "hash of another algorithm": {"at_hash": "A" * 43},
    "hash of an unknown algorithm": {"at_hash": "A" * 21},
    "no text as hash": {"at_hash": 1},
    "empty hash": {"at_hash": ""},
    "expired": {"exp": 1},
    "access token": {"typ": "Bearer"},
    "Cognito's access token": {"token_use": "access"},
    "Curity's access token": {"purpose": "access_token"},
    "logout token": {"events": {}},
}


@pytest.mark.parametrize("case", BAD_ID_TOKENS)
async def test_a_bad_id_token_is_a_bad_token(issuer: FakeIssuer, app: FastAPI, case: str) -> None:
    access_token = issuer.issue(azp="gateway")
    headers = {**bearer(access_token), "X-ID-Token": issuer.id_token(access_token, **BAD_ID_TOKENS[case])}

    answer = await get(app, headers)

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')


async def test_an_id_token_of_other_keys_is_a_bad_token(issuer: FakeIssuer, app: FastAPI) -> None:
    access_token = issuer.issue(azp="gateway")
    with FakeIssuer(client_id="gateway") as stranger:
        stranger.url, stranger.kid = issuer.url, issuer.kid
        forged = stranger.id_token(access_token)

    for id_token in (forged, "a.b.c", "eyJhbGciOiJub25lIn0.e30.", access_token + "x"):
        assert (await get(app, {**bearer(access_token), "X-ID-Token": id_token})).status_code == 401


async def test_an_access_token_of_type_at_jwt_is_no_id_token(issuer: FakeIssuer, app: FastAPI) -> None:
    access_token = issuer.issue(azp="gateway")
    other = issuer.sign({**issuer_claims(issuer), "aud": "gateway"}, {"typ": "at+jwt"})

    assert (await get(app, {**bearer(access_token), "X-ID-Token": other})).status_code == 401


def issuer_claims(issuer: FakeIssuer) -> dict[str, Any]:
    return {"iss": issuer.url, "aud": "service", "sub": "u-1", "exp": int(time.time()) + 60}


async def test_without_at_hash_a_signed_id_token_is_bound_by_issuer_and_subject(
    issuer: FakeIssuer, app: FastAPI
) -> None:
    access_token = issuer.issue(azp="gateway")
    claims = {**issuer_claims(issuer), "aud": "gateway", "nickname": "ally"}
    headers = {**bearer(access_token), "X-ID-Token": issuer.sign(claims)}

    assert (await get(app, headers)).json()["claims"]["nickname"] == "ally"


async def test_a_signed_id_token_alone_is_enough_without_required_access_token(issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(issuer, require_auth_token=False, authorized_parties=["gateway"]))
    id_token = issuer.id_token("none", scope="read write", realm_access={"roles": ["admin", "editor"]})

    found = (await get(app, {"X-ID-Token": id_token})).json()

    assert (found["claims"]["sub"], found["access_token"]) == ("u-1", None)
    assert (await get(app, {"X-ID-Token": id_token}, "/scoped")).status_code == 401
    assert (await get(app, {"X-ID-Token": id_token}, "/realm-role")).status_code == 403
    assert (await get(app, {"X-ID-Token": unsigned(id_claims(issuer, "none"))})).json()["claims"] == {}


@pytest.mark.parametrize("url_safe", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("pad", ["", "x", "xx"])
async def test_unsigned_id_claims_are_ignored_unless_they_are_trusted(
    issuer: FakeIssuer, app: FastAPI, url_safe: bool, padded: bool, pad: str
) -> None:
    trusting = make_app(make_scheme(issuer, trust_unsigned_id_token=True, require_id_token=True))
    token = issuer.issue(email="verified@example")
    claims = id_claims(issuer, token, email="forged@example", pad=pad)
    headers = {**bearer(token), "X-ID-Token": unsigned(claims, url_safe=url_safe, padded=padded)}

    ignoring, trusted = (await get(app, headers)).json(), (await get(trusting, headers)).json()

    assert (ignoring["id_token"], "nickname" in ignoring["claims"]) == (None, False)
    assert (trusted["id_token"], trusted["claims"]["nickname"]) == (claims, "ally?>")
    assert trusted["claims"]["email"] == "verified@example"


MISFITS: dict[str, Any] = {
    "another issuer": {"iss": "https://evil.example"},
    "no issuer": {"iss": ...},
    "another user": {"sub": "u-2"},
    "no user": {"sub": ...},
    "expired": {"exp": 1},
    "no expiry": {"exp": ...},
    "odd expiry": {"exp": "2099"},
    "another access token": {"at_hash": "A" * 22},
    "no at_hash": {"at_hash": ...},
    "empty at_hash": {"at_hash": ""},
    "odd at_hash": {"at_hash": [1]},
    "at_hash beyond ASCII": {"at_hash": "é" * 22},
}


@pytest.mark.parametrize("case", MISFITS)
async def test_unsigned_id_claims_that_do_not_fit_never_reach_the_claims(issuer: FakeIssuer, case: str) -> None:
    token = issuer.issue()
    headers = {**bearer(token), "X-ID-Token": unsigned(id_claims(issuer, token, **MISFITS[case]))}

    found = (await get(make_app(make_scheme(issuer, trust_unsigned_id_token=True)), headers)).json()
    demanding = make_scheme(issuer, trust_unsigned_id_token=True, require_id_token=True)

    assert (found["id_token"], "nickname" in found["claims"]) == (None, False)
    assert (await get(make_app(demanding), headers)).headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("hash_name", ["sha256", "sha384", "sha512"])
async def test_the_hash_of_unsigned_claims_is_known_by_its_length(issuer: FakeIssuer, hash_name: str) -> None:
    app = make_app(make_scheme(issuer, trust_unsigned_id_token=True))
    token = issuer.issue()
    digest = hashlib.new(hash_name, token.encode()).digest()
    at_hash = base64.urlsafe_b64encode(digest[: len(digest) // 2]).rstrip(b"=").decode()
    headers = {**bearer(token), "X-ID-Token": unsigned(id_claims(issuer, token, at_hash=at_hash))}

    assert (await get(app, headers)).json()["claims"]["nickname"] == "ally?>"


@pytest.mark.parametrize(
    "value", ["%%%", "e30", "bnVsbA==", "[]", unsigned(b"\xff\xfe{"), unsigned(b'{"a":1,"a":2}'), "=", "A" * 30_000]
)
@pytest.mark.parametrize("trusted", [True, False])
async def test_what_is_no_id_token_at_all_is_ignored(issuer: FakeIssuer, value: str, trusted: bool) -> None:
    app = make_app(make_scheme(issuer, trust_unsigned_id_token=trusted))

    answer = await get(app, {**bearer(issuer.issue()), "X-ID-Token": value})

    assert (answer.status_code, answer.json()["id_token"]) == (200, None)


async def test_a_required_id_token(issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(issuer, require_id_token=True))
    token = issuer.issue(azp="gateway")
    for headers in ({}, {"X-ID-Token": ""}, {"X-ID-Token": unsigned(id_claims(issuer, token))}):
        answer = await get(app, {**bearer(token), **headers})
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")

    assert (await get(app, {**bearer(token), "X-ID-Token": issuer.id_token(token)})).status_code == 200


# --- who may do what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"azp": "gateway"}, 200),
        ({"client_id": "gateway"}, 200),
        ({"azp": "gateway", "client_id": "other"}, 200),
        ({"azp": "other", "client_id": "gateway"}, 401),
        ({"azp": "gate"}, 401),
        ({"azp": ["gateway"]}, 401),
        ({"azp": {"gateway": 1}}, 401),
        ({}, 401),
    ],
)
async def test_authorized_parties(issuer: FakeIssuer, claims: dict[str, Any], status: int) -> None:
    app = make_app(make_scheme(issuer, authorized_parties=["gateway", "other-gateway"]))

    assert (await get(app, bearer(issuer.issue(**claims)))).status_code == status


@pytest.mark.parametrize(
    ("path", "claims", "status"),
    [
        ("/realm-role", {"realm_access": {"roles": ["x", "editor", "admin"]}}, 200),
        ("/realm-role", {"realm_access": {"roles": ["admin"]}}, 403),
        ("/realm-role", {"resource_access": {"my-client": {"roles": ["admin", "editor"]}}}, 403),
        ("/client-role", {"resource_access": {"my-client": {"roles": ["admin"]}}, "scope": "read"}, 200),
        ("/client-role", {"resource_access": {"my-client": {"roles": ["admin"]}}}, 403),
        ("/client-role", {"resource_access": {"other": {"roles": ["admin"]}}, "scope": "read"}, 403),
        ("/client-role", {"realm_access": {"roles": ["admin"]}, "scope": "read"}, 403),
    ],
)
async def test_roles(issuer: FakeIssuer, app: FastAPI, path: str, claims: dict[str, Any], status: int) -> None:
    answer = await get(app, bearer(issuer.issue(**claims)), path)

    assert answer.status_code == status
    assert status == 200 or answer.headers["WWW-Authenticate"].startswith('Bearer error="insufficient_scope"')


ODD: list[Any] = [None, True, 1, "admin", "admin editor", [], ["admin", "editor"], {}, {"admin": 1}, [[]], [{}]]


@pytest.mark.parametrize("odd", ODD)
async def test_odd_roles_are_no_roles(issuer: FakeIssuer, app: FastAPI, odd: Any) -> None:
    realm = [odd, *([{"roles": odd}] if odd != ["admin", "editor"] else [])]
    client = [odd, {"my-client": odd}, {"my-client": {"roles": odd if odd != ["admin", "editor"] else [odd]}}]
    tokens = [("/realm-role", {"realm_access": value}) for value in realm]
    tokens += [("/client-role", {"resource_access": value, "scope": "read"}) for value in client]

    for path, claims in tokens:
        assert (await get(app, bearer(issuer.issue(**claims)), path)).status_code == 403, claims


async def test_roles_are_never_those_of_an_id_token(issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(issuer, trust_unsigned_id_token=True))
    token = issuer.issue(azp="gateway")
    more = {"realm_access": {"roles": ["admin", "editor"]}, "scope": "read write"}

    for id_token in (unsigned(id_claims(issuer, token, **more)), issuer.id_token(token, **more)):
        headers = {**bearer(token), "X-ID-Token": id_token}
        assert (await get(app, headers)).json()["claims"]["realm_access"] == more["realm_access"]
        for path in ("/realm-role", "/scoped"):
            assert (await get(app, headers, path)).status_code == 403


async def test_roles_need_an_authentication_even_where_the_scheme_raises_no_errors(issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(issuer, auto_error=False))

    answer = await get(app, {}, "/realm-role")

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert await open_socket(app, {}, "/realm-role") == 1008


# --- issuers whose access tokens differ ---------------------------------------------------------------------------


async def test_tokens_without_subject_as_of_keycloak_without_its_scope_basic(issuer: FakeIssuer, app: FastAPI) -> None:
    access_token = issuer.issue(azp="gateway")
    claims = {name: value for name, value in issuer_claims(issuer).items() if name != "sub"}
    token = issuer.sign({**claims, "azp": "gateway"})
    lenient = make_app(make_scheme(issuer, require_subject=False))

    assert (await get(app, bearer(token))).status_code == 401
    found = await get(lenient, bearer(token))
    assert (found.status_code, "sub" in found.json()["claims"]) == (200, False)
    assert (await get(lenient, bearer(access_token))).json()["claims"]["sub"] == "u-1"
    for subject in ("", None, 1):
        assert (await get(lenient, bearer(issuer.sign({**claims, "sub": subject})))).status_code == 401

    # The ID token says who it is, if it belongs to this access token for certain.
    own, others = issuer.id_token(token), issuer.id_token(access_token)
    assert (await get(lenient, {**bearer(token), "X-ID-Token": own})).json()["claims"]["sub"] == "u-1"
    without_hash = issuer.sign({**issuer_claims(issuer), "aud": "gateway"})
    for stray in (others, without_hash):
        assert (await get(lenient, {**bearer(token), "X-ID-Token": stray})).status_code == 401


async def test_access_tokens_that_look_like_id_tokens_as_those_of_dex(issuer: FakeIssuer, app: FastAPI) -> None:
    lenient = make_app(make_scheme(issuer, id_tokens_as_access_tokens=True))
    dex = {"aud": ["service", "gateway"], "azp": "gateway", "at_hash": "A" * 22, "nonce": "n-1"}
    token = issuer.sign({**issuer_claims(issuer), **dex})

    assert (await get(app, bearer(token))).status_code == 401
    assert (await get(lenient, bearer(token))).json()["claims"]["sub"] == "u-1"
    id_token = issuer.id_token(token, typ="ID", nonce="n-1")
    assert (await get(lenient, {**bearer(token), "X-ID-Token": id_token})).status_code == 200
    others: list[dict[str, Any]] = [{"aud": "gateway"}, {"typ": "ID"}, {"c_hash": "x"}, {"events": {}}]
    for other in (*others, {"token_use": "id"}):
        assert (await get(lenient, bearer(issuer.sign({**issuer_claims(issuer), **dex, **other})))).status_code == 401


class AdFs(FakeIssuer):
    """An issuer that has another name in access tokens, as AD FS does."""

    trust_name = "http://127.0.0.1/adfs/services/trust"

    def discovery(self) -> dict[str, Any]:
        return {**super().discovery(), "access_token_issuer": self.trust_name}


async def test_access_tokens_of_ad_fs() -> None:
    with AdFs(client_id="gateway", path="/adfs") as issuer:
        app = make_app(make_scheme(issuer))
        token = issuer.issue(iss=issuer.trust_name, azp="gateway")
        headers = {**bearer(token), "X-ID-Token": issuer.id_token(token, nickname="ally")}

        found = (await get(app, headers)).json()
        assert (found["claims"]["iss"], found["claims"]["nickname"]) == (issuer.trust_name, "ally")
        assert (await get(app, bearer(issuer.issue()))).status_code == 401
        stray = {**bearer(token), "X-ID-Token": issuer.id_token(token, iss=issuer.trust_name)}
        assert (await get(app, stray)).status_code == 401


async def test_an_issuer_does_not_speak_for_another_host() -> None:
    with AdFs() as issuer:
        issuer.trust_name = "https://issuer.example"
        app = make_app(make_scheme(issuer))

        assert (await get(app, bearer(issuer.issue(iss=issuer.trust_name)))).status_code == 401
        assert (await get(app, bearer(issuer.issue()))).status_code == 200


# --- keys ---------------------------------------------------------------------------------------------------------


def with_clock(scheme: OIDCProxyScheme, issuer: FakeIssuer) -> Clock:
    clock = Clock(time.time())
    scheme._provider = Provider(issuer.url, Client("x"), HttpTransport(trust()), now=clock)
    return clock


async def test_warm_requests_ask_the_issuer_nothing_and_unknown_keys_once(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    headers = bearer(own_issuer.issue())
    assert (await get(app, headers)).status_code == 200
    own_issuer.fetches.clear()

    statuses = {(await get(app, headers)).status_code for _ in range(300)}
    assert (statuses, sum(own_issuer.fetches.values())) == ({200}, 0)
    for number in range(300):
        token = own_issuer.sign({**issuer_claims(own_issuer)}, {"kid": f"unknown-{number}"})
        assert (await get(app, bearer(token))).status_code == 401
    assert own_issuer.fetches == {"certs": 1}


async def test_what_is_refused_anyway_causes_no_fetch(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    expired, other = own_issuer.issue(exp=1), own_issuer.issue(aud="other")
    for token in (
        "x",
        "a.b.c",
        expired,
        other,
        own_issuer.issue(typ="ID"),
        own_issuer.issue(sub=""),
        own_issuer.issue(cnf={}),
    ):
        assert (await get(app, bearer(token))).status_code == 401
    assert not own_issuer.fetches
    assert (await get(app, bearer(own_issuer.issue()))).status_code == 200

    assert (await get(app, bearer(own_issuer.sign({**issuer_claims(own_issuer), "iss": "x"}, {"kid": "x"})))).is_error
    assert own_issuer.fetches == {"openid-configuration": 1, "certs": 1}


async def test_cold_requests_share_one_fetch(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    headers = bearer(own_issuer.issue())

    answers = await asyncio.gather(*(get(app, headers) for _ in range(50)))

    assert {answer.status_code for answer in answers} == {200}
    assert own_issuer.fetches == {"openid-configuration": 1, "certs": 1}


async def test_a_rotated_key_is_found_at_once(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    assert (await get(app, bearer(own_issuer.issue()))).status_code == 200
    own_issuer.rotate_keys()

    answers = await asyncio.gather(*(get(app, bearer(own_issuer.issue())) for _ in range(5)))

    assert {answer.status_code for answer in answers} == {200}
    assert own_issuer.fetches["certs"] == 2


async def test_a_key_that_was_replaced_under_its_name_is_found_at_once(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    assert (await get(app, bearer(own_issuer.issue()))).status_code == 200
    kid = own_issuer.kid
    own_issuer.rotate_keys()
    own_issuer.kid = kid

    answers = await asyncio.gather(*(get(app, bearer(own_issuer.issue())) for _ in range(5)))

    assert {answer.status_code for answer in answers} == {200}
    assert own_issuer.fetches["certs"] == 2


async def test_a_flood_of_invalid_signatures_holds_up_nothing_and_causes_one_fetch(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    good = bearer(own_issuer.issue())
    assert (await get(app, good)).status_code == 200
    bad = bearer(f"{good['Authorization'].removeprefix('Bearer ').rpartition('.')[0]}.{'A' * 86}")
    own_issuer.behaviour.fault = hanging = Hanging("/certs")
    waiting = [asyncio.create_task(get(app, bad)) for _ in range(60)]
    try:
        assert await asyncio.to_thread(hanging.entered.wait, 10)
        assert (await get(app, good)).status_code == 200
        assert not any(task.done() for task in waiting)
    finally:
        hanging.released.set()

    assert {(await task).status_code for task in waiting} == {401}
    assert {(await get(app, bad)).status_code for _ in range(60)} == {401}
    assert own_issuer.fetches["certs"] == 2


class Hanging:
    """A fault in which requests for `path` hang until they are released."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.entered = threading.Event()
        self.released = threading.Event()

    def __call__(self, handler: Handler) -> bool:
        if handler.path.endswith(self._path):
            self.entered.set()
            self.released.wait(10)
        return False


@pytest.mark.parametrize("path", ["/openid-configuration", "/certs"])
async def test_an_issuer_that_hangs_holds_up_nothing_else(own_issuer: FakeIssuer, path: str) -> None:
    app = make_app(make_scheme(own_issuer))
    own_issuer.behaviour.fault = hanging = Hanging(path)
    headers = bearer(own_issuer.issue())
    # More than the default thread pools have threads.
    waiting = [asyncio.create_task(get(app, headers)) for _ in range(60)]
    try:
        assert await asyncio.to_thread(hanging.entered.wait, 10)
        assert (await get(app, {}, "/open")).status_code == 200
        assert (await get(app, bearer("x"))).status_code == 401
        assert not any(task.done() for task in waiting)
        waiting.pop().cancel()  # one that gives up takes nothing from the others
    finally:
        hanging.released.set()

    assert {(await task).status_code for task in waiting} == {200}
    assert own_issuer.fetches == {"openid-configuration": 1, "certs": 1}


async def test_the_wait_for_an_issuer_that_hangs_is_bounded(
    own_issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eoepca_security.issuer.provider, "MAX_WAIT", 0.05)
    app = make_app(make_scheme(own_issuer))
    own_issuer.behaviour.fault = hanging = Hanging("/certs")
    headers = bearer(own_issuer.issue())
    try:
        assert [(await get(app, headers)).status_code for _ in range(2)] == [503, 503]
    finally:
        hanging.released.set()
    monkeypatch.setattr(eoepca_security.issuer.provider, "MAX_WAIT", 5)

    assert (await get(app, headers)).status_code == 200
    assert own_issuer.fetches["certs"] == 1


async def test_old_keys_serve_for_a_bounded_time_while_the_issuer_is_down(own_issuer: FakeIssuer) -> None:
    scheme = make_scheme(own_issuer)
    clock = with_clock(scheme, own_issuer)
    app, headers = make_app(scheme), bearer(own_issuer.issue(exp=int(time.time()) + LONG))
    assert (await get(app, headers)).status_code == 200
    own_issuer.behaviour.down = True
    began = clock.time
    clock.time = began + KEYS_LIFETIME + 1
    for _ in range(3):
        assert (await get(app, headers)).status_code == 200
    assert own_issuer.fetches["certs"] == 2

    clock.time = began + KEYS_STALE - 10
    assert (await get(app, headers)).status_code == 200
    clock.time = began + KEYS_STALE + RETRY_INTERVAL
    assert [(await get(app, headers)).status_code for _ in range(3)] == [503] * 3
    own_issuer.behaviour.down = False
    clock.time += FAILURE_PAUSE + 1
    assert (await get(app, headers)).status_code == 200


async def test_a_withdrawn_key_is_not_trusted_any_more(own_issuer: FakeIssuer) -> None:
    scheme = make_scheme(own_issuer)
    clock = with_clock(scheme, own_issuer)
    app, headers = make_app(scheme), bearer(own_issuer.issue(exp=int(time.time()) + LONG))
    assert (await get(app, headers)).status_code == 200
    own_issuer.rotate_keys()
    clock.time += KEYS_LIFETIME + 1

    assert (await get(app, headers)).status_code == 401


async def test_a_failure_is_shared_for_a_moment_and_logged_once(
    own_issuer: FakeIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = make_scheme(own_issuer)
    clock = with_clock(scheme, own_issuer)
    app, headers = make_app(scheme), bearer(own_issuer.issue())
    own_issuer.behaviour.down = True
    for _ in range(20):
        assert (await get(app, headers)).status_code == 503
    assert own_issuer.fetches == {"openid-configuration": 1}
    assert [record.getMessage().startswith("requests get 503: ") for record in caplog.records] == [True]
    assert scheme._reported is not None
    assert scheme._reported.__traceback__ is None  # it would keep the tokens of the requests that share it
    own_issuer.behaviour.down = False
    clock.time += FAILURE_PAUSE + 1

    assert (await get(app, headers)).status_code == 200


async def test_a_failure_is_shared_for_as_long_as_it_took(own_issuer: FakeIssuer) -> None:
    scheme = make_scheme(own_issuer)
    clock = with_clock(scheme, own_issuer)

    def fault(handler: Handler) -> bool:
        clock.time += 5
        handler.answer(500, {})
        return True

    app, headers = make_app(scheme), bearer(own_issuer.issue())
    own_issuer.behaviour.fault = fault
    for ahead, attempts in ((0, 1), (4, 1), (1.5, 2)):
        clock.time += ahead
        assert (await get(app, headers)).status_code == 503
        assert own_issuer.fetches == {"openid-configuration": attempts}


def redirecting(handler: Handler) -> bool:
    if handler.path.endswith("/certs"):
        handler.answer(302, {}, {"Location": "/realms/test/other"})
        return True
    return False


def speaking_for_another(handler: Handler) -> bool:
    if handler.path.endswith("/openid-configuration"):
        handler.answer(200, {"issuer": "https://other.example", "token_endpoint": "https://other.example/t"})
        return True
    return False


@pytest.mark.parametrize("fault", [redirecting, speaking_for_another])
async def test_an_issuer_that_cannot_be_believed_is_unavailable(own_issuer: FakeIssuer, fault: Any) -> None:
    own_issuer.behaviour.fault = fault

    assert (await get(make_app(make_scheme(own_issuer)), bearer(own_issuer.issue()))).status_code == 503
    assert "other" not in own_issuer.fetches


async def test_when_no_thread_can_be_started_the_next_request_tries_again(
    own_issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = make_scheme(own_issuer)
    clock = with_clock(scheme, own_issuer)

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert (await get(make_app(scheme), bearer(own_issuer.issue()))).status_code == 503
    clock.time += 1
    assert (await get(make_app(scheme), bearer(own_issuer.issue()))).status_code == 200


def test_one_scheme_serves_several_event_loops(own_issuer: FakeIssuer) -> None:
    app = make_app(make_scheme(own_issuer))
    for _ in range(2):
        assert asyncio.run(get(app, bearer(own_issuer.issue()))).status_code == 200
        own_issuer.rotate_keys()


# --- the scheme itself --------------------------------------------------------------------------------------------


def test_it_shows_in_the_api_description(issuer: FakeIssuer) -> None:
    document = make_app(make_scheme(issuer, description="Log in.")).openapi()

    assert document["components"]["securitySchemes"] == {
        "OIDCProxyScheme": {
            "type": "openIdConnect",
            "description": "Log in.",
            "openIdConnectUrl": f"{issuer.url}/.well-known/openid-configuration",
        }
    }
    assert document["paths"]["/scoped"]["get"]["security"] == [{"OIDCProxyScheme": ["read", "write"]}]
    assert document["paths"]["/realm-role"]["get"]["security"] == [{"OIDCProxyScheme": []}]
    assert list(make_app(make_scheme(issuer, scheme_name="own")).openapi()["components"]["securitySchemes"]) == ["own"]


async def test_the_discovery_documents_url_will_do(issuer: FakeIssuer) -> None:
    scheme = make_scheme(issuer, openIdConnectUrl=f"{issuer.url}/.well-known/openid-configuration")

    assert (await get(make_app(scheme), bearer(issuer.issue()))).status_code == 200


async def test_the_discovery_documents_url_may_have_a_query(own_issuer: FakeIssuer) -> None:
    asked = []

    def note(handler: Handler) -> bool:
        asked.append(handler.path)
        return False

    own_issuer.behaviour.fault = note
    url = f"{own_issuer.url}/.well-known/openid-configuration?p=B2C_1_login"
    scheme = make_scheme(own_issuer, openIdConnectUrl=url)

    assert (await get(make_app(scheme), bearer(own_issuer.issue()))).status_code == 200
    assert asked[0].endswith("/realms/test/.well-known/openid-configuration?p=B2C_1_login")
    assert scheme.model.model_dump()["openIdConnectUrl"] == url


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"audience": ""}, "audience"),
        ({"audience": " "}, "audience"),
        ({"audience": None}, "audience"),
        ({"audience": ["service"]}, "audience"),
        ({"openIdConnectUrl": "http://issuer.example/realms/x"}, "openIdConnectUrl must use https://"),
        ({"openIdConnectUrl": "issuer"}, "openIdConnectUrl"),
        ({"openIdConnectUrl": ""}, "openIdConnectUrl"),
        ({"openIdConnectUrl": None}, "openIdConnectUrl"),
        ({"openIdConnectUrl": "https://issuer.example/v2.0?p=x"}, r"openIdConnectUrl has a \? part"),
        ({"openIdConnectUrl": "https://issuer.example/v2.0#x"}, "openIdConnectUrl has a # part"),
        ({"leeway": -1}, "leeway"),
        ({"leeway": "10"}, "leeway"),
        ({"leeway": True}, "leeway"),
        ({"leeway": float("nan")}, "leeway"),
        ({"leeway": float("inf")}, "leeway"),
        ({"authorized_parties": "gateway"}, "authorized_parties"),
        ({"authorized_parties": []}, "authorized_parties"),
        ({"authorized_parties": [1]}, "authorized_parties"),
        *(
            ({"bound_tokens": value}, '"refuse" or "gateway"')
            for value in ("dpop", "", "Gateway", None, True, ["refuse"])
        ),
        ({"auth_token_header": ""}, "auth_token_header"),
        ({"id_token_header": "X ID"}, "id_token_header"),
        ({"refresh_token_header": None}, "refresh_token_header"),
        ({"id_token_header": "AUTHORIZATION"}, "three different headers"),
        ({"require_auth_token": False, "require_refresh_token": True}, "require_refresh_token"),
        ({"require_subject": False, "trust_unsigned_id_token": True}, "trust_unsigned_id_token needs require_subject"),
        *(
            ({name: value}, f"{name} must be True or False")
            for name in ("require_subject", "id_tokens_as_access_tokens")
            for value in ("refuse", "false", 1, 0, None)
        ),
    ],
)
def test_misuse_is_told_when_the_scheme_is_made(issuer: FakeIssuer, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named) as caught:
        make_scheme(issuer, **arguments)
    assert isinstance(caught.value, ValueError)
    assert len(caught.value.problems) == 1
    assert "DANGEROUSLY" not in str(caught.value)


def test_all_problems_are_told_together(issuer: FakeIssuer) -> None:
    with pytest.raises(SettingsError) as caught:
        make_scheme(issuer, audience="", leeway=-1)
    assert len(caught.value.problems) == 2


def test_roles_have_to_be_named(issuer: FakeIssuer) -> None:
    with pytest.raises(SettingsError, match="roles"):
        require_roles(make_scheme(issuer))


async def test_the_result_is_a_mapping_that_is_shown_without_its_values(issuer: FakeIssuer) -> None:
    token = issuer.issue()
    headers = [(b"authorization", f"Bearer {token}".encode()), (b"x-refresh-token", b"r-1")]
    scheme = make_scheme(issuer)

    found = await scheme(HTTPConnection({"type": "http", "headers": headers}), SecurityScopes())

    assert found is not None
    assert isinstance(found, dict)
    assert (found["access_token"], found["claims"]["sub"]) == (token, "u-1")
    assert repr(found) == str(found) == f"{found}" == "Authentication(claims, access_token, refresh_token)"


async def test_no_token_is_logged(issuer: FakeIssuer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    app = make_app(make_scheme(issuer, trust_unsigned_id_token=True))
    token = issuer.issue()
    secrets = [token, issuer.issue(aud="other"), issuer.issue(exp=1), "not-a-token-but-secret"]
    for secret in secrets:
        answer = await get(app, {**bearer(secret), "X-Refresh-Token": "refresh-secret", "X-ID-Token": "id-secret"})
        for text in (caplog.text, answer.text if answer.is_error else "", str(answer.headers)):
            assert not any(part in text for part in [*secret.split("."), "refresh-secret", "id-secret"])


# --- the package --------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_importing_the_package_imports_neither_fastapi_nor_mitmproxy() -> None:
    modules = "{'fastapi', 'starlette', 'mitmproxy'} & set(sys.modules)"
    assert run_python(f"import sys, eoepca_security, eoepca_security.testing.issuer; print({modules})") == "set()\n"


def test_without_fastapi_the_scheme_names_the_remedy() -> None:
    code = """
import sys
sys.modules["fastapi"] = None
from eoepca_security import *
import eoepca_security
import importlib.util
try:
    from eoepca_security import OIDCProxyScheme
except ImportError as error:
    print(error)
"""
    assert run_python(code) == (
        "OIDCProxyScheme needs FastAPI: run `pip install '.[fastapi]'` in the folder of the source\n"
    )


def test_the_names_of_fastapi_are_listed_and_others_do_not_exist() -> None:
    assert {"Authentication", "OIDCProxyScheme", "require_roles", "TokenSource"} <= set(dir(eoepca_security))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        eoepca_security.nonsense  # noqa: B018
