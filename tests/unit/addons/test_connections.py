"""What is told of connections to the service."""

import pytest
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.test import tflow

from eoepca_security.proxy.addons.connections import Connections
from eoepca_security.proxy.addons.state import State


@pytest.mark.parametrize("has_hung_up", [False, True])
def test_only_the_service_is_blamed_for_what_it_does(has_hung_up: bool, caplog: pytest.LogCaptureFixture) -> None:
    client, server = tflow.tclient_conn(), tflow.tserver_conn()
    client.timestamp_end = 1.0 if has_hung_up else None
    server.error = "client disconnected" if has_hung_up else "Connection refused\n"
    Connections(State(end_all=lambda: None)).server_connect_error(ServerConnectionHookData(server, client))
    told = [record.getMessage() for record in caplog.records]
    said = "the protected service cannot be reached: Connection refused\N{REPLACEMENT CHARACTER}; run `run-mitmproxy.py"
    assert len(told) == (0 if has_hung_up else 1)
    assert all(line.startswith(said) for line in told)
