"""What `check` asks of the issuer, the service and whatever has our port."""

import asyncio
import http.client
import ssl
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from eoepca_security.issuer.ca_trust import trust
from eoepca_security.issuer.threads import in_thread
from eoepca_security.issuer.transport import Answer, Transport
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.policy.remedies import Reply

UPSTREAM_TIMEOUT: Final = 10.0
"""Seconds that the protected service may take, as a whole."""

PROBE_TIMEOUT: Final = 2.0
"""Seconds that whatever has our port may take to say what it is."""

T = TypeVar("T")


class Recorder:
    """A transport that remembers the last answer, and how far the issuer's clock was ahead of ours by its date."""

    def __init__(self, transport: Transport, now: Callable[[], float]) -> None:
        self._transport = transport
        self._now = now
        self.last: Reply | None = None
        self.skew: float | None = None

    def get(self, url: str, **options: Any) -> Answer:
        """Do as the transport does."""
        return self._note(lambda: self._transport.get(url, **options))

    def post(self, url: str, **options: Any) -> Answer:
        """Do as the transport does."""
        return self._note(lambda: self._transport.post(url, **options))

    def _note(self, exchange: Callable[[], Answer]) -> Answer:
        self.last, sent_at = None, self._now()
        answer = exchange()
        headers = {name.lower(): value for name, value in answer.headers.items()}
        self.last = Reply(answer.status, headers, answer.body[:4096])
        try:
            date = parsedate_to_datetime(headers.get("date", "")).timestamp()
        except ValueError:
            return answer
        # It was made at some moment in between, and has lost its fraction of a second.
        self.skew = max(date - self._now(), 0.0) + min(date + 1 - sent_at, 0.0)
        return answer


def bounded(function: Callable[[], T], timeout: float) -> T:
    """Call what has a bound for each of its steps only; raises TimeoutError after so many seconds."""

    async def call() -> T:
        async with asyncio.timeout(timeout):
            return await in_thread(function)

    return asyncio.run(call())


def ask(settings: Settings, token: str) -> Reply:
    """Ask the protected service as the proxy does: directly, whatever HTTPS_PROXY says."""
    parts = urlsplit(str(settings.upstream))
    host, port = parts.hostname or "", parts.port
    connection = http.client.HTTPConnection(host, port, timeout=UPSTREAM_TIMEOUT)
    if parts.scheme == "https":
        context = trust(settings.ca_file)
        if settings.tls_no_verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=UPSTREAM_TIMEOUT, context=context)
    try:
        connection.request("GET", settings.endpoint, headers={"Authorization": f"Bearer {token}", "Accept": "*/*"})
        response = connection.getresponse()
        headers = {name.lower(): response.getheader(name, "") for name, _ in response.getheaders()}
        return Reply(response.status, headers, response.read(4096) if response.status == 400 else b"")
    finally:
        connection.close()


def is_our_proxy(host: str, port: int) -> bool:
    """Tell whether what listens there answers as our proxies do to a name that is not theirs."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared with, not bound to

    def ask() -> bool:
        connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT)
        try:
            connection.request("HEAD", "/", headers={"Host": "check.invalid"})
            return connection.getresponse().getheader("X-OIDC-Proxy-Error") is not None
        finally:
            connection.close()

    try:
        return bounded(ask, PROBE_TIMEOUT)
    except (OSError, http.client.HTTPException):
        return False
