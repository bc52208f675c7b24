"""All I/O with the issuer: discovery, keys and the token endpoint, with their caches.

Everything here blocks and may be called from several threads; nothing here decides *when* to get a token.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import Any, Final, Generic, TypeVar

from eoepca_security.errors import IssuerUnavailable, SettingsError, TokenInvalid
from eoepca_security.protocol import (
    Client,
    ProviderMetadata,
    TokenResponse,
    build_token_request,
    discovery_url,
    printable,
    read_metadata,
    read_token_response,
    url_problem,
)
from eoepca_security.strict_json import parse_object
from eoepca_security.transport import Answer, Transport
from eoepca_security.verify import Header, Policy, SigningKey, read_header, read_keys, select_key, verify

DISCOVERY_TIMEOUT: Final = 5.0
TOKEN_TIMEOUT: Final = 10.0
"""Seconds that one exchange may take as a whole. A token endpoint may have to ask a directory first."""

METADATA_LIFETIME: Final = 3600.0
KEYS_LIFETIME: Final = 300.0
"""Seconds after which a cached document is asked for again; the old one serves on while the issuer does not answer."""

RETRY_INTERVAL: Final = 30.0
"""Seconds between two attempts to renew a cached document, so that neither an issuer that is down nor tokens with
unknown keys make us hammer."""

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
            raise SettingsError(f"the issuer's URL {problem}")
        self._discovery_url = discovery_url(issuer_url)
        self._client = client
        self._transport = transport
        self._scope = scope
        self._allow_http = allow_http
        self._now = now
        self._metadata = _Cached(METADATA_LIFETIME, now, self._fetch_metadata)
        self._keys = _Cached(KEYS_LIFETIME, now, self._fetch_keys)

    def metadata(self) -> ProviderMetadata:
        """Return the issuer's discovery document; raises IssuerUnavailable."""
        return self._metadata.get()

    def request_token(self, refresh_token: str | None) -> TokenResponse:
        """Get an access token with `refresh_token`, or with the client's own credentials when it is None.

        Raises IssuerUnavailable, CredentialsRejected or TokenInvalid.
        """
        request = build_token_request(
            self._client, self.metadata(), now=self._now(), refresh_token=refresh_token, scope=self._scope
        )
        answer = self._transport.post(request.url, form=request.form, headers=request.headers, timeout=TOKEN_TIMEOUT)
        return read_token_response(
            answer.status,
            answer.body,
            retry_after=_retry_after(answer),
            secrets=(*request.secrets, self._client.secret or ""),
        )

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
            raise IssuerUnavailable(f"{printable(url)} answered {answer.status}, not with claims about the user")
        return claims

    def verify(self, token: str, audience: str) -> Mapping[str, Any]:
        """Return the verified claims of an access token for `audience`; raises TokenInvalid or IssuerUnavailable."""
        header = read_header(token)
        key = self._key(header)
        return verify(token, key, Policy(self.metadata().issuer, audience), now=self._now())

    def _key(self, header: Header) -> SigningKey:
        key = select_key(self._keys.get(), header)
        if key is None:
            key = select_key(self._keys.get(max_age=RETRY_INTERVAL), header)
        if key is None:
            raise TokenInvalid("no key of the issuer fits the token")
        return key

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

    def _fetch_keys(self) -> tuple[SigningKey, ...]:
        url = self.metadata().jwks_uri
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
            raise IssuerUnavailable(f"{printable(url)} answered {answer.status}, not with a set of keys")
        return read_keys(document)


class _Cached(Generic[T]):
    """A document that is fetched when it is first needed and again when it is old; one fetch at a time."""

    def __init__(self, lifetime: float, now: Callable[[], float], fetch: Callable[[], T]) -> None:
        self._lifetime = lifetime
        self._now = now
        self._fetch = fetch
        self._lock = threading.Lock()
        self._value: T | None = None
        self._fetched_at = 0.0
        self._attempted_at = 0.0
        self._fetching: Future[T] | None = None

    def get(self, *, max_age: float | None = None) -> T:
        """Return the document, not older than `max_age` seconds (its usual lifetime) if that can be had.

        Callers that come during a fetch share its result and its error; those that an old document serves do not wait.
        """
        with self._lock:
            now, value = self._now(), self._value
            if value is not None and 0 <= now - self._fetched_at < (max_age or self._lifetime):
                return value
            if value is not None and 0 <= now - self._attempted_at < RETRY_INTERVAL and self._fetching is None:
                return value
            fetching = self._fetching
            if fetching is None:
                mine = self._fetching = Future[T]()
                self._attempted_at = now
        if fetching is not None:
            return value if value is not None and max_age is None else fetching.result()
        try:
            fetched = self._fetch()
        except BaseException as error:
            with self._lock:
                self._fetching = None
            if value is not None and isinstance(error, IssuerUnavailable):
                logger.info("using the issuer's earlier answer: %s", error)
                mine.set_result(value)
                return value
            mine.set_exception(error)
            raise
        with self._lock:
            self._value, self._fetched_at, self._fetching = fetched, now, None
        mine.set_result(fetched)
        return fetched


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
