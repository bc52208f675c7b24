"""HTTP with limits: each exchange has a deadline and a size cap, and follows no redirects."""

import errno
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from eoepca_security.errors import Cause, IssuerUnavailable
from eoepca_security.issuer.ambient import ambient_problem
from eoepca_security.issuer.threads import in_daemon_thread
from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import is_loopback

MAX_BODY: Final = 256 * 1024
"""The longest answer that is read, in bytes."""

Form = Mapping[str, str | Sequence[str]]
"""The parameters of a POST; those with several values are sent several times."""

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """An HTTP response. Its repr omits the body, which may carry tokens."""

    status: int
    body: bytes = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Transport(Protocol):
    """What the provider needs from the network. Raises IssuerUnavailable without a complete answer in time."""

    def get(self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> Answer:
        """Return the answer to a GET within `timeout` seconds."""

    def post(self, url: str, *, form: Form, headers: Mapping[str, str], timeout: float) -> Answer:
        """Return the answer to a form POST within `timeout` seconds."""


class HttpTransport:
    """HTTP through `requests`, without redirects and without credentials from the environment; enforces all limits.

    `context` is the TLS context, or a function that returns it. The function is called once, on first use, because
    reading all CAs takes a while.
    """

    def __init__(self, context: ssl.SSLContext | Callable[[], ssl.SSLContext]) -> None:
        self._context: Callable[[], ssl.SSLContext] = (
            (lambda: context) if isinstance(context, ssl.SSLContext) else cache(context)
        )

    def get(self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> Answer:
        """Return the answer to a GET within `timeout` seconds; raises IssuerUnavailable."""
        return self._exchange(requests.Request("GET", url, headers=dict(headers or {})), timeout)

    def post(self, url: str, *, form: Form, headers: Mapping[str, str], timeout: float) -> Answer:
        """Return the answer to a form POST within `timeout` seconds; raises IssuerUnavailable."""
        return self._exchange(requests.Request("POST", url, data=dict(form), headers=dict(headers)), timeout)

    def _exchange(self, request: requests.Request, timeout: float) -> Answer:
        request.headers = {"Accept": "application/json", "Accept-Encoding": "identity", **request.headers}
        # Without an `auth`, requests would replace our Authorization header with credentials from ~/.netrc.
        request.auth = lambda prepared: prepared
        try:
            adapter = _DeadlineAdapter(self._context(), timeout)
        except OSError as error:
            reason = printable(error.strerror or str(error))
            raise IssuerUnavailable(
                f"{request.url} cannot be reached: the CAs cannot be read ({reason})", url=request.url
            ) from None
        watchdog = threading.Timer(timeout, adapter.cut)
        watchdog.daemon = True
        watchdog.start()
        answer = None
        try:
            with requests.Session() as session:
                session.mount("https://", adapter)
                session.mount("http://", adapter)
                # Otherwise requests reads a redirect's whole body without a limit, although it does not follow it.
                session.get_redirect_target = lambda _response: None  # type: ignore[method-assign,assignment]
                answer = self._send(session, request, timeout)
        except IssuerUnavailable:
            raise
        except Exception as error:  # noqa: BLE001  with odd environment variables, the libraries raise many types
            cause, reason = explain(error)
            if not adapter.was_connected and (problem := ambient_problem(str(request.url))):
                raise IssuerUnavailable(
                    f"{request.url} cannot be reached: {problem}", cause="environment", url=request.url
                ) from None
            if not (adapter.was_cut or cause == "timeout"):
                raise IssuerUnavailable(
                    f"{request.url} cannot be reached{_by_proxy(adapter)}: {reason}",
                    was_sent=adapter.was_connected,
                    cause=cause,
                    url=request.url,
                    by_proxy=adapter.used_proxy,
                ) from None
        finally:
            watchdog.cancel()
            adapter.forget()
        # A connection that was cut can look complete, unless the answer states its length.
        is_whole = answer is not None and not {"content-length", "transfer-encoding"}.isdisjoint(
            name.lower() for name in answer.headers
        )
        if answer is None or (adapter.was_cut and not is_whole):
            raise IssuerUnavailable(
                f"{request.url} did not answer within {timeout:g} s{_by_proxy(adapter)}",
                was_sent=adapter.was_connected,
                cause="timeout",
                url=request.url,
                by_proxy=adapter.used_proxy,
            )
        return answer

    def _environment(self, session: requests.Session, url: str) -> dict[str, Any]:
        """Return the environment's settings for proxies and CAs; loopback never goes through a proxy."""
        settings = dict(session.merge_environment_settings(url, {}, True, None, None))
        return settings | {"proxies": {}} if is_loopback(urlsplit(url).hostname) else settings

    def _send(self, session: requests.Session, request: requests.Request, timeout: float) -> Answer:
        prepared = session.prepare_request(request)
        settings = self._environment(session, str(prepared.url))
        with session.send(prepared, timeout=timeout, allow_redirects=False, **settings) as response:
            if response.is_redirect or 300 <= response.status_code < 400:
                raise IssuerUnavailable(
                    f"{request.url} answered with a redirect ({response.status_code})"
                    f"{_target(str(request.url), response.headers.get('Location', ''))}, which we do not follow",
                    cause="redirect",
                    url=request.url,
                )
            body = b""
            # Read until the end: only then does urllib3 notice a body that is shorter than announced.
            while len(body) <= MAX_BODY and (part := response.raw.read(MAX_BODY + 1 - len(body), decode_content=False)):
                body += part
            if len(body) > MAX_BODY:
                raise IssuerUnavailable(f"{request.url} answered with more than {MAX_BODY // 1024} KiB", was_sent=True)
            try:
                body = _decoded(body, response.headers.get("Content-Encoding", ""))
            except ValueError as error:
                raise IssuerUnavailable(f"{request.url} answered {error}", was_sent=True) from None
            return Answer(response.status_code, body, response.headers)


class _DeadlineAdapter(HTTPAdapter):
    """An adapter whose connections another thread can cut.

    A socket's timeout restarts with every byte, so a peer that sends one now and then never exceeds it. `requests` has
    no limit for the whole exchange, so we shut its sockets down.
    """

    def __init__(self, context: ssl.SSLContext, timeout: float) -> None:
        self._context = context
        self._deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.used_proxy = False
        self.was_connected = False
        self.was_cut = False
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._context)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        self.used_proxy = True
        manager = super().proxy_manager_for(proxy, **kwargs, ssl_context=self._context)
        self._watch(manager)
        return manager

    def _watch(self, manager: Any) -> None:
        adapter = self

        class Watched(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return adapter.connect(self.host, self.port)

            def connect(self) -> None:
                super().connect()
                adapter.was_connected = True

        class WatchedTLS(Watched, HTTPSConnection):
            """The same over TLS, where `was_connected` is set after the handshake."""

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Watched

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = WatchedTLS

        manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first address that answers; each gets its share of the remaining time."""
        addresses = _resolve(host.strip("[]"), port, self._deadline - time.monotonic())
        last_error: OSError = TimeoutError("the exchange timed out")
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            left = self._deadline - time.monotonic()
            if left <= 0:
                break
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(left / (len(addresses) - index))
                connection.connect(address)
                connection.settimeout(left)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._register(connection)
            except OSError as error:
                connection.close()
                last_error = error
            else:
                return connection
        raise last_error

    def _register(self, connection: socket.socket) -> None:
        with self._lock:
            if self.was_cut:
                raise TimeoutError("the exchange timed out")
            # A duplicate stays valid when TLS takes over the original, and can shut down the same connection.
            self._sockets.append(connection.dup())

    def cut(self) -> None:
        """Shut down every connection now; readers see the end of the stream."""
        with self._lock:
            self.was_cut = True
            for connection in self._sockets:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def forget(self) -> None:
        """Close the duplicates."""
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()


def _resolve(host: str, port: int, timeout: float) -> list[Any]:
    """Resolve a host within `timeout` seconds: the resolver has no timeout that we could set."""
    found = in_daemon_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return found.result(max(timeout, 0.0))


def _decoded(body: bytes, encoding: str) -> bytes:
    """Undo a Content-Encoding (RFC 9110 §8.4), which some servers use unrequested.

    Raises ValueError when the encoding is unknown, the body is not in it, or the result is longer than `MAX_BODY`.
    """
    codings = [coding for text in encoding.lower().split(",") if (coding := text.strip()) not in ("", "identity")]
    if not codings or not body:
        return body
    if len(codings) > 1 or codings[0] not in ("gzip", "x-gzip", "deflate"):
        raise ValueError("with an unrequested content encoding")
    # Some servers send "deflate" without the zlib frame that RFC 9110 §8.4.1.2 requires.
    is_bare = codings[0] == "deflate" and (body[0] & 0x0F != 8 or int.from_bytes(body[:2]) % 31 != 0)
    window = -zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS + (0 if codings[0] == "deflate" else 16)
    decoded = b""
    try:
        while body and len(decoded) <= MAX_BODY:
            part = zlib.decompressobj(window)
            decoded += part.decompress(body, MAX_BODY + 1 - len(decoded))
            body = part.unused_data  # gzip allows several parts (RFC 1952 §2.2)
            if not part.eof and len(decoded) <= MAX_BODY:
                raise ValueError("with a body that is cut off")
    except zlib.error:
        raise ValueError("with a body that is not in the content encoding that it names") from None
    if len(decoded) > MAX_BODY:
        raise ValueError(f"with more than {MAX_BODY // 1024} KiB")
    return decoded


def _target(url: str, location: str) -> str:
    """Say where a redirect leads, without its query, fragment and user, which may be secret."""
    try:
        parts = urlsplit(urljoin(url, location))
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return ""
    return printable(f" to {parts.scheme}://{host}{parts.path}") if location else ""


_UNKNOWN_CA: Final = (18, 19, 20, 21)  # OpenSSL's X509_V_ERR_… for certificates without a known CA
_TIMEOUTS: Final = (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, which the libraries nest in four different ways."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        reason = getattr(cause, "reason", None)
        nested = next((arg for arg in cause.args if isinstance(arg, BaseException)), None)
        cause = (
            (reason if isinstance(reason, BaseException) else None) or nested or cause.__cause__ or cause.__context__
        )
    return causes


def _by_proxy(adapter: _DeadlineAdapter) -> str:
    return " (through the proxy from the environment)" if adapter.used_proxy else ""


def explain(error: BaseException) -> tuple[Cause, str]:
    """Return the kind of a network error and a short description: the libraries' own messages are nested reprs.

    The kinds are `timeout`, `proxy`, `unknown_ca`, `certificate`, `unknown_host`, `refused`, `no_tls`, and `ended` for
    everything else.
    """
    causes = _causes(error)
    if any(isinstance(cause, _TIMEOUTS) for cause in causes):
        return "timeout", "no answer in time"
    found = next((found for cause in causes if (found := _explain_one(cause))), None)
    return found or ("ended", "the connection failed or ended early")


def _explain_one(cause: BaseException) -> tuple[Cause, str] | None:
    if isinstance(cause, ssl.SSLCertVerificationError):
        is_unknown = cause.verify_code in _UNKNOWN_CA
        kind: Cause = "unknown_ca" if is_unknown else "certificate"
        return kind, f"its certificate is not trusted ({cause.verify_message})"
    if isinstance(cause, socket.gaierror):
        return "unknown_host", "its host name is unknown"
        # Docker gives `localhost` an IPv6 address even without IPv6, and `connect` raises the last address's error.
    if isinstance(cause, ConnectionRefusedError) or getattr(cause, "errno", None) == errno.EADDRNOTAVAIL:
        return "refused", "the connection was refused"
    if isinstance(cause, ssl.SSLError):
        what = getattr(cause, "reason", None) or "handshake failed"  # Python's own errors have no reason
        return "no_tls", f"the server does not speak TLS ({what})"
        # urllib3 has the status of a proxy's refusal only in the message.
    if refusal := re.search(r"Tunnel connection failed: ([0-9]{3})", str(cause)):
        return "proxy", f"the proxy answered {refusal[1]}"
    return None
