"""The last step before a request leaves: cleared for this connection, or not at all."""

import logging

import pytest
from mitmproxy import options
from mitmproxy.connection import ConnectionState, Server
from mitmproxy.http import Request
from mitmproxy.net.server_spec import ServerSpec
from mitmproxy.proxy.commands import CloseConnection, Command, SendData
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.events import Start
from mitmproxy.proxy.layer import Layer
from mitmproxy.proxy.layers import http
from mitmproxy.proxy.layers.http._events import RequestData, RequestEndOfMessage, RequestHeaders
from mitmproxy.test import tflow

from eoepca_security.proxy.patches import http_clients
from eoepca_security.proxy.policy import clearance
from eoepca_security.proxy.policy.clearance import Clearance
from eoepca_security.proxy.policy.destination import Target

SERVICE = Target("http", "service.example", 80)


@pytest.fixture(autouse=True)
def _installed() -> None:
    http_clients.install()


def layer(kind: str, *, via: ServerSpec | None = None, tls: bool = False, port: int = 80) -> Layer:
    context = Context(tflow.tclient_conn(), options.Options())
    for name in ("validate_inbound_headers", "normalize_outbound_headers"):
        context.options.add_option(name, bool, True, "")
    server = Server(address=("Service.Example", port))
    server.tls, server.via = tls, via
    server.state = ConnectionState.OPEN
    context.server = server
    made: Layer = getattr(http, kind)(context)
    list(made.handle_event(Start()))
    return made


def send(made: Layer, request: Request) -> list[Command]:
    events = (RequestHeaders(1, request, end_stream=False), RequestData(1, b"body"), RequestEndOfMessage(1))
    return [command for event in events for command in made.handle_event(event)]


def sent(commands: list[Command]) -> bytes:
    return b"".join(command.data for command in commands if isinstance(command, SendData))


def post() -> Request:
    return Request.make("POST", "http://service.example/x", b"body", [(b"Authorization", b"shown")])


@pytest.mark.parametrize("kind", ["Http1Client", "Http2Client"])
def test_credentials_are_added_to_what_leaves_and_to_nothing_else(kind: str) -> None:
    request = post()
    clearance.clear(request, Clearance(SERVICE, {"Authorization": "Bearer real"}))
    commands = send(layer(kind), request)
    assert sent(commands)
    assert not [command for command in commands if isinstance(command, CloseConnection)]
    if kind == "Http1Client":
        assert sent(commands).count(b"Authorization: Bearer real\r\n") == 1
        assert b"shown" not in sent(commands)
    assert request.headers["Authorization"] == "shown"
    assert "real" not in repr(clearance.clearance(request))


@pytest.mark.parametrize("kind", ["Http1Client", "Http2Client"])
@pytest.mark.parametrize(
    ("target", "connection"),
    [
        (None, {}),
        (Target("http", "other.example", 80), {}),
        (SERVICE, {"port": 81}),
        (SERVICE, {"tls": True}),
        (SERVICE, {"via": ("http", ("proxy.example", 3128))}),
    ],
)
def test_without_a_clearance_for_this_connection_nothing_leaves(
    kind: str, target: Target | None, connection: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    request = post()
    if target is not None:
        clearance.clear(request, Clearance(target, {"Authorization": "Bearer real"}))
    made = layer(kind, **connection)  # type: ignore[arg-type]
    commands = send(made, request)
    assert sent(commands) == b""
    # So that the client does not wait for an answer.
    assert any(isinstance(c, CloseConnection) and c.connection is made.context.client for c in commands)
    assert "held back" in caplog.text
    assert "real" not in caplog.text


def test_what_is_cleared_without_credentials_leaves_as_it_is() -> None:
    request = post()
    clearance.clear(request, Clearance(SERVICE))
    assert b"Authorization: shown\r\n" in sent(send(layer("Http1Client"), request))


def test_a_copy_of_a_request_needs_a_clearance_of_its_own() -> None:
    request = post()
    clearance.clear(request, Clearance(SERVICE))
    assert http_clients.outgoing(request, SERVICE) is request
    assert http_clients.outgoing(request.copy(), SERVICE) is None


def test_the_authority_is_as_in_a_url() -> None:
    assert Target("https", "a.example", 443).authority == "a.example"
    assert Target("http", "a.example", 443).authority == "a.example:443"
    assert Target("http", "::1", 80).authority == "[::1]"
    assert Target("http", "::1", 9000).authority == "[::1]:9000"
