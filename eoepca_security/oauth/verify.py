"""Verification of tokens without I/O: token, keys and policy in, verified claims out (RFC 8725).

`read_access_token` and `read_id_token` first check what needs no key. Only `TrustedKeys.confirm` returns verified
claims.
"""

import base64
import binascii
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from eoepca_security.errors import TokenInvalid
from eoepca_security.oauth.strict_json import parse_object

MAX_TOKEN_SIZE: Final = 16 * 1024
"""The longest token accepted, in bytes. Header lines are not longer either."""

_MIN_RSA_BITS: Final = 2048  # RFC 7518 §3.3

# The signature algorithms of each type of key (RFC 7518 §3.1, RFC 8037 §3.1). Symmetric algorithms are left out, so
# that a public key is never used as a shared secret (RFC 8725 §3.1).
_ALGORITHMS_OF_KEY: Final[Mapping[tuple[str, str | None], frozenset[str]]] = {
    ("RSA", None): frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA"}),
}
ALGORITHMS: Final = frozenset().union(*_ALGORITHMS_OF_KEY.values())

# Names of the same algorithm: EdDSA with the one curve that is accepted (RFC 9864 §2.2).
_OTHER_NAMES: Final = {"Ed25519": "EdDSA"}

# What issuers call each kind of token in the claims below. Case does not matter, and "-" equals "_".
_KINDS: Final = {
    "access": "access",
    "access_token": "access",
    "id": "ID",
    "id_token": "ID",
    "refresh": "refresh",
    "refresh_token": "refresh",
}

# Claims that only name the kind of token: any value but the expected kind is refused. Keycloak's `typ` can name any
# action that it sends a token for by e-mail.
_CLAIMS_OF_KIND: Final = {
    "typ": _KINDS | {"bearer": "access", "dpop": "access", "jwt": "access", "at+jwt": "access"},  # Keycloak
    "token_use": _KINDS,  # Cognito
}

# Claims that other issuers use for other purposes: refused only when they clearly name another kind.
_CLAIMS_OF_KIND_OR_OTHER_THINGS: Final = {
    "purpose": _KINDS,  # Curity
    "tokenName": _KINDS,  # PingAM, ForgeRock
    "tok_type": {"at": "access", "it": "ID", "rt": "refresh"},  # Oracle
    "token_usage": _KINDS,  # OpenIddict
    "token_type": _KINDS,
    "type": _KINDS,  # Glewlwyd
    "tokenType": {"refresh_token": "refresh", "id_token": "ID"},  # Casdoor, whose access token is also the ID token
}

# Claims found only in ID tokens (OpenID Connect Core §3.3.2.11) and logout tokens (Back-Channel Logout §2.4).
_CLAIMS_OF_OTHER_TOKENS: Final = frozenset({"at_hash", "c_hash", "s_hash", "events"})

# An `at_hash` is the left half of a hash. Its length in base64url tells which hash (OpenID Connect Core §3.1.3.6).
_HASH_BY_LENGTH: Final = {22: "sha256", 32: "sha384", 43: "sha512"}


class NoKeyFits(TokenInvalid):
    """None of the keys has made the token's signature. The issuer may have published the right one since."""


@dataclass(frozen=True)
class SigningKey:
    """A public key of the issuer and the algorithms that it may be used with."""

    kid: str | None
    algorithms: frozenset[str]
    key: Any = field(repr=False)


@dataclass(frozen=True)
class Policy:
    """What an access token must contain, besides being the issuer's.

    `leeway` is the accepted clock difference in seconds. With `authorized_parties`, the token must have been issued to
    one of these clients (`azp`, or `client_id` of RFC 9068). `accept_bound` accepts tokens that are bound to a key,
    for when someone else has verified the binding. `require_subject` refuses tokens without `sub` (RFC 9068 §2.2).
    `accept_id_tokens` accepts the claims of ID tokens that Dex puts into its access tokens, and so ID tokens.
    """

    audience: str
    leeway: float = 10
    authorized_parties: Collection[str] | None = None
    accept_bound: bool = False
    require_subject: bool = True
    accept_id_tokens: bool = False


@dataclass(frozen=True)
class Header:
    """The parts of a token's header that select the key, and its media type; `alg` is one of `ALGORITHMS`."""

    alg: str
    kid: str | None
    typ: str = "jwt"


@dataclass(frozen=True)
class Unverified:
    """A token whose issuer and signature have not been checked yet. Do not trust it."""

    kind: Literal["access", "ID"]
    header: Header
    claims: dict[str, Any] = field(repr=False)
    text: str = field(repr=False)


@dataclass(frozen=True)
class TrustedKeys:
    """An issuer and the keys fetched from it.

    `access_token_issuer` is the `iss` of its access tokens where that is another name, or None.
    """

    issuer: str
    keys: tuple[SigningKey, ...]
    access_token_issuer: str | None = None

    def confirm(self, token: Unverified) -> dict[str, Any]:
        """Return the verified claims; raises TokenInvalid, in particular NoKeyFits when a newer key set may help."""
        issuer = (token.kind == "access" and self.access_token_issuer) or self.issuer
        if token.claims.get("iss") != issuer:
            raise TokenInvalid("the token is from another issuer")
        keys = matching_keys(self.keys, token.header)
        if not keys:
            raise NoKeyFits("none of the issuer's keys matches the token")
        signed, _, signature = token.text.rpartition(".")
        algorithm = jwt.get_algorithm_by_name(token.header.alg)
        try:
            message, signature_bytes = signed.encode("ascii"), _decode(signature)
            genuine = any(algorithm.verify(message, key.key, signature_bytes) for key in keys)
        except ValueError:
            raise TokenInvalid("the token is not well-formed") from None
        if not genuine:
            raise NoKeyFits("the token's signature is not valid")
        return token.claims


def looks_like_jwt(token: str) -> bool:
    """Return whether a token looks like a compact JWS rather than an opaque token. Checks nothing else."""
    head = token.partition(".")[0]
    if token.count(".") != 2:
        return False
    try:
        parse_object(_decode(head))
    except ValueError:
        # JSON objects in base64url usually begin like this, so this is meant to be a JWT, even if it is broken.
        return head.startswith("eyJ")
    return True


def unverified_claims(token: str) -> Mapping[str, Any]:
    """Return a token's claims without verifying them; empty when it is not a JWT. Not for decisions about a caller."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > MAX_TOKEN_SIZE:
        return {}
    try:
        return parse_object(_decode(parts[1]))
    except ValueError:
        return {}


def read_access_token(token: str, policy: Policy, *, now: float) -> Unverified:
    """Read an access token and check what needs no key. `now` is in epoch seconds. Raises TokenInvalid."""
    unverified = _read(token, "access", policy.leeway, now, require_subject=policy.require_subject)
    claims, audience, party = unverified.claims, policy.audience, unverified.claims.get("azp")
    if audience not in _audiences(claims, audience):
        raise TokenInvalid(f"the token is not for the audience {audience}", claim="aud")
    if claim := _claim_of_another_kind(claims, "access"):
        raise TokenInvalid(f"the token is not an access token, according to its {claim}")
    others = _CLAIMS_OF_OTHER_TOKENS - {"at_hash"} if policy.accept_id_tokens else _CLAIMS_OF_OTHER_TOKENS
    if not others.isdisjoint(claims):
        raise TokenInvalid("the token is not an access token")
    # Before version 24, Keycloak also puts the login's nonce into access tokens, but marks them as access tokens.
    is_marked = unverified.header.typ == "at+jwt" or claims.get("typ") in ("Bearer", "DPoP")
    if "nonce" in claims and not is_marked and not policy.accept_id_tokens:
        raise TokenInvalid("the token is not an access token")
    if policy.authorized_parties is not None:
        party = claims.get("client_id") if party is None else party
        if not isinstance(party, str) or party not in policy.authorized_parties:
            raise TokenInvalid("the token was issued to a client that is not an authorized party", claim="azp")
    check_binding(claims, policy)
    return unverified


def check_binding(claims: Mapping[str, Any], policy: Policy) -> None:
    """Raise TokenInvalid when the token is bound to a key (any `cnf`, RFC 7800 §3.1) and the policy refuses that.

    RFC 9449 §7 and RFC 8705 §3 require proof that the sender has the key, which nothing here can check.
    """
    if "cnf" in claims and not policy.accept_bound:
        raise TokenInvalid("the token is bound to a key (cnf), so it is not accepted as a Bearer token", claim="cnf")


def read_id_token(token: str, client_ids: Collection[str], *, leeway: float, now: float) -> Unverified:
    """Read an ID token for one of these clients, like `read_access_token` (OpenID Connect Core §3.1.3.7).

    `id_token_mismatch` checks whether it belongs to an access token.
    """
    unverified = _read(token, "ID", leeway, now)
    claims = unverified.claims
    if not any(audience in client_ids for audience in _audiences(claims, "that of a known client")):
        raise TokenInvalid("the ID token is for another client", claim="aud")
    party = claims.get("azp")
    if party is not None and (not isinstance(party, str) or party not in client_ids):
        raise TokenInvalid("the ID token is for another client", claim="azp")
    if claim := _claim_of_another_kind(claims, "ID"):
        raise TokenInvalid(f"the token is not an ID token, according to its {claim}")
    if unverified.header.typ != "jwt" or "events" in claims:
        raise TokenInvalid("the token is not an ID token")
    return unverified


def id_token_mismatch(
    id_claims: Mapping[str, Any], access_claims: Mapping[str, Any], access_token: str, alg: str | None = None
) -> str | None:
    """Return why ID claims do not belong to a verified access token, or None when they do.

    `alg` is the signature algorithm of a verified ID token, whose issuer is known then. Without a signature, `iss`,
    `sub` and `at_hash` are required. With one, `at_hash` is required if the access token has no `sub`.
    """
    subject = access_claims.get("sub")
    if alg is None and id_claims.get("iss") != access_claims["iss"]:
        return "its iss does not match the access token"
    if subject is None and alg is None:
        return "the access token has no sub"
    if subject is not None and id_claims.get("sub") != subject:
        return "its sub does not match the access token"
    at_hash = id_claims.get("at_hash")
    if at_hash is None and alg is not None and subject is not None:
        return None
    hash_name = _HASH_BY_LENGTH.get(len(at_hash)) if isinstance(at_hash, str) else None
    # EdDSA does not define its hash, and issuers use different ones.
    if hash_name is None or alg not in (None, "EdDSA", *(kind + hash_name[3:] for kind in ("RS", "PS", "ES"))):
        return "its at_hash does not match its algorithm"
    digest = hashlib.new(hash_name, access_token.encode()).digest()
    half = base64.urlsafe_b64encode(digest[: len(digest) // 2]).rstrip(b"=").decode()
    return None if half == at_hash else "its at_hash does not match the access token"


def read_unsigned(value: str, *, leeway: float, now: float) -> dict[str, Any]:
    """Read the base64 JSON (either alphabet) that gateways make from an ID token. Anyone can forge it.

    Raises TokenInvalid.
    """
    try:
        text = value.rstrip("=").replace("-", "+").replace("_", "/")
        claims = parse_object(base64.b64decode(text + "=" * (-len(text) % 4), validate=True), unique_keys=True)
    except ValueError:
        raise TokenInvalid("the ID claims are not a JSON object in base64") from None
    _check_times(claims, leeway, now)
    return claims


def read_header(token: str) -> Header:
    """Return the token's header after checking it; raises TokenInvalid."""
    if len(token) > MAX_TOKEN_SIZE:
        raise TokenInvalid("the token is longer than 16 KiB")
    if token.count(".") != 2:
        raise TokenInvalid("the token is not a signed JWT")
    return _read_header(token.partition(".")[0])


@lru_cache(maxsize=64)  # an issuer's tokens share a few headers
def _read_header(segment: str) -> Header:
    try:
        header = parse_object(_decode(segment), unique_keys=True)
    except ValueError:
        raise TokenInvalid("the token's header is not a JSON object in base64url") from None
    alg, kid, typ = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    alg = _OTHER_NAMES.get(alg, alg) if isinstance(alg, str) else None
    if alg not in ALGORITHMS:
        raise TokenInvalid("the token's signature algorithm is not accepted")
    if not {"crit", "b64", "zip"}.isdisjoint(header):
        raise TokenInvalid("the token's header uses an extension (crit, b64 or zip)")
    if kid is not None and not isinstance(kid, str):
        raise TokenInvalid("the token's kid is not a string")
    # RFC 9068 §2.1; a media type may carry its prefix (RFC 7515 §4.1.9).
    typ = typ.lower().removeprefix("application/") if isinstance(typ, str) else None
    if typ not in ("jwt", "at+jwt"):
        raise TokenInvalid("the token's type in its header is not JWT or at+jwt")
    return Header(alg, kid, typ)


def read_keys(document: Mapping[str, Any]) -> tuple[SigningKey, ...]:
    """Return the usable public signature keys of a JWK Set; ignores other keys, as RFC 7517 §5 requires."""
    members = document.get("keys")
    if not isinstance(members, list):
        return ()
    return tuple(key for member in members if isinstance(member, dict) and (key := _read_key(member)))


def matching_keys(keys: Collection[SigningKey], header: Header) -> list[SigningKey]:
    """Return the keys that may have signed a token with this header.

    They can be several: issuers list a key twice, a `kid` need not be unique (RFC 7517 §4.5), and tokens may lack it.
    """
    return [key for key in keys if header.alg in key.algorithms and (header.kid is None or key.kid == header.kid)]


def _read(
    token: str, kind: Literal["access", "ID"], leeway: float, now: float, *, require_subject: bool = True
) -> Unverified:
    """Read a token and check what applies to every kind."""
    header = read_header(token)
    try:
        claims = parse_object(_decode(token.split(".")[1]), unique_keys=True)
    except ValueError:
        raise TokenInvalid("the token is not well-formed") from None
    _check_times(claims, leeway, now)
    subject = claims.get("sub")
    if (require_subject or "sub" in claims) and (not isinstance(subject, str) or not subject):
        raise TokenInvalid("the token has no subject (sub)")
    return Unverified(kind, header, claims, token)


def _claim_of_another_kind(claims: Mapping[str, Any], kind: str) -> str | None:
    """Return the name of a claim that marks the token as another kind, or None."""
    for claim, kinds in _CLAIMS_OF_KIND.items():
        if claim in claims and kinds.get(_word(claims[claim])) != kind:
            return claim
    for claim, kinds in _CLAIMS_OF_KIND_OR_OTHER_THINGS.items():
        if kinds.get(_word(claims.get(claim)), kind) != kind:
            return claim
    return None


def _word(value: object) -> str:
    return value.lower().replace("-", "_") if isinstance(value, str) else ""


def _audiences(claims: Mapping[str, Any], expected: str) -> list[str]:
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not audiences or not all(isinstance(item, str) for item in audiences):
        raise TokenInvalid(f"the token has no audience; it needs {expected}", claim="aud")
    return audiences


def _check_times(claims: Mapping[str, Any], leeway: float, now: float) -> None:
    for name in ("exp", "nbf", "iat"):
        if (name == "exp" or name in claims) and not _is_time(claims.get(name)):
            raise TokenInvalid(f"the token's {name} is not a finite number")
    if claims["exp"] <= now - leeway:
        raise TokenInvalid("the token has expired", cause="clock")
    if max(claims.get("nbf", 0), claims.get("iat", 0)) > now + leeway:
        raise TokenInvalid("the token is from the future", cause="clock")


def _is_time(value: object) -> bool:
    """Tell whether a claim is a NumericDate (RFC 7519 §2): any JSON number, unless it overflows to infinity."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _read_key(member: Mapping[str, Any]) -> SigningKey | None:
    kid, alg, operations = member.get("kid"), member.get("alg"), member.get("key_ops")
    algorithms = _ALGORITHMS_OF_KEY.get((str(member.get("kty")), _text(member.get("crv"))), frozenset())
    if alg is not None:
        algorithms &= {_OTHER_NAMES.get(alg, alg)} if isinstance(alg, str) else frozenset()
    for_signatures = member.get("use", "sig") == "sig" and (
        operations is None or (isinstance(operations, list) and "verify" in operations)
    )
    # A private key that was published proves nothing.
    if not algorithms or not for_signatures or "d" in member or not isinstance(kid, str | None):
        return None
    try:
        key = jwt.PyJWK(dict(member), algorithm=min(algorithms)).key
    except Exception:  # noqa: BLE001  invalid members raise many kinds of errors
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < _MIN_RSA_BITS:
        return None
    return SigningKey(kid, algorithms, key)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _decode(segment: str) -> bytes:
    """Decode unpadded base64url, in canonical form only (RFC 7515 §2); raises ValueError."""
    data = base64.b64decode(segment + "=" * (-len(segment) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != segment:
        raise binascii.Error("not in canonical form")
    return data
