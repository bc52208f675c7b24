"""mitmproxy's own options: which ones the add-on cannot live with, and which it needs to have a certain value."""

import logging
from typing import Final

from mitmproxy.optmanager import OptManager
from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode

from eoepca_security.proxy.addons.destinations import protects
from eoepca_security.proxy.config.settings import Settings

# mitmproxy's own options that would undo what this add-on is for.
_REFUSED: Final = {
    "allow_hosts": "connections to other hosts would bypass the add-on",
    "ignore_hosts": "connections to these hosts would bypass the add-on",
    "map_remote": "it would carry the token elsewhere",
    "proxy_debug": "it would show the token",
    "stickyauth": "it would overwrite the token",
    "stream_large_bodies": "error answers to large requests would hang",
    "tcp_hosts": "connections to these hosts would bypass the add-on",
    "upstream_auth": "it would overwrite the token",
}

# And those that have to have these values, which are not all mitmproxy's defaults.
_REQUIRED: Final = {
    "connection_strategy": "lazy",  # eager gives the client an empty reply when the service is down
    "keep_host_header": True,  # or the guard does not see by what name the client addressed us
    "onboarding": False,  # mitm.it would be answered by mitmproxy itself
    "rawtcp": False,  # what is not HTTP cannot carry a token
    "validate_inbound_headers": True,  # what one reads as one request and another as two is not forwarded
}

logger = logging.getLogger(__name__)


def enforce(options: OptManager) -> None:
    """Set the options that have to have a certain value, and say so where they were set otherwise."""
    for name, value in _REQUIRED.items():
        if name in options and getattr(options, name) not in (value, options.default(name)):
            logger.warning("%s is %s with the OIDC add-on, whatever it is set to", name, value)
    options.update_known(**_REQUIRED)


def problems(options: OptManager, settings: Settings | None) -> list[str]:
    """Return a line for each option that would undo what the add-on is for."""
    found = [
        f"{name}: cannot be used together with the OIDC add-on, {reason}"
        for name, reason in _REFUSED.items()
        if getattr(options, name, None)
    ]
    found += [
        f"{name}: has to be {value} with the OIDC add-on"
        for name, value in _REQUIRED.items()
        if getattr(options, name, value) != value
    ]
    modes = [ProxyMode.parse(mode) for mode in options.mode]
    # Without settings, because they are wrong, nobody knows what inject_hosts is to be.
    if not all(protects(mode, settings) or (settings is None and isinstance(mode, RegularMode)) for mode in modes):
        found.append(
            "mode: the OIDC add-on needs --mode reverse:https://service.example (or http://), or regular together with "
            "inject_hosts"
        )
    return found
