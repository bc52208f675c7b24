"""Where the proxy listens and where it forwards to."""

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mitmproxy import ctx
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.options import CONF_BASENAME
from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode

from eoepca_security.oauth.urls import ANY_LOCALHOST, EVERYWHERE, LOOPBACK_NAMES, Host
from eoepca_security.proxy.admin.ways import destination, forward_destination
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import ALLOWED_HOSTS
from eoepca_security.proxy.policy.access import Guard


def addresses(settings: Settings | None) -> tuple[str, str]:
    """Return the proxy's URL, and the service's URL or how many there are; in forward mode, the hosts with tokens."""
    server = ctx.master.addons.get("proxyserver")
    listening = server.listen_addrs() if isinstance(server, Proxyserver) else []
    host, port = listening[0][:2] if listening else ("nowhere", 0)
    mode = ProxyMode.parse(ctx.options.mode[0])
    upstream = mode.data
    if settings is not None and isinstance(mode, RegularMode):
        upstream = forward_destination(settings)
    elif settings is not None and settings.services_file is not None:
        upstream = destination(settings)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}", upstream


def browser_address(listener: str, upstream: str, guard: Guard, services: Sequence[Service] = ()) -> str | None:
    """Return the URL for a browser, or None if the proxy has no such name, or several.

    Browsers keep cookies apart by name, not by port. So it has a name of its own, after the service, in place of the
    one that all programs of this machine share. `services` are those of a file, which have names.
    """
    url, service = urlsplit(listener), urlsplit(upstream).hostname
    if url.hostname not in ("127.0.0.1", "::1") or service is None or len(services) > 1:
        return None
    if services:
        return f"http://{Host(services[0].own_name, url.port)}"
    label, dot, _ = service.partition(".")
    is_name = dot and not re.fullmatch(r"[0-9.]+", service)
    host = Host(f"{label if is_name else 'service'}.localhost", url.port)
    return f"http://{host}" if guard.allows(host) else None


def ca_for_clients() -> Path | None:
    """Return the file with the CA that clients must trust in forward mode, or None."""
    if not isinstance(ProxyMode.parse(ctx.options.mode[0]), RegularMode):
        return None
    return Path(ctx.options.confdir).expanduser() / f"{CONF_BASENAME}-ca-cert.pem"


def exposure(listener: str, settings: Settings) -> str:
    """Return a warning about listening beyond this machine, in one line."""
    if settings.proxy_auth is not None:
        return (
            f"clients send the proxy's password to {listener} in plain http: anyone on the network path can read it "
            "and act with this identity"
        )
    line = f"anything that can reach {listener} acts with this identity: listen on 127.0.0.1 if you can"
    if urlsplit(listener).hostname in EVERYWHERE and not settings.allowed_hosts:
        names = ", ".join((*LOOPBACK_NAMES, ANY_LOCALHOST))
        line += f"; it only accepts the names {names}, because {ALLOWED_HOSTS.env} is unset"
    return line
