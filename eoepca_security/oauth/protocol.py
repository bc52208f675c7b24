"""OAuth 2.0 and OpenID Connect messages, without I/O.

Each exchange has one function that builds the request and one that reads the answer. Neither sends anything.
"""

import base64
import json
import math
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote_plus

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from eoepca_security.errors import Cause, CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.strict_json import parse_object
from eoepca_security.oauth.text import printable, without_secrets
from eoepca_security.oauth.urls import issuer_of, split_url, url_problem

PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey

CLIENT_AUTH_METHODS: Final = (
    "auto",
    "client_secret_basic",
    "client_secret_post",
    "client_secret_jwt",
    "private_key_jwt",
    "none",
)
ASSERTION_AUDIENCES: Final = ("issuer", "token_endpoint")
GRANTS: Final = ("refresh_token", "client_credentials")

EXCHANGE_GRANT: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN_TYPE: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105  a name, not a secret
JWT_TYPE: Final = "urn:ietf:params:oauth:token-type:jwt"

ASSERTION_LIFETIME: Final = 60
"""How long a client assertion is valid, in seconds (RFC 7523 §3: it must expire)."""

MAX_SCOPE: Final = 4000
"""The longest scope that is kept from an answer, in characters."""

MAX_LIFETIME: Final = 10 * 365 * 86_400.0
"""The longest accepted lifetime of a token in seconds: 10 years. Some issuers send numbers for "never expires" that
timers and calendars cannot represent."""

PASSING_ERRORS: Final = frozenset(
    {
        "server_error",
        "temporarily_unavailable",
        "slow_down",
        "authorization_pending",
        "too_many_requests",
        "rate_limit_exceeded",
    }
)
"""The error codes after which the same request may succeed later. All others, including unknown ones, are final:
a retry with the same credentials does not help."""

# RFC 6749 §4.1.2.1 and §5.2, RFC 8628 §3.5, RFC 8707 §2. Keycloak sends `not_allowed` for offline_access.
_KNOWN_ERRORS: Final = PASSING_ERRORS | {
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
    "invalid_target",
    "access_denied",
    "expired_token",
    "not_allowed",
}

RESERVED_PARAMS: Final = frozenset(
    {
        "grant_type",
        "client_id",
        "client_secret",
        "client_assertion",
        "client_assertion_type",
        "refresh_token",
        "scope",
        "code",
        "code_verifier",
        "code_challenge",
        "code_challenge_method",
        "redirect_uri",
        "response_type",
        "response_mode",
        "state",
        "nonce",
        "device_code",
        "request",
        "request_uri",
        "subject_token",
        "subject_token_type",
        "requested_token_type",
        "actor_token",
        "actor_token_type",
        "username",
        "password",
    }
)
"""Parameters that the protocol defines, so that `Client.params` must not have them.

`audience` and `resource` are not among them: some issuers want one at every login. A request with a target of its own
goes without those of `Client.params`.
"""

_PASSING_STATUSES: Final = (408, 425, 429)  # RFC 9110 §15.5.9, RFC 8470 §5.2, RFC 6585 §4
_UNCLEAR_STATUSES: Final = (400, 401, 403)


@dataclass(frozen=True)
class Client:
    """An OAuth client and how it authenticates (`CLIENT_AUTH_METHODS`).

    `assertion_audience` is the audience of the assertions that it signs (`ASSERTION_AUDIENCES`). `params` are further
    parameters for its token requests and logins, for issuers that need some; they never replace the protocol's own.
    """

    client_id: str
    secret: str | None = field(default=None, repr=False)
    auth_method: str = "auto"
    key: PrivateKey | None = field(default=None, repr=False)
    assertion_audience: str = "issuer"
    params: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)


@dataclass(frozen=True)
class ProviderMetadata:
    """The part of a discovery document that we use (OpenID Connect Discovery §3).

    `token_endpoint` is empty when the document has none: verifying tokens needs only keys.
    """

    issuer: str
    token_endpoint: str
    jwks_uri: str | None = None
    auth_methods: tuple[str, ...] = ("client_secret_basic",)
    auth_signing_algs: tuple[str, ...] = ()
    authorization_endpoint: str | None = None
    device_authorization_endpoint: str | None = None
    revocation_endpoint: str | None = None
    names_itself: bool = False
    """Whether authorization responses name the issuer (RFC 9207)."""
    userinfo_endpoint: str | None = None
    access_token_issuer: str | None = None
    """The `iss` of access tokens, if it is not the issuer's name. Only AD FS has such a member ([MS-OIDCE])."""


@dataclass(frozen=True)
class TokenRequest:
    """A POST with client authentication. `form` and `headers` carry secrets, so the repr omits them.

    `resources` are sent besides the form, each as a `resource` (RFC 8707 §2).
    """

    url: str
    form: Mapping[str, str] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    resources: tuple[str, ...] = ()

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets in the request, as sent."""
        names = (
            *("refresh_token", "client_secret", "client_assertion", "code", "code_verifier", "device_code", "token"),
            "subject_token",
        )
        credentials = self.headers.get("Authorization", "").rpartition(" ")[2]
        return (credentials, *(self.form[name] for name in names if name in self.form))


@dataclass(frozen=True)
class TokenResponse:
    """A successful token response (RFC 6749 §5.1). Lifetimes are in seconds, or None when not given."""

    access_token: str = field(repr=False)
    expires_in: float | None = None
    refresh_token: str | None = field(default=None, repr=False)
    refresh_expires_in: float | None = None
    """The refresh token's lifetime (Keycloak). None when it does not expire, as in offline sessions."""
    id_token: str | None = field(default=None, repr=False)
    scope: str | None = None
    """The scope that the answer names, or None. A JWT's own claim says more: in offline sessions, Keycloak always names
    the login's here."""


def read_metadata(
    status: int, body: bytes, *, url: str, issuer: str | None = None, allow_http: bool = False
) -> ProviderMetadata:
    """Read a discovery document fetched from `url`.

    It must name `issuer`, which is `url` without the well-known part when it is None (OpenID Connect Discovery §4.3). A
    trailing slash makes no difference, because people leave it out. Raises IssuerUnavailable.
    """
    if status != 200:
        cause: Cause | None = "not_there" if status in (400, 401, 403, 404) else None
        raise IssuerUnavailable(f"{url} answered {status}", cause=cause, url=url)
    try:
        document = parse_object(body)
    except ValueError as error:
        raise IssuerUnavailable(f"{url} is not a discovery document: {_first_words(error)}", url=url) from None
    named = document.get("issuer")
    expected = issuer_of(url) if issuer is None else issuer.rstrip("/")
    if not isinstance(named, str) or named.rstrip("/") != expected:
        raise IssuerUnavailable(f"{url} names another issuer, {printable(named)}", cause="other_issuer", url=url)
    endpoints = {}
    for name in ("token_endpoint", "jwks_uri"):
        value = document.get(name)
        if value is None:
            continue
        problem = url_problem(value, allow_http=allow_http) if isinstance(value, str) else "is not a string"
        if problem:
            is_plain = isinstance(value, str) and url_problem(value, allow_http=True) is None
            raise IssuerUnavailable(
                f"{url}: its {name} {printable(value)} {problem}", cause="plain_http" if is_plain else None, url=url
            )
        endpoints[name] = value
    return ProviderMetadata(
        issuer=named,
        token_endpoint=endpoints.get("token_endpoint", ""),
        jwks_uri=endpoints.get("jwks_uri"),
        # Only used for extra headers, so an invalid URL is ignored.
        userinfo_endpoint=_good_url(document.get("userinfo_endpoint"), allow_http=allow_http),
        # OpenID Connect Discovery §3: the default is client_secret_basic.
        auth_methods=_strings(document.get("token_endpoint_auth_methods_supported")) or ("client_secret_basic",),
        auth_signing_algs=_strings(document.get("token_endpoint_auth_signing_alg_values_supported")),
        # Only used to log in and out, so invalid URLs are ignored.
        authorization_endpoint=_good_url(document.get("authorization_endpoint"), allow_http=allow_http),
        device_authorization_endpoint=_good_url(document.get("device_authorization_endpoint"), allow_http=allow_http),
        revocation_endpoint=_good_url(document.get("revocation_endpoint"), allow_http=allow_http),
        access_token_issuer=_access_token_issuer(document.get("access_token_issuer"), named),
        names_itself=document.get("authorization_response_iss_parameter_supported") is True,
    )


def _access_token_issuer(value: object, issuer: str) -> str | None:
    """Return a name that an issuer may use in access tokens: one on its own host, as it must not speak for others."""
    try:
        return value if isinstance(value, str) and split_url(value).hostname == split_url(issuer).hostname else None
    except ValueError:
        return None


def choose_auth_method(client: Client, metadata: ProviderMetadata) -> str:
    """Return the client authentication method to use: the client's own, or for `auto` one that the issuer supports.

    Raises CredentialsRejected when the client has no credentials for any method that the issuer supports.
    """
    if client.auth_method != "auto":
        return client.auth_method
    if client.key is None and client.secret is None:
        return "none"
    possible = ["private_key_jwt"] if client.key is not None else []
    if client.secret is not None:
        possible += ["client_secret_basic", "client_secret_post", "client_secret_jwt"]
    for method in possible:
        if method in metadata.auth_methods:
            return method
    raise CredentialsRejected(
        f"the issuer supports the client authentication methods {printable(', '.join(metadata.auth_methods))}, but the "
        f"client's credentials are for {' or '.join(possible)}",
        cause="no_auth_method",
    )


def build_token_request(
    client: Client,
    metadata: ProviderMetadata,
    *,
    now: float,
    refresh_token: str | None = None,
    scope: str | None = None,
    resource: str | None = None,
) -> TokenRequest:
    """Build a refresh request (RFC 6749 §6), or without a refresh token a client credentials request (RFC 6749 §4.4).

    `resource` is the URI of the service that the token is for (RFC 8707 §2.2). `now` is in epoch seconds. Raises the
    same errors as `choose_auth_method`.
    """
    form = {"grant_type": "client_credentials"}
    if refresh_token is not None:
        form = {"grant_type": "refresh_token", "refresh_token": refresh_token}
    if scope is not None:
        form["scope"] = scope
    form |= _target(resource=resource)
    return build_client_request(client, metadata, metadata.token_endpoint, {**_params(client, form), **form}, now=now)


def build_exchange_request(
    client: Client,
    metadata: ProviderMetadata,
    *,
    now: float,
    subject_token: str,
    audience: str | None = None,
    resource: str | None = None,
    scope: str | None = None,
) -> TokenRequest:
    """Build a request for an access token of the same user for another service (RFC 8693 §2.1).

    `subject_token` is the user's access token. `audience` is the service's name at the issuer, and `resource` its URI.
    `offline_access` in `scope` is left out, because it would start a session. `now` is in epoch seconds. Raises the
    same errors as `choose_auth_method`.
    """
    form = {
        "grant_type": EXCHANGE_GRANT,
        "subject_token": subject_token,
        "subject_token_type": ACCESS_TOKEN_TYPE,
        "requested_token_type": ACCESS_TOKEN_TYPE,
        **_target(audience=audience, resource=resource),
    }
    if scopes := [name for name in (scope or "").split() if name != "offline_access"]:
        form["scope"] = " ".join(scopes)
    return build_client_request(client, metadata, metadata.token_endpoint, {**_params(client, form), **form}, now=now)


def narrow_scope(scope: str, login_scope: str | None) -> str:
    """Return the scope to ask for in a refresh that needs only `scope` (RFC 6749 §6).

    It keeps what makes a session last: some issuers give no refresh token, or end an offline session, without it.
    `login_scope` is the scope of the login, or None if it is not known.
    """
    kept = [name for name in ("openid", "offline_access") if name in (login_scope or "").split()]
    return " ".join(dict.fromkeys([*scope.split(), *kept]))


def _target(**target: str | None) -> dict[str, str]:
    return {name: value for name, value in target.items() if value is not None}


def _params(client: Client, form: Mapping[str, str]) -> dict[str, str]:
    """Return the client's own parameters for a request with `form`.

    If the request has a target, the client's is left out: the token would be for both (RFC 8693 §2.1, RFC 8707 §2).
    """
    targets = {"audience", "resource"}
    left_out = targets if targets & form.keys() else set()
    return {name: value for name, value in client.params.items() if name not in left_out}


def build_client_request(
    client: Client, metadata: ProviderMetadata, url: str, form: Mapping[str, str], *, now: float
) -> TokenRequest:
    """Build a POST of `form` to `url` with client authentication; otherwise like `build_token_request`."""
    form, headers = dict(form), {}
    match choose_auth_method(client, metadata):
        case "client_secret_basic":
            # RFC 6749 §2.3.1: form-encode both parts before joining them, so that a colon in either is unambiguous.
            pair = f"{quote_plus(client.client_id)}:{quote_plus(client.secret or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        case "client_secret_post":
            form |= {"client_id": client.client_id, "client_secret": client.secret or ""}
        case "client_secret_jwt" | "private_key_jwt" as method:
            form |= {
                "client_id": client.client_id,
                "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
                "client_assertion": _client_assertion(client, metadata, method, now),
            }
        case _:
            form["client_id"] = client.client_id
    return TokenRequest(url, form, headers)


def read_token_response(
    status: int,
    body: bytes,
    *,
    retry_after: float | None = None,
    secrets: Collection[str] = (),
    passing: Collection[str] = PASSING_ERRORS,
) -> TokenResponse:
    """Read the token endpoint's answer. Errors never contain `secrets`, even if the issuer's answer does.

    Raises CredentialsRejected for error codes that are not in `passing`, TokenInvalid for a success without a usable
    `access_token`, and IssuerUnavailable for everything else.
    """
    answer = read_answer(status, body, retry_after=retry_after, secrets=secrets, passing=passing)
    refresh_token = read_text(answer.get("refresh_token"), "[ -~]+")
    try:
        return TokenResponse(
            access_token=_access_token(answer, secrets),
            expires_in=read_seconds(answer.get("expires_in")),
            refresh_token=refresh_token,
            refresh_expires_in=read_seconds(answer.get("refresh_expires_in")),
            id_token=read_text(answer.get("id_token")),
            scope=_scope(answer),
        )
    except TokenInvalid as error:
        error.refresh_token = refresh_token
        raise


def read_exchange_response(
    status: int, body: bytes, *, retry_after: float | None = None, secrets: Collection[str] = ()
) -> TokenResponse:
    """Read the answer to an exchange (RFC 8693 §2.2). Raises the same errors as `read_token_response`.

    It must say that it is an access token. A refresh token that comes with it is not used: it would be a session
    besides the login's, which nobody ends. `cause` of a refusal says what is wrong with the exchange, if that is known.
    """
    try:
        answer = read_answer(status, body, retry_after=retry_after, secrets=secrets)
    except CredentialsRejected as error:
        error.cause = _exchange_cause(status, error)
        raise
    issued = answer.get("issued_token_type")
    if issued not in (ACCESS_TOKEN_TYPE, JWT_TYPE):
        shown = without_secrets(issued, secrets) or "unknown"
        raise TokenInvalid(f"the exchange gave a token of type {shown}; only access tokens can be forwarded")
    return TokenResponse(
        access_token=_access_token(answer, secrets),
        expires_in=read_seconds(answer.get("expires_in")),
        id_token=read_text(answer.get("id_token")),
        scope=_scope(answer),
    )


def read_answer(
    status: int,
    body: bytes,
    *,
    retry_after: float | None = None,
    secrets: Collection[str] = (),
    passing: Collection[str] = PASSING_ERRORS,
    endpoint: str = "token",
    gives: str = "access_token",
) -> dict[str, Any]:
    """Return the JSON object of a success, which has the member `gives`.

    Otherwise raises the same errors as `read_token_response`. Some issuers, such as GitHub and Slack, refuse with
    status 200.
    """
    answered = f"the {endpoint} endpoint answered {status}"
    try:
        answer = parse_object(body)
    except ValueError as error:
        if status in _PASSING_STATUSES or status >= 500:
            raise IssuerUnavailable(answered, retry_after=retry_after, was_sent=status >= 500) from None
        # This may be a refusal (Glewlwyd 2.7 refuses a used-up refresh token like this) or come from something in
        # between; RFC 6749 §5.2 requires refusals to have an error code.
        raise IssuerUnavailable(
            f"{answered} without the JSON that OAuth requires: {_first_words(error)}",
            was_sent=True,
            cause="unclear_refusal" if status in _UNCLEAR_STATUSES else None,
        ) from None
    # RFC 6749 §5.1 says 200, but an issuer that answers 201 has issued the tokens too.
    is_success = 200 <= status < 300
    if is_success and (answer.get(gives) is not None or not answer.get("error")):
        return answer
    code, description = _error_code(answer, secrets), _description(answer, secrets)
    said = description and f": {description}"
    if status >= 500 or status in _PASSING_STATUSES or code in passing:
        shown = code and f" ({code})"
        raise IssuerUnavailable(f"{answered}{shown}{said}", retry_after=retry_after, was_sent=status >= 500)
    if code in _KNOWN_ERRORS or (code and not 300 <= status < 400):
        raise rejection(code, description)
    raise IssuerUnavailable(
        f"{answered} ({code or 'without an error code'}){said}",
        cause="unclear_refusal" if status in _UNCLEAR_STATUSES else None,
    )


def _access_token(answer: Mapping[str, object], secrets: Collection[str]) -> str:
    access_token = read_text(answer.get("access_token"))
    if access_token is None:
        raise TokenInvalid("the issuer answered without a usable access_token")
    token_type = answer.get("token_type", "Bearer")
    if not isinstance(token_type, str) or token_type.lower() != "bearer":
        shown = without_secrets(token_type, secrets) or "unknown"
        raise TokenInvalid(f"the issuer gave a token of type {shown}; only Bearer can be forwarded")
    return access_token


# Keycloak refuses almost everything with `invalid_request`, so only its text can tell the cases apart.
_EXCHANGE_CAUSES: Final[Mapping[str, Cause]] = {
    "token exchange is not enabled": "no_exchange",
    "public client is not allowed": "public_client",
    "audience not found": "unknown_audience",
    "client disabled": "unknown_audience",  # the audience's; ours gets `invalid_client` with another text
    "audience not available": "no_audience",
    "not within the token audience": "subject_token",
    "invalid token": "subject_token",
}


def _exchange_cause(status: int, error: CredentialsRejected) -> Cause | None:
    said = (error.description or "").lower()
    for words, cause in _EXCHANGE_CAUSES.items():
        if words in said:
            return cause
    match error.issuer_error:
        case "unsupported_grant_type":
            return "no_exchange"
        case "unauthorized_client" if status != 401:  # with 401, Keycloak refuses a wrong secret
            return "no_exchange"
        case "invalid_target":  # RFC 8693 §2.2.2
            return "no_audience"
        case "invalid_grant" | "invalid_token":
            return "subject_token"
    return None


def _scope(answer: Mapping[str, object]) -> str | None:
    return read_text(answer.get("scope"), f"[ -~]{{1,{MAX_SCOPE}}}")


def read_text(value: object, pattern: str = "[!-~]+") -> str | None:
    """Return `value` if it is a token, else None. Only visible ASCII is safe in a header (RFC 6750 §2.1)."""
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def load_private_key(pem: bytes) -> PrivateKey:
    """Return the RSA, EC or Ed25519 private key in `pem`; raises ValueError with the reason."""
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ValueError("the key is encrypted with a password: store it without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("the file is not a private key in PEM format") from None
    if not isinstance(key, PrivateKey):
        raise ValueError("the key must be RSA, EC or Ed25519")
    if isinstance(key, EllipticCurvePrivateKey) and key.curve.name not in _EC_ALGORITHMS:
        raise ValueError(f"the curve {key.curve.name} has no signature algorithm in JWTs: use P-256, P-384 or P-521")
    return key


_EC_ALGORITHMS: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


def _assertion_algorithm(client: Client, metadata: ProviderMetadata, method: str) -> str:
    possible: tuple[str, ...]
    if method == "client_secret_jwt":
        possible = ("HS256", "HS384", "HS512")
    elif isinstance(client.key, RSAPrivateKey):
        possible = ("RS256", "PS256", "RS384", "RS512", "PS384", "PS512")
    elif isinstance(client.key, EllipticCurvePrivateKey):
        possible = (_EC_ALGORITHMS[client.key.curve.name],)
    else:
        possible = ("EdDSA", "Ed25519")  # the newer name is RFC 9864's
    return next((name for name in possible if name in metadata.auth_signing_algs), possible[0])


def _client_assertion(client: Client, metadata: ProviderMetadata, method: str, now: float) -> str:
    """Return a signed JWT that authenticates the client (RFC 7523 §3, OpenID Connect Core §9).

    Its only audience is the issuer: a malicious issuer could name another one's endpoint as its own, and use the
    assertion there (draft-ietf-oauth-rfc7523bis).
    """
    for_endpoint = client.assertion_audience == "token_endpoint"
    algorithm = _assertion_algorithm(client, metadata, method)
    claims = {
        "iss": client.client_id,
        "sub": client.client_id,
        "aud": metadata.token_endpoint if for_endpoint else metadata.issuer,
        "jti": secrets.token_urlsafe(16),
        "iat": int(now),
        "exp": int(now) + ASSERTION_LIFETIME,
    }
    signed = f"{_segment({'alg': algorithm, 'typ': 'JWT'})}.{_segment(claims)}"
    # Not jwt.encode(): it warns about short secrets and refuses those that look like keys, but the issuer chose the
    # secret.
    key: Any = (client.secret or "").encode() if method == "client_secret_jwt" else client.key
    signature = jwt.get_algorithm_by_name(algorithm.replace("Ed25519", "EdDSA")).sign(signed.encode(), key)
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _segment(members: Mapping[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(members).encode()).rstrip(b"=").decode()


def _error_code(answer: Mapping[str, object], secrets: Collection[str]) -> str:
    """Return the error code, in the spelling of the RFCs if they define it, or an empty string."""
    error = answer.get("error")
    candidates: list[object] = [error.get("code"), error.get("status")] if isinstance(error, dict) else [error]
    candidates.append(answer.get("errorCode"))  # Okta's
    code = next((code for code in candidates if isinstance(code, str) and code), "")
    return code.lower() if code.lower() in _KNOWN_ERRORS else printable(without_secrets(code, secrets))


def _description(answer: Mapping[str, object], secrets: Collection[str]) -> str:
    """Return the issuer's text for people, or an empty string."""
    error = answer.get("error")
    inner = error if isinstance(error, dict) else {}
    words = (
        answer.get("error_description"),
        *(inner.get(name) for name in ("message", "description", "error_description")),
        *(answer.get(name) for name in ("errorSummary", "message", "detail")),  # Okta's, and common ones
    )
    return next((said for text in words if (said := without_secrets(text, secrets))), "")


def rejection(error: str, said: str) -> CredentialsRejected:
    """Return the error for an issuer's refusal, from its error code and its text for people (may be empty)."""
    message = f"the issuer answered {error}{said and ': '}{said}"
    return CredentialsRejected(message, issuer_error=error, description=said or None)


def _good_url(value: object, *, allow_http: bool) -> str | None:
    return value if isinstance(value, str) and url_problem(value, allow_http=allow_http) is None else None


def _first_words(error: ValueError) -> str:
    # json's messages do not quote the document but may end in a position, which says nothing useful here.
    return printable(str(error).partition(":")[0], 80)


def read_seconds(value: object) -> float | None:
    """Return a lifetime of at most `MAX_LIFETIME`, which some issuers send as a string.

    None when it is not a positive number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        return None
    return min(seconds, MAX_LIFETIME) if math.isfinite(seconds) and seconds > 0 else None


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
