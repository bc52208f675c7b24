"""URLs, hosts and web origins: how to parse, compare and check them."""

import ipaddress
import re
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

WELL_KNOWN: Final = "/.well-known/openid-configuration"


def is_loopback(host: str | None) -> bool:
    """Return whether `host`, a name or address as in `urlsplit().hostname`, is a loopback address."""
    if not host:
        return False
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_url(url: str) -> SplitResult:
    """Split an http(s) URL; raises ValueError when programs could disagree about its host (RFC 3986 §3.2)."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    # Some versions of urlsplit() ignore text around the brackets of an address.
    if parts.port == 0 or not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?", host):
        raise ValueError("the host or port is not valid")
    if parts.scheme not in ("http", "https"):
        raise ValueError("not http or https")
    return parts


def url_problem(url: str, *, allow_http: bool = False) -> str | None:
    """Return why `url` must not be used to reach the issuer, or None when it is safe.

    Tokens and secrets travel to it, so it must use https, or http on loopback (RFC 6749 §3.2, OpenID Connect Discovery
    §3).
    """
    if not re.fullmatch(r"[!-~]{0,2000}", url):
        return "has spaces or characters outside ASCII, or is far too long"
    try:
        parts = split_url(url)
    except ValueError:
        return "is not a valid URL: it must look like https://issuer.example/realms/name"
    if parts.username is not None or parts.password is not None:
        return "contains a user name or password: remove the part before the @"
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not allow_http:
        return "must use https:// (plain http is for localhost only)"
    return None


def issuer_url_problem(url: str, *, allow_http: bool = False) -> str | None:
    """Return why `url` cannot be an issuer or its discovery document, or None; includes `url_problem`.

    An issuer has neither query nor fragment (OpenID Connect Discovery §2). The document's address may have a query,
    which selects a policy (Azure AD B2C) or a key (Entra ID).
    """
    if problem := url_problem(url, allow_http=allow_http):
        return problem
    if "#" in url:
        return "has a # part: remove it"
    path, mark, _ = url.partition("?")
    if mark and not path.rstrip("/").endswith(WELL_KNOWN):
        return f"has a ? part, which only a discovery document may have: write it after {WELL_KNOWN}"
    return None


def discovery_url(issuer_or_document: str) -> str:
    """Return the discovery document's URL, given the issuer or that URL itself (OpenID Connect Discovery §4.1)."""
    query = issuer_or_document.partition("?")[2]
    url = issuer_of(issuer_or_document) + WELL_KNOWN
    return f"{url}?{query}" if query else url


def issuer_of(issuer_or_document: str) -> str:
    """Return the issuer without a slash at the end, given the issuer or its discovery document's URL."""
    path = issuer_or_document.partition("?")[0].rstrip("/")
    return path.removesuffix(WELL_KNOWN).rstrip("/")


LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")

ANY_LOCALHOST: Final = "*.localhost"
"""All names of this machine (RFC 6761 §6.3), such as `service.localhost`, in a list of hosts."""

EVERYWHERE: Final = ("", "0.0.0.0", "::")  # noqa: S104  compared with, not bound to

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
"""The default ports (RFC 9110 §4.2)."""


class Host(NamedTuple):
    """A host in lower case (an IPv6 address in brackets), and its port or None."""

    name: str
    port: int | None

    def __str__(self) -> str:
        return self.name if self.port is None else f"{self.name}:{self.port}"


@lru_cache(64)
def parse_host(text: str) -> Host:
    """Parse a `Host` header (RFC 9110 §7.2); raises ValueError when it is invalid or ambiguous."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,255})(?::([0-9]{1,5}))?", text)
    if match is None or int(match[2] or 0) > 65535:
        raise ValueError("not a valid host")
    name = match[1].lower()
    if name.startswith("["):
        name = f"[{ipaddress.IPv6Address(name[1:-1])}]"
    return Host(name, int(match[2]) if match[2] else None)


def parse_origin(text: str) -> str:
    """Return a web origin (RFC 6454 §6.2) in normal form, for comparison; raises ValueError for `null`."""
    scheme, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise ValueError("not a valid origin")
    return origin_of(scheme.lower(), parse_host(rest))


def origin_of(scheme: str, host: Host) -> str:
    """Return the web origin (RFC 6454 §6.2) of a scheme and a host, without the scheme's default port."""
    return f"{scheme}://{host.name if host.port == DEFAULT_PORTS.get(scheme) else host}"
