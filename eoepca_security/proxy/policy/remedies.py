"""What to do about an error: from what was seen of it to the remedy, in terms of our settings and commands. Pure.

The errors themselves name neither, as they come from code that other programs use, too.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from eoepca_security.errors import Cause, CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import is_loopback
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import (
    ALLOW_HTTP,
    AUDIENCE,
    CA_FILE,
    CLIENT_AUTH,
    CLIENT_ID,
    CLIENT_SECRET,
    ENDPOINT,
    GRANT,
    ISSUER,
    REFRESH_TOKEN,
    SCOPE,
    UPSTREAM,
    Variable,
)
from eoepca_security.session.session import number

LOGIN: Final = "run `run-mitmproxy.py login`"

CHECK: Final = "run `run-mitmproxy.py check`, which says more"

CLIENT_ERRORS: Final = ("invalid_client", "unauthorized_client")
"""What an issuer answers (RFC 6749 §5.2) when it is the client that it does not accept."""

BINDING_REMEDY: Final = "turn off DPoP-bound and certificate-bound access tokens for this client at the issuer"

CLOCK: Final = "set this machine's clock by the network (`timedatectl set-ntp true`), or have the issuer's set"

SEE_LOG: Final = "fix what its log names"

CHECK_CLIENT: Final = "check the client's settings at the issuer"

CHOOSE_SCOPE: Final = f"set {SCOPE.env} to scopes that the client may ask for, or leave it unset"

CHOOSE_CLIENT_AUTH: Final = f"set {CLIENT_AUTH.env}, or the credential that it needs"

_LATER: Final = f"try again later; if this lasts, {CHECK}"

_BY_ITSELF: Final = "the proxy tries again by itself"

_PROXY: Final = (
    "a proxy is in the way: put its user and password into HTTPS_PROXY (or HTTP_PROXY), as in "
    "http://user:password@proxy:3128, or list the host in NO_PROXY"
)


@dataclass(frozen=True)
class Place:
    """Where something was looked for: the setting that names it, its URL, and whether we run in a container."""

    variable: Variable
    url: str
    in_container: bool


@dataclass(frozen=True)
class Reply:
    """The head of an HTTP answer, its headers' names in small letters, and the beginning of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def is_html(self) -> bool:
        """Whether it is a page for people."""
        return "html" in self.headers.get("content-type", "").lower() or self.body.lstrip()[:1] == b"<"


def told(what: object, remedy: str) -> str:
    """Say in one line what happened and what to do about it."""
    return f"{what}; {remedy}" if remedy else str(what)


def failure_remedy(error: TokenError, settings: Settings | None, *, in_container: bool) -> str:
    """Return what to do about an error that keeps a running proxy from a token, as far as it alone tells.

    `settings` are None where the proxy has none.
    """
    if settings is None:
        return SEE_LOG
    if not isinstance(error, IssuerUnavailable) or error.cause == "not_configured":
        return command_remedy(error, settings, in_container=in_container)
    remedy = _issuer_remedy(_issuer(settings, error, in_container), error)
    return f"{remedy}; {_BY_ITSELF}" if remedy else f"{_BY_ITSELF}; if this lasts, {CHECK}"


def command_remedy(error: TokenError, settings: Settings, *, in_container: bool) -> str:
    """Do the same for what does not try again by itself."""
    match error:
        case IssuerUnavailable():
            return _issuer_remedy(_issuer(settings, error, in_container), error) or _LATER
        case CredentialsRejected():
            return _rejection_remedy(error, settings)
        case TokenInvalid(claim="aud") if settings.audience is not None:
            return audience_remedy(settings.client.client_id, settings.audience)
        case TokenInvalid(claim="cnf"):
            return BINDING_REMEDY
        case TokenInvalid(cause="clock"):
            return CLOCK
    return f"{CHECK_CLIENT}; {CHECK}"


def login_remedy(error: TokenError, settings: Settings, *, in_container: bool) -> str:
    """Return what to do about a login that failed; empty where there is nothing to do but to trust it as little."""
    match error:
        case CredentialsRejected(issuer_error=str(said)) if said in _LOGIN_REMEDIES:
            return _LOGIN_REMEDIES[said]
        case CredentialsRejected(cause=str(cause)) if cause in _LOGIN_REMEDIES:
            return _LOGIN_REMEDIES[cause]
        case CredentialsRejected(issuer_error=str(said)) if said in CLIENT_ERRORS:
            remedy = _client_remedy(settings)
            return f"{remedy}; {_ALLOW_LOGIN}" if said == "unauthorized_client" else remedy
        case CredentialsRejected(cause="no_auth_method"):
            return CHOOSE_CLIENT_AUTH
        case CredentialsRejected(issuer_error=None):
            return "log in again"
        case CredentialsRejected():
            return f"log in again; if that does not help, {CHECK_CLIENT}, or ask whoever runs it"
        case TokenInvalid(cause=None):
            return ""
    return command_remedy(error, settings, in_container=in_container)


_ALLOW_LOGIN: Final = (
    "or allow the client this way of logging in at the issuer (Keycloak: OAuth 2.0 Device Authorization Grant, or "
    "Standard flow for --browser, in the client's settings)"
)

# By the issuer's error code or the error's cause.
_LOGIN_REMEDIES: Final[Mapping[str, str]] = {
    "invalid_grant": "the login took too long or was used already: log in again",
    "access_denied": "the login was refused there: log in again and allow it",
    "expired_token": "nobody confirmed the login in time: log in again",
    "invalid_scope": "choose scopes that the client may ask for with --scope",
    "not_allowed": "this client or user may have no offline session there: log in with --scope openid",
    "no_device_login": "use login --browser",
    "no_browser_login": "use login without --browser",
    "no_refresh_token": "allow the client refresh tokens there, or ask for other scopes with --scope",
    "mix_up": "log in again, and mind at which address you type your password",
}


def _issuer(settings: Settings, error: IssuerUnavailable, in_container: bool) -> Place:
    return Place(ISSUER, error.url or settings.issuer_url, in_container)


def _rejection_remedy(error: CredentialsRejected, settings: Settings) -> str:
    match error.issuer_error or error.cause:
        case "invalid_grant":
            return (
                f"{_NEW_SESSION}. The old one is expired, revoked or used up, or was given to another client or by "
                "another name of the issuer"
            )
        case "no_session":
            return _NEW_SESSION
        case "invalid_client":
            return _client_remedy(settings)
        case "unauthorized_client":  # Keycloak says this of a wrong secret, too
            return f"{_client_remedy(settings)}; or allow the client this {GRANT.env} at the issuer"
        case "unsupported_grant_type":
            return f"the issuer does not offer this grant: set {GRANT.env} to one that it offers"
        case "invalid_scope":
            return CHOOSE_SCOPE
        case "no_auth_method":
            return CHOOSE_CLIENT_AUTH
    return f"{CHECK_CLIENT} against your settings; {CHECK}"


_NEW_SESSION: Final = (
    f"{LOGIN}, which a running proxy notices; or set {REFRESH_TOKEN.env} to the refresh token of a new login, and "
    "restart"
)


def _client_remedy(settings: Settings) -> str:
    has_secret = settings.client.secret is not None or settings.client.key is not None
    remedy = client_remedy(has_secret=has_secret, works_without=False, client_id=settings.client.client_id)
    return f"{remedy}; a public client has no secret: unset it" if has_secret else remedy


def _issuer_remedy(place: Place, error: IssuerUnavailable) -> str:
    """Return what the error alone tells to do about an issuer; empty when it tells nothing."""
    name = place.variable.env
    match error.cause:
        case None:
            return ""
        case "not_configured":
            return SEE_LOG
        case "not_there":
            return _CHECK_PATH.format(name)
        case "other_issuer":
            return f"set {name} to the issuer's own name, as its discovery document gives it"
        case "plain_http":
            return f"have the issuer name https:// there, or set {ALLOW_HTTP.env} if nobody can listen on the way"
        case "unclear_refusal":
            return (
                f"if it stays so, it may mean to refuse the client (check {CLIENT_SECRET.env}) or the session ({LOGIN})"
            )
        case cause:
            return network_remedy(place, cause, by_proxy=error.by_proxy)


_CHECK_PATH: Final = "check the path in {}: for Keycloak it is /realms/<name>, before version 17 /auth/realms/<name>"


def network_remedy(place: Place, cause: Cause, *, by_proxy: bool) -> str:
    """Return what to do when the network keeps us from `place`."""
    name, host = place.variable.env, urlsplit(place.url).hostname
    if cause == "refused" and place.in_container and is_loopback(host):
        return (
            f"inside a container {host} is the container itself: name the service, or the host as host.docker.internal "
            f"(with --add-host host.docker.internal:host-gateway on Linux), in {name}"
        )
    if by_proxy and cause in ("refused", "unknown_host", "timeout", "ended"):
        return f"the way leads through a proxy: check HTTPS_PROXY (or HTTP_PROXY), or list {host} in NO_PROXY"
    if by_proxy and cause == "unknown_ca":
        return f"the proxy on the way may have put its own certificate there: set {CA_FILE.env} to its CA's PEM file"
    other = "http" if urlsplit(place.url).scheme == "https" else "https"
    return {
        "refused": f"start it, or check host and port in {name}",
        "unknown_host": f"check the host in {name}; where only a proxy knows it, set HTTPS_PROXY",
        "timeout": f"check host and port in {name}, and firewalls; where only a proxy leads there, set HTTPS_PROXY",
        "unknown_ca": f"set {CA_FILE.env} to a PEM file with the CA that signed it",
        "certificate": f"check the host in {name}, or have the certificate renewed for it",
        "no_tls": f"check port and scheme in {name}: is it {other}:// there?",
        "proxy": _PROXY,
        "redirect": f"set {name} to the address that it leads to",
    }.get(cause, f"check host and port in {name}: is it {other}:// there?")


def issuer_remedy(place: Place, error: IssuerUnavailable, reply: Reply | None) -> str:
    """Return what to do about an issuer that gives no sensible answer; `reply` is the last that came."""
    name = place.variable.env
    # What came instead of the document says more than that it was not there.
    if reply is None or error.cause not in (None, "not_there"):
        return _issuer_remedy(place, error) or f"check {name}"
    if reply.status == 407:
        return _PROXY
    if reply.status in (400, 404):
        return _CHECK_PATH.format(name) + _ask_for_tls(place, reply)
    if reply.is_html:
        return (
            f"a page came instead of an answer: a proxy's or a network's login page, or {name} is not an issuer. Open "
            f"{printable(place.url)} in a browser; behind a proxy, list the host in NO_PROXY or set HTTPS_PROXY"
        )
    if reply.status == 429 or reply.status >= 500:
        return "the issuer is in trouble: try again later, or ask whoever runs it"
    return f"check {name}: it has to be the issuer's own name, as its discovery document gives it"


def client_remedy(*, has_secret: bool, works_without: bool, client_id: str) -> str:
    """Return what to do when the issuer does not accept the client; `works_without` the secret was tried."""
    if works_without:
        return f"the client is a public one: unset {CLIENT_SECRET.env} and {CLIENT_AUTH.env}"
    shown = printable(client_id)
    if has_secret:
        return (
            f"copy {CLIENT_SECRET.env} anew from the issuer (Keycloak: Clients > {shown} > Credentials), check "
            f"{CLIENT_ID.env}, and {CLIENT_AUTH.env} if it is set"
        )
    return (
        f"check {CLIENT_ID.env}; if the client is confidential (Keycloak: Client authentication is on), set "
        f"{CLIENT_SECRET.env}"
    )


def session_remedy(
    refresh_token: str | None, error: CredentialsRejected, *, client_id: str, issuer: str, now: float
) -> str:
    """Return what to do when the refresh token is refused, by what it says of itself or the issuer of it."""
    claims = unverified_claims(refresh_token or "")
    party, said_issuer, end = claims.get("azp"), claims.get("iss"), number(claims.get("exp"))
    if isinstance(party, str) and party != client_id:
        return f"it was given to the client {printable(party)}: set {CLIENT_ID.env} to that, or {LOGIN}"
    if isinstance(said_issuer, str) and said_issuer != issuer:
        return f"it was given by {printable(said_issuer)}: set {ISSUER.env} to that, or {LOGIN}"
    if end is not None and end < now:
        return f"it ended at {datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M} UTC: {LOGIN}"
    # OAuth has one code for all of this (RFC 6749 §5.2), so the issuer's words are all there is.
    if "client" in (error.description or ""):
        return f"it seems to be another client's: check {CLIENT_ID.env}, or {LOGIN}"
    return f"the session is over, was logged out or is used up by another program: {LOGIN}"


def audience_remedy(client_id: str, audience: str) -> str:
    """Return what to do when the access token is not for `audience`."""
    client = printable(client_id)
    return (
        f"add it to what the issuer gives this client (Keycloak: Clients > {client} > Client scopes > "
        f"{client}-dedicated > Add mapper > By configuration > Audience, with {audience} as Included Custom Audience "
        f"and Add to access token on), or set {AUDIENCE.env} to what the service expects"
    )


def refusal_remedy(place: Place, reply: Reply, *, audience: str) -> str | None:
    """Return what to do about the protected service's answer to a request with the token, or None when it is good.

    `audience` is what the token says it is for.
    """
    challenge = reply.headers.get("www-authenticate", "")
    match reply.status:
        case 401 if challenge and "bearer" not in challenge.lower():
            return f"the service wants other credentials than a Bearer token: is {UPSTREAM.env} the right service?"
        case 401:
            return (
                f"the service does not accept the token, which is for {audience}: compare with the issuer and audience "
                f"that it expects, and set {AUDIENCE.env} to that"
            )
        case 403 if "insufficient_scope" in challenge:
            wanted = re.search(r'scope="([^"]*)"', challenge)
            scope = printable(wanted[1]) if wanted else "the scope it wants"
            return f"log in again with --scope, or set {SCOPE.env}, so that it has {scope}"
        case 403:
            return (
                "the service knows the user but refuses this request: ask whoever runs it for the role, or set "
                f"{ENDPOINT.env} to something that the user may see"
            )
        case 407:
            return _PROXY
        case 400 if hint := _ask_for_tls(place, reply):
            return f"check {UPSTREAM.env}{hint}"
        case status if 300 <= status < 400 and _is_login_page(reply.headers.get("location", "")):
            return (
                "the gateway sends to a login page rather than taking tokens: have it accept Bearer tokens "
                f"(APISIX's openid-connect: bearer_only), or set {UPSTREAM.env} to the service itself"
            )
        case status if status >= 500:
            return "the service is in trouble: look at its log, and at that of the gateway before it"
    return None


def _ask_for_tls(place: Place, reply: Reply) -> str:
    speaks_tls = b"HTTPS" in reply.body.upper() and place.url.startswith("http://")
    return "; is it https:// there?" if speaks_tls else ""


def _is_login_page(location: str) -> bool:
    return re.search(r"response_type=|/auth\?|/login|/oauth2/", location) is not None


def runs_in_container() -> bool:
    """Tell whether this machine is a container, as far as it shows."""
    marks = ("/.dockerenv", "/run/.containerenv")
    return any(Path(mark).exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ
