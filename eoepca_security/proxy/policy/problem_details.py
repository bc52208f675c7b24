"""The proxy's own answers: problem details (RFC 9457) with a code that programs can rely on. Pure."""

import errno
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.text import printable
from eoepca_security.proxy.policy.remedies import told

ERROR_HEADER: Final = "X-OIDC-Proxy-Error"

CODE: Final = "oidc_proxy_error"
"""In a flow's metadata, the code of the answer that was made here."""

DETAIL: Final = "oidc_proxy_error_detail"
"""There too, what happened."""

REMEDY: Final = "oidc_proxy_error_remedy"
"""There too, what to do about it."""

ANSWERS: Final[Mapping[str, tuple[int, str]]] = {
    "host_not_allowed": (403, "The proxy does not answer to this Host"),
    "cross_site_request": (403, "The proxy takes no requests from other web sites"),
    "bad_request": (400, "The request is not well-formed"),
    IssuerUnavailable.code: (503, "The identity provider does not give a token"),
    CredentialsRejected.code: (502, "The identity provider rejected the proxy's credentials"),
    TokenInvalid.code: (502, "The identity provider's token cannot be used"),
    "upstream_unavailable": (502, "The protected service does not answer"),
    "upstream_timeout": (504, "The protected service does not answer in time"),
}
"""Every code of the public interface, with its status and its title."""

MALFORMED: Final = "its answer is malformed"
"""Begins the reason for which an answer of the service is not passed on."""

HEADERS: Final = {"Content-Type": "application/problem+json", "Cache-Control": "no-store"}


def title(code: str) -> str:
    """Return in words what a code of the public interface says."""
    return ANSWERS[code][1]


@dataclass(frozen=True)
class UpstreamFault:
    """Why the protected service gives no answer, and what to do about it; `code` is of the public interface."""

    code: str
    reason: str
    remedy: str

    @property
    def detail(self) -> str:
        """Both in one line."""
        return told(self.reason, self.remedy)


def upstream_fault(service: str, reason: str, *, is_plain: bool = False) -> UpstreamFault:
    """Say what mitmproxy's `reason` for a failure of `service` (host:port) means, and what to do.

    mitmproxy has words for it and nothing else; this is the one place that looks at them. `is_plain` says that the
    service was addressed without TLS.
    """
    reason = reason.rstrip(". ")
    if "does not speak TLS" in reason:
        remedy = "is it http:// rather than https:// in REMOTE_PROTECTED_DOMAIN?"
    elif "certificate verify failed" in reason.lower():
        remedy = "TLS_CA_FILE adds a CA to those that are trusted"
    elif "server closed connection" in reason:
        # As servers do that want TLS.
        other = ", or is it https:// rather than http:// in REMOTE_PROTECTED_DOMAIN?" if is_plain else ""
        remedy = f"it hung up without an answer: its log may say why{other}"
    elif reason.startswith((MALFORMED, "Cannot parse HTTP response")):
        remedy = "the service has to mend that, unless REMOTE_PROTECTED_DOMAIN is the address of something else"
    else:
        remedy = "check REMOTE_PROTECTED_DOMAIN, and that the service is up"
    is_late = "timed out" in reason.lower() or f"[Errno {errno.ETIMEDOUT}]" in reason
    code = "upstream_timeout" if is_late else "upstream_unavailable"
    return UpstreamFault(code, f"{service}: {printable(reason)}", remedy)


def parts(
    code: str, detail: str, *, retry_after: float = 1, status: int | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Return status (the usual one unless given), headers and body of an answer; `retry_after` is in seconds."""
    usual, title = ANSWERS[code]
    status = status or usual
    body = {"title": title, "status": status, "detail": detail, "code": code}
    headers = HEADERS | {ERROR_HEADER: code}
    if status == 503:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return status, headers, json.dumps(body).encode()
