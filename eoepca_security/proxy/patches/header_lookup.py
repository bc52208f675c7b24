"""Reading headers and options, and replacing headers, as mitmproxy does, with the same results in a third of the time.

A request has its headers looked at some fifty times. mitmproxy converts all names for each look, and finds that one is
missing by an exception; and it copies the value of an option each time, also where nobody could change it.
"""

from copy import deepcopy
from functools import lru_cache
from typing import Any, Final

from mitmproxy import optmanager
from mitmproxy.http import Headers

from eoepca_security.proxy.patches import seams

_LONG: Final = 64  # longer names are not worth remembering
_UNCHANGEABLE: Final = frozenset({str, int, float, bool, type(None)})


def install() -> None:
    """Put these in the place of mitmproxy's, in this process."""
    headers = "mitmproxy.http:Headers"
    seams.replace(headers, "get_all", get_all)
    seams.replace(headers, "get", get)
    seams.replace(headers, "__getitem__", get_item)
    seams.replace(headers, "__contains__", contains)
    seams.replace("mitmproxy.optmanager:_Option", "current", current)


def _key(name: str | bytes) -> bytes:
    return _known_key(name) if len(name) < _LONG else _new_key(name)


def _new_key(name: str | bytes) -> bytes:
    if not isinstance(name, str | bytes):
        raise TypeError(f"Expected str or bytes, but got {type(name).__name__}.")
    # As mitmproxy: what is no UTF-8 stays what it was.
    return (name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name).lower()


_known_key = lru_cache(256)(_new_key)


def get_all(headers: Headers, name: str | bytes) -> list[str]:
    """Return all values of a header, each for itself."""
    key = _key(name)
    length = len(key)
    return [
        value.decode("utf-8", "surrogateescape")
        for given, value in headers.fields
        if len(given) == length and given.lower() == key
    ]


def get(headers: Headers, name: str | bytes, default: Any = None) -> Any:
    """Return the values of a header as one, or the default."""
    values = get_all(headers, name)
    return ", ".join(values) if values else default


def get_item(headers: Headers, name: str | bytes) -> str:
    """Return the values of a header as one; raises KeyError where there is none."""
    if values := get_all(headers, name):
        return ", ".join(values)
    raise KeyError(name)


def contains(headers: Headers, name: Any) -> bool:
    """Tell whether there is such a header."""
    key = _key(name)
    length = len(key)
    for given, _ in headers.fields:  # noqa: SIM110  any() with a generator takes twice as long
        if len(given) == length and given.lower() == key:
            return True
    return False


def current(option: Any) -> Any:
    """Return an option's value."""
    value = option._default if option.value is optmanager.unset else option.value
    if type(value) in _UNCHANGEABLE:
        return value
    if type(value) is list and all(type(item) is str for item in value):
        return value.copy()
    return deepcopy(value)
