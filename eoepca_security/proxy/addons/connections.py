"""Connections to services: which host's certificate to verify, and which connections to pass through."""

import logging

from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers import TCPLayer
from mitmproxy.proxy.mode_specs import RegularMode, ReverseMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from eoepca_security.oauth.text import printable
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.policy.destination import may_inject

logger = logging.getLogger("eoepca_security.proxy.addon")


class Connections:
    """Decides about each connection to a service when it is made."""

    def __init__(self, state: State) -> None:
        self._state = state

    def server_connect(self, data: ServerConnectionHookData) -> None:
        """Verify the certificate for the host that gets the token, not for a host in the client's own TLS handshake."""
        server, address = data.server, data.server.address
        is_reverse = isinstance(data.client.proxy_mode, ReverseMode)
        if address is not None and (is_reverse or may_inject(self._state.settings, "https", *address[:2])):
            server.sni = address[0]

    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        """Log why the service cannot be reached; the client gets a 502 with a code."""
        # mitmproxy also ends the attempt when the client hangs up, which says nothing about the service.
        if data.client.timestamp_end is not None:
            return
        logger.warning(
            "the protected service cannot be reached: %s; run `run-mitmproxy.py check` for the remedy",
            printable(data.server.error),
        )

    def next_layer(self, data: NextLayer) -> None:
        """In forward mode, pass connections to hosts that get no token through untouched."""
        context, address = data.context, data.context.server.address
        if data.layer is not None or address is None or not isinstance(context.client.proxy_mode, RegularMode):
            return
        if not any(may_inject(self._state.settings, scheme, *address[:2]) for scheme in ("http", "https")):
            data.layer = TCPLayer(context, ignore=True)
