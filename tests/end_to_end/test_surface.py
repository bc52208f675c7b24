"""What can reach the proxy, what leaves it, and what it shows: as a process, under both of its entry points."""

import json
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from tests.support.environment import settings_for
from tests.support.processes import ADMIN, ProxyProcess, StartProxy
from tests.support.service import Received, Recorder, exchange, http2_get, websocket_echo

APP = "https://app.example"


@dataclass
class Setup:
    issuer: FakeIssuer
    recorder: Recorder
    proxy: ProxyProcess
    service_url: str

    @property
    def url(self) -> str:
        return self.proxy.url

    @property
    def port(self) -> int:
        return urlsplit(self.proxy.url).port or 0

    @property
    def admin(self) -> str:
        match = self.proxy.wait_for(ADMIN)
        assert match
        return match[1]

    def forwarded(self) -> list[Received]:
        """Return and forget what has reached the service."""
        seen = self.recorder.requests[:]
        self.recorder.requests.clear()
        return seen


@pytest.fixture(scope="module", params=["launcher", "addon"])
def setup(request: pytest.FixtureRequest, start: StartProxy) -> Iterator[Setup]:
    recorder = Recorder()
    with FakeIssuer() as issuer, recorder.server() as service:
        environment = settings_for(
            issuer,
            PROXY_ADMIN="127.0.0.1:0",
            PROXY_ALLOWED_ORIGINS=APP,
            PROXY_TERMINATION_ENDPOINT="/end-it",
            PROXY_FORWARD_AS="apisix",
        )
        yield Setup(issuer, recorder, start(request.param, service.url, environment), service.url)


@pytest.fixture(autouse=True)
def _forget(setup: Setup) -> None:
    setup.recorder.requests.clear()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


def is_ours(setup: Setup, received: Received) -> bool:
    """Tell whether a request carries exactly one credential, ours, and names the service as its host."""
    (credential,) = received.values("Authorization") or [""]
    return setup.issuer.accepts(credential.removeprefix("Bearer ")) and received.values("Host") == [
        urlsplit(setup.service_url).netloc
    ]


# --- who may come in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "host_not_allowed"),
        ({"Host": "localhost.evil.example:8080"}, "host_not_allowed"),
        ({"Host": "2130706433"}, "host_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site"}, "cross_site_request"),
        ({"Sec-Fetch-Site": "same-site"}, "cross_site_request"),
        (
            {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
            "cross_site_request",
        ),
        ({"Sec-Fetch-Site": "none", "Sec-Purpose": "prefetch"}, "cross_site_request"),
        ({"Sec-Fetch-Site": "same-origin", "Service-Worker": "script"}, "cross_site_request"),
        ({"Origin": "null"}, "cross_site_request"),
        ({"Origin": "https://evil.example"}, "cross_site_request"),
    ],
)
def test_web_pages_are_kept_out_and_nothing_reaches_the_service(
    headers: dict[str, str], code: str, setup: Setup, client: httpx.Client
) -> None:
    for method, url in (("GET", setup.url), ("POST", setup.url), ("GET", f"{setup.admin}/status")):
        response = client.request(method, url, headers=headers)
        assert (response.status_code, response.headers["X-OIDC-Proxy-Error"]) == (403, code)
        assert response.headers["Content-Type"] == "application/problem+json"
        assert response.json()["code"] == code
        assert "Access-Control-Allow-Origin" not in response.headers
        assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert client.head(setup.url, headers=headers).status_code == 403
    assert setup.forwarded() == []


def test_tools_the_address_bar_and_the_own_origin_come_in(setup: Setup, client: httpx.Client) -> None:
    for headers in (
        {"Host": "localhost"},
        {"Host": "LOCALHOST:1"},
        {"Host": "[::1]:8080"},
        {"Host": f"localhost:{setup.port}", "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
        {"Host": f"localhost:{setup.port}", "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"},
        {"Host": f"localhost:{setup.port}", "Origin": f"http://localhost:{setup.port}"},
    ):
        assert client.post(setup.url, headers=headers).status_code == 200
    assert all(is_ours(setup, received) for received in setup.forwarded())


def test_http2_and_websockets_have_the_same_rules(setup: Setup) -> None:
    own = f"localhost:{setup.port}"
    assert http2_get(setup.port, {"te": "trailers", "origin": f"https://{own}"}, own) == 200
    assert http2_get(setup.port, {"host": own, "authorization": "Basic eDp5"}, own) == 200
    first, second = setup.forwarded()
    assert is_ours(setup, first)
    assert is_ours(setup, second)
    assert first.values("TE") == ["trailers"]
    for headers, authority in (
        ({}, "evil.example"),
        ({"origin": f"http://{own}"}, own),
        ({"sec-fetch-site": "cross-site"}, own),
        ({"sec-fetch-site": "same-site"}, own),
        ({"service-worker": "script"}, own),
    ):
        assert http2_get(setup.port, headers, authority) == 403
    assert http2_get(setup.port, {"host": "evil.example"}, own) in (0, 403)

    assert websocket_echo(setup.port, "hello", []) == "hello"
    assert websocket_echo(setup.port, "hello", [(b"Origin", b"http://localhost")]) == "hello"
    handshakes = setup.forwarded()
    assert all(is_ours(setup, received) for received in handshakes)
    assert len(handshakes) == 2
    assert websocket_echo(setup.port, "hello", [(b"Origin", b"https://evil.example")]) == 403
    assert websocket_echo(setup.port, "hello", [], host="evil.example") == 403
    assert setup.forwarded() == []


def test_an_allowed_origin_can_use_the_proxy_from_a_browser(setup: Setup, client: httpx.Client) -> None:
    browser = {"Origin": APP, "Sec-Fetch-Site": "cross-site"}
    asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"}
    preflight = client.options(f"{setup.url}/x", headers=browser | asked)
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == APP
    assert preflight.headers["Access-Control-Allow-Methods"] == "PUT"
    assert preflight.headers["Access-Control-Allow-Headers"] == "content-type"
    assert "Origin" in preflight.headers["Vary"]
    assert setup.forwarded() == []
    assert client.options(setup.url, headers=asked | {"Origin": "https://evil.example"}).status_code == 403
    response = client.get(f"{setup.url}/cors", headers=browser)
    assert response.headers.get_list("Access-Control-Allow-Origin") == [APP]
    assert "Access-Control-Allow-Credentials" not in response.headers
    assert "Access-Control-Allow-Methods" not in response.headers
    assert response.headers.get_list("Cross-Origin-Resource-Policy") == ["cross-origin"]
    assert response.headers["Access-Control-Expose-Headers"] == "Link"
    assert response.headers["Vary"] == "A, Origin"
    embedded = client.get(f"{setup.url}/cors", headers={"Referer": f"{APP}/map", "Sec-Fetch-Site": "cross-site"})
    assert embedded.headers.get_list("Cross-Origin-Resource-Policy") == ["cross-origin"]
    assert "Access-Control-Allow-Origin" not in embedded.headers
    assert embedded.headers["Vary"] == "A, Origin, Referer"
    refused = client.get(setup.url, headers=browser | {"Host": "evil.example"})
    assert refused.status_code == 403


def test_an_answer_that_the_service_gives_to_all_sites_is_for_the_proxys_own(
    setup: Setup, client: httpx.Client
) -> None:
    for headers in ({}, {"Sec-Fetch-Site": "none"}, {"Origin": setup.url}, {"Referer": "https://evil.example/"}):
        response = client.get(f"{setup.url}/cors", headers=headers)
        assert response.status_code == 200
        assert response.headers.get_list("Cross-Origin-Resource-Policy") == ["same-origin"]
        assert response.headers["Vary"] == "A, Origin, Sec-Fetch-Site"
        assert not [name for name in response.headers if name.startswith(("access-control-", "timing-"))]
    own = client.get(f"{setup.url}/end-it")
    assert own.status_code == 405
    assert own.headers["Cross-Origin-Resource-Policy"] == "same-origin"


# --- what leaves -------------------------------------------------------------------------------------------------

L = b"Host: localhost\r\n"
ADVERSARIAL = [
    b"GET http://evil.example/ HTTP/1.1\r\n" + L,
    b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n",
    b"GET http://localhost@evil.example/ HTTP/1.1\r\n" + L,
    b"GET http://localhost:80@evil.example/ HTTP/1.1\r\n" + L,
    b"GET http://evil.example#@localhost/ HTTP/1.1\r\n" + L,
    b"GET http://localhost%00.evil.example/ HTTP/1.1\r\n" + L,
    b"GET https://evil.example/ HTTP/1.1\r\n" + L,
    b"GET HTTP://EVIL.EXAMPLE/ HTTP/1.1\r\n" + L,
    b"GET ftp://localhost/ HTTP/1.1\r\n" + L,
    b"GET file:///etc/passwd HTTP/1.1\r\n" + L,
    b"GET http://2130706433/ HTTP/1.1\r\nHost: 2130706433\r\n",
    b"GET http:///x HTTP/1.1\r\n" + L,
    b"GET //evil.example/ HTTP/1.1\r\n" + L,
    b"GET /\\evil.example HTTP/1.1\r\n" + L,
    b"GET /@evil.example HTTP/1.1\r\n" + L,
    b"GET @evil.example HTTP/1.1\r\n" + L,
    b"GET evil.example HTTP/1.1\r\n" + L,
    b"GET evil.example:80 HTTP/1.1\r\n" + L,
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\n" + L,
    b"connect evil.example:443 HTTP/1.1\r\n" + L,
    b"OPTIONS * HTTP/1.1\r\n" + L,
    b"GET / HTTP/1.1\r\nHost: evil.example\r\n",
    b"GET / HTTP/1.1\r\n" + L + b"Host: evil.example\r\n",
    b"GET / HTTP/1.1\r\n" + L + L,
    b"GET / HTTP/1.1\r\nHost : localhost\r\n",
    b"GET / HTTP/1.1\r\n Host: localhost\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n evil.example\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost:\r\n",
    b"GET / HTTP/1.1\r\nHost:\r\n",
    b"GET / HTTP/1.1\r\n",
    b"GET / HTTP/1.0\r\n",
    b"GET / HTTP/0.9\r\n" + L,
    b"GET / HTTP/1.1\r\n" + L + b"X-Forwarded-Host: evil.example\r\nForwarded: host=evil.example\r\n",
    b"GET / HTTP/1.1\r\n" + L + b"X: y\r\n folded\r\n",
    b"GET / HTTP/1.1\r\n" + L + b"X: \x00\r\n",
    b"GET / HTTP/1.1\r\n" + L + b"X: a\rSet: b\r\n",
    b"GET / HTTP/1.1\r\n" + L + b"Connection: host\r\n",
    b"POST / HTTP/1.1\r\n" + L + b"Connection: content-length\r\nContent-Length: 26\r\n\r\nGET /smuggled HTTP/1.1\r\n",
    b"POST / HTTP/1.1\r\n" + L + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
    b"GET / HTTP/1.1\r\n" + L + b"Upgrade: H2C\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n",
]


@pytest.mark.parametrize("request_head", ADVERSARIAL)
def test_whatever_is_asked_the_token_goes_to_the_service_only(request_head: bytes, setup: Setup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0)
        port = str(elsewhere.getsockname()[1]).encode()
        request = request_head.replace(b"evil.example:443", b"127.0.0.1:" + port).replace(
            b"evil.example", b"127.0.0.1:" + port
        )
        exchange(setup.port, request + b"\r\n")
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    for received in setup.forwarded():
        assert is_ours(setup, received)
        assert received.target.startswith("/") or received.target == "*"
        assert "upgrade" not in received.names


@pytest.mark.parametrize(
    "lines",
    [
        b"Connection: authorization\r\nAuthorization: Basic eDp5\r\n",
        b"Authorization: Basic eDp5\r\nauthorization: Bearer forged\r\nAUTHORIZATION: x\r\n",
        b"Connection: close, Authorization , x-hop\r\nX-Hop: 1\r\n",
        b"Connection: keep-alive\r\nConnection: x-hop\r\nX-Hop: 1\r\n",
        b"Proxy-Authorization: Basic eDp5\r\nProxy-Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n",
        b"TE: trailers\r\nConnection: TE\r\n",
        b"Upgrade: H2C\r\nConnection: Upgrade\r\n",
        b"Upgrade: h2c, websocket\r\nConnection: Upgrade\r\n",
        b"X-Access-Token: f\r\nX-ID-Token: f\r\nX_Access_Token: f\r\nx-userinfo: f\r\nX-Refresh_Token: f\r\n",
    ],
)
def test_one_credential_leaves_and_what_is_for_the_next_hop_does_not(lines: bytes, setup: Setup) -> None:
    assert status_of(exchange(setup.port, b"GET / HTTP/1.1\r\n" + L + lines + b"X-Kept: 1\r\n\r\n")) == 200
    (received,) = setup.forwarded()
    assert is_ours(setup, received)
    assert "x-kept" in received.names
    assert not received.names & {"proxy-authorization", "proxy-connection", "keep-alive", "te", "upgrade", "x-hop"}
    assert "x_access_token" not in received.names
    assert received.values("X-Access-Token") == [received.values("Authorization")[0].removeprefix("Bearer ")]
    assert not [value for _, value in received.headers if value in ("f", "Basic eDp5")]


def test_a_redirect_is_for_the_client(setup: Setup, client: httpx.Client) -> None:
    response = client.get(f"{setup.url}/redirect")
    assert (response.status_code, response.headers["Location"]) == (302, "http://127.0.0.1:9/elsewhere")
    assert len(setup.forwarded()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST"])
def test_where_the_service_leads_to_itself_it_leads_to_the_proxy(host: str, setup: Setup) -> None:
    answer = exchange(setup.port, f"GET /moved HTTP/1.1\r\nHost: {host}:{setup.port}\r\n\r\n".encode())
    assert f"\r\nLocation: http://{host}:{setup.port}/jobs/1\r\n".encode() in answer


def test_the_service_takes_pages_that_came_through_the_proxy_for_its_own(setup: Setup, client: httpx.Client) -> None:
    for page, expected in ((f"http://localhost:{setup.port}", setup.service_url), (APP, APP)):
        headers = {"Host": f"localhost:{setup.port}", "Origin": page, "Referer": f"{page}/lab"}
        assert client.get(setup.url, headers=headers).status_code == 200
        (received,) = setup.forwarded()
        assert (received.values("Origin"), received.values("Referer")) == ([expected], [f"{expected}/lab"])


def test_trailers_are_dropped_in_both_directions(setup: Setup, client: httpx.Client) -> None:
    assert client.get(f"{setup.url}/trailers").text == "ok"
    body = b"POST / HTTP/1.1\r\n" + L + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-T: t\r\n\r\n"
    assert status_of(exchange(setup.port, body)) == 200
    assert "Traceback" not in setup.proxy.output


def test_random_bytes_leave_it_serving(setup: Setup, client: httpx.Client) -> None:
    chance = random.Random(5)
    starts = [b"", b"GET ", b"\x16\x03\x01", b"POST / HTTP/1.1\r\n", b"CONNECT ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    for number in range(200):
        with socket.create_connection(("127.0.0.1", setup.port), 10) as connection:
            connection.sendall(starts[number % len(starts)] + chance.randbytes(chance.randrange(1, 400)) + b"\r\n\r\n")
    assert client.get(setup.url).status_code == 200
    assert all(is_ours(setup, received) for received in setup.forwarded())
    assert "Traceback" not in setup.proxy.output


# --- the admin listener ------------------------------------------------------------------------------------------


def test_the_admin_listener_tells_of_the_proxy(setup: Setup, client: httpx.Client) -> None:
    assert client.get(setup.url).status_code == 200
    assert client.get(f"{setup.admin}/livez").status_code == 200
    assert client.get(f"{setup.admin}/readyz").status_code == 200
    status = client.get(f"{setup.admin}/status").json()
    assert status["ready"] is True
    assert status["identity"] == {"sub": "u-1", "preferred_username": "alice"}
    assert status["upstream"] == setup.service_url
    assert 0 < status["token"]["seconds_left"] <= status["token"]["lifetime_seconds"] <= 60
    assert status["refreshes"] == {"success": 1}
    assert status["requests"]["2xx"] >= 1
    assert (status["state"], status["problems"]) == ("ready", [])
    assert client.get(setup.url, headers={"Host": "evil.example"}).status_code == 403
    newest = client.get(f"{setup.admin}/status").json()["recent_errors"][0]
    assert newest["code"] == "host_not_allowed"
    assert "evil.example is not an allowed name of this proxy" in newest["detail"]
    metrics = client.get(f"{setup.admin}/metrics")
    assert metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for name in (
        'oidc_proxy_requests_total{code="",status_class="2xx"} ',
        'oidc_proxy_refreshes_total{result="success"} 1.0',
        "oidc_proxy_refresh_duration_seconds_count 1.0",
        "oidc_proxy_token_expiry_timestamp_seconds 1.",
        "oidc_proxy_requests_in_flight 0.0",
    ):
        assert f"\n{name}" in metrics.text
    page = client.get(setup.admin)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "alice" in page.text
    assert '<script src="status.js" defer></script>' in page.text
    for text in (json.dumps(status), metrics.text, page.text):
        assert not any(token in text for token in setup.issuer._issued)


def test_ending_it_takes_a_post_that_no_other_site_sent(setup: Setup, client: httpx.Client) -> None:
    for url in (f"{setup.admin}/quitquitquit", f"{setup.url}/end-it", f"{setup.url}/end-it?x"):
        response = client.get(url)
        assert (response.status_code, response.headers["Allow"]) == (405, "POST")
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
            assert client.post(url, headers=headers).status_code == 403
    response = client.post(f"{setup.admin}/livez")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD")
    assert client.get(f"{setup.admin}/nothing").status_code == 404
    assert setup.forwarded() == []
    assert setup.proxy.process.poll() is None


def test_it_printed_no_secret_and_no_traceback(setup: Setup) -> None:
    assert "Traceback" not in setup.proxy.output
    assert "crashed" not in setup.proxy.output
    for secret in (*setup.issuer._issued, setup.issuer.refresh_token):
        assert not [line for line in setup.proxy.lines if secret in line]
