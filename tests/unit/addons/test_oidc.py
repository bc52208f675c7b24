"""The add-on's hooks, on flows made by hand, in mitmproxy's own test context."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mitmproxy import exceptions
from mitmproxy.addons.onboarding import Onboarding
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.flow import Error
from mitmproxy.http import HTTPFlow, Request, Response
from mitmproxy.proxy.mode_specs import ProxyMode
from mitmproxy.test import taddons, tflow, tutils

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenInvalid
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.addons.addresses import browser_address, exposure
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.factory import Hooks
from eoepca_security.proxy.config.services import services_of
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import OPTIONS
from eoepca_security.proxy.patches.http_clients import outgoing
from eoepca_security.proxy.policy import clearance
from eoepca_security.proxy.policy.access import Guard
from eoepca_security.proxy.policy.buffering import MAX_HELD
from eoepca_security.proxy.policy.clearance import Clearance
from eoepca_security.proxy.policy.destination import Target
from eoepca_security.proxy.policy.problem_details import DETAIL
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.session import AccessToken

SERVICE = Target("https", "service.example", 443)
SETTINGS = Settings(issuer_url="https://issuer.example", client=Client("client"), refresh_token="r")


DEFAULT_SERVICE = services_of(SETTINGS)[0]


class StubSource:
    """Gives one token, or raises what it is told to."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.error = failure
        self.at_hand: AccessToken | None = None
        self.session_ends_at: float | None = None

    async def token(self) -> AccessToken:
        if self.error is not None:
            raise self.error
        return AccessToken("the-token", 0, 60)

    def retry_after(self) -> float:
        return 7.0


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in OPTIONS:
        monkeypatch.delenv(variable.env, raising=False)
    monkeypatch.setenv("OPEN_ID_TOKEN_STORE", "none")


@pytest.fixture
async def context() -> Any:
    with taddons.context(Onboarding(), Proxyserver()) as context:
        yield context


def addon_with(source: StubSource | None, context: Any) -> OIDCAuthProxy:
    addon = OIDCAuthProxy(SETTINGS, make_sources=lambda *_, **__: source and Sources(source, {"default": source}))  # type: ignore[arg-type, dict-item]
    context.master.addons.add(addon)
    context.options.update(mode=["reverse:https://service.example"])
    return addon


def flow_for(method: str = "GET", **headers: str) -> HTTPFlow:
    flow = tflow.tflow(req=tutils.treq(method=method.encode(), headers=((b"Host", b"localhost:8080"),), content=b""))
    flow.client_conn.proxy_mode = ProxyMode.parse("reverse:https://service.example")
    for name, value in headers.items():
        flow.request.headers[name.replace("_", "-")] = value
    flow.live = True
    return flow


def sent(flow: HTTPFlow, target: Target = SERVICE) -> Request:
    """Return the request as it leaves."""
    request = outgoing(flow.request, target)
    assert request is not None
    return request


async def test_the_token_replaces_every_authorization_header(context: Any) -> None:
    flow = flow_for()
    flow.request.headers.set_all("authorization", ["Basic x", "Bearer y"])
    await addon_with(StubSource(), context).request_flow.requestheaders(flow)
    assert sent(flow).headers.get_all("Authorization") == ["Bearer the-token"]
    assert flow.response is None
    assert "the-token" not in str(flow.get_state())


async def test_a_request_that_mitmproxy_refused_is_left_alone(context: Any) -> None:
    flow = flow_for()
    flow.error = Error("invalid")
    await addon_with(StubSource(), context).request_flow.requestheaders(flow)
    assert "Authorization" not in flow.request.headers


async def test_what_mitmproxy_refused_is_reported_without_the_clients_bytes(context: Any) -> None:
    flow = flow_for()
    flow.error = Error("Received header value surrounded by whitespace b'Bearer the-clients-own '")
    await addon_with(StubSource(), context).request_flow.requestheaders(flow)
    assert flow.metadata[DETAIL] == "Received header value surrounded by whitespace"


async def test_an_answer_that_is_there_already_is_left_alone(context: Any) -> None:
    flow = flow_for()
    flow.response = Response.make(204)
    addon = addon_with(StubSource(IssuerUnavailable("down")), context)
    await addon.request_flow.requestheaders(flow)
    await addon.request_flow.request(flow)
    assert flow.response.status_code == 204


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (IssuerUnavailable("down"), 503, "issuer_unavailable"),
        (CredentialsRejected("no"), 502, "credentials_rejected"),
        (RuntimeError("the-token in a message"), 503, "issuer_unavailable"),
        (TimeoutError(), 503, "issuer_unavailable"),
    ],
)
async def test_whatever_raises_the_client_gets_an_answer_and_the_service_nothing(
    failure: Exception, status: int, code: str, context: Any
) -> None:
    flow = flow_for()
    await addon_with(StubSource(failure), context).request_flow.requestheaders(flow)
    assert flow.response is not None
    assert (flow.response.status_code, flow.response.headers["X-OIDC-Proxy-Error"]) == (status, code)
    assert "the-token" not in (flow.response.text or "")


async def test_without_a_source_nothing_passes(context: Any) -> None:
    flow = flow_for()
    await addon_with(None, context).request_flow.requestheaders(flow)
    assert flow.response is not None
    assert flow.response.status_code == 503


@pytest.mark.parametrize(
    "mode",
    ["regular", "socks5", "reverse:tcp://service.example:1", "upstream:http://proxy:1", "reverse:https://evil.example"],
)
async def test_in_other_modes_nothing_passes(mode: str, context: Any) -> None:
    flow = flow_for()
    flow.client_conn.proxy_mode = ProxyMode.parse(mode)
    await addon_with(StubSource(), context).request_flow.requestheaders(flow)
    assert flow.response is not None
    assert flow.response.status_code == 503
    assert clearance.clearance(flow.request) is None
    assert "Authorization" not in flow.request.headers


async def test_a_fault_in_answering_still_gives_an_answer(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eoepca_security.proxy.patches.messages.answer", lambda *_, **__: 1 / 0)
    flow = flow_for()
    with pytest.raises(ZeroDivisionError):  # which mitmproxy logs, and goes on with the flow as it is
        await addon_with(StubSource(IssuerUnavailable("down")), context).request_flow.requestheaders(flow)
    assert flow.response is not None
    assert flow.response.status_code == 503
    assert flow.response.headers["X-OIDC-Proxy-Error"] == "issuer_unavailable"


async def test_a_cancelled_hook_leaves_an_answer(context: Any) -> None:
    flow = flow_for()
    with pytest.raises(asyncio.CancelledError):
        await addon_with(StubSource(asyncio.CancelledError()), context).request_flow.requestheaders(flow)
    assert flow.response is not None


async def test_a_request_that_is_being_decided_about_has_an_answer_already(context: Any) -> None:
    class Slow(StubSource):
        async def token(self) -> AccessToken:
            await asyncio.Event().wait()
            raise AssertionError

    flow = flow_for()
    deciding = asyncio.create_task(addon_with(Slow(), context).request_flow.requestheaders(flow))
    await asyncio.sleep(0)
    assert flow.response is not None
    deciding.cancel()


async def test_a_held_back_request_gets_the_token_of_the_moment_it_is_sent(context: Any) -> None:
    flow = flow_for()
    addon = addon_with(StubSource(), context)
    clearance.clear(flow.request, Clearance(SERVICE, {"Authorization": "Bearer older"}, DEFAULT_SERVICE, "older"))
    await addon.request_flow.request(flow)
    assert sent(flow).headers["Authorization"] == "Bearer the-token"
    clearance.clear(
        flow.request, Clearance(SERVICE, {"Authorization": "Bearer sent already"}, DEFAULT_SERVICE, "sent already")
    )
    flow.request.data.content = None  # streamed
    await addon.request_flow.request(flow)
    assert sent(flow).headers["Authorization"] == "Bearer sent already"


async def test_an_absolute_target_loses_its_host_on_http1_and_is_the_services_on_http2(context: Any) -> None:
    addon = addon_with(StubSource(), context)
    for version, authority in ((b"HTTP/1.1", ""), (b"HTTP/2.0", "service.example")):
        flow = flow_for()
        flow.request.data.http_version = version
        flow.request.authority = "localhost:8080"
        await addon.request_flow.requestheaders(flow)
        assert sent(flow).authority == authority
        assert sent(flow).headers["Host"] == "service.example"


# --- options -----------------------------------------------------------------------------------------------------


async def test_all_options_are_strings_without_values(context: Any) -> None:
    addon_with(StubSource(), context)
    for variable in OPTIONS:
        assert context.options._options[variable.option].typespec is str
        assert context.options._options[variable.option].default == ""


async def test_mitmproxys_options_are_set_to_what_suits(context: Any) -> None:
    addon_with(StubSource(), context)
    options = context.options
    assert (options.connection_strategy, options.rawtcp, options.onboarding) == ("lazy", False, False)


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.set_level(logging.ERROR)
    messages: list[str] = []
    yield messages
    messages += [record.getMessage() for record in caplog.records]


async def test_settings_come_from_the_options(context: Any) -> None:
    addon = OIDCAuthProxy()
    context.master.addons.add(addon)
    context.options.update(
        mode=["reverse:https://service.example"],
        oidc_url="https://issuer.example",
        oidc_client_id="client",
        refresh_token="r",
        oidc_scope="openid",
    )
    assert addon.state.problems == []
    settings = addon.state.settings
    assert settings is not None
    assert settings.command.options == ("--issuer", "https://issuer.example", "--client-id", "client")
    assert replace(settings, command=Command()) == Settings(
        "https://issuer.example", Client("client"), refresh_token="r", scope="openid"
    )


async def test_a_change_at_run_time_that_is_wrong_is_refused_and_undone(context: Any) -> None:
    addon = OIDCAuthProxy()
    context.master.addons.add(addon)
    context.options.update(
        mode=["reverse:https://service.example"],
        oidc_url="https://issuer.example",
        oidc_client_id="client",
        refresh_token="r",
    )
    addon.state.is_running = True
    source = addon.state.source
    for change in (
        {"oidc_url": "ftp://x"},
        {"mode": ["regular"]},
        {"ignore_hosts": [".*"]},
        {"keep_host_header": False},
        {"validate_inbound_headers": False},
    ):
        with pytest.raises(exceptions.OptionsError):
            context.options.update(**change)
    assert addon.state.source is source
    assert context.options.oidc_url == "https://issuer.example"
    context.options.update(websocket=False)
    assert addon.state.source is source  # with its rotated refresh token
    assert source is not None
    source.session._adopt("rotated")
    context.options.update(oidc_scope="openid")
    assert addon.state.source is not source
    assert addon.state.source is not None
    assert addon.state.source.session._refresh_token == "rotated"
    context.options.update(refresh_token="another-login")
    assert addon.state.source.session._refresh_token == "another-login"


# --- what the status tells of the service ------------------------------------------------------------------------


async def test_a_service_that_refuses_the_token_is_a_problem_and_our_own_answers_are_not(context: Any) -> None:
    addon = addon_with(StubSource(), context)
    for status, problems in ((401, 1), (403, 0)):
        flow = flow_for()
        await addon.request_flow.requestheaders(flow)
        flow.response = Response.make(status)
        addon.monitoring.response(flow)
        refused = flow_for()
        refused.request.headers["Host"] = "evil.example"
        await addon.request_flow.requestheaders(refused)
        addon.monitoring.response(refused)
        told = addon.monitoring.status()
        assert len(told["problems"]) == problems
    assert [(one["code"], one["count"]) for one in told["recent_errors"]] == [("host_not_allowed", 2)]
    # All of them are 4xx: two of the service, and two refusals.
    assert (told["service_answers"], told["errors"]) == ({"4xx": 2}, {"host_not_allowed": 2})


# --- a service that refuses the token ----------------------------------------------------------------------------


async def test_a_replay_from_the_console_costs_no_token(context: Any) -> None:
    addon, flow = addon_with(StubSource(), context), flow_for()
    await addon.request_flow.requestheaders(flow)
    flow.response, flow.is_replay = Response.make(401), "request"
    answer = flow.response
    # Its source would raise AttributeError if it were asked for another.
    await addon.request_flow.token_refused(flow)
    assert flow.response is answer


@pytest.mark.parametrize(
    "change",
    [
        lambda flow: setattr(flow.request, "raw_content", None),  # it was streamed
        lambda flow: setattr(flow.response, "raw_content", None),
        lambda flow: setattr(flow.request, "content", b"x" * (MAX_HELD + 1)),
        lambda flow: flow.request.headers.update({"Upgrade": "WebSocket", "Connection": "Upgrade"}),
    ],
)
async def test_what_cannot_be_sent_again_is_not_and_the_next_request_has_another_token(
    change: Callable[[HTTPFlow], None], context: Any
) -> None:
    addon, refused = addon_with(StubSource(), context), []

    async def replace(token: str) -> str:
        refused.append(token)
        return "another"

    addon.state.source.replace = replace  # type: ignore[union-attr,method-assign]
    flow = flow_for()
    await addon.request_flow.requestheaders(flow)
    flow.response = answer = Response.make(401)
    change(flow)
    await addon.request_flow.token_refused(flow)
    assert flow.response is answer
    assert len(refused) == 1


async def test_without_another_token_the_services_answer_stands(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    addon = addon_with(StubSource(), context)
    for outcome in (None, IssuerUnavailable("down"), RuntimeError("the-token")):

        async def replace(_: str, outcome: BaseException | None = outcome) -> None:
            if outcome is not None:
                raise outcome

        addon.state.source.replace = replace  # type: ignore[union-attr,method-assign]
        flow = flow_for()
        await addon.request_flow.requestheaders(flow)
        flow.response = answer = Response.make(401)
        await addon.request_flow.token_refused(flow)
        assert flow.response is answer
    assert "the-token" not in caplog.text


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("method", b"GET / HTTP/1.1\r\nX: y\r\n\r\nDELETE"),
        ("path", b"http://evil.example/"),
        ("path", b"/a b"),
        ("path", b"/\r\nX: y"),
    ],
)
async def test_what_could_become_two_requests_is_refused(attribute: str, value: bytes, context: Any) -> None:
    flow = flow_for()
    setattr(flow.request.data, attribute, value)
    await addon_with(StubSource(), context).request_flow.requestheaders(flow)
    assert flow.response is not None
    assert flow.response.status_code == 400


async def test_a_line_break_in_a_header_is_refused(context: Any) -> None:
    flow = flow_for(X="y\r\n\r\nGET /naked HTTP/1.1")
    await addon_with(StubSource(), context).request_flow.requestheaders(flow)
    assert flow.response is not None
    assert flow.response.status_code == 400


# --- forward mode, and names of the proxy ------------------------------------------------------------------------


async def test_the_address_listened_on_is_a_name_of_the_proxy_unless_it_is_all(context: Any) -> None:
    addon = addon_with(StubSource(), context)
    for listen_host, mode, allowed in (
        ("192.0.2.7", "reverse:https://service.example", "192.0.2.7:8080"),
        ("", "reverse:https://service.example@proxy.test:8080", "proxy.test:8080"),
        ("fd00::7", "reverse:https://service.example", "[fd00::7]:8080"),
        ("0.0.0.0", "reverse:https://service.example", None),
        ("", "reverse:https://service.example", None),
    ):
        context.options.update(mode=[mode], listen_host=listen_host)
        always = ("localhost:8080", "stac.localhost:8080")
        for host in ("192.0.2.7:8080", "proxy.test:8080", "[fd00::7]:8080", "0.0.0.0:8080", *always):
            flow = flow_for(Host=host)
            flow.client_conn.proxy_mode = ProxyMode.parse(mode)
            await addon.request_flow.requestheaders(flow)
            is_allowed = host in (allowed, *always)
            assert (flow.response is None) is is_allowed, (listen_host, mode, host)


async def test_hosts_that_are_none_are_told_of_without_a_word_about_the_mode(context: Any) -> None:
    addon = OIDCAuthProxy()
    context.master.addons.add(addon)
    options = {"oidc_url": "https://issuer.example", "oidc_client_id": "client", "refresh_token": "r"}
    context.options.update(mode=["regular"], inject_hosts="http://x/", **options)
    assert [problem.partition(":")[0] for problem in addon.state.problems] == ["PROXY_INJECT_HOSTS"]
    context.options.update(mode=["socks5"])
    assert [problem.partition(":")[0] for problem in addon.state.problems] == ["mode", "PROXY_INJECT_HOSTS"]


async def test_options_that_would_undo_the_protection_are_refused(context: Any) -> None:
    addon = addon_with(StubSource(), context)
    for name, value in (
        ("keep_host_header", False),
        ("rawtcp", True),
        ("onboarding", True),
        ("validate_inbound_headers", False),
        ("connection_strategy", "eager"),
        ("proxy_debug", True),
        ("ignore_hosts", ["x"]),
    ):
        before = getattr(context.options, name)
        context.options.update(**{name: value})
        assert [problem for problem in addon.state.problems if problem.startswith(name)], name
        context.options.update(**{name: before})
    assert addon.state.problems == []


async def test_regular_mode_needs_hosts_to_inject_to(context: Any) -> None:
    addon = addon_with(StubSource(), context)
    context.options.update(mode=["regular"])
    assert [problem for problem in addon.state.problems if problem.startswith("mode: ")]


async def test_regular_mode_is_fine_with_hosts_to_inject_to(context: Any) -> None:
    addon = OIDCAuthProxy(replace(SETTINGS, inject_hosts=("a.example",)))
    context.master.addons.add(addon)
    context.options.update(mode=["regular"])
    assert addon.state.problems == []


def test_listening_beyond_this_machine_is_told_in_one_line() -> None:
    line = exposure("http://0.0.0.0:8080", SETTINGS)
    assert "acts with this identity" in line
    assert "PROXY_ALLOWED_HOSTS" in line
    assert "\n" not in line
    assert "PROXY_ALLOWED_HOSTS" not in exposure("http://[::]:8080", replace(SETTINGS, allowed_hosts=("proxy",)))
    assert "PROXY_ALLOWED_HOSTS" not in exposure("http://192.0.2.7:8080", SETTINGS)


async def test_a_page_of_the_proxy_is_not_taken_for_one_of_the_service_that_is_allowed(context: Any) -> None:
    addon = addon_with(StubSource(), context)
    addon.state.guard = Guard(["localhost"], ["https://service.example"])
    for origin, policy in (("http://localhost:8080", "same-origin"), ("https://service.example", "cross-origin")):
        flow = flow_for(Referer=f"{origin}/page")
        for _ in range(2):
            await addon.request_flow.requestheaders(flow)
            assert flow.request.headers["Referer"] == "https://service.example/page"
            flow.response = Response.make(200)
            addon.request_flow.responseheaders(flow)
            assert flow.response.headers["Cross-Origin-Resource-Policy"] == policy
            flow = flow.copy()
            flow.is_replay, flow.response = "request", None


@pytest.mark.parametrize("status", [200, 101])
@pytest.mark.parametrize("cookies", ["pass", "drop"])
async def test_cookies_pass_or_are_dropped_both_ways(cookies: str, status: int, context: Any) -> None:
    addon = addon_with(StubSource(), context)
    addon.state.settings = replace(SETTINGS, cookies=cookies)
    flow = flow_for(Cookie="theirs=1")
    await addon.request_flow.requestheaders(flow)
    leaving = sent(flow).headers
    flow.response = Response.make(status, headers={"Set-Cookie": "ours=2", "X-Other": "3"})
    addon.request_flow.responseheaders(flow)
    values = (leaving.get("Cookie"), flow.response.headers.get("Set-Cookie"))
    assert values == (("theirs=1", "ours=2") if cookies == "pass" else (None, None))
    assert (leaving["Authorization"], flow.response.headers["X-Other"]) == ("Bearer the-token", "3")


LOCAL = Guard(["localhost", "*.localhost"])


@pytest.mark.parametrize(
    ("listener", "upstream", "expected"),
    [
        ("http://127.0.0.1:8080", "https://stac.example:9200", "http://stac.localhost:8080"),
        ("http://[::1]:8080", "https://STAC.example", "http://stac.localhost:8080"),
        ("http://127.0.0.1:8080", "http://localhost:9000", "http://service.localhost:8080"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:9000", "http://service.localhost:8080"),
        ("http://127.0.0.1:8080", "http://[2001:db8::1]:9000", "http://service.localhost:8080"),
        ("http://127.0.0.1:8080", "a.example, b.example", None),  # forward mode
        ("http://0.0.0.0:8080", "https://stac.example", None),
        ("http://127.0.0.2:8080", "https://stac.example", None),
        ("http://192.0.2.7:8080", "https://stac.example", None),
    ],
)
def test_browsers_get_a_name_of_the_proxys_own(listener: str, upstream: str, expected: str | None) -> None:
    assert browser_address(listener, upstream, LOCAL) == expected
    assert browser_address(listener, upstream, Guard(["localhost", "127.0.0.1"])) is None


async def test_what_ails_one_services_token_is_told_with_its_own_settings(context: Any) -> None:
    stac = Service("stac", "https://stac.example", audience="stac-api")
    failure = TokenInvalid("not for stac-api", claim="aud")
    source, login = StubSource(failure), StubSource()
    described: list[str] = []

    def make_sources(*_: object, hooks: Callable[[Service | None], Hooks], **__: object) -> Sources:
        described.append(hooks(stac).describe(failure))
        return Sources(login, {"stac": source, "default": login})  # type: ignore[arg-type, dict-item]

    plain = Service("default", "https://service.example")
    settings = replace(SETTINGS, services=(plain, stac), services_file=Path("services.toml"))
    addon = OIDCAuthProxy(settings, make_sources=make_sources)
    context.master.addons.add(addon)
    context.options.update(mode=["reverse:https://service.example"])
    assert described
    assert all("set [service.stac] audience" in text for text in described)
    flow = flow_for()
    flow.request.host_header = "stac.localhost:8080"
    await addon.request_flow.requestheaders(flow)
    assert flow.response is not None
    assert "set [service.stac] audience" in json.loads(flow.response.content or b"")["detail"]
    login.error = TokenInvalid("not for the service", claim="aud")
    assert "[service.stac]" not in addon.state.describe(login.error, stac)


async def test_while_it_ends_clients_are_told_to_close_their_connections(context: Any) -> None:
    addon = addon_with(StubSource(), context)
    for version, ending, told in ((b"HTTP/1.1", False, None), (b"HTTP/1.1", True, "close"), (b"HTTP/2.0", True, None)):
        addon.state.is_ending = ending
        flow = flow_for()
        flow.request.data.http_version = version
        flow.response = Response.make(200)
        addon.request_flow.responseheaders(flow)
        assert flow.response.headers.get("Connection") == told


# --- services ----------------------------------------------------------------------------------------------------


async def test_a_service_that_the_settings_have_changed_gets_no_token_of_its_successor(context: Any) -> None:
    flow = flow_for()
    addon = addon_with(StubSource(), context)
    before = replace(addon.state.services["default"], audience="another")
    clearance.clear(flow.request, Clearance(SERVICE, {"Authorization": "Bearer older"}, before, "older"))
    await addon.request_flow.request(flow)
    assert flow.response is not None
    assert flow.response.status_code == 503
    flow.response = Response.make(401)
    await addon.request_flow.token_refused(flow)
    assert flow.response.status_code == 401
    assert sent(flow).headers["Authorization"] == "Bearer older"
