"""The authenticated caller, also under the names of EOEPCA's eoepca-security 2.0."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from eoepca_security.errors import TokenInvalid
from eoepca_security.oauth.verify import id_token_mismatch, read_unsigned

_NAMES_OF_2_0: Final = ("auth", "id", "refresh")


@dataclass(frozen=True)
class AuthToken:
    """The access token, and its verified claims in `decoded["payload"]`."""

    raw: str = field(repr=False)
    decoded: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class IDToken:
    """The ID token as it was sent, and its claims."""

    raw: str = field(repr=False)
    decoded: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class RefreshToken:
    """The refresh token."""

    raw: str = field(repr=False)


@dataclass(frozen=True)
class SentIDToken:
    """The value of the ID token's header; `now` is when it arrived, in epoch seconds, and `leeway` is in seconds."""

    value: str = field(repr=False)
    leeway: float
    now: float

    @property
    def is_signed(self) -> bool:
        """Whether it is meant to be a JWT. Base64 has no dots."""
        return "." in self.value

    def unsigned_claims(self, access_token: str | None, access_claims: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the claims of a gateway's base64 JSON if they belong to the access token, else None.

        Anyone with the access token can choose all claims but `iss`, `sub`, `exp` and `at_hash`.
        """
        if self.is_signed or access_token is None:
            return None
        try:
            claims = read_unsigned(self.value, leeway=self.leeway, now=self.now)
        except TokenInvalid:
            return None
        return claims if id_token_mismatch(claims, access_claims, access_token) is None else None


class Authentication(dict[str, Any]):
    """The authenticated caller: `claims`, `access_token`, `id_token` (claims or None) and `refresh_token` (or None).

    `access_claims` are the claims of the access token only. Decide on permissions by these, because ID claims may be
    unsigned. The repr shows no values.

    For code written for EOEPCA's eoepca-security 2.0, this class is also named `Tokens`, and `[]`, `get` and `in` know
    `auth` (with `raw` and `decoded["payload"]`), `id` (`raw`, `decoded`) and `refresh` (`raw`). Each is None without
    that token. `id` also shows the unsigned claims of a gateway, if their `iss`, `sub`, `exp` and `at_hash` match the
    access token. Verified claims take precedence there, but anyone with the access token can choose the others.
    """

    def __init__(
        self, access_claims: Mapping[str, Any], sent_id_token: SentIDToken | None = None, **members: Any
    ) -> None:
        super().__init__(members)
        self.access_claims = access_claims
        self._sent_id_token = sent_id_token

    def __repr__(self) -> str:
        return f"Authentication({', '.join(name for name, value in self.items() if value)})"

    def __missing__(self, name: str) -> Any:
        if name not in _NAMES_OF_2_0:
            raise KeyError(name)
        return getattr(self, f"_{name}")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in _NAMES_OF_2_0

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of `name`, or `default` if there is no such name."""
        try:
            return self[name]
        except KeyError:
            return default

    @cached_property
    def _auth(self) -> AuthToken | None:
        token = self["access_token"]
        return None if token is None else AuthToken(token, {"payload": dict(self.access_claims)})

    @cached_property
    def _id(self) -> IDToken | None:
        sent = self._sent_id_token
        if sent is None:
            return None
        if sent.is_signed:
            return IDToken(sent.value, dict(self["id_token"]))
        claims = sent.unsigned_claims(self["access_token"], self.access_claims)
        return None if claims is None else IDToken(sent.value, {**claims, **self.access_claims})

    @cached_property
    def _refresh(self) -> RefreshToken | None:
        token = self["refresh_token"]
        return None if token is None else RefreshToken(token)


Tokens = Authentication
"""The name in eoepca-security 2.0."""
