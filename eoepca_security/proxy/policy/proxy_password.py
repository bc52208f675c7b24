"""The password that clients of the forward proxy send (RFC 9110 §11.7, RFC 7617). Pure."""

import base64
import binascii
import hashlib
import hmac
import re
import unicodedata
from collections.abc import Sequence
from typing import Final

CHALLENGE: Final = 'Basic realm="OIDC proxy", charset="UTF-8"'
"""The value of `Proxy-Authenticate`."""

_CREDENTIALS: Final = re.compile(r"basic +([A-Za-z0-9+/]+=*) *", re.IGNORECASE)


def is_right(expected: str, values: Sequence[str]) -> bool:
    """Return whether the values of a request's `Proxy-Authorization` have the expected `user:password`.

    Takes as long for a wrong one, whatever is wrong about it, as for the right one. There must be one value only:
    programs could disagree about which of several counts.
    """
    given = b""
    match = _CREDENTIALS.fullmatch(values[0]) if len(values) == 1 else None
    if match is not None:
        try:
            given = base64.b64decode(match[1], validate=True)
        except binascii.Error:
            match = None
    # The same text may be written with several characters or with one (RFC 7617 §2.1 with RFC 8265 §4.2).
    text = unicodedata.normalize("NFC", given.decode(errors="surrogateescape"))
    wanted = unicodedata.normalize("NFC", expected)
    return hmac.compare_digest(_digest(text), _digest(wanted)) and match is not None


def _digest(text: str) -> bytes:
    # Of the same length for all, which would show in the time otherwise.
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
