import base64
import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from eoepca_security.errors import TokenInvalid
from eoepca_security.oauth.verify import (
    ALGORITHMS,
    MAX_TOKEN_SIZE,
    Header,
    NoKeyFits,
    Policy,
    SigningKey,
    TrustedKeys,
    Unverified,
    id_token_mismatch,
    looks_like_jwt,
    matching_keys,
    read_access_token,
    read_header,
    read_id_token,
    read_keys,
    unverified_claims,
)
from tests.support.tokens import ALPHABET, mutate

NOW = 1_750_000_000.5
ISSUER = "https://issuer.example/realms/test"
POLICY = Policy("service", leeway=10)
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "aud": POLICY.audience,
    "sub": "u-1",
    "iat": int(NOW) - 5,
    "exp": int(NOW) + 60,
    "typ": "Bearer",
}
ODD_VALUES: list[Any] = [None, True, 0, -1, 1.5, 2**70, 1e308, "", "x", [], [1], ["x"], {}, {"x": 1}, [[]], "\ud800"]

_EC_CURVES: dict[str, ec.EllipticCurve] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}


@functools.cache
def private_key(alg: str, which: int = 0) -> Any:
    if alg in _EC_CURVES:
        return ec.generate_private_key(_EC_CURVES[alg])
    if alg == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 2048) if alg == "RS256" else private_key("RS256", which)


def jwk(alg: str, which: int = 0, /, **changes: Any) -> dict[str, Any]:
    """Return the public key for an algorithm as a JWK; `...` takes a member away."""
    algorithm: Any = jwt.get_algorithm_by_name(alg)
    made = algorithm.to_jwk(private_key(alg, which).public_key(), as_dict=True)
    made.pop("key_ops", None)
    return {k: v for k, v in {**made, "kid": "k-1", **changes}.items() if v is not ...}


def private_jwk(alg: str) -> dict[str, Any]:
    algorithm: Any = jwt.get_algorithm_by_name(alg)
    made: dict[str, Any] = algorithm.to_jwk(private_key(alg), as_dict=True) | {"key_ops": ["sign", "verify"]}
    assert made["d"]
    return made


def signing_key(alg: str, which: int = 0, /, **changes: Any) -> SigningKey:
    (key,) = read_keys({"keys": [jwk(alg, which, **changes)]})
    return key


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign_segments(header: str, payload: str, alg: str = "ES256", which: int = 0) -> str:
    """Return a token whose first two segments are as they are given, with a genuine signature."""
    signed = f"{header}.{payload}"
    return f"{signed}.{encode(jwt.get_algorithm_by_name(alg).sign(signed.encode(), private_key(alg, which)))}"


def sign_bytes(payload: bytes, header: bytes | None = None, alg: str = "ES256") -> str:
    return sign_segments(encode(header or json.dumps({"alg": alg, "kid": "k-1"}).encode()), encode(payload), alg)


def token(alg: str = "ES256", which: int = 0, /, header: Any = None, **changes: Any) -> str:
    """Return a genuine token; `...` takes a claim or a header member away."""
    members = {"alg": alg, "kid": "k-1", "typ": "JWT", **(header or {})}
    claims = {**CLAIMS, **changes}
    first, second = (
        encode(json.dumps({k: v for k, v in part.items() if v is not ...}).encode()) for part in (members, claims)
    )
    return sign_segments(first, second, alg, which)


def verify(text: str, key: SigningKey, policy: Policy, *, now: float) -> dict[str, Any]:
    """Verify with one key, whatever its kid."""
    unverified = read_access_token(text, policy, now=now)
    return TrustedKeys(ISSUER, (replace(key, kid=unverified.header.kid),)).confirm(unverified)


def check(text: str, alg: str = "ES256") -> dict[str, Any]:
    return verify(text, signing_key(alg), POLICY, now=NOW)


def refuse(text: str, reason: str, alg: str = "ES256") -> None:
    """Assert that a token is refused for a reason, and that the reason does not give it away."""
    with pytest.raises(TokenInvalid, match=reason) as caught:
        check(text, alg)
    assert not any(segment in str(caught.value) for segment in text.split(".") if len(segment) > 8)


# --- genuine tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", sorted(ALGORITHMS))
def test_a_genuine_token_yields_its_claims(alg: str) -> None:
    assert check(token(alg, preferred_username="größe"), alg) == {**CLAIMS, "preferred_username": "größe"}


def test_only_asymmetric_algorithms_are_accepted() -> None:
    rsa_algorithms = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}

    assert rsa_algorithms | {"ES256", "ES384", "ES512", "EdDSA"} == ALGORITHMS


@pytest.mark.parametrize("in_token", ["EdDSA", "Ed25519"])
@pytest.mark.parametrize("in_key", [..., "EdDSA", "Ed25519"])
def test_ed25519_has_two_names(in_token: str, in_key: object) -> None:
    text, key = token("EdDSA", header={"alg": in_token}), signing_key("EdDSA", alg=in_key)

    assert verify(text, key, POLICY, now=NOW) == CLAIMS
    assert read_header(text).alg == "EdDSA"
    with pytest.raises(TokenInvalid, match="none of the issuer's keys matches"):
        verify(text, signing_key("ES256"), POLICY, now=NOW)


@pytest.mark.parametrize("typ", [..., "JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "application/jwt"])
def test_access_token_types_are_accepted(typ: object) -> None:
    assert check(token(header={"typ": typ})) == CLAIMS


@pytest.mark.parametrize("audience", ["service", ["service"], ["account", "service"], ["service", "service"]])
def test_a_token_for_the_audience_among_others_is_accepted(audience: object) -> None:
    assert check(token(aud=audience))["aud"] == audience


@pytest.mark.parametrize("typ", [..., "Bearer", "bearer", "DPoP", "JWT", "at+jwt", "access", "access_token"])
def test_a_claim_typ_of_an_access_token_is_accepted(typ: object) -> None:
    assert check(token(typ=typ))["sub"] == "u-1"


# What issuers write into their access tokens, and what looks like it.
KINDS_OF_ACCESS_TOKENS: list[dict[str, Any]] = [
    {"token_use": "access", "client_id": "c", "typ": ...},  # Cognito
    {"token_use": "access_token"},
    {"purpose": "access_token"},  # Curity
    {"tokenName": "access_token", "token_type": "Bearer", "typ": ...},  # PingAM
    {"tok_type": "AT"},  # Oracle
    {"token_usage": "access_token"},  # OpenIddict
    {"type": "access_token"},  # Glewlwyd
    {"tokenType": "access-token"},  # Casdoor
    {"token_type": "DPoP"},
    {"type": "user", "purpose": "IT", "tok_type": "id", "token_type": "at"},
    *({name: odd} for name in ("purpose", "tokenName", "tok_type", "type") for odd in (None, 1, ["id"], {"id": 1}, "")),
]


@pytest.mark.parametrize("changes", KINDS_OF_ACCESS_TOKENS)
def test_what_says_that_it_is_an_access_token_or_nothing_of_its_kind_is_accepted(changes: dict[str, Any]) -> None:
    assert check(token(**changes))["sub"] == "u-1"


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": int(NOW) - 9},
        {"nbf": int(NOW) + 10},
        {"iat": int(NOW) + 10},
        {"iat": ...},
        {"nbf": 0, "iat": 0},
        {"nbf": -1},
        {"exp": 10**30},
        {"exp": 10**400},
        {"nbf": -(10**400)},
        {"exp": NOW - 9.75},
        {"nbf": NOW + 9.75},
        {"iat": NOW + 9.75},
        {"exp": NOW + 0.25, "nbf": NOW - 0.25, "iat": NOW - 0.25},
        {"exp": 1e300, "nbf": 0.0, "iat": -1e300},
    ],
)
def test_times_within_the_leeway_are_accepted(changes: dict[str, Any]) -> None:
    assert check(token(**changes))["sub"] == "u-1"


def test_the_leeway_is_the_policys() -> None:
    assert Policy("audience").leeway == 10
    strict = Policy(POLICY.audience, leeway=0)
    expired, early = token(exp=int(NOW)), token(nbf=int(NOW) + 1)

    assert check(expired)
    assert check(early)
    for text in (expired, early):
        with pytest.raises(TokenInvalid, match=r"expired|future"):
            verify(text, signing_key("ES256"), strict, now=NOW)


def test_a_token_of_the_greatest_size_is_accepted_and_a_longer_one_refused() -> None:
    sizes = {}
    for kid, pad in itertools.product(range(3), range(11_000, 12_300)):
        payload = json.dumps({**CLAIMS, "pad": "x" * pad}).encode()
        header = json.dumps({"alg": "ES256", "kid": "k" * kid}).encode()
        sizes[len(encode(payload)) + len(encode(header)) + 88] = (payload, header)

    largest, longer = (sign_bytes(*sizes[size]) for size in (MAX_TOKEN_SIZE, MAX_TOKEN_SIZE + 1))

    assert (len(largest), len(longer)) == (16 * 1024, 16 * 1024 + 1)
    assert check(largest)["sub"] == "u-1"
    refuse(longer, "longer than 16 KiB")


# --- signatures (RFC 8725) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alg",
    [
        "none",
        "None",
        "NONE",
        "nOnE",
        "",
        " ES256",
        "es256",
        "HS256",
        "HS512",
        "ES256K",
        "RSA-OAEP",
        "Ed448",
        "ed25519",
        "dir",
    ],
)
@pytest.mark.parametrize("keep_signature", [True, False])
def test_an_algorithm_that_is_not_accepted_is_refused(alg: str, keep_signature: bool) -> None:
    genuine = token(header={"alg": alg})

    refuse(genuine if keep_signature else genuine.rpartition(".")[0] + ".", "algorithm is not accepted")


@pytest.mark.parametrize("alg", [..., *ODD_VALUES, ["ES256"], {"ES256": "ES256"}])
def test_an_odd_algorithm_is_refused(alg: object) -> None:
    refuse(token(header={"alg": alg}), "algorithm is not accepted")


@pytest.mark.parametrize("form", [PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1])
@pytest.mark.parametrize("alg", ["HS256", "HS384", "HS512"])
def test_a_public_key_is_no_shared_secret(alg: str, form: PublicFormat) -> None:
    pem = private_key("RS256").public_key().public_bytes(Encoding.PEM, form)
    signed = f"{encode(json.dumps({'alg': alg, 'kid': 'k-1'}).encode())}.{encode(json.dumps(CLAIMS).encode())}"
    forged = f"{signed}.{encode(jwt.get_algorithm_by_name(alg).sign(signed.encode(), pem))}"

    refuse(forged, "algorithm is not accepted", "RS256")


@pytest.mark.parametrize(
    ("alg", "key"),
    [
        ("ES384", "ES256"),
        ("RS256", "ES256"),
        ("ES256", "RS256"),
        ("EdDSA", "RS256"),
        ("ES256", "EdDSA"),
        ("ES512", "ES384"),
    ],
)
def test_an_algorithm_that_is_not_the_keys_is_refused(alg: str, key: str) -> None:
    refuse(token(alg), "none of the issuer's keys matches", key)


@pytest.mark.parametrize("alg", ["RS384", "PS256"])
def test_a_key_that_names_its_algorithm_is_used_with_that_only(alg: str) -> None:
    with pytest.raises(TokenInvalid, match="none of the issuer's keys matches"):
        verify(token(alg), signing_key("RS256", alg="RS256"), POLICY, now=NOW)


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "ES384", "ES512", "EdDSA"])
def test_a_signature_of_another_key_is_refused(alg: str) -> None:
    other = {"RS256": 1, "PS256": 1}.get(alg, 2)

    refuse(token(alg, other), "signature is not valid", alg)


@pytest.mark.parametrize("member", ["jwk", "jku", "x5u", "x5c"])
def test_a_key_that_the_token_brings_along_is_not_used(member: str) -> None:
    own_key = {
        "jwk": jwk("ES256", 2),
        "jku": "https://evil.example/keys",
        "x5u": "https://evil.example/c",
        "x5c": ["MII"],
    }

    refuse(token("ES256", 2, header={member: own_key[member]}), "signature is not valid")


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "EdDSA"])
def test_changed_segments_are_refused(alg: str) -> None:
    header, payload, signature = token(alg).split(".")
    other_header = encode(json.dumps({"alg": alg, "kid": "k-1", "x": 1}).encode())
    other_payload = encode(json.dumps({**CLAIMS, "sub": "admin"}).encode())
    other_signature = token(alg, sub="u-2").split(".")[2]

    for changed in (
        f"{other_header}.{payload}.{signature}",
        f"{header}.{other_payload}.{signature}",
        f"{header}.{payload}.{other_signature}",
    ):
        refuse(changed, "signature is not valid", alg)


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "ES512", "EdDSA"])
@pytest.mark.parametrize(
    "signature", [b"", b"\x00", b"\x00" * 64, b"\x00" * 132, b"\x00" * 256, b"\xff" * 256, b"\xff" * 999]
)
def test_a_signature_of_any_length_that_is_none_is_refused(alg: str, signature: bytes) -> None:
    refuse(f"{token(alg).rpartition('.')[0]}.{encode(signature)}", "signature is not valid", alg)


def test_a_signature_in_another_encoding_than_that_of_jwts_is_refused() -> None:
    signed = token().rpartition(".")[0]
    der = private_key("ES256").sign(signed.encode(), ec.ECDSA(SHA256()))

    refuse(f"{signed}.{encode(der)}", "signature is not valid")


# --- form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", ".", "a", "a.b", "a.b.c.d", "....", "Bearer x"])
def test_what_has_not_three_segments_is_refused(text: str) -> None:
    refuse(text, "not a signed JWT")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.rpartition(".")[0],
        lambda t: t + ".",
        lambda t: "." + t,
        lambda t: t + "." + t.rpartition(".")[2],
        lambda t: ".".join([t.partition(".")[0], "key", "iv", "ciphertext", "tag"]),
    ],
    ids=["no signature", "dot behind", "dot before", "fourth segment", "JWE"],
)
def test_a_genuine_token_with_fewer_or_more_segments_is_refused(change: Callable[[str], str]) -> None:
    refuse(change(token()), "not a signed JWT")


def same_bits(segment: str) -> str:
    """Return another base64url text for the same bytes; needs a length that leaves unused bits."""
    assert len(segment) % 4 in (2, 3)
    other = segment[:-1] + ALPHABET[ALPHABET.index(segment[-1]) + 1]
    pad = "=" * (-len(segment) % 4)
    assert base64.urlsafe_b64decode(other + pad) == base64.urlsafe_b64decode(segment + pad)
    return other


def header_with_spare_bits() -> str:
    return encode(b'{"alg": "ES256", "kid": "k-1"}'.ljust(31))


def payload_with_spare_bits() -> str:
    return next(encode(p) for n in range(3) if len(p := json.dumps(CLAIMS).encode() + b" " * n) % 3)


SPELLINGS: list[Any] = [
    pytest.param(same_bits, id="unused bits set"),
    pytest.param(lambda s: s + "=" * (-len(s) % 4), id="padding"),
    pytest.param(lambda s: s + "====", id="more padding"),
    pytest.param(lambda s: s[:8] + "\n" + s[8:], id="line break"),
    pytest.param(lambda s: s + " ", id="space"),
    pytest.param(lambda s: s + "%20", id="percent"),
    pytest.param(lambda s: s[:4] + "!" + s[4:], id="stray character"),
    pytest.param(lambda s: s + "ü", id="not ASCII"),
    pytest.param(lambda s: s[:-1] + "\N{FULLWIDTH LATIN CAPITAL LETTER A}", id="wide letter"),
    pytest.param(lambda s: s + "\ud800", id="surrogate"),
]


@pytest.mark.parametrize("change", SPELLINGS)
def test_the_header_has_one_spelling_only(change: Callable[[str], str]) -> None:
    header, payload = header_with_spare_bits(), encode(json.dumps(CLAIMS).encode())
    assert check(sign_segments(header, payload)) == CLAIMS
    _, _, signature = sign_segments(header, payload).split(".")
    changed = change(header)
    if changed.isascii():
        signature = sign_segments(changed, payload).split(".")[2]

    refuse(f"{changed}.{payload}.{signature}", "header is not a JSON object in base64url")


@pytest.mark.parametrize("change", SPELLINGS)
def test_the_payload_has_one_spelling_only(change: Callable[[str], str]) -> None:
    header, payload = header_with_spare_bits(), payload_with_spare_bits()
    assert check(sign_segments(header, payload)) == CLAIMS
    changed = change(payload)
    signature = sign_segments(header, changed if changed.isascii() else payload).split(".")[2]

    refuse(f"{header}.{changed}.{signature}", "not well-formed")


@pytest.mark.parametrize("alg", ["ES256", "RS256", "EdDSA"])
@pytest.mark.parametrize("change", SPELLINGS)
def test_the_signature_has_one_spelling_only(change: Callable[[str], str], alg: str) -> None:
    signed, _, signature = token(alg).rpartition(".")

    refuse(f"{signed}.{change(signature)}", "not well-formed", alg)


def test_the_other_base64_alphabet_is_refused() -> None:
    header = header_with_spare_bits()
    payload = encode(json.dumps({**CLAIMS, "x": "~~~???>>>"}, ensure_ascii=False).encode() + b" " * 2)
    variants = {payload.translate(str.maketrans("-_", "+/")), payload.replace("_", "/"), payload.replace("-", "+")}
    variants.discard(payload)
    assert variants

    for changed in variants:
        refuse(sign_segments(header, changed), "not well-formed")


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "empty"),
        (b"[]", "list"),
        (b"null", "null"),
        (b'"text"', "string"),
        (b"{", "cut off"),
        (json.dumps(CLAIMS).encode("utf-16"), "UTF-16"),
        (b"\xef\xbb\xbf" + json.dumps(CLAIMS).encode(), "byte order mark"),
        (json.dumps({**CLAIMS, "name": "ü"}, ensure_ascii=False).encode("latin-1"), "Latin-1"),
        (json.dumps({**CLAIMS, "x": float("nan")}).encode(), "NaN"),
        (json.dumps(CLAIMS).encode().replace(b'"sub"', b'"sub": "u-0", "sub"'), "sub twice"),
        (json.dumps(CLAIMS).encode().replace(b'"sub"', b'"address": {"a": 1, "a": 2}, "sub"'), "nested member twice"),
        (b"[" * 5000, "deep"),
    ],
)
def test_a_genuinely_signed_payload_that_is_no_clean_json_object_is_refused(payload: bytes, why: str) -> None:
    refuse(sign_bytes(payload), "not well-formed")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b'{"alg": "ES256"',
        b'{"alg": "ES256", "alg": "ES256"}',
        b'{"alg": "none", "alg": "ES256"}',
        b'{"alg": "ES256", "kid": "k-1", "x": {"a": 1, "a": 1}}',
        b'{"alg": "ES256", "x": NaN}',
        b'\xef\xbb\xbf{"alg": "ES256"}',
        '{"alg": "ES256"}'.encode("utf-16-le"),
        b'{"alg": "ES256", "kid": "\xff"}',
        b'{"alg": ' + b"[" * 5000,
    ],
)
def test_a_header_that_is_no_clean_json_object_is_refused(header: bytes) -> None:
    refuse(sign_bytes(json.dumps(CLAIMS).encode(), header), "header is not a JSON object in base64url")


@pytest.mark.parametrize(
    "extension",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": None},
        {"crit": ["b64"], "b64": False},
        {"b64": True},
        {"b64": False},
        {"zip": "DEF"},
    ],
)
def test_extensions_are_refused(extension: dict[str, Any]) -> None:
    refuse(token(header=extension), "extension")


@pytest.mark.parametrize(
    "typ",
    [
        "logout+jwt",
        "dpop+jwt",
        "secevent+jwt",
        "JWE",
        "JOSE",
        "at+jwt ",
        "application/",
        "application/application/jwt",
        "text/jwt",
        *ODD_VALUES,
    ],
)
def test_tokens_of_another_type_are_refused(typ: object) -> None:
    refuse(token(header={"typ": typ}), "not JWT or at\\+jwt")


@pytest.mark.parametrize("kid", [1, True, ["k-1"], {}, 1.5])
def test_a_kid_that_is_no_string_is_refused(kid: object) -> None:
    refuse(token(header={"kid": kid}), "kid is not a string")


def test_reads_what_the_header_says_of_its_key() -> None:
    assert read_header(token("RS256")) == Header("RS256", "k-1")
    assert read_header(token("EdDSA", header={"kid": ...})) == Header("EdDSA", None)


# --- claims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "issuer",
    [
        ISSUER + "/",
        ISSUER + "2",
        ISSUER[:-1],
        ISSUER.upper(),
        ISSUER.replace("https", "http"),
        "https://evil.example/realms/test",
        [ISSUER],
        ...,
        *ODD_VALUES,
    ],
)
def test_a_token_of_another_issuer_is_refused(issuer: object) -> None:
    refuse(token(iss=issuer), "another issuer")


@pytest.mark.parametrize(
    "audience", ["", "serv", "services", "my service", "Service", "service ", ["account"], ["serv"]]
)
def test_a_token_for_another_audience_is_refused(audience: object) -> None:
    with pytest.raises(TokenInvalid) as caught:
        check(token(aud=audience))
    assert caught.value.claim == "aud"
    refuse(token(aud=audience), "not for the audience service")


@pytest.mark.parametrize(
    "audience",
    [..., None, [], 1, True, {"service": "service"}, ["service", 1], ["service", None], ["service", ["service"]]],
)
def test_a_token_without_a_proper_audience_is_refused(audience: object) -> None:
    refuse(token(aud=audience), "has no audience; it needs service")


@pytest.mark.parametrize("exp", [int(NOW) - 10, int(NOW) - 3600, 0, -1, -(10**30), NOW - 10, NOW - 10.25, 0.5, -1e300])
def test_an_expired_token_is_refused(exp: float) -> None:
    refuse(token(exp=exp), "expired")


def test_a_token_expires_at_the_very_second() -> None:
    key, exact = signing_key("ES256"), token(exp=int(NOW))

    assert verify(exact, key, POLICY, now=int(NOW) + 9.75)["sub"] == "u-1"
    with pytest.raises(TokenInvalid, match="expired"):
        verify(exact, key, POLICY, now=int(NOW) + 10)


@pytest.mark.parametrize("name", ["nbf", "iat"])
def test_a_token_is_from_the_future_until_the_very_second(name: str) -> None:
    key, exact = signing_key("ES256"), token(**{name: int(NOW)})

    assert verify(exact, key, POLICY, now=int(NOW) - 10)["sub"] == "u-1"
    with pytest.raises(TokenInvalid, match="from the future"):
        verify(exact, key, POLICY, now=int(NOW) - 10.25)


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", [None, "1750000060", "1750000060.5", True, False, [1750000060], {}])
def test_a_time_that_is_not_a_number_is_refused(name: str, value: Any) -> None:
    refuse(token(**{name: value}), f"{name} is not a finite number")


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1" + b"0" * 400 + b".5"])
def test_a_time_that_is_not_finite_is_refused(name: str, value: bytes) -> None:
    payload = json.dumps({**CLAIMS, name: 4711}).encode().replace(b"4711", value)

    refuse(sign_bytes(payload), f"{name} is not a finite number|not well-formed")


def test_a_token_without_expiry_is_refused() -> None:
    refuse(token(exp=...), "exp is not a finite number")


@pytest.mark.parametrize("name", ["nbf", "iat"])
@pytest.mark.parametrize("ahead", [11, 3600, 10**30, 10.75, 1e300])
def test_a_token_from_the_future_is_refused(name: str, ahead: float) -> None:
    changes: dict[str, Any] = {name: int(NOW) + ahead, "exp": 10**31}
    refuse(token(**changes), "from the future")


@pytest.mark.parametrize("subject", [..., None, "", 1, True, ["u-1"], {}])
def test_a_token_without_a_proper_subject_is_refused(subject: object) -> None:
    refuse(token(sub=subject), "has no subject")


def test_a_token_without_a_subject_is_accepted_where_the_policy_needs_none() -> None:
    policy = replace(POLICY, require_subject=False)

    assert "sub" not in verify(token(sub=...), signing_key("ES256"), policy, now=NOW)
    assert verify(token(), signing_key("ES256"), policy, now=NOW)["sub"] == "u-1"
    odd_subjects: list[Any] = [None, "", 1, True, ["u-1"], {}]
    for subject in odd_subjects:
        with pytest.raises(TokenInvalid, match="no subject"):
            verify(token(sub=subject), signing_key("ES256"), policy, now=NOW)
    with pytest.raises(TokenInvalid, match="no subject"):
        check_id_token(sub=...)


@pytest.mark.parametrize("changes", [{}, {"nonce": "n-1"}, {"at_hash": "x"}, {"at_hash": "x", "nonce": "n-1"}])
def test_what_has_claims_of_an_id_token_is_accepted_where_the_policy_says_so(changes: dict[str, Any]) -> None:
    policy = replace(POLICY, accept_id_tokens=True)
    claims: dict[str, Any] = {"typ": ..., **changes}

    assert verify(token(**claims), signing_key("ES256"), policy, now=NOW)["sub"] == "u-1"
    for other in (*KINDS_OF_ID_TOKENS, {"c_hash": "x"}, {"s_hash": "x"}, {"events": {}}, {"typ": "Refresh"}):
        with pytest.raises(TokenInvalid, match="not an access token"):
            verify(token(**{**claims, **other}), signing_key("ES256"), policy, now=NOW)


def test_access_tokens_may_have_a_name_of_their_own_for_the_issuer() -> None:
    keys = TrustedKeys(ISSUER, (signing_key("ES256"),), access_token_issuer="http://issuer.example/trust")

    def read(issuer: str) -> Unverified:
        return read_access_token(token(iss=issuer), POLICY, now=NOW)

    assert keys.confirm(read("http://issuer.example/trust"))["sub"] == "u-1"
    for issuer in (ISSUER, "http://issuer.example/trust/", "https://issuer.example/trust"):
        with pytest.raises(TokenInvalid, match="another issuer"):
            keys.confirm(read(issuer))


KEYCLOAKS_OTHER_TYPES = [
    "ID",
    "Refresh",
    "Offline",
    "Logout",
    "Serialized-ID",
    "InitialAccessToken",
    "reset-credentials",
]


@pytest.mark.parametrize("typ", [*KEYCLOAKS_OTHER_TYPES, "id", "id_token", "Bearer ", "logout+jwt", *ODD_VALUES])
def test_other_tokens_of_the_same_issuer_are_refused(typ: object) -> None:
    refuse(token(typ=typ), "not an access token, according to its typ")


@pytest.mark.parametrize("use", ["id", "ID", "id_token", "refresh", "Access token", ["access"], *ODD_VALUES])
def test_a_token_for_another_use_is_refused(use: object) -> None:
    refuse(token(token_use=use), "not an access token, according to its token_use")


# What issuers write into their ID tokens.
KINDS_OF_ID_TOKENS: list[dict[str, Any]] = [
    {"token_use": "id"},
    {"typ": "id_token"},
    {"purpose": "id"},
    {"purpose": "id_token"},
    {"tokenName": "id_token"},
    {"tok_type": "IT"},
    {"token_usage": "id_token"},
    {"token_type": "id_token"},
    {"type": "ID-Token"},
]


def says(changes: dict[str, Any]) -> str:
    (claim,) = changes
    return f"according to its {claim}"


@pytest.mark.parametrize(
    "changes",
    [
        *KINDS_OF_ID_TOKENS,
        {"tokenName": "refresh_token"},
        {"tokenType": "refresh-token"},
        {"tok_type": "RT"},
        {"type": "refresh"},
        {"purpose": "refresh_token"},
    ],
)
@pytest.mark.parametrize("typ", ["JWT", "at+jwt"])
def test_what_says_that_it_is_of_another_kind_is_refused(changes: dict[str, Any], typ: str) -> None:
    refuse(token(**changes, header={"typ": typ}), f"not an access token, {says(changes)}")


def check_id_token(**changes: Any) -> dict[str, Any]:
    claims = {"aud": "client", "typ": ..., **changes}
    return read_id_token(token(**claims), ["client"], leeway=10, now=NOW).claims


@pytest.mark.parametrize(
    "changes", [{}, {"typ": "ID"}, *KINDS_OF_ID_TOKENS, {"tokenType": "access-token"}, {"type": 1}]
)
def test_what_says_that_it_is_an_id_token_or_nothing_is_taken_for_one(changes: dict[str, Any]) -> None:
    assert check_id_token(**changes)["sub"] == "u-1"


@pytest.mark.parametrize(
    "changes",
    [
        *({"typ": typ} for typ in ("Bearer", "JWT", "Refresh", "Logout", "Serialized-ID", *ODD_VALUES)),
        *({"token_use": use} for use in ("access", "refresh", *ODD_VALUES)),
        {"purpose": "access_token"},
        {"tokenName": "access_token"},
        {"tok_type": "AT"},
        {"token_usage": "access_token"},
        {"token_type": "access"},
        {"type": "access_token"},
        {"type": "refresh_token"},
        {"tokenType": "refresh-token"},
    ],
)
def test_what_says_that_it_is_of_another_kind_is_not_taken_for_an_id_token(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenInvalid, match=f"not an ID token, {says(changes)}"):
        check_id_token(**changes)


BINDINGS: list[Any] = [{"jkt": "x"}, {"x5t#S256": "x"}, {"jwk": {}}, {"kid": "x"}, *ODD_VALUES]


@pytest.mark.parametrize("cnf", BINDINGS)
def test_a_token_that_is_bound_to_a_key_is_refused_unless_the_policy_accepts_it(cnf: object) -> None:
    with pytest.raises(TokenInvalid, match="bound to a key") as caught:
        check(token(cnf=cnf))
    assert caught.value.claim == "cnf"
    accepting = replace(POLICY, accept_bound=True)
    assert "cnf" in verify(token(cnf=cnf), signing_key("ES256"), accepting, now=NOW)
    assert check_id_token(cnf=cnf)["sub"] == "u-1"


@pytest.mark.parametrize("name", ["at_hash", "c_hash", "s_hash", "events"])
@pytest.mark.parametrize("typ", [..., "Bearer"])
def test_claims_of_other_tokens_are_refused_whatever_they_are(name: str, typ: object) -> None:
    values: list[Any] = [None, "", {}, "x"]
    for value in values:
        refuse(token(typ=typ, **{name: value}), "not an access token")


def test_a_nonce_is_accepted_only_in_what_says_that_it_is_an_access_token() -> None:
    for typ in (..., None, "bearer", "JWT", ["Bearer"]):
        refuse(token(nonce="n-1", typ=typ), "not an access token")

    for typ in ("Bearer", "DPoP"):
        assert check(token(nonce="n-1", typ=typ))["nonce"] == "n-1"
    assert check(token(nonce="n-1", typ=..., header={"typ": "at+jwt"}))["nonce"] == "n-1"


def test_the_clients_that_a_token_may_be_issued_to() -> None:
    key = signing_key("ES256")
    for parties in (["gateway"], ("other", "gateway"), frozenset({"gateway"}), {"gateway": 1}):
        assert verify(token(azp="gateway"), key, Policy("service", 10, parties), now=NOW)["azp"] == "gateway"
    for changes in ({}, {"azp": "gate"}, {"azp": None}, {"azp": 1}, {"client_id": ["gateway"]}):
        with pytest.raises(TokenInvalid, match="authorized party") as caught:
            verify(token(**changes), key, Policy("service", 10, ["gateway"]), now=NOW)
        assert caught.value.claim == "azp"


def at_hash(access_token: str, hash_name: str) -> str:
    digest = hashlib.new(hash_name, access_token.encode()).digest()
    return encode(digest[: len(digest) // 2])


@pytest.mark.parametrize("alg", [None, *sorted(ALGORITHMS)])
@pytest.mark.parametrize("hash_name", ["sha256", "sha384", "sha512"])
def test_the_hash_of_an_id_token_is_its_algorithms(alg: str | None, hash_name: str) -> None:
    fits = alg in (None, "EdDSA") or alg[2:] == hash_name[3:]
    claims = {"iss": ISSUER, "sub": "u-1", "at_hash": at_hash("token", hash_name)}

    assert (id_token_mismatch(claims, CLAIMS, "token", alg) is None) == fits
    assert id_token_mismatch(claims, CLAIMS, "another token", alg) is not None


@pytest.mark.parametrize("value", [*ODD_VALUES[1:], "A" * 22, "A" * 43, "é" * 22])
@pytest.mark.parametrize("alg", [None, "RS256", "EdDSA"])
def test_an_odd_hash_fits_no_token(value: object, alg: str | None) -> None:
    assert id_token_mismatch({"iss": ISSUER, "sub": "u-1", "at_hash": value}, CLAIMS, "token", alg) is not None


@pytest.mark.parametrize(("name", "alg"), [("iss", None), ("sub", None), ("sub", "RS256")])
@pytest.mark.parametrize("value", [..., *ODD_VALUES])
def test_id_claims_of_another_issuer_or_subject_fit_no_token(name: str, alg: str | None, value: Any) -> None:
    claims = {"iss": ISSUER, "sub": "u-1", "at_hash": at_hash("token", "sha256"), name: value}
    claims = {k: v for k, v in claims.items() if v is not ...}

    assert id_token_mismatch(claims, CLAIMS, "token", alg) == f"its {name} does not match the access token"


@pytest.mark.parametrize("issuer", [ISSUER + "/", "https://evil.example", ..., *ODD_VALUES])
def test_a_signed_id_token_of_another_issuer_is_refused(issuer: object) -> None:
    text = token(aud="client", typ=..., iss=issuer)
    unverified = read_id_token(text, ["client"], leeway=10, now=NOW)
    for access_token_issuer in (None, issuer if isinstance(issuer, str) else "x"):
        with pytest.raises(TokenInvalid, match="another issuer"):
            TrustedKeys(ISSUER, (signing_key("ES256"),), access_token_issuer).confirm(unverified)


def test_where_access_tokens_have_no_subject_an_id_token_is_bound_by_its_hash_and_signature() -> None:
    access_claims = {name: value for name, value in CLAIMS.items() if name != "sub"}
    claims = {"iss": ISSUER, "sub": "u-1", "at_hash": at_hash("token", "sha256")}
    bare = {"iss": ISSUER, "at_hash": at_hash("token", "sha256")}

    assert id_token_mismatch(claims, access_claims, "token", "RS256") is None
    assert id_token_mismatch(claims, access_claims, "another token", "RS256") is not None
    assert id_token_mismatch({"iss": ISSUER, "sub": "u-1"}, access_claims, "token", "RS256") is not None
    assert id_token_mismatch(claims, access_claims, "token") == "the access token has no sub"
    assert id_token_mismatch(bare, access_claims, "token") == "the access token has no sub"


@pytest.mark.parametrize(("name", "value"), list(itertools.product([*CLAIMS, "nbf", "azp", "scope"], ODD_VALUES)))
def test_odd_claims_in_a_genuine_token_cause_no_other_error(name: str, value: Any) -> None:
    try:
        check(token(**{name: value}))
    except TokenInvalid as error:
        assert name in ("iss", "aud", "sub", "exp", "nbf", "iat", "typ"), error  # noqa: PT017


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alg", "changes", "algorithms"),
    [
        ("RS256", {}, {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
        ("RS256", {"alg": "PS256", "use": "sig", "key_ops": ["verify"]}, {"PS256"}),
        ("ES256", {}, {"ES256"}),
        ("ES384", {"alg": "ES384", "kid": ...}, {"ES384"}),
        ("ES512", {"x5c": ["MII"], "x5t": "x", "unknown": {"a": 1}}, {"ES512"}),
        ("EdDSA", {"key_ops": ["verify", "sign"]}, {"EdDSA"}),
    ],
)
def test_a_key_may_be_used_with_the_algorithms_of_its_kind(
    alg: str, changes: dict[str, Any], algorithms: set[str]
) -> None:
    key = signing_key(alg, **changes)

    assert key.kid == (None if changes.get("kid") is ... else "k-1")
    assert key.algorithms == algorithms


UNUSABLE: list[Any] = [
    pytest.param(private_jwk("RS256"), id="private RSA key"),
    pytest.param(private_jwk("ES256"), id="private EC key"),
    pytest.param(private_jwk("EdDSA"), id="private Ed25519 key"),
    pytest.param(jwk("ES256", d=None), id="private member without value"),
    pytest.param({"kty": "oct", "k": encode(b"x" * 64), "kid": "k-1"}, id="shared secret"),
    pytest.param({"kty": "oct", "k": encode(b"x" * 64), "kid": "k-1", "alg": "HS256"}, id="HS256 secret"),
    pytest.param({"kty": "oct", "k": encode(b"x" * 64), "kid": "k-1", "alg": "RS256"}, id="secret that says RS256"),
    pytest.param(jwk("RS256", use="enc"), id="for encryption"),
    pytest.param(jwk("RS256", use=["sig"]), id="use is a list"),
    pytest.param(jwk("RS256", use=None), id="use is null"),
    pytest.param(jwk("RS256", key_ops=["sign", "encrypt"]), id="not for verifying"),
    pytest.param(jwk("RS256", key_ops=[]), id="for nothing"),
    pytest.param(jwk("RS256", key_ops="verify"), id="key_ops is a string"),
    pytest.param(jwk("RS256", alg="RSA-OAEP"), id="encryption algorithm"),
    pytest.param(jwk("RS256", alg="ES256"), id="RSA key that says ES256"),
    pytest.param(jwk("RS256", alg="HS256"), id="RSA key that says HS256"),
    pytest.param(jwk("RS256", alg="none"), id="RSA key that says none"),
    pytest.param(jwk("ES256", alg="ES384"), id="P-256 key that says ES384"),
    pytest.param(jwk("EdDSA", alg="ES256"), id="Ed25519 key that says ES256"),
    pytest.param(jwk("EdDSA", alg="Ed448"), id="Ed25519 key that says Ed448"),
    pytest.param(jwk("ES256", alg="Ed25519"), id="P-256 key that says Ed25519"),
    pytest.param(jwk("RS256", alg="Ed25519"), id="RSA key that says Ed25519"),
    pytest.param(jwk("ES256", crv="P-384"), id="point that is not on its curve"),
    pytest.param(jwk("ES256", crv="secp256k1"), id="curve without an algorithm"),
    pytest.param(jwk("EdDSA", crv="X25519"), id="key for key agreement"),
    pytest.param(jwk("EdDSA", crv="Ed448"), id="curve of another length"),
    pytest.param(jwk("ES256", kty="EC2"), id="unknown kind"),
    pytest.param(jwk("ES256", kty=...), id="no kind"),
    pytest.param(jwk("ES256", x=...), id="no coordinate"),
    pytest.param(jwk("ES256", x="AA"), id="short coordinate"),
    pytest.param(jwk("RS256", n=...), id="no modulus"),
    pytest.param(jwk("RS256", e="!"), id="exponent that is no base64"),
    pytest.param(jwk("RS256", kid=1), id="kid is a number"),
    pytest.param("text", id="text"),
    pytest.param(None, id="null"),
    pytest.param([], id="list"),
    pytest.param({}, id="empty"),
]


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_an_unusable_key_is_passed_over(unusable: Any) -> None:
    usable = jwk("ES384", kid="k-2")

    assert [key.kid for key in read_keys({"keys": [unusable, usable, unusable]})] == ["k-2"]


@pytest.mark.parametrize(("bits", "taken"), [(1024, 0), (2047, 0), (2048, 1)])
def test_short_rsa_keys_are_passed_over(bits: int, taken: int) -> None:
    public = rsa.generate_private_key(65537, bits).public_key()
    member = jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True) | {"key_ops": ["verify"]}

    assert len(read_keys({"keys": [member]})) == taken


@pytest.mark.parametrize("alg", ["RS256", "ES256", "EdDSA"])
def test_odd_members_of_keys_never_raise(alg: str) -> None:
    names = ["kty", "crv", "n", "e", "x", "y", "kid", "alg", "use", "key_ops", "x5c"]
    members = [jwk(alg, **{name: value}) for name in names for value in [*ODD_VALUES, ["verify", 1], "A" * 5000]]

    for key in read_keys({"keys": members}):
        assert isinstance(key.kid, str | None)
        assert key.algorithms <= ALGORITHMS


@pytest.mark.parametrize("keys", [..., *ODD_VALUES])
def test_a_key_set_that_is_none_has_no_keys(keys: object) -> None:
    assert read_keys({} if keys is ... else {"keys": keys}) == ()


def test_keys_are_chosen_by_kid_and_algorithm() -> None:
    first, second, third = keys = read_keys(
        {"keys": [jwk("ES256"), jwk("ES384", kid="k-2"), jwk("RS256", kid="k-1", alg="RS256")]}
    )

    assert matching_keys(keys, Header("ES256", "k-1")) == [first]
    assert matching_keys(keys, Header("RS256", "k-1")) == [third]
    assert matching_keys(keys, Header("ES384", "k-2")) == [second]
    for other in (("ES384", "k-1"), ("RS512", "k-1"), ("ES256", "K-1"), ("ES256", "")):
        assert matching_keys(keys, Header(*other)) == []
    assert matching_keys((), Header("ES256", None)) == []


def test_a_key_is_shown_without_its_numbers() -> None:
    assert repr(signing_key("ES256")) == "SigningKey(kid='k-1', algorithms=frozenset({'ES256'}))"


def test_without_kid_all_keys_of_the_algorithm_are_chosen() -> None:
    keys = read_keys({"keys": [jwk("ES256"), jwk("ES384", kid="k-2"), jwk("ES256", 2, kid="k-3")]})

    assert matching_keys(keys, Header("ES384", None)) == [keys[1]]
    assert matching_keys(keys, Header("ES256", None)) == [keys[0], keys[2]]


def confirm(text: str, *members: dict[str, Any]) -> dict[str, Any]:
    return TrustedKeys(ISSUER, read_keys({"keys": list(members)})).confirm(read_access_token(text, POLICY, now=NOW))


@pytest.mark.parametrize(
    "again",
    [
        {},
        {"use": ...},
        {"use": "sig", "x5c": ["MII"], "x5t": "x"},
        {"alg": "RS256"},
        {"alg": "RS512", "key_ops": ["verify"]},
        {"kid": "k-2"},
        {"kid": ...},
    ],
)
@pytest.mark.parametrize("kid", ["k-1", ...])
def test_a_key_that_is_listed_twice_is_one_key(again: dict[str, Any], kid: object) -> None:
    members = [jwk("RS256"), jwk("RS256", **again)]
    for listed in (members, members[::-1]):
        assert confirm(token("RS256", header={"kid": kid}), *listed) == CLAIMS
        with pytest.raises(NoKeyFits, match="signature is not valid"):
            confirm(token("RS256", 1, header={"kid": kid}), *listed)


@pytest.mark.parametrize("kid", ["k-1", ...])
def test_each_key_that_the_header_allows_is_tried(kid: object) -> None:
    members = [jwk("RS256"), jwk("RS256", 1)]
    for which in (0, 1):
        assert confirm(token("RS256", which, header={"kid": kid}), *members) == CLAIMS
    with pytest.raises(NoKeyFits, match="signature is not valid"):
        confirm(token("RS256", 2, header={"kid": kid}), *members)


def test_no_other_key_is_tried_than_those_of_the_kid() -> None:
    with pytest.raises(NoKeyFits, match="signature is not valid"):
        confirm(token("RS256", 1), jwk("RS256"), jwk("RS256", 1, kid="k-2"))
    with pytest.raises(NoKeyFits, match="none of the issuer's keys matches"):
        confirm(token("RS256", header={"kid": "k-3"}), jwk("RS256"), jwk("RS256", 1, kid="k-2"))


# --- without keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_jwt"),
    [
        pytest.param(token(), True, id="ES256"),
        pytest.param(token("RS256"), True, id="RS256"),
        pytest.param(token(header={"alg": "none"}), True, id="unsigned"),
        pytest.param(token(header={"crit": []}), True, id="extension"),
        pytest.param(token(header={"typ": "logout+jwt"}), True, id="logout token"),
        pytest.param(token(pad="x" * 20_000), True, id="oversize"),
        pytest.param(sign_bytes(b"{}", b' {"alg": "ES256"}'), True, id="space before the header"),
        pytest.param("eyJ.x.y", True, id="broken"),
        pytest.param("opaque", False, id="opaque"),
        pytest.param("", False, id="empty"),
        pytest.param("a.b.c", False, id="three words"),
        pytest.param("eyJhbGciOi", False, id="one segment"),
        pytest.param(token() + ".x.y", False, id="five segments"),
    ],
)
def test_tells_a_jwt_from_an_opaque_token(text: str, is_jwt: bool) -> None:
    assert looks_like_jwt(text) == is_jwt


def test_claims_can_be_read_without_verifying() -> None:
    assert unverified_claims(token().rpartition(".")[0] + ".x") == CLAIMS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "opaque",
        "a.b",
        "a.b.c",
        "..",
        "a.ü.c",
        "a.\ud800.c",
        pytest.param(token() + ".x", id="four segments"),
        pytest.param(token(pad="x" * 20_000), id="oversize"),
        pytest.param(sign_bytes(b"[]"), id="list"),
    ],
)
def test_what_is_no_jwt_has_no_claims(text: str) -> None:
    assert unverified_claims(text) == {}


# --- anything at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "EdDSA"])
def test_no_mutation_of_a_genuine_token_is_accepted(alg: str) -> None:
    chance = random.Random(20260)
    genuine = token(alg)
    key = signing_key(alg)
    mutations = [mutate(genuine, chance) for _ in range(600)]
    mutations = [text for text in mutations if text != genuine]
    assert len(mutations) > 500

    for text in mutations:
        with pytest.raises(TokenInvalid) as caught:
            verify(text, key, POLICY, now=NOW)
        message = str(caught.value)
        assert not any(part in message for part in text.split(".") if len(part) > 8), message
        assert caught.value.__cause__ is None


def test_mutated_headers_and_payloads_with_a_genuine_signature_cause_no_other_error() -> None:
    chance = random.Random(20261)
    accepted = 0
    for _ in range(1000):
        header, payload = '{"alg": "ES256", "kid": "k-1", "typ": "JWT"}', json.dumps(CLAIMS)
        if chance.random() < 0.3:
            header = mutate(header, chance)
        else:
            payload = mutate(payload, chance)
        try:
            claims = check(sign_bytes(payload.encode(), header.encode()))
        except TokenInvalid:
            continue
        accepted += 1
        assert (claims["iss"], claims["aud"]) == (ISSUER, POLICY.audience)
    assert accepted > 0
