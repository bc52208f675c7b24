"""Several services behind one login at Keycloak, set up as docs/issuers.md says."""

from typing import Any

from tests.interop.kc_server import USERNAME, Client, Keycloak

EXCHANGING = Client("eoepca-services", "test-only-services-secret")
NARROWING = Client("eoepca-narrow")
STAC = "stac-api"  # for those who ask for the scope of this name
OPENEO = "openeo-api"  # for everybody, so it is in the login's token, too
S3 = "s3-api"  # for users with one of its roles
SERVICES = (STAC, OPENEO, S3)


def add_services(keycloak: Keycloak, realm: str) -> None:
    """Add the services, a client that may exchange, and a public one that may ask for narrower scopes."""
    for service in SERVICES:
        keycloak.admin("POST", f"{realm}/clients", {"clientId": service, "standardFlowEnabled": False})
    for service in (STAC, OPENEO):
        keycloak.admin("POST", f"{realm}/client-scopes", _scope(service))
    exchanging = add_client(keycloak, realm, EXCHANGING, **{"standard.token.exchange.enabled": "true"})
    narrowing = add_client(keycloak, realm, NARROWING)
    scopes = {scope["name"]: scope["id"] for scope in keycloak.admin("GET", f"{realm}/client-scopes")}
    for client, kind, service in (
        (exchanging, "optional", STAC),
        (exchanging, "default", OPENEO),
        (narrowing, "optional", STAC),
        (narrowing, "optional", OPENEO),
    ):
        keycloak.admin("PUT", f"{realm}/clients/{client}/{kind}-client-scopes/{scopes[service]}")
    (s3,) = keycloak.admin("GET", f"{realm}/clients?clientId={S3}")
    keycloak.admin("POST", f"{realm}/clients/{s3['id']}/roles", {"name": "reader"})
    role = keycloak.admin("GET", f"{realm}/clients/{s3['id']}/roles/reader")
    (user,) = keycloak.admin("GET", f"{realm}/users?username={USERNAME}")
    keycloak.admin("POST", f"{realm}/users/{user['id']}/role-mappings/clients/{s3['id']}", [role])


def add_client(keycloak: Keycloak, realm: str, client: Client, **attributes: str) -> str:
    """Add a client whose users log in by the direct grant; return its internal ID."""
    keycloak.admin(
        "POST",
        f"{realm}/clients",
        {
            "clientId": client.client_id,
            "secret": client.secret,
            "publicClient": client.secret is None,
            "standardFlowEnabled": False,
            "directAccessGrantsEnabled": True,
            "attributes": attributes,
        },
    )
    (added,) = keycloak.admin("GET", f"{realm}/clients?clientId={client.client_id}")
    return str(added["id"])


def _scope(service: str) -> dict[str, Any]:
    """A client scope with the name of the service, whose tokens are for it."""
    mapper = {
        "name": "audience",
        "protocol": "openid-connect",
        "protocolMapper": "oidc-audience-mapper",
        "config": {"included.client.audience": service, "access.token.claim": "true", "id.token.claim": "false"},
    }
    return {
        "name": service,
        "protocol": "openid-connect",
        "attributes": {"include.in.token.scope": "true"},
        "protocolMappers": [mapper],
    }
