"""The admin listener in this process: its rules and bounds."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client import Metric

from eoepca_security.errors import CredentialsRejected, TokenError
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.admin import server as admin
from eoepca_security.proxy.admin.metrics import Metrics, counts, exposition, from_json, merged, to_json
from eoepca_security.proxy.admin.server import Admin, admin_guard
from eoepca_security.proxy.admin.status import AdminSource, Unready, status
from eoepca_security.proxy.config.settings import Address, Settings
from tests.support.state import STATE

SETTINGS = Settings("https://issuer.example", Client("c"), admin=Address("127.0.0.1", 0))


class Proxy:
    def __init__(self) -> None:
        self.failure: TokenError | None = None
        self.metrics = Metrics(lambda: 3, lambda: 3)
        self.ended = 0
        self.asked: list[str | None] = []

    async def ready(self, service: str | None) -> Unready | None:
        self.asked.append(service)
        return Unready(self.failure.code, str(self.failure)) if self.failure is not None else None

    def services(self) -> list[str]:
        return ["stac", "data"]

    async def families(self) -> list[Metric]:
        return self.metrics.families()

    async def status(self) -> dict[str, Any]:
        return status(replace(STATE, error=self.failure))

    def quit(self) -> None:
        self.ended += 1


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
async def address(proxy: Proxy) -> AsyncIterator[Address]:
    server = Admin(SETTINGS, AdminSource(proxy.ready, proxy.services, proxy.status, proxy.families, proxy.quit))
    address = server.start()
    assert address is not None
    yield address
    server.stop()


@pytest.fixture
async def client(address: Address) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
        yield client


async def test_readiness_tells_the_code(client: httpx.AsyncClient, proxy: Proxy) -> None:
    assert (await client.get("/readyz")).text == "ok\n"
    proxy.failure = CredentialsRejected("log in again")
    response = await client.get("/readyz")
    assert (response.status_code, response.headers["X-OIDC-Proxy-Error"]) == (503, "credentials_rejected")
    assert (response.json()["code"], response.json()["detail"]) == ("credentials_rejected", "log in again")
    assert (await client.get("/livez")).status_code == 200


async def test_metrics_count_by_class_code_and_result(client: httpx.AsyncClient, proxy: Proxy) -> None:
    proxy.metrics.request_ended(204)
    proxy.metrics.request_ended(403, "host_not_allowed")
    proxy.metrics.request_ended(None)
    proxy.metrics.refreshed(None, 0.3)
    proxy.metrics.refreshed(CredentialsRejected("no"), -1)
    proxy.metrics.token_ends(1e9)
    text = (await client.get("/metrics")).text
    for line in (
        'oidc_proxy_requests_total{code="",status_class="2xx"} 1.0',
        'oidc_proxy_requests_total{code="host_not_allowed",status_class="4xx"} 1.0',
        'oidc_proxy_requests_total{code="",status_class="none"} 1.0',
        'oidc_proxy_refreshes_total{result="success"} 1.0',
        'oidc_proxy_refreshes_total{result="credentials_rejected"} 1.0',
        'oidc_proxy_refresh_duration_seconds_bucket{le="0.5"} 2.0',
        "oidc_proxy_token_expiry_timestamp_seconds 1e+09",
        "oidc_proxy_requests_in_flight 3.0",
    ):
        assert line in text
    assert counts(proxy.metrics.families()) == {
        "requests": {"2xx": 1, "4xx": 1, "none": 1},
        "service_answers": {"2xx": 1, "none": 1},
        "errors": {"host_not_allowed": 1},
        "refreshes": {"success": 1, "credentials_rejected": 1},
    }
    openmetrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["Content-Type"].startswith("application/openmetrics-text")


async def test_readiness_of_one_service_is_told_by_its_name(client: httpx.AsyncClient, proxy: Proxy) -> None:
    assert (await client.get("/readyz")).text == "ok\n"
    assert (await client.get("/readyz?service=stac")).text == "ok\n"
    proxy.failure = CredentialsRejected("it may not exchange")
    response = await client.get("/readyz?service=data")
    assert (response.status_code, response.json()["code"]) == (503, "credentials_rejected")
    assert proxy.asked == [None, "stac", "data"]


@pytest.mark.parametrize("name", ["", "other", "Stac", "stac,data", "%3Cscript%3E", "x" * 1000])
async def test_readiness_of_a_service_that_there_is_not_lists_those_that_there_are(
    name: str, client: httpx.AsyncClient, proxy: Proxy
) -> None:
    response = await client.get(f"/readyz?service={name}")
    assert (response.status_code, response.headers["Content-Type"]) == (404, "application/problem+json")
    assert response.json()["services"] == ["stac", "data"]
    assert response.json()["detail"].endswith("is not a service: use one of stac, data")
    assert len(response.content) < 500
    assert proxy.asked == []


async def test_readiness_is_asked_for_one_service_at_a_time(client: httpx.AsyncClient, proxy: Proxy) -> None:
    response = await client.get("/readyz?service=stac&service=data")
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert proxy.asked == []


def test_metrics_tell_services_apart_when_a_file_has_them(proxy: Proxy) -> None:
    metrics = proxy.metrics
    metrics.request_ended(200, service="stac")
    metrics.request_ended(502, "token_invalid", "data")
    metrics.request_ended(403, "host_not_allowed")
    metrics.refreshed(None, 0.3)
    metrics.refreshed(CredentialsRejected("no"), 0.3, "stac")
    metrics.token_ends(1e9)
    metrics.token_ends(2e9, "stac")
    families = metrics.families(["stac", "data"])
    text = exposition(families, "")[0].decode()
    for line in (
        'oidc_proxy_requests_total{code="",service="stac",status_class="2xx"} 1.0',
        'oidc_proxy_requests_total{code="token_invalid",service="data",status_class="5xx"} 1.0',
        'oidc_proxy_requests_total{code="host_not_allowed",service="",status_class="4xx"} 1.0',
        'oidc_proxy_refreshes_total{result="success",service=""} 1.0',
        'oidc_proxy_refreshes_total{result="credentials_rejected",service="stac"} 1.0',
        'oidc_proxy_refresh_duration_seconds_count{service="stac"} 1.0',
        'oidc_proxy_token_expiry_timestamp_seconds{service=""} 1e+09',
        'oidc_proxy_token_expiry_timestamp_seconds{service="stac"} 2e+09',
    ):
        assert f"{line}\n" in text
    twice = exposition(merged([families, from_json(to_json(families))]), "")[0].decode()
    assert 'oidc_proxy_requests_total{code="",service="stac",status_class="2xx"} 2.0\n' in twice
    assert 'oidc_proxy_token_expiry_timestamp_seconds{service="stac"} 2e+09\n' in twice
    assert counts(families) == {
        "requests": {"2xx": 1, "4xx": 1, "5xx": 1},
        "service_answers": {"2xx": 1},
        "errors": {"host_not_allowed": 1, "token_invalid": 1},
        "refreshes": {"success": 1},
    }


def test_a_service_that_is_gone_keeps_its_counts_and_has_no_token(proxy: Proxy) -> None:
    for name in ("stac", "data"):
        proxy.metrics.request_ended(200, service=name)
        proxy.metrics.token_ends(1e9, name)
    text = exposition(proxy.metrics.families(["data"]), "")[0].decode()
    assert 'oidc_proxy_requests_total{code="",service="stac",status_class="2xx"} 1.0\n' in text
    assert re.findall(r'oidc_proxy_token_expiry_timestamp_seconds{service="(\w*)"}', text) == ["", "data"]


def test_metrics_have_no_label_for_the_service_when_there_is_one(proxy: Proxy) -> None:
    proxy.metrics.request_ended(200)
    proxy.metrics.refreshed(None, 0.3)
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        text = exposition(proxy.metrics.families(), accept)[0].decode()
        assert "service=" not in text
        assert "oidc_proxy_token_expiry_timestamp_seconds 0.0\n" in text
        assert "oidc_proxy_refresh_duration_seconds_count 1.0\n" in text
    untouched = exposition(Metrics(lambda: 0, lambda: 0).families(), "")[0].decode()
    assert "oidc_proxy_refresh_duration_seconds_count 0.0\n" in untouched


async def test_methods_and_paths_that_there_are_not(client: httpx.AsyncClient, proxy: Proxy) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        response = await client.request(method, "/status")
        assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD")
    for method in ("GET", "HEAD", "PUT"):
        response = await client.request(method, "/quitquitquit")
        assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    response = await client.head("/status")
    assert (response.status_code, response.content) == (200, b"")
    assert (await client.get("/other")).status_code == 404
    assert proxy.ended == 0
    assert (await client.post("/quitquitquit")).status_code == 200
    assert proxy.ended == 1


async def test_other_sites_reach_no_page(client: httpx.AsyncClient, proxy: Proxy) -> None:
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Service-Worker": "script"},
    ):
        for method, path in (("GET", "/livez"), ("GET", "/"), ("GET", "/other"), ("POST", "/quitquitquit")):
            response = await client.request(method, path, headers=headers)
            assert (response.status_code, response.headers["Cross-Origin-Resource-Policy"]) == (403, "same-origin")
    assert proxy.ended == 0
    link = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (await client.get("/", headers=link)).status_code == 200


async def test_every_answer_is_locked_down(client: httpx.AsyncClient) -> None:
    for path in ("/", "/status", "/metrics", "/other", "/status.js"):
        headers = (await client.get(path)).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Server" not in headers
        assert not [name for name in headers if name.lower().startswith("access-control")]


async def test_the_page_may_load_what_is_here_and_nothing_else(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert policy == (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'"
    )
    assert not re.search(r" (style|on[a-z]+)=|<style|<script>|(href|src)=\"[^\"]*[:/]", response.text)
    loaded = re.findall(r'<(?:link|script) [^>]*(?:href|src)="([^"]+)"', response.text)
    types = [(await client.get(f"/{name}")).headers["Content-Type"] for name in loaded]
    assert types == ["image/svg+xml", "text/css; charset=utf-8", "text/javascript; charset=utf-8"]
    assert (await client.post(f"/{loaded[0]}")).status_code == 405


async def test_sizes_and_times_are_bounded(address: Address, monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    monkeypatch.setattr(admin, "TIMEOUT", 0.2)
    server = Admin(SETTINGS, AdminSource(proxy.ready, proxy.services, proxy.status, proxy.families, proxy.quit))
    bounded = server.start()
    assert bounded is not None
    try:
        for at, data in (
            (address, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000),
            (address, b"POST /quitquitquit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n"),
            (bounded, b"GET /livez HTTP/1.1\r\nHost: lo"),
            (bounded, b"POST /quitquitquit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx"),
        ):
            reader, writer = await asyncio.open_connection(at.host, at.port)
            writer.write(data)
            try:
                answer = await asyncio.wait_for(reader.read(), 5)
            except ConnectionResetError:
                answer = b""
            assert b" 200 " not in answer
            writer.close()
    finally:
        server.stop()
    assert proxy.ended == 0


def allows(settings: Settings, host: str) -> bool:
    assert settings.admin is not None
    values = {"Host": [host]}
    return admin_guard(settings, settings.admin).refusal("http", [host], lambda name: values.get(name, [])) is None


def test_a_probe_may_name_an_ip_address_where_all_are_listened_on() -> None:
    everywhere = replace(SETTINGS, admin=Address("0.0.0.0", 8081))
    assert allows(everywhere, "10.1.2.3:8081")
    assert allows(everywhere, "localhost:8081")
    assert not allows(everywhere, "evil.example:8081")
    assert not allows(SETTINGS, "10.1.2.3:8081")
    elsewhere = replace(SETTINGS, admin=Address("fd00::1", 8081), allowed_hosts=("proxy.test",))
    assert allows(elsewhere, "[fd00::1]:8081")
    assert allows(elsewhere, "proxy.test:8081")
    assert not allows(elsewhere, "[fd00::2]:8081")
