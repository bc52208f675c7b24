import json

import pytest

from eoepca_security.oauth.strict_json import parse_object

DEEP = 100_000


def test_returns_the_object() -> None:
    data = '{"text": "Grüße 🌍", "list": [1, 2.5, null, true], "nested": {"a": {"b": []}}}'.encode()

    assert parse_object(data) == {"text": "Grüße 🌍", "list": [1, 2.5, None, True], "nested": {"a": {"b": []}}}


@pytest.mark.parametrize("unique_keys", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b" \n", id="blank"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'[{"a": 1}]', id="object in a list"),
        pytest.param(b'"text"', id="string"),
        pytest.param(b"null", id="null"),
        pytest.param(b"true", id="boolean"),
        pytest.param(b"1", id="number"),
        pytest.param(b"<html></html>", id="HTML"),
        pytest.param(b"{'a': 1}", id="single quotes"),
        pytest.param(b'{"a": 1', id="cut off"),
        pytest.param(b'{"a": 1,}', id="trailing comma"),
        pytest.param(b'{"a": 1} {}', id="something after it"),
        pytest.param(b'{"a": "\n"}', id="raw control character"),
        pytest.param(b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}', id="two byte order marks"),
        pytest.param(b'{"\xef\xbb\xbf": 1} \xef\xbb\xbf', id="byte order mark at the end"),
        pytest.param('{"a": 1}'.encode("utf-16"), id="UTF-16"),
        pytest.param('{"a": 1}'.encode("utf-16-le"), id="UTF-16 without byte order mark"),
        pytest.param('{"a": 1}'.encode("utf-32-be"), id="UTF-32"),
        pytest.param('{"a": "ü"}'.encode("latin-1"), id="Latin-1"),
        pytest.param(b'{"a": "\xed\xa0\x80"}', id="surrogate in UTF-8"),
        pytest.param(b'{"a": NaN}', id="NaN"),
        pytest.param(b'{"a": Infinity}', id="Infinity"),
        pytest.param(b'{"a": [{"b": -Infinity}]}', id="nested -Infinity"),
        pytest.param(b"NaN", id="only NaN"),
        pytest.param(b'{"a": ' + b"9" * 10_000 + b"}", id="integer beyond Python's limit"),
        pytest.param(b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", id="deep lists"),
        pytest.param(b'{"a": ' * DEEP + b"1" + b"}" * DEEP, id="deep objects"),
        pytest.param(b"[" * DEEP, id="deep and cut off"),
    ],
)
def test_refuses_what_is_not_a_json_object_in_utf_8(data: bytes, unique_keys: bool) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  which one of them is all the same
        parse_object(data, unique_keys=unique_keys)


def test_documents_may_begin_with_a_byte_order_mark_and_tokens_may_not() -> None:
    assert parse_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match=r"."):
        parse_object(b'\xef\xbb\xbf{"a": 1}', unique_keys=True)


@pytest.mark.parametrize("number", ["1e400", "-1.5E+999", "1" + "0" * 400 + ".0"])
def test_a_number_beyond_floats_is_null_in_documents_and_refused_in_tokens(number: str) -> None:
    data = f'{{"a": [{number}]}}'.encode()
    assert json.dumps(parse_object(data), allow_nan=False) == '{"a": [null]}'
    with pytest.raises(ValueError, match="too large"):
        parse_object(data, unique_keys=True)


REPEATED = [
    pytest.param('{"a": 1, "a": 2}', id="different values"),
    pytest.param('{"a": 1, "a": 1}', id="same value"),
    pytest.param('{"a": 1, "b": 2, "\\u0061": 3}', id="name written differently"),
    pytest.param('{"outer": {"a": 1, "a": 2}}', id="nested object"),
    pytest.param('{"list": [1, {"a": 1, "a": 2}]}', id="object in a list"),
]


@pytest.mark.parametrize("text", REPEATED)
def test_refuses_a_member_that_appears_twice_when_asked_to(text: str) -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_object(text.encode(), unique_keys=True)


@pytest.mark.parametrize("text", REPEATED)
def test_takes_a_member_that_appears_twice_when_not_asked(text: str) -> None:
    assert parse_object(text.encode()) == json.loads(text)


def test_the_same_name_may_appear_in_different_objects() -> None:
    value = {"a": {"a": 1}, "list": [{"a": 1}, {"a": 2}]}

    assert parse_object(json.dumps(value).encode(), unique_keys=True) == value
