"""Untrusted JSON: strict where Python's `json` is lenient."""

import json
import math
from typing import Any, Final, NoReturn


def parse_object(data: bytes, *, unique_keys: bool = False) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Raises ValueError when it is not UTF-8, not JSON (`NaN` and `Infinity` are not, RFC 8259 §6), nested too deeply, or
    not an object. With `unique_keys`, also when an object has a duplicate member (RFC 8725 §2.4), a number is too large
    for a float (which is null otherwise), or it begins with a byte order mark (RFC 8259 §8.1).
    """
    try:
        value = (_UNIQUE if unique_keys else _PLAIN).decode(data.decode("utf-8" if unique_keys else "utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("a number is too large")
    return number


def _finite_or_null(text: str) -> float | None:
    # Python would take it for infinity, and write that as what is not JSON.
    return number if math.isfinite(number := float(text)) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member appears twice")
    return members


# `json.loads` would build a decoder for each call, which takes as long as decoding a small document.
_PLAIN: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_or_null)
_UNIQUE: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
