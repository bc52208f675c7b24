"""Listening on sockets that other processes listen on, too."""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mitmproxy.proxy.mode_servers import AsyncioServerInstance

from eoepca_security.proxy.patches import seams

_BACKLOG: Final = 128


def share_listeners(own_host: str, listeners: Mapping[int, Sequence[socket.socket]]) -> None:
    """Let mitmproxy's servers in this process use `listeners`, by port, where they are to listen on `own_host`.

    They take TCP connections only, not QUIC, which has no such queue.
    """
    listen = AsyncioServerInstance.listen

    async def listen_together(instance: AsyncioServerInstance[Any], host: str, port: int) -> list[Any]:
        if host != own_host or port not in listeners:
            return await listen(instance, host, port)
        servers = []
        for listener in listeners[port]:
            # asyncio would take as many connections as its backlog at once, and leave the other processes idle.
            servers.append(await asyncio.start_server(instance.handle_stream, sock=listener, backlog=1))
            listener.listen(_BACKLOG)
        return servers

    seams.replace("mitmproxy.proxy.mode_servers:AsyncioServerInstance", "listen", listen_together)
