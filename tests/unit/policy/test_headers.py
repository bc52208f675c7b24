"""What of a request goes on, and what is added."""

import base64
import json
import logging
from typing import Any

import pytest
from mitmproxy.http import Request

from eoepca_security.errors import IssuerUnavailable
from eoepca_security.proxy.policy.apisix import ApisixHeaders, without_gateway_headers
from eoepca_security.proxy.policy.headers import (
    answer_without_hop_by_hop,
    has_usable_length,
    is_one_request,
    repaired,
    with_hidden_credentials,
    without_framing,
    without_hop_by_hop,
)
from eoepca_security.session.session import AccessToken


def request(*headers: tuple[str, str], version: str = "HTTP/1.1", method: str = "GET") -> Request:
    made = Request.make(method, "http://localhost/", headers=[(n.encode(), v.encode()) for n, v in headers])
    made.http_version = version
    return made


def left(*headers: tuple[str, str], version: str = "HTTP/1.1", method: str = "GET") -> dict[str, str]:
    made = request(*headers, version=version, method=method)
    fields = without_hop_by_hop(made.data)
    return {n.lower().decode(): value.decode() for n, value in fields if n.lower() != b"content-length"}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("Connection", "close")], {"connection": "close"}),
        ([("Connection", "Keep-Alive, X-A"), ("X-A", "1"), ("X-B", "2")], {"connection": "keep-alive", "x-b": "2"}),
        ([("Connection", "x-a"), ("connection", "CLOSE"), ("x-A", "1")], {"connection": "close"}),
        ([("Proxy-Authorization", "x"), ("Proxy-Connection", "x"), ("Keep-Alive", "x"), ("TE", "trailers")], {}),
        ([("Upgrade", "H2C"), ("Connection", "Upgrade, HTTP2-Settings"), ("HTTP2-Settings", "x")], {}),
        ([("Upgrade", "websocket, h2c"), ("Connection", "Upgrade")], {}),
        (
            [("Upgrade", "WebSocket"), ("Connection", "keep-alive, Upgrade")],
            {"upgrade": "WebSocket", "connection": "Upgrade, keep-alive"},
        ),
        ([("Transfer-Encoding", "chunked"), ("Trailer", "X-T")], {"transfer-encoding": "chunked", "trailer": "X-T"}),
    ],
)
def test_what_is_for_the_next_hop_is_dropped(headers: list[tuple[str, str]], expected: dict[str, str]) -> None:
    assert left(*headers) == expected


def test_only_a_get_opens_a_websocket_and_http2_may_have_trailers() -> None:
    assert left(("Upgrade", "websocket"), ("Connection", "Upgrade"), method="POST") == {}
    assert left(("te", "trailers"), version="HTTP/2.0") == {"te": "trailers"}
    assert left(("te", "gzip"), version="HTTP/2.0") == {}


@pytest.mark.parametrize(
    "headers",
    [
        [("X", "a\r\n b")],
        [("X", "a\nb")],
        [("X", "a\rb")],
        [("X", "a\0b")],
        [("X\r\nY", "a")],
        [("Connection", "close, Content-Length")],
        [("Connection", "transfer-encoding")],
        [("Connection", "Host")],
    ],
)
def test_what_two_could_read_differently_is_no_request(headers: list[tuple[str, str]]) -> None:
    assert is_one_request(request(("X", "fine")).data)
    assert not is_one_request(request(*headers).data)


@pytest.mark.parametrize("version", ["HTTP/0.9", "HTTP/1.2", "HTTP/9.9"])
def test_nor_is_one_of_an_unknown_version(version: str) -> None:
    assert not is_one_request(request(version=version).data)


def test_the_clients_credentials_are_hidden() -> None:
    sent = (
        (b"authorization", b"Basic a"),
        (b"X", b"y"),
        (b"AUTHORIZATION", b"Basic b"),
        (b"Proxy-Authorization ", b"c"),
    )
    fields = with_hidden_credentials(sent)
    assert [value for name, value in fields if name != b"X"] == [b"Bearer (added by the proxy)"] * 2
    assert (b"X", b"y") in fields
    assert with_hidden_credentials(((b"X", b"y"),)) == ((b"X", b"y"),)


def test_gateway_headers_are_dropped_in_every_spelling() -> None:
    names = (
        "X-Access-Token",
        "x_access_token",
        "X-ID-Token",
        "X_Id-Token",
        "X-Userinfo",
        "X-Raw-ID-Token",
        "X-Refresh-Token",
    )
    fields = tuple((name.encode(), b"x") for name in (*names, "X-Access-Token-Other", "X-User"))
    assert [name for name, _ in without_gateway_headers(fields)] == [b"X-Access-Token-Other", b"X-User"]


def jwt_of(claims: dict[str, Any]) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.c2ln"


class StubProvider:
    """Answers with claims about the user, with none, or not at all."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def userinfo(self, _token: str) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def decoded(text: str) -> Any:
    assert len(text) % 4 == 0
    return json.loads(base64.b64decode(text, validate=True))


def test_apisix_headers_are_padded_base64_of_json() -> None:
    headers = ApisixHeaders()
    token = AccessToken(jwt_of({"sub": "u"}), 0, 60, jwt_of({"sub": "u", "name": "Zoë??>"}))
    headers.learn(StubProvider({"sub": "u", "email": "u@example"}), token.value)  # type: ignore[arg-type]
    sent = headers.of(token)
    assert sent["X-Access-Token"] == token.value
    assert decoded(sent["X-ID-Token"]) == {"sub": "u", "name": "Zoë??>"}
    assert decoded(sent["X-Userinfo"]) == {"sub": "u", "email": "u@example"}
    assert "Zoë".encode() in base64.b64decode(sent["X-ID-Token"])


def test_without_userinfo_the_access_tokens_claims_stand_in_for_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    headers = ApisixHeaders()
    token = AccessToken(jwt_of({"sub": "u"}), 0, 60)
    for answer in (None, IssuerUnavailable("down"), IssuerUnavailable("down")):
        headers.learn(StubProvider(answer), token.value)  # type: ignore[arg-type]
        sent = headers.of(token)
        assert decoded(sent["X-Userinfo"]) == {"sub": "u"}
        assert "X-ID-Token" not in sent
    assert caplog.text.count("down") == 1
    # What was learnt of one token is not said of another, and an opaque one says nothing.
    headers.learn(StubProvider({"sub": "another"}), "another")  # type: ignore[arg-type]
    assert decoded(headers.of(token)["X-Userinfo"]) == {"sub": "u"}
    assert set(headers.of(AccessToken("opaque", 0, 60))) == {"X-Access-Token"}


@pytest.mark.parametrize("method", ["head", "Connect", "hEAD"])
def test_methods_that_mitmproxy_takes_for_others_are_refused(method: str) -> None:
    assert not is_one_request(request(method=method).data)
    assert is_one_request(request(method="get").data)


@pytest.mark.parametrize(
    ("length", "is_usable"),
    [("0", True), ("9223372036854775807", True), ("9223372036854775808", False), ("1" * 5000, False), ("-1", False)],
)
def test_lengths_fit_63_bits(length: str, is_usable: bool) -> None:
    assert has_usable_length(((b"Content-Length", length.encode()),)) == is_usable


def test_the_head_of_an_answer_is_repaired_or_refused() -> None:
    status = b"HTTP/1.1 200 OK"
    fine = [status, b"A: b", b"C:d : e"]
    assert repaired(fine) == fine
    assert repaired([status, b"A : b", b"C:\td", b"  e", b"\tf "]) == [status, b"A: b", b"C:\td e f"]
    begun = ([b"HTTP/3.0 200 OK"], [b"ICY 200 OK"], [status, b" A: b"], [status, b"A: b", b" \rc"], [status, b"A: \0"])
    for malformed in begun:
        with pytest.raises(ValueError, match=r"status line|begins with a space|control character"):
            repaired(malformed)


def test_what_is_for_the_services_connection_is_dropped() -> None:
    fields = ((b"Connection", b"close, X"), (b"x", b"1"), (b"Upgrade", b"websocket"), (b"Y", b"1"))
    assert answer_without_hop_by_hop(fields, 200) == ((b"Y", b"1"),)
    assert answer_without_hop_by_hop(fields, 101) == (*fields[2:], (b"Connection", b"Upgrade"))
    with pytest.raises(ValueError, match="defines its end"):
        answer_without_hop_by_hop(((b"Connection", b"Content-Length"),), 200)


@pytest.mark.parametrize(
    ("method", "status", "left"),
    [
        (b"GET", 200, [b"Transfer-Encoding", b"content-length"]),
        (b"HEAD", 200, [b"content-length"]),
        (b"GET", 304, [b"content-length"]),
        (b"GET", 204, []),
    ],
)
def test_what_has_no_content_announces_none(method: bytes, status: int, left: list[bytes]) -> None:
    fields = ((b"Transfer-Encoding", b"chunked"), (b"content-length", b"5"))
    assert [name for name, _ in without_framing(fields, method, status)] == left
