"""The proxy's own answers: problem details (RFC 9457) with a stable code for programs. Pure."""

import errno
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.text import printable
from eoepca_security.proxy.config.services import DEFAULT
from eoepca_security.proxy.policy.remedies import told

ERROR_HEADER: Final = "X-OIDC-Proxy-Error"

CODE: Final = "oidc_proxy_error"
"""The key in a flow's metadata for the code of the proxy's own answer."""

DETAIL: Final = "oidc_proxy_error_detail"
"""The key in a flow's metadata for what happened."""

REMEDY: Final = "oidc_proxy_error_remedy"
"""The key in a flow's metadata for the remedy."""

SERVICE: Final = "oidc_proxy_service"
"""The key in a flow's metadata for the name of the service that it is for; missing without a file of services."""

ANSWERS: Final[Mapping[str, tuple[int, str]]] = {
    "host_not_allowed": (403, "The proxy does not accept this Host"),
    "cross_site_request": (403, "The proxy does not accept requests from other web sites"),
    "bad_request": (400, "The request is not well-formed"),
    "method_not_allowed": (405, "The proxy does not accept this method here"),
    "proxy_authentication_required": (407, "The proxy requires a user name and password"),
    IssuerUnavailable.code: (503, "The identity provider does not provide a token"),
    CredentialsRejected.code: (502, "The identity provider rejected the proxy's credentials"),
    TokenInvalid.code: (502, "The identity provider's token cannot be used"),
    "upstream_unavailable": (502, "The protected service does not answer"),
    "upstream_timeout": (504, "The protected service does not answer in time"),
}
"""All codes of the public interface, with status and title."""

MALFORMED: Final = "its answer is malformed"
"""The start of the reason for not forwarding the service's answer."""

_QUOTED: Final = re.compile(r"[:\s](bytearray\()?b?['\"].*", re.DOTALL)

HEADERS: Final = {"Content-Type": "application/problem+json", "Cache-Control": "no-store"}


def title(code: str) -> str:
    """Return the title of a code of the public interface."""
    return ANSWERS[code][1]


@dataclass(frozen=True)
class UpstreamError:
    """Why the protected service did not answer, and the remedy. `code` is part of the public interface."""

    code: str
    reason: str
    remedy: str

    @property
    def detail(self) -> str:
        """Reason and remedy in one line."""
        return told(self.reason, self.remedy)


def without_quotes(reason: str) -> str:
    """Return mitmproxy's reason for an error without the bytes that it quotes, which may contain credentials."""
    return _QUOTED.sub("", reason).rstrip(". :")


def upstream_error(address: str, reason: str, *, is_plain: bool = False, service: str = "") -> UpstreamError:
    """Return code and remedy for mitmproxy's `reason` that the service at `address` (host:port) did not answer.

    `service` is its name if it has one.

    mitmproxy only gives the reason as text, and only this function parses it. `is_plain` is true for a connection
    without TLS.
    """
    reason, setting = without_quotes(reason), _setting(service)
    if "does not speak TLS" in reason:
        remedy = f"should {setting} use http:// instead of https://?"
    elif "certificate verify failed" in reason.lower():
        remedy = f"to trust another CA, set {_setting(service, 'TLS_CA_FILE', 'ca_file')}"
    elif "server closed connection" in reason:
        # Servers that expect TLS also do this.
        other = f"; or should {setting} use https:// instead of http://?" if is_plain else ""
        remedy = f"see the service's log{other}"
    elif reason.startswith((MALFORMED, "Cannot parse HTTP response")):
        remedy = f"fix the service, or {setting} if it is the address of something else"
    else:
        remedy = f"check {setting}, and that the service is running"
    is_late = "timed out" in reason.lower() or f"[Errno {errno.ETIMEDOUT}]" in reason
    code = "upstream_timeout" if is_late else "upstream_unavailable"
    where = f"{service} at {address}" if service else address
    return UpstreamError(code, f"{where}: {printable(reason)}", remedy)


def _setting(service: str, variable: str = "REMOTE_PROTECTED_DOMAIN", key: str = "url") -> str:
    """Return where a setting of a service stands: in a variable, or in the file with the services."""
    if not service:
        return variable
    in_file = f"{key} of [service.{service}]"
    return f"{variable} or {in_file}" if service == DEFAULT else in_file


def parts(
    code: str, detail: str, *, retry_after: float = 1, status: int | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Return status (by default the code's own), headers and body of an answer; `retry_after` is in seconds."""
    usual, title = ANSWERS[code]
    status = status or usual
    body = {"title": title, "status": status, "detail": detail, "code": code}
    headers = HEADERS | {ERROR_HEADER: code}
    if status == 503:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return status, headers, json.dumps(body).encode()


def unknown_service(detail: str, names: Sequence[str]) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the answer to a question about no service; `names` are all there are."""
    body = {"title": "The proxy has no service of this name", "status": 404, "detail": detail, "services": list(names)}
    return 404, dict(HEADERS), json.dumps(body).encode()
