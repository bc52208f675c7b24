"""A service with a certificate of a CA that the system does not know."""

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import StartProxy, settings_for
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from eoepca_security.local_server import Handler, LocalServer
from eoepca_security.testing import FakeIssuer


class Echo(Handler):
    def respond(self) -> None:
        self.read_body()
        self.answer(200, {"authorization": self.headers.get_all("Authorization")})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key in the same file."""
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        built.public_bytes(Encoding.PEM) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return path


@pytest.fixture
def https_service(certificate: Path) -> Iterator[str]:
    server = LocalServer(Echo)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    with server:
        yield server.url.replace("http://", "https://")


def test_an_unknown_ca_is_refused_unless_it_is_added_or_verification_is_off(
    start: StartProxy, https_service: str, certificate: Path, client: httpx.Client
) -> None:
    with FakeIssuer() as issuer:
        unknown = start("launcher", https_service, settings_for(issuer))
        added = start("launcher", https_service, settings_for(issuer, TLS_CA_FILE=str(certificate)))
        unverified = start("launcher", https_service, settings_for(issuer, TLS_NO_VERIFY="true"))
        assert client.get(unknown.url).status_code == 502
        for proxy in (added, unverified):
            response = client.get(proxy.url)
            assert response.status_code == 200, proxy.output
            assert [issuer.accepts(given.removeprefix("Bearer ")) for given in response.json()["authorization"]] == [
                True
            ]
