"""An OpenID Connect issuer for tests, ours and users'. May import `oauth`."""

from eoepca_security.testing.issuer import Behaviour, FakeIssuer
from eoepca_security.testing.login import LoginBehaviour

__all__ = ["Behaviour", "FakeIssuer", "LoginBehaviour"]
