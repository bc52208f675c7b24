"""Ways to damage a token."""

import random

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


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
