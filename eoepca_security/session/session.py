"""RefreshSession: one login, kept alive by whoever uses it: this process, others that share its store, the next start.

Refresh tokens are often valid once (RFC 9700 §4.14.2), so there is one rule: under the store's lock, take the newest
one, use it, and have its successor on the disk before anything else happens.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, StoreError, TokenInvalid
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.oauth.verify import unverified_claims

DEFAULT_LIFETIME: Final = 60.0
"""Seconds that a token is taken to live when neither the issuer nor the token says: short is safe, and costs little."""

MAX_CLOCK_OFFSET: Final = 600.0
"""Seconds that the issuer's clock may be behind ours before its tokens count as old ones."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccessToken:
    """An access token and its times, in epoch seconds of this machine's clock."""

    value: str = field(repr=False)
    obtained_at: float
    ends_at: float
    id_token: str | None = field(default=None, repr=False)
    """The ID token that came with it, if one did."""

    @property
    def expires_at(self) -> float:
        """When it must not be sent any more: a little before its end, because sending takes time too."""
        return self.ends_at - min(0.1 * (self.ends_at - self.obtained_at), 5.0)


@dataclass(frozen=True)
class Stored:
    """What is kept of a session; times are in epoch seconds.

    `access_token` is None when the newest refresh token came without a usable one. `session_ends_at` is when the
    refresh token ends unless it is used before, or None when the issuer did not say.
    """

    refresh_token: str = field(repr=False)
    access_token: str | None = field(default=None, repr=False)
    obtained_at: float = 0.0
    ends_at: float = 0.0
    session_ends_at: float | None = None
    id_token: str | None = field(default=None, repr=False)


class Store(Protocol):
    """Where a session is kept; `file_store.TokenStore` is one, on disk. All may raise StoreError."""

    @property
    def place(self) -> object:
        """What is the same for two stores of one session."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold the session for this process alone."""

    def read(self) -> Stored | None:
        """Return what is kept, or None."""

    def write(self, session: Stored) -> None:
        """Keep the session, for good when this returns."""

    def changed_at(self) -> int:
        """Return what is another number after each change; 0 when nothing is kept."""


def token_end(response: TokenResponse, *, sent_at: float, received_at: float) -> float:
    """Return when the token in `response` ends, in epoch seconds of our clock, rather too early than too late.

    `expires_in` counts from some moment between sending and receiving. A JWT's `exp` is on the issuer's clock, which is
    taken to agree with ours if its `iat` lies between the two; else only the difference of the two claims is used.
    """
    claims = unverified_claims(response.access_token)
    exp, issued_at = number(claims.get("exp")), number(claims.get("iat"))
    if exp is None:
        lifetime = response.expires_in or DEFAULT_LIFETIME
        # Slow issuers take their time before they issue rather than after, but that is not certain.
        return received_at + lifetime - min(received_at - sent_at, 0.1 * lifetime)
    is_off = issued_at is not None and not sent_at - 1.25 <= issued_at <= received_at + 0.25
    # Minutes ago, it was issued before, and kept for those who ask: clocks are not off by that much.
    if is_off and issued_at is not None and issued_at > sent_at - MAX_CLOCK_OFFSET:
        # `iat` has lost its fraction of a second, so up to one second of the lifetime may be gone.
        exp = sent_at + exp - issued_at - 1
    return min(exp, received_at + response.expires_in) if response.expires_in else exp


class RefreshSession:
    """One login at the issuer.

    `request_token` gets a token response for a refresh token, or for the client itself when it is given None; it may
    block. `store` shares the session with other processes and later ones. `now` is epoch seconds.
    """

    def __init__(
        self,
        request_token: Callable[[str | None], TokenResponse],
        refresh_token: str | None,
        *,
        store: Store | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._request_token = request_token
        self._refresh_token = refresh_token
        self._store = store
        self._now = now
        self._mutex = threading.Lock()
        self._answer_was_lost = False
        self._seen_at = 0
        self._is_ahead = False
        self._unsaved: Stored | None = None
        self._told: set[str] = set()
        self.rotated = False
        """Whether the issuer has replaced the refresh token that this session began with."""
        self.ends_at: float | None = None
        """When the session itself ends unless it is renewed, in epoch seconds; None when the issuer does not say."""

    def renew(self, stale: str | None) -> AccessToken:
        """Return an access token newer than `stale`; blocks.

        Another process may have got it already; then it is that one, and the issuer is not asked. Without `stale` the
        issuer is asked in any case. Raises IssuerUnavailable, CredentialsRejected or TokenInvalid.
        """
        with self._mutex, contextlib.ExitStack() as held:
            store = self._store
            if store is None:
                return self._request()
            trouble = None
            try:
                held.enter_context(store.locked())
            except StoreError as error:
                trouble = error  # but the newest token that is there is still the one to use
            try:
                stored = store.read()
            except StoreError as error:
                self._warn(trouble or error)
                # What could not be read is not overwritten either.
                return self._request_in_memory(store)
            if trouble is not None:
                self._warn(trouble)
            changed_at = store.changed_at()
            # What could not be saved is newer than what is there, unless somebody else has written since.
            if stored is not None and not (self._is_ahead and changed_at == self._seen_at):
                self._refresh_token, self.ends_at = stored.refresh_token, stored.session_ends_at
                self._seen_at, self._is_ahead, self._unsaved = changed_at, False, None
                if stale is not None and stored.access_token not in (None, stale) and self._is_young(stored):
                    return AccessToken(stored.access_token, stored.obtained_at, stored.ends_at, stored.id_token)
            return self._request_and_save(store)

    def continue_with(self, request_token: Callable[[str | None], TokenResponse], store: Store | None) -> None:
        """Ask in another way from now on, and keep the session elsewhere, without losing what memory alone has."""
        if (store and store.place) != (self._store and self._store.place):
            self._seen_at, self._is_ahead = store.changed_at() if store is not None else 0, True
        self._request_token, self._store = request_token, store

    def has_news(self) -> bool:
        """Tell whether another process has written the session since this one last looked, e.g. a new login."""
        return self._store is not None and self._store.changed_at() not in (0, self._seen_at)

    def look(self) -> None:
        """Learn from the store what is known of the session, without asking the issuer; blocks."""
        with contextlib.suppress(StoreError):
            stored = self._store.read() if self._store is not None else None
            if stored is not None:
                self.ends_at = stored.session_ends_at

    @property
    def is_unsaved(self) -> bool:
        """Whether memory alone has the newest refresh token, though there is a store."""
        return self._unsaved is not None

    def save(self) -> None:
        """Try again to save what could not be saved, unless somebody else has written since; blocks."""
        with self._mutex, contextlib.suppress(StoreError, IssuerUnavailable):
            store, unsaved = self._store, self._unsaved
            if store is not None and unsaved is not None:
                with store.locked():
                    if store.changed_at() == self._seen_at:
                        self._save(store, unsaved)

    def _request_in_memory(self, store: Store) -> AccessToken:
        before = self._refresh_token
        try:
            return self._request()
        finally:
            if self._refresh_token != before:
                self._seen_at, self._is_ahead = store.changed_at(), True

    def _request_and_save(self, store: Store) -> AccessToken:
        before, token = self._refresh_token, None
        try:
            token = self._request()
            return token
        finally:
            # However bad the answer was: the refresh token before it may be used up.
            if self._refresh_token is not None and (token is not None or self._refresh_token != before):
                self._save(store, _stored(self._refresh_token, token, self.ends_at))

    def _request(self) -> AccessToken:
        sent_at = self._now()
        try:
            response = self._request_token(self._refresh_token)
        except TokenInvalid as error:
            self._adopt(error.refresh_token)
            raise
        except CredentialsRejected as error:
            if self._answer_was_lost:
                raise CredentialsRejected(
                    f"{error}. The answer to the refresh before was lost, and the new refresh token probably with it",
                    cause=error.cause,
                    issuer_error=error.issuer_error,
                    description=error.description,
                ) from None
            raise
        except IssuerUnavailable as error:
            # Asking again with the same token is right either way: if the issuer has not used it up, it works, as it
            # does within a grace time; if it has, the session is lost already.
            self._answer_was_lost = self._answer_was_lost or error.was_sent
            raise
        received_at = self._now()
        self._answer_was_lost = False
        self._adopt(response.refresh_token)
        lifetime = response.refresh_expires_in
        self.ends_at = received_at + lifetime if lifetime is not None else None
        ends_at = token_end(response, sent_at=sent_at, received_at=received_at)
        return AccessToken(response.access_token, received_at, ends_at, response.id_token)

    def _adopt(self, refresh_token: str | None) -> None:
        """Go on with what the issuer gave; the one before is kept where it gave none (RFC 6749 §6)."""
        if refresh_token is not None and refresh_token != self._refresh_token:
            self._refresh_token = refresh_token
            self.rotated = True

    def _save(self, store: Store, session: Stored) -> None:
        try:
            store.write(session)
        except StoreError as error:
            self._unsaved, self._is_ahead = session, True
            self._warn(error)
        else:
            self._unsaved, self._is_ahead = None, False
            self._told.clear()
        self._seen_at = store.changed_at()

    def _is_young(self, stored: Stored) -> bool:
        now = self._now()
        return stored.obtained_at <= now + 1 and now < stored.ends_at - 0.25 * (stored.ends_at - stored.obtained_at)

    def _warn(self, error: StoreError) -> None:
        if str(error) not in self._told:
            self._told.add(str(error))
            # A log handler that raises must not cost a token.
            with contextlib.suppress(Exception):
                logger.warning("the session is kept in memory only: %s", error)


def _stored(refresh_token: str, token: AccessToken | None, session_ends_at: float | None) -> Stored:
    if token is None:
        return Stored(refresh_token, session_ends_at=session_ends_at)
    return Stored(refresh_token, token.value, token.obtained_at, token.ends_at, session_ends_at, token.id_token)


def number(value: Any) -> float | None:
    """Return a JSON number that can be a time, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e15 else None
