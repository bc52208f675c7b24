"""The password of the forward proxy."""

import base64

import pytest

from eoepca_security.proxy.policy.proxy_password import is_right


def basic(text: str | bytes, scheme: str = "Basic ") -> str:
    return scheme + base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


@pytest.mark.parametrize(
    ("expected", "value"),
    [
        ("alice:secret", basic("alice:secret")),
        ("alice:secret", basic("alice:secret", "bASIC  ")),
        ("alice:a:b ", basic("alice:a:b ")),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}:x", basic("e\N{COMBINING ACUTE ACCENT}:x")),
        ("e\N{COMBINING ACUTE ACCENT}:x", basic("\N{LATIN SMALL LETTER E WITH ACUTE}:x")),
    ],
)
def test_the_right_password_is_accepted(expected: str, value: str) -> None:
    assert is_right(expected, [value])


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        ["Basic"],
        ["Basic "],
        [basic("")],
        [basic(":")],
        [basic("alice:")],
        [basic("alice:secret2")],
        [basic("alice:secre")],
        [basic("Alice:secret")],
        [basic("alice:secret\n")],
        [basic("alice:secret\0")],
        [basic("alice:secret".encode("utf-16"))],
        [basic("alice:secret") + " x"],
        [basic("alice:secret") + "\n"],
        ["Basic alice:secret"],
        [basic("alice:secret", "Bearer ")],
        [basic("alice:secret", "Basic")],
        ["Basic A"],
        ["Basic \udcff"],
        [basic(b"\xff:\xfe")],
        [basic("alice:secret"), basic("alice:secret")],
        [basic("alice:secret"), ""],
    ],
)
def test_all_else_is_refused(values: list[str]) -> None:
    assert not is_right("alice:secret", values)
