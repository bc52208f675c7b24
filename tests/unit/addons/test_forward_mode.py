"""Forward mode fails closed: whatever goes wrong, nothing passes without the password."""

from dataclasses import replace
from typing import Any

import pytest
from mitmproxy.addons.proxyauth import ProxyAuth
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.connection import Server
from mitmproxy.http import HTTPFlow, Response
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import NextLayer
from mitmproxy.proxy.layers import TCPLayer
from mitmproxy.proxy.mode_specs import ProxyMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.test import taddons, tflow, tutils

from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.addons.addresses import exposure
from eoepca_security.proxy.addons.forward_mode import ForwardMode
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.patches.http_stream import Stream

PASSWORD = "Basic YWxpY2U6c2VjcmV0"  # alice:secret
SETTINGS = Settings(
    "https://issuer.example",
    Client("c"),
    refresh_token="r",
    mode="forward",
    proxy_auth="alice:secret",
    inject_hosts=("service.example",),
)


@pytest.fixture
async def context() -> Any:
    with taddons.context(Proxyserver()) as context:
        context.options.update(mode=["regular"])
        yield context


def made(settings: Settings | None = SETTINGS) -> tuple[ForwardMode, State]:
    state = State(end_all=lambda: None)
    state.settings = settings
    return ForwardMode(state), state


def addon_in(context: Any) -> OIDCAuthProxy:
    addon = OIDCAuthProxy(SETTINGS, make_sources=lambda *_, **__: None)  # type: ignore[arg-type]
    context.master.addons.add(addon)
    context.options.update(listen_host="127.0.0.1")
    return addon


def flow_for(method: str = "CONNECT", password: str | None = PASSWORD, host: str = "other.example") -> HTTPFlow:
    headers = ((b"Proxy-Authorization", password.encode()),) if password is not None else ()
    request = tutils.treq(method=method.encode(), host=host, port=443, path=b"", headers=headers, content=b"")
    flow = tflow.tflow(req=request)
    flow.client_conn.proxy_mode = ProxyMode.parse("regular")
    flow.client_conn.sockname = ("127.0.0.1", 8080)
    flow.live = True
    return flow


def next_layer(flow: HTTPFlow, context: Any) -> NextLayer:
    inner = Context(flow.client_conn, context.options)
    inner.server = Server(address=(flow.request.host, 443))
    stream = Stream(inner, 1)
    stream.flow = flow
    return NextLayer(inner)


def status(flow: HTTPFlow) -> int | None:
    return flow.response.status_code if flow.response is not None else None


async def test_a_tunnel_with_the_password_passes_and_the_password_is_gone(context: Any) -> None:
    forward_mode, _ = made()
    flow = flow_for()
    forward_mode.http_connect(flow)
    assert status(flow) is None
    assert "Proxy-Authorization" not in flow.request.headers
    layer = next_layer(flow, context)
    forward_mode.next_layer(layer)
    assert isinstance(layer.layer, TCPLayer)


async def test_a_tunnel_to_a_host_that_gets_the_token_is_left_to_mitmproxy(context: Any) -> None:
    forward_mode, _ = made()
    flow = flow_for(host="SERVICE.example")
    forward_mode.http_connect(flow)
    layer = next_layer(flow, context)
    forward_mode.next_layer(layer)
    assert (status(flow), layer.layer) == (None, None)


@pytest.mark.parametrize("password", [None, "Basic x", PASSWORD.lower()])
async def test_without_the_password_a_tunnel_leads_nowhere(password: str | None, context: Any) -> None:
    forward_mode, _ = made()
    flow = flow_for(password=password)
    forward_mode.http_connect(flow)
    assert flow.response is not None
    assert (flow.response.status_code, flow.response.headers["Proxy-Authenticate"][:5]) == (407, "Basic")
    layer = next_layer(flow, context)
    forward_mode.next_layer(layer)
    assert layer.layer is None


async def test_a_fault_while_it_decides_opens_no_tunnel(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_mode, _ = made()
    monkeypatch.setattr("eoepca_security.proxy.addons.forward_mode.is_right", lambda *_: 1 / 0)
    flow = flow_for()
    with pytest.raises(ZeroDivisionError):  # which mitmproxy logs, and goes on with the flow as it is
        forward_mode.http_connect(flow)
    assert status(flow) == 503
    layer = next_layer(flow, context)
    forward_mode.next_layer(layer)
    assert layer.layer is None


async def test_an_answer_of_another_addon_to_a_tunnel_stays(context: Any) -> None:
    forward_mode, _ = made()
    flow = flow_for()
    flow.response = Response.make(403)
    forward_mode.http_connect(flow)
    assert status(flow) == 403


@pytest.mark.parametrize("mode", ["upstream:http://proxy:1", "reverse:https://service.example", "socks5"])
async def test_in_other_modes_and_without_settings_there_are_no_tunnels(mode: str, context: Any) -> None:
    flow = flow_for()
    flow.client_conn.proxy_mode = ProxyMode.parse(mode)
    made()[0].http_connect(flow)
    assert status(flow) == 503
    flow = flow_for()
    made(None)[0].http_connect(flow)
    assert status(flow) == 503


async def test_no_connection_is_made_for_a_client_that_has_not_shown_the_password(context: Any) -> None:
    for password, is_allowed in ((None, False), (PASSWORD, True)):
        forward_mode, _ = made()
        flow = flow_for(password=password)
        proxyserver = context.master.addons.get("proxyserver")
        proxyserver.connections[flow.client_conn.id] = object()
        forward_mode.http_connect(flow)
        data = ServerConnectionHookData(Server(address=("other.example", 443)), flow.client_conn)
        forward_mode.server_connect(data)
        assert (data.server.error is None) is is_allowed


async def test_a_fault_while_it_decides_about_a_request_lets_nothing_pass(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    addon = addon_in(context)
    monkeypatch.setattr("eoepca_security.proxy.addons.forward_mode.is_right", lambda *_: 1 / 0)
    for host in ("other.example", "service.example"):
        flow = flow_for("GET", host=host)
        with pytest.raises(ZeroDivisionError):
            await addon.request_flow.requestheaders(flow)
        assert status(flow) == 503


async def test_a_replay_needs_no_password(context: Any) -> None:
    addon = addon_in(context)
    flow = flow_for("GET", password=None)
    flow.request.path = "/"
    await addon.request_flow.requestheaders(flow)
    assert status(flow) == 407
    flow.response, flow.is_replay = None, "request"
    await addon.request_flow.requestheaders(flow)
    assert status(flow) is None


async def test_options_that_would_make_an_open_proxy_are_refused(context: Any) -> None:
    addon = addon_in(context)
    assert addon.state.problems == []
    context.master.addons.add(ProxyAuth())
    for name, value, before in (
        ("mode", ["regular", "reverse:https://service.example@8081"], ["regular"]),
        ("proxyauth", "a:b", None),
    ):
        context.options.update(**{name: value})
        assert [problem.partition(":")[0] for problem in addon.state.problems] == [name]
        context.options.update(**{name: before})

    addon.state.settings = replace(SETTINGS, proxy_auth=None)
    for host, count in (("127.0.0.1", 0), ("::1", 0), ("0.0.0.0", 1), ("", 1), ("192.0.2.1", 1)):
        context.options.update(listen_host=host)
        assert len(addon.state.problems) == count, host
        assert all(problem.startswith("PROXY_AUTH_FILE: is required") for problem in addon.state.problems)


def test_that_the_password_travels_in_the_clear_is_told() -> None:
    line = exposure("http://0.0.0.0:8080", SETTINGS)
    assert "password" in line
    assert "secret" not in line
