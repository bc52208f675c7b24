"""Whose token it is, in words."""

from collections.abc import Mapping
from typing import Any

from eoepca_security.oauth.protocol import printable


def identity(claims: Mapping[str, Any]) -> str:
    """Say whom claims are about, as far as they tell; for people to read, not for deciding anything."""
    name, subject = claims.get("preferred_username"), claims.get("sub")
    if not isinstance(name, str):
        return printable(subject) if isinstance(subject, str) else "someone (the token does not say)"
    return f"{printable(name)} (sub {printable(subject)})" if isinstance(subject, str) else printable(name)
