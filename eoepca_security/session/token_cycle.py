"""TokenCycle decides when to get a new token.

It knows nothing of HTTP, of sessions or of mitmproxy: the caller passes in the function that gets a token.
"""

import asyncio
import contextlib
import logging
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.issuer.threads import in_thread
from eoepca_security.session.session import AccessToken

MAX_WAIT: Final = 13.0
"""The longest time that a caller waits for a token, in seconds. The documented limit is 15."""

PATIENCE: Final = 1.0
"""Callers wait for a retry that is due within this many seconds. Otherwise they get the last error."""

FORCED_INTERVAL: Final = 120.0
"""Seconds between two refreshes that the service's refusals cause, so that a service that refuses everyone does not
make us hammer the issuer."""

BRIEF: Final = 0.2
"""The shortest remaining lifetime with which a token is worth having, in seconds."""

_FIRST_RETRY: Final = 0.25
_FIRST_RETRY_REJECTED: Final = 0.5
_LAST_RETRY: Final = 30.0
_LONGEST_RETRY: Final = 300.0
_GIVE_UP: Final = 60.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


class TokenCycle:
    """Provides tokens of one kind. One request serves all waiting callers.

    `renew` returns a token newer than the one it is given, which is None if any will do. `check` is called in a thread
    with each new token, and raises TokenError when it must not be used. `after` is called after each attempt. `news`
    tells, in a thread, whether there is a reason to try again after a rejection. `follows` is the cycle whose tokens
    `renew` uses: its errors are not this one's to log or to wait for. `now` returns epoch seconds. `observe` is called
    after each attempt with its error or None, and its duration in seconds. `describe` returns the log text for an
    error, with its remedy. `service` names whose tokens these are in the log. An instance belongs to one event loop.
    """

    def __init__(  # noqa: PLR0913  all but the first have a default
        self,
        renew: Callable[[str | None], Awaitable[AccessToken]],
        *,
        check: Callable[[str], object] | None = None,
        after: Callable[[], None] = lambda: None,
        news: Callable[[], bool] = lambda: False,
        follows: "TokenCycle | None" = None,
        stale: str | None = None,
        now: Callable[[], float] = time.time,
        observe: Callable[[TokenError | None, float], None] | None = None,
        describe: Callable[[TokenError], str] = str,
        service: str | None = None,
    ) -> None:
        self._renew = renew
        self._check = check or (lambda _token: None)
        self._after = after
        self._news = news
        self._follows = follows
        self._stale = stale
        self._now = now
        self._observe = observe or (lambda _error, _seconds: None)
        self._describe = describe
        self._whose = f" for {service}" if service is not None else ""
        self._token: AccessToken | None = None
        self._refresh_at = 0.0
        self._refresh: asyncio.Task[TokenError | None] | None = None
        self._error: TokenError | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._forced_at = -FORCED_INTERVAL
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

    async def newer(self, stale: str | None) -> AccessToken:
        """Return an access token other than `stale`, which is about to expire. Raises the same errors as `token`."""
        token = await self.token()
        if token.value != stale:
            return token
        delay = self._retry_in(self._now())
        if self._refresh is None and self._error is not None and delay > PATIENCE:
            raise self._error.with_traceback(None)
        refresh = self._ensure_refresh(delay)
        if await self._wait_for(refresh) and (error := refresh.result()) is not None:
            raise error.with_traceback(None)
        return await self.token()

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
            self._looking = asyncio.ensure_future(in_thread(self._news))
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
            is_first = self._token is None
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
                log(f"access tokens{self._whose} are available" + ("" if is_first else " again"))
            return None
        finally:
            self._refresh = None
            self._after()
            self._observe(self._error, self._now() - started_at)

    async def _next_token(self) -> AccessToken:
        token = await bounded(self._renew(self._token.value if self._token is not None else self._stale))
        # JWTs count whole seconds, so a lifetime of one second may be almost over on arrival; the next token's is not.
        for _ in range(2):
            left = token.ends_at - self._now()
            if left >= BRIEF:
                break
            await asyncio.sleep(min(max(left, 0.0), BRIEF))
            token = await bounded(self._renew(token.value))
        await self._verify(token)
        return token

    async def _verify(self, token: AccessToken) -> None:
        if token.ends_at <= self._now():
            raise TokenInvalid("the token has already expired", cause="clock")
        await bounded(in_thread(lambda: self._check(token.value)))

    def _note_error(self, error: TokenError) -> None:
        if self._follows is not None and error is self._follows.error:
            self._error, self._failures, self._retry_at = error, 0, 0.0
            return
        is_news = str(error) != str(self._error)
        first = _FIRST_RETRY_REJECTED if isinstance(error, CredentialsRejected) else _FIRST_RETRY
        delay = min(first * 2**self._failures, _LAST_RETRY) * random.uniform(0.75, 1.25)  # noqa: S311  not a secret
        if isinstance(error, IssuerUnavailable) and error.retry_after is not None:
            delay = max(delay, min(error.retry_after, _LONGEST_RETRY))
        self._error, self._failures, self._retry_at = error, min(self._failures + 1, 10), self._now() + delay
        if is_news:
            log(f"no new access token{self._whose} ({error.code}): {self._describe(error)}", error)


def refresh_time(token: AccessToken, *, latency: float) -> float:
    """Return when to fetch the next token, in epoch seconds, so that it arrives before this one expires.

    That is near the end of the lifetime, earlier by the time that the issuer takes (`latency`, in seconds) and by a
    small random time, so that processes with the same token do not all ask at once.
    """
    lifetime = token.ends_at - token.obtained_at
    ahead = token.ends_at - token.expires_at + 1.1 * latency + 0.03 * lifetime * random.random()  # noqa: S311
    return token.ends_at - max(min(ahead, 0.5 * lifetime), min(0.15 * lifetime, 60.0))


async def bounded(waiting: Awaitable[T]) -> T:
    """Wait with a limit, in case the timeouts of what we wait for fail (e.g. when a name server hangs)."""
    try:
        async with asyncio.timeout(_GIVE_UP):
            return await waiting
    except TimeoutError:
        raise IssuerUnavailable(f"the issuer did not answer within {_GIVE_UP:g} s") from None


def log(message: str, error: TokenError | None = None) -> None:
    """Log a warning. A handler that raises must not cost a token: mitmproxy's does for characters it cannot encode."""
    with contextlib.suppress(Exception):
        logger.warning("%s", message, extra={"error": error})  # for handlers that distinguish errors
