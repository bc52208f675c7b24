"""For services behind a gateway: verified claims in FastAPI. May import `issuer`."""

from eoepca_security.fastapi.scheme import Authentication, OIDCProxyScheme, require_roles

__all__ = ["Authentication", "OIDCProxyScheme", "require_roles"]
