"""Forged tokens, as the scheme's clients send them: whatever is tried, the answer is "not authenticated".

The threats are those of RFC 8725 §2 and of the advisories for PyJWT, python-jose and Authlib up to 2026; the numbers
are those of the advisories that an attack is known from, there or in another library.
"""

import base64
import hmac
import itertools
import json
import random
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI, HTTPException
from fastapi.security import SecurityScopes
from starlette.requests import HTTPConnection

from eoepca_security.testing import FakeIssuer
from tests.support.fastapi import bearer, get, make_app, make_scheme, open_socket
from tests.support.tokens import mutate

Forge = Callable[["Attacker"], str]


class Attacker:
    """Somebody who has a genuine token, the issuer's public key and their own keys."""

    def __init__(self, issuer: FakeIssuer) -> None:
        self.issuer = issuer
        self.genuine = issuer.issue()
        self.own_rsa_key = rsa.generate_private_key(65537, 2048)

    @property
    def claims(self) -> dict[str, Any]:
        now = int(time.time())
        return {"iss": self.issuer.url, "aud": "service", "sub": "admin", "iat": now, "exp": now + 60}

    @property
    def header(self) -> dict[str, Any]:
        return {"alg": self.issuer.algorithm, "kid": self.issuer.kid, "typ": "JWT"}

    @property
    def jwk(self) -> dict[str, Any]:
        (key,) = self.issuer.jwks()["keys"]
        return dict(key)

    def public(self, encoding: Encoding, form: PublicFormat) -> bytes:
        return self.issuer.key.public_key().public_bytes(encoding, form)

    def unsigned(self, signature: bytes = b"", **header: Any) -> str:
        return ".".join([encode(self.header | header), encode(self.claims), encode(signature)])

    def signed_with_secret(self, secret: bytes, alg: str = "HS256", **header: Any) -> str:
        signed = self.unsigned(alg=alg, **header).removesuffix(".")
        return f"{signed}.{encode(hmac.digest(secret, signed.encode(), alg.replace('HS', 'sha')))}"

    def signed_with_own_key(self, **header: Any) -> str:
        return sign(self.own_rsa_key, "RS256", self.claims, self.header | header)

    def genuinely_signed(self, payload: Any, header: Any = None) -> str:
        """Return what only an issuer that is confused or led astray would sign."""
        return sign(self.issuer.key, self.issuer.algorithm, payload, header or self.header)


def sign(key: Any, alg: str, payload: Any, header: Any) -> str:
    """Sign anything, as no library would."""
    signed = f"{encode(header)}.{encode(payload)}"
    return f"{signed}.{encode(jwt.get_algorithm_by_name(alg).sign(signed.encode(), key))}"


def public_jwk(key: rsa.RSAPrivateKey, **changes: Any) -> dict[str, Any]:
    return {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), **changes}


def encode(part: Any) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def each(what: str, values: Iterable[Any], forge: Callable[[Attacker, Any], str]) -> dict[str, Forge]:
    def with_value(value: Any) -> Forge:
        return lambda attacker: forge(attacker, value)

    return {f"{what} {value!r}": with_value(value) for value in values}


PEM, DER, SSH = Encoding.PEM, Encoding.DER, Encoding.OpenSSH
SPKI, PKCS1 = PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1
NESTED = b'{"a":' * 3000 + b"1" + b"}" * 3000

ATTACKS: dict[str, Forge] = {
    # §2.1: no signature, or a public key taken for a shared secret
    **each("alg", ("none", "None", "NONE", "nOnE", "", " none"), lambda a, alg: a.unsigned(alg=alg)),
    "alg none with the genuine signature": lambda a: ".".join([encode({"alg": "none"}), *a.genuine.split(".")[1:]]),
    "no alg": lambda a: ".".join([encode({"typ": "JWT"}), *a.genuine.split(".")[1:]]),
    "PEM as secret (CVE-2017-11424)": lambda a: a.signed_with_secret(a.public(PEM, SPKI)),
    "PKCS1 PEM as secret": lambda a: a.signed_with_secret(a.public(PEM, PKCS1)),
    "PEM without line ends as secret (CVE-2026-102268)": lambda a: a.signed_with_secret(
        a.public(PEM, SPKI).replace(b"\n", b"")
    ),
    "DER as secret": lambda a: a.signed_with_secret(a.public(DER, SPKI), "HS512"),
    "PKCS1 DER as secret": lambda a: a.signed_with_secret(a.public(DER, PKCS1)),
    "OpenSSH key as secret (CVE-2022-29217, CVE-2024-33663)": lambda a: a.signed_with_secret(
        a.public(SSH, PublicFormat.OpenSSH), "HS384"
    ),
    "JWK as secret (CVE-2026-48526)": lambda a: a.signed_with_secret(json.dumps(a.jwk).encode()),
    "JWK Set as secret (CVE-2026-102273)": lambda a: a.signed_with_secret(json.dumps(a.issuer.jwks()).encode()),
    # §2.2: weak or empty secrets
    "empty secret (CVE-2026-102266)": lambda a: a.signed_with_secret(b""),
    "weak secret": lambda a: a.signed_with_secret(b"secret", "HS512", kid=None),
    # §2.3: encryption
    "JWE": lambda a: ".".join([encode({"alg": "RSA-OAEP", "enc": "A256GCM"}), "AA", "AA", "AA", "AA"]),
    "direct JWE with a zip bomb (CVE-2024-33664)": lambda a: ".".join(
        [encode({"alg": "dir", "enc": "A128GCM", "zip": "DEF"}), "", "AA", encode(zlib.compress(b"0" * 10**6)), "AA"]
    ),
    "JWE with many rounds (CVE-2022-3102)": lambda a: ".".join(
        [encode({"alg": "PBES2-HS256+A128KW", "enc": "A128GCM", "p2c": 2**31 - 1, "p2s": "AA"}), "AA", "AA", "AA", "AA"]
    ),
    "JWE header with three segments": lambda a: a.unsigned(b"x", alg="RSA1_5", enc="A128CBC-HS256"),
    "signed and zipped": lambda a: a.genuinely_signed(
        zlib.compress(json.dumps(a.claims).encode()), a.header | {"zip": "DEF"}
    ),
    # §2.5: signatures without meaning
    "signature of zeros (CVE-2022-21449)": lambda a: a.unsigned(bytes(64), alg="ES256"),
    "zeros of RSA's length": lambda a: a.unsigned(bytes(256)),
    "one": lambda a: a.unsigned(bytes(255) + b"\x01"),
    "empty signature": lambda a: a.genuine.rpartition(".")[0] + ".",
    "signature cut off": lambda a: a.genuine[:-4],
    "signature of another token": lambda a: a.unsigned().removesuffix(".") + "." + a.issuer.issue().rpartition(".")[2],
    "other characters in the signature (CVE-2026-102269)": lambda a: a.genuine + "!",
    "padding behind the signature": lambda a: a.genuine + "==",
    "line end inside the signature": lambda a: a.genuine[:-10] + "\n" + a.genuine[-10:],
    # §2.4 and §2.6: what two parsers may read differently
    "claim twice": lambda a: a.genuinely_signed(json.dumps(a.claims)[:-1].encode() + b',"sub":"root"}'),
    "header twice": lambda a: a.genuinely_signed(a.claims, json.dumps(a.header)[:-1].encode() + b',"alg":"none"}'),
    "UTF-16": lambda a: a.genuinely_signed(json.dumps(a.claims).encode("utf-16")),
    "byte order mark": lambda a: a.genuinely_signed(b"\xef\xbb\xbf" + json.dumps(a.claims).encode()),
    "UTF-8 that is none": lambda a: a.genuinely_signed(json.dumps(a.claims)[:-1].encode() + b',"x":"\xc0\x80"}'),
    "NaN": lambda a: a.genuinely_signed(json.dumps(a.claims | {"exp": float("nan")}).encode()),
    "list": lambda a: a.genuinely_signed([a.claims]),
    "deep nesting": lambda a: a.genuinely_signed(b"[" * 6000 + b"]" * 6000),
    "deeper claims": lambda a: a.genuinely_signed(NESTED),
    "deep header": lambda a: f"{encode(NESTED)}.{encode(a.claims)}.AA",
    "long number": lambda a: a.genuinely_signed(json.dumps(a.claims)[:-1].encode() + b',"x":' + b"9" * 5000 + b"}"),
    "number beyond floats": lambda a: a.genuinely_signed(
        json.dumps(a.claims | {"exp": 4711}).encode().replace(b"4711", b"1e309")
    ),
    "JWS in JSON form": lambda a: json.dumps(
        dict(zip(("protected", "payload", "signature"), a.genuine.split("."), strict=True))
    ),
    "JSON around a compact JWS (CVE-2022-39227)": lambda a: json.dumps(
        {" " + a.genuine.rpartition(".")[0] + ".": "", "payload": encode(a.claims), "signature": "AA"}
    ),
    # extensions, known from CVE-2025-59420 and CVE-2026-32597
    "crit that nobody knows": lambda a: a.genuinely_signed(a.claims, a.header | {"crit": ["bork"], "bork": 1}),
    "crit without anything": lambda a: a.genuinely_signed(a.claims, a.header | {"crit": []}),
    "crit cnf": lambda a: a.genuinely_signed(a.claims, a.header | {"crit": ["cnf"], "cnf": {"jkt": "x"}}),
    "payload that is not encoded": lambda a: a.genuinely_signed(a.claims, a.header | {"b64": False, "crit": ["b64"]}),
    "b64 without crit": lambda a: a.genuinely_signed(a.claims, a.header | {"b64": False}),
    # §2.9: keys and addresses that the token brings along
    "jwk (CVE-2026-27962)": lambda a: a.signed_with_own_key(jwk=public_jwk(a.own_rsa_key)),
    "jku": lambda a: a.signed_with_own_key(jku=a.issuer.url + "/stolen"),
    "x5u": lambda a: a.signed_with_own_key(x5u=a.issuer.url + "/stolen", x5t="AA"),
    "x5c": lambda a: a.signed_with_own_key(x5c=[encode(a.own_rsa_key.public_key().public_bytes(DER, SPKI))]),
    "own key": lambda a: a.signed_with_own_key(),
    "own key without kid": lambda a: a.signed_with_own_key(kid=None),
    **each(
        "kid",
        ("../../dev/null", "/dev/null", "x' UNION SELECT '", "|id", "http://127.0.0.1/k", "\0", "k" * 9000, "é"),
        lambda a, kid: a.signed_with_secret(b"", kid=kid),
    ),
    **each(
        "kid",
        ("../../dev/null", "x' OR '1'='1", "\0", "é"),
        lambda a, kid: a.genuinely_signed(a.claims, {**a.header, "kid": kid}),
    ),
    "kid of a list": lambda a: a.genuinely_signed(a.claims, a.header | {"kid": [a.issuer.kid]}),
    "algorithm of another kind of key": lambda a: a.unsigned(bytes(64), alg="EdDSA"),
    "algorithm that is not the key's own": lambda a: a.genuinely_signed(a.claims, a.header | {"alg": "RS512"}),
    # §2.7: tokens for somebody else
    "another audience": lambda a: a.genuinely_signed(a.claims | {"aud": "other"}),
    "audience in part": lambda a: a.genuinely_signed(a.claims | {"aud": "my service too"}),
    "audience as an object": lambda a: a.genuinely_signed(a.claims | {"aud": {"service": 1}}),
    "audience within a list": lambda a: a.genuinely_signed(a.claims | {"aud": [["service"]]}),
    "audience among odd ones": lambda a: a.genuinely_signed(a.claims | {"aud": ["service", None]}),
    "no audience": lambda a: a.genuinely_signed({k: v for k, v in a.claims.items() if k != "aud"}),
    "issuer in part (CVE-2024-53861)": lambda a: a.genuinely_signed(a.claims | {"iss": a.issuer.url[:-1]}),
    "issuer in a list": lambda a: a.genuinely_signed(a.claims | {"iss": [a.issuer.url]}),
    "issuer with a slash": lambda a: a.genuinely_signed(a.claims | {"iss": a.issuer.url + "/"}),
    "no issuer": lambda a: a.genuinely_signed({k: v for k, v in a.claims.items() if k != "iss"}),
    **each("subject", ("", 0, None, ["x"]), lambda a, sub: a.genuinely_signed(a.claims | {"sub": sub})),
    # §2.8: tokens of another kind
    **each(
        "typ",
        ("logout+jwt", "secevent+jwt", "dpop+jwt", "JWE", "id_token", "application/jose", None, ["JWT"]),
        lambda a, typ: a.genuinely_signed(a.claims, a.header | {"typ": typ}),
    ),
    **each(
        "Keycloak's token",
        ("ID", "Refresh", "Offline", "Logout", "Serialized-ID", "verify-email"),
        lambda a, typ: a.genuinely_signed(a.claims | {"typ": typ}),
    ),
    **each(
        "Cognito's token",
        ("id", "refresh", "", None, 1, ["access"], {"access": 1}),
        lambda a, use: a.genuinely_signed(a.claims | {"token_use": use}),
    ),
    **each(
        "token of another issuer's kind",
        ("purpose", "tokenName", "token_usage", "token_type", "type"),
        lambda a, name: a.genuinely_signed(a.claims | {name: "id_token"}),
    ),
    "Oracle's ID token": lambda a: a.genuinely_signed(a.claims | {"tok_type": "IT"}),
    "Casdoor's refresh token": lambda a: a.genuinely_signed(a.claims | {"tokenType": "refresh-token"}),
    "ID token of the issuer": lambda a: a.issuer.id_token(a.genuine, aud="service"),
    "ID token of an issuer without typ": lambda a: a.genuinely_signed(a.claims | {"nonce": "n-1"}),
    "ID token with at_hash": lambda a: a.genuinely_signed(a.claims | {"typ": "Bearer", "at_hash": "x"}),
    # somebody else's, who has the key that they are bound to
    **each(
        "cnf",
        ({"jkt": "x"}, {"x5t#S256": "x"}, {}, None, "", "x", [], ["x"], 0, False),
        lambda a, cnf: a.genuinely_signed(a.claims | {"cnf": cnf}),
    ),
    "logout token": lambda a: a.genuinely_signed(
        a.claims | {"events": {"http://schemas.openid.net/event/backchannel-logout": {}}}
    ),
    # times
    **each(
        "exp",
        (0, -1, 1_700_000_000, 1_700_000_000.5, "9999999999", "9999999999.5", -1e300, None, True, [9999999999]),
        lambda a, exp: a.genuinely_signed(a.claims | {"exp": exp}),
    ),
    "no exp": lambda a: a.genuinely_signed({k: v for k, v in a.claims.items() if k != "exp"}),
    **each(
        "time that is not finite",
        itertools.product(("exp", "nbf", "iat"), (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400")),
        lambda a, pair: a.genuinely_signed(json.dumps(a.claims | {pair[0]: 4711}).encode().replace(b"4711", pair[1])),
    ),
    **each(
        "nbf",
        (9999999999, 9999999999.5, "0", "0.0", None, False),
        lambda a, nbf: a.genuinely_signed(a.claims | {"nbf": nbf}),
    ),
    **each(
        "iat",
        (9999999999, 9999999999.5, "0", "0.0", None, False),
        lambda a, iat: a.genuinely_signed(a.claims | {"iat": iat}),
    ),
    # sizes, known from CVE-2025-61920
    "long header": lambda a: f"{encode(a.header | {'x': 'x' * 10**6})}.{encode(a.claims)}.AA",
    "long payload": lambda a: a.genuinely_signed(a.claims | {"x": "x" * 20_000}),
    "long signature": lambda a: a.genuine + "A" * 10**6,
    "dots": lambda a: "." * 16_000,
    "two dots": lambda a: "..",
    "nothing in it": lambda a: encode({}) + "." + encode({}) + ".",
}


@pytest.fixture(scope="module")
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(algorithm="RS256") as issuer:
        yield issuer


@pytest.fixture(scope="module")
def attacker(issuer: FakeIssuer) -> Attacker:
    return Attacker(issuer)


@pytest.fixture(scope="module")
def loud(issuer: FakeIssuer) -> FastAPI:
    return make_app(make_scheme(issuer))


@pytest.fixture(scope="module")
def silent(issuer: FakeIssuer) -> FastAPI:
    return make_app(make_scheme(issuer, auto_error=False))


async def test_the_attackers_genuine_token_is_accepted(attacker: Attacker, loud: FastAPI) -> None:
    for token in (attacker.genuine, attacker.genuinely_signed(attacker.claims)):
        assert (await get(loud, bearer(token))).status_code == 200


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_forged_token_is_refused(name: str, attacker: Attacker, loud: FastAPI, silent: FastAPI) -> None:
    token = ATTACKS[name](attacker)

    answer, nothing = await get(loud, bearer(token)), await get(silent, bearer(token))

    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert (nothing.status_code, nothing.json()) == (200, None)
    assert not any(part in answer.text for part in token.split(".") if len(part) > 8)
    assert attacker.issuer.fetches.keys() <= {"openid-configuration", "certs"}
    # As an ID token beside a genuine access token it is refused, too, where it is meant as a token at all.
    if "." in token:
        beside = await get(loud, {**bearer(attacker.genuine), "X-ID-Token": token})
        assert (beside.status_code, beside.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')


@pytest.mark.parametrize("name", ["alg 'none'", "own key", "PEM as secret (CVE-2017-11424)"])
async def test_a_forged_token_is_refused_on_a_websocket(
    name: str, attacker: Attacker, loud: FastAPI, silent: FastAPI
) -> None:
    token = ATTACKS[name](attacker)

    assert await open_socket(loud, bearer(token)) == 1008
    assert await open_socket(silent, bearer(token)) is None


async def test_zeros_are_no_signature_of_an_elliptic_key() -> None:
    with FakeIssuer() as issuer:
        token = issuer.issue().rpartition(".")[0]
        order = bytes.fromhex("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551")  # of P-256
        for signature in (bytes(64), order * 2, bytes(32) + order, b"\x30\x06\x02\x01\x00\x02\x01\x00", b""):
            assert (await get(make_app(make_scheme(issuer)), bearer(f"{token}.{encode(signature)}"))).status_code == 401


async def test_keys_that_are_published_by_mistake_are_not_used(attacker: Attacker) -> None:
    own, small = attacker.own_rsa_key, rsa.generate_private_key(65537, 1024)
    private = jwt.algorithms.RSAAlgorithm.to_jwk(own, as_dict=True)
    secret = b"a shared secret that is published"
    cases: list[tuple[list[dict[str, Any]], Any, str, int]] = [
        ([public_jwk(own)], own, "RS256", 200),
        ([public_jwk(own), public_jwk(own)], own, "RS256", 200),
        ([public_jwk(own), public_jwk(small)], small, "RS256", 401),
        ([public_jwk(small)], small, "RS256", 401),
        ([private], own, "RS256", 401),
        ([public_jwk(own, use="enc")], own, "RS256", 401),
        ([public_jwk(own, key_ops=["encrypt"])], own, "RS256", 401),
        ([{"kty": "oct", "k": encode(secret)}], secret, "HS256", 401),
    ]

    class Careless(FakeIssuer):
        published: list[dict[str, Any]]

        def jwks(self) -> dict[str, Any]:
            return {"keys": self.published}

    for keys, key, alg, status in cases:
        with Careless() as issuer:
            issuer.published = [{**member, "kid": "k-1"} for member in keys]
            claims = attacker.claims | {"iss": issuer.url}
            token = sign(key, alg, claims, {"alg": alg, "kid": "k-1"})
            assert (await get(make_app(make_scheme(issuer)), bearer(token))).status_code == status, keys


async def test_of_ten_thousand_mutated_tokens_none_is_accepted_and_none_is_an_error(attacker: Attacker) -> None:
    chance = random.Random(8725)
    loud, silent = make_scheme(attacker.issuer), make_scheme(attacker.issuer, auto_error=False)
    refused = 0

    for number in range(10_000):
        value = mutate(f"Bearer {attacker.genuine}", chance).encode("utf-8", "surrogatepass")
        if value.partition(b" ")[2].strip(b" ") == attacker.genuine.encode() and value[:7].lower() == b"bearer ":
            continue  # spaces and case are no part of the token
        connection = HTTPConnection({"type": "http", "headers": [(b"authorization", value)]})
        assert await silent(connection, SecurityScopes()) is None, (number, value)
        with pytest.raises(HTTPException) as caught:
            await loud(connection, SecurityScopes())
        assert caught.value.status_code == 401
        refused += 1

    assert refused > 9_000
