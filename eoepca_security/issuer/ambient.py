"""The environment variables for proxies and CAs that many programs read, and what is wrong with them."""

import os
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import requests

from eoepca_security.oauth.urls import is_loopback, split_url

_CA_BUNDLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def ambient_problem(url: str) -> str | None:
    """Say which environment variable keeps us from reaching `url` and why, or return None.

    The text does not contain the value: a proxy's address may contain a password.
    """
    try:
        return _proxy_problem(url) or _bundle_problem(url)
    except ValueError:
        return None


def _proxy_problem(url: str) -> str | None:
    parts = urlsplit(url)
    if is_loopback(parts.hostname):
        return None
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    if not proxy:
        return None
    names = (f"{parts.scheme}_proxy", "all_proxy")
    name = next((name for name, value in os.environ.items() if name.lower() in names and value == proxy), names[1])
    if proxy.lower().startswith("socks"):
        return f"{name} names a SOCKS proxy, but only HTTP proxies are supported"
    try:
        split_url(requests.utils.prepend_scheme_if_needed(proxy, "http"))  # type: ignore[no-untyped-call]
    except ValueError:
        return f"{name} is not the address of a proxy, such as http://proxy.example:3128"
    return None


def _bundle_problem(url: str) -> str | None:
    name = next((name for name in _CA_BUNDLES if os.environ.get(name)), None)
    if name is None or urlsplit(url).scheme != "https":
        return None
    path = Path(os.environ[name])
    try:
        if not path.is_dir():
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError:
        return f"{name} does not name a PEM file with CAs"
    return None
