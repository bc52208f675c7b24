"""The proxy's own answers: problem details (RFC 9457) with a code that programs can rely on. Pure."""

import json
import math
from typing import Final

from mitmproxy.http import Response

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid

ERROR_HEADER: Final = "X-OIDC-Proxy-Error"

_ANSWERS: Final[dict[type[TokenError], tuple[int, str]]] = {
    IssuerUnavailable: (503, "The identity provider does not give a token"),
    CredentialsRejected: (502, "The identity provider rejected the proxy's credentials"),
    TokenInvalid: (502, "The identity provider's token cannot be used"),
}

_HEADERS: Final = {"Content-Type": "application/problem+json", "Cache-Control": "no-store"}

LAST_RESORT: Final = Response.make(503, b"", _HEADERS | {ERROR_HEADER: IssuerUnavailable.code, "Retry-After": "1"})
"""The answer for the time in which there is no better one, and when making a better one fails."""


def answer(error: TokenError, *, method: str, retry_after: float) -> Response:
    """Return the answer to a request for which there is no token; `retry_after` is in seconds."""
    status, title = _ANSWERS[type(error)]
    body = {"title": title, "status": status, "detail": str(error), "code": error.code}
    headers = _HEADERS | {ERROR_HEADER: error.code}
    if status == 503:
        headers["Retry-After"] = str(math.ceil(retry_after))
    # mitmproxy would send a body after the headers of an answer to HEAD, too (RFC 9110 §9.3.2).
    return Response.make(status, b"" if method == "HEAD" else json.dumps(body).encode(), headers)
