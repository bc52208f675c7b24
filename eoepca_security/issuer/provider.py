"""Everything we ask the issuer for: discovery, keys and tokens, with their caches.

Methods that are not coroutines block, and are thread-safe. Nothing here decides *when* to get a token.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, Generic, TypeVar

from eoepca_security.errors import IssuerUnavailable, SettingsError
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
    build_exchange_request,
    build_token_request,
    read_exchange_response,
    read_metadata,
    read_token_response,
)
from eoepca_security.oauth.strict_json import parse_object
from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import discovery_url, issuer_url_problem
from eoepca_security.oauth.verify import (
    NoKeyFits,
    Policy,
    TrustedKeys,
    Unverified,
    read_access_token,
    read_id_token,
    read_keys,
)

DISCOVERY_TIMEOUT: Final = 5.0
TOKEN_TIMEOUT: Final = 20.0
"""The longest time for one exchange, in seconds. It is generous, because a token endpoint may have to ask a directory
first and the lost answer may carry the only valid refresh token. No request waits this long."""

METADATA_LIFETIME: Final = 3600.0
KEYS_LIFETIME: Final = 300.0
"""Seconds after which a cached document is fetched again. The old one stays in use while the issuer does not answer."""

KEYS_STALE: Final = 3600.0
"""The age in seconds at which keys are dropped, even while the issuer does not answer."""

RETRY_INTERVAL: Final = 30.0
"""Seconds between two attempts to renew a cached document, so that we do not hammer an issuer that is down. Also
between two attempts caused by tokens that no key fits."""

FAILURE_PAUSE: Final = 0.5
"""The shortest time in seconds for which callers of `_Cached.soon` share one error. An error that took longer to arrive
is shared for as long as it took."""

MAX_WAIT: Final = DISCOVERY_TIMEOUT
"""The longest time that a request waits for keys, in seconds."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Provider:
    """One issuer, used by one client.

    `issuer_url` is the issuer or its discovery document. `issuer` is its name, if that is not its address (inside a
    cluster, say). `allow_http` allows plain http beyond loopback, which exposes
    tokens and secrets to everyone on the network path. `now` returns epoch seconds. Raises SettingsError when the URL
    is not valid or not allowed.
    """

    def __init__(
        self,
        issuer_url: str,
        client: Client,
        transport: Transport,
        *,
        issuer: str | None = None,
        scope: str | None = None,
        allow_http: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        if problem := issuer_url_problem(issuer_url, allow_http=allow_http):
            raise SettingsError(f"issuer_url {problem}")
        self._discovery_url = discovery_url(issuer_url)
        self._issuer = issuer
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

    def request_token(
        self, refresh_token: str | None, *, scope: str | None = None, resource: str | None = None
    ) -> TokenResponse:
        """Get an access token with `refresh_token`, or with the client's own credentials when it is None.

        `scope` takes the place of the provider's. `resource` is the URI of the service that the token is for
        (RFC 8707). Raises IssuerUnavailable, CredentialsRejected or TokenInvalid.
        """
        request = build_token_request(
            self._client,
            self._token_metadata(),
            now=self.now(),
            refresh_token=refresh_token,
            scope=self._scope if scope is None else scope,
            resource=resource,
        )
        answer = self._post_to_token_endpoint(request)
        return read_token_response(
            answer.status, answer.body, retry_after=_retry_after(answer), secrets=self._secrets(request)
        )

    def exchange_token(
        self, subject_token: str, *, audience: str | None = None, resource: str | None = None, scope: str | None = None
    ) -> TokenResponse:
        """Get an access token for another service in exchange for the user's access token (RFC 8693).

        `audience` is the service's name at the issuer and `resource` its URI. The provider's own scope is not sent.
        Raises the same errors as `request_token`.
        """
        request = build_exchange_request(
            self._client,
            self._token_metadata(),
            now=self.now(),
            subject_token=subject_token,
            audience=audience,
            resource=resource,
            scope=scope,
        )
        answer = self._post_to_token_endpoint(request)
        return read_exchange_response(
            answer.status, answer.body, retry_after=_retry_after(answer), secrets=self._secrets(request)
        )

    def begin_device_login(self, scope: str, resources: Collection[str] = ()) -> DeviceAuthorization:
        """Start a login that the user confirms elsewhere (RFC 8628). Raises the same errors as `request_token`.

        `resources` are the URIs of the services that later refreshes ask for (RFC 8707).
        """
        verifier = new_verifier()
        request = build_device_request(
            self._client, self.metadata(), scope, verifier, now=self.now(), resources=resources
        )
        answer = self._post(request)
        return read_device_response(
            answer.status, answer.body, verifier, secrets=self._secrets(request), allow_http=self._allow_http
        )

    def poll_device_login(self, device: DeviceAuthorization) -> TokenResponse | Pending:
        """Ask once whether the user has confirmed a login.

        Raises the same errors as `request_token`, and CredentialsRejected when the login is over.
        """
        request = build_device_token_request(self._client, self.metadata(), device, now=self.now())
        answer = self._post(request)
        return read_device_token_response(
            answer.status, answer.body, retry_after=_retry_after(answer), secrets=self._secrets(request)
        )

    def redeem_code(self, login: AuthorizationRequest, code: str) -> TokenResponse:
        """Exchange the code of a browser login for tokens. Raises the same errors as `request_token`."""
        request = build_code_request(self._client, self.metadata(), login, code, now=self.now())
        answer = self._post(request)
        return read_code_response(answer.status, answer.body, secrets=self._secrets(request))

    def revoke(self, refresh_token: str) -> None:
        """Revoke a refresh token, which ends its session at the issuer (RFC 7009).

        Raises IssuerUnavailable or CredentialsRejected, the latter also when the issuer does not offer revocation.
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
            raise IssuerUnavailable(f"{printable(url)} answered {answer.status} without claims about the user", url=url)
        return claims

    def verify(self, token: str, audience: str) -> dict[str, Any]:
        """Return the verified claims of an access token for `audience` that this issuer gave us.

        Raises TokenInvalid or IssuerUnavailable.
        """
        # It came as `access_token`, so it is one, even with claims of ID tokens or without a subject.
        unverified = read_access_token(
            token, Policy(audience, require_subject=False, accept_id_tokens=True), now=self.now()
        )
        with contextlib.suppress(NoKeyFits):
            return self._keys.get().confirm(unverified)
        return self._keys.get(anew=True).confirm(unverified)

    async def verify_access_token(self, token: str, policy: Policy) -> dict[str, Any]:
        """Return the verified claims of an access token without blocking the event loop.

        Does no I/O while the keys are cached; otherwise waits for them, at most `MAX_WAIT` seconds. Raises the same
        errors as `verify`.
        """
        return await self._confirm(read_access_token(token, policy, now=self.now()))

    async def verify_id_token(
        self, token: str, client_ids: Collection[str], leeway: float
    ) -> tuple[dict[str, Any], str]:
        """Do the same for an ID token of one of these clients; return its claims and signature algorithm."""
        unverified = read_id_token(token, client_ids, leeway=leeway, now=self.now())
        return await self._confirm(unverified), unverified.header.alg

    async def _confirm(self, token: Unverified) -> dict[str, Any]:
        with contextlib.suppress(NoKeyFits):
            return (await self._keys.soon()).confirm(token)
        return (await self._keys.soon(anew=True)).confirm(token)

    def _token_metadata(self) -> ProviderMetadata:
        metadata = self._metadata.get(anew=self._in_doubt)
        self._in_doubt = False
        if not metadata.token_endpoint:
            raise IssuerUnavailable(f"{self._discovery_url} has no token_endpoint", url=self._discovery_url)
        return metadata

    def _post_to_token_endpoint(self, request: TokenRequest) -> Answer:
        answer = self._post(request)
        # The endpoint may have moved, or the issuer may no longer support our client authentication.
        self._in_doubt = answer.status in (401, 404, 405, 410)
        return answer

    def _post(self, request: TokenRequest) -> Answer:
        form = {**request.form, "resource": request.resources} if request.resources else request.form
        return self._transport.post(request.url, form=form, headers=request.headers, timeout=TOKEN_TIMEOUT)

    def _secrets(self, request: TokenRequest) -> tuple[str, ...]:
        return (*request.secrets, self._client.secret or "")

    def _get(self, url: str) -> Answer:
        try:
            return self._transport.get(url, timeout=DISCOVERY_TIMEOUT)
        except IssuerUnavailable as error:
            error.was_sent = False  # fetching a document uses nothing up
            raise

    def _fetch_metadata(self) -> ProviderMetadata:
        answer = self._get(self._discovery_url)
        try:
            return read_metadata(
                answer.status, answer.body, url=self._discovery_url, issuer=self._issuer, allow_http=self._allow_http
            )
        except IssuerUnavailable as error:
            error.retry_after = _retry_after(answer)
            raise

    def _fetch_keys(self) -> TrustedKeys:
        metadata = self.metadata()
        url = metadata.jwks_uri
        if url is None:
            raise IssuerUnavailable("the issuer's discovery document has no jwks_uri, so its tokens cannot be verified")
        answer = self._get(url)
        try:
            document = parse_object(answer.body)
        except ValueError:
            document = {}
        if answer.status != 200 or "keys" not in document:
            raise IssuerUnavailable(f"{printable(url)} answered {answer.status} without a set of keys", url=url)
        return TrustedKeys(metadata.issuer, read_keys(document), metadata.access_token_issuer)


class _Cached(Generic[T]):
    """A document that is fetched on first use and again when it is old; one fetch at a time.

    When a fetch fails, the old document stays in use until it is `stale` seconds old.
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
        self._error: IssuerUnavailable | None = None
        self._error_until = 0.0

    def get(self, *, anew: bool = False) -> T:
        """Return the document; with `anew`, fetch it again, at most once in `RETRY_INTERVAL` seconds.

        Callers during a fetch share its result or its error. Callers that can use the old document do not wait.
        """
        found, mine = self._look(anew=anew)
        if mine:
            self._run(mine)
        return found.result() if isinstance(found, Future) else found

    async def soon(self, *, anew: bool = False) -> T:
        """Like `get`, but fetch in a thread and limit the wait. Callers share an error for a short time."""
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
        """Return the document or the fetch to wait for, and that fetch again if the caller must run it."""
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
            elif not patient and self._error is not None and now < self._error_until:
                raise self._error.with_traceback(None)  # otherwise it collects the traceback of every request
            self._attempted_at = now
            self._wanted_anew_at = now if anew else self._wanted_anew_at
            fetching = self._fetching = Future[T]()
            fetching.set_running_or_notify_cancel()  # so that no waiting caller can cancel it
            return fetching, fetching

    def _run(self, fetching: "Future[T]") -> None:
        try:
            self._settle(fetching, self._fetch())
        except BaseException as error:  # noqa: BLE001  raised again where the result is awaited
            self._settle(fetching, error)

    def _settle(self, fetching: "Future[T]", outcome: T | BaseException) -> None:
        with self._lock:
            now, self._fetching = self._now(), None
            if not isinstance(outcome, BaseException):
                self._value, self._fetched_at = outcome, self._attempted_at
            elif isinstance(outcome, IssuerUnavailable):
                self._error = outcome
                self._error_until = now + max(FAILURE_PAUSE, now - self._attempted_at)
                if self._value is not None and now - self._fetched_at < self._stale:
                    logger.info("using the issuer's previous answer: %s", outcome)
                    outcome = self._value
        if isinstance(outcome, BaseException):
            fetching.set_exception(outcome)
        else:
            fetching.set_result(outcome)


def _retry_after(answer: Answer) -> float | None:
    """Return Retry-After (RFC 9110 §10.2.3) in seconds. A date is relative to the answer's Date, not to our clock."""
    value = answer.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        then, now = (parsedate_to_datetime(text) for text in (value, answer.headers.get("Date", "")))
        seconds = max((then - now).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None
    return seconds if seconds < 86_400 else None  # otherwise a clock or the date is wrong
