"""mitmproxy's options and our settings."""

from difflib import get_close_matches
from typing import Final

from mitmproxy import ctx
from mitmproxy.proxy.mode_specs import ProxyMode

from eoepca_security.oauth.urls import EVERYWHERE
from eoepca_security.proxy.config.variables import OPTIONS

_TRUSTED_CA: Final = "ssl_verify_upstream_trusted_ca"

_OPTION_NAMES: Final = frozenset(str(variable.option) for variable in OPTIONS)


def _looks_like_ours(name: str) -> bool:
    return name.startswith("oidc_") or bool(get_close_matches(name, _OPTION_NAMES, 1, 0.85))


def _own_hosts() -> list[str]:
    """Return the addresses listened on, as clients name them, where they are names at all."""
    hosts = [ProxyMode.parse(mode).listen_host(ctx.options.listen_host) for mode in ctx.options.mode]
    return [f"[{host}]" if ":" in host else host for host in hosts if host not in EVERYWHERE]
