"""Connections: for which host to verify the certificate, and how long clients and services may be away."""

import asyncio
import logging

from mitmproxy import ctx
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.connection import Client, Connection, Server
from mitmproxy.proxy.mode_specs import ReverseMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.tls import TlsData

from eoepca_security.oauth.text import printable
from eoepca_security.proxy.addons.destinations import gets_a_token
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.settings import Service, Site
from eoepca_security.proxy.patches import client_timeout, service_tls

logger = logging.getLogger("eoepca_security.proxy.addon")


class Connections:
    """Decides about each connection to a service when it is made, and watches those of clients."""

    def __init__(self, state: State) -> None:
        self._state = state

    def client_connected(self, client: Client) -> None:
        """Have the system end the connection of a client that is gone, or does not read its answers."""
        if (streams := _streams(client, client)) is not None:
            client_timeout.watch(client, *streams)

    def server_connected(self, data: ServerConnectionHookData) -> None:
        """Have the system notice that a service is gone: it may be silent while a client listens to it."""
        if (streams := _streams(data.client, data.server)) is not None:
            client_timeout.keep_alive(streams[1])

    def server_connect(self, data: ServerConnectionHookData) -> None:
        """Verify the certificate for the host that gets the token, not for a host in the client's own TLS handshake."""
        if self._is_to_a_service(data) and data.server.address is not None:
            data.server.sni = data.server.address[0]

    def tls_start_server(self, data: TlsData) -> None:
        """Trust whom the service's settings say. mitmproxy makes the connection after that, in the same task."""
        address = data.conn.address if isinstance(data.conn, Server) else None
        site = Site("https", address[0].lower(), address[1]) if address is not None else None
        service_tls.use(self._state.trust.get(site) if site is not None else None)

    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        """Log why the service cannot be reached; the client gets a 502 with a code."""
        # mitmproxy also ends the attempt when the client hangs up, which says nothing about the service.
        if data.client.timestamp_end is not None or not self._is_to_a_service(data):
            return
        settings = self._state.settings
        remedy = f"; {settings.command.run('check')} for the remedy" if settings is not None else ""
        logger.warning("%s cannot be reached: %s%s", self._whom(data.server), printable(data.server.error), remedy)

    def _whom(self, server: Server) -> str:
        """Return what to call the other end: a connection may be for several services, whose paths differ."""
        services: tuple[Service, ...] = ()
        if self._state.routes is not None and server.address is not None:
            services = self._state.routes.at_site("https" if server.tls else "http", *server.address[:2])
        names = [name for service in services if (name := self._state.name_of(service))]
        if not names:
            return "the protected service"
        return f"the protected service {names[0]}" if len(names) == 1 else f"the protected services {', '.join(names)}"

    def _is_to_a_service(self, data: ServerConnectionHookData) -> bool:
        address = data.server.address
        is_reverse = isinstance(data.client.proxy_mode, ReverseMode)
        return is_reverse or (address is not None and gets_a_token(self._state, *address[:2]))


def _streams(client: Client, connection: Connection) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """Return what reads from and writes to one of a client's connections, if it is TCP."""
    server = ctx.master.addons.get("proxyserver")
    handler = server.connections.get(client.id) if isinstance(server, Proxyserver) else None
    io = handler.transports.get(connection) if handler is not None else None
    if io is None or not (isinstance(io.reader, asyncio.StreamReader) and isinstance(io.writer, asyncio.StreamWriter)):
        return None
    return io.reader, io.writer
