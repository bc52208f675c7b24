"""TokenSource: the one place that decides when to get a new access token.

It knows no HTTP and no mitmproxy: how to ask the issuer is a function that it is given.
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
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.session.session import DEFAULT_LIFETIME, AccessToken, RefreshSession, Store, number

MAX_WAIT: Final = 13.0
"""Longest time that a caller waits for a token, in seconds; the public promise is 15."""

PATIENCE: Final = 1.0
"""A retry that is due within this many seconds is waited for; a later one is not, the caller gets the failure."""

FORCED_INTERVAL: Final = 120.0
"""Seconds between two refreshes that a refusal of the service causes: a service that refuses everybody must not make us
hammer the issuer."""

LAST_WAIT: Final = 8.0
"""Longest time that the end of the process waits for a refresh, in seconds."""

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
    """Anything that needs an access token asks here; one request to the issuer serves all who wait.

    `request_token` gets a token response for a refresh token, or for the client itself when there is none; it may
    block, and runs in a thread of its own. `store` keeps the session across restarts and shares it between processes.
    `check` is called with each new access token, in the thread too, and raises TokenError when it must not be used.
    `access_token` is used first, while it lives. `continues` is a source whose login this one goes on with, whatever
    token that has come to by now. One that `joins` begins with an access token that another process got; otherwise the
    issuer is asked at the start, which tells whether the login is still good. `now` is epoch seconds. `observe` is told
    of each refresh: what it failed for, if it did, and how many seconds it took. `describe` says in the log what an
    error is and what to do about it. One instance belongs to one loop.
    """

    def __init__(  # noqa: PLR0913  all but the first have a default
        self,
        request_token: Callable[[str | None], TokenResponse],
        *,
        refresh_token: str | None = None,
        access_token: str | None = None,
        store: Store | None = None,
        check: Callable[[str], object] | None = None,
        now: Callable[[], float] = time.time,
        continues: "TokenSource | None" = None,
        joins: bool = False,
        observe: Callable[[TokenError | None, float], None] | None = None,
        describe: Callable[[TokenError], str] = str,
    ) -> None:
        if continues is None:
            self._session = RefreshSession(request_token, refresh_token, store=store, now=now)
        else:
            self._session = continues._session
            self._session.continue_with(request_token, store)
        self._initial = access_token
        self._stale = "" if joins else None
        self._check = check or (lambda _token: None)
        self._now = now
        self._observe = observe or (lambda _failure, _seconds: None)
        self._describe = describe
        self._token: AccessToken | None = None
        self._refresh_at = 0.0
        self._refresh: asyncio.Task[TokenError | None] | None = None
        self._failure: TokenError | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._forced_at = -FORCED_INTERVAL
        self._keep_alive: asyncio.TimerHandle | None = None
        self._retired = False
        self._refresh_began = 0.0
        self._looking: asyncio.Future[bool] | None = None

    async def token(self) -> AccessToken:
        """Return an access token that is good to send now.

        Returns at once while there is one, fetching the next in the background when it is due. Otherwise waits for the
        refresh that is under way, together with all others; its failure is theirs too. Raises IssuerUnavailable,
        CredentialsRejected or TokenInvalid, after `MAX_WAIT` seconds at the latest.
        """
        now = self._now()
        token = self.at_hand
        if token is not None:
            if now >= self._refresh_at and self._retry_in(now) == 0:
                self._ensure_refresh(0)
            return token
        delay = self._retry_in(now)
        if self._refresh is None and self._failure is not None and delay > PATIENCE:
            # Somebody logged in meanwhile, so what was rejected is not what would be sent now.
            if not (isinstance(self._failure, CredentialsRejected) and await self._has_news()):
                raise self._failure.with_traceback(None)  # or it would collect the traceback of every request
            delay = 0
        refresh = self._ensure_refresh(delay)
        if not await self._wait_for(refresh):
            raise IssuerUnavailable("the issuer did not give a token in time; still waiting for it")
        failure = refresh.result()
        if failure is not None:
            raise failure.with_traceback(None)
        if self._token is None or self._now() >= self._token.expires_at:
            raise IssuerUnavailable("the token that the issuer gave has ended already")
        return self._token

    async def replace(self, refused: str) -> AccessToken | None:
        """Return another access token than the one that the service refused though it should be good.

        None when there is none to be had now: at most one refresh is made for this in `FORCED_INTERVAL` seconds. Raises
        as `token` does.
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
        """Wait a moment for a refresh that is under way, and save: its answer may hold the only valid refresh token."""
        if self._refresh is not None:
            await asyncio.wait({self._refresh}, timeout=LAST_WAIT)
        if self._session.is_unsaved:
            await asyncio.wait({asyncio.ensure_future(in_thread(self._session.save))}, timeout=_LAST_SAVE)

    def retire(self) -> None:
        """Keep the session alive no longer: another source does, or nobody needs it."""
        self._retired = True
        if self._keep_alive is not None:
            self._keep_alive.cancel()

    @property
    def at_hand(self) -> AccessToken | None:
        """The access token that is good to send now, if there is one; the issuer is not asked."""
        now, token = self._now(), self._token
        # A clock that was set back says nothing about how old the token is.
        is_good = token is not None and token.obtained_at <= now + 1 and now < token.expires_at
        return token if is_good else None

    @property
    def failure(self) -> TokenError | None:
        """What the last refresh failed for, if it did."""
        return self._failure

    @property
    def rotated(self) -> bool:
        """Whether the issuer has replaced the refresh token that this source began with."""
        return self._session.rotated

    def retry_after(self) -> float:
        """Return in how many seconds it is worth asking again after a failure, at least 1."""
        return max(1.0, self._retry_in(self._now()))

    def forced_in(self) -> float:
        """Return in how many seconds `replace` may ask the issuer; 0 when it may now, or a refresh is under way."""
        now = self._now()
        if self._refresh is not None:
            return 0.0
        since = now - self._forced_at
        return max(FORCED_INTERVAL - since if 0 <= since < FORCED_INTERVAL else 0.0, self._retry_in(now))

    def _retry_in(self, now: float) -> float:
        """Return the seconds until the issuer may be asked again; a clock that was set back does not add to them."""
        delay = self._retry_at - now
        return delay if 0 < delay <= _LONGEST_RETRY else 0.0

    async def _wait_for(self, refresh: "asyncio.Task[TokenError | None]") -> bool:
        """Wait until a refresh ends, `MAX_WAIT` seconds from its start; tell whether it did.

        The task is shielded: it belongs to all who wait, so one of them giving up must not end it. Who comes late has
        less to wait, so that a silent issuer does not cost every request the whole time.
        """
        left = self._refresh_began + MAX_WAIT - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait({refresh}, timeout=max(left, 0.0))
        return bool(done)

    async def _has_news(self) -> bool:
        """Ask the store, which may be on a file system that hangs, whether somebody has logged in."""
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
        """Get the next token; returns the failure rather than raising it, as nobody may be waiting."""
        started_at = self._now() + delay
        try:
            # With eager tasks this coroutine would run before the task is stored and cleared.
            await asyncio.sleep(delay)
            started_at = self._now()
            self._token = await self._next_token()
            self._refresh_at = refresh_time(self._token, latency=self._now() - started_at)
        except TokenError as error:
            self._note_failure(error)
            return error
        except Exception as error:  # noqa: BLE001  a waiting request must get an answer, whatever broke
            # Its message and its traceback's values may hold a token, so they are not shown.
            place = traceback.extract_tb(error.__traceback__)[-1]
            failure = IssuerUnavailable(
                f"unexpected {type(error).__name__} in {place.name}, line {place.lineno}, while getting a token"
            )
            self._note_failure(failure)
            return failure
        else:
            had_failed = self._failure is not None
            self._failure, self._failures, self._retry_at = None, 0, 0.0
            if had_failed:
                _log("there are access tokens again")
            return None
        finally:
            self._refresh = None
            self._keep_session_alive()
            self._save_later()
            self._observe(self._failure, self._now() - started_at)

    def _save_later(self) -> None:
        """Try again, and again, to save what could not be saved: the disk may have room by then."""
        if self._session.is_unsaved and not self._retired:
            asyncio.get_running_loop().call_later(_SAVE_INTERVAL, self._save)

    def _save(self) -> None:
        if self._refresh is None:
            saving = asyncio.ensure_future(in_thread(self._session.save))
            saving.add_done_callback(lambda _: self._save_later())

    def _keep_session_alive(self) -> None:
        """See to it that a session that ends when it is not used is used, even when nobody asks for a token."""
        if self._keep_alive is not None:
            self._keep_alive.cancel()
        now, ends_at = self._now(), self._session.ends_at
        if self._retired or ends_at is None or ends_at <= now or isinstance(self._failure, CredentialsRejected):
            return
        delay = 0.7 * (ends_at - now) if self._failure is None else self._retry_in(now)
        self._keep_alive = asyncio.get_running_loop().call_later(max(delay, _BRIEF), self._ensure_refresh, 0)

    async def _next_token(self) -> AccessToken:
        if self._initial is not None:
            now = self._now()
            # It was not issued just now, so only its own `exp` tells when it ends.
            ends_at = number(unverified_claims(self._initial).get("exp")) or now + DEFAULT_LIFETIME
            token = AccessToken(self._initial, now, ends_at)
            try:
                await self._verify(token)
            except TokenInvalid as error:
                self._initial = None
                _log(f"the initial access token is not used: {self._describe(error)}", error)
            else:
                self._initial = None
                await self._bounded(self._session.look)
                return token
        stale = self._token.value if self._token is not None else self._stale
        token = await self._bounded(lambda: self._session.renew(stale))
        # JWTs count whole seconds, so one that lives a second may be as good as over when it comes; the next is not.
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
            raise TokenInvalid("the token has expired already", cause="clock")
        await self._bounded(lambda: self._check(token.value))

    async def _bounded(self, function: Callable[[], T]) -> T:
        """Run a blocking function, giving up on it where even its own time limits fail (a name server that hangs)."""
        try:
            async with asyncio.timeout(_GIVE_UP):
                return await in_thread(function)
        except TimeoutError:
            raise IssuerUnavailable(f"the issuer did not answer within {_GIVE_UP:g} s") from None

    def _note_failure(self, error: TokenError) -> None:
        is_news = str(error) != str(self._failure)
        first = _FIRST_RETRY_REJECTED if isinstance(error, CredentialsRejected) else _FIRST_RETRY
        delay = min(first * 2**self._failures, _LAST_RETRY) * random.uniform(0.75, 1.25)  # noqa: S311  not a secret
        if isinstance(error, IssuerUnavailable) and error.retry_after is not None:
            delay = max(delay, min(error.retry_after, _LONGEST_RETRY))
        self._failure, self._failures, self._retry_at = error, min(self._failures + 1, 10), self._now() + delay
        if is_news:
            _log(f"no new access token ({error.code}): {self._describe(error)}", error)


def refresh_time(token: AccessToken, *, latency: float) -> float:
    """Return when to fetch the next token so that it is there before this one expires, in epoch seconds.

    That is near the end of a lifetime, so that one sees about one refresh; earlier by as long as the issuer takes
    (`latency`, in seconds), and by a little chance, so that processes with the same token do not ask together.
    """
    lifetime = token.ends_at - token.obtained_at
    ahead = token.ends_at - token.expires_at + 1.1 * latency + 0.03 * lifetime * random.random()  # noqa: S311
    return token.ends_at - max(min(ahead, 0.5 * lifetime), min(0.15 * lifetime, 60.0))


def _log(message: str, error: TokenError | None = None) -> None:
    # A handler that raises, as mitmproxy's does where the terminal's encoding lacks a letter, must not cost a token.
    with contextlib.suppress(Exception):
        logger.warning("%s", message, extra={"error": error})  # for handlers that tell errors apart
