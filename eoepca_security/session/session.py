"""RefreshSession: one login, shared by this process, others that use its store, and later starts.

Refresh tokens are often valid only once (RFC 9700 §4.14.2). So, under the store's lock: take the newest one, use it,
and store its successor before anything else happens.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, StoreError, TokenInvalid
from eoepca_security.oauth.protocol import MAX_LIFETIME, TokenResponse
from eoepca_security.oauth.text import identity
from eoepca_security.oauth.verify import unverified_claims

DEFAULT_LIFETIME: Final = 60.0
"""The assumed lifetime of a token in seconds, when neither the issuer nor the token gives one. Short is safe."""

MAX_CLOCK_OFFSET: Final = 600.0
"""Seconds by which the issuer's clock may be behind ours before its tokens count as old."""

SESSION_ERRORS: Final = (
    "invalid_grant",
    "interaction_required",
    "login_required",
    "consent_required",
    "invalid_token",
    "invalid_refresh_token",
    "bad_refresh_token",
    "expired_token",
    "token_expired",
)
"""The error codes with which issuers refuse the session: that of RFC 6749 §5.2, and their own."""

_LAST_TIME: Final = 253_402_300_799  # the end of the year 9999

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccessToken:
    """An access token and its times, in epoch seconds of this machine's clock."""

    value: str = field(repr=False)
    obtained_at: float
    ends_at: float
    id_token: str | None = field(default=None, repr=False)
    """The ID token that came with it, or None."""

    @property
    def expires_at(self) -> float:
        """When to stop sending it: shortly before its end, because sending takes time."""
        return self.ends_at - min(0.1 * (self.ends_at - self.obtained_at), 5.0)


@dataclass(frozen=True)
class Stored:
    """The stored part of a session. Times are in epoch seconds.

    `access_token` is None when the newest refresh token came without a usable one. `session_ends_at` is when the
    refresh token expires unless it is used, or None when the issuer did not say. `rejected` is true when the issuer has
    rejected the refresh token, and a login has taken over. `scope` is what the issuer granted to the session.
    `for_services` are further access tokens, without ID tokens, by the key of the `Purpose` that each is for.
    """

    refresh_token: str = field(repr=False)
    access_token: str | None = field(default=None, repr=False)
    obtained_at: float = 0.0
    ends_at: float = 0.0
    session_ends_at: float | None = None
    id_token: str | None = field(default=None, repr=False)
    rejected: bool = False
    scope: str | None = None
    for_services: Mapping[str, AccessToken] = field(default_factory=dict, hash=False)

    def token(self, purpose: "Purpose | None" = None) -> AccessToken | None:
        """Return the session's own access token or that for `purpose`, or None; it may have expired."""
        if purpose is not None:
            return self.for_services.get(purpose.key)
        if self.access_token is None:
            return None
        return AccessToken(self.access_token, self.obtained_at, self.ends_at, self.id_token)


@dataclass(frozen=True)
class Purpose:
    """A kind of access token that a session's refresh token can get, for one service only.

    `key` tells it from all others, in the store, too. `request` returns a token response for a refresh token, or for
    the client itself when called with None, and for the scope of the session (None if unknown); it may block.
    """

    key: str
    request: Callable[[str | None, str | None], TokenResponse] = field(repr=False)


class Store(Protocol):
    """Where a session is stored, e.g. on disk in `file_store.TokenStore`. All methods may raise StoreError."""

    @property
    def place(self) -> object:
        """A value that is equal for two stores of the same session."""

    def locked(self) -> AbstractContextManager[None]:
        """Lock the session for this process."""

    def read(self) -> Stored | None:
        """Return the stored session, or None."""

    def write(self, session: Stored) -> None:
        """Store the session, durably by the time this returns."""

    def changed_at(self) -> int:
        """Return a number that differs after each change; 0 when nothing is stored."""


def token_end(response: TokenResponse, *, sent_at: float, received_at: float) -> float:
    """Return when the token in `response` ends, in epoch seconds of our clock. If in doubt, too early.

    `expires_in` counts from a moment between sending and receiving. A JWT's `exp` is on the issuer's clock. If its
    `iat` lies between sending and receiving, the clocks agree; otherwise only the difference of `exp` and `iat` counts.
    """
    claims = unverified_claims(response.access_token)
    exp, issued_at = number(claims.get("exp")), number(claims.get("iat"))
    if exp is None:
        lifetime = response.expires_in or DEFAULT_LIFETIME
        # Slow issuers usually take their time before they issue a token rather than after, but not always.
        return received_at + lifetime - min(received_at - sent_at, 0.1 * lifetime)
    is_off = issued_at is not None and not sent_at - 1.25 <= issued_at <= received_at + 0.25
    # An older `iat` means that the issuer cached the token: clocks are not off by that much.
    if is_off and issued_at is not None and issued_at > sent_at - MAX_CLOCK_OFFSET:
        # `iat` is in whole seconds, so up to one second of the lifetime may have passed.
        exp = sent_at + exp - issued_at - 1
    return min(exp, received_at + (response.expires_in or MAX_LIFETIME))


class RefreshSession:
    """One login at the issuer.

    `request_token` returns a token response for a refresh token, or for the client itself when called with None; it may
    block. `store` shares the session with other processes and later starts. `logins` is where a login of the same
    client and issuer is stored that takes over when the issuer rejects `refresh_token`. `now` returns epoch seconds.
    """

    def __init__(
        self,
        request_token: Callable[[str | None], TokenResponse],
        refresh_token: str | None,
        *,
        store: Store | None = None,
        logins: Store | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._request_token = request_token
        self._given = self._refresh_token = refresh_token
        self._store = store
        self._logins = logins
        self._login = RefreshSession(request_token, None, store=logins, now=now) if logins is not None else None
        self._now = now
        self._mutex = threading.Lock()
        self._answer_was_lost = False
        self._seen_at = 0
        self._is_ahead = False
        self._unsaved: Stored | None = None
        self._warned: set[str] = set()
        self._gave_up_at: int | None = None
        self._login_seen_at = 0
        self.rotated = False
        """Whether the issuer has replaced the refresh token that this session started with."""
        self.ends_at: float | None = None
        """When the session ends unless it is renewed, in epoch seconds, or None when the issuer did not say."""
        self.scope: str | None = None
        """What the issuer granted to the session (RFC 6749 §5.1), or None if it did not say."""
        self.login_took_over = False
        """Whether the last token is from the login, because the issuer has rejected the refresh token."""

    def renew(self, stale: str | None, purpose: Purpose | None = None) -> AccessToken:
        """Return an access token newer than `stale`, the session's own or one for `purpose`; blocks.

        If another process has already stored one, returns that without asking the issuer. With `stale=None`, always
        asks the issuer. Raises IssuerUnavailable, CredentialsRejected or TokenInvalid.
        """
        with self._mutex, contextlib.ExitStack() as held:
            if self._logins is not None:
                self._login_seen_at = self._logins.changed_at()
            store = self._store
            if store is None:
                return self._request(purpose)
            lock_error = None
            try:
                held.enter_context(store.locked())
            except StoreError as error:
                lock_error = error  # continue: the newest stored token is still the one to use
            try:
                stored = store.read()
            except StoreError as error:
                self._warn(lock_error or error)
                # Do not overwrite what could not be read.
                return self._request_in_memory(store, purpose)
            if lock_error is not None:
                self._warn(lock_error)
            return self._renew_from(store, stored, stale, purpose)

    def continue_with(
        self, request_token: Callable[[str | None], TokenResponse], store: Store | None, logins: Store | None = None
    ) -> None:
        """Switch to another `request_token` and stores, without losing a session that is only in memory."""
        if (store and store.place) != (self._store and self._store.place):
            self._seen_at, self._is_ahead = store.changed_at() if store is not None else 0, True
        self._request_token, self._store = request_token, store
        if self._login is not None:
            self._login.continue_with(request_token, logins)
        elif logins is not None:
            self._login = RefreshSession(request_token, None, store=logins, now=self._now)
        self._logins = logins

    def has_news(self) -> bool:
        """Return whether another process has written the session since we last read it, e.g. after a new login."""
        is_newer = self._store is not None and self._store.changed_at() not in (0, self._seen_at)
        return is_newer or (self._logins is not None and self._logins.changed_at() not in (0, self._login_seen_at))

    def wait(self) -> None:
        """Wait until no request with the refresh token is under way; blocks."""
        with self._mutex:
            pass

    def look(self) -> None:
        """Read from the store when the session ends, without asking the issuer; blocks."""
        with contextlib.suppress(StoreError):
            stored = self._store.read() if self._store is not None else None
            if stored is not None:
                self.ends_at = stored.session_ends_at

    @property
    def is_unsaved(self) -> bool:
        """Whether the newest refresh token is only in memory, although there is a store."""
        return self._unsaved is not None or (self._login is not None and self._login.is_unsaved)

    def save(self) -> None:
        """Try again to save an unsaved session, unless another process has written since; blocks."""
        if self._login is not None:
            self._login.save()
        with self._mutex, contextlib.suppress(StoreError, IssuerUnavailable):
            store, unsaved = self._store, self._unsaved
            if store is not None and unsaved is not None:
                with store.locked():
                    if store.changed_at() == self._seen_at:
                        self._save(store, unsaved)

    def _renew_from(
        self, store: Store, stored: Stored | None, stale: str | None, purpose: Purpose | None
    ) -> AccessToken:
        changed_at = store.changed_at()
        if self._has_given_up(stored, changed_at) and self._finds_login():
            self._seen_at, self._is_ahead, self._unsaved = changed_at, False, None
            return self._take_login(stored, stale, purpose)
        self.login_took_over = False
        # A session that could not be saved is newer than the stored one, unless another process has written since.
        if stored is not None and not (self._is_ahead and changed_at == self._seen_at):
            self._refresh_token, self.ends_at = stored.refresh_token, stored.session_ends_at
            self.scope = stored.scope or self.scope
            self._seen_at, self._is_ahead, self._unsaved = changed_at, False, None
            token = stored.token(purpose)
            if stale is not None and not stored.rejected and token is not None and self._is_other(token, stale):
                return token
        try:
            return self._request_and_save(store, self._unsaved or stored, purpose)
        except CredentialsRejected as error:
            if error.issuer_error not in SESSION_ERRORS or not self._finds_login():
                raise
            token = self._take_login(stored, stale, purpose)
            self._give_up(store, stored)
            return token

    def _has_given_up(self, stored: Stored | None, changed_at: int) -> bool:
        return self._gave_up_at == changed_at or (stored is not None and stored.rejected)

    def _finds_login(self) -> bool:
        """Return whether there is a login that can take over, and that does not hold a used token of this session."""
        with contextlib.suppress(StoreError):
            found = self._logins.read() if self._logins is not None else None
            return found is not None and found.refresh_token not in (self._given, self._refresh_token)
        return False

    def _take_login(self, stored: Stored | None, stale: str | None, purpose: Purpose | None) -> AccessToken:
        """Return an access token of the login; raises CredentialsRejected if that is another user's."""
        login, logins = self._login, self._logins
        if login is None or logins is None:
            raise RuntimeError("there is no login")
        try:
            token = login.renew(stale or "", purpose)
        finally:
            self._login_seen_at = logins.changed_at()
        before = (stored.access_token, stored.id_token) if stored is not None else ()
        ours, theirs = _subject(*before, self._refresh_token), _subject(token.value, token.id_token)
        if ours is not None and theirs is not None and ours != theirs:
            raise CredentialsRejected(
                "the issuer rejected the refresh token from the settings, and the stored login is of another user, "
                f"{identity(unverified_claims(token.value))}",
                cause="other_user",
            )
        if not self.login_took_over:
            who = identity(unverified_claims(token.value))
            _warn(
                "the issuer rejected the refresh token from the settings: continuing with the stored login of "
                f"{who}, in {logins.place}"
            )
        self.ends_at, self.login_took_over = login.ends_at, True
        return token

    def _give_up(self, store: Store, stored: Stored | None) -> None:
        """Note that a login has taken over, for other processes and later starts: they do not send the token again."""
        kept = stored or Stored(str(self._refresh_token))
        with contextlib.suppress(StoreError):
            store.write(replace(kept, refresh_token=str(self._refresh_token), rejected=True, for_services={}))
        self._gave_up_at = self._seen_at = store.changed_at()
        self._is_ahead, self._unsaved = False, None

    def _request_in_memory(self, store: Store, purpose: Purpose | None) -> AccessToken:
        before = self._refresh_token
        try:
            return self._request(purpose)
        finally:
            if self._refresh_token != before:
                self._seen_at, self._is_ahead = store.changed_at(), True

    def _request_and_save(self, store: Store, previous: Stored | None, purpose: Purpose | None) -> AccessToken:
        before, token = self._refresh_token, None
        try:
            token = self._request(purpose)
            return token
        finally:
            # Save even after an unusable answer: the previous refresh token may be used up.
            if self._refresh_token is not None and (token is not None or self._refresh_token != before):
                self._save(store, self._successor(self._refresh_token, previous, token, purpose))

    def _successor(
        self, refresh_token: str, previous: Stored | None, token: AccessToken | None, purpose: Purpose | None
    ) -> Stored:
        """Return the session to store after a refresh, with the tokens for other purposes that are still valid."""
        now, tokens = self._now(), previous.for_services if previous is not None else {}
        tokens = {key: kept for key, kept in tokens.items() if now < kept.ends_at}
        if purpose is not None and token is not None:
            tokens[purpose.key] = replace(token, id_token=None)
        own = token if purpose is None else previous.token() if previous is not None else None
        kept = Stored(refresh_token, session_ends_at=self.ends_at, scope=self.scope, for_services=tokens)
        if own is None:
            return kept
        return replace(
            kept, access_token=own.value, obtained_at=own.obtained_at, ends_at=own.ends_at, id_token=own.id_token
        )

    def _request(self, purpose: Purpose | None) -> AccessToken:
        sent_at = self._now()
        try:
            if purpose is None:
                response = self._request_token(self._refresh_token)
            else:
                response = purpose.request(self._refresh_token, self.scope)
        except TokenInvalid as error:
            self._adopt(error.refresh_token)
            raise
        except CredentialsRejected as error:
            if self._answer_was_lost:
                raise CredentialsRejected(
                    f"{error}. The answer to the previous refresh was lost, probably with the new refresh token",
                    cause=error.cause,
                    issuer_error=error.issuer_error,
                    description=error.description,
                ) from None
            raise
        except IssuerUnavailable as error:
            # Retrying with the same token is always right. It works if the issuer has not used it up, or allows a
            # grace period; otherwise the session is lost anyway.
            self._answer_was_lost = self._answer_was_lost or error.was_sent
            raise
        received_at = self._now()
        self._answer_was_lost = False
        self._adopt(response.refresh_token)
        if purpose is None:
            self.scope = response.scope or self.scope
        lifetime = response.refresh_expires_in
        self.ends_at = received_at + lifetime if lifetime is not None else None
        ends_at = token_end(response, sent_at=sent_at, received_at=received_at)
        return AccessToken(response.access_token, received_at, ends_at, response.id_token)

    def _adopt(self, refresh_token: str | None) -> None:
        """Use the new refresh token; keep the old one if the issuer sent none (RFC 6749 §6)."""
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
            self._warned.clear()
        self._seen_at = store.changed_at()

    def _is_other(self, token: AccessToken, stale: str) -> bool:
        """Return whether a stored token is another one, and young enough to be used."""
        now = self._now()
        return (
            token.value != stale
            and token.obtained_at <= now + 1
            and now < token.ends_at - 0.25 * (token.ends_at - token.obtained_at)
        )

    def _warn(self, error: StoreError) -> None:
        if str(error) not in self._warned:
            self._warned.add(str(error))
            _warn(f"the session is only in memory: {error}")


def _warn(message: str) -> None:
    # A log handler that raises must not cost a token.
    with contextlib.suppress(Exception):
        logger.warning("%s", message)


def _subject(*tokens: str | None) -> str | None:
    """Return the user in the first token that names one. Not verified: the tokens are the issuer's, or our own."""
    subjects = (unverified_claims(token or "").get("sub") for token in tokens)
    return next((subject for subject in subjects if isinstance(subject, str)), None)


def number(value: Any) -> float | None:
    """Return a JSON number as a time in epoch seconds, limited to what a calendar can represent, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(min(max(value, 0), _LAST_TIME)) if is_number else None
