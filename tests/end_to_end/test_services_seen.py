"""Several services behind one login, as an operator sees them: real processes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import free_port
from tests.support.processes import StartProxy, admin_of
from tests.support.service import Recorder
from tests.support.waiting import eventually


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    behaviour = Behaviour(refresh_tokens="rotate", exchange_errors={"data": "unauthorized_client"})
    with FakeIssuer(behaviour) as issuer:
        yield issuer


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_operator_finds_which_service_has_which_problem(
    workers: str, start: StartProxy, issuer: FakeIssuer, client: httpx.Client, tmp_path: Path
) -> None:
    with Recorder().server() as default, Recorder().server() as stac:
        down = free_port()
        file = tmp_path / "services.toml"
        file.write_text(
            f'[service.stac]\nurl = "{stac.url}/api"\nhosts = ["stac.proxy.svc"]\n'
            f'[service.data]\nurl = "{stac.url}/data"\ntoken = "exchange"\naudience = "data"\n'
            f'[service.down]\nurl = "http://127.0.0.1:{down}"\n'
        )
        environment = settings_for(issuer, PROXY_SERVICES=str(file), PROXY_ADMIN="127.0.0.1:0", PROXY_WORKERS=workers)
        proxy = start("launcher", default.url, environment)
        port, admin = proxy.url.rpartition(":")[2], admin_of(proxy)
        proxy.wait_for(re.compile("service down: "))
        assert f"listening at {proxy.url} -> 4 services as " in proxy.output
        assert f"service default: http://default.localhost:{port} (also {proxy.url}) -> {default.url}" in proxy.output
        assert f"service stac: http://stac.localhost:{port} (also stac.proxy.svc) -> {stac.url}/api" in proxy.output

        def ask(name: str) -> int:
            return client.get(f"{proxy.url}/x", headers={"Host": f"{name}.localhost:{port}"}).status_code

        def ready(query: str) -> tuple[int, str | None]:
            answer = client.get(f"{admin}/readyz{query}")
            return answer.status_code, answer.headers.get("X-OIDC-Proxy-Error")

        assert [ask(name) for name in ("default", "stac", "data", "down")] == [200, 200, 502, 502]
        assert ready("") == (200, None)
        assert ready("?service=stac") == (200, None)
        assert ready("?service=data") == (503, "credentials_rejected")
        # It tells of the token only.
        assert ready("?service=down") == (200, None)
        unknown = client.get(f"{admin}/readyz?service=nobody")
        assert (unknown.status_code, unknown.json()["services"]) == (404, ["default", "stac", "data", "down"])

        status = client.get(f"{admin}/status").json()
        assert (status["state"], status["upstream"]) == ("ready", "4 services")
        assert status["example"] == f"curl -i http://default.localhost:{port}/"
        states = {service["name"]: service["state"] for service in status["services"]}
        assert states == {"default": "ready", "stac": "ready", "data": "failing", "down": "ready"}
        problems = {problem["service"]: problem["title"] for problem in status["problems"]}
        assert problems == {
            "data": "The identity provider rejected the proxy's credentials",
            "down": "The protected service does not answer",
        }
        metrics = client.get(f"{admin}/metrics").text
        assert 'oidc_proxy_requests_total{code="",service="stac",status_class="2xx"} 1.0\n' in metrics
        assert 'oidc_proxy_requests_total{code="credentials_rejected",service="data",status_class="5xx"} 1.0' in metrics
        assert 'oidc_proxy_token_expiry_timestamp_seconds{service="data"} 0.0\n' in metrics
        page = client.get(f"{admin}/").text
        assert page.count("<h3>") == 4
        eventually(lambda: "the protected service down cannot be reached: " in proxy.output)
        shown = json.dumps(status) + metrics + page + proxy.output
        assert not [token for token in issuer._issued if token in shown]


def test_the_only_service_of_a_file_is_called_by_its_name(
    start: StartProxy, issuer: FakeIssuer, client: httpx.Client, tmp_path: Path
) -> None:
    with Recorder().server() as stac:
        file = tmp_path / "services.toml"
        file.write_text(f'[service.stac]\nurl = "{stac.url}/api"\n')
        environment = settings_for(issuer, PROXY_SERVICES=str(file), PROXY_ADMIN="127.0.0.1:0")
        proxy = start("launcher", "", environment)
        port, admin = proxy.url.rpartition(":")[2], admin_of(proxy)
        status = client.get(f"{admin}/status").json()
        assert status["browser_address"] == f"http://stac.localhost:{port}"
        assert status["upstream"] == f"{stac.url}/api"
        assert f"-> {stac.url}/api as " in proxy.output
        assert client.get(f"{admin}/readyz?service=stac").status_code == 200


def test_without_a_file_nothing_is_called_by_a_name(
    start: StartProxy, issuer: FakeIssuer, client: httpx.Client
) -> None:
    with Recorder().server() as service:
        proxy = start("launcher", service.url, settings_for(issuer, PROXY_ADMIN="127.0.0.1:0"))
        assert client.get(proxy.url).status_code == 200
        admin = admin_of(proxy)
        assert "service=" not in client.get(f"{admin}/metrics").text
        [only] = client.get(f"{admin}/status").json()["services"]
        assert (only["name"], only["addresses"], only["state"]) == ("default", [proxy.url], "ready")
        assert only["last_answer"]["status"] == 200
        assert "service default" not in proxy.output
