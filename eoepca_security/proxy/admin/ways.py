"""The addresses by which clients reach the proxy and its services. Pure."""

import shlex
from typing import Final
from urllib.parse import urlsplit

from eoepca_security.oauth.urls import EVERYWHERE, Host, is_loopback, parse_host
from eoepca_security.proxy.config.services import DEFAULT
from eoepca_security.proxy.config.settings import Service, Settings

MAX_LINES: Final = 20
"""For how many services the log says at the start how to reach them."""


def on_this_machine(listener: str) -> str:
    """Return the URL of a listener for a client on this machine: nobody can call all addresses at once."""
    parts = urlsplit(listener)
    return f"http://localhost:{parts.port}" if parts.hostname in EVERYWHERE else listener


def called(listener: str, settings: Settings) -> str:
    """Return the URL of the proxy at `listener` by a name that it answers to."""
    base, parts = on_this_machine(listener), urlsplit(listener)
    names = settings.allowed_hosts
    if names and not {"*", "localhost", parts.hostname} & set(names):
        base = f"http://{names[0]}" if ":" in names[0].rpartition("]")[2] else f"http://{names[0]}:{parts.port}"
    return base


def ways_in(service: Service, listener: str, settings: Settings) -> tuple[str, ...]:
    """Return the addresses of a service at the proxy: URLs, and names to call it by at the port that all share.

    What works best is first. `listener` is the URL of the port that all services share.
    """
    parts, base = urlsplit(listener), called(listener, settings)
    if settings.mode == "forward":
        return (f"{service.upstream}{service.path}",)
    if settings.services_file is None:
        return (base,)
    own_name = f"http://{Host(service.own_name, parts.port)}"
    # Programs on this machine take *.localhost for loopback, where the proxy may not listen.
    ways = [own_name] if parts.hostname in EVERYWHERE or is_loopback(parts.hostname) else []
    if len(settings.services) == 1 or service.name == DEFAULT:
        ways.append(base)
    if service.port is not None:
        names = settings.allowed_hosts
        is_localhost = is_loopback(urlsplit(base).hostname) and (not names or {"*", "localhost"} & set(names))
        host = "localhost" if is_localhost else parse_host(urlsplit(base).netloc).name
        ways.append(f"http://{Host(host, service.port)}")
    return (*ways, *service.hosts) or (own_name,)


def example(listener: str, settings: Settings) -> str:
    """Return a command that sends a request through the proxy at `listener`, by a name that it answers to."""
    if settings.mode == "forward" or settings.inject_hosts:
        return _forward_example(on_this_machine(listener), settings)
    if settings.services_file is None:
        return f"curl -i {shlex.quote(called(listener, settings) + settings.endpoint)}"
    service = settings.services[0]
    way = ways_in(service, listener, settings)[0]
    base = way if "://" in way else f"http://{Host(way, urlsplit(listener).port)}"
    # The endpoint is a path of the service that the settings without a file describe.
    return f"curl -i {shlex.quote(base + (settings.endpoint if settings.upstream is not None else '/'))}"


def _forward_example(proxy: str, settings: Settings) -> str:
    path = settings.endpoint if settings.upstream is not None else "/"
    services = [f"{service.upstream}{service.path}{path}" for service in settings.services[:1]]
    url = [*services, *(f"https://{host}/" for host in settings.inject_hosts)][0]
    password = " --proxy-user USER:PASSWORD" if settings.proxy_auth is not None else ""
    ca = " --cacert ~/.mitmproxy/mitmproxy-ca-cert.pem" if url.startswith("https:") else ""
    return f"curl --proxy {proxy}{password}{ca} {shlex.quote(url)}"


def forward_destination(settings: Settings) -> str:
    """Return the hosts that get tokens in forward mode; only so many."""
    sites = (service.upstream.partition("://")[2] for service in settings.services)
    hosts = list(dict.fromkeys((*sites, *settings.inject_hosts)))
    more = [f"and {len(hosts) - MAX_LINES} more"] if len(hosts) > MAX_LINES else []
    return ", ".join([*hosts[:MAX_LINES], *more])


def destination(settings: Settings) -> str:
    """Return where a proxy with a file of services forwards to, in a few words."""
    if settings.mode == "forward":
        return forward_destination(settings)
    first, *others = settings.services
    return f"{len(settings.services)} services" if others else f"{first.upstream}{first.path}"


def service_lines(listener: str, settings: Settings) -> list[str]:
    """Return for each service of the file, in one line, how to reach it and where it is; only so many lines."""
    if settings.services_file is None or settings.mode == "forward":
        return []
    lines = []
    for service in settings.services[:MAX_LINES]:
        first, *others = ways_in(service, listener, settings)
        also = f" (also {', '.join(others)})" if others else ""
        lines.append(f"service {service.name}: {first}{also} -> {service.upstream}{service.path}")
    if (more := len(settings.services) - MAX_LINES) > 0:
        lines.append(f"and {more} more: see the status page")
    return lines
