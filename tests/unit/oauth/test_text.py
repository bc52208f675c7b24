"""Whose token it is, in words."""

import pytest

from eoepca_security.oauth.text import identity


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"preferred_username": "alice", "sub": "u-1"}, "alice (sub u-1)"),
        ({"sub": "u-1"}, "u-1"),
        ({"preferred_username": "alice"}, "alice"),
        ({"sub": "a\nb"}, "a\N{REPLACEMENT CHARACTER}b"),
        ({}, "someone (the token does not say)"),
    ],
)
def test_identity(claims: dict[str, str], text: str) -> None:
    assert identity(claims) == text
