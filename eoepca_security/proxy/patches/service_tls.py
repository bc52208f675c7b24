"""TLS with services that trust other CAs than mitmproxy's options say, or whose certificates are not verified."""

from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitmproxy.net import tls
from OpenSSL import SSL

from eoepca_security.proxy.patches import seams


@dataclass(frozen=True)
class Trust:
    """Whom to trust instead: the CAs in `ca_file`, besides those in the system's folder, or everybody if it is None."""

    ca_file: Path | None


_next: ContextVar[Trust | None] = ContextVar("service_tls", default=None)


def use(trust: Trust | None) -> None:
    """Use this for the connection whose `tls_start_server` is running; None leaves it to mitmproxy's options."""
    _next.set(trust)


def install() -> None:
    """Let mitmproxy ask for each connection."""
    seams.replace("mitmproxy.net.tls", "create_proxy_server_context", _create_context)


_create_context_by_options = tls.create_proxy_server_context


def _create_context(**options: Any) -> SSL.Context:
    trust = _next.get()
    if trust is None:
        return _create_context_by_options(**options)
    if trust.ca_file is None:
        # As mitmproxy does for all services with ssl_insecure.
        options |= {"verify": tls.Verify.VERIFY_NONE, "legacy_server_connect": True}
    else:
        options |= {"ca_pemfile": str(trust.ca_file)}
    return _create_context_by_options(**options)
