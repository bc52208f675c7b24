"""The requests that `check` sends to the issuer, the service and the program on our port."""

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
from eoepca_security.proxy.config.settings import Service
from eoepca_security.proxy.policy.access import PROBE_HOST
from eoepca_security.proxy.policy.problem_details import ERROR_HEADER
from eoepca_security.proxy.policy.remedies import Reply

UPSTREAM_TIMEOUT: Final = 10.0
"""The time limit in seconds for the whole request to the protected service."""

PROBE_TIMEOUT: Final = 2.0
"""The time limit in seconds for the program on our port to answer."""

NETWORK_ERRORS: Final = (OSError, http.client.HTTPException, ValueError)
"""What a request may raise."""

T = TypeVar("T")


class Recorder:
    """A transport that records the last answer, and how far its date is ahead of our clock."""

    def __init__(self, transport: Transport, now: Callable[[], float]) -> None:
        self._transport = transport
        self._now = now
        self.last: Reply | None = None
        self.skew: float | None = None

    def get(self, url: str, **options: Any) -> Answer:
        """Do the same as the transport, and record the answer."""
        return self._note(lambda: self._transport.get(url, **options))

    def post(self, url: str, **options: Any) -> Answer:
        """Do the same as the transport, and record the answer."""
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
        # The date is from between sending and receiving, in whole seconds.
        self.skew = max(date - self._now(), 0.0) + min(date + 1 - sent_at, 0.0)
        return answer


def bounded(function: Callable[[], T], timeout: float) -> T:
    """Call a function that only limits its single steps; raises TimeoutError after `timeout` seconds."""

    async def call() -> T:
        async with asyncio.timeout(timeout):
            return await in_thread(function)

    return asyncio.run(call())


def ask(service: Service, target: str, token: str | None) -> Reply:
    """Send a GET for `target` to a service like the proxy does: directly, ignoring HTTPS_PROXY.

    With None, the request has no token.
    """
    parts = urlsplit(service.upstream)
    host, port = parts.hostname or "", parts.port
    connection = http.client.HTTPConnection(host, port, timeout=UPSTREAM_TIMEOUT)
    if parts.scheme == "https":
        context = trust(service.ca_file)
        if service.tls_no_verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=UPSTREAM_TIMEOUT, context=context)
    try:
        credentials = {service.header: service.header_value(token)} if token is not None else {}
        connection.request("GET", target, headers={**credentials, "Accept": "*/*"})
        response = connection.getresponse()
        headers = {name.lower(): response.getheader(name, "") for name, _ in response.getheaders()}
        return Reply(response.status, headers, response.read(4096) if response.status == 400 else b"")
    finally:
        connection.close()


def is_our_proxy(host: str, port: int) -> bool:
    """Return whether an OIDC proxy listens there: it answers to `PROBE_HOST` with its error header.

    That leaves no trace in the proxy.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared with, not bound to

    def ask() -> bool:
        connection = http.client.HTTPConnection(host, port, timeout=PROBE_TIMEOUT)
        try:
            connection.request("HEAD", "/", headers={"Host": PROBE_HOST})
            return connection.getresponse().getheader(ERROR_HEADER) is not None
        finally:
            connection.close()

    try:
        return bounded(ask, PROBE_TIMEOUT)
    except (OSError, http.client.HTTPException):
        return False
