"""Faster reads give what mitmproxy's own give; they are compared, as mitmproxy may change."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from mitmproxy.coretypes.multidict import _MultiDict
from mitmproxy.http import Headers
from mitmproxy.optmanager import OptManager, _Option

from eoepca_security.proxy.patches import header_lookup

NAMES = [b"Host", b"host", b"HOST", b"X-\xff", b"X-\xc3\xa4", b"a", b"", b"Set-Cookie", b"x" * 100, b"x-\xc3\x84"]
VALUES = [b"", b"1", b"\xff\xfe", b"\xc3\xa4", b"a, b"]
WANTED: list[Any] = [*NAMES, *(name.decode("utf-8", "surrogateescape") for name in NAMES), "Missing", "HoSt"]


def mitmproxys(headers: Headers, name: str | bytes) -> list[str]:
    key = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return [value.decode("utf-8", "surrogateescape") for value in _MultiDict.get_all(headers, key)]


def test_headers_read_the_same() -> None:
    chance = random.Random(1)
    for _ in range(300):
        headers = Headers(tuple((chance.choice(NAMES), chance.choice(VALUES)) for _ in range(chance.randrange(6))))
        for wanted in WANTED:
            values = mitmproxys(headers, wanted)
            assert header_lookup.get_all(headers, wanted) == values
            assert header_lookup.get(headers, wanted) == (", ".join(values) if values else None)
            assert header_lookup.get(headers, wanted, "other") == (", ".join(values) if values else "other")
            assert header_lookup.contains(headers, wanted) == bool(values)
            if values:
                assert header_lookup.get_item(headers, wanted) == ", ".join(values)
            else:
                with pytest.raises(KeyError):
                    header_lookup.get_item(headers, wanted)


@pytest.mark.parametrize(
    "function", [header_lookup.get_all, header_lookup.get, header_lookup.get_item, header_lookup.contains]
)
def test_what_is_no_name_is_refused(function: Any) -> None:
    for wrong in (None, 1, ("a",)):
        with pytest.raises(TypeError):
            function(Headers(), wrong)


def test_names_that_clients_invent_are_not_remembered() -> None:
    before = header_lookup._known_key.cache_info().currsize
    for i in range(300):
        header_lookup.get_all(Headers(), f"{i:064}")
    assert header_lookup._known_key.cache_info().currsize == before


def test_options_have_the_same_values_and_those_that_could_be_changed_are_copies() -> None:
    options = OptManager()
    options.add_option("text", str, "a", "")
    options.add_option("switch", bool, False, "")
    options.add_option("names", Sequence[str], ["a"], "")
    option = options._options
    assert [header_lookup.current(option[name]) for name in ("text", "switch", "names")] == ["a", False, ["a"]]
    header_lookup.current(option["names"]).append("b")
    options.update(text="b", switch=True)
    assert [header_lookup.current(option[name]) for name in ("text", "switch", "names")] == ["b", True, ["a"]]
    assert [_Option.current(option[name]) for name in ("text", "switch", "names")] == ["b", True, ["a"]]
