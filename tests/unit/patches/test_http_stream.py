"""What an exchange holds of bodies is given back when it is over, and not when the garbage is collected."""

from collections.abc import Iterator

import pytest
import wsproto
import wsproto.connection
import wsproto.events
from mitmproxy.options import Options
from mitmproxy.proxy.commands import Command, RequestWakeup
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.events import DataReceived, Event, HookCompleted, Start, Wakeup
from mitmproxy.proxy.layers.websocket import WebsocketEndHook, WebsocketStartHook
from mitmproxy.test.tflow import twebsocketflow

from eoepca_security.proxy.patches import client_timeout
from eoepca_security.proxy.patches.http_stream import _WebSocket, budget


@pytest.fixture
def socket() -> _WebSocket:
    """Return a WebSocket whose handshake is over."""
    flow = twebsocketflow(messages=False)
    context = Context(flow.client_conn, Options())
    context.server = flow.server_conn
    layer = _WebSocket(context, flow)
    [hook] = handle(layer, Start())
    assert isinstance(hook, WebsocketStartHook)
    assert handle(layer, HookCompleted(hook)) == []
    return layer


@pytest.fixture
def no_patience() -> Iterator[None]:
    before = client_timeout.limit()
    client_timeout.set_limit(0)
    yield
    client_timeout.set_limit(before)


def handle(layer: _WebSocket, event: Event) -> list[Command]:
    return list(layer.handle_event(event))


@pytest.mark.usefixtures("no_patience")
def test_a_conversation_that_is_given_up_gives_back_what_it_holds(socket: _WebSocket) -> None:
    before = budget.held
    client = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
    begun = client.send(wsproto.events.TextMessage("x" * 1000, message_finished=False))
    [timer] = handle(socket, DataReceived(socket.context.client, begun))
    assert isinstance(timer, RequestWakeup)
    assert budget.held >= before + 1000
    *_, hook = handle(socket, Wakeup(timer))
    assert isinstance(hook, WebsocketEndHook)
    assert handle(socket, HookCompleted(hook)) == []
    assert budget.held == before
