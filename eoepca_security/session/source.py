"""TokenSource decides when to get a new access token.

It knows nothing of HTTP or mitmproxy: the caller passes in the function that asks the issuer.
"""

import asyncio
import contextlib
import logging
import random
import time
import traceback
from collections.abc import Callable
from typing import Final, TypeVar

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.issuer.threads import in_thread
from eoepca_security.oauth.protocol import MAX_LIFETIME, TokenResponse
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.session.session import DEFAULT_LIFETIME, AccessToken, RefreshSession, Store, number

MAX_WAIT: Final = 13.0
"""The longest time that a caller waits for a token, in seconds. The documented limit is 15."""

PATIENCE: Final = 1.0
"""Callers wait for a retry that is due within this many seconds. Otherwise they get the last error."""

FORCED_INTERVAL: Final = 120.0
"""Seconds between two refreshes that the service's refusals cause, so that a service that refuses everyone does not
make us hammer the issuer."""

LAST_WAIT: Final = 8.0
"""The longest time that the exit of the process waits for a refresh, in seconds."""

_FIRST_RETRY: Final = 0.25
_FIRST_RETRY_REJECTED: Final = 0.5
_LAST_RETRY: Final = 30.0
_LONGEST_RETRY: Final = 300.0
_GIVE_UP: Final = 60.0
_BRIEF: Final = 0.2
_LAST_SAVE: Final = 1.0
_SAVE_INTERVAL: Final = 2.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


class TokenSource:
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
        if continues is None:
            self._session = RefreshSession(request_token, refresh_token, store=store, logins=logins, now=now)
        else:
            self._session = continues._session
            self._session.continue_with(request_token, store, logins)
        self._initial = access_token
        self._stale = "" if joins else None
        self._check = check or (lambda _token: None)
        self._now = now
        self._observe = observe or (lambda _error, _seconds: None)
        self._describe = describe
        self._token: AccessToken | None = None
        self._refresh_at = 0.0
        self._refresh: asyncio.Task[TokenError | None] | None = None
        self._error: TokenError | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._forced_at = -FORCED_INTERVAL
        self._keep_alive: asyncio.TimerHandle | None = None
        self._retired = False
        self._refresh_began = 0.0
        self._looking: asyncio.Future[bool] | None = None

    async def token(self) -> AccessToken:
        """Return an access token that is valid now.

        If it has one, it returns at once and fetches the next one in the background when that is due. Otherwise all
        callers wait for the same refresh and share its error. Raises IssuerUnavailable, CredentialsRejected or
        TokenInvalid, after `MAX_WAIT` seconds at the latest.
        """
        now = self._now()
        token = self.at_hand
        if token is not None:
            if now >= self._refresh_at and self._retry_in(now) == 0:
                self._ensure_refresh(0)
            return token
        delay = self._retry_in(now)
        if self._refresh is None and self._error is not None and delay > PATIENCE:
            # After a new login, we would not send the rejected token again.
            if not (isinstance(self._error, CredentialsRejected) and await self._has_news()):
                raise self._error.with_traceback(None)  # otherwise it collects the traceback of every request
            delay = 0
        refresh = self._ensure_refresh(delay)
        if not await self._wait_for(refresh):
            raise IssuerUnavailable("the issuer has not sent a token in time; still waiting for it")
        error = refresh.result()
        if error is not None:
            raise error.with_traceback(None)
        if self._token is None or self._now() >= self._token.expires_at:
            raise IssuerUnavailable("the token that the issuer sent has already expired")
        return self._token

    async def replace(self, refused: str) -> AccessToken | None:
        """Return another access token, after the service refused a valid one.

        Returns None when none is available now: this refreshes at most once in `FORCED_INTERVAL` seconds. Raises the
        same errors as `token`.
        """
        now = self._now()
        if self._token is None or self._token.value == refused:
            if self._refresh is None:
                if self.forced_in() > 0:
                    return None
                self._forced_at = now
            await self._wait_for(self._ensure_refresh(0))
        token = await self.token()
        return token if token.value != refused else None

    async def finish(self) -> None:
        """Wait briefly for a running refresh and save the session: it may get the only valid refresh token."""
        if self._refresh is not None:
            await asyncio.wait({self._refresh}, timeout=LAST_WAIT)
        if self._session.is_unsaved:
            await asyncio.wait({asyncio.ensure_future(in_thread(self._session.save))}, timeout=_LAST_SAVE)

    def retire(self) -> None:
        """Stop keeping the session alive: another source does, or it is no longer needed."""
        self._retired = True
        if self._keep_alive is not None:
            self._keep_alive.cancel()

    @property
    def at_hand(self) -> AccessToken | None:
        """The access token that is valid now, or None; never asks the issuer."""
        now, token = self._now(), self._token
        # If the clock was set back, we cannot tell how old the token is.
        is_valid = token is not None and token.obtained_at <= now + 1 and now < token.expires_at
        return token if is_valid else None

    @property
    def error(self) -> TokenError | None:
        """The error of the last refresh, or None if it succeeded."""
        return self._error

    @property
    def session_ends_at(self) -> float | None:
        """When the session ends unless it is renewed, in epoch seconds; None if the issuer did not say."""
        return self._session.ends_at

    @property
    def rotated(self) -> bool:
        """Whether the issuer has replaced the refresh token that this source started with."""
        return self._session.rotated

    def retry_after(self) -> float:
        """Return the seconds until a retry makes sense, at least 1."""
        return max(1.0, self._retry_in(self._now()))

    def forced_in(self) -> float:
        """Return the seconds until `replace` may ask the issuer; 0 when it may now, or a refresh is running."""
        now = self._now()
        if self._refresh is not None:
            return 0.0
        since = now - self._forced_at
        return max(FORCED_INTERVAL - since if 0 <= since < FORCED_INTERVAL else 0.0, self._retry_in(now))

    def _retry_in(self, now: float) -> float:
        """Return the seconds until we may ask the issuer again. Setting the clock back does not add to them."""
        delay = self._retry_at - now
        return delay if 0 < delay <= _LONGEST_RETRY else 0.0

    async def _wait_for(self, refresh: "asyncio.Task[TokenError | None]") -> bool:
        """Wait for a refresh until `MAX_WAIT` seconds after its start; return whether it has finished.

        All callers share the task, so cancelling one caller must not cancel it. The limit counts from the start of the
        refresh, so that a silent issuer does not cost every request the full time.
        """
        left = self._refresh_began + MAX_WAIT - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait({refresh}, timeout=max(left, 0.0))
        return bool(done)

    async def _has_news(self) -> bool:
        """Return whether the store has a new login. The store may be on a file system that hangs."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(in_thread(self._session.has_news))
        done, _ = await asyncio.wait({self._looking}, timeout=PATIENCE)
        return bool(done) and self._looking.exception() is None and self._looking.result()

    def _ensure_refresh(self, delay: float) -> "asyncio.Task[TokenError | None]":
        if self._refresh is None:
            loop = asyncio.get_running_loop()
            self._refresh_began = loop.time()
            self._refresh = loop.create_task(self._run_refresh(delay))
        return self._refresh

    async def _run_refresh(self, delay: float) -> TokenError | None:
        """Get the next token. Returns the error instead of raising it, because nobody may be waiting."""
        started_at = self._now() + delay
        try:
            # With eager tasks, this coroutine would otherwise run before `_refresh` is set.
            await asyncio.sleep(delay)
            started_at = self._now()
            self._token = await self._next_token()
            self._refresh_at = refresh_time(self._token, latency=self._now() - started_at)
        except TokenError as error:
            self._note_error(error)
            return error
        except Exception as error:  # noqa: BLE001  waiting requests must get an answer in any case
            # The message and the traceback may contain a token, so leave them out.
            place = traceback.extract_tb(error.__traceback__)[-1]
            unexpected = IssuerUnavailable(
                f"unexpected {type(error).__name__} in {place.name}, line {place.lineno}, while getting a token"
            )
            self._note_error(unexpected)
            return unexpected
        else:
            had_failed = self._error is not None
            self._error, self._failures, self._retry_at = None, 0, 0.0
            if had_failed:
                _log("access tokens are available again")
            return None
        finally:
            self._refresh = None
            self._keep_session_alive()
            self._save_later()
            self._observe(self._error, self._now() - started_at)

    def _save_later(self) -> None:
        """Retry until an unsaved session is saved: the disk may have space by then."""
        if self._session.is_unsaved and not self._retired:
            asyncio.get_running_loop().call_later(_SAVE_INTERVAL, self._save)

    def _save(self) -> None:
        if self._refresh is None:
            saving = asyncio.ensure_future(in_thread(self._session.save))
            saving.add_done_callback(lambda _: self._save_later())

    def _keep_session_alive(self) -> None:
        """Schedule a refresh before the session ends, even when nobody asks for a token."""
        if self._keep_alive is not None:
            self._keep_alive.cancel()
        now, ends_at = self._now(), self._session.ends_at
        if self._retired or ends_at is None or ends_at <= now or isinstance(self._error, CredentialsRejected):
            return
        delay = 0.7 * (ends_at - now) if self._error is None else self._retry_in(now)
        self._keep_alive = asyncio.get_running_loop().call_later(max(delay, _BRIEF), self._ensure_refresh, 0)

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
                _log(f"the initial access token cannot be used: {self._describe(error)}", error)
            else:
                self._initial = None
                await self._bounded(self._session.look)
                return token
        stale = self._token.value if self._token is not None else self._stale
        token = await self._bounded(lambda: self._session.renew(stale))
        # JWTs count whole seconds, so a lifetime of one second may be almost over on arrival; the next token's is not.
        for _ in range(2):
            left = token.ends_at - self._now()
            if left >= _BRIEF:
                break
            await asyncio.sleep(min(max(left, 0.0), _BRIEF))
            token = await self._bounded(lambda: self._session.renew(token.value))  # noqa: B023  awaited at once
        await self._verify(token)
        return token

    async def _verify(self, token: AccessToken) -> None:
        if token.ends_at <= self._now():
            raise TokenInvalid("the token has already expired", cause="clock")
        await self._bounded(lambda: self._check(token.value))

    async def _bounded(self, function: Callable[[], T]) -> T:
        """Run a blocking function with a limit, in case its own timeouts fail (e.g. when a name server hangs)."""
        try:
            async with asyncio.timeout(_GIVE_UP):
                return await in_thread(function)
        except TimeoutError:
            raise IssuerUnavailable(f"the issuer did not answer within {_GIVE_UP:g} s") from None

    def _note_error(self, error: TokenError) -> None:
        is_news = str(error) != str(self._error)
        first = _FIRST_RETRY_REJECTED if isinstance(error, CredentialsRejected) else _FIRST_RETRY
        delay = min(first * 2**self._failures, _LAST_RETRY) * random.uniform(0.75, 1.25)  # noqa: S311  not a secret
        if isinstance(error, IssuerUnavailable) and error.retry_after is not None:
            delay = max(delay, min(error.retry_after, _LONGEST_RETRY))
        self._error, self._failures, self._retry_at = error, min(self._failures + 1, 10), self._now() + delay
        if is_news:
            _log(f"no new access token ({error.code}): {self._describe(error)}", error)


def refresh_time(token: AccessToken, *, latency: float) -> float:
    """Return when to fetch the next token, in epoch seconds, so that it arrives before this one expires.

    That is near the end of the lifetime, earlier by the time that the issuer takes (`latency`, in seconds) and by a
    small random time, so that processes with the same token do not all ask at once.
    """
    lifetime = token.ends_at - token.obtained_at
    ahead = token.ends_at - token.expires_at + 1.1 * latency + 0.03 * lifetime * random.random()  # noqa: S311
    return token.ends_at - max(min(ahead, 0.5 * lifetime), min(0.15 * lifetime, 60.0))


def _log(message: str, error: TokenError | None = None) -> None:
    # A log handler that raises must not cost a token. mitmproxy's raises when the terminal cannot encode a character.
    with contextlib.suppress(Exception):
        logger.warning("%s", message, extra={"error": error})  # for handlers that distinguish errors
