"""HTTP with bounds: one exchange that ends in time, reads no more than it should, and goes nowhere else."""

import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from eoepca_security.errors import IssuerUnavailable

MAX_BODY: Final = 256 * 1024
"""Longest answer that is read, in bytes."""

CONNECT_TIMEOUT: Final = 5.0
"""How long making a connection to one address may take, in seconds."""


@dataclass(frozen=True)
class Answer:
    """An HTTP response, not shown because its body may carry tokens."""

    status: int
    body: bytes = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Transport(Protocol):
    """What the provider needs of the network; raises IssuerUnavailable when there is no whole answer in time."""

    def get(self, url: str, *, timeout: float) -> Answer:
        """Return the answer to a GET within `timeout` seconds."""

    def post(self, url: str, *, form: Mapping[str, str], headers: Mapping[str, str], timeout: float) -> Answer:
        """Return the answer to a form POST within `timeout` seconds."""


def trust(ca_file: Path | None = None) -> ssl.SSLContext:
    """Return a client context that trusts the system's CAs, certifi's, and those in `ca_file`.

    Raises OSError (ssl.SSLError is one) when `ca_file` cannot be used.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context


class HttpTransport:
    """The real network, through `requests`: no redirects, no ambient credentials, every bound enforced."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    def get(self, url: str, *, timeout: float) -> Answer:
        """Return the answer to a GET within `timeout` seconds; raises IssuerUnavailable."""
        return self._exchange(requests.Request("GET", url), timeout)

    def post(self, url: str, *, form: Mapping[str, str], headers: Mapping[str, str], timeout: float) -> Answer:
        """Return the answer to a form POST within `timeout` seconds; raises IssuerUnavailable."""
        return self._exchange(requests.Request("POST", url, data=dict(form), headers=dict(headers)), timeout)

    def _exchange(self, request: requests.Request, timeout: float) -> Answer:
        request.headers = {"Accept": "application/json", "Accept-Encoding": "identity", **request.headers}
        # requests would overwrite our Authorization header with what ~/.netrc has for the host; an `auth` stops it.
        request.auth = lambda prepared: prepared
        adapter = _DeadlineAdapter(self._context)
        watchdog = threading.Timer(timeout, adapter.cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            with requests.Session() as session:
                session.mount("https://", adapter)
                session.mount("http://", adapter)
                return self._send(session, request, timeout)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if adapter.was_cut or isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
                raise IssuerUnavailable(f"{request.url} did not answer within {timeout:g} s") from None
            raise IssuerUnavailable(f"{request.url} cannot be reached: {_reason(error)}") from None
        finally:
            watchdog.cancel()
            adapter.forget()

    def _send(self, session: requests.Session, request: requests.Request, timeout: float) -> Answer:
        prepared = session.prepare_request(request)
        settings = session.merge_environment_settings(prepared.url, {}, True, None, None)
        with session.send(
            prepared, timeout=(min(CONNECT_TIMEOUT, timeout), timeout), allow_redirects=False, **settings
        ) as response:
            if response.is_redirect or 300 <= response.status_code < 400:
                raise IssuerUnavailable(
                    f"{request.url} answered with a redirect ({response.status_code}), which is not followed: "
                    "set OPEN_ID_CONNECT_URL to the final address"
                )
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise IssuerUnavailable(f"{request.url} answered in an encoding that was not asked for")
            body = response.raw.read(MAX_BODY + 1, decode_content=False)
            if len(body) > MAX_BODY:
                raise IssuerUnavailable(f"{request.url} answered with more than {MAX_BODY // 1024} KiB")
            return Answer(response.status_code, body, response.headers)


class _DeadlineAdapter(HTTPAdapter):
    """An adapter whose connections can all be cut from another thread.

    A socket's timeout starts anew with every byte, so a peer that sends one now and then is never late. `requests`
    offers no bound on the whole exchange; shutting its sockets down is one.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.was_cut = False
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._context)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs, ssl_context=self._context)
        self._watch(manager)
        return manager

    def _watch(self, manager: Any) -> None:
        adapter = self

        class Plain(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return adapter.register(super()._new_conn())

        class Secure(HTTPSConnection):
            def _new_conn(self) -> socket.socket:
                return adapter.register(super()._new_conn())

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = Secure

        manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

    def register(self, connection: socket.socket) -> socket.socket:
        """Remember a new connection, or refuse it when time is up."""
        with self._lock:
            if self.was_cut:
                connection.close()
                raise TimeoutError("the exchange's time is up")
            # A duplicate stays valid when TLS takes the original over, and shuts down the same connection.
            self._sockets.append(connection.dup())
        return connection

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


def _reason(error: Exception) -> str:
    """Say what went wrong in a few words; the library's own message is a nest of reprs."""
    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        reason = getattr(cause, "reason", None)
        nested = next((arg for arg in cause.args if isinstance(arg, BaseException)), None)
        cause = (
            (reason if isinstance(reason, BaseException) else None) or nested or cause.__cause__ or cause.__context__
        )
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message}); TLS_CA_FILE adds a CA"
        if isinstance(cause, socket.gaierror):
            return "its host name is not known"
        if isinstance(cause, ConnectionRefusedError):
            return "the connection was refused"
        if isinstance(cause, ssl.SSLError):
            return f"no TLS there ({cause.reason or 'handshake failed'}); is it http:// rather than https://?"
    return "the connection failed or ended early"


def ca_bundle(ca_file: Path) -> str:
    """Return in PEM form what `trust(ca_file)` trusts, for programs that want a file; raises OSError.

    The system's folder of CAs, where it has one beside its file, is not in it.
    """
    system = ssl.get_default_verify_paths().cafile
    files = [Path(requests.utils.DEFAULT_CA_BUNDLE_PATH), ca_file, *([Path(system)] if system else [])]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
