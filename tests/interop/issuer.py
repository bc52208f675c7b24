"""What the scenarios need to know of an issuer, and what judges its tokens without the code under test."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

REQUEST_SECONDS = 10.0

AUDIENCE = "https://service.example"  # a URI, which RFC 8707 asks for
USERNAME = "alice"
PASSWORD = "test-only-password"

LIFETIME = 12
"""Seconds that access tokens live where the issuer lets one choose: short, for refreshes to be seen."""


@dataclass(frozen=True)
class Issuer:
    """A running issuer: a row of the table in docs/issuers.md.

    `settings` are the launcher's for the client that people log in with, `login_options` what `login --browser` needs
    besides, `device_options` what `login` by device does, and `clients` the settings of clients that act for
    themselves, by client authentication method. `audience` is that of access tokens, None where they are opaque.
    `marks_id_tokens` says whether more than the audience tells ID tokens from access tokens. `pace` is how many seconds
    it needs between two tokens of a user, `refusal` the proxy's code for its refusals. `lifetime` is that of its access
    tokens, in seconds. `lacks` says why a scenario, by its name, is not for this issuer.

    `user_of` returns whose token it is, None where the issuer does not know it. `person` opens a page and does what it
    asks for; returns the last page's text. `revoke` ends all of the user's sessions, as an administrator does.
    """

    url: str
    settings: Mapping[str, str]
    user_of: Callable[[str], str | None]
    person: Callable[[str], str]
    revoke: Callable[[], None]
    rotate_keys: Callable[[], None]
    audience: str | None = None
    pace: float = 0.0
    lifetime: float = LIFETIME
    refusal: str = "credentials_rejected"
    marks_id_tokens: bool = True
    login_options: tuple[str, ...] = ()
    device_options: tuple[str, ...] = ()
    clients: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoints:
    """An issuer's endpoints as its own discovery document has them."""

    document: Mapping[str, Any]

    @classmethod
    def of(cls, url: str) -> "Endpoints":
        answer = httpx.get(f"{url}/.well-known/openid-configuration", trust_env=False, timeout=REQUEST_SECONDS)
        return cls(answer.raise_for_status().json())

    def user_of_jwt(self, token: str, *, claim: str = "sub", audience: str = AUDIENCE) -> str | None:
        """Verify a JWT with PyJWT, no leeway on the clock, and return the claim."""
        keys = jwt.PyJWKClient(self.document["jwks_uri"], cache_keys=False)
        try:
            claims = jwt.decode(
                token,
                keys.get_signing_key_from_jwt(token).key,
                algorithms=["RS256", "RS512"],
                issuer=self.document["issuer"],
                audience=audience,
                leeway=0,
                options={"require": ["aud", "exp", "iss", "sub"]},
            )
        except jwt.PyJWTError:
            return None
        return str(claims.get(claim))

    def user_of_opaque(self, token: str) -> str | None:
        """Ask the userinfo endpoint."""
        answer = httpx.get(
            self.document["userinfo_endpoint"],
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
            timeout=REQUEST_SECONDS,
        )
        return str(answer.json()["sub"]) if answer.status_code == 200 else None

    def signing_kids(self) -> set[str]:
        answer = httpx.get(self.document["jwks_uri"], trust_env=False, timeout=REQUEST_SECONDS)
        return {str(key["kid"]) for key in answer.json()["keys"] if key.get("use", "sig") == "sig"}


def answers(url: str) -> bool:
    """Whether there is a discovery document."""
    try:
        answer = httpx.get(f"{url}/.well-known/openid-configuration", trust_env=False, timeout=2)
    except httpx.HTTPError:
        return False
    return answer.is_success


def key_pair(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A client's key: the file with the private one, and the public one as a JWK."""
    key = generate_private_key(SECP256R1())
    path = folder / "client-key.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    return path, {**public, "kid": "client-key", "use": "sig", "alg": "ES256"}
