"""The service's side: verified claims for FastAPI services behind a gateway. May import `issuer` and `oauth`."""

from eoepca_security.fastapi.scheme import Authentication, OIDCProxyScheme, require_roles

__all__ = ["Authentication", "OIDCProxyScheme", "require_roles"]
