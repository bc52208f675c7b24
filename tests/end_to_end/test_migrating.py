"""A sidecar with the settings and the arguments of eoepca-security 2.0."""

import ssl
import sys
from pathlib import Path

import httpx

from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.processes import ROOT, ProxyProcess, run_process
from tests.support.service import Recorder


def test_a_get_on_the_proxys_own_port_ends_a_sidecar_of_2_0(
    base_environment: dict[str, str], certificate: Path, client: httpx.Client, tmp_path: Path
) -> None:
    recorder = Recorder()
    server = recorder.server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    with FakeIssuer(Behaviour(audience="account"), client_secret="s") as issuer, server as service:
        environment = {
            "OPEN_ID_CONNECT_URL": f"{issuer.url}/.well-known/openid-configuration",
            "OPEN_ID_CONNECT_AUDIENCE": "account",
            "OPEN_ID_CONNECT_CLIENT_ID": issuer.client_id,
            "OPEN_ID_CONNECT_CLIENT_SECRET": "s",
            "OPEN_ID_REFRESH_TOKEN": issuer.refresh_token,
            "REMOTE_PROTECTED_DOMAIN": service.url.replace("http://", "https://"),
            "TLS_NO_VERIFY": "true",
            "PROXY_PORT": "0",
            "PROXY_TERMINATION_ENDPOINT": "http://0.0.0.0/quitquitquit",
        }
        command = [sys.executable, str(ROOT / "run-mitmproxy.py"), ""]
        proxy = ProxyProcess(run_process(command, base_environment | environment, tmp_path)).wait_until_started()
        try:
            assert client.get(f"{proxy.url}/collections").status_code == 200, proxy.output
            headers = {"Sec-Fetch-Site": "cross-site"}
            assert client.get(f"{proxy.url}/quitquitquit", headers=headers).status_code == 403
            answer = client.get(f"{proxy.url}/quitquitquit")
            assert (answer.status_code, answer.text) == (200, "ending\n")
            assert proxy.wait_until_ended() == 0
        finally:
            proxy.stop()
    assert [request.target for request in recorder.requests] == ["/collections"]
