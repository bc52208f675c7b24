"""Several services behind one login: real processes, an issuer that rotates, and services that write down what came."""

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import settings_for
from tests.support.network import free_port
from tests.support.processes import ROOT, ProxyProcess, StartProxy
from tests.support.service import Recorder, exchange, http2_ask, websocket_echo
from tests.support.tls import write_certificate
from tests.support.waiting import eventually


@dataclass
class Service:
    """A service that takes tokens of its own audience or scope only, and answers with redirects if it is told to."""

    accepts: Callable[[Mapping[str, Any]], bool]
    header: str = "Authorization"
    before: str = "Bearer "
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def server(self) -> LocalServer:
        service = self

        class ServiceHandler(Handler):
            def respond(self) -> None:
                values = self.headers.get_all(service.header) or []
                token = values[0].removeprefix(service.before) if len(values) == 1 else ""
                good = values == [service.before + token] and service.accepts(unverified_claims(token))
                query = parse_qs(urlsplit(self.path).query)
                if not good or token in service.refused:
                    self.answer(401, {})
                    return
                service.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                if "to" in query:
                    self.answer(302, b"", dict.fromkeys(query.get("in", ["Location"]), query["to"][0]))
                else:
                    self.answer(200, {"path": self.path})

        return LocalServer(ServiceHandler)


def of_audience(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda claims: claims.get("aud") == name


def of_scope(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda claims: claims.get("scope") == name


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(client_secret="secret-of-the-client") as issuer:
        issuer.behaviour.refresh_tokens = "rotate"
        yield issuer


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def stac(stack: contextlib.ExitStack) -> tuple[Service, str]:
    service = Service(of_audience("stac-api"))
    return service, stack.enter_context(service.server()).url


@pytest.fixture
def data(stack: contextlib.ExitStack) -> tuple[Service, str]:
    service = Service(of_audience("data-api"), "X-Token", "oidc/egi/")
    return service, stack.enter_context(service.server()).url


def start_with(
    start: StartProxy,
    issuer: FakeIssuer,
    folder: Path,
    text: str,
    upstream: str = "",
    entry: str = "launcher",
    **more: str,
) -> ProxyProcess:
    file = folder / "services.toml"
    file.write_text(text)
    environment = settings_for(issuer, PROXY_SERVICES=str(file), OPEN_ID_TOKEN_STORE=str(folder / "store"), **more)
    return start(entry, upstream, environment)


def exchanged(stac_url: str, data_url: str, more: str = "") -> str:
    return f"""
        [service.stac]
        url = "{stac_url}/api"
        token = "exchange"
        audience = "stac-api"
        hosts = ["stac.proxy.svc"]
        [service.data]
        url = "{data_url}"
        token = "exchange"
        audience = "data-api"
        header = "X-Token"
        format = "oidc/egi/{{token}}"
        {more}
    """


def port_of(proxy: ProxyProcess) -> int:
    return urlsplit(proxy.url).port or 0


def get(client: httpx.Client, proxy: ProxyProcess, host: str, path: str = "/", **headers: str) -> httpx.Response:
    """Ask the proxy by one of its names, with its port if the name ends with a colon."""
    name = f"{host}{port_of(proxy)}" if host.endswith(":") else host
    return client.get(proxy.url + path, headers={"Host": name} | headers)


# --- whose token, and by which name ------------------------------------------------------------------------------


def test_each_service_gets_its_own_token_by_each_of_its_names(
    start: StartProxy,
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    own_port = free_port()
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1], f"port = {own_port}"))
    for host in ("stac.localhost:", "stac.localhost", "stac.proxy.svc", "STAC.localhost:"):
        assert get(client, proxy, host, "/x?y=1").json() == {"path": "/api/x?y=1"}
    assert get(client, proxy, "data.localhost:", "/x", Authorization="Basic eA==").json() == {"path": "/x"}
    for host in (f"localhost:{own_port}", f"127.0.0.1:{own_port}", f"data.localhost:{own_port}"):
        assert client.get(f"http://127.0.0.1:{own_port}/own", headers={"Host": host}).status_code == 200
    assert all("authorization" not in headers for _, headers in data[0].seen)
    assert all(headers["host"] == urlsplit(stac[1]).netloc for _, headers in stac[0].seen)


def test_the_add_on_alone_knows_the_services_by_name(
    start: StartProxy,
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1]), "http://127.0.0.1:9", "addon")
    assert get(client, proxy, "stac.localhost:", "/x").json() == {"path": "/api/x"}
    assert get(client, proxy, "data.localhost:", "/x").json() == {"path": "/x"}
    assert get(client, proxy, "localhost:").status_code == 403


def test_names_that_are_no_services_are_refused_with_the_list(
    start: StartProxy,
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    own_port = free_port()
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1], f"port = {own_port}"))
    for host in ("localhost:", "nobody.localhost:", "127.0.0.1:", "evil.example", "a.stac.localhost:"):
        answer = get(client, proxy, host)
        assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (403, "host_not_allowed"), host
        for name in ("stac.localhost", "stac.proxy.svc", "data.localhost"):
            assert name in answer.json()["detail"]
    # Another service's name at a service's own port.
    answer = client.get(f"http://127.0.0.1:{own_port}/", headers={"Host": f"stac.localhost:{own_port}"})
    assert answer.headers["X-OIDC-Proxy-Error"] == "host_not_allowed"
    assert stac[0].seen == data[0].seen == []


def test_the_service_of_the_old_settings_is_there_as_default(
    start: StartProxy, issuer: FakeIssuer, stac: tuple[Service, str], tmp_path: Path, client: httpx.Client
) -> None:
    recorder = Recorder()
    with recorder.server() as old:
        text = f'[service.stac]\nurl = "{stac[1]}"\ntoken = "exchange"\naudience = "stac-api"\n'
        proxy = start_with(start, issuer, tmp_path, text, old.url)
        for host in ("localhost:", "127.0.0.1:", "default.localhost:"):
            assert get(client, proxy, host).status_code == 200
        assert get(client, proxy, "stac.localhost:").status_code == 200
        assert get(client, proxy, "other.localhost:").status_code == 403
    audiences = {
        unverified_claims(one.values("Authorization")[0].removeprefix("Bearer "))["aud"] for one in recorder.requests
    }
    assert (len(recorder.requests), audiences) == (3, {"service"})


def test_one_connection_can_call_all_services(
    start: StartProxy, issuer: FakeIssuer, stac: tuple[Service, str], data: tuple[Service, str], tmp_path: Path
) -> None:
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1]))
    with socket.create_connection(("127.0.0.1", port_of(proxy)), 10) as connection:
        reader = connection.makefile("rb")
        for count in range(6):
            host = ("stac", "data")[count % 2]
            connection.sendall(f"GET /{count} HTTP/1.1\r\nHost: {host}.localhost\r\n\r\n".encode())
            head = iter(reader.readline, b"\r\n")
            lines = [line.decode().lower() for line in head]
            assert " 200 " in lines[0], lines
            reader.read(int(next(line for line in lines if line.startswith("content-length")).split()[1]))
    assert [path for path, _ in stac[0].seen] == ["/api/0", "/api/2", "/api/4"]
    assert [path for path, _ in data[0].seen] == ["/1", "/3", "/5"]


def test_http2_streams_and_websockets_get_the_token_of_the_service_that_they_name(
    start: StartProxy, issuer: FakeIssuer, stac: tuple[Service, str], tmp_path: Path
) -> None:
    recorder = Recorder()
    with recorder.server() as other:
        text = exchanged(stac[1], "http://127.0.0.1:9", f'[service.socket]\nurl = "{other.url}"\n')
        proxy = start_with(start, issuer, tmp_path, text)
        port = port_of(proxy)
        status, _, body = http2_ask(port, {}, f"stac.localhost:{port}", path="/x")
        assert (status, b"/api/x" in body) == (200, True)
        # A Host that contradicts the authority.
        assert http2_ask(port, {"host": f"socket.localhost:{port}"}, f"stac.localhost:{port}")[0] in (0, 400, 403)
        assert websocket_echo(port, "hello", [], "socket.localhost") == "hello"
    (handshake,) = recorder.requests
    assert unverified_claims(handshake.values("Authorization")[0].removeprefix("Bearer "))["aud"] == "service"


def test_an_absolute_target_and_the_host_must_name_the_same_service(
    start: StartProxy, issuer: FakeIssuer, stac: tuple[Service, str], data: tuple[Service, str], tmp_path: Path
) -> None:
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1]))
    for target, host in (("data", "stac"), ("stac", "data")):
        request = f"GET http://{target}.localhost/ HTTP/1.1\r\nHost: {host}.localhost\r\n\r\n"
        assert b" 200 " not in exchange(port_of(proxy), request.encode()).partition(b"\r\n")[0]
    assert stac[0].seen == data[0].seen == []


def test_pages_of_one_service_are_foreign_to_another(
    start: StartProxy,
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1]))
    own, other = (f"http://{name}.localhost:{port_of(proxy)}" for name in ("stac", "data"))
    assert get(client, proxy, "stac.localhost:", Origin=own).status_code == 200
    for headers in ({"Origin": other}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
        answer = get(client, proxy, "stac.localhost:", **headers)
        assert answer.headers["X-OIDC-Proxy-Error"] == "cross_site_request"


# --- one host, several services ----------------------------------------------------------------------------------


@pytest.fixture
def shared_host(stack: contextlib.ExitStack) -> tuple[Recorder, str]:
    recorder = Recorder()
    return recorder, stack.enter_context(recorder.server()).url


def on_one_host(url: str) -> str:
    return f"""
        [service.root]
        url = "{url}"
        token = "exchange"
        audience = "root"
        [service.stac]
        url = "{url}/stac"
        token = "exchange"
        audience = "stac"
        [service.items]
        url = "{url}/stac/items"
        token = "exchange"
        audience = "items"
    """


@pytest.mark.parametrize(
    ("host", "path", "target", "audience"),
    [
        ("root", "/", "/", "root"),
        ("root", "/stacks?x=/stac", "/stacks?x=/stac", "root"),
        ("root", "/stac", "/stac", "stac"),
        ("root", "/stac/items/1", "/stac/items/1", "items"),
        ("stac", "/", "/stac/", "stac"),
        ("stac", "/items", "/stac/items", "items"),
        ("stac", "/itemsets", "/stac/itemsets", "stac"),
        ("items", "/..data", None, None),
        *(
            ("stac", path, None, None)
            for path in (
                "/../x",
                "/%2e%2e/x",
                "/%2E./x",
                "/.%2e/x",
                "/..%2fx",
                "/..%5cx",
                "/a/..;/x",
                "/%252e%252e/x",
                "/./items",
                "/%69tems",
                "//items",
                "/Items",
                "/items;a=b",
                "\\items",
            )
        ),
    ],
)
def test_the_path_decides_where_services_share_a_host(
    start: StartProxy,
    issuer: FakeIssuer,
    shared_host: tuple[Recorder, str],
    tmp_path: Path,
    host: str,
    path: str,
    target: str | None,
    audience: str | None,
) -> None:
    recorder, url = shared_host
    proxy = start_with(start, issuer, tmp_path, on_one_host(url))
    request = f"GET {path} HTTP/1.1\r\nHost: {host}.localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(port_of(proxy), request.encode())
    if target is not None:
        (seen,) = recorder.requests
        token = seen.values("Authorization")[0].removeprefix("Bearer ")
        assert (seen.target, unverified_claims(token)["aud"]) == (target, audience)
        return
    for seen in recorder.requests:  # one that is not ambiguous after all
        token = seen.values("Authorization")[0].removeprefix("Bearer ")
        assert unverified_claims(token)["aud"] in {"items", "stac"}
    assert recorder.requests or b"\r\nX-OIDC-Proxy-Error: bad_request\r\n" in answer


# --- redirects ---------------------------------------------------------------------------------------------------


def test_redirects_between_services_lead_to_the_others_way_in(
    start: StartProxy,
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1]))
    port = port_of(proxy)
    for given, expected in (
        (f"{data[1]}/asset?x=1#y", f"http://data.localhost:{port}/asset?x=1#y"),
        (f"//{urlsplit(data[1]).netloc}/asset", f"http://data.localhost:{port}/asset"),
        (f"{stac[1]}/api/next", f"http://stac.localhost:{port}/next"),
        ("/api/next", "/next"),
        ("next", "/next"),
        ("/elsewhere", f"{stac[1]}/elsewhere"),
        ("https://other.example/", "https://other.example/"),
    ):
        answer = client.get(
            proxy.url,
            params={"to": given, "in": ["Location", "Content-Location"]},
            headers={"Host": f"stac.localhost:{port}"},
        )
        assert [answer.headers[name] for name in ("Location", "Content-Location")] == [expected] * 2, given
    answer = client.get(
        proxy.url, params={"to": f"1; url={data[1]}/x", "in": "Refresh"}, headers={"Host": f"stac.localhost:{port}"}
    )
    assert answer.headers["Refresh"] == f"1; url=http://data.localhost:{port}/x"


# --- whose fault -------------------------------------------------------------------------------------------------


def test_one_services_error_slowness_or_absence_is_its_own(
    start: StartProxy, issuer: FakeIssuer, stac: tuple[Service, str], tmp_path: Path, client: httpx.Client
) -> None:
    text = exchanged(stac[1], f"http://127.0.0.1:{free_port()}") + "".join(
        f'[service.{name}]\nurl = "http://127.0.0.1:9/{name}"\ntoken = "exchange"\naudience = "{name}"\n'
        for name in ("refused", "slow", "away")
    )
    issuer.behaviour.exchange_errors = {"refused": "invalid_target", "away": "temporarily_unavailable"}
    issuer.behaviour.exchange_delays = {"slow": 5.0}
    proxy = start_with(start, issuer, tmp_path, text)
    with ThreadPoolExecutor() as others:
        slow = others.submit(httpx.get, proxy.url, headers={"Host": "slow.localhost"}, trust_env=False, timeout=20)
        eventually(lambda: any(request.form.get("audience") == "slow" for request in issuer.requests))
        for host, status, code in (
            ("data.localhost", 502, "upstream_unavailable"),
            ("refused.localhost", 502, "credentials_rejected"),
            ("away.localhost", 503, "issuer_unavailable"),
        ):
            answer = get(client, proxy, host)
            assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (status, code)
            assert get(client, proxy, "stac.localhost").status_code == 200
        assert not slow.done()
    assert slow.result().headers["X-OIDC-Proxy-Error"] == "upstream_unavailable"
    assert re.search(r"no new access token for refused \(credentials_rejected\)", proxy.output), proxy.output
    assert "Traceback" not in proxy.output


def test_a_refused_token_is_replaced_for_that_service_only(
    start: StartProxy,
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    proxy = start_with(start, issuer, tmp_path, exchanged(stac[1], data[1]))
    assert get(client, proxy, "stac.localhost").status_code == 200
    assert get(client, proxy, "data.localhost").status_code == 200
    stac[0].refused.append(stac[0].seen[-1][1]["authorization"].removeprefix("Bearer "))
    assert get(client, proxy, "stac.localhost").status_code == 200
    assert get(client, proxy, "data.localhost").status_code == 200
    assert len({headers["authorization"] for _, headers in stac[0].seen}) == 2
    assert len({headers["x-token"] for _, headers in data[0].seen}) == 1


# --- rotation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_narrower_tokens_take_turns_for_ten_lifetimes(
    start: StartProxy, issuer: FakeIssuer, tmp_path: Path, stack: contextlib.ExitStack, workers: str
) -> None:
    issuer.behaviour.lifetime, issuer.behaviour.scope = 1.0, "openid offline_access one two"
    services = {name: Service(of_scope(f"{name} openid offline_access")) for name in ("one", "two")}
    text = "".join(
        f'[service.{name}]\nurl = "{stack.enter_context(service.server()).url}"\ntoken = "scope"\nscope = "{name}"\n'
        for name, service in services.items()
    )
    recorder = Recorder()
    whole = stack.enter_context(recorder.server())
    proxy = start_with(start, issuer, tmp_path, text, whole.url, PROXY_WORKERS=workers)
    failed: list[str] = []
    until = time.monotonic() + 10

    def ask(host: str) -> None:
        with httpx.Client(trust_env=False, timeout=20) as client:
            while time.monotonic() < until:
                answer = client.get(proxy.url, headers={"Host": host})
                if answer.status_code != 200:
                    failed.append(f"{host}: {answer.status_code} {answer.text}")

    threads = [threading.Thread(target=ask, args=(f"{name}.localhost",)) for name in ("one", "two", "default") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert issuer.reuses == 0
    for service in services.values():
        assert len({headers["authorization"] for _, headers in service.seen}) >= 5
    proxy.stop()


# --- TLS ---------------------------------------------------------------------------------------------------------


def test_each_service_trusts_its_own_ca(
    start: StartProxy, issuer: FakeIssuer, tmp_path: Path, client: httpx.Client, stack: contextlib.ExitStack
) -> None:
    recorder = Recorder()
    urls = {}
    for name in ("one", "two"):
        server = recorder.server()
        context = write_certificate(tmp_path / f"{name}.pem")
        urls[name] = stack.enter_context(_with_tls(server, context))
    text = "".join(
        f'[service.{name}]\nurl = "{url}"\n{more}\n'
        for name, url, more in (
            ("one", urls["one"], 'ca_file = "one.pem"'),
            ("wrong", urls["one"].replace("127.0.0.1", "localhost"), 'ca_file = "two.pem"'),
            ("two", urls["two"], "tls_no_verify = true"),
            ("nobody", urls["two"].replace("127.0.0.1", "localhost"), ""),
        )
    )
    proxy = start_with(start, issuer, tmp_path, text)
    for _ in range(2):  # with kept connections, too
        statuses = {
            name: get(client, proxy, f"{name}.localhost").status_code for name in ("one", "two", "wrong", "nobody")
        }
        assert statuses == {"one": 200, "two": 200, "wrong": 502, "nobody": 502}


@contextlib.contextmanager
def _with_tls(server: LocalServer, context: ssl.SSLContext) -> Iterator[str]:
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    with server:
        yield server.url.replace("http://", "https://")


# --- links in bodies ---------------------------------------------------------------------------------------------


def test_a_service_hears_of_the_proxys_address_if_it_is_to(
    start: StartProxy, issuer: FakeIssuer, tmp_path: Path, client: httpx.Client
) -> None:
    recorder = Recorder()
    with recorder.server() as service:
        text = f'[service.a]\nurl = "{service.url}"\nforwarded = true\n[service.b]\nurl = "{service.url}/b"\n'
        proxy = start_with(start, issuer, tmp_path, text)
        lie = {"X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example", "X_Forwarded_Proto": "x"}
        assert get(client, proxy, "a.localhost:", "/x", **lie).status_code == 200
        assert get(client, proxy, "b.localhost:", "/x").status_code == 200
    told, untold = recorder.requests
    port = port_of(proxy)
    assert told.values("Forwarded") == [f"host=a.localhost:{port};proto=http"]
    assert {name: told.values(name) for name in told.names if "forwarded-" in name or "forwarded_" in name} == {
        "x-forwarded-host": [f"a.localhost:{port}"],
        "x-forwarded-port": [str(port)],
        "x-forwarded-proto": ["http"],
    }
    assert not any("forwarded" in name for name in untold.names)


# --- many --------------------------------------------------------------------------------------------------------


def test_tokens_of_many_services_are_fetched_when_somebody_asks(
    start: StartProxy, issuer: FakeIssuer, stac: tuple[Service, str], tmp_path: Path, client: httpx.Client
) -> None:
    text = exchanged(stac[1], "http://127.0.0.1:9") + "".join(
        f'[service.s{i}]\nurl = "http://127.0.0.1:9/s{i}"\ntoken = "exchange"\naudience = "s{i}"\n' for i in range(50)
    )
    proxy = start_with(start, issuer, tmp_path, text)
    assert get(client, proxy, "stac.localhost").status_code == 200
    assert [request.form.get("audience") for request in issuer.requests] == [None, "stac-api"]


def test_wrong_settings_are_a_line_each(start: StartProxy, issuer: FakeIssuer, tmp_path: Path) -> None:
    file = tmp_path / "services.toml"
    file.write_text('[service.A]\nurl = "https://a.example"\n[service.b]\nport = 0\n')
    environment = settings_for(issuer, PROXY_SERVICES=str(file))
    proxy = start("launcher", "", environment, wait=False)
    assert proxy.wait_until_ended() == 2
    lines = [line for line in proxy.lines if line.startswith("PROXY_SERVICES: ")]
    assert len(lines) == 3, proxy.output
    assert os.fspath(file) not in proxy.output


# --- SIGHUP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_file_is_read_again_where_there_is_no_terminal(
    start_alone: Callable[..., ProxyProcess],
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
    workers: str,
) -> None:
    one, *_ = (f"[service.{part}" for part in exchanged(stac[1], data[1]).split("[service.")[1:])
    file = tmp_path / "services.toml"
    file.write_text(one)
    proxy = start_alone(settings_for(issuer, PROXY_SERVICES=str(file), PROXY_WORKERS=workers, PROXY_PORT="0"))
    assert get(client, proxy, "stac.localhost").status_code == 200
    assert get(client, proxy, "data.localhost").status_code == 403

    file.write_text(exchanged(stac[1], data[1], "prot = 1"))
    proxy.process.send_signal(signal.SIGHUP)
    assert proxy.wait_for(re.compile("the services are the same as before"))
    assert any("[service.data] prot: is unknown: did you mean port?" in line for line in proxy.lines), proxy.output
    assert get(client, proxy, "stac.localhost").status_code == 200
    assert get(client, proxy, "data.localhost").status_code == 403

    asked = len(issuer.requests)
    file.write_text(exchanged(stac[1], data[1]))
    proxy.process.send_signal(signal.SIGHUP)
    for _ in range(8):  # each worker
        eventually(lambda: get(client, proxy, "data.localhost").status_code == 200)
    assert get(client, proxy, "stac.localhost").status_code == 200
    # The login goes on, without another refresh.
    assert {request.form["grant_type"].rpartition(":")[2] for request in issuer.requests[asked:]} == {"token-exchange"}

    file.write_text(exchanged(stac[1], data[1], f"port = {free_port()}"))
    proxy.process.send_signal(signal.SIGHUP)
    assert proxy.wait_for(re.compile("services with other ports than before need a restart"))
    assert get(client, proxy, "data.localhost").status_code == 200
    assert proxy.stop() == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_a_worker_that_is_just_starting_survives_a_hangup(
    start_alone: Callable[..., ProxyProcess],
    issuer: FakeIssuer,
    stac: tuple[Service, str],
    data: tuple[Service, str],
    tmp_path: Path,
    client: httpx.Client,
) -> None:
    one, *_ = (f"[service.{part}" for part in exchanged(stac[1], data[1]).split("[service.")[1:])
    file = tmp_path / "services.toml"
    file.write_text(one)
    proxy = start_alone(settings_for(issuer, PROXY_SERVICES=str(file), PROXY_WORKERS="2", PROXY_PORT="0"))
    children = Path(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert proxy.wait_for(re.compile("starting another"))

    file.write_text(exchanged(stac[1], data[1]))
    proxy.process.send_signal(signal.SIGHUP)
    eventually(lambda: get(client, proxy, "data.localhost").status_code == 200)
    assert "SIGHUP" not in proxy.output


@pytest.mark.parametrize("workers", ["1", "2"])
def test_token_files_follow_the_file_with_the_services(
    start_alone: Callable[..., ProxyProcess], issuer: FakeIssuer, tmp_path: Path, workers: str
) -> None:
    folder, file = tmp_path / "tokens", tmp_path / "services.toml"
    folder.mkdir()
    stac, data = (
        f"""
        [service.{name}]
        url = "http://127.0.0.1:9/{name}"
        token = "exchange"
        audience = "{name}-api"
        token_file = "tokens/{name}"
        """
        for name in ("stac", "data")
    )
    file.write_text(stac)

    def audiences() -> dict[str, str]:
        return {one.name: unverified_claims(one.read_text())["aud"] for one in folder.glob("[!.]*")}

    given = {"OPEN_ID_TOKEN_FILE": str(folder / "login"), "PROXY_WORKERS": workers, "PROXY_PORT": "0"}
    proxy = start_alone(settings_for(issuer, PROXY_SERVICES=str(file), **given))
    eventually(lambda: audiences() == {"login": "service", "stac": "stac-api"})
    before = (folder / "login").read_text()
    file.write_text(data)
    proxy.process.send_signal(signal.SIGHUP)
    eventually(lambda: set(audiences()) == {"login", "data"})
    assert audiences() == {"login": "service", "data": "data-api"}
    assert (folder / "login").read_text() == before
    file.write_text(stac.replace("tokens/stac", "nowhere/stac"))
    proxy.process.send_signal(signal.SIGHUP)
    assert proxy.wait_for(re.compile(r"\[service.stac\] token_file: .*nowhere does not exist"))
    assert set(audiences()) == {"login", "data"}
    assert proxy.stop() == 0
    assert list(folder.iterdir()) == []


def test_a_hangup_ends_a_proxy_without_a_file_as_before(
    start_alone: Callable[..., ProxyProcess], issuer: FakeIssuer
) -> None:
    proxy = start_alone(settings_for(issuer, REMOTE_PROTECTED_DOMAIN="http://127.0.0.1:9", PROXY_PORT="0"))
    proxy.process.send_signal(signal.SIGHUP)
    assert proxy.wait_until_ended() == 0


@pytest.fixture
def start_alone(base_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., ProxyProcess]]:
    """Start the launcher in a session of its own, which has no terminal."""
    started: list[ProxyProcess] = []

    def start(environment: Mapping[str, str], *, wait: bool = True) -> ProxyProcess:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "run-mitmproxy.py"), "serve"],
            env=base_environment | dict(environment),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(ProxyProcess(process))
        return started[-1].wait_until_started() if wait else started[-1]

    yield start
    for proxy in started:
        proxy.stop()


def test_a_hangup_during_the_start_waits(
    start_alone: Callable[..., ProxyProcess], issuer: FakeIssuer, stac: tuple[Service, str], tmp_path: Path
) -> None:
    file = tmp_path / "services.toml"
    file.write_text(f'[service.stac]\nurl = "{stac[1]}"\n')
    issuer.behaviour.delay = 2.0  # the first token is asked for while mitmproxy starts
    proxy = start_alone(settings_for(issuer, PROXY_SERVICES=str(file), PROXY_PORT="0"), wait=False)
    eventually(lambda: bool(issuer.fetches["openid-configuration"]))
    proxy.process.send_signal(signal.SIGHUP)
    assert proxy.wait_for(re.compile("the services were read again"))
    assert proxy.stop() == 0
