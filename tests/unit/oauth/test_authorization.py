"""The messages of logging in and out, without a network."""

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.authorization import (
    DEVICE_GRANT,
    AuthorizationRequest,
    DeviceAuthorization,
    Pending,
    build_authorization_request,
    build_code_request,
    build_device_request,
    build_device_token_request,
    build_revocation_request,
    check_nonce,
    is_answer_to,
    new_verifier,
    read_authorization_response,
    read_code_response,
    read_device_response,
    read_device_token_response,
    read_revocation_response,
)
from eoepca_security.oauth.protocol import Client, ProviderMetadata, TokenResponse, read_metadata

ISSUER = "https://issuer.example/r"
METADATA = ProviderMetadata(
    ISSUER,
    f"{ISSUER}/token",
    authorization_endpoint=f"{ISSUER}/auth?x=1",
    device_authorization_endpoint=f"{ISSUER}/device",
    revocation_endpoint=f"{ISSUER}/revoke",
    names_itself=True,
)
BARE = ProviderMetadata(ISSUER, f"{ISSUER}/token")
CLIENT = Client("c")
SECRETIVE = Client("c", "client-secret")


def body(**members: Any) -> bytes:
    return json.dumps(members).encode()


def challenge_of(verifier: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


# --- discovery ---


def discovered(**members: Any) -> ProviderMetadata:
    document = {"issuer": ISSUER, "token_endpoint": f"{ISSUER}/token", **members}
    return read_metadata(200, body(**document), url=f"{ISSUER}/.well-known/openid-configuration")


@pytest.mark.parametrize("name", ["authorization_endpoint", "device_authorization_endpoint", "revocation_endpoint"])
def test_an_endpoint_that_must_not_be_spoken_to_is_none(name: str) -> None:
    assert getattr(discovered(**{name: f"{ISSUER}/x"}), name) == f"{ISSUER}/x"
    for bad in ("http://issuer.example/x", "https://u:p@issuer.example/x", "https://issuer.example/ x", 1, None):
        assert getattr(discovered(**{name: bad}), name) is None


def test_only_a_plain_true_promises_iss() -> None:
    assert discovered(authorization_response_iss_parameter_supported=True).names_itself
    for value in (False, "true", 1, None):
        assert not discovered(authorization_response_iss_parameter_supported=value).names_itself


# --- by device ---


def test_a_device_request() -> None:
    verifier = new_verifier()
    request = build_device_request(CLIENT, METADATA, "openid", verifier, now=0)
    assert request.url == f"{ISSUER}/device"
    assert dict(request.form) == {
        "client_id": "c",
        "scope": "openid",
        "code_challenge": challenge_of(verifier),
        "code_challenge_method": "S256",
    }
    assert "Authorization" in build_device_request(SECRETIVE, METADATA, "openid", verifier, now=0).headers
    with pytest.raises(CredentialsRejected) as caught:
        build_device_request(CLIENT, BARE, "openid", verifier, now=0)
    assert caught.value.cause == "no_device_login"


GOOD = {"device_code": "dev", "user_code": "AB-CD", "verification_uri": "https://i.example/d", "expires_in": 600}


def test_a_device_response() -> None:
    device = read_device_response(200, body(**GOOD), "v")
    assert device == DeviceAuthorization("dev", "v", "AB-CD", "https://i.example/d", 600, 5)
    full = read_device_response(200, body(**GOOD, interval=7, verification_uri_complete="https://i.example/d?u=1"), "v")
    assert (full.interval, full.verification_uri_complete) == (7, "https://i.example/d?u=1")
    assert "dev" not in repr(device).replace("device", "")


@pytest.mark.parametrize(
    "change",
    [
        {"device_code": None},
        {"user_code": ""},
        {"user_code": "a\x1b[2J"},
        {"verification_uri": "javascript:alert(1)"},
        {"verification_uri": "http://i.example/d"},
        {"verification_uri": None},
        {"expires_in": None},
        {"expires_in": -1},
    ],
)
def test_a_device_response_that_lacks_something(change: dict[str, Any]) -> None:
    with pytest.raises(IssuerUnavailable, match="RFC 8628"):
        read_device_response(200, body(**GOOD | change), "v")


def test_a_bad_complete_address_is_left_out() -> None:
    answer = body(**GOOD, verification_uri_complete="https://i.example/\x1b[2J", interval="x")
    device = read_device_response(200, answer, "v")
    assert (device.verification_uri_complete, device.interval) == (None, 5)


def test_a_poll() -> None:
    device = read_device_response(200, body(**GOOD), "v")
    request = build_device_token_request(CLIENT, METADATA, device, now=0)
    assert request.url == f"{ISSUER}/token"
    assert dict(request.form) == {
        "grant_type": DEVICE_GRANT,
        "device_code": "dev",
        "client_id": "c",
        "code_verifier": "v",
    }
    assert {"dev", "v"} <= set(request.secrets)


def test_answers_to_polls() -> None:
    assert read_device_token_response(400, body(error="authorization_pending")) is Pending.WAIT
    assert read_device_token_response(400, body(error="slow_down")) is Pending.SLOW_DOWN
    token = read_device_token_response(200, body(access_token="a", refresh_token="r"))
    assert isinstance(token, TokenResponse)
    with pytest.raises(IssuerUnavailable) as unavailable:
        read_device_token_response(503, b"", retry_after=7)
    assert unavailable.value.retry_after == 7


@pytest.mark.parametrize("status", [200, 400, 401, 403])
def test_a_poll_goes_on_with_two_codes_alone(status: int) -> None:
    assert read_device_token_response(status, body(error="authorization_pending")) is Pending.WAIT
    assert read_device_token_response(status, body(error="SLOW_DOWN")) is Pending.SLOW_DOWN
    for error in (
        "access_denied",
        "authorization_declined",
        "expired_token",
        "invalid_grant",
        "not_allowed",
        "server_error",
        "temporarily_unavailable",
    ):
        with pytest.raises(CredentialsRejected, match=error) as caught:
            read_device_token_response(status, body(error=error))
        assert caught.value.issuer_error == error


def test_a_device_request_may_be_refused_with_status_200() -> None:
    with pytest.raises(CredentialsRejected, match="device_flow_disabled") as caught:
        read_device_response(200, body(error="device_flow_disabled", access_token=""), "v")
    assert caught.value.issuer_error == "device_flow_disabled"


def test_googles_name_for_the_verification_address_is_known() -> None:
    other = {"verification_uri": None, "verification_url": "https://i.example/google"}
    assert read_device_response(200, body(**GOOD | other), "v").verification_uri == "https://i.example/google"
    assert read_device_response(200, body(**other | GOOD), "v").verification_uri == "https://i.example/d"
    with pytest.raises(IssuerUnavailable, match="RFC 8628"):
        read_device_response(200, body(**GOOD | other | {"verification_url": "http://i.example/google"}), "v")


# --- by browser ---


@pytest.fixture
def request_() -> AuthorizationRequest:
    return build_authorization_request(CLIENT, METADATA, "openid offline_access", redirect_uri="http://127.0.0.1:1/cb")


def test_each_step_of_a_login_carries_the_clients_own_parameters() -> None:
    client = Client("c", params={"audience": "https://api.example", "prompt": "login", "client_id": "other"})
    device = DeviceAuthorization("d", "v", "U", f"{ISSUER}/device", 60.0, 5.0)
    by_browser = build_authorization_request(client, METADATA, "openid offline_access", redirect_uri="http://127.0.0.1")

    forms = [
        build_device_request(client, METADATA, "openid", "v", now=0).form,
        build_device_token_request(client, METADATA, device, now=0).form,
        dict(parse_qsl(urlsplit(by_browser.url).query)),
        build_code_request(client, METADATA, by_browser, "code", now=0).form,
    ]

    assert [form["audience"] for form in forms] == ["https://api.example"] * 4
    assert [form["client_id"] for form in forms] == ["c"] * 4
    assert forms[2]["prompt"] == "login"


@pytest.mark.parametrize(
    ("params", "sent"),
    [
        ({}, ["https://stac.example", "urn:data"]),
        ({"resource": "urn:own"}, ["urn:own", "https://stac.example", "urn:data"]),
        ({"resource": "urn:data"}, ["urn:data", "https://stac.example"]),
    ],
)
def test_a_login_names_each_resource_once(params: dict[str, str], sent: list[str]) -> None:
    client, wanted = Client("c", params=params), ["https://stac.example", "urn:data", "urn:data"]
    device = build_device_request(client, METADATA, "openid", "v", now=0, resources=wanted)
    browser = build_authorization_request(
        client, METADATA, "openid", redirect_uri="http://127.0.0.1:1/cb", resources=wanted
    )
    assert list(device.resources) == sent
    assert "resource" not in device.form
    assert parse_qs(urlsplit(browser.url).query)["resource"] == sent


def test_an_authorization_request(request_: AuthorizationRequest) -> None:
    parts = urlsplit(request_.url)
    assert parts._replace(query="").geturl() == f"{ISSUER}/auth"
    assert dict(parse_qsl(parts.query)) == {
        "x": "1",
        "response_type": "code",
        "client_id": "c",
        "redirect_uri": "http://127.0.0.1:1/cb",
        "scope": "openid offline_access",
        "state": request_.state,
        "nonce": request_.nonce,
        "code_challenge": challenge_of(request_.verifier),
        "code_challenge_method": "S256",
        "prompt": "consent",
    }
    for secret in (request_.state, request_.nonce, request_.verifier):
        assert 43 <= len(secret) <= 128
        assert secret not in repr(request_)
    assert request_.verifier not in request_.url


def test_consent_is_asked_for_offline_access_only() -> None:
    request = build_authorization_request(CLIENT, METADATA, "openid", redirect_uri="http://127.0.0.1:1/cb")
    assert "prompt" not in request.url
    with pytest.raises(CredentialsRejected) as caught:
        build_authorization_request(CLIENT, BARE, "openid", redirect_uri="http://127.0.0.1:1/cb")
    assert caught.value.cause == "no_browser_login"


def test_which_redirects_are_answers(request_: AuthorizationRequest) -> None:
    assert is_answer_to(request_, [("code", "x"), ("state", request_.state)])
    for parameters in (
        [],
        [("state", "")],
        [("state", request_.state[:-1])],
        [("state", request_.state + "é")],
        [("state", request_.state), ("state", request_.state)],
    ):
        assert not is_answer_to(request_, parameters)


def answer(request: AuthorizationRequest, **members: str | None) -> list[tuple[str, str]]:
    own = {"code": "the-code", "state": request.state, "iss": ISSUER, **members}
    return [(name, value) for name, value in own.items() if value is not None]


def test_a_code_comes_back(request_: AuthorizationRequest) -> None:
    assert read_authorization_response(request_, METADATA, answer(request_)) == "the-code"
    assert read_authorization_response(request_, BARE, answer(request_, iss=None)) == "the-code"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"iss": None}, "another issuer"),
        ({"iss": f"{ISSUER}/"}, "another issuer"),
        ({"iss": "https://evil.example", "error": "access_denied"}, "another issuer"),
        ({"state": "x"}, "another login"),
        ({"code": None}, "without a code"),
        ({"code": "a\nb"}, "without a code"),
        ({"error": "access_denied"}, "answered access_denied$"),
        ({"error": "x\x1b[2J", "error_description": "\r\nevil"}, "x\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_what_comes_back_is_not_taken(
    members: dict[str, str | None], says: str, request_: AuthorizationRequest
) -> None:
    with pytest.raises(CredentialsRejected, match=says.replace("[", r"\[")) as caught:
        read_authorization_response(request_, METADATA, answer(request_, **members))
    assert str(caught.value).isprintable()


def test_a_wrong_iss_is_not_taken_where_none_was_promised(request_: AuthorizationRequest) -> None:
    with pytest.raises(CredentialsRejected, match="another issuer") as caught:
        read_authorization_response(request_, BARE, answer(request_, iss="https://evil.example"))
    assert caught.value.cause == "mix_up"


def test_a_parameter_that_comes_twice_is_not_taken(request_: AuthorizationRequest) -> None:
    with pytest.raises(CredentialsRejected, match="another login"):
        read_authorization_response(request_, METADATA, [*answer(request_), ("code", "another")])


def test_an_error_does_not_repeat_what_is_secret(request_: AuthorizationRequest) -> None:
    parameters = answer(request_, error="server_error", error_description=f"state {request_.state}")
    with pytest.raises(CredentialsRejected) as caught:
        read_authorization_response(request_, METADATA, parameters)
    assert request_.state not in str(caught.value)


def test_a_code_is_redeemed_with_its_verifier(request_: AuthorizationRequest) -> None:
    request = build_code_request(CLIENT, METADATA, request_, "the-code", now=0)
    assert dict(request.form) == {
        "grant_type": "authorization_code",
        "code": "the-code",
        "redirect_uri": "http://127.0.0.1:1/cb",
        "code_verifier": request_.verifier,
        "client_id": "c",
    }
    assert {"the-code", request_.verifier} <= set(request.secrets)
    assert "the-code" not in repr(request)
    assert read_code_response(200, body(access_token="a")).access_token == "a"
    with pytest.raises(CredentialsRejected, match="invalid_grant"):
        read_code_response(400, body(error="invalid_grant"))


@pytest.mark.parametrize("nonce", [None, "", "x", 1, "é"])
def test_a_nonce_of_another_login(nonce: object, request_: AuthorizationRequest) -> None:
    check_nonce(request_, {"nonce": request_.nonce})
    with pytest.raises(TokenInvalid, match="another login"):
        check_nonce(request_, {"nonce": nonce})


# --- out ---


def test_a_revocation() -> None:
    request = build_revocation_request(SECRETIVE, METADATA, "refresh", now=0)
    assert request.url == f"{ISSUER}/revoke"
    assert dict(request.form) == {"token": "refresh", "token_type_hint": "refresh_token"}
    assert "Authorization" in request.headers
    assert "refresh" in request.secrets
    with pytest.raises(CredentialsRejected, match="does not offer"):
        build_revocation_request(CLIENT, replace(METADATA, revocation_endpoint=None), "refresh", now=0)


def test_answers_to_revocations() -> None:
    read_revocation_response(200, b"")
    read_revocation_response(204, b"whatever")
    with pytest.raises(CredentialsRejected, match="invalid_client"):
        read_revocation_response(401, body(error="invalid_client"))
    for status in (302, 404, 503):
        with pytest.raises(IssuerUnavailable):
            read_revocation_response(status, b"{}")
