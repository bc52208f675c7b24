"""Configuration of a Jupyter server that lets in who has an access token of the issuer in `ISSUER_KEYS`."""

import os
from typing import Any

import jwt
from jupyter_server.auth import IdentityProvider, User

KEYS = jwt.PyJWKClient(os.environ["ISSUER_KEYS"])


class BearerIdentityProvider(IdentityProvider):  # type: ignore[misc]
    """Verifies `Authorization`, and leaves all other checks, of the origin and so on, as they are."""

    def get_user(self, handler: Any) -> User | None:
        scheme, _, token = handler.request.headers.get("Authorization", "").partition(" ")
        try:
            key = KEYS.get_signing_key_from_jwt(token).key
            claims = jwt.decode(token, key, algorithms=["ES256"], audience="service")
        except jwt.PyJWTError:
            return None
        return User(claims["preferred_username"]) if scheme == "Bearer" else None


c = get_config()  # type: ignore[name-defined]  # noqa: F821  Jupyter gives it
c.ServerApp.identity_provider_class = BearerIdentityProvider
c.ServerApp.open_browser = False
c.ServerApp.allow_root = True
