"""Login and logout messages, without I/O.

The device authorization grant (RFC 8628), the authorization code with PKCE (RFC 6749 §4.1, RFC 7636) and revocation
(RFC 7009). As in `protocol`, each exchange has one function that builds the request and one that reads the answer.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final
from urllib.parse import urlencode

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.protocol import (
    Client,
    ProviderMetadata,
    TokenRequest,
    TokenResponse,
    build_client_request,
    read_answer,
    read_seconds,
    read_text,
    read_token_response,
    rejection,
)
from eoepca_security.oauth.text import printable, without_secrets
from eoepca_security.oauth.urls import url_problem

DEFAULT_SCOPE: Final = "openid offline_access"
DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"

POLL_INTERVAL: Final = 5.0
"""Default seconds between two polls (RFC 8628 §3.2), and what `slow_down` adds to them (§3.5)."""


@dataclass(frozen=True)
class DeviceAuthorization:
    """A login that the user must confirm in a browser (RFC 8628 §3.2). Times are in seconds."""

    device_code: str = field(repr=False)
    verifier: str = field(repr=False)
    user_code: str
    verification_uri: str
    expires_in: float
    interval: float
    verification_uri_complete: str | None = None
    """The same URI with the code filled in."""


class Pending(Enum):
    """Why there is no token yet (RFC 8628 §3.5)."""

    WAIT = "authorization_pending"
    SLOW_DOWN = "slow_down"


@dataclass(frozen=True)
class AuthorizationRequest:
    """The URL to open in the user's browser, and the values that its answer is checked against."""

    url: str = field(repr=False)
    redirect_uri: str
    state: str = field(repr=False)
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)


def new_verifier() -> str:
    """Return a secret that later proves that we started the login (RFC 7636 §4.1)."""
    return secrets.token_urlsafe(48)


def build_device_request(
    client: Client,
    metadata: ProviderMetadata,
    scope: str,
    verifier: str,
    *,
    now: float,
    resources: Collection[str] = (),
) -> TokenRequest:
    """Build a device authorization request (RFC 8628 §3.1).

    `resources` are the URIs that later refreshes ask for (RFC 8707 §2.1).

    The request includes PKCE, which RFC 8628 does not mention: Keycloak requires it here if it does for browsers.
    Raises CredentialsRejected when the issuer does not offer this login.
    """
    url = metadata.device_authorization_endpoint
    if url is None:
        raise CredentialsRejected("the issuer does not offer the device authorization grant", cause="no_device_login")
    form = {**client.params, "client_id": client.client_id, "scope": scope, **_challenge(verifier)}
    # A login is for that of the client's own parameters, too.
    own = (form.pop("resource"),) if "resource" in form else ()
    request = build_client_request(client, metadata, url, form, now=now)
    return replace(request, resources=_each_once(*own, *resources))


def read_device_response(
    status: int, body: bytes, verifier: str, *, secrets: Collection[str] = (), allow_http: bool = False
) -> DeviceAuthorization:
    """Read the device authorization endpoint's answer to a request with `verifier`.

    Raises CredentialsRejected or IssuerUnavailable.
    """
    answer = read_answer(status, body, secrets=secrets, endpoint="device authorization", gives="device_code")
    device_code, user_code = (read_text(answer.get(name), "[ -~]{1,2000}") for name in ("device_code", "user_code"))
    expires_in = read_seconds(answer.get("expires_in"))
    uri, complete = (
        uri if isinstance(uri, str) and url_problem(uri, allow_http=allow_http) is None else None
        for uri in (
            answer.get("verification_uri") or answer.get("verification_url"),  # Google's
            answer.get("verification_uri_complete"),
        )
    )
    if device_code is None or user_code is None or uri is None or expires_in is None:
        raise IssuerUnavailable("the device authorization endpoint's answer lacks members that RFC 8628 §3.2 requires")
    interval = read_seconds(answer.get("interval")) or POLL_INTERVAL
    return DeviceAuthorization(device_code, verifier, printable(user_code, 64), uri, expires_in, interval, complete)


def build_device_token_request(
    client: Client, metadata: ProviderMetadata, device: DeviceAuthorization, *, now: float
) -> TokenRequest:
    """Build a poll for the tokens of a device login (RFC 8628 §3.4)."""
    form = {
        **client.params,
        "grant_type": DEVICE_GRANT,
        "device_code": device.device_code,
        "client_id": client.client_id,
        "code_verifier": device.verifier,
    }
    return build_client_request(client, metadata, metadata.token_endpoint, form, now=now)


def read_device_token_response(
    status: int, body: bytes, *, retry_after: float | None = None, secrets: Collection[str] = ()
) -> TokenResponse | Pending:
    """Read the answer to a poll.

    Raises the same errors as `read_token_response`, and CredentialsRejected when the login is over. Every error code
    but the two of `Pending` ends it (RFC 8628 §3.5).
    """
    pending = {reason.value: reason for reason in Pending}
    try:
        return read_token_response(status, body, retry_after=retry_after, secrets=secrets, passing=())
    except CredentialsRejected as error:
        if error.issuer_error not in pending:
            raise
        return pending[error.issuer_error]


def build_authorization_request(
    client: Client, metadata: ProviderMetadata, scope: str, *, redirect_uri: str, resources: Collection[str] = ()
) -> AuthorizationRequest:
    """Build the URL that the browser opens (OpenID Connect Core §3.1.2.1), with PKCE's S256.

    `resources` are the URIs that later refreshes ask for (RFC 8707 §2.1). Raises CredentialsRejected when the issuer
    does not offer this login.
    """
    endpoint = metadata.authorization_endpoint
    if endpoint is None:
        raise CredentialsRejected("the issuer does not offer browser login", cause="no_browser_login")
    state, nonce, verifier = (new_verifier() for _ in range(3))
    parameters = {
        **client.params,
        "response_type": "code",
        "client_id": client.client_id,
        "redirect_uri": redirect_uri,
        "scope": scope,
        "state": state,
        "nonce": nonce,
        **_challenge(verifier),
    }
    if "offline_access" in scope.split():
        # Without it, the issuer may omit the refresh token (OpenID Connect Core §11).
        parameters.setdefault("prompt", "consent")
    own = (parameters.pop("resource"),) if "resource" in parameters else ()
    query = urlencode([*parameters.items(), *(("resource", uri) for uri in _each_once(*own, *resources))])
    url = f"{endpoint}{'&' if '?' in endpoint else '?'}{query}"
    return AuthorizationRequest(url, redirect_uri, state, nonce, verifier)


def is_answer_to(request: AuthorizationRequest, parameters: Sequence[tuple[str, str]]) -> bool:
    """Return whether a redirect's query belongs to `request`. Ignore others: any web page can send one."""
    states = [value for name, value in parameters if name == "state"]
    return len(states) == 1 and hmac.compare_digest(states[0].encode(), request.state.encode())


def read_authorization_response(
    request: AuthorizationRequest, metadata: ProviderMetadata, parameters: Sequence[tuple[str, str]]
) -> str:
    """Return the code in the query of a redirect (RFC 6749 §4.1.2) that `is_answer_to` this request.

    Its `iss` must be this issuer (RFC 9207 §2.4). Raises CredentialsRejected.
    """
    values = dict(parameters)
    if not is_answer_to(request, parameters) or len(values) != len(parameters):
        raise CredentialsRejected("the browser returned the answer to another login")
    issuer = values.get("iss")
    if (issuer is not None or metadata.names_itself) and issuer != metadata.issuer:
        raise CredentialsRejected(
            "the browser came back from another issuer, so the login was not completed", cause="mix_up"
        )
    if error := values.get("error"):
        said = without_secrets(values.get("error_description"), (request.state, request.nonce, request.verifier))
        raise rejection(printable(error, 64), said)
    code = values.get("code", "")
    if not re.fullmatch("[ -~]+", code):
        raise CredentialsRejected("the browser came back without a code")
    return code


def build_code_request(
    client: Client, metadata: ProviderMetadata, request: AuthorizationRequest, code: str, *, now: float
) -> TokenRequest:
    """Build the request that exchanges a code for tokens (RFC 6749 §4.1.3, RFC 7636 §4.5)."""
    form = {
        **client.params,
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": request.redirect_uri,
        "code_verifier": request.verifier,
    }
    return build_client_request(client, metadata, metadata.token_endpoint, form, now=now)


def read_code_response(status: int, body: bytes, *, secrets: Collection[str] = ()) -> TokenResponse:
    """Read the answer to a code request. Raises the same errors as `read_token_response`."""
    return read_token_response(status, body, secrets=secrets)


def check_nonce(request: AuthorizationRequest, claims: dict[str, object]) -> None:
    """Check that a verified ID token belongs to this login (OpenID Connect Core §3.1.3.7); raises TokenInvalid."""
    nonce = claims.get("nonce")
    if not isinstance(nonce, str) or not hmac.compare_digest(nonce.encode(), request.nonce.encode()):
        raise TokenInvalid("the ID token belongs to another login", claim="nonce")


def build_revocation_request(client: Client, metadata: ProviderMetadata, token: str, *, now: float) -> TokenRequest:
    """Build a request that revokes a refresh token (RFC 7009 §2.1).

    Raises CredentialsRejected when the issuer does not offer revocation.
    """
    if metadata.revocation_endpoint is None:
        raise CredentialsRejected("the issuer does not offer revocation")
    form = {"token": token, "token_type_hint": "refresh_token"}
    return build_client_request(client, metadata, metadata.revocation_endpoint, form, now=now)


def read_revocation_response(status: int, body: bytes, *, secrets: Collection[str] = ()) -> None:
    """Read the answer to a revocation; success has no content (RFC 7009 §2.2).

    Raises the same errors as `read_token_response`.
    """
    if not 200 <= status < 300:
        read_answer(status, body, secrets=secrets, endpoint="revocation")


def _each_once(*values: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _challenge(verifier: str) -> dict[str, str]:
    digest = hashlib.sha256(verifier.encode()).digest()
    challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return {"code_challenge": challenge, "code_challenge_method": "S256"}
