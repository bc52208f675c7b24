"""TokenSource: the one place that decides when to get a new access token.

It knows no HTTP and no mitmproxy: how to ask the issuer is a function that it is given.
"""

import asyncio
import contextlib
import logging
import random
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar, cast

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.protocol import TokenResponse
from eoepca_security.verify import unverified_claims

DEFAULT_LIFETIME: Final = 60.0
"""Seconds that a token is taken to live when neither the issuer nor the token says: short is safe, and costs little."""

MAX_WAIT: Final = 13.0
"""Longest time that a caller waits for a token, in seconds; the public promise is 15."""

PATIENCE: Final = 1.0
"""A retry that is due within this many seconds is waited for; a later one is not, the caller gets the failure."""

_FIRST_RETRY: Final = 0.25
_FIRST_RETRY_REJECTED: Final = 0.5
_LAST_RETRY: Final = 30.0
_GIVE_UP: Final = 30.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccessToken:
    """An access token and its times, in epoch seconds of this machine's clock."""

    value: str = field(repr=False)
    obtained_at: float
    ends_at: float

    @property
    def expires_at(self) -> float:
        """When it must not be sent any more: a little before its end, because sending takes time too."""
        return self.ends_at - min(0.1 * (self.ends_at - self.obtained_at), 5.0)

    @property
    def refresh_at(self) -> float:
        """When the next one is fetched: a fifth of the lifetime before its end, a minute for long ones."""
        return self.ends_at - min(0.2 * (self.ends_at - self.obtained_at), 60.0)


def token_end(response: TokenResponse, *, sent_at: float, received_at: float) -> float:
    """Return when the token in `response` ends, in epoch seconds of our clock, rather too early than too late.

    `expires_in` counts from some moment between sending and receiving. A JWT's `exp` is on the issuer's clock, which is
    taken to agree with ours if its `iat` lies between the two; else only the difference of the two claims is used.
    """
    claims = unverified_claims(response.access_token)
    exp, issued_at = _number(claims.get("exp")), _number(claims.get("iat"))
    if exp is None:
        return sent_at + (response.expires_in or DEFAULT_LIFETIME)
    if issued_at is not None and not sent_at - 1.25 <= issued_at <= received_at + 0.25:
        # `iat` has lost its fraction of a second, so up to one second of the lifetime may be gone.
        exp = sent_at + exp - issued_at - 1
    return min(exp, received_at + response.expires_in) if response.expires_in else exp


class TokenSource:
    """Anything that needs an access token asks here; one request to the issuer serves all who wait.

    `request_token` gets a token response for a refresh token, or for the client itself when there is none; it may
    block, and runs in a thread of its own. `check` is called with each new access token, there too, and raises
    TokenError when it must not be used. `access_token` is used first, while it lives. `now` is epoch seconds. One
    instance belongs to one event loop.
    """

    def __init__(
        self,
        request_token: Callable[[str | None], TokenResponse],
        *,
        refresh_token: str | None = None,
        access_token: str | None = None,
        check: Callable[[str], object] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._request_token = request_token
        self._refresh_token = refresh_token
        self._initial = access_token
        self._check = check or (lambda _token: None)
        self._now = now
        self._token: AccessToken | None = None
        self._refresh: asyncio.Task[TokenError | None] | None = None
        self._failure: TokenError | None = None
        self._failures = 0
        self._retry_at = 0.0
        self.rotated = False
        """Whether the issuer has replaced the refresh token that this source began with."""

    async def token(self) -> AccessToken:
        """Return an access token that is good to send now.

        Returns at once while there is one, fetching the next in the background when it is due. Otherwise waits for the
        refresh that is under way, together with all others; its failure is theirs too. Raises IssuerUnavailable,
        CredentialsRejected or TokenInvalid, after `MAX_WAIT` seconds at the latest.
        """
        now = self._now()
        token = self._token
        # A clock that was set back says nothing about how old the token is.
        if token is not None and token.obtained_at <= now + 1 and now < token.expires_at:
            if now >= token.refresh_at and now >= self._retry_at:
                self._ensure_refresh(0)
            return token
        delay = self._retry_at - now
        if self._refresh is None and self._failure is not None and delay > PATIENCE:
            raise self._failure
        refresh = self._ensure_refresh(max(0.0, delay))
        # The task is shielded: it belongs to all who wait, so one of them giving up must not end it.
        done, _ = await asyncio.wait({refresh}, timeout=MAX_WAIT)
        if not done:
            raise IssuerUnavailable("the issuer did not give a token in time; still waiting for it")
        failure = refresh.result()
        if failure is not None:
            raise failure
        if self._token is None:
            raise IssuerUnavailable("there is no token")
        return self._token

    def retry_after(self) -> float:
        """Return in how many seconds it is worth asking again after a failure, at least 1."""
        return max(1.0, self._retry_at - self._now())

    def _ensure_refresh(self, delay: float) -> "asyncio.Task[TokenError | None]":
        if self._refresh is None:
            self._refresh = asyncio.get_running_loop().create_task(self._run_refresh(delay))
        return self._refresh

    async def _run_refresh(self, delay: float) -> TokenError | None:
        """Get the next token; returns the failure rather than raising it, as nobody may be waiting."""
        try:
            # With eager tasks this coroutine would run before the task is stored and cleared.
            await asyncio.sleep(delay)
            self._token = await self._next_token()
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
            if self._failure is not None:
                logger.info("the issuer gives tokens again")
            self._failure, self._failures, self._retry_at = None, 0, 0.0
            return None
        finally:
            self._refresh = None

    async def _next_token(self) -> AccessToken:
        if self._initial is not None:
            try:
                # It was not issued just now, so only its own `exp` tells when it ends.
                ends_at = _number(unverified_claims(self._initial).get("exp"))
                token = await self._accept(self._initial, ends_at or self._now() + DEFAULT_LIFETIME)
            except TokenInvalid as error:
                logger.warning("the initial access token is not used: %s", error)
                self._initial = None
            else:
                self._initial = None
                return token
        sent_at = self._now()
        response = await self._bounded(lambda: self._request_token(self._refresh_token))
        # First of all: from here on the issuer may accept only the new one (RFC 9700 §4.14.2).
        if response.refresh_token is not None and response.refresh_token != self._refresh_token:
            self._refresh_token = response.refresh_token
            self.rotated = True
        return await self._accept(response.access_token, token_end(response, sent_at=sent_at, received_at=self._now()))

    async def _accept(self, value: str, ends_at: float) -> AccessToken:
        token = AccessToken(value, obtained_at=self._now(), ends_at=ends_at)
        if ends_at <= token.obtained_at:
            raise TokenInvalid("the token has expired already: compare this machine's clock with the issuer's")
        await self._bounded(lambda: self._check(value))
        return token

    async def _bounded(self, function: Callable[[], T]) -> T:
        """Run a blocking function, giving up on it where even its own time limits fail (a name server that hangs)."""
        try:
            async with asyncio.timeout(_GIVE_UP):
                return await in_thread(function)
        except TimeoutError:
            raise IssuerUnavailable(f"the issuer did not answer within {_GIVE_UP:g} s") from None

    def _note_failure(self, error: TokenError) -> None:
        if str(error) != str(self._failure):
            logger.warning("no new access token (%s): %s", error.code, error)
        first = _FIRST_RETRY_REJECTED if isinstance(error, CredentialsRejected) else _FIRST_RETRY
        delay = min(first * 2**self._failures, _LAST_RETRY) * random.uniform(0.75, 1.25)  # noqa: S311  not a secret
        if isinstance(error, IssuerUnavailable) and error.retry_after is not None:
            delay = max(delay, min(error.retry_after, _LAST_RETRY))
        self._failure, self._failures, self._retry_at = error, min(self._failures + 1, 10), self._now() + delay


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a daemon thread of its own and return its result.

    Unlike `asyncio.to_thread`, neither a full pool delays it nor does it delay the end of the process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("T", result))

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:  # noqa: BLE001  it is raised where the result is awaited
            error = caught
        # The loop may be gone by now, and nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="token-request", daemon=True).start()
    return await future


def _number(value: object) -> float | None:
    return (
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 else None
    )
