"""Requests that end the proxy."""

from dataclasses import replace

import pytest
from mitmproxy.http import HTTPFlow
from mitmproxy.proxy.mode_specs import ProxyMode
from mitmproxy.test import taddons, tflow, tutils

from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.config.settings import Settings, TerminationEndpoint

POST_ONLY = TerminationEndpoint("/end")
ANY_METHOD = TerminationEndpoint("/end", any_method=True)
AT_PROXY = replace(ANY_METHOD, host="localhost")
AT_PORT = replace(ANY_METHOD, port=8080)
SETTINGS = Settings(issuer_url="https://issuer.example", client=Client("client"), refresh_token="r")
MODE = "reverse:https://service.example"


def flow_for(method: str, path: str, headers: dict[str, str], *, tls: bool = False) -> HTTPFlow:
    fields = tuple((name.encode(), value.encode()) for name, value in headers.items())
    request = tutils.treq(method=method.encode(), path=path.encode(), headers=fields, content=b"")
    flow = tflow.tflow(req=request)
    flow.client_conn.proxy_mode = ProxyMode.parse(MODE)
    flow.client_conn.tls = tls
    flow.live = True
    return flow


async def outcome(endpoint: TerminationEndpoint | None, flow: HTTPFlow) -> tuple[int, bool]:
    """Return the status of the proxy's answer, which is 503 when it would forward the request, and whether it ends."""
    ended = []
    with taddons.context() as context:
        settings = replace(SETTINGS, termination_endpoint=endpoint)
        addon = OIDCAuthProxy(settings, make_sources=lambda *_, **__: None)  # type: ignore[arg-type]
        context.master.addons.add(addon)
        context.options.update(mode=[MODE])
        addon.state.end_all = lambda: ended.append(True)
        await addon.request_flow.requestheaders(flow)
    assert flow.response is not None
    return flow.response.status_code, bool(ended)


@pytest.mark.parametrize(
    ("endpoint", "method", "url", "status"),
    [
        (POST_ONLY, "POST", "http://localhost/end", 200),
        (POST_ONLY, "POST", "http://localhost/end/?x", 200),
        (POST_ONLY, "GET", "http://localhost/end", 405),
        (POST_ONLY, "OPTIONS", "http://localhost/end", 405),
        (POST_ONLY, "POST", "http://localhost/end/other", 503),
        (POST_ONLY, "POST", "http://localhost/", 503),
        (None, "GET", "http://localhost/quitquitquit", 503),
        *((ANY_METHOD, method, "http://localhost/end", 200) for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS")),
        (ANY_METHOD, "GET", "http://127.0.0.1:8080/end/", 200),
        (ANY_METHOD, "GET", "http://localhost/other", 503),
        (ANY_METHOD, "GET", "http://evil.example/end", 403),
        (AT_PROXY, "GET", "http://LOCALHOST:8080/end", 200),
        (AT_PROXY, "GET", "http://127.0.0.1/end", 503),
        (AT_PORT, "GET", "http://localhost:8080/end", 200),
        (AT_PORT, "GET", "http://localhost:8081/end", 503),
        (AT_PORT, "GET", "http://localhost/end", 503),
        (replace(AT_PORT, port=80), "GET", "http://localhost/end", 200),
        (replace(AT_PORT, port=443), "GET", "https://localhost/end", 200),
        (replace(AT_PORT, port=443), "GET", "http://localhost/end", 503),
    ],
)
async def test_what_ends_the_proxy(endpoint: TerminationEndpoint | None, method: str, url: str, status: int) -> None:
    scheme, _, host, path = url.split("/", 3)
    flow = flow_for(method, f"/{path}", {"Host": host}, tls=scheme == "https:")
    assert await outcome(endpoint, flow) == (status, status == 200)
    if method == "HEAD":
        assert flow.response is not None
        assert flow.response.content == b""


@pytest.mark.parametrize("endpoint", [POST_ONLY, ANY_METHOD])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "image"},
    ],
)
async def test_no_page_of_another_site_ends_it(
    endpoint: TerminationEndpoint, method: str, headers: dict[str, str]
) -> None:
    flow = flow_for(method, "/end", {"Host": "localhost:8080"} | headers)
    assert await outcome(endpoint, flow) == (403, False)


async def test_a_method_that_does_not_end_it_gets_told_what_does() -> None:
    flow = flow_for("GET", "/end", {"Host": "localhost:8080"})
    await outcome(POST_ONLY, flow)
    assert flow.response is not None
    assert flow.response.headers["Allow"] == "POST"
    assert flow.response.headers["X-OIDC-Proxy-Error"] == "method_not_allowed"
    problem = flow.response.json()
    assert problem["code"] == "method_not_allowed"
    assert "send POST" in problem["detail"]
    assert "PROXY_TERMINATION_ENDPOINT to http://0.0.0.0/end" in problem["detail"]


async def test_a_replay_with_an_invalid_host_is_not_for_a_host() -> None:
    flow = flow_for("GET", "/end", {"Host": "local host"})
    flow.is_replay = "request"
    assert await outcome(AT_PROXY, flow) == (503, False)
