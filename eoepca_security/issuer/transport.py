"""HTTP with bounds: one exchange that ends in time, reads no more than it should, and goes nowhere else."""

import errno
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from eoepca_security.errors import Cause, IssuerUnavailable
from eoepca_security.issuer.threads import in_daemon_thread
from eoepca_security.oauth.urls import is_loopback

MAX_BODY: Final = 256 * 1024
"""Longest answer that is read, in bytes."""


T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """An HTTP response, not shown because its body may carry tokens."""

    status: int
    body: bytes = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Transport(Protocol):
    """What the provider needs of the network; raises IssuerUnavailable when there is no whole answer in time."""

    def get(self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> Answer:
        """Return the answer to a GET within `timeout` seconds."""

    def post(self, url: str, *, form: Mapping[str, str], headers: Mapping[str, str], timeout: float) -> Answer:
        """Return the answer to a form POST within `timeout` seconds."""


class HttpTransport:
    """The real network, through `requests`: no redirects, no ambient credentials, every bound enforced.

    `context` says whom to trust, or is a function that does, called once when that is needed: reading all CAs takes
    a while.
    """

    def __init__(self, context: ssl.SSLContext | Callable[[], ssl.SSLContext]) -> None:
        self._context: Callable[[], ssl.SSLContext] = (
            (lambda: context) if isinstance(context, ssl.SSLContext) else cache(context)
        )

    def get(self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> Answer:
        """Return the answer to a GET within `timeout` seconds; raises IssuerUnavailable."""
        return self._exchange(requests.Request("GET", url, headers=dict(headers or {})), timeout)

    def post(self, url: str, *, form: Mapping[str, str], headers: Mapping[str, str], timeout: float) -> Answer:
        """Return the answer to a form POST within `timeout` seconds; raises IssuerUnavailable."""
        return self._exchange(requests.Request("POST", url, data=dict(form), headers=dict(headers)), timeout)

    def _exchange(self, request: requests.Request, timeout: float) -> Answer:
        request.headers = {"Accept": "application/json", "Accept-Encoding": "identity", **request.headers}
        # requests would overwrite our Authorization header with what ~/.netrc has for the host; an `auth` stops it.
        request.auth = lambda prepared: prepared
        try:
            adapter = _DeadlineAdapter(self._context(), timeout)
        except OSError as error:
            raise IssuerUnavailable(
                f"{request.url} cannot be reached: the CAs cannot be read ({error})", url=request.url
            ) from None
        watchdog = threading.Timer(timeout, adapter.cut)
        watchdog.daemon = True
        watchdog.start()
        answer = None
        try:
            with requests.Session() as session:
                session.mount("https://", adapter)
                session.mount("http://", adapter)
                # Or requests reads a redirect's whole body, without any bound, though it is not followed.
                session.get_redirect_target = lambda _response: None  # type: ignore[method-assign,assignment]
                answer = self._send(session, request, timeout)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            cause, reason = explain(error)
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
        # A connection that was cut may look like one that ended well, unless the answer says where it ends.
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
        """Return what the environment says of proxies and CAs; this machine itself is behind no proxy."""
        settings = dict(session.merge_environment_settings(url, {}, True, None, None))
        return settings | {"proxies": {}} if is_loopback(urlsplit(url).hostname) else settings

    def _send(self, session: requests.Session, request: requests.Request, timeout: float) -> Answer:
        prepared = session.prepare_request(request)
        settings = self._environment(session, str(prepared.url))
        with session.send(prepared, timeout=timeout, allow_redirects=False, **settings) as response:
            if response.is_redirect or 300 <= response.status_code < 400:
                raise IssuerUnavailable(
                    f"{request.url} answered with a redirect ({response.status_code}), which is not followed",
                    cause="redirect",
                    url=request.url,
                )
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise IssuerUnavailable(f"{request.url} answered in an encoding that was not asked for", was_sent=True)
            body = b""
            # Read until nothing comes: only then a body that is shorter than announced is noticed.
            while len(body) <= MAX_BODY and (part := response.raw.read(MAX_BODY + 1 - len(body), decode_content=False)):
                body += part
            if len(body) > MAX_BODY:
                raise IssuerUnavailable(f"{request.url} answered with more than {MAX_BODY // 1024} KiB", was_sent=True)
            return Answer(response.status_code, body, response.headers)


class _DeadlineAdapter(HTTPAdapter):
    """An adapter whose connections can all be cut from another thread.

    A socket's timeout starts anew with every byte, so a peer that sends one now and then is never late. `requests`
    offers no bound on the whole exchange; shutting its sockets down is one.
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
            """The same over TLS; connected is then after the handshake."""

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Watched

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = WatchedTLS

        manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first address that answers; each has its share of the time that is left."""
        addresses = _resolve(host.strip("[]"), port, self._deadline - time.monotonic())
        failure: OSError = TimeoutError("the exchange's time is up")
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
                failure = error
            else:
                return connection
        raise failure

    def _register(self, connection: socket.socket) -> None:
        with self._lock:
            if self.was_cut:
                raise TimeoutError("the exchange's time is up")
            # A duplicate stays valid when TLS takes the original over, and shuts down the same connection.
            self._sockets.append(connection.dup())

    def cut(self) -> None:
        """End every connection now; whoever reads from one sees its end."""
        with self._lock:
            self.was_cut = True
            for connection in self._sockets:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def forget(self) -> None:
        """Let go of the duplicates."""
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()


def _resolve(host: str, port: int, timeout: float) -> list[Any]:
    """Look an address up within `timeout` seconds: the resolver has no bound of its own that could be set."""
    found = in_daemon_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return found.result(max(timeout, 0.0))


_UNKNOWN_CA: Final = (18, 19, 20, 21)  # OpenSSL's X509_V_ERR_… for certificates that lead to no known CA
_TIMEOUTS: Final = (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what is behind it; the libraries nest them in four different ways."""
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
    return " (through the proxy that the environment names)" if adapter.used_proxy else ""


def explain(error: BaseException) -> tuple[Cause, str]:
    """Return what kind of trouble the network had, and in a few words what: the libraries' messages are nests of reprs.

    The kinds are `timeout`, `proxy`, `unknown_ca`, `certificate`, `unknown_host`, `refused`, `no_tls`, and `ended` for
    all else.
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
        return "unknown_host", "its host name is not known"
    # Docker gives `localhost` an IPv6 address where there is no IPv6, too, and the last failure is what is told.
    if isinstance(cause, ConnectionRefusedError) or getattr(cause, "errno", None) == errno.EADDRNOTAVAIL:
        return "refused", "the connection was refused"
    if isinstance(cause, ssl.SSLError):
        what = getattr(cause, "reason", None) or "handshake failed"  # Python's own have none
        return "no_tls", f"no TLS there ({what})"
    # The library keeps the status of a proxy's refusal in the words alone.
    if refusal := re.search(r"Tunnel connection failed: ([0-9]{3})", str(cause)):
        return "proxy", f"the proxy answered {refusal[1]}"
    return None
