"""OIDC access tokens for tools that cannot log in, and verified claims for services behind a gateway.

Importing this package needs neither mitmproxy nor FastAPI. `OIDCProxyScheme`, `Authentication` (or
`Tokens`) and `require_roles` are available here once FastAPI is installed.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from eoepca_security.errors import (
    CredentialsRejected,
    IssuerUnavailable,
    SecurityError,
    SettingsError,
    TokenError,
    TokenInvalid,
)

if TYPE_CHECKING:
    from eoepca_security.fastapi import Authentication as Authentication
    from eoepca_security.fastapi import OIDCProxyScheme as OIDCProxyScheme
    from eoepca_security.fastapi import Tokens as Tokens
    from eoepca_security.fastapi import require_roles as require_roles
    from eoepca_security.issuer.ca_trust import trust
    from eoepca_security.issuer.provider import Provider
    from eoepca_security.issuer.transport import HttpTransport
    from eoepca_security.oauth.protocol import Client
    from eoepca_security.session.session import AccessToken
    from eoepca_security.session.source import TokenSource

__all__ = [
    "AccessToken",
    "Client",
    "CredentialsRejected",
    "HttpTransport",
    "IssuerUnavailable",
    "Provider",
    "SecurityError",
    "SettingsError",
    "TokenError",
    "TokenInvalid",
    "TokenSource",
    "trust",
]

_OF_FASTAPI: Final = ("Authentication", "OIDCProxyScheme", "Tokens", "require_roles")


# Imported when they are used: the proxy takes care of signals first, and needs other modules.
_MODULES: Final = {
    "AccessToken": "session.session",
    "Client": "oauth.protocol",
    "HttpTransport": "issuer.transport",
    "Provider": "issuer.provider",
    "TokenSource": "session.source",
    "trust": "issuer.ca_trust",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"eoepca_security.{_MODULES[name]}"), name)
    if name not in _OF_FASTAPI:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module("eoepca_security.fastapi"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs FastAPI: run `pip install '.[fastapi]'` in the folder of the source"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *(_OF_FASTAPI if find_spec("fastapi") else ())])
