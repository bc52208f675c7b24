"""What is told of connections to the service."""

from pathlib import Path

import pytest
from mitmproxy.proxy.mode_specs import ProxyMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.test import tflow

from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.addons.connections import Connections
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.policy.routing import Routes


@pytest.mark.parametrize("mode", ["reverse:http://service.example", "regular"])
@pytest.mark.parametrize("has_hung_up", [False, True])
def test_only_the_service_is_blamed_for_what_it_does(
    has_hung_up: bool, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = tflow.tclient_conn(), tflow.tserver_conn()
    client.proxy_mode = ProxyMode.parse(mode)
    client.timestamp_end = 1.0 if has_hung_up else None
    server.error = "client disconnected" if has_hung_up else "Connection refused\n"
    state = State(end_all=lambda: None)
    state.settings = Settings("https://issuer.example", Client("c"), command=Command("./run-mitmproxy.py"))
    Connections(state).server_connect_error(ServerConnectionHookData(server, client))
    told = [record.getMessage() for record in caplog.records]
    said = "the protected service cannot be reached: Connection refused\N{REPLACEMENT CHARACTER}; "
    assert len(told) == (0 if has_hung_up or mode == "regular" else 1)
    assert all(line == said + "run `./run-mitmproxy.py check` for the remedy" for line in told)


@pytest.mark.parametrize(
    ("host", "whom"),
    [
        ("stac.example", "the protected service stac"),
        ("gateway.example", "the protected services inner, outer"),
        ("other.example", "the protected service"),
    ],
)
def test_a_service_that_cannot_be_reached_is_named(host: str, whom: str, caplog: pytest.LogCaptureFixture) -> None:
    client, server = tflow.tclient_conn(), tflow.tserver_conn()
    client.proxy_mode = ProxyMode.parse("reverse:https://stac.example")
    client.timestamp_end = None
    server.address, server.tls, server.error = (host, 443), True, "Connection refused"
    services = (
        Service("stac", "https://stac.example"),
        Service("outer", "https://gateway.example"),
        Service("inner", "https://gateway.example", "/api"),
    )
    state = State(end_all=lambda: None, routes=Routes(services))
    state.settings = Settings("https://issuer.example", Client("c"), services=services, services_file=Path("s.toml"))
    Connections(state).server_connect_error(ServerConnectionHookData(server, client))
    [line] = caplog.messages
    assert line.startswith(f"{whom} cannot be reached: Connection refused; ")
