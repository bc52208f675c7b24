"""mitmproxy's own key is read as mitmproxy reads it."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from eoepca_security.proxy.patches import certificate_authority


def test_keys_with_and_without_a_password() -> None:
    key = rsa.generate_private_key(65537, 2048)
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    for data, password in ((plain, None), (plain, b"unused"), (locked, b"secret")):
        assert certificate_authority.load_private_key(data, password).private_numbers() == key.private_numbers()
    with pytest.raises(TypeError):
        certificate_authority.load_private_key(locked, None)
    with pytest.raises(ValueError, match=r"."):
        certificate_authority.load_private_key(locked, b"wrong")
    with pytest.raises(ValueError, match=r"."):
        certificate_authority.load_private_key(b"no key", None)


def test_it_is_made_once(tmp_path: Path) -> None:
    certificate_authority.make(tmp_path)
    made = (tmp_path / "mitmproxy-ca.pem").read_bytes()
    certificate_authority.make(tmp_path)
    assert (tmp_path / "mitmproxy-ca.pem").read_bytes() == made
