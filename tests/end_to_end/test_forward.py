"""Forward mode in the launcher: which hosts get whose token, and who may use the proxy at all. Real processes."""

import base64
import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import jwt
import pytest
import wsproto
import wsproto.events

from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import LocalServer
from tests.support.environment import settings_for
from tests.support.network import RawServer, free_port, replies, says_nothing
from tests.support.processes import ProxyProcess, StartProxy, admin_of
from tests.support.raw_http import assert_refused, port_of, read_all, statuses
from tests.support.service import Http2Service, Received, Recorder, exchange, http2_get
from tests.support.waiting import eventually

USER = "alice:pässword-canary"
PASSWORD = "Basic " + base64.b64encode(USER.encode()).decode()
SHOWN = f"Proxy-Authorization: {PASSWORD}\r\n".encode()

SERVICES = """
[service.plain]
url = "http://127.0.0.1:{plain}"
token = "exchange"
audience = "for-plain"
port = 8080
[service.secure]
url = "https://localhost:{secure}/api"
token = "exchange"
audience = "for-secure"
[service.two]
url = "https://localhost:{two}"
[service.dead]
url = "http://127.0.0.1:{dead}"
"""


@dataclass
class Setup:
    """The proxy between its services and other servers, with what they have received."""

    proxy: ProxyProcess
    issuer: FakeIssuer
    plain: Recorder
    secure: Recorder
    other: Recorder
    two: Http2Service
    ports: dict[str, int]
    ca: Path
    folder: Path

    @property
    def port(self) -> int:
        return port_of(self.proxy)

    def client(self, *, password: bool = True, verify: Path | None = None) -> httpx.Client:
        headers = [(b"Proxy-Authorization", PASSWORD.encode())] if password else []
        proxy = httpx.Proxy(self.proxy.url, headers=headers)
        context = ssl.create_default_context(cafile=verify or self.ca)
        return httpx.Client(proxy=proxy, trust_env=False, timeout=20, verify=context)

    def received(self) -> list[Received]:
        """Return, and forget, all requests that reached any server."""
        recorders = (self.plain, self.secure, self.other, self.two)
        found = [request for recorder in recorders for request in recorder.requests]
        for recorder in recorders:
            recorder.requests.clear()
        return found

    def audience(self, received: Received) -> object:
        """Return for whom the token is that a request has, the only one."""
        (value,) = received.values("Authorization")
        token = value.removeprefix("Bearer ")
        assert self.issuer.accepts(token)
        return jwt.decode(token, options={"verify_signature": False})["aud"]

    def open(self, target: str, head: bytes = SHOWN) -> socket.socket:
        """Open a tunnel."""
        stream = socket.create_connection(("127.0.0.1", self.port), 10)
        stream.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n".encode() + head + b"\r\n")
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += stream.recv(1)  # what follows is the server's
        assert answer == b"HTTP/1.1 200 Connection established\r\n\r\n"
        return stream


@pytest.fixture(scope="module", params=["1", "2"], ids=["one-process", "workers"])
def setup(
    request: pytest.FixtureRequest,
    start: StartProxy,
    certificate: Path,
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("forward")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    plain, secure, other = Recorder(), Recorder(), Recorder()
    with ExitStack() as stack:

        def serve(recorder: Recorder, tls: ssl.SSLContext | None = None) -> LocalServer:
            return stack.enter_context(recorder.server(tls))

        issuer = stack.enter_context(FakeIssuer(client_secret="secret-of-the-client"))
        issuer.behaviour.refresh_tokens = "rotate"
        two = stack.enter_context(Http2Service(certificate))
        ports = {
            "plain": serve(plain).port,
            "secure": serve(secure, tls).port,
            "other": serve(other).port,
            "other_secure": serve(other, tls).port,
            "two": urlsplit(two.url).port or 0,
            "dead": free_port(),
        }
        (folder / "services.toml").write_text(SERVICES.format(**ports))
        (folder / "auth").write_text(f"{USER}\n")
        (folder / "auth").chmod(0o600)
        environment = settings_for(
            issuer,
            PROXY_MODE="forward",
            PROXY_AUTH_FILE=str(folder / "auth"),
            PROXY_SERVICES=str(folder / "services.toml"),
            PROXY_INJECT_HOSTS="injected.example",
            PROXY_WORKERS=str(request.param),
            PROXY_ADMIN="127.0.0.1:0",
            TLS_CA_FILE=str(certificate),
        )
        proxy = start("launcher", "", environment)
        ca = home / ".mitmproxy" / "mitmproxy-ca-cert.pem"
        yield Setup(proxy, issuer, plain, secure, other, two, ports, ca, folder)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> None:
    if "setup" in request.fixturenames:
        request.getfixturevalue("setup").received()


# --- where tokens go ---------------------------------------------------------------------------------------------


def test_each_service_gets_its_token_at_its_own_address_only(setup: Setup, certificate: Path) -> None:
    own = {"Authorization": "Basic eDp5"}
    with setup.client() as client:
        assert client.get(f"http://127.0.0.1:{setup.ports['plain']}/x?y=1", headers=own).status_code == 200
        (received,) = setup.received()
        assert setup.audience(received) == "for-plain"
        assert received.target == "/x?y=1"
        assert received.values("Host") == [f"127.0.0.1:{setup.ports['plain']}"]
        assert not [name for name in received.names if name.startswith("proxy-")]

        for path, audience in (("/api/x", "for-secure"), ("/api", "for-secure"), ("/apis", None), ("/", None)):
            assert client.get(f"https://localhost:{setup.ports['secure']}{path}", headers=own).status_code == 200
            (received,) = setup.received()
            if audience is None:
                assert received.values("Authorization") == ["Basic eDp5"]
            else:
                assert setup.audience(received) == audience
        assert client.get(f"https://localhost:{setup.ports['secure']}/x/../api").status_code == 200
        assert client.get(f"https://localhost:{setup.ports['secure']}/%61pi").status_code == 400

        setup.received()
        # Another name of the same address, and another port.
        for url in (f"http://localhost:{setup.ports['plain']}/", f"http://127.0.0.1:{setup.ports['other']}/"):
            assert client.get(url, headers=own).status_code == 200
            (received,) = setup.received()
            assert received.values("Authorization") == ["Basic eDp5"]
    # Another name of a service's address comes through with the server's own certificate.
    with setup.client(verify=certificate) as client:
        assert client.get(f"https://127.0.0.1:{setup.ports['secure']}/api", headers=own).status_code == 200
        assert client.get(f"https://localhost:{setup.ports['other_secure']}/api", headers=own).status_code == 200
        assert [received.values("Authorization") for received in setup.received()] == [["Basic eDp5"]] * 2


def test_another_scheme_at_the_address_of_a_service_gets_no_token(setup: Setup) -> None:
    with RawServer(replies(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as server:
        target = f"127.0.0.1:{setup.ports['secure']}"
        with setup.open(f"localhost:{setup.ports['secure']}") as tunnel:
            tunnel.sendall(f"GET /api HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n".encode())
            read_all(tunnel)
        with setup.client() as client:
            assert client.get(f"http://127.0.0.1:{server.port}/api").status_code == 200
    assert setup.received() == []
    assert b"authorization" not in server.requests[0].lower()


def test_a_host_header_does_not_choose_whose_token_it_is(setup: Setup) -> None:
    plain, other = f"127.0.0.1:{setup.ports['plain']}", f"127.0.0.1:{setup.ports['other']}"
    for target, host in ((plain, other), (plain, f"localhost:{setup.ports['secure']}"), (other, plain)):
        # Absolute form, and in a tunnel in both forms.
        absolute = f"GET http://{target}/a HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n".encode()
        assert statuses(exchange(setup.port, absolute + SHOWN + b"\r\n")) == [200]
        (received,) = setup.received()
        assert received.values("Host") == [target]
        if target == plain:
            assert setup.audience(received) == "for-plain"
        else:
            assert received.values("Authorization") == []
        for line in ("/b", f"http://{host}/b"):
            with setup.open(target) as tunnel:
                tunnel.sendall(f"GET {line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                read_all(tunnel)
            for received in setup.received():
                if target == plain:
                    assert setup.audience(received) == "for-plain"
                    assert received.values("Host") == [target]
                else:
                    assert received.values("Authorization") == []
            assert setup.plain.requests == []


def test_http2_in_a_tunnel_has_the_same_rules_and_a_refused_token_is_replaced(setup: Setup, certificate: Path) -> None:
    two = f"localhost:{setup.ports['two']}"
    setup.two._statuses[:] = [401]
    for authority in (two, f"127.0.0.1:{setup.ports['plain']}"):
        with_password = {"proxy-authorization": PASSWORD, "authorization": "Basic eDp5"}
        status = http2_get(setup.port, with_password, authority, tunnel_to=two, tunnel_headers=SHOWN)
        assert status == 200
        for received in setup.two.requests:
            assert setup.audience(received) not in ("for-plain", "for-secure")
            assert received.values(":authority") == [two]
            assert "proxy-authorization" not in received.names
    first, again, _ = setup.received()
    assert first.values("Authorization") != again.values("Authorization")


def test_websockets_come_through_with_the_token(setup: Setup) -> None:
    with setup.open(f"127.0.0.1:{setup.ports['plain']}") as stream:
        assert websocket(stream, "/socket", b"") == "hello"
    with socket.create_connection(("127.0.0.1", setup.port), 10) as stream:
        assert websocket(stream, f"http://127.0.0.1:{setup.ports['plain']}/socket", SHOWN) == "hello"
    assert [setup.audience(received) for received in setup.received()] == ["for-plain"] * 2
    with socket.create_connection(("127.0.0.1", setup.port), 10) as stream:
        assert websocket(stream, f"http://127.0.0.1:{setup.ports['other']}/socket", SHOWN) == "hello"
    (received,) = setup.received()
    assert not received.names & {"authorization", "proxy-authorization"}


def websocket(stream: socket.socket, target: str, head: bytes) -> str:
    connection = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    handshake = connection.send(wsproto.events.Request(host="x", target=target))
    stream.sendall(handshake.removesuffix(b"\r\n") + head + b"\r\n")
    while data := stream.recv(65536):
        connection.receive_data(data)
        for event in connection.events():
            if isinstance(event, wsproto.events.AcceptConnection):
                stream.sendall(connection.send(wsproto.events.TextMessage(data="hello")))
            elif isinstance(event, wsproto.events.TextMessage):
                return event.data
    raise AssertionError("the connection ended without an answer")


def test_pages_of_other_sites_get_no_token(setup: Setup) -> None:
    with setup.client() as client:
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            refused = client.get(f"http://127.0.0.1:{setup.ports['plain']}/", headers=headers)
            assert (refused.status_code, refused.headers["X-OIDC-Proxy-Error"]) == (403, "cross_site_request")
            assert client.get(f"http://127.0.0.1:{setup.ports['other']}/", headers=headers).status_code == 200
    assert len(setup.received()) == 2


def test_a_connection_that_had_no_token_is_no_other_clients(setup: Setup) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        while True:
            server.read_request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with RawServer(script) as server:
        for number in range(1, 5):
            request = f"GET http://127.0.0.1:{server.port}/ HTTP/1.1\r\nHost: x\r\n".encode()
            assert statuses(exchange(setup.port, request + SHOWN + b"\r\n")) == [200]
            assert server.connections == number


def test_a_kept_connection_serves_requests_in_tunnels_too(setup: Setup) -> None:
    for name, path in (("plain", "/"), ("secure", "/api")):
        scheme, host = ("http", "127.0.0.1") if name == "plain" else ("https", "localhost")
        for number in range(6):
            with setup.client() as client:
                assert client.get(f"{scheme}://{host}:{setup.ports[name]}{path}").status_code == 200
            if name == "plain":
                with setup.open(f"{host}:{setup.ports[name]}") as tunnel:
                    tunnel.sendall(f"GET /{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    assert one_status(tunnel) == 200
    received = setup.received()
    assert [setup.audience(one) for one in received] == ["for-plain"] * 12 + ["for-secure"] * 6


# --- what passes -------------------------------------------------------------------------------------------------


def test_requests_to_others_pass_but_for_what_is_for_the_proxy(setup: Setup) -> None:
    url = f"http://127.0.0.1:{setup.ports['other']}"
    head = (
        f"POST {url}/p HTTP/1.1\r\nHost: evil.example\r\nX-One: 1\r\nx-one: 2\r\nAuthorization: Basic eDp5\r\n"
        "Cookie: a=1\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nProxy-Connection: keep-alive\r\n"
        "X-Access-Token: t\r\nOrigin: https://a.example\r\nContent-Length: 3\r\n"
    )
    assert statuses(exchange(setup.port, head.encode() + SHOWN + b"\r\nabc")) == [200]
    (received,) = setup.received()
    assert received.body == b"abc"
    assert received.values("Host") == [url.removeprefix("http://")]
    assert received.values("X-One") == ["1", "2"]
    assert received.values("Authorization") == ["Basic eDp5"]
    assert received.values("X-Access-Token") == ["t"]
    assert received.values("Origin") == ["https://a.example"]
    assert not received.names & {"proxy-authorization", "proxy-connection", "x-hop"}
    with setup.client() as client:
        answer = client.get(f"{url}/cors")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_events_of_other_hosts_come_at_once(setup: Setup) -> None:
    event = b"data: 1\n\n"

    def script(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + event)
        server.wait_for_end(connection)

    with (
        RawServer(script) as server,
        setup.client() as client,
        client.stream("GET", f"http://127.0.0.1:{server.port}/") as answer,
    ):
        assert next(answer.iter_bytes()) == event


def test_a_server_that_speaks_first_is_heard_through_a_tunnel(setup: Setup) -> None:
    def script(server: RawServer, connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-x\r\n")
        assert connection.recv(100) == b"hello"
        connection.sendall(b"bye")

    with RawServer(script) as server, setup.open(f"127.0.0.1:{server.port}") as tunnel:
        assert tunnel.recv(100) == b"SSH-2.0-x\r\n"
        tunnel.sendall(b"hello")
        assert read_all(tunnel) == b"bye"


def test_what_cannot_be_reached_is_told_with_a_code(setup: Setup) -> None:
    dead, unlisted = setup.ports["dead"], free_port()
    with setup.client() as client:
        answer = client.get(f"http://127.0.0.1:{dead}/")
        assert (answer.status_code, answer.json()["code"]) == (502, "upstream_unavailable")
        other = client.get(f"http://127.0.0.1:{unlisted}/")
        assert (other.status_code, other.json()["code"]) == (502, "upstream_unavailable")
    assert "REMOTE_PROTECTED_DOMAIN" not in other.text
    with socket.create_connection(("127.0.0.1", setup.port), 10) as stream:
        stream.sendall(f"CONNECT 127.0.0.1:{unlisted} HTTP/1.1\r\n".encode() + SHOWN + b"\r\n")
        head = stream.recv(4096)
    assert head.startswith(b"HTTP/1.1 502 ")
    assert b"X-OIDC-Proxy-Error: upstream_unavailable" in head
    # A service in a tunnel answers inside it.
    with setup.open(f"127.0.0.1:{dead}") as tunnel:
        tunnel.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert_refused(read_all(tunnel), 502, "upstream_unavailable")


# --- who may use it ----------------------------------------------------------------------------------------------

WRONG = [
    b"",
    b"Proxy-Authorization: Basic YWxpY2U6eA==\r\n",
    b"Proxy-Authorization: Bearer x\r\n",
    b"Authorization: " + PASSWORD.encode() + b"\r\n",
    SHOWN + SHOWN,
]


@pytest.mark.parametrize("head", WRONG)
def test_without_the_password_nothing_is_reached(head: bytes, setup: Setup) -> None:
    with RawServer(says_nothing) as elsewhere:
        hosts = [f"127.0.0.1:{setup.ports['plain']}", f"127.0.0.1:{elsewhere.port}", f"127.0.0.1:{setup.port}"]
        for host in hosts:
            requests = [
                f"{method} http://{host}/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
                for method in ("GET", "PUT")
            ]
            for line in (*requests, f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n"):
                answer = exchange(setup.port, line.encode() + head + b"\r\n")
                assert statuses(answer) == [407]
                assert b'\r\nProxy-Authenticate: Basic realm="OIDC proxy", charset="UTF-8"\r\n' in answer
                assert b"\r\nX-OIDC-Proxy-Error: proxy_authentication_required\r\n" in answer
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "proxy_authentication_required"
        assert elsewhere.connections == 0
    assert setup.received() == []


def test_each_request_to_the_proxy_needs_the_password_also_after_others_on_its_connection(setup: Setup) -> None:
    plain = f"127.0.0.1:{setup.ports['plain']}"
    get = f"GET http://{plain}/ HTTP/1.1\r\nHost: {plain}\r\n".encode()
    connect = f"CONNECT {plain} HTTP/1.1\r\nHost: {plain}\r\n".encode()
    found = []
    with socket.create_connection(("127.0.0.1", setup.port), 10) as stream:
        for request in (
            connect,
            get,
            get + SHOWN,
            get,
            f"GET / HTTP/1.1\r\nHost: {plain}\r\n".encode(),
            connect + SHOWN,
        ):
            stream.sendall(request + b"\r\n")
            found.append(one_status(stream))
        for _ in range(2):
            stream.sendall(f"GET / HTTP/1.1\r\nHost: {plain}\r\n\r\n".encode())
            found.append(one_status(stream))
    assert found == [407, 407, 200, 407, 407, 200, 200, 200]
    assert [setup.audience(received) for received in setup.received()] == ["for-plain"] * 3


def one_status(stream: socket.socket) -> int:
    """Read one answer, and return its status."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if end and len(body) >= (lengths or [0])[0]:
            return int(data.split()[1])
        data += stream.recv(65536)


def test_over_tls_the_proxy_speaks_http1_and_has_the_same_rules(setup: Setup) -> None:
    context = ssl.create_default_context(cafile=setup.ca)
    context.set_alpn_protocols(["h2", "http/1.1"])
    plain = f"127.0.0.1:{setup.ports['plain']}"
    with (
        socket.create_connection(("127.0.0.1", setup.port), 10) as stream,
        context.wrap_socket(stream, server_hostname="127.0.0.1") as secure,
    ):
        assert secure.selected_alpn_protocol() == "http/1.1"
        for line, head, expected in (
            (f"GET http://{plain}/", b"", 407),
            (f"CONNECT {plain}", b"", 407),
            (f"GET http://{plain}/", SHOWN, 200),
            (f"CONNECT {plain}", SHOWN, 200),
            ("GET /", b"", 200),
        ):
            secure.sendall(f"{line} HTTP/1.1\r\nHost: {plain}\r\n".encode() + head + b"\r\n")
            assert one_status(secure) == expected
    assert [setup.audience(received) for received in setup.received()] == ["for-plain"] * 2


def test_a_tunnel_that_cannot_be_opened_is_no_obstacle_to_the_next(setup: Setup) -> None:
    dead, plain, other = (f"127.0.0.1:{port}" for port in (free_port(), setup.ports["plain"], setup.ports["other"]))
    for target in (plain, other):
        with socket.create_connection(("127.0.0.1", setup.port), 10) as stream:
            for host, expected in ((dead, 502), (dead, 502), (target, 200)):
                stream.sendall(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n".encode() + SHOWN + b"\r\n")
                assert one_status(stream) == expected
            stream.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert one_status(stream) == 200
    assert [len(received.values("Authorization")) for received in setup.received()] == [1, 0]


def test_requests_for_the_proxy_itself_are_told_what_it_is(setup: Setup) -> None:
    own = f"127.0.0.1:{setup.port}"
    for line in (
        f"GET / HTTP/1.1\r\nHost: {own}\r\n",
        f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{setup.ports['plain']}\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: x\r\n",
        f"GET http://{own}/ HTTP/1.1\r\nHost: {own}\r\n",
        f"GET http://localhost:{setup.port}/ HTTP/1.1\r\nHost: {own}\r\n",
        f"CONNECT {own} HTTP/1.1\r\nHost: {own}\r\n",
    ):
        answer = exchange(setup.port, line.encode() + b"Connection: close\r\n" + SHOWN + b"\r\n")
        assert statuses(answer) == [400]
        problem = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert problem["code"] == "bad_request"
        assert "HTTP_PROXY" in problem["detail"]
    assert setup.received() == []


def test_malformed_requests_to_others_are_refused_too(setup: Setup) -> None:
    url = f"http://127.0.0.1:{setup.ports['other']}/"
    request = f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n".encode()
    assert statuses(exchange(setup.port, request + SHOWN + b"\r\n0\r\n\r\n")) == [400]
    assert setup.received() == []


# --- the start, and what it tells --------------------------------------------------------------------------------


def test_it_tells_how_to_use_it_and_never_the_password(setup: Setup, client: httpx.Client) -> None:
    hosts = [f"127.0.0.1:{setup.ports['plain']}", *(f"localhost:{setup.ports[name]}" for name in ("secure", "two"))]
    assert f"-> {', '.join(hosts)}, 127.0.0.1:{setup.ports['dead']}, injected.example as alice" in setup.proxy.output
    assert f"let them trust {setup.ca}" in setup.proxy.output
    assert "port and hosts of plain are not used" in setup.proxy.output
    admin = admin_of(setup.proxy)
    status = client.get(f"{admin}/status")
    assert status.json()["browser_address"] is None
    url = f"http://127.0.0.1:{setup.ports['plain']}/"
    assert status.json()["example"] == f"curl --proxy {setup.proxy.url} --proxy-user USER:PASSWORD {url}"
    eventually(lambda: "proxy_authentication_required" in client.get(f"{admin}/metrics").text)
    pages = [client.get(f"{admin}{path}").text for path in ("/", "/metrics", "/status")]
    command_line = Path(f"/proc/{setup.proxy.process.pid}/cmdline").read_text()
    for text in (*pages, setup.proxy.output, command_line):
        assert "canary" not in text
        assert PASSWORD.removeprefix("Basic ") not in text


def test_beyond_this_machine_it_does_not_start_without_a_password(start: StartProxy, issuer_url: str) -> None:
    environment = {
        "OPEN_ID_CONNECT_URL": issuer_url,
        "OPEN_ID_CONNECT_CLIENT_ID": "client",
        "OPEN_ID_REFRESH_TOKEN": "x",
        "PROXY_MODE": "forward",
    }
    proxy = start("launcher", "https://service.example", environment | {"PROXY_HOST": "0.0.0.0"}, wait=False)
    assert proxy.wait_until_ended() == 2
    assert "PROXY_AUTH_FILE: is required" in proxy.output
    for arguments in (("--listen-host", "0.0.0.0"), ("--mode", "regular@0.0.0.0:0")):
        proxy = start("launcher", "https://service.example", environment, *arguments, wait=False)
        assert proxy.wait_until_ended() == 1
        assert "PROXY_AUTH_FILE: is required" in proxy.output


@pytest.fixture
def issuer_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


def test_on_this_machine_it_needs_no_password_and_one_service_is_enough(start: StartProxy) -> None:
    recorder = Recorder()
    with FakeIssuer() as issuer, recorder.server() as service:
        for chosen in (
            {"REMOTE_PROTECTED_DOMAIN": service.url},
            {"PROXY_INJECT_HOSTS": service.url.removeprefix("http://")},
        ):
            proxy = start("launcher", "", settings_for(issuer, PROXY_MODE="forward", **chosen))
            with httpx.Client(proxy=proxy.url, trust_env=False, timeout=20) as client:
                assert client.get(f"{service.url}/x").status_code == 200
            (received,) = recorder.requests
            recorder.requests.clear()
            assert issuer.accepts(received.values("Authorization")[0].removeprefix("Bearer "))
            assert proxy.stop() == 0
