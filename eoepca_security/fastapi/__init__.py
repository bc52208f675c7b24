"""For services behind a gateway: verified claims in FastAPI. May import `issuer`."""

from eoepca_security.fastapi.authentication import Authentication, Tokens
from eoepca_security.fastapi.scheme import OIDCProxyScheme, require_roles

__all__ = ["Authentication", "OIDCProxyScheme", "Tokens", "require_roles"]
