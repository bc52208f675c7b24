"""One Keycloak for all the tests of this folder, as a plugin: a second conftest.py would hide the first."""

from collections.abc import Iterator

import pytest

from tests.interop.kc_audiences import add_services
from tests.interop.kc_server import AUDIENCE, REALM, ROTATING_REALM, Keycloak, running_keycloak
from tests.interop.kc_service import Service, running_service


@pytest.fixture(scope="session")
def keycloak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keycloak]:
    with running_keycloak(tmp_path_factory.mktemp("keycloak")) as keycloak:
        yield keycloak


@pytest.fixture(scope="session")
def service(keycloak: Keycloak) -> Iterator[Service]:
    with running_service(keycloak.issuer(REALM), AUDIENCE) as service:
        yield service


@pytest.fixture(scope="session")
def services(keycloak: Keycloak) -> Keycloak:
    """Keycloak with several services behind one login, in the realm where a refresh token may be used once."""
    add_services(keycloak, ROTATING_REALM)
    return keycloak
