"""What APISIX would send, from claims that are not as one expects them."""

import base64
import json
from dataclasses import replace
from unittest.mock import Mock

import pytest

from eoepca_security.issuer.provider import Provider
from eoepca_security.proxy.policy.apisix import ApisixHeaders
from eoepca_security.session.session import AccessToken


def token_with(claims: bytes) -> AccessToken:
    return AccessToken(f"e30.{base64.urlsafe_b64encode(claims).rstrip(b'=').decode()}.c2ln", 0, 60)


def claims_in(header: str) -> object:
    return json.loads(base64.b64decode(header, validate=True))


@pytest.mark.parametrize("claims", [b"[]", b"{}", b"\xff", b""])
def test_without_claims_there_is_only_the_token(claims: bytes) -> None:
    token = token_with(claims)
    assert ApisixHeaders().of(token) == {"X-Access-Token": token.value}


@pytest.mark.parametrize(
    ("claims", "same"),
    [
        (b'{"name": "a\\ud800b", "n": 1}', {"name": "a\ud800b", "n": 1}),
        (b'{"\\udfff": 1}', {"\udfff": 1}),
        (b'{"n": 1e400}', {"n": None}),
    ],
)
def test_claims_that_are_not_all_text_and_numbers_are_valid_json_again(claims: bytes, same: object) -> None:
    token = token_with(claims)
    headers = ApisixHeaders().of(replace(token, id_token=token.value))
    assert claims_in(headers["X-Userinfo"]) == claims_in(headers["X-ID-Token"]) == same
    base64.b64decode(headers["X-Userinfo"]).decode()


def test_claims_that_are_nested_too_deeply_to_be_written_are_left_out() -> None:
    nested: object = []
    for _ in range(200_000):
        nested = [nested]
    headers, token = ApisixHeaders(), token_with(b'{"sub": "u"}')
    headers.learn(Mock(spec=Provider, userinfo=lambda _: {"a": nested}), token.value)
    assert headers.of(token) == {"X-Access-Token": token.value}


def test_claims_are_utf_8() -> None:
    headers = ApisixHeaders().of(token_with(b'{"name": "Gr\\u00fc\\u00dfe \\ud83c\\udf0d"}'))
    assert claims_in(headers["X-Userinfo"]) == {"name": "Grüße 🌍"}
    assert "\\u" not in base64.b64decode(headers["X-Userinfo"]).decode()
