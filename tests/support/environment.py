"""The settings of a proxy, as its environment has them."""

import pytest

from eoepca_security.testing import FakeIssuer


def settings_for(issuer: FakeIssuer, **more: str) -> dict[str, str]:
    """Return the environment that makes a proxy a client of `issuer`."""
    environment = {
        "OPEN_ID_CONNECT_URL": issuer.url,
        "OPEN_ID_CONNECT_CLIENT_ID": issuer.client_id,
        "OPEN_ID_REFRESH_TOKEN": issuer.refresh_token,
        "PROXY_ADMIN": "off",
        "OPEN_ID_TOKEN_STORE": "none",
        **({"OPEN_ID_CONNECT_CLIENT_SECRET": issuer.client_secret} if issuer.client_secret is not None else {}),
    }
    return environment | more


def set_environment(monkeypatch: pytest.MonkeyPatch, issuer: FakeIssuer, **more: str) -> None:
    for name, value in settings_for(issuer, **more).items():
        monkeypatch.setenv(name, value)
