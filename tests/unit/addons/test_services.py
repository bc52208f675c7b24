"""What the add-on tells of several services behind one login."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import certifi
import pytest
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.http import HTTPFlow, Response
from mitmproxy.proxy.mode_specs import ProxyMode
from mitmproxy.test import taddons, tflow

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable
from eoepca_security.oauth.protocol import TokenResponse
from eoepca_security.proxy.addons.addresses import browser_address
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.admin.metrics import exposition
from eoepca_security.proxy.admin.status import Unready
from eoepca_security.proxy.config.factory import ca_bundle_file
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.policy.access import Guard
from eoepca_security.proxy.policy.problem_details import CODE, DETAIL, REMEDY
from eoepca_security.session.service_tokens import Sources, exchanged_tokens, shared_tokens
from eoepca_security.session.source import TokenSource
from tests.support.issuer import Issuer
from tests.support.services import PLAIN, STAC, with_services

SETTINGS = with_services(STAC, PLAIN)


class Proxy:
    """The add-on with a service for which tokens are exchanged, and one that gets the session's."""

    def __init__(self, context: Any, settings: Settings = SETTINGS) -> None:
        self.login = Issuer()
        self.exchanges: Iterator[TokenResponse | Exception] = iter(())
        self.addon = OIDCAuthProxy(settings, make_sources=self._make_sources)
        context.master.addons.add(self.addon)
        context.options.update(mode=["reverse:https://stac.example"])

    def _make_sources(self, _: Settings, *, hooks: Any, **__: Any) -> Sources:
        def options(service: Service) -> dict[str, Any]:
            return {"observe": hooks(service).observe, "service": service.name}

        login = TokenSource(self.login, refresh_token="first", observe=hooks(None).observe)
        stac = exchanged_tokens(login, self._exchange, **options(STAC))
        return Sources(login, {"stac": stac, "plain": shared_tokens(login, **options(PLAIN))})

    def _exchange(self, _: str) -> TokenResponse:
        answer = next(self.exchanges, TokenResponse("exchanged", expires_in=60))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def ready(self, name: str | None) -> Unready | None:
        return await self.addon.admin_source().ready(name)

    async def metrics(self) -> str:
        return exposition(await self.addon.admin_source().families(), "")[0].decode()

    def service(self, name: str) -> dict[str, Any]:
        return next(one for one in self.addon.monitoring.status()["services"] if one["name"] == name)

    async def ask(self, host: str, status: int | None = 200, **metadata: str) -> HTTPFlow:
        """Send a request that gets this status, or what the metadata say."""
        flow = tflow.tflow()
        flow.client_conn.proxy_mode = ProxyMode.parse("reverse:https://stac.example")
        flow.client_conn.sockname = ("127.0.0.1", 8080)
        flow.request.host_header, flow.request.path = host, "/x"
        self.addon.monitoring.requestheaders(flow)
        await self.addon.request_flow.requestheaders(flow)
        flow.metadata |= metadata
        if flow.response is None and status is not None:
            flow.response = Response.make(status)
        self.addon.monitoring.response(flow)
        return flow


@pytest.fixture
async def context() -> Any:
    with taddons.context(Proxyserver()) as context:
        yield context


@pytest.fixture
def proxy(context: Any) -> Proxy:
    return Proxy(context)


async def test_readiness_is_that_of_the_session_or_of_one_service(proxy: Proxy) -> None:
    proxy.exchanges = iter([CredentialsRejected("it may not exchange", issuer_error="invalid_client")])
    assert list(proxy.addon.admin_source().services()) == ["stac", "plain"]
    assert await proxy.ready(None) is None
    assert len(proxy.login.asked) == 1
    assert proxy.service("stac")["state"] == "starting"
    unready = await proxy.ready("stac")
    assert unready is not None
    assert (unready.code, unready.detail.partition(";")[0]) == ("credentials_rejected", "it may not exchange")
    assert await proxy.ready("plain") is None
    assert await proxy.ready(None) is None
    assert (proxy.service("stac")["state"], proxy.service("plain")["state"]) == ("failing", "ready")
    assert proxy.addon.monitoring.status()["state"] == "ready"
    [problem] = proxy.addon.monitoring.status()["problems"]
    assert problem["service"] == "stac"
    [error] = proxy.addon.monitoring.status()["recent_errors"]
    assert (error["service"], error["code"]) == ("stac", "credentials_rejected")


async def test_what_the_session_lacks_is_told_once(proxy: Proxy) -> None:
    proxy.login.answers = [IssuerUnavailable("it is down", retry_after=60)]
    unready = await asyncio.gather(*(proxy.ready(name) for name in (None, "stac", "plain")))
    assert all(one is not None and one.code == "issuer_unavailable" for one in unready)
    told = proxy.addon.monitoring.status()
    assert len(told["problems"]) == 1
    assert [(one["count"], one.get("service")) for one in told["recent_errors"]] == [(1, None)]
    assert {one["state"] for one in told["services"]} == {"failing"}
    assert told["refreshes"] == {"issuer_unavailable": 1}


async def test_metrics_and_answers_are_told_apart(proxy: Proxy) -> None:
    await proxy.ask("stac.localhost:8080", 204)
    await proxy.ask("plain.localhost:8080", 401)
    fault = {CODE: "upstream_unavailable", DETAIL: "stac at stac.example: refused", REMEDY: "check url"}
    await proxy.ask("stac.proxy.svc", 502, **fault)
    await proxy.ask("nobody.localhost:8080")
    text = await proxy.metrics()
    for line in (
        'oidc_proxy_requests_total{code="",service="stac",status_class="2xx"} 1.0',
        'oidc_proxy_requests_total{code="",service="plain",status_class="4xx"} 1.0',
        'oidc_proxy_requests_total{code="upstream_unavailable",service="stac",status_class="5xx"} 1.0',
        'oidc_proxy_requests_total{code="host_not_allowed",service="",status_class="4xx"} 1.0',
        'oidc_proxy_refreshes_total{result="success",service=""} 1.0',
        'oidc_proxy_refreshes_total{result="success",service="stac"} 1.0',
        'oidc_proxy_refresh_duration_seconds_count{service="plain"} 1.0',
    ):
        assert f"{line}\n" in text
    assert "nobody" not in text
    told = proxy.addon.monitoring.status()
    assert told["refreshes"] == {"success": 1}
    assert [(problem["service"], problem["title"]) for problem in told["problems"]] == [
        ("stac", "The protected service does not answer"),
        ("plain", "The protected service refuses the token"),
    ]
    assert proxy.service("plain")["last_answer"]["status"] == 401
    await proxy.ask("stac.localhost:8080", 200)
    await proxy.ask("plain.localhost:8080", 200)
    assert proxy.addon.monitoring.status()["problems"] == []


async def test_a_refused_token_is_told_with_the_services_name(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flow = await proxy.ask("stac.localhost:8080", 401)
    for outcome in (IssuerUnavailable("it is down"), RuntimeError("the-token")):

        async def replace(_: str, outcome: Exception = outcome) -> None:
            raise outcome

        proxy.addon.state.sources.services["stac"].replace = replace  # type: ignore[union-attr,method-assign]
        await proxy.addon.request_flow.token_refused(flow)
    assert "the service stac refused the token, and no other is available: it is down" in caplog.messages
    assert "a refused request to stac was not sent again because of an unexpected RuntimeError" in caplog.messages
    assert "the-token" not in caplog.text
    assert "exchanged" not in caplog.text


async def test_the_consoles_command_lists_the_services(context: Any, proxy: Proxy) -> None:
    await proxy.ready("stac")
    shown = context.master.commands.execute("oidc.status")
    assert [line.partition(";")[0] for line in shown if line.startswith("service ")] == [
        "service stac: state: Ready",
        "service plain: state: Not in use yet",
    ]


async def test_the_only_service_of_a_file_shares_the_sessions_tokens(context: Any) -> None:
    class Alone(Proxy):
        def _make_sources(self, _: Settings, *, hooks: Any, **__: Any) -> Sources:
            login = TokenSource(self.login, refresh_token="first", observe=hooks(PLAIN).observe)
            return Sources(login, {"plain": login})

    proxy = Alone(context, with_services(PLAIN))
    await proxy.ready("plain")
    told = proxy.addon.monitoring.status()
    assert told["last_refresh"]["result"] == "success"
    assert told["last_refresh"] == proxy.service("plain")["last_refresh"]
    assert told["upstream"] == "https://plain.example"
    text = await proxy.metrics()
    assert 'oidc_proxy_refreshes_total{result="success",service=""} 1.0\n' in text
    ends_at = [line.split()[1] for line in text.splitlines() if line.startswith("oidc_proxy_token_expiry")]
    assert len(ends_at) == 2
    assert len(set(ends_at)) == 1
    proxy.login.answers = [CredentialsRejected("over")]
    assert proxy.addon.state.source is not None
    with pytest.raises(CredentialsRejected):
        await proxy.addon.state.source.newer("token-1")
    [error] = proxy.addon.monitoring.status()["recent_errors"]
    assert "service" not in error


def test_in_a_browser_the_only_service_of_a_file_has_its_own_name() -> None:
    here, guard = "http://127.0.0.1:8080", Guard(["localhost", "*.localhost"])
    assert browser_address(here, "https://a.example/api", guard, [STAC]) == "http://stac.localhost:8080"
    assert browser_address(here, "2 services", guard, [STAC, PLAIN]) is None
    assert browser_address("http://0.0.0.0:8080", "https://a.example", guard, [STAC]) is None


async def test_services_of_one_ca_file_share_what_is_made_of_it(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[Path, IO[bytes]] = {}

    def bundle(ca_file: Path) -> IO[bytes]:
        assert ca_file not in made
        made[ca_file] = ca_bundle_file(ca_file)
        return made[ca_file]

    monkeypatch.setattr("eoepca_security.proxy.addons.configuration.ca_bundle_file", bundle)
    ca = Path(certifi.where())
    first, second = (
        replace(service, upstream=f"https://{service.name}.example", ca_file=ca) for service in (STAC, PLAIN)
    )
    proxy = Proxy(context, with_services(first, second))
    trust = proxy.addon.state.trust
    assert made.keys() == {ca}
    assert trust[first.site] == trust[second.site]
    made[ca].close()
