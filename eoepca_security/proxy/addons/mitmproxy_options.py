"""mitmproxy's own options: those that the add-on refuses, and those that must have a certain value."""

import logging
from collections.abc import Iterable, Iterator
from typing import Final

from mitmproxy.optmanager import OptManager
from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode

from eoepca_security.oauth.urls import is_loopback
from eoepca_security.proxy.addons.destinations import protects
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import AUTH_FILE

# Options that would defeat the purpose of the add-on.
_REFUSED: Final = {
    "allow_hosts": "connections to other hosts would bypass the add-on",
    "ignore_hosts": "connections to these hosts would bypass the add-on",
    "map_remote": "it would send the token elsewhere",
    "proxy_debug": "it would show the token",
    "stickyauth": "it would overwrite the token",
    "stream_large_bodies": "error answers to large requests would hang",
    "tcp_hosts": "connections to these hosts would bypass the add-on",
    "upstream_auth": "it would overwrite the token",
}

# Options that must have these values, which are not all mitmproxy's defaults.
_REQUIRED: Final = {
    "connection_strategy": "lazy",  # with eager, the client gets an empty reply when the service is down
    "keep_host_header": True,  # otherwise the guard does not see the name that the client used
    "onboarding": False,  # otherwise mitmproxy itself answers for mitm.it
    "rawtcp": False,  # only HTTP can carry a token
    "validate_inbound_headers": True,  # refuse what some servers read as one request and others as two
}

logger = logging.getLogger(__name__)


def enforce(options: OptManager) -> None:
    """Set the options that must have a certain value, and warn if the user set another."""
    for name, value in _REQUIRED.items():
        if name in options and getattr(options, name) not in (value, options.default(name)):
            logger.warning("the OIDC add-on sets %s to %s, which overrides your value", name, value)
    options.update_known(**_REQUIRED)


def problems(options: OptManager, settings: Settings | None) -> list[str]:
    """Return a line for each option that would defeat the purpose of the add-on."""
    found = [
        f"{name}: cannot be used with the OIDC add-on: {reason}"
        for name, reason in _REFUSED.items()
        if getattr(options, name, None)
    ]
    found += [
        f"{name}: must be {value} with the OIDC add-on"
        for name, value in _REQUIRED.items()
        if getattr(options, name, value) != value
    ]
    modes = [ProxyMode.parse(mode) for mode in options.mode]
    if settings is not None:
        found += _without_password(modes, options, settings)
    # If the settings are wrong, inject_hosts is unknown.
    if not all(protects(mode, settings) or (settings is None and isinstance(mode, RegularMode)) for mode in modes):
        found.append(
            "mode: the OIDC add-on needs --mode reverse:https://service.example (or http://), or regular with "
            "inject_hosts"
        )
    return found


def _without_password(modes: Iterable[ProxyMode], options: OptManager, settings: Settings) -> Iterator[str]:
    """Return a line for each option with which clients would need no password although they should."""
    if settings.proxy_auth is not None:
        if not all(isinstance(mode, RegularMode) for mode in modes):
            yield f"mode: {AUTH_FILE.env} works only in forward mode (regular): unset one of the two"
        if getattr(options, "proxyauth", None):
            yield f"proxyauth: cannot be used with {AUTH_FILE.env}: unset one of the two"
    elif settings.mode == "forward":
        for mode in modes:
            host = mode.listen_host(options.listen_host)
            if isinstance(mode, RegularMode) and not is_loopback(host):
                yield f"{AUTH_FILE.env}: is required to listen on {host or 'all addresses'} in forward mode"
