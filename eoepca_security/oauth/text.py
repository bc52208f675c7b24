"""Text from strangers, made fit for people: on one line, without secrets; and whose token it is, in words."""

import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote, quote_plus


def printable(value: object, limit: int = 200) -> str:
    """Return text from a stranger so that it fits on a log line: printable, at most `limit` characters."""
    text = value if isinstance(value, str) else repr(value)[: limit + 1]
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"


def without_secrets(text: object, secrets: Collection[str]) -> str:
    """Return an issuer's text for people; some repeat in their errors what they were sent, or part of it."""
    if not isinstance(text, str):
        return ""
    for secret in secrets:
        # Shorter ones are no secrets, and hiding them would garble the words.
        if len(secret) >= 4:
            for form in (secret, quote_plus(secret), quote(secret, safe="")):
                text = re.sub(re.escape(form), "…", text, flags=re.IGNORECASE)
    return printable(re.sub(r"[A-Za-z0-9._~+/=-]{40,}", "…", text))


def identity(claims: Mapping[str, Any]) -> str:
    """Say whom claims are about, as far as they tell; for people to read, not for deciding anything."""
    name, subject = claims.get("preferred_username"), claims.get("sub")
    if not isinstance(name, str):
        return printable(subject) if isinstance(subject, str) else "someone (the token does not say)"
    return f"{printable(name)} (sub {printable(subject)})" if isinstance(subject, str) else printable(name)
