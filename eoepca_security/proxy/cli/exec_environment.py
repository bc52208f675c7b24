"""The environment of a command that `exec` starts: the proxy, CAs, and none of our secrets. Pure, but for the CAs."""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import requests

from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import VARIABLES

PROXIES: Final = ("http_proxy", "https_proxy")
"""The variables with the proxy's address, which most programs read. Programs differ in the case that they read."""

BYPASS: Final = "no_proxy"
"""The variable with the hosts that are called without the proxy."""

CA_FILES: Final = (
    "SSL_CERT_FILE",  # OpenSSL, and with it Python, R and Ruby; Go, httpx, uv
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",  # curl, GDAL, R
    "GDAL_CURL_CA_BUNDLE",  # fiona and pyogrio set these two to certifi's, unless they are set
    "PROJ_CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "DENO_CERT",
    "AWS_CA_BUNDLE",
    "PIP_CERT",
    "CARGO_HTTP_CAINFO",
    "HTTPLIB2_CA_CERTS",
    "JULIA_SSL_CA_ROOTS_PATH",
)
"""The variables with a file of CAs."""

SYSTEM_CAS: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # macOS, BSD
)
"""Where systems keep their CAs in one file. Python's own OpenSSL may only know a folder of them."""

_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def inherited_proxies(environ: Mapping[str, str]) -> Iterator[str]:
    """Return the variables that name another proxy, through which our own proxy would not go."""
    names = [spelled for name in (*PROXIES, "all_proxy") for spelled in (name, name.upper())]
    return (name for name in names if environ.get(name))


def environment(environ: Mapping[str, str], settings: Settings, proxy_url: str, ca_file: Path) -> dict[str, str]:
    """Return the environment for a command. `proxy_url` has the password, and `ca_file` has all CAs to trust."""
    secrets = {variable.env for variable in VARIABLES if variable.secret}
    both = {BYPASS, BYPASS.upper()}
    new = {name: value for name, value in environ.items() if name not in secrets | both}
    for name in PROXIES:
        new |= dict.fromkeys((name, name.upper()), proxy_url)
    if bypassed := ",".join(_bypassed(environ, set(_hosts(settings)))):
        new |= dict.fromkeys(both, bypassed)
    new |= dict.fromkeys(CA_FILES, str(ca_file))
    new["NODE_USE_ENV_PROXY"] = "1"
    for service in settings.services:
        new[f"OIDC_PROXY_URL_{service.name.upper().replace('-', '_')}"] = service.upstream + service.path
    return new


def joined_cas(environ: Mapping[str, str], *more: Path) -> bytes:
    """Return the CAs of the system, of certifi, of the files that `environ` names, and of `more`, each once, as PEM.

    Raises OSError if one of `more` cannot be read.
    """
    usual = [requests.utils.DEFAULT_CA_BUNDLE_PATH, *SYSTEM_CAS, *(environ.get(name, "") for name in CA_FILES)]
    files = [Path(file) for file in usual if file and Path(file).is_file()]
    certificates: dict[bytes, None] = {}
    for file in dict.fromkeys((*files, *more)):
        certificates |= dict.fromkeys(_CERTIFICATE.findall(file.read_bytes()))
    return b"\n".join((*certificates, b""))


def _hosts(settings: Settings) -> Iterator[str]:
    yield from (service.site.host for service in settings.services)
    # Without the port, which follows an IPv6 address in brackets.
    yield from (re.sub(r":\d*$", "", host).strip("[]").lower() for host in settings.inject_hosts)


def _bypassed(environ: Mapping[str, str], hosts: Iterable[str]) -> list[str]:
    """Return the entries of NO_PROXY that do not keep a service's requests from the proxy."""
    entries = [entry for name in (BYPASS, BYPASS.upper()) for entry in re.split(r"[\s,]+", environ.get(name, ""))]
    return [entry for entry in dict.fromkeys(entries) if entry and not any(_covers(entry, host) for host in hosts)]


def _covers(entry: str, host: str) -> bool:
    """Return whether any program may take `host` for one that an entry of NO_PROXY means.

    Programs differ: for some, `example` also means `my-example`. So this says yes if in doubt.
    """
    entry = entry.lower()
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        name = re.sub(r"(?<=[^:]):\d+$", "", entry).strip("[]").lstrip("*.")
        return host.endswith(name)
