"""TokenSource provides the access tokens of one session, which it keeps alive and saves.

It knows nothing of HTTP or mitmproxy: the caller passes in the function that asks the issuer.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from eoepca_security.errors import CredentialsRejected, TokenError, TokenInvalid
from eoepca_security.issuer.threads import in_thread
from eoepca_security.oauth.protocol import MAX_LIFETIME, TokenResponse
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.session.session import DEFAULT_LIFETIME, AccessToken, RefreshSession, Store, number
from eoepca_security.session.token_cycle import BRIEF, TokenCycle, bounded, log

LAST_WAIT: Final = 8.0
"""The longest time that the exit of the process waits for a refresh, in seconds."""

_LAST_SAVE: Final = 1.0
_SAVE_INTERVAL: Final = 2.0


class TokenSource(TokenCycle):
    """Provides access tokens. One request to the issuer serves all waiting callers.

    `request_token` returns a token response for a refresh token, or for the client itself when called with None; it may
    block, and runs in a thread. `store` keeps the session across restarts and shares it between processes. `logins` is
    where a login is stored that takes over when the issuer rejects `refresh_token`. `check` is called in a thread with
    each new access token, and raises TokenError when it must not be used. `access_token` is used first, until it
    expires. `continues` is a source whose session this one takes over. With `joins`, the source starts with an access
    token that another process stored; otherwise it asks the issuer first, which shows whether the login is still valid.
    `now` returns epoch seconds. `observe` is called after each refresh with its error or None, and its duration in
    seconds. `describe` returns the log text for an error, with its remedy. An instance belongs to one event loop.
    """

    def __init__(  # noqa: PLR0913  all but the first have a default
        self,
        request_token: Callable[[str | None], TokenResponse],
        *,
        refresh_token: str | None = None,
        access_token: str | None = None,
        store: Store | None = None,
        logins: Store | None = None,
        check: Callable[[str], object] | None = None,
        now: Callable[[], float] = time.time,
        continues: "TokenSource | None" = None,
        joins: bool = False,
        observe: Callable[[TokenError | None, float], None] | None = None,
        describe: Callable[[TokenError], str] = str,
    ) -> None:
        self.session: RefreshSession
        if continues is None:
            self.session = RefreshSession(request_token, refresh_token, store=store, logins=logins, now=now)
        else:
            self.session = continues.session
            self.session.continue_with(request_token, store, logins)
        super().__init__(
            lambda stale: in_thread(lambda: self.session.renew(stale)),
            check=check,
            after=self.tend,
            news=self.session.has_news,
            stale="" if joins else None,
            now=now,
            observe=observe,
            describe=describe,
        )
        self._initial = access_token
        self._keep_alive: asyncio.TimerHandle | None = None
        self._retired = False

    async def finish(self) -> None:
        """Wait briefly for a running refresh and save the session: it may get the only valid refresh token.

        This includes refreshes for services that share the session.
        """
        running: set[asyncio.Future[Any]] = {asyncio.ensure_future(in_thread(self.session.wait))}
        if self._refresh is not None:
            running.add(self._refresh)
        await asyncio.wait(running, timeout=LAST_WAIT)
        if self.session.is_unsaved:
            await asyncio.wait({asyncio.ensure_future(in_thread(self.session.save))}, timeout=_LAST_SAVE)

    def tend(self) -> None:
        """Keep the session alive and save it, after it has changed."""
        self._keep_session_alive()
        self._save_later()

    def retire(self) -> None:
        """Stop keeping the session alive: another source does, or it is no longer needed."""
        self._retired = True
        if self._keep_alive is not None:
            self._keep_alive.cancel()

    @property
    def session_ends_at(self) -> float | None:
        """When the session ends unless it is renewed, in epoch seconds; None if the issuer did not say."""
        return self.session.ends_at

    @property
    def rotated(self) -> bool:
        """Whether the issuer has replaced the refresh token that this source started with."""
        return self.session.rotated

    def _save_later(self) -> None:
        """Retry until an unsaved session is saved: the disk may have space by then."""
        if self.session.is_unsaved and not self._retired:
            asyncio.get_running_loop().call_later(_SAVE_INTERVAL, self._save)

    def _save(self) -> None:
        if self._refresh is None:
            saving = asyncio.ensure_future(in_thread(self.session.save))
            saving.add_done_callback(lambda _: self._save_later())

    def _keep_session_alive(self) -> None:
        """Schedule a refresh before the session ends, even when nobody asks for a token."""
        if self._keep_alive is not None:
            self._keep_alive.cancel()
        now, ends_at = self._now(), self.session.ends_at
        if self._retired or ends_at is None or ends_at <= now or isinstance(self._error, CredentialsRejected):
            return
        delay = 0.7 * (ends_at - now) if self._error is None else self._retry_in(now)
        self._keep_alive = asyncio.get_running_loop().call_later(max(delay, BRIEF), self._ensure_refresh, 0)

    async def _next_token(self) -> AccessToken:
        if self._initial is not None:
            now = self._now()
            # It was not issued just now, so only its own `exp` says when it ends.
            ends_at = number(unverified_claims(self._initial).get("exp")) or now + DEFAULT_LIFETIME
            token = AccessToken(self._initial, now, min(ends_at, now + MAX_LIFETIME))
            try:
                await self._verify(token)
            except TokenInvalid as error:
                self._initial = None
                log(f"the initial access token cannot be used: {self._describe(error)}", error)
            else:
                self._initial = None
                await bounded(in_thread(self.session.look))
                return token
        return await super()._next_token()
