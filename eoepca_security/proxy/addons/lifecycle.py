"""Start and end."""

import logging
from typing import Final

from mitmproxy import ctx

from eoepca_security.errors import CredentialsRejected, TokenError

logger = logging.getLogger("eoepca_security.proxy.addon")


def _shut_down() -> None:
    ctx.master.shutdown()


def _exit_if_rejected(_listener: str, failure: TokenError | None) -> None:
    if isinstance(failure, CredentialsRejected):
        # The source has told it at length.
        logger.error("ending, as there can be no token (%s): `run-mitmproxy.py check` says what to do", failure.code)


STARTED: Final = "OIDC proxy listening at %s -> %s as %s; access tokens live %d s"
"""The line that says that the proxy works: its URL, the service, whose token it is, seconds."""
