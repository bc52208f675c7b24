"""A service with a certificate of a CA that the system does not know."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import settings_for
from tests.support.processes import StartProxy


class Echo(Handler):
    def respond(self) -> None:
        self.read_body()
        self.answer(200, {"authorization": self.headers.get_all("Authorization")})


@pytest.fixture
def https_service(certificate: Path) -> Iterator[str]:
    server = LocalServer(Echo)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    with server:
        yield server.url.replace("http://", "https://")


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_an_unknown_ca_is_refused_unless_it_is_added_or_verification_is_off(
    entry: str, start: StartProxy, https_service: str, certificate: Path, client: httpx.Client
) -> None:
    with FakeIssuer() as issuer:
        unknown = start(entry, https_service, settings_for(issuer))
        added = start(entry, https_service, settings_for(issuer, TLS_CA_FILE=str(certificate)))
        unverified = start(entry, https_service, settings_for(issuer, TLS_NO_VERIFY="true"))
        assert client.get(unknown.url).status_code == 502
        insecure = start(entry, https_service, settings_for(issuer), "--ssl-insecure")
        for proxy in (added, unverified, insecure):
            response = client.get(proxy.url)
            assert response.status_code == 200, proxy.output
            assert ("anyone on the network path to the service" in proxy.output) == (proxy is not added)
            assert [issuer.accepts(given.removeprefix("Bearer ")) for given in response.json()["authorization"]] == [
                True
            ]
