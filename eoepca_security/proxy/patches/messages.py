"""Messages of mitmproxy's kind: the proxy's own answers, and copies with other headers."""

from typing import Final, TypeVar

from mitmproxy.addons import proxyauth
from mitmproxy.http import Headers, Request, Response
from mitmproxy.net.http import http1

from eoepca_security.errors import IssuerUnavailable
from eoepca_security.oauth.text import printable
from eoepca_security.proxy.policy.headers import Fields
from eoepca_security.proxy.policy.problem_details import ERROR_HEADER, HEADERS, parts
from eoepca_security.proxy.policy.proxy_password import CHALLENGE

AnyMessage = TypeVar("AnyMessage", Request, Response)

_LAST_RESORT: Final = Response.make(503, b"", HEADERS | {ERROR_HEADER: IssuerUnavailable.code, "Retry-After": "1"})


def with_headers(message: AnyMessage, fields: Fields) -> AnyMessage:
    """Return a copy of the message with these headers; all else is shared. mitmproxy's own takes ten times as long."""
    headers = object.__new__(Headers)
    headers.fields = fields
    data = object.__new__(type(message.data))
    data.__dict__.update(message.data.__dict__)
    data.headers = headers
    copied = object.__new__(type(message))
    copied.__dict__.update(message.__dict__)
    copied.data = data
    return copied


def answer(code: str, detail: str, *, method: str, retry_after: float = 1) -> Response:
    """Return the answer to a request that is not forwarded; `retry_after` is in seconds."""
    status, headers, body = parts(code, detail, retry_after=retry_after)
    # mitmproxy would send a body after the headers of an answer to HEAD, too (RFC 9110 §9.3.2).
    return Response.make(status, b"" if method == "HEAD" else body, headers)


def last_resort() -> Response:
    """Return the answer for the time in which there is no better one, and for when making a better one fails."""
    return with_headers(_LAST_RESORT, _LAST_RESORT.data.headers.fields)


def error_answer(status_code: int, reason: str, *, method: str = "") -> Response:
    """Return an answer in place of one that mitmproxy makes; `reason` is mitmproxy's for it."""
    code = "upstream_unavailable" if status_code in (502, 504) else "bad_request"
    _, headers, body = parts(code, printable(reason), status=status_code)
    return Response.make(status_code, b"" if method == "HEAD" else body, headers)


def password_required(detail: str, *, method: str) -> Response:
    """Return the answer to a client that has not sent the forward proxy's password (RFC 9110 §15.5.8)."""
    response = answer("proxy_authentication_required", detail, method=method)
    response.headers["Proxy-Authenticate"] = CHALLENGE
    return response


def authentication_required(is_proxy: bool) -> Response:
    """Return the answer to a client that has not given the password of mitmproxy's option `proxyauth`."""
    status, challenge = (407, "Proxy-Authenticate") if is_proxy else (401, "WWW-Authenticate")
    detail = "send the user name and password of mitmproxy's option proxyauth (Basic authentication)"
    _, headers, body = parts("proxy_authentication_required", detail, status=status)
    return Response.make(status, body, headers | {challenge: f'Basic realm="{proxyauth.REALM}"'})


def last_answer(status_code: int, message: str = "") -> bytes:
    """Return an answer of HTTP/1 after which the connection ends; `message` is mitmproxy's reason for it."""
    return _last(error_answer(status_code, message))


def answer_to_probe() -> bytes:
    """Return the answer of HTTP/1 to `PROBE_HOST`, which is never forwarded, even if all names are allowed."""
    return _last(answer("host_not_allowed", "", method="HEAD"))


def _last(response: Response) -> bytes:
    response.headers["Connection"] = "close"
    return bytes(http1.assemble_response(response))
