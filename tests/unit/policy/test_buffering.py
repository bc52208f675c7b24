"""What passes in parts, and what is held: by what the headers say."""

import pytest
from mitmproxy.test import tutils

from eoepca_security.proxy.policy.buffering import (
    MAX_HELD,
    MAX_WHOLE,
    Budget,
    Share,
    streams_request,
    streams_response,
)


@pytest.mark.parametrize(
    ("headers", "version", "streams"),
    [
        ({}, b"HTTP/1.1", False),
        ({"content-length": "10"}, b"HTTP/1.1", False),
        ({"content-length": str(MAX_HELD)}, b"HTTP/1.1", False),
        ({"content-length": str(MAX_HELD + 1)}, b"HTTP/1.1", True),
        ({"transfer-encoding": "chunked"}, b"HTTP/1.1", True),
        ({"content-length": "odd"}, b"HTTP/1.1", True),
        ({"content-length": "9" * 5000}, b"HTTP/1.1", True),
        ({}, b"HTTP/2.0", True),
        ({"content-length": "10"}, b"HTTP/2.0", False),
    ],
)
def test_requests_that_may_be_long_pass_in_parts(headers: dict[str, str], version: bytes, streams: bool) -> None:
    request = tutils.treq(headers=(), http_version=version)
    for name, value in headers.items():
        request.headers[name] = value
    assert streams_request(request.data) is streams


@pytest.mark.parametrize(
    ("status", "headers", "streams"),
    [
        (200, {"content-length": "10"}, False),
        (200, {"content-length": str(MAX_WHOLE)}, False),
        (200, {"content-length": str(MAX_WHOLE + 1)}, True),
        (200, {}, True),
        (200, {"transfer-encoding": "chunked", "content-type": "text/event-stream"}, True),
        (101, {}, False),
        # Another token may be tried first.
        (401, {}, False),
        (401, {"content-length": str(MAX_HELD)}, False),
        (401, {"content-length": str(MAX_HELD + 1)}, True),
    ],
)
def test_answers_that_may_be_long_pass_in_parts(status: int, headers: dict[str, str], streams: bool) -> None:
    fields = tuple((name.title().encode(), value.encode()) for name, value in headers.items())
    assert streams_response(status, fields) is streams


def test_a_budget_is_shared_and_what_is_given_back_can_be_held_again() -> None:
    budget = Budget(100)
    one, other = Share(budget), Share(budget)
    assert one.resize(60)
    assert not other.resize(41)
    assert (budget.held, other.size) == (60, 0)
    assert other.resize(40)
    assert one.resize(10)
    assert other.resize(90)
    del other
    assert budget.held == 10


def test_a_smaller_budget_takes_nothing_back_but_gives_nothing_more() -> None:
    budget = Budget(100)
    share = Share(budget)
    assert share.resize(80)
    budget.limit = 50
    assert not share.resize(81)
    assert share.resize(70)
    assert not share.resize(71)
    assert budget.held == 70
