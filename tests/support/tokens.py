"""Tokens that nobody has signed, and ways to damage a token."""

import base64
import json
import random

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def jwt_with(**claims: object) -> str:
    """Return a JWT with these claims, which nobody has signed."""
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.c2ln"


def mutate(text: str, chance: random.Random) -> str:
    position = chance.randrange(len(text))
    stranger = chance.choice([chance.choice(ALPHABET), chance.choice(ALPHABET), chance.choice('.=+/ \n"\x00üé🌍')])
    other = chance.randrange(len(text))
    start, end = min(position, other), max(position, other)
    return chance.choice(
        [
            text[:position] + stranger + text[position + 1 :],
            text[:position] + stranger + text[position + 1 :],
            text[:position] + stranger + text[position:],
            text[:position] + text[position + 1 :],
            text[:position],
            text[position:],
            text[:start] + text[end:],
            text[:end] + text[start:],
            text[:position] + text[position].swapcase() + text[position + 1 :],
            text[:start] + text[start:end][::-1] + text[end:],
        ]
    )
