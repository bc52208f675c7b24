"""The tokens of services that share a login: each service has a cycle of its own, and its errors are its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eoepca_security.errors import CredentialsRejected, TokenError, TokenInvalid
from eoepca_security.issuer.threads import in_thread
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.session.session import AccessToken, Purpose, RefreshSession, number, token_end
from eoepca_security.session.source import TokenSource
from eoepca_security.session.token_cycle import TokenCycle


@dataclass(frozen=True)
class Sources:
    """The token source of the login, and that of each service by its name."""

    login: TokenSource
    services: dict[str, TokenCycle]

    def is_own(self, error: TokenError, service: str) -> bool:
        """Return whether an error of this service's source is its own, and not the login's."""
        return self.services.get(service) is self.login or error is not self.login.error


def shared_tokens(login: TokenSource, **options: Any) -> TokenCycle:
    """Return a source of the login's own access tokens. `options` are those of TokenCycle."""
    return TokenCycle(login.newer, follows=login, **options)


def id_tokens(login: TokenSource, *, now: Callable[[], float] = time.time, **options: Any) -> TokenCycle:
    """Return a source of the login's ID tokens. Some services take these; the issuer sends them with `openid`."""

    async def renew(stale: str | None) -> AccessToken:
        token = await login.token()
        found = _id_token(token)
        if found is None or found.value == stale or found.expires_at <= now():
            token = await login.newer(token.value)
            found = _id_token(token)
        if found is None:
            raise TokenInvalid("the issuer sent no ID token with the access token", cause="no_id_token")
        return found

    return TokenCycle(renew, follows=login, now=now, **options)


def exchanged_tokens(
    login: TokenSource,
    exchange: Callable[[str], TokenResponse],
    *,
    now: Callable[[], float] = time.time,
    **options: Any,
) -> TokenCycle:
    """Return a source of tokens for which `exchange` trades the login's access token (RFC 8693); it may block."""

    async def trade(subject: AccessToken) -> AccessToken:
        sent_at = now()
        response = await in_thread(lambda: exchange(subject.value))
        received_at = now()
        return AccessToken(
            response.access_token, received_at, token_end(response, sent_at=sent_at, received_at=received_at)
        )

    async def renew(_stale: str | None) -> AccessToken:
        subject = await login.token()
        try:
            return await trade(subject)
        except CredentialsRejected as error:
            other = await login.replace(subject.value) if error.cause == "subject_token" else None
            if other is None:
                raise
        return await trade(other)

    return TokenCycle(renew, follows=login, now=now, **options)


def refreshed_tokens(login: TokenSource, purpose: Purpose, **options: Any) -> TokenCycle:
    """Return a source of tokens that the session's refresh token gets for one purpose, in turn with all others."""

    async def renew(stale: str | None) -> AccessToken:
        # Only once the session is known to live: each attempt with a dead one is a request in vain.
        if login.session.scope is None or isinstance(login.error, CredentialsRejected):
            await login.token()
        return await in_thread(lambda: login.session.renew(stale, purpose))

    return TokenCycle(renew, follows=login, after=login.tend, news=login.session.has_news, stale="", **options)


def client_tokens(
    request: Callable[[], TokenResponse], *, now: Callable[[], float] = time.time, **options: Any
) -> TokenCycle:
    """Return a source of tokens that `request` gets with the client's own credentials alone; it may block."""
    session = RefreshSession(lambda _: request(), None, now=now)
    return TokenCycle(lambda stale: in_thread(lambda: session.renew(stale)), now=now, **options)


def _id_token(token: AccessToken) -> AccessToken | None:
    if token.id_token is None:
        return None
    # An ID token must say when it ends (OpenID Connect Core §2).
    ends_at = number(unverified_claims(token.id_token).get("exp")) or token.ends_at
    return AccessToken(token.id_token, token.obtained_at, ends_at)
