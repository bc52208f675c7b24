"""OIDCProxyScheme: verified claims for FastAPI routes, from tokens that a gateway puts into request headers."""

import logging
import math
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import cache
from typing import Annotated, Any, Final, Literal

from fastapi import HTTPException, Security, WebSocketException
from fastapi.openapi.models import OpenIdConnect
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.requests import HTTPConnection

from eoepca_security.errors import IssuerUnavailable, SettingsError, TokenInvalid
from eoepca_security.fastapi.authentication import Authentication, SentIDToken
from eoepca_security.issuer.ca_trust import trust
from eoepca_security.issuer.provider import RETRY_INTERVAL, Provider
from eoepca_security.issuer.transport import HttpTransport
from eoepca_security.oauth.protocol import Client
from eoepca_security.oauth.urls import discovery_url, issuer_url_problem
from eoepca_security.oauth.verify import MAX_TOKEN_SIZE, Policy, check_binding, id_token_mismatch

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.1
_REFRESH_TOKEN: Final = re.compile(f"[ -~]{{1,{MAX_TOKEN_SIZE}}}")  # RFC 6749 §A.17
_NO_SCOPES: Final = SecurityScopes()

logger = logging.getLogger(__name__)


class _Refusal(Exception):
    """The request is refused: a status, an error code of RFC 6750 §3.1 or None, and a text for people."""

    def __init__(self, status: int, error: str | None, detail: str, scope: str = "") -> None:
        super().__init__(detail)
        self.status, self.error, self.detail = status, error, detail
        self.challenge = "Bearer" + (f' error="{error}"' if error else "") + (f', scope="{scope}"' if scope else "")


class OIDCProxyScheme(SecurityBase):
    """A security scheme for `Depends(scheme)` or `Security(scheme, scopes=[…])`, on HTTP and WebSocket routes.

    Tokens come from headers, and are trusted only after verification with the keys of the issuer at `openIdConnectUrl`
    (the issuer or its discovery document). Keys are cached, and fetched without blocking.

    An access token's `aud` must contain `audience`. With `authorized_parties`, it must have been issued to one of these
    clients. `leeway` is the accepted clock difference in seconds.

    The access token is in `auth_token_header`. With `auth_token_in_authorization`, the value is `Bearer <token>`;
    `Bearer` is optional if the header is not Authorization. Otherwise the value is the token alone. If a token is sent,
    it must be valid, even if it is not required.

    An ID token is a signed JWT, issued to the access token's client, to one of `authorized_parties` or to `audience`.
    Its `iss`, `sub` and `at_hash` must match the access token. `claims` gets the claims that the access token lacks.
    With `trust_unsigned_id_token`, it also gets those of the base64 JSON that APISIX sends, if its `iss`, `sub`, `exp`
    and `at_hash` match: anyone with the access token can choose all other members. Otherwise that JSON is ignored.

    An access token with `cnf` is bound to a key (RFC 9449, RFC 8705). It is refused, because nothing here can prove
    possession of the key; so is an ID token with `cnf` without an access token. `bound_tokens="gateway"` accepts them
    without checking the binding: it trusts the gateway to have verified it, or to have got the token with its own key.
    That is safe only if every request comes through this gateway, and the gateway forwards no bound token that it has
    not verified.

    Two arguments are for issuers whose access tokens are not what RFC 9068 asks for. `require_subject=False` accepts
    those without `sub`. With `id_tokens_as_access_tokens`, `at_hash` and `nonce` no longer mark an ID token: Dex has
    them in access tokens. ID tokens that contain `audience` are then accepted too, unless they say what they are.

    Without `require_auth_token`, a signed ID token alone is enough, and a request without any token is anonymous: its
    `claims` are empty. With `auto_error=False`, the result is None instead of any error except 503.

    Raises SettingsError, which names the wrong arguments.
    """

    def __init__(  # noqa: PLR0913  the public interface
        self,
        *,
        openIdConnectUrl: str,  # noqa: N803  as in FastAPI
        audience: str,
        id_token_header: str = "X-ID-Token",
        refresh_token_header: str = "X-Refresh-Token",
        auth_token_header: str = "Authorization",
        auth_token_in_authorization: bool = True,
        require_auth_token: bool = True,
        require_id_token: bool = False,
        require_refresh_token: bool = False,
        authorized_parties: Collection[str] | None = None,
        trust_unsigned_id_token: bool = False,
        leeway: float = 10,
        bound_tokens: Literal["refuse", "gateway"] = "refuse",
        require_subject: bool = True,
        id_tokens_as_access_tokens: bool = False,
        scheme_name: str | None = None,
        description: str | None = None,
        auto_error: bool = True,
    ) -> None:
        headers = {
            "auth_token_header": auth_token_header,
            "id_token_header": id_token_header,
            "refresh_token_header": refresh_token_header,
        }
        problems = _header_problems(headers) + _problems(openIdConnectUrl, audience, leeway, authorized_parties)
        if require_refresh_token and not (require_auth_token or require_id_token):
            problems.append(
                "require_refresh_token needs require_auth_token or require_id_token: it authenticates nobody by itself"
            )
        if not require_subject and trust_unsigned_id_token:
            problems.append("trust_unsigned_id_token needs require_subject: `sub` tells whose unsigned claims they are")
        switches: dict[str, object] = {
            "require_subject": require_subject,
            "id_tokens_as_access_tokens": id_tokens_as_access_tokens,
        }
        problems += [f"{name} must be True or False" for name, value in switches.items() if not isinstance(value, bool)]
        if bound_tokens not in ("refuse", "gateway"):
            problems.append('bound_tokens must be "refuse" or "gateway"')
        if problems:
            raise SettingsError(*problems)

        self.model = OpenIdConnect(openIdConnectUrl=discovery_url(openIdConnectUrl), description=description)
        self.scheme_name = scheme_name or type(self).__name__
        self.auto_error = auto_error
        self._auth_header, self._id_header, self._refresh_header = headers.values()
        self._in_authorization = auth_token_in_authorization
        self._require_auth_token = require_auth_token
        self._require_id_token = require_id_token
        self._require_refresh_token = require_refresh_token
        self._trust_unsigned_id_token = trust_unsigned_id_token
        parties = frozenset(authorized_parties) if authorized_parties else None
        self._policy = Policy(
            audience,
            leeway,
            parties,
            accept_bound=bound_tokens == "gateway",
            require_subject=require_subject,
            accept_id_tokens=id_tokens_as_access_tokens,
        )
        self._provider = Provider(openIdConnectUrl, Client(audience), _transport())  # asks for no tokens
        self._reported: IssuerUnavailable | None = None

    async def __call__(
        self, request: HTTPConnection, security_scopes: SecurityScopes = _NO_SCOPES
    ) -> Authentication | None:
        """Return the authenticated caller; raises HTTPException, or on a WebSocket WebSocketException.

        FastAPI passes the scopes. In your own code, `await scheme(request)` does the same without scopes.
        """
        try:
            found = await self._authenticate(request)
            if security_scopes.scopes:
                _check_scopes(found, security_scopes)
        except TokenInvalid as error:
            refusal = _Refusal(401, "invalid_token", str(error))
        except _Refusal as error:
            refusal = error
        except IssuerUnavailable as error:
            self._report(error)
            if request.scope["type"] == "websocket":
                raise WebSocketException(1013, "the identity provider is unavailable") from None
            retry_after = math.ceil(min(max(error.retry_after or 1, 1), RETRY_INTERVAL))
            raise HTTPException(
                503, "the identity provider is unavailable", {"Retry-After": str(retry_after)}
            ) from None
        else:
            return found if self.auto_error or found["claims"] else None
        if self.auto_error:
            raise _error(request, refusal)
        return None

    async def _authenticate(self, connection: HTTPConnection) -> Authentication:
        access_token = self._header(connection, self._auth_header)
        if self._in_authorization:
            access_token = _without_bearer(access_token, self._auth_header)
        id_value = _without_bearer(self._header(connection, self._id_header), self._id_header)
        refresh_token = self._header(connection, self._refresh_header)
        if access_token is None and self._require_auth_token:
            raise _Refusal(401, None, f"an access token is required in the header {self._auth_header}")
        if refresh_token is None and self._require_refresh_token:
            raise _Refusal(401, None, f"a refresh token is required in the header {self._refresh_header}")
        if refresh_token is not None and not _REFRESH_TOKEN.fullmatch(refresh_token):
            raise TokenInvalid("the refresh token is not printable ASCII, or is longer than 16 KiB")
        access_claims: dict[str, Any] = {}
        if access_token is not None:
            access_claims = await self._provider.verify_access_token(access_token, self._policy)
        id_token = None if id_value is None else SentIDToken(id_value, self._policy.leeway, self._provider.now())
        id_claims = await self._id_claims(id_token, access_token, access_claims) if id_token is not None else None
        if id_claims is None and self._require_id_token:
            raise _Refusal(401, None, f"an ID token is required in the header {self._id_header}")
        return Authentication(
            access_claims,
            id_token,
            claims={**(id_claims or {}), **access_claims},
            access_token=access_token,
            id_token=id_claims,
            refresh_token=refresh_token,
        )

    def _header(self, connection: HTTPConnection, name: str) -> str | None:
        values = connection.headers.getlist(name)
        if len(values) > 1:
            raise _Refusal(400, "invalid_request", f"the header {name} was sent more than once")
        return values[0].strip(" ") or None if values else None

    async def _id_claims(
        self, sent: SentIDToken, access_token: str | None, access_claims: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        if sent.is_signed:
            party = access_claims.get("azp") or access_claims.get("client_id")
            clients = {self._policy.audience, *(self._policy.authorized_parties or ())}
            clients |= {party} if isinstance(party, str) else set()
            claims, alg = await self._provider.verify_id_token(sent.value, clients, sent.leeway)
            if access_token is None:
                check_binding(claims, self._policy)  # with an access token, only the access token's binding counts
            mismatch = access_token and id_token_mismatch(claims, access_claims, access_token, alg)
            if mismatch:
                raise TokenInvalid(f"the ID token does not belong to the access token: {mismatch}")
            return claims
        return sent.unsigned_claims(access_token, access_claims) if self._trust_unsigned_id_token else None

    def _report(self, error: IssuerUnavailable) -> None:
        """Log an error once, no matter how many requests it affects."""
        error.__traceback__ = None  # requests share it, and it must not keep their local variables alive
        if error is not self._reported:
            self._reported = error
            logger.warning("requests get 503: %s", error)


def require_roles(
    scheme: OIDCProxyScheme, *roles: str, client: str | None = None
) -> Callable[..., Awaitable[Authentication]]:
    """Return a dependency that requires all of these Keycloak roles: realm roles, or roles of `client`.

    Roles come from the access token only. A caller without one of them gets 403, and an unauthenticated one gets 401,
    even if the scheme has `auto_error=False`. Raises SettingsError without roles.
    """
    if not roles:
        raise SettingsError("roles must name at least one role")

    async def authentication(
        connection: HTTPConnection, found: Annotated[Authentication | None, Security(scheme)]
    ) -> Authentication:
        if found is None or not found["claims"]:
            raise _error(connection, _Refusal(401, None, "an access token is required"))
        holder = found.access_claims.get("realm_access" if client is None else "resource_access")
        if client is not None:
            holder = holder.get(client) if isinstance(holder, dict) else None
        held = holder.get("roles") if isinstance(holder, dict) else None
        if not isinstance(held, list) or not all(role in held for role in roles):
            raise _error(connection, _Refusal(403, "insufficient_scope", f"required roles: {', '.join(roles)}"))
        return found

    return authentication


@cache  # loading the CAs takes a while, and an application may have many schemes
def _transport() -> HttpTransport:
    return HttpTransport(trust())


def _header_problems(headers: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{name} must be a header name"
        for name, value in headers.items()
        if not isinstance(value, str) or not _HEADER_NAME.fullmatch(value)
    ]
    if len({str(value).lower() for value in headers.values()}) < len(headers):
        problems.append(f"{', '.join(headers)} must be three different headers")
    return problems


def _problems(url: Any, audience: Any, leeway: Any, parties: Any) -> list[str]:
    problems = []
    url_error = issuer_url_problem(url) if isinstance(url, str) else "must be a URL"
    if url_error:
        problems.append(f"openIdConnectUrl {url_error}")
    if not isinstance(audience, str) or not audience.strip():
        problems.append("audience must be a non-empty string: the `aud` of tokens for this service")
    if isinstance(leeway, bool) or not isinstance(leeway, int | float) or not 0 <= leeway < math.inf:
        problems.append("leeway must be a number of seconds, 0 or more")
    if parties is not None and (
        isinstance(parties, str) or not parties or not all(isinstance(party, str) for party in parties)
    ):
        problems.append("authorized_parties must be a non-empty list of client ids, or None")
    return problems


def _check_scopes(found: Authentication, needed: SecurityScopes) -> None:
    if found["access_token"] is None:
        raise _Refusal(401, None, "an access token is required")
    granted: set[str] = set()
    for name in ("scope", "scp"):  # RFC 8693 §4.2; Entra and Okta use `scp`
        value = found.access_claims.get(name)
        values = value.split(" ") if isinstance(value, str) else value
        granted.update(scope for scope in (values if isinstance(values, list) else ()) if isinstance(scope, str))
    if not granted.issuperset(needed.scopes):
        raise _Refusal(403, "insufficient_scope", f"required scopes: {needed.scope_str}", needed.scope_str)


def _without_bearer(value: str | None, header: str) -> str | None:
    """Return the token of `Bearer <token>` (RFC 6750 §2.1). Authorization without `Bearer` has no token."""
    word, _, token = (value or "").partition(" ")
    if word.lower() == "bearer":
        return token.strip(" ") or None
    return None if header.lower() == "authorization" else value


def _error(connection: HTTPConnection, refusal: _Refusal) -> Exception:
    if connection.scope["type"] == "websocket":
        return WebSocketException(1008, refusal.error or "no token")
    return HTTPException(refusal.status, refusal.detail, {"WWW-Authenticate": refusal.challenge})
