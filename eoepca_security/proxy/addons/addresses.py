"""Where the proxy listens and where it forwards to."""

from urllib.parse import urlsplit

from mitmproxy import ctx
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode

from eoepca_security.oauth.urls import EVERYWHERE, LOOPBACK_NAMES
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import ALLOWED_HOSTS


def addresses(settings: Settings | None) -> tuple[str, str]:
    """Return the proxy's URL, and the service's URL or, in forward mode, the hosts that get the token."""
    server = ctx.master.addons.get("proxyserver")
    listening = server.listen_addrs() if isinstance(server, Proxyserver) else []
    host, port = listening[0][:2] if listening else ("nowhere", 0)
    mode = ProxyMode.parse(ctx.options.mode[0])
    upstream = mode.data
    if settings is not None and isinstance(mode, RegularMode):
        upstream = ", ".join(settings.inject_hosts)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}", upstream


def exposure(listener: str, settings: Settings) -> str:
    """Return a warning about listening beyond this machine, in one line."""
    line = f"anything that can reach {listener} acts with this identity: listen on 127.0.0.1 if you can"
    if urlsplit(listener).hostname in EVERYWHERE and not settings.allowed_hosts:
        line += f"; it only accepts the names {', '.join(LOOPBACK_NAMES)}, because {ALLOWED_HOSTS.env} is unset"
    return line
