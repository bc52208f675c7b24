"""Untrusted text, made safe to show: on one line and without secrets."""

import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote, quote_plus


def printable(value: object, limit: int = 200) -> str:
    """Return untrusted text that is safe on a log line: printable, at most `limit` characters."""
    text = value if isinstance(value, str) else repr(value)[: limit + 1]
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"


def without_secrets(text: object, secrets: Collection[str]) -> str:
    """Return an issuer's text without `secrets`: some issuers repeat what they were sent, or part of it.

    The text is limited to 500 characters: some issuers write three sentences and IDs to search for.
    """
    if not isinstance(text, str):
        return ""
    for secret in secrets:
        # Anything shorter is not a secret, and hiding it would garble the text.
        if len(secret) >= 4:
            for form in (secret, quote_plus(secret), quote(secret, safe="")):
                text = re.sub(re.escape(form), "…", text, flags=re.IGNORECASE)
    return printable(re.sub(r"[A-Za-z0-9._~+/=-]{40,}", "…", text), 500)


def identity(claims: Mapping[str, Any]) -> str:
    """Describe the user that claims are about, for people to read. Not for decisions."""
    name, subject = claims.get("preferred_username"), claims.get("sub")
    if not isinstance(name, str):
        return printable(subject) if isinstance(subject, str) else "someone (the token does not say)"
    return f"{printable(name)} (sub {printable(subject)})" if isinstance(subject, str) else printable(name)
