"""A token string, keys and a policy in; verified claims out. No I/O, and one place for the policy (RFC 8725)."""

import base64
import binascii
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from eoepca_security.errors import TokenInvalid
from eoepca_security.strict_json import parse_object

MAX_TOKEN_SIZE: Final = 16 * 1024
"""Longest token that is looked at, in bytes: header lines are not longer either."""

_MIN_RSA_BITS: Final = 2048  # RFC 7518 §3.3

# The algorithms that a key can have made a signature with, by what the key is (RFC 7518 §3.1, RFC 8037 §3.1). Symmetric
# ones are not here, so a public key can never be taken for a shared secret (RFC 8725 §3.1).
_ALGORITHMS_OF_KEY: Final[Mapping[tuple[str, str | None], frozenset[str]]] = {
    ("RSA", None): frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA"}),
}
ALGORITHMS: Final = frozenset().union(*_ALGORITHMS_OF_KEY.values())

# What Keycloak writes into the claim `typ` of tokens that are not access tokens.
_OTHER_TOKEN_TYPES: Final = ("ID", "Refresh", "Offline", "Logout")


@dataclass(frozen=True)
class SigningKey:
    """A public key of the issuer and the algorithms it may be used with."""

    kid: str | None
    algorithms: frozenset[str]
    key: Any = field(repr=False)


@dataclass(frozen=True)
class Policy:
    """What a token has to say; `leeway` is the accepted clock difference in seconds."""

    issuer: str
    audience: str
    leeway: float = 10


@dataclass(frozen=True)
class Header:
    """The part of a token's header that decides which key is asked for."""

    alg: str
    kid: str | None


def looks_like_jwt(token: str) -> bool:
    """Tell a JWS in compact form from an opaque token, without any judgement of it."""
    head = token.partition(".")[0]
    if token.count(".") != 2:
        return False
    try:
        parse_object(_decode(head))
    except ValueError:
        # A JSON object in base64url mostly begins like this, and is meant as a JWT even where it is a bad one.
        return head.startswith("eyJ")
    return True


def unverified_claims(token: str) -> Mapping[str, Any]:
    """Return what a token says of itself, or nothing when it is no JWT. Not for deciding anything about a caller."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > MAX_TOKEN_SIZE:
        return {}
    try:
        return parse_object(_decode(parts[1]))
    except ValueError:
        return {}


def read_header(token: str) -> Header:
    """Return the token's header after the checks that need no key; raises TokenInvalid."""
    if len(token) > MAX_TOKEN_SIZE:
        raise TokenInvalid("the token is longer than 16 KiB")
    if token.count(".") != 2:
        raise TokenInvalid("the token is not a signed JWT")
    try:
        header = parse_object(_decode(token.partition(".")[0]), unique_keys=True)
    except ValueError:
        raise TokenInvalid("the token's header is not a JSON object in base64url") from None
    alg, kid, typ = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    if not isinstance(alg, str) or alg not in ALGORITHMS:
        raise TokenInvalid("the token's signature algorithm is not an accepted one")
    if not {"crit", "b64", "zip"}.isdisjoint(header):
        raise TokenInvalid("the token's header asks for an extension (crit, b64 or zip)")
    if kid is not None and not isinstance(kid, str):
        raise TokenInvalid("the token's kid is not a string")
    # RFC 9068 §2.1; a media type may carry its prefix (RFC 7515 §4.1.9).
    if not isinstance(typ, str) or typ.lower().removeprefix("application/") not in ("jwt", "at+jwt"):
        raise TokenInvalid("the token's header names another type than JWT or at+jwt")
    return Header(alg, kid)


def read_keys(document: Mapping[str, Any]) -> tuple[SigningKey, ...]:
    """Return the usable public signature keys of a JWK Set (RFC 7517 §5); others are passed over, as it asks."""
    members = document.get("keys")
    if not isinstance(members, list):
        return ()
    return tuple(key for member in members if isinstance(member, dict) and (key := _read_key(member)))


def select_key(keys: Collection[SigningKey], header: Header) -> SigningKey | None:
    """Return the one key that can have signed a token with this header, or None; raises TokenInvalid if several can."""
    matching = [key for key in keys if header.alg in key.algorithms and (header.kid is None or key.kid == header.kid)]
    if len(matching) > 1:
        raise TokenInvalid("more than one key of the issuer fits the token")
    return matching[0] if matching else None


def verify(token: str, key: SigningKey, policy: Policy, *, now: float) -> dict[str, Any]:
    """Return the claims of an access token whose signature and claims hold; `now` is epoch seconds.

    Raises TokenInvalid with what is wrong, without any part of the token.
    """
    header = read_header(token)
    if header.alg not in key.algorithms:
        raise TokenInvalid("the token's signature algorithm is not the key's")
    signed, _, signature = token.rpartition(".")
    try:
        genuine = jwt.get_algorithm_by_name(header.alg).verify(signed.encode("ascii"), key.key, _decode(signature))
        claims = parse_object(_decode(signed.partition(".")[2]), unique_keys=True) if genuine else None
    except ValueError:
        raise TokenInvalid("the token is not well-formed") from None
    if claims is None:
        raise TokenInvalid("the token's signature does not fit")
    _check_claims(claims, policy, now)
    return claims


def _check_claims(claims: Mapping[str, Any], policy: Policy, now: float) -> None:
    if claims.get("iss") != policy.issuer:
        raise TokenInvalid("the token is from another issuer")
    _check_audience(claims.get("aud"), policy.audience)
    _check_times(claims, policy.leeway, now)
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject:
        raise TokenInvalid("the token names no subject")
    if claims.get("typ") in _OTHER_TOKEN_TYPES:
        raise TokenInvalid("the token is not an access token")


def _check_audience(audience: object, expected: str) -> None:
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not all(isinstance(item, str) for item in audiences):
        raise TokenInvalid(f"the token has no audience; it needs {expected}", claim="aud")
    if expected not in audiences:
        raise TokenInvalid(f"the token is not for the audience {expected}", claim="aud")


def _check_times(claims: Mapping[str, Any], leeway: float, now: float) -> None:
    for name in ("exp", "nbf", "iat"):
        if (name == "exp" or name in claims) and type(claims.get(name)) is not int:
            raise TokenInvalid(f"the token's {name} is not an integer")
    if claims["exp"] <= now - leeway:
        raise TokenInvalid("the token is expired: compare this machine's clock with the issuer's")
    if max(claims.get("nbf", 0), claims.get("iat", 0)) > now + leeway:
        raise TokenInvalid("the token is from the future: compare this machine's clock with the issuer's")


def _read_key(member: Mapping[str, Any]) -> SigningKey | None:
    kid, alg, operations = member.get("kid"), member.get("alg"), member.get("key_ops")
    algorithms = _ALGORITHMS_OF_KEY.get((str(member.get("kty")), _text(member.get("crv"))), frozenset())
    if alg is not None:
        algorithms &= {alg} if isinstance(alg, str) else frozenset()
    for_signatures = member.get("use", "sig") == "sig" and (
        operations is None or (isinstance(operations, list) and "verify" in operations)
    )
    # A private key in a public place is nobody's any more.
    if not algorithms or not for_signatures or "d" in member or not isinstance(kid, str | None):
        return None
    try:
        key = jwt.PyJWK(dict(member), algorithm=min(algorithms)).key
    except Exception:  # noqa: BLE001  odd members fail in as many ways as there are members
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < _MIN_RSA_BITS:
        return None
    return SigningKey(kid, algorithms, key)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _decode(segment: str) -> bytes:
    """Decode base64url without padding, in its one canonical form only (RFC 7515 §2); raises ValueError."""
    data = base64.b64decode(segment + "=" * (-len(segment) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != segment:
        raise binascii.Error("not in canonical form")
    return data
