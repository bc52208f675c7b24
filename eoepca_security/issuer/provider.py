"""All I/O with the issuer: discovery, keys and the token endpoint, with their caches.

What is no coroutine blocks, and may be called from several threads; nothing here decides *when* to get a token.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, Generic, TypeVar

from eoepca_security.errors import IssuerUnavailable, SettingsError, TokenInvalid
from eoepca_security.issuer.threads import in_daemon_thread, result_of
from eoepca_security.issuer.transport import Answer, Transport
from eoepca_security.oauth.authorization import (
    AuthorizationRequest,
    DeviceAuthorization,
    Pending,
    build_code_request,
    build_device_request,
    build_device_token_request,
    build_revocation_request,
    new_verifier,
    read_code_response,
    read_device_response,
    read_device_token_response,
    read_revocation_response,
)
from eoepca_security.oauth.protocol import (
    Client,
    ProviderMetadata,
    TokenRequest,
    TokenResponse,
    build_token_request,
    read_metadata,
    read_token_response,
)
from eoepca_security.oauth.strict_json import parse_object
from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import discovery_url, url_problem
from eoepca_security.oauth.verify import Policy, TrustedKeys, Unverified, read_access_token, read_id_token, read_keys

DISCOVERY_TIMEOUT: Final = 5.0
TOKEN_TIMEOUT: Final = 20.0
"""Seconds that one exchange may take as a whole. A token endpoint may have to ask a directory first, and an answer that
is given up may have had the only valid refresh token; nobody waits that long for it."""

METADATA_LIFETIME: Final = 3600.0
KEYS_LIFETIME: Final = 300.0
"""Seconds after which a cached document is asked for again; the old one serves on while the issuer does not answer."""

KEYS_STALE: Final = 3600.0
"""Age in seconds from which keys are not used any more, even while the issuer does not answer."""

RETRY_INTERVAL: Final = 30.0
"""Seconds between two attempts to renew a cached document, so that an issuer that is down is not hammered; and between
two that tokens with unknown keys cause."""

FAILURE_PAUSE: Final = 0.5
"""Least time in seconds that callers who must not wait long share one failure; a failure that took longer is shared for
as long as it took."""

MAX_WAIT: Final = DISCOVERY_TIMEOUT
"""Longest time that a request waits for keys, in seconds."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Provider:
    """One issuer as one client sees it.

    `issuer_url` is the issuer or its discovery document. `allow_http` accepts plain http beyond loopback, which gives
    tokens and secrets to everyone on the way. `now` is epoch seconds. Raises SettingsError for a URL that must not be
    spoken to.
    """

    def __init__(
        self,
        issuer_url: str,
        client: Client,
        transport: Transport,
        *,
        scope: str | None = None,
        allow_http: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        if problem := url_problem(issuer_url, allow_http=allow_http):
            raise SettingsError(f"issuer_url {problem}")
        self._discovery_url = discovery_url(issuer_url)
        self._client = client
        self._transport = transport
        self._scope = scope
        self._allow_http = allow_http
        self.now = now
        self._in_doubt = False
        self._metadata = _Cached(METADATA_LIFETIME, now, self._fetch_metadata)
        self._keys = _Cached(KEYS_LIFETIME, now, self._fetch_keys, stale=KEYS_STALE)

    def metadata(self) -> ProviderMetadata:
        """Return the issuer's discovery document; raises IssuerUnavailable."""
        return self._metadata.get()

    def request_token(self, refresh_token: str | None) -> TokenResponse:
        """Get an access token with `refresh_token`, or with the client's own credentials when it is None.

        Raises IssuerUnavailable, CredentialsRejected or TokenInvalid.
        """
        metadata = self._metadata.get(anew=self._in_doubt)
        self._in_doubt = False
        if not metadata.token_endpoint:
            raise IssuerUnavailable(f"{self._discovery_url} names no token_endpoint", url=self._discovery_url)
        request = build_token_request(
            self._client, metadata, now=self.now(), refresh_token=refresh_token, scope=self._scope
        )
        answer = self._post(request)
        # Said of a moved endpoint, or of a client authentication that is not offered any more.
        self._in_doubt = answer.status in (401, 404, 405, 410)
        return read_token_response(
            answer.status, answer.body, retry_after=_retry_after(answer), secrets=self._secrets(request)
        )

    def begin_device_login(self, scope: str) -> DeviceAuthorization:
        """Ask for a login that a user confirms elsewhere (RFC 8628); raises as `request_token` does."""
        verifier = new_verifier()
        request = build_device_request(self._client, self.metadata(), scope, verifier, now=self.now())
        answer = self._post(request)
        return read_device_response(
            answer.status, answer.body, verifier, secrets=self._secrets(request), allow_http=self._allow_http
        )

    def poll_device_login(self, device: DeviceAuthorization) -> TokenResponse | Pending:
        """Ask once whether that has happened; raises as `request_token` does, CredentialsRejected when it is over."""
        request = build_device_token_request(self._client, self.metadata(), device, now=self.now())
        answer = self._post(request)
        return read_device_token_response(
            answer.status, answer.body, retry_after=_retry_after(answer), secrets=self._secrets(request)
        )

    def redeem_code(self, login: AuthorizationRequest, code: str) -> TokenResponse:
        """Turn the code of a login by browser into tokens; raises as `request_token` does."""
        request = build_code_request(self._client, self.metadata(), login, code, now=self.now())
        answer = self._post(request)
        return read_code_response(answer.status, answer.body, secrets=self._secrets(request))

    def revoke(self, refresh_token: str) -> None:
        """End the session of a refresh token at the issuer (RFC 7009).

        Raises IssuerUnavailable, or CredentialsRejected also when the issuer does not offer it.
        """
        request = build_revocation_request(self._client, self.metadata(), refresh_token, now=self.now())
        answer = self._post(request)
        read_revocation_response(answer.status, answer.body, secrets=self._secrets(request))

    def userinfo(self, access_token: str) -> dict[str, Any] | None:
        """Return the claims about the user (OpenID Connect Core §5.3), or None when the issuer has no such endpoint.

        Raises IssuerUnavailable.
        """
        url = self.metadata().userinfo_endpoint
        if url is None:
            return None
        headers = {"Authorization": f"Bearer {access_token}"}
        answer = self._transport.get(url, timeout=DISCOVERY_TIMEOUT, headers=headers)
        try:
            claims = parse_object(answer.body)
        except ValueError:
            claims = {}
        if answer.status != 200 or not claims:
            raise IssuerUnavailable(
                f"{printable(url)} answered {answer.status}, not with claims about the user", url=url
            )
        return claims

    def verify(self, token: str, audience: str) -> dict[str, Any]:
        """Return the verified claims of an access token for `audience`; raises TokenInvalid or IssuerUnavailable."""
        unverified = read_access_token(token, Policy(audience), now=self.now())
        return _known(self._keys.get().confirm(unverified) or self._keys.get(anew=True).confirm(unverified))

    async def verify_access_token(self, token: str, policy: Policy) -> dict[str, Any]:
        """Return the verified claims of an access token, without ever blocking the event loop.

        Does no I/O while the keys are cached; waits at most `MAX_WAIT` seconds for them. Raises as `verify` does.
        """
        return await self._confirm(read_access_token(token, policy, now=self.now()))

    async def verify_id_token(
        self, token: str, client_ids: Collection[str], leeway: float
    ) -> tuple[dict[str, Any], str]:
        """Do the same with an ID token of one of these clients; return its algorithm too."""
        unverified = read_id_token(token, client_ids, leeway=leeway, now=self.now())
        return await self._confirm(unverified), unverified.header.alg

    async def _confirm(self, token: Unverified) -> dict[str, Any]:
        claims = (await self._keys.soon()).confirm(token)
        return _known(claims or (await self._keys.soon(anew=True)).confirm(token))

    def _post(self, request: TokenRequest) -> Answer:
        return self._transport.post(request.url, form=request.form, headers=request.headers, timeout=TOKEN_TIMEOUT)

    def _secrets(self, request: TokenRequest) -> tuple[str, ...]:
        return (*request.secrets, self._client.secret or "")

    def _get(self, url: str) -> Answer:
        try:
            return self._transport.get(url, timeout=DISCOVERY_TIMEOUT)
        except IssuerUnavailable as error:
            error.was_sent = False  # nothing is used up by reading a document
            raise

    def _fetch_metadata(self) -> ProviderMetadata:
        answer = self._get(self._discovery_url)
        try:
            return read_metadata(answer.status, answer.body, url=self._discovery_url, allow_http=self._allow_http)
        except IssuerUnavailable as error:
            error.retry_after = _retry_after(answer)
            raise

    def _fetch_keys(self) -> TrustedKeys:
        metadata = self.metadata()
        url = metadata.jwks_uri
        if url is None:
            raise IssuerUnavailable(
                "the issuer's discovery document names no jwks_uri, so its tokens cannot be verified"
            )
        answer = self._get(url)
        try:
            document = parse_object(answer.body)
        except ValueError:
            document = {}
        if answer.status != 200 or "keys" not in document:
            raise IssuerUnavailable(f"{printable(url)} answered {answer.status}, not with a set of keys", url=url)
        return TrustedKeys(metadata.issuer, read_keys(document))


class _Cached(Generic[T]):
    """A document that is fetched when it is first needed and again when it is old; one fetch at a time.

    After a failed fetch the old one serves on until it is `stale` seconds old.
    """

    def __init__(
        self, lifetime: float, now: Callable[[], float], fetch: Callable[[], T], *, stale: float = float("inf")
    ) -> None:
        self._lifetime = lifetime
        self._stale = stale
        self._now = now
        self._fetch = fetch
        self._lock = threading.Lock()
        self._value: T | None = None
        self._fetched_at = 0.0
        self._attempted_at = 0.0
        self._wanted_anew_at = 0.0
        self._fetching: Future[T] | None = None
        self._failure: IssuerUnavailable | None = None
        self._failure_until = 0.0

    def get(self, *, anew: bool = False) -> T:
        """Return the document; with `anew` a newer one than before, at most once in `RETRY_INTERVAL` seconds.

        Callers that come during a fetch share its result and its error; those that an old document serves do not wait.
        """
        found, mine = self._look(anew=anew)
        if mine:
            self._run(mine)
        return found.result() if isinstance(found, Future) else found

    async def soon(self, *, anew: bool = False) -> T:
        """Do as `get`, with the fetch in a thread of its own and a bounded wait; a failure is shared for a moment."""
        found, mine = self._look(anew=anew, patient=False)
        if mine:
            try:
                in_daemon_thread(partial(self._run, mine))
            except RuntimeError:
                self._settle(mine, IssuerUnavailable("no thread can be started to ask the issuer"))
        if not isinstance(found, Future):
            return found
        try:
            async with asyncio.timeout(MAX_WAIT):
                return await result_of(found)
        except TimeoutError:
            raise IssuerUnavailable(f"the issuer did not answer within {MAX_WAIT:g} s") from None

    def _look(self, *, anew: bool, patient: bool = True) -> tuple["T | Future[T]", "Future[T] | None"]:
        """Return the document or the fetch to wait for, and that fetch if the caller has to run it."""
        with self._lock:
            now = self._now()
            age = now - self._fetched_at
            value = self._value if age < self._stale else None
            if self._fetching is not None:
                return (value if value is not None and not anew else self._fetching), None
            if value is not None:
                wait = self._wanted_anew_at if anew else self._attempted_at
                if (0 <= age < self._lifetime and not anew) or 0 <= now - wait < RETRY_INTERVAL:
                    return value, None
            elif not patient and self._failure is not None and now < self._failure_until:
                raise self._failure.with_traceback(None)  # or it would collect the traceback of every request
            self._attempted_at = now
            self._wanted_anew_at = now if anew else self._wanted_anew_at
            fetching = self._fetching = Future[T]()
            fetching.set_running_or_notify_cancel()  # nobody who waits can cancel it now
            return fetching, fetching

    def _run(self, fetching: "Future[T]") -> None:
        try:
            self._settle(fetching, self._fetch())
        except BaseException as error:  # noqa: BLE001  it is raised where the result is awaited
            self._settle(fetching, error)

    def _settle(self, fetching: "Future[T]", outcome: T | BaseException) -> None:
        with self._lock:
            now, self._fetching = self._now(), None
            if not isinstance(outcome, BaseException):
                self._value, self._fetched_at = outcome, self._attempted_at
            elif isinstance(outcome, IssuerUnavailable):
                self._failure = outcome
                self._failure_until = now + max(FAILURE_PAUSE, now - self._attempted_at)
                if self._value is not None and now - self._fetched_at < self._stale:
                    logger.info("using the issuer's earlier answer: %s", outcome)
                    outcome = self._value
        if isinstance(outcome, BaseException):
            fetching.set_exception(outcome)
        else:
            fetching.set_result(outcome)


def _known(claims: dict[str, Any] | None) -> dict[str, Any]:
    if claims is None:
        raise TokenInvalid("no key of the issuer fits the token")
    return claims


def _retry_after(answer: Answer) -> float | None:
    """Read Retry-After (RFC 9110 §10.2.3), in seconds; a date counts from the answer's own, whatever our clock says."""
    value = answer.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        then, now = (parsedate_to_datetime(text) for text in (value, answer.headers.get("Date", "")))
        seconds = max((then - now).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None
    return seconds if seconds < 86_400 else None  # or one of the clocks, or the date, is wrong
