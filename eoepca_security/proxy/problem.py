"""The proxy's own answers: problem details (RFC 9457) with a code that programs can rely on. Pure."""

import json
import math
from typing import Final

from mitmproxy.http import Response

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.proxy.guard import Refusal

ERROR_HEADER: Final = "X-OIDC-Proxy-Error"

_ANSWERS: Final[dict[str, tuple[int, str]]] = {
    "host_not_allowed": (403, "The proxy does not answer to this Host"),
    "cross_site_request": (403, "The proxy takes no requests from other web sites"),
    IssuerUnavailable.code: (503, "The identity provider does not give a token"),
    CredentialsRejected.code: (502, "The identity provider rejected the proxy's credentials"),
    TokenInvalid.code: (502, "The identity provider's token cannot be used"),
}

_HEADERS: Final = {"Content-Type": "application/problem+json", "Cache-Control": "no-store"}

LAST_RESORT: Final = Response.make(503, b"", _HEADERS | {ERROR_HEADER: IssuerUnavailable.code, "Retry-After": "1"})
"""The answer for the time in which there is no better one, and when making a better one fails."""


def parts(
    error: TokenError | Refusal, *, retry_after: float = 1, status: int | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Return status (the usual one unless given), headers and body of an answer; `retry_after` is in seconds."""
    usual, title = _ANSWERS[error.code]
    status = status or usual
    detail = error.detail if isinstance(error, Refusal) else str(error)
    body = {"title": title, "status": status, "detail": detail, "code": error.code}
    headers = _HEADERS | {ERROR_HEADER: error.code}
    if status == 503:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return status, headers, json.dumps(body).encode()


def answer(error: TokenError | Refusal, *, method: str, retry_after: float = 1) -> Response:
    """Return the answer to a request that is not forwarded; `retry_after` is in seconds."""
    status, headers, body = parts(error, retry_after=retry_after)
    # mitmproxy would send a body after the headers of an answer to HEAD, too (RFC 9110 §9.3.2).
    return Response.make(status, b"" if method == "HEAD" else body, headers)
