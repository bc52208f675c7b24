"""OIDC access tokens for tools that cannot log in, and verified claims for services behind a gateway.

Importing this package needs neither mitmproxy nor FastAPI.
"""

from eoepca_security.errors import (
    CredentialsRejected,
    IssuerUnavailable,
    SecurityError,
    SettingsError,
    TokenError,
    TokenInvalid,
)
from eoepca_security.protocol import Client
from eoepca_security.provider import Provider
from eoepca_security.session import AccessToken
from eoepca_security.source import TokenSource
from eoepca_security.transport import HttpTransport, trust

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
