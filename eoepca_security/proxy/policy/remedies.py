"""Remedies for errors, in terms of the proxy's settings and commands. Pure.

The errors do not name settings or commands, because other programs use that code too.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from eoepca_security.errors import Cause, CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import WELL_KNOWN, is_loopback
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.services import DEFAULT
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import (
    ALLOW_HTTP,
    ASSERTION_AUDIENCE,
    AUDIENCE,
    CA_FILE,
    CLIENT_AUTH,
    CLIENT_ID,
    CLIENT_KEY_FILE,
    CLIENT_SECRET,
    ENDPOINT,
    GRANT,
    ISSUER,
    ISSUER_NAME,
    REFRESH_TOKEN,
    SCOPE,
    UPSTREAM,
)
from eoepca_security.session.session import SESSION_ERRORS, number

CLIENT_ERRORS: Final = ("invalid_client", "unauthorized_client")
"""The error codes with which an issuer refuses the client (RFC 6749 §5.2)."""

BINDING_REMEDY: Final = "turn off DPoP-bound and certificate-bound access tokens for this client at the issuer"

CLOCK: Final = "synchronize this machine's clock (`timedatectl set-ntp true`), or have the issuer's clock corrected"

SEE_LOG: Final = "fix the errors in the proxy's log"

CHECK_CLIENT: Final = "check the client's settings at the issuer"

CHOOSE_SCOPE: Final = f"set {SCOPE.env} to scopes that the client may request, or leave it unset"

CHOOSE_CLIENT_AUTH: Final = f"set {CLIENT_AUTH.env}, or the credential that it needs"

_BY_ITSELF: Final = "the proxy retries automatically"

_PROXY: Final = (
    "a proxy on the network path requires a login: put its user and password into HTTPS_PROXY (or HTTP_PROXY), e.g. "
    "http://user:password@proxy:3128, or add the host to NO_PROXY"
)


@dataclass(frozen=True)
class Place:
    """A peer that was contacted: where the user set its address, its URL, and whether we run in a container.

    `ca_file` is where the user sets which CAs to trust.
    """

    name: str
    url: str
    in_container: bool
    ca_file: str = CA_FILE.env


@dataclass(frozen=True)
class Reply:
    """An HTTP answer's status, its headers with names in lower case, and the start of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def is_html(self) -> bool:
        """Whether it is an HTML page."""
        return "html" in self.headers.get("content-type", "").lower() or self.body.lstrip()[:1] == b"<"


def told(what: object, remedy: str) -> str:
    """Return in one line what happened and the remedy."""
    return f"{what}; {remedy}" if remedy else str(what)


def failure_remedy(
    error: TokenError, settings: Settings | None, service: Service | None = None, *, in_container: bool
) -> str:
    """Return the remedy for an error that leaves a running proxy without a token, from the error alone.

    `settings` is None when the proxy has no valid settings. `service` is the one whose own token cannot be had, or
    None when the login's cannot.
    """
    if settings is None:
        return SEE_LOG
    if not isinstance(error, IssuerUnavailable) or error.cause == "not_configured":
        return command_remedy(error, settings, service, in_container=in_container)
    remedy = _issuer_remedy(_issuer(settings, error, in_container), error, settings.command)
    return f"{remedy}; {_BY_ITSELF}" if remedy else f"{_BY_ITSELF}; if the error persists, {_check(settings)}"


def command_remedy(error: TokenError, settings: Settings, service: Service | None = None, *, in_container: bool) -> str:
    """Do the same for a command, which does not retry."""
    if remedy := known_remedy(error, settings, service, in_container=in_container):
        return remedy
    match error:
        case IssuerUnavailable():
            return f"try again later; if the error persists, {_check(settings)}"
        case CredentialsRejected():
            return f"compare the client's settings at the issuer with yours; {_check(settings)}"
    return f"{CHECK_CLIENT}; {_check(settings)}"


def known_remedy(error: TokenError, settings: Settings, service: Service | None = None, *, in_container: bool) -> str:
    """Do the same, but return an empty string if only `check` could say more."""
    if service is not None and (remedy := _service_remedy(error, settings, service)) is not None:
        return remedy
    match error:
        case IssuerUnavailable():
            return _issuer_remedy(_issuer(settings, error, in_container), error, settings.command)
        case CredentialsRejected():
            return _rejection_remedy(error, settings)
        case TokenInvalid(claim="aud") if settings.audience is not None:
            return audience_remedy(settings.client.client_id, settings.audience)
        case TokenInvalid(claim="cnf"):
            return BINDING_REMEDY
        case TokenInvalid(cause="clock"):
            return CLOCK
        case TokenInvalid(cause="no_id_token"):
            return _openid_remedy(settings)
    return ""


def key_name(service: Service, key: str, settings: Settings) -> str:
    """Return where the user sets `key` of a service, one of four for the service of the settings without a file."""
    if service.name == DEFAULT and (settings.upstream is not None or settings.services_file is None):
        variable = {"url": UPSTREAM, "audience": AUDIENCE, "scope": SCOPE, "ca_file": CA_FILE}[key]
        return settings.name(variable)
    return f"[service.{service.name}] {key}"


def _service_remedy(error: TokenError, settings: Settings, service: Service) -> str | None:
    """Return the remedy for an error of a service's own token, or None if it is none of the service's settings."""
    match error:
        case CredentialsRejected() if service.token == "exchange":  # noqa: S105  the kind of token
            return exchange_remedy(
                error, settings.client.client_id, service.audience, whose=f"[service.{service.name}]"
            )
        case CredentialsRejected(issuer_error="invalid_scope") if service.scope is not None:
            return f"{login_scope_remedy(settings)}, or correct {key_name(service, 'scope', settings)}"
        case CredentialsRejected(issuer_error="invalid_target") if service.resource is not None:
            return (
                f"{settings.command.run('login')}, which asks for it; or let the client request it at the issuer, or "
                f"correct {key_name(service, 'resource', settings)}"
            )
        case TokenInvalid(claim="aud") if wanted := service.audience or service.resource:
            return service_audience_remedy(settings, service, wanted)
    return None


def service_audience_remedy(settings: Settings, service: Service, audience: str) -> str:
    """Return the remedy for a service's token that is not for `audience`."""
    client_id = settings.client.client_id
    if service.token == "exchange":  # noqa: S105  the kind of token
        return f"{exchanged_audience_remedy(client_id, audience)}; or correct {key_name(service, 'audience', settings)}"
    remedy = audience_remedy(client_id, audience, name=key_name(service, "audience", settings))
    if service.token != "resource":  # noqa: S105  as above
        return remedy
    return f"some issuers ignore `resource`: then set another `token` for {service.name}; or {remedy}"


def login_scope_remedy(settings: Settings) -> str:
    """Return the remedy for scopes that services want, and that the login is without."""
    add = f"add them to {SCOPE.env}, and " if settings.scope is not None else ""
    return (
        f"{add}{settings.command.run('login')}, which asks for them; if that does not help, let the client request "
        f"them at the issuer (Keycloak: Clients > {printable(settings.client.client_id)} > Client scopes > Add client "
        "scope)"
    )


def _openid_remedy(settings: Settings) -> str:
    login = settings.command.run("login")
    asks = f"{login}, which asks for openid" if settings.scope is None else f"add openid to {SCOPE.env}, and {login}"
    return f"{asks}; if that does not help, this issuer sends ID tokens only at the login: remove `credential`"


def login_remedy(error: TokenError, settings: Settings, *, in_container: bool) -> str:
    """Return the remedy for a failed login; empty if there is none."""
    if isinstance(error, CredentialsRejected):
        for reason in (error.issuer_error, error.cause):
            if reason in _LOGIN_REMEDIES:
                text, arguments = _LOGIN_REMEDIES[reason]
                return text + (settings.command.run(arguments) if arguments else "")
    match error:
        case CredentialsRejected(issuer_error="invalid_target") if settings.services_file is not None:
            return (
                f"let the client ask at the issuer for each `resource` in {printable(str(settings.services_file))}, or "
                "correct them"
            )
        case CredentialsRejected(issuer_error=str(said)) if said in CLIENT_ERRORS:
            remedy = _client_remedy(settings)
            return f"{remedy}; {_ALLOW_LOGIN}" if said == "unauthorized_client" else remedy
        case CredentialsRejected(cause="no_auth_method"):
            return CHOOSE_CLIENT_AUTH
        case CredentialsRejected(issuer_error=None):
            return "log in again"
        case CredentialsRejected():
            return f"log in again; if that does not help, {CHECK_CLIENT}, or ask its operator"
        case TokenInvalid(cause=None):
            return ""
    return command_remedy(error, settings, in_container=in_container)


_ALLOW_LOGIN: Final = (
    "or enable this login for the client at the issuer (Keycloak: OAuth 2.0 Device Authorization Grant, or Standard "
    "flow for --browser, in the client's settings)"
)

# By the issuer's error code or the error's cause: what to do, and the command that does it.
_LOGIN_REMEDIES: Final[Mapping[str | None, tuple[str, str]]] = {
    "invalid_grant": ("the login took too long or was already used: log in again", ""),
    "access_denied": ("the login was denied: log in again and allow it", ""),
    "expired_token": ("nobody confirmed the login in time: log in again", ""),
    "invalid_scope": ("choose scopes that the client may request with --scope", ""),
    "not_allowed": ("this client or user may not have offline sessions: ", "login --scope openid"),
    "no_device_login": ("", "login --browser"),
    "no_browser_login": ("", "login"),
    "no_answer": (
        "log in again; if the browser shows an error, allow this redirect URI (Keycloak: http://127.0.0.1/*)",
        "",
    ),
    "no_refresh_token": (
        "enable refresh tokens for the client at the issuer, or request other scopes with --scope",
        "",
    ),
    "mix_up": ("log in again, and check the address of the page before you enter your password", ""),
}


def _issuer(settings: Settings, error: IssuerUnavailable, in_container: bool) -> Place:
    return Place(settings.name(ISSUER), error.url or settings.issuer_url, in_container)


def needs_login(error: TokenError | None) -> bool:
    """Return whether somebody has to log in before there are tokens again."""
    if not isinstance(error, CredentialsRejected):
        return False
    return error.cause == "no_session" or error.issuer_error in SESSION_ERRORS


def _rejection_remedy(error: CredentialsRejected, settings: Settings) -> str:
    match error.issuer_error or error.cause:
        case str(said) if said in SESSION_ERRORS:
            return (
                f"{_new_session(settings)}. The old one has expired, was revoked or used up, or was issued to another "
                "client or under another name of the issuer"
            )
        case "no_session":
            return _new_session(settings)
        case "other_user":
            return (
                f"{settings.command.run('login')} as the user of {REFRESH_TOKEN.env}, or unset that to continue as the "
                "other one"
            )
        case "invalid_client":
            return _client_remedy(settings)
        case "unauthorized_client":  # Keycloak also sends this for a wrong secret
            return f"{_client_remedy(settings)}; or enable this {GRANT.env} for the client at the issuer"
        case "unsupported_grant_type":
            return f"set {GRANT.env} to a grant that the issuer supports"
        case "invalid_scope":
            return scope_remedy(settings)
        case "no_auth_method":
            return CHOOSE_CLIENT_AUTH
    return ""


def scope_remedy(settings: Settings) -> str:
    """Return the remedy for a refused scope of the login's own tokens."""
    if settings.scope is None and (narrowing := narrowing_services(settings)):
        return widening_remedy(settings, narrowing)
    return CHOOSE_SCOPE


def narrowing_services(settings: Settings) -> list[Service]:
    """Return the services whose refreshes ask for less than the login has."""
    return [service for service in settings.services if service.token == "scope"]  # noqa: S105  the kind of token


def widening_remedy(settings: Settings, services: Sequence[Service]) -> str:
    """Return the remedy where a refresh for one of these services takes scopes from the session for good."""
    return (
        "this issuer does not give a session's scopes again after a refresh for fewer: set another `token` for "
        f"{named(services)}, and {settings.command.run('login')}"
    )


def named(services: Iterable[Service]) -> str:
    """Return the names of services, of which there may be hundreds, for a message."""
    names = [service.name for service in services]
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{', '.join(names[:_MOST_NAMED])} and others"


_MOST_NAMED: Final = 10


def _new_session(settings: Settings) -> str:
    return (
        f"{settings.command.run('login')}, which a running proxy picks up; or set {REFRESH_TOKEN.env} to the refresh "
        "token of a new login, and restart"
    )


def _check(settings: Settings) -> str:
    return f"{settings.command.run('check')} for details"


def _client_remedy(settings: Settings) -> str:
    has_secret = settings.client.secret is not None or settings.client.key is not None
    remedy = client_remedy(settings)
    return f"{remedy}; if the client is public, unset {CLIENT_SECRET.env}" if has_secret else remedy


def _issuer_remedy(place: Place, error: IssuerUnavailable, command: Command) -> str:
    """Return the remedy for an issuer's error, from the error alone; empty if there is none."""
    name = place.name
    match error.cause:
        case None:
            return ""
        case "not_configured":
            return SEE_LOG
        case "not_there":
            return _CHECK_PATH.format(name)
        case "other_issuer":
            remedy = f"set {name} to the issuer's name in its discovery document"
            if query := urlsplit(place.url).query:
                remedy += f", followed by {WELL_KNOWN}?{query}"
            return f"{remedy}; or, if this address is right, set {ISSUER_NAME.env} to that name"
        case "plain_http":
            return f"configure the issuer to use https:// there, or set {ALLOW_HTTP.env} on a network that you trust"
        case "unclear_refusal":
            return (
                f"if this persists, the issuer may be refusing the client (check {CLIENT_SECRET.env}) or the session "
                f"({command.run('login')})"
            )
        case cause:
            return network_remedy(place, cause, by_proxy=error.by_proxy)


_CHECK_PATH: Final = "check the path in {}: Keycloak uses /realms/<name>, or /auth/realms/<name> before version 17"


def network_remedy(place: Place, cause: Cause, *, by_proxy: bool) -> str:
    """Return the remedy for a network error on the way to `place`."""
    name, host = place.name, urlsplit(place.url).hostname
    if cause == "refused" and place.in_container and is_loopback(host):
        return (
            f"is it running? {host} is this container itself: to reach another container, set {name} to that one's "
            "name; to reach the host, to host.docker.internal (on Linux with --add-host "
            "host.docker.internal:host-gateway)"
        )
    if by_proxy and cause in ("refused", "unknown_host", "timeout", "ended"):
        return (
            "the connection goes through a proxy: check HTTPS_PROXY (or HTTP_PROXY, ALL_PROXY), or add "
            f"{host} to NO_PROXY"
        )
    if by_proxy and cause == "unknown_ca":
        return f"the proxy on the network path may replace certificates: set {place.ca_file} to its CA's PEM file"
    other = "http" if urlsplit(place.url).scheme == "https" else "https"
    return {
        "refused": f"is it running? If not, start it; otherwise check the host and port in {name}"
        f"{_in_containers(host)}",
        "unknown_host": f"check the host in {name}{_only_containers(host)}; if only a proxy can resolve it, set "
        "HTTPS_PROXY",
        "timeout": f"check the host and port in {name}, and firewalls; if only a proxy can reach it, set HTTPS_PROXY",
        "unknown_ca": f"set {place.ca_file} to a PEM file with the CA that signed it",
        "certificate": f"check the host in {name}, or renew its certificate",
        "no_tls": f"check the port and scheme in {name}: should it be {other}://?",
        "proxy": _PROXY,
        "redirect": f"set {name} to the address that it redirects to",
        "environment": "fix or unset that variable",
    }.get(cause, f"check the host and port in {name}: should it be {other}://?")


def _in_containers(host: str | None) -> str:
    """Return what else may be the reason for a refused connection, where the name is one that containers use."""
    if host in _HOST_OF_CONTAINERS:
        return "; on Linux, it must listen on more than 127.0.0.1"
    return "; in its container, it may listen on another port" if _names_container(host) else ""


def _only_containers(host: str | None) -> str:
    """Return where a name that containers use is known."""
    if host in _HOST_OF_CONTAINERS:
        return ", which only containers know (on Linux with --add-host host.docker.internal:host-gateway)"
    return (
        "; if it is a container's name, only containers on the same network know it" if _names_container(host) else ""
    )


def _names_container(host: str | None) -> bool:
    """Return whether the host may be a container's name: one word, as Docker Compose gives them."""
    return host is not None and not is_loopback(host) and re.fullmatch(r"[a-z][a-z0-9_-]*", host) is not None


_HOST_OF_CONTAINERS: Final = ("host.docker.internal", "gateway.docker.internal", "host.containers.internal")


def issuer_remedy(place: Place, error: IssuerUnavailable, reply: Reply | None, command: Command) -> str:
    """Return the remedy for an issuer without a usable answer; `reply` is its last answer, or None."""
    name = place.name
    # For "not_there", the reply says more than the cause.
    if reply is None or error.cause not in (None, "not_there"):
        return _issuer_remedy(place, error, command) or f"check {name}"
    if reply.status == 407:
        return _PROXY
    if reply.status in (400, 404):
        return _CHECK_PATH.format(name) + _ask_for_tls(place, reply)
    if reply.is_html:
        return (
            f"the answer is an HTML page: the login page of a proxy or network, or {name} is not an issuer. Open "
            f"{printable(place.url)} in a browser; behind a proxy, add the host to NO_PROXY or set HTTPS_PROXY"
        )
    if reply.status == 429 or reply.status >= 500:
        return "the issuer has an internal error or is overloaded: try again later, or ask its operator"
    return f"check {name}: it must be the issuer's name in its discovery document"


def client_remedy(settings: Settings, *, works_with: str | None = None) -> str:
    """Return the remedy for a refused client.

    `works_with` is another client authentication method with which the issuer accepted it.
    """
    client, client_id = settings.client, settings.name(CLIENT_ID)
    if works_with == "none":
        return f"the client is public: unset {CLIENT_SECRET.env} and {CLIENT_AUTH.env}"
    if works_with is not None:
        return f"the client is registered for another method: set {CLIENT_AUTH.env}={works_with}"
    if client.secret is None and client.key is None:
        return (
            f"check {client_id}; if the client is confidential (Keycloak: Client authentication is on), set "
            f"{CLIENT_SECRET.env}"
        )
    if client.key is not None or client.auth_method == "client_secret_jwt":
        return (
            f"check {client_id}, and that the issuer has the secret or the public key that belongs to "
            f"{CLIENT_SECRET.env} or {CLIENT_KEY_FILE.env}; some issuers need {ASSERTION_AUDIENCE.env}=token_endpoint"
        )
    method = f"check {CLIENT_AUTH.env}"
    if client.auth_method == "auto":
        method = f"set {CLIENT_AUTH.env}=client_secret_post if the client is registered for that"
    return (
        f"copy {CLIENT_SECRET.env} from the issuer again (Keycloak: Clients > {printable(client.client_id)} > "
        f"Credentials), check {client_id}, and {method}"
    )


def session_remedy(
    refresh_token: str | None, error: CredentialsRejected, settings: Settings, *, issuer: str, now: float
) -> str:
    """Return the remedy for a refused refresh token, from its claims or the issuer's description."""
    login, client_id = settings.command.run("login"), settings.name(CLIENT_ID)
    claims = unverified_claims(refresh_token or "")
    party, said_issuer, end = claims.get("azp"), claims.get("iss"), number(claims.get("exp"))
    if isinstance(party, str) and party != settings.client.client_id:
        return f"the refresh token was issued to the client {printable(party)}: set {client_id} to that, or {login}"
    if isinstance(said_issuer, str) and said_issuer != issuer:
        return (
            f"the refresh token was issued by {printable(said_issuer)}: set {settings.name(ISSUER)} to that, or {login}"
        )
    if end is not None and end < now:
        return f"the refresh token expired at {datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M} UTC: {login}"
    # OAuth has one code for all of these (RFC 6749 §5.2), so only the issuer's text can tell them apart.
    if "client" in (error.description or ""):
        return f"the refresh token may belong to another client: check {client_id}, or {login}"
    return f"the session has ended, was logged out, or was used up by another program: {login}"


def audience_remedy(client_id: str, audience: str, *, name: str = AUDIENCE.env) -> str:
    """Return the remedy for an access token that is not for `audience`, which the user has set in `name`."""
    client = printable(client_id)
    return (
        f"add it to this client's tokens at the issuer (Keycloak: Clients > {client} > Client scopes > "
        f"{client}-dedicated > Add mapper > By configuration > Audience, with {audience} as Included Custom Audience "
        f"and Add to access token on), or set {name} to the audience that the service expects"
    )


def exchanged_audience_remedy(client_id: str, audience: str) -> str:
    """Return the remedy for an exchange (RFC 8693) that gave, or can give, no token for `audience`."""
    client, service = printable(client_id), printable(audience)
    return (
        f"let the client ask for {service} at the issuer (Keycloak: Client scopes > Create client scope; there, "
        f"Mappers > Configure a new mapper > Audience, with {service} as Included Client Audience; then Clients > "
        f"{client} > Client scopes > Add client scope)"
    )


def exchange_remedy(
    error: CredentialsRejected, client_id: str, audience: str | None, *, whose: str = "the service"
) -> str | None:
    """Return the remedy for a refused exchange (RFC 8693), or None if the exchange itself is not what was refused.

    `audience` is the one that was asked for, or None. `whose` names the table with the service's settings.
    """
    client, service = printable(client_id), printable(audience or "the service's")
    match error.cause or error.issuer_error:
        case "no_exchange" if error.issuer_error == "unsupported_grant_type":
            return f'the issuer does not exchange tokens: set `token` of {whose} to "scope", "resource" or "shared"'
        case "no_exchange":
            return (
                f"let the client exchange tokens at the issuer (Keycloak: Clients > {client} > Settings > Capability "
                "config > Standard Token Exchange)"
            )
        case "public_client":
            return (
                f"only clients with a secret or a key may exchange tokens: turn on Client authentication for {client} "
                f'at the issuer, and set {CLIENT_SECRET.env}; or set `token` of {whose} to "scope"'
            )
        case "unknown_audience":
            return (
                f"no client with this name is enabled at the issuer: correct `audience` of {whose}, or register "
                f"{service} (Keycloak: Clients > Create client, with {service} as Client ID)"
            )
        case "no_audience":
            return (
                f"{exchanged_audience_remedy(client_id, service)}, and if that scope is an optional one, set `scope` "
                f"of {whose} to it; or correct `audience` of {whose}"
            )
        case "subject_token":
            return f"the session's access token was refused: it has ended, or was not issued to {client}"
        case "invalid_scope":
            return f"set `scope` of {whose} to scopes that {client} may request, or leave it out"
        case "access_denied":
            return f"the issuer does not allow this user a token for {service}: ask its operator"
    return None


def refusal_remedy(
    place: Place, reply: Reply, without: Reply | None, service: Service, settings: Settings, *, audience: str
) -> str | None:
    """Return the remedy for the protected service's answer to a request with the token, or None for no error.

    `without` is its answer without the token, or None. `audience` describes the token's audience.
    """
    challenge = reply.headers.get("www-authenticate", "")
    match reply.status:
        case 401 if challenge and "bearer" not in challenge.lower():
            return f"the service does not use Bearer tokens: is {place.name} the right service?"
        case 401:
            return (
                f"the service does not accept the token, which is for {audience}: compare with the issuer and audience "
                f"that the service expects, and set {key_name(service, 'audience', settings)} accordingly"
            )
        case 403 if "insufficient_scope" in challenge:
            wanted = re.search(r'scope="([^"]*)"', challenge)
            scope = printable(wanted[1]) if wanted else "the required scope"
            if service.token != "shared":  # noqa: S105  the kind of token
                return f"set {key_name(service, 'scope', settings)} so that the token has {scope}"
            return f"log in again with --scope, or set {SCOPE.env}, so that the token has {scope}"
        case 403:
            is_for_all = without is not None and without.status == 403
            what = "also refuses this without a token" if is_for_all else "knows the user but refuses this request"
            return (
                f"the service {what}: ask its operator for the role, or set {ENDPOINT.env} to a path that the user may "
                "see"
            )
        case 407:
            return _PROXY
        case 400 if hint := _ask_for_tls(place, reply):
            return f"check {place.name}{hint}"
        case _ if _leads_to_login(reply):
            return (
                "the gateway redirects to a login page instead of accepting tokens: let it accept Bearer tokens "
                f"(APISIX's openid-connect: bearer_only), or set {place.name} to the service itself"
            )
        case status if status >= 500:
            return "the service has an internal error: see its log, and the log of its gateway"
    return None


def unproven_remedy(reply: Reply, without: Reply | None) -> str | None:
    """Return what to set when the service's answers show nothing about the token, or None when they do.

    `reply` is the answer with the token, `without` that without it, or None if there was none.
    """
    if without is None:
        return "try again"
    match reply.status:
        case status if 200 <= status < 300 and (without.status in (401, 403) or _leads_to_login(without)):
            return None
        case status if 200 <= status < 300:
            wanted = "needs a login"
        case status if 300 <= status < 400:
            wanted = "needs a login and does not redirect"
        case 404:
            wanted = "exists and needs a login"
        case _:
            wanted = "needs a login and answers GET with 200"
    return f"set {ENDPOINT.env} to a path that {wanted}"


def _ask_for_tls(place: Place, reply: Reply) -> str:
    speaks_tls = b"HTTPS" in reply.body.upper() and place.url.startswith("http://")
    return "; should it be https://?" if speaks_tls else ""


def _leads_to_login(reply: Reply) -> bool:
    location = reply.headers.get("location", "") if 300 <= reply.status < 400 else ""
    return (
        re.search(r"response_type=|/auth\?|/log[-_]?in|/sign[-_]?in|/oauth2/|/sso\b|SAMLRequest=", location) is not None
    )


def runs_in_container() -> bool:
    """Return whether this process seems to run in a container."""
    marks = ("/.dockerenv", "/run/.containerenv")
    return any(Path(mark).exists() for mark in marks) or "KUBERNETES_SERVICE_HOST" in os.environ
