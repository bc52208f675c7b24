"""Tests of what other tests, and the demo, stand on: FakeIssuer and LocalServer."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlencode, urlsplit

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from eoepca_security.oauth.protocol import (
    ACCESS_TOKEN_TYPE,
    EXCHANGE_GRANT,
    Client,
    PrivateKey,
    ProviderMetadata,
    build_token_request,
)
from eoepca_security.oauth.verify import (
    Policy,
    TrustedKeys,
    id_token_mismatch,
    matching_keys,
    read_access_token,
    read_header,
    read_id_token,
    read_keys,
    unverified_claims,
)
from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.issuer import ALL_AUTH_METHODS
from eoepca_security.testing.local_server import Handler, LocalServer

SECRET = "a-secret-of-the-client-that-is-long-enough"
PATIENCE = 5.0


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@dataclass(frozen=True)
class Reply:
    status: int
    members: dict[str, Any]


def post(issuer: FakeIssuer, authorization: str | None = None, **form: str) -> Reply:
    return Reply(*issuer.answer_token_request(authorization, urlencode(form).encode()))


def refresh(issuer: FakeIssuer, refresh_token: str) -> Reply:
    return post(issuer, grant_type="refresh_token", refresh_token=refresh_token, client_id="client")


# --- over the network ---------------------------------------------------------------------------------------------


def test_discovery_names_the_issuers_own_endpoints(issuer: FakeIssuer, http: requests.Session) -> None:
    discovery = http.get(issuer.url + "/.well-known/openid-configuration")
    document = discovery.json()

    assert discovery.status_code == 200
    assert document["issuer"] == issuer.url
    assert document["token_endpoint_auth_methods_supported"] == list(ALL_AUTH_METHODS)
    assert set(document["grant_types_supported"]) >= {"refresh_token", "client_credentials", "authorization_code"}
    assert http.get(document["jwks_uri"]).json() == issuer.jwks()
    form = {"grant_type": "refresh_token", "refresh_token": issuer.refresh_token, "client_id": "client"}
    answer = http.post(document["token_endpoint"], data=form)
    assert (answer.status_code, answer.json()["token_type"]) == (200, "Bearer")


def test_credentials_in_a_header_are_looked_at(http: requests.Session) -> None:
    with FakeIssuer(client_secret=SECRET) as issuer:
        form = {"grant_type": "client_credentials"}
        answers = [http.post(issuer.url + "/token", form, auth=("client", secret)) for secret in (SECRET, "wrong")]

    assert [answer.status_code for answer in answers] == [200, 401]


def test_an_issuer_ends_with_its_block() -> None:
    with FakeIssuer() as issuer:
        port = urlsplit(issuer.url).port

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), PATIENCE)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/token"), ("GET", "/nothing"), ("GET", ""), ("POST", "/certs"), ("PUT", "/certs")]
)
def test_anything_else_is_not_found(issuer: FakeIssuer, http: requests.Session, method: str, path: str) -> None:
    assert http.request(method, issuer.url + path).status_code == 404


def test_a_fault_answers_instead_of_the_issuer_until_it_is_taken_away(
    issuer: FakeIssuer, http: requests.Session
) -> None:
    seen: list[tuple[str, str]] = []

    def fault(handler: Handler) -> bool:
        seen.append((handler.command, handler.path))
        if handler.path.endswith("/certs"):
            handler.answer(418, {"error": "teapot"}, {"Retry-After": "3"})
            return True
        return False

    issuer.behaviour.fault = fault
    answer = http.get(issuer.url + "/certs")
    assert (answer.status_code, answer.json(), answer.headers["Retry-After"]) == (418, {"error": "teapot"}, "3")
    assert http.get(issuer.url + "/.well-known/openid-configuration").json()["issuer"] == issuer.url
    assert [path.rpartition("/")[2] for _, path in seen] == ["certs", "openid-configuration"]

    issuer.behaviour.fault = None
    assert http.get(issuer.url + "/certs").status_code == 200


def test_the_path_of_the_issuer_can_be_chosen(http: requests.Session) -> None:
    with FakeIssuer(path="/auth/realms/other") as issuer:
        assert issuer.url.endswith("/auth/realms/other")
        assert http.get(issuer.url + "/certs").json() == issuer.jwks()


# --- access tokens ------------------------------------------------------------------------------------------------


def test_an_access_token_verifies_with_the_published_key(issuer: FakeIssuer) -> None:
    issuer.behaviour = Behaviour(audience="api", claims={"sub": "u-2", "scope": "read"}, lifetime=90)
    text = issuer.issue()

    unverified = read_access_token(text, Policy("api"), now=time.time())
    claims = TrustedKeys(issuer.url, read_keys(issuer.jwks())).confirm(unverified)
    assert (claims["sub"], claims["scope"], claims["exp"] - claims["iat"]) == ("u-2", "read", 90)


def test_unless_told_otherwise_it_is_alices_token_for_the_service_for_a_minute(issuer: FakeIssuer) -> None:
    answer = refresh(issuer, issuer.refresh_token)
    claims = jwt.decode(answer.members["access_token"], options={"verify_signature": False})

    assert urlsplit(issuer.url).path == "/realms/test"
    assert (answer.members["expires_in"], claims["exp"] - claims["iat"]) == (60, 60)
    assert (claims["aud"], claims["sub"], claims["preferred_username"]) == ("service", "u-1", "alice")
    assert "refresh_expires_in" not in answer.members


def test_access_tokens_can_be_forgotten(issuer: FakeIssuer) -> None:
    revoked = issuer.issue()
    issuer.forget_access_tokens()

    assert not issuer.accepts(revoked)
    assert issuer.accepts(issuer.issue())


@pytest.mark.parametrize("lifetime", [0, 1800])
def test_the_answer_may_say_how_long_the_refresh_token_lives(issuer: FakeIssuer, lifetime: float) -> None:
    issuer.behaviour.refresh_expires_in = lifetime

    assert refresh(issuer, issuer.refresh_token).members["refresh_expires_in"] == lifetime


def test_every_access_token_is_another_one(issuer: FakeIssuer) -> None:
    assert len({issuer.issue() for _ in range(20)}) == 20


def test_exactly_the_given_claims_and_headers_are_signed(issuer: FakeIssuer) -> None:
    text = issuer.sign({"a": 1}, {"typ": "at+jwt", "kid": "other"})

    assert jwt.decode(text, issuer.key.public_key(), algorithms=["ES256"]) == {"a": 1}
    assert jwt.get_unverified_header(text) == {"alg": "ES256", "typ": "at+jwt", "kid": "other"}


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
def test_tokens_of_every_algorithm_verify(algorithm: str) -> None:
    with FakeIssuer(algorithm=algorithm) as issuer:
        unverified = read_access_token(issuer.issue(aud="api", scope="read"), Policy("api"), now=time.time())
        claims = TrustedKeys(issuer.url, read_keys(issuer.jwks())).confirm(unverified)

    assert (claims["aud"], claims["scope"], unverified.header.alg) == ("api", "read", algorithm)


@pytest.mark.parametrize(("algorithm", "length"), [("ES256", 22), ("EdDSA", 43)])
def test_an_id_token_belongs_to_its_access_token(algorithm: str, length: int) -> None:
    with FakeIssuer(algorithm=algorithm) as issuer:
        access_token = issuer.issue()
        text = issuer.id_token(access_token, nonce="n-1")
        unverified = read_id_token(text, ["client"], leeway=0, now=time.time())
        claims = TrustedKeys(issuer.url, read_keys(issuer.jwks())).confirm(unverified)

    assert (claims["nonce"], claims["exp"] - claims["iat"], len(claims["at_hash"])) == ("n-1", 60, length)
    access_claims = {"iss": issuer.url, "sub": "u-1"}
    assert id_token_mismatch(claims, access_claims, access_token, algorithm) is None
    assert id_token_mismatch(claims, access_claims, access_token + "x", algorithm) is not None


def test_an_issuer_that_is_down_hangs_up_until_it_is_up_again(issuer: FakeIssuer, http: requests.Session) -> None:
    url = f"{issuer.url}/.well-known/openid-configuration"
    issuer.behaviour.down = True
    with pytest.raises(requests.ConnectionError):
        http.get(url)
    issuer.behaviour.down = False

    assert http.get(url).status_code == 200
    assert issuer.fetches == {"openid-configuration": 2}


def test_after_a_rotation_of_keys_only_the_new_one_is_published(issuer: FakeIssuer) -> None:
    old = issuer.issue()
    issuer.rotate_keys()
    (key,) = read_keys(issuer.jwks())

    assert matching_keys((key,), read_header(old)) == []
    assert matching_keys((key,), read_header(issuer.issue())) == [key]


def test_an_opaque_token_is_no_jwt_and_is_accepted(issuer: FakeIssuer) -> None:
    issuer.behaviour.opaque = True
    text = refresh(issuer, issuer.refresh_token).members["access_token"]

    assert "." not in text
    assert issuer.accepts(text)


@pytest.mark.parametrize("opaque", [False, True])
def test_a_token_is_accepted_until_it_expires(
    issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch, opaque: bool
) -> None:
    now = 1_750_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    issuer.behaviour = Behaviour(opaque=opaque, lifetime=60)
    text = issuer.issue()

    now += 59.9
    assert issuer.accepts(text)
    now += 0.1
    assert not issuer.accepts(text)


def test_the_clock_offset_shifts_claims_and_expiry(issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_750_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    early = issuer.issue()
    issuer.behaviour.clock_offset = 3600
    text = issuer.issue()

    claims = jwt.decode(text, options={"verify_signature": False})
    assert (issuer.now(), claims["iat"], claims["exp"]) == (now + 3600, now + 3600, now + 3660)
    assert issuer.accepts(text)
    assert not issuer.accepts(early)
    issuer.behaviour.clock_offset = -3600
    assert issuer.accepts(early)


@pytest.mark.parametrize("token", ["", "made-up", "a.b.c"])
def test_tokens_of_others_are_not_accepted(issuer: FakeIssuer, token: str) -> None:
    with FakeIssuer() as other:
        assert not issuer.accepts(other.issue())
    assert not issuer.accepts(issuer.sign({"exp": int(time.time()) + 60}))
    assert not issuer.accepts(token)


@pytest.mark.parametrize(("said", "expected"), [(True, 42), (False, None)])
def test_the_answer_may_leave_out_how_long_the_token_lives(
    issuer: FakeIssuer, said: bool, expected: float | None
) -> None:
    issuer.behaviour = Behaviour(lifetime=42, expires_in=said)

    assert refresh(issuer, issuer.refresh_token).members.get("expires_in") == expected


def test_the_token_endpoint_takes_its_time(issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    issuer.behaviour.delay = 30

    assert refresh(issuer, issuer.refresh_token).status == 200
    assert slept == [30]


# --- refresh tokens -----------------------------------------------------------------------------------------------


def test_a_kept_refresh_token_is_returned_and_works_again(issuer: FakeIssuer) -> None:
    for _ in range(3):
        assert refresh(issuer, issuer.refresh_token).members["refresh_token"] == issuer.refresh_token
    assert issuer.reuses == 0


def test_an_omitted_refresh_token_works_again(issuer: FakeIssuer) -> None:
    issuer.behaviour.refresh_tokens = "omit"

    for _ in range(3):
        answer = refresh(issuer, issuer.refresh_token)
        assert answer.status == 200
        assert "refresh_token" not in answer.members


def test_rotated_refresh_tokens_form_a_chain(issuer: FakeIssuer) -> None:
    issuer.behaviour.refresh_tokens = "rotate"
    token, seen = issuer.refresh_token, {issuer.refresh_token}
    for _ in range(4):
        token = refresh(issuer, token).members["refresh_token"]
        seen.add(token)

    assert len(seen) == 5
    assert issuer.reuses == 0


@pytest.mark.parametrize("rotations", [1, 2, 5])
def test_the_reuse_of_a_rotated_refresh_token_ends_the_session(issuer: FakeIssuer, rotations: int) -> None:
    issuer.behaviour.refresh_tokens = "rotate"
    other_session = issuer.new_session()
    latest = issuer.refresh_token
    for _ in range(rotations):
        latest = refresh(issuer, latest).members["refresh_token"]

    reused = refresh(issuer, issuer.refresh_token)

    assert (reused.status, reused.members["error"], issuer.reuses) == (400, "invalid_grant", 1)
    assert refresh(issuer, latest).members["error"] == "invalid_grant"
    assert refresh(issuer, other_session).status == 200


def test_two_uses_of_one_refresh_token_at_once_are_a_reuse(issuer: FakeIssuer) -> None:
    issuer.behaviour.refresh_tokens = "rotate"
    both = threading.Barrier(2)
    answers: list[Reply] = []

    def use() -> None:
        both.wait(PATIENCE)
        answers.append(refresh(issuer, issuer.refresh_token))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert sorted(answer.status for answer in answers) == [200, 400]
    assert issuer.reuses == 1


@pytest.mark.parametrize("token", ["", "made-up"])
def test_an_unknown_refresh_token_is_refused_and_is_no_reuse(issuer: FakeIssuer, token: str) -> None:
    assert refresh(issuer, token) == Reply(400, {"error": "invalid_grant", "error_description": "Token is not active"})
    assert issuer.reuses == 0
    assert refresh(issuer, issuer.refresh_token).status == 200


def test_sessions_can_be_ended(issuer: FakeIssuer) -> None:
    second = issuer.new_session()
    issuer.end_sessions()

    assert [refresh(issuer, token).status for token in (issuer.refresh_token, second)] == [400, 400]
    assert refresh(issuer, issuer.new_session()).status == 200


# --- clients ------------------------------------------------------------------------------------------------------


def claims(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.members
    return dict(unverified_claims(reply.members["access_token"]))


def narrow(issuer: FakeIssuer, **form: str) -> Reply:
    return post(issuer, grant_type="refresh_token", refresh_token=issuer.refresh_token, client_id="client", **form)


def test_a_refresh_may_ask_for_a_part_of_the_sessions_scope_and_for_all_of_it_again(issuer: FakeIssuer) -> None:
    issuer.behaviour.scope = "openid stac:read openeo:run"

    for asked in ("openid stac:read", "openeo:run", "openid stac:read openeo:run"):
        reply = narrow(issuer, scope=asked)
        assert (claims(reply)["scope"], reply.members["scope"]) == (asked, asked)
    assert claims(narrow(issuer))["scope"] == issuer.behaviour.scope
    assert narrow(issuer, scope="openid admin") == Reply(400, {"error": "invalid_scope"})


def test_some_issuers_do_not_widen_a_scope_again(issuer: FakeIssuer) -> None:
    issuer.behaviour = Behaviour(scope="openid stac:read", widens=False, refresh_tokens="rotate")

    second = narrow(issuer, scope="openid").members["refresh_token"]
    reply = refresh(issuer, second)
    assert claims(reply)["scope"] == "openid"
    issuer.refresh_token = reply.members["refresh_token"]
    # It is not used up by that.
    assert narrow(issuer, scope="openid stac:read").members["error"] == "invalid_scope"
    assert refresh(issuer, issuer.refresh_token).status == 200


def test_without_a_scope_of_sessions_any_is_given(issuer: FakeIssuer) -> None:
    assert claims(narrow(issuer, scope="anything"))["scope"] == "anything"
    assert "scope" not in claims(narrow(issuer))


@pytest.mark.parametrize("grant", ["refresh_token", "client_credentials"])
def test_a_token_for_a_resource_has_it_as_its_audience(issuer: FakeIssuer, grant: str) -> None:
    form = {"grant_type": grant, "refresh_token": issuer.refresh_token, "client_id": "client"}

    assert claims(post(issuer, **form, resource="https://stac.example"))["aud"] == "https://stac.example"
    assert claims(post(issuer, **form))["aud"] == "service"


def exchange(issuer: FakeIssuer, **form: str) -> Reply:
    basis = {
        "grant_type": EXCHANGE_GRANT,
        "client_id": "client",
        "subject_token": issuer.issue(),
        "subject_token_type": ACCESS_TOKEN_TYPE,
    }
    return post(issuer, **{**basis, **form})


@pytest.mark.parametrize(
    ("form", "audience"),
    [
        ({}, "service"),
        ({"audience": "stac-api"}, "stac-api"),
        ({"resource": "https://stac.example"}, "https://stac.example"),
        ({"audience": "stac-api", "resource": "https://stac.example"}, ["stac-api", "https://stac.example"]),
    ],
)
def test_an_access_token_is_exchanged_for_one_of_the_same_user_for_an_audience(
    issuer: FakeIssuer, form: dict[str, str], audience: object
) -> None:
    reply = exchange(issuer, **form, scope="read")

    assert {name: claims(reply)[name] for name in ("aud", "sub", "scope")} == {
        "aud": audience,
        "sub": "u-1",
        "scope": "read",
    }
    assert issuer.accepts(reply.members.pop("access_token"))
    assert reply.members == {
        "token_type": "Bearer",
        "issued_token_type": ACCESS_TOKEN_TYPE,
        "expires_in": 60,
        "scope": "read",
    }


def test_only_a_valid_access_token_is_exchanged(issuer: FakeIssuer) -> None:
    token = issuer.issue()

    assert exchange(issuer, subject_token=token).status == 200
    refused = [
        exchange(issuer, subject_token=token + "x"),
        exchange(issuer, subject_token=token, subject_token_type="urn:ietf:params:oauth:token-type:id_token"),
        exchange(issuer, subject_token=token, requested_token_type="urn:ietf:params:oauth:token-type:refresh_token"),
    ]
    issuer.forget_access_tokens()
    refused.append(exchange(issuer, subject_token=token))
    assert {(reply.status, reply.members["error"]) for reply in refused} == {(400, "invalid_request")}


def test_the_client_that_exchanges_has_to_authenticate() -> None:
    with FakeIssuer(client_secret=SECRET) as issuer:
        assert exchange(issuer, audience="stac-api").members["error"] == "invalid_client"
        assert exchange(issuer, audience="stac-api", client_secret=SECRET).status == 200


def test_a_client_may_not_be_allowed_to_exchange(issuer: FakeIssuer) -> None:
    issuer.behaviour.exchange = False

    assert exchange(issuer).members["error"] == "unauthorized_client"


def test_exchanges_for_one_audience_can_fail_or_take_their_time(
    issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    issuer.behaviour.exchange_errors["stac-api"] = "invalid_target"
    issuer.behaviour.exchange_delays["https://openeo.example"] = 5

    refused = exchange(issuer, audience="stac-api")
    assert (refused.status, refused.members["error"]) == (400, "invalid_target")
    assert max(slept) == 0
    assert exchange(issuer, resource="https://openeo.example").status == 200
    assert max(slept) == 5
    assert exchange(issuer, audience="s3-api").status == 200


def test_client_credentials_yield_an_access_token_only(issuer: FakeIssuer) -> None:
    answer = post(issuer, grant_type="client_credentials", client_id="client")

    assert issuer.accepts(answer.members["access_token"])
    assert "refresh_token" not in answer.members


@pytest.mark.parametrize("grant", ["password", ""])
def test_other_grants_are_refused(issuer: FakeIssuer, grant: str) -> None:
    assert post(issuer, grant_type=grant, client_id="client") == Reply(400, {"error": "unsupported_grant_type"})


def test_token_requests_are_kept_as_they_came(issuer: FakeIssuer) -> None:
    refresh(issuer, "")
    post(issuer, "Basic eDp5", grant_type="client_credentials", scope="a b")

    first, second = issuer.requests
    assert first.form == {"grant_type": "refresh_token", "refresh_token": "", "client_id": "client"}
    assert (first.method, second.method, second.form["scope"]) == ("none", "client_secret_basic", "a b")
    assert first.at <= second.at <= time.time()


KEYS: dict[str, PrivateKey] = {
    "RSA": rsa.generate_private_key(65537, 2048),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate(),
}

CREDENTIALS: list[Any] = [
    *[(method, SECRET, None) for method in ("client_secret_basic", "client_secret_post", "client_secret_jwt")],
    *[pytest.param("private_key_jwt", None, key, id=f"private_key_jwt-{name}") for name, key in KEYS.items()],
    ("none", None, None),
]


def authenticate(issuer: FakeIssuer, client: Client, now: float | None = None, endpoint: str | None = None) -> Reply:
    metadata = ProviderMetadata(issuer.url, endpoint or issuer.url + "/token")
    request = build_token_request(client, metadata, now=time.time() if now is None else now)
    return post(issuer, request.headers.get("Authorization"), **request.form)


@pytest.mark.parametrize(("method", "secret", "key"), CREDENTIALS)
def test_the_right_credentials_are_accepted_by_every_method(
    method: str, secret: str | None, key: PrivateKey | None
) -> None:
    with FakeIssuer(client_id="a:client", client_secret=secret, client_key=key) as issuer:
        assert authenticate(issuer, Client("a:client", secret, method, key)).status == 200
        assert issuer.requests[0].method == method


@pytest.mark.parametrize(("method", "secret", "key"), CREDENTIALS)
def test_a_method_that_is_not_offered_is_not_accepted(method: str, secret: str | None, key: PrivateKey | None) -> None:
    with FakeIssuer(client_secret=secret, client_key=key) as issuer:
        issuer.behaviour.auth_methods = tuple(name for name in ALL_AUTH_METHODS if name != method)

        answer = authenticate(issuer, Client("client", secret, method, key))
        assert (answer.status, answer.members["error"]) == (401, "invalid_client")
        refused = "the client must authenticate" if method == "none" else f"{method} was not accepted"
        assert answer.members["error_description"] == refused
        assert method not in issuer.discovery()["token_endpoint_auth_methods_supported"]


@pytest.mark.parametrize(("method", "secret", "key"), CREDENTIALS)
def test_the_right_credentials_of_another_client_are_refused(
    method: str, secret: str | None, key: PrivateKey | None
) -> None:
    with FakeIssuer(client_secret=secret, client_key=key) as issuer:
        assert authenticate(issuer, Client("other", secret, method, key)).status == 401


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "client_secret_jwt"])
def test_a_wrong_secret_is_refused(method: str) -> None:
    with FakeIssuer(client_secret=SECRET) as issuer:
        assert authenticate(issuer, Client("client", SECRET[::-1], method)).status == 401


@pytest.mark.parametrize(
    "wrong", [KEYS["RSA"], KEYS["P-521"], KEYS["Ed25519"], ec.generate_private_key(ec.SECP256R1())]
)
def test_a_wrong_key_is_refused(wrong: PrivateKey) -> None:
    with FakeIssuer(client_key=KEYS["P-256"]) as issuer:
        assert authenticate(issuer, Client("client", None, "private_key_jwt", wrong)).status == 401


@pytest.mark.parametrize("credential", [{"client_secret": SECRET}, {"client_key": KEYS["Ed25519"]}])
def test_a_confidential_client_has_to_authenticate(credential: Any) -> None:
    with FakeIssuer(**credential) as issuer:
        assert authenticate(issuer, Client("client", auth_method="none")).status == 401


def test_an_assertion_is_accepted_from_the_client_that_it_names_only() -> None:
    with FakeIssuer(client_key=KEYS["Ed25519"]) as issuer:
        request = build_token_request(
            Client("client", None, "private_key_jwt", KEYS["Ed25519"]),
            ProviderMetadata(issuer.url, issuer.url + "/token"),
            now=time.time(),
        )
        assert post(issuer, **{**request.form, "client_id": "other"}).status == 401
        assert post(issuer, **request.form).status == 200


@pytest.mark.parametrize("key", [None, KEYS["Ed25519"]])
def test_a_client_without_secret_cannot_use_the_empty_one(key: PrivateKey | None) -> None:
    with FakeIssuer(client_key=key) as issuer:
        for method in ("client_secret_basic", "client_secret_post", "client_secret_jwt"):
            assert authenticate(issuer, Client("client", "", method)).status == 401


def test_an_assertion_has_to_be_current_and_meant_for_this_issuer() -> None:
    client = Client("client", None, "private_key_jwt", KEYS["Ed25519"], "token_endpoint")
    with FakeIssuer(client_key=KEYS["Ed25519"]) as issuer:
        assert authenticate(issuer, client, now=time.time() - 3600).status == 401
        assert authenticate(issuer, client, endpoint="https://other.example/token").status == 401
        assert authenticate(issuer, client).status == 200
        assert authenticate(issuer, replace(client, assertion_audience="issuer")).status == 200


@pytest.mark.parametrize("missing", ["iss", "sub", "jti", "exp", "iat"])
def test_an_assertion_has_to_be_complete(missing: str) -> None:
    now = int(time.time())
    with FakeIssuer(client_key=KEYS["Ed25519"]) as issuer:
        aud = issuer.url + "/token"
        claims = {"iss": "client", "sub": "client", "jti": "1", "exp": now + 60, "iat": now, "aud": aud}
        form = {"grant_type": "client_credentials", "client_id": "client"}

        def send() -> int:
            return post(issuer, client_assertion=jwt.encode(claims, KEYS["Ed25519"], algorithm="EdDSA"), **form).status

        assert send() == 200
        del claims[missing]
        assert send() == 401


def test_a_short_secret_may_sign_assertions() -> None:
    with FakeIssuer(client_secret="short") as issuer:
        assert authenticate(issuer, Client("client", "short", "client_secret_jwt")).status == 200


@pytest.mark.parametrize("method", ["client_secret_jwt", "private_key_jwt"])
def test_a_client_may_have_both_a_secret_and_a_key(method: str) -> None:
    with FakeIssuer(client_secret=SECRET, client_key=KEYS["P-256"]) as issuer:
        assert authenticate(issuer, Client("client", SECRET, method, KEYS["P-256"])).status == 200


@pytest.mark.parametrize(
    ("authorization", "form"),
    [
        ("Basic %%%", {}),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), {}),
        ("Bearer x", {}),
        (None, {"client_id": "client", "client_assertion": "garbage"}),
        (None, {"client_id": "client", "client_assertion": jwt.encode({}, SECRET, algorithm="HS256")}),
    ],
)
def test_odd_credentials_are_refused_like_wrong_ones(authorization: str | None, form: dict[str, str]) -> None:
    with FakeIssuer(client_key=KEYS["P-256"]) as issuer:
        assert post(issuer, authorization, grant_type="client_credentials", **form).status == 401


# --- the server ---------------------------------------------------------------------------------------------------


class Echo(Handler):
    def respond(self) -> None:
        body = self.read_body()
        self.answer(200, {"method": self.command, "path": self.path, "length": len(body)}, {"X-Echo": "yes"})


@pytest.fixture
def echo() -> Iterator[LocalServer]:
    with LocalServer(Echo) as server:
        yield server


def connect(server: LocalServer) -> closing[HTTPConnection]:
    return closing(HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE))


def ask(connection: HTTPConnection, method: str = "GET", path: str = "/", body: bytes = b"") -> tuple[int, bytes]:
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_every_method_is_answered(echo: LocalServer, method: str) -> None:
    with connect(echo) as connection:
        connection.request(method, "/a?b=c", body=b"12345")
        answer = connection.getresponse()

        assert json.loads(answer.read()) == {"method": method, "path": "/a?b=c", "length": 5}
        assert (answer.getheader("Content-Type"), answer.getheader("X-Echo")) == ("application/json", "yes")


def test_head_has_no_body_on_the_wire(echo: LocalServer) -> None:
    with socket.create_connection(("127.0.0.1", echo.port), PATIENCE) as client:
        client.sendall(b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = client.makefile("rb").read()

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


def test_head_has_the_headers_and_no_body(echo: LocalServer) -> None:
    with connect(echo) as connection:
        for _ in range(2):
            connection.request("HEAD", "/")
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"")
            assert int(answer.headers["Content-Length"]) > 0


def test_a_connection_is_kept_for_several_requests(echo: LocalServer) -> None:
    sockets = set()
    with connect(echo) as connection:
        for length in (0, 3, 1000):
            assert json.loads(ask(connection, "POST", body=b"x" * length)[1])["length"] == length
            sockets.add(connection.sock.getsockname())

    assert len(sockets) == 1


def test_several_requests_are_answered_at_once() -> None:
    both = threading.Barrier(2)

    class Waiting(Handler):
        def respond(self) -> None:
            both.wait(PATIENCE)
            self.answer(200, {})

    with LocalServer(Waiting) as server, ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(2)]
        for connection in connections:
            connection.request("GET", "/")
        assert [connection.getresponse().status for connection in connections] == [200, 200]


def test_bytes_are_sent_as_they_are_with_their_type() -> None:
    class Raw(Handler):
        def respond(self) -> None:
            self.answer(203, b"<p>\xff", {"Content-Type": "text/html"})

    with LocalServer(Raw) as server, connect(server) as connection:
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert (answer.status, answer.read(), answer.headers["Content-Type"]) == (203, b"<p>\xff", "text/html")


def test_at_most_a_mebibyte_of_a_body_is_read() -> None:
    class Large(Handler):
        def respond(self) -> None:
            length = len(self.read_body())
            self.close_connection = True
            self.answer(200, {"length": length})

    with LocalServer(Large) as server, socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 1024 * 1024)
        answer = client.makefile("rb").read()

    assert answer.endswith(b'{"length": 1048576}')


def test_what_is_not_read_of_a_large_body_is_no_request(echo: LocalServer) -> None:
    rest = b"GET /rest HTTP/1.1\r\nConnection: close\r\n\r\n"
    answers = b""
    with socket.create_connection(("127.0.0.1", echo.port), PATIENCE) as client:
        length = 1024 * 1024 + len(rest)
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % length + b"x" * 1024 * 1024 + rest)
        with suppress(ConnectionError):
            while data := client.recv(65536):
                answers += data

    assert answers.count(b"HTTP/1.1 200 ") == 1


def test_nothing_is_logged(echo: LocalServer, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", echo.port), PATIENCE) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\nnonsense\r\n\r\n")
        assert client.makefile("rb").read()

    assert capfd.readouterr() == ("", "")


def test_it_listens_on_loopback_only_at_its_url(echo: LocalServer) -> None:
    assert (urlsplit(echo.url).hostname, urlsplit(echo.url).port) == ("127.0.0.1", echo.port)


def test_the_port_can_be_chosen() -> None:
    with LocalServer(Echo) as first:
        port = first.port

    with LocalServer(Echo, port) as second:
        assert second.port == port


def test_no_connection_is_accepted_after_the_end() -> None:
    with LocalServer(Echo) as server:
        pass

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), PATIENCE)


def test_no_request_is_answered_on_a_kept_connection_after_the_end() -> None:
    with ExitStack() as stack:
        with LocalServer(Echo) as server:
            connection = stack.enter_context(connect(server))
            ask(connection)
        # A new connection would be refused.
        connection.auto_open = 0

        with pytest.raises((HTTPException, OSError)):
            ask(connection)


def test_an_answer_without_reading_the_request_does_not_harm_the_next_one(
    issuer: FakeIssuer, http: requests.Session
) -> None:
    form = {"grant_type": "refresh_token", "refresh_token": issuer.refresh_token, "client_id": "client"}

    assert http.post(issuer.url + "/nothing", data=form).status_code == 404
    assert http.post(issuer.url + "/token", data=form).status_code == 200
