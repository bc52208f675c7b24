"""Ending, secrets in what mitmproxy shows and keeps, TLS to the service, and forward mode: real processes."""

import contextlib
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509

from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.environment import settings_for
from tests.support.network import accepts
from tests.support.processes import ROOT, ProxyProcess, StartProxy, admin_of, run_process
from tests.support.service import Http2Service, Recorder, exchange, http2_get
from tests.support.waiting import eventually

CLIENT_CANARY = "Basic Y2FuYXJ5LW9mLXRoZS1jbGllbnQ6eA=="
SECRET_CANARY = "canary-of-the-client-secret"


def canaries(issuer: FakeIssuer) -> set[bytes]:
    """Return what must show nowhere: our secrets and all tokens, their signatures alone, too."""
    tokens = {*issuer._issued, *(token.rpartition(".")[2] for token in issuer._issued)}
    return {text.encode() for text in {*tokens, issuer.refresh_token, SECRET_CANARY, CLIENT_CANARY, CLIENT_CANARY[6:]}}


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(client_secret=SECRET_CANARY) as issuer:
        yield issuer


def verbose(folder: Path) -> list[str]:
    """Return mitmdump's arguments that show and keep the most."""
    options = ("flow_detail=4", "termlog_verbosity=debug", f"hardump={folder / 'all.har'}")
    return ["-w", str(folder / "flows"), *(part for option in options for part in ("--set", option))]


@pytest.mark.parametrize(
    ("entry", "way"),
    [("launcher", "admin"), ("addon", "endpoint"), ("launcher", "SIGTERM"), ("addon", "SIGINT")],
)
def test_requests_in_flight_get_their_answers_before_the_end_and_no_secret_shows_anywhere(
    entry: str, way: str, start: StartProxy, issuer: FakeIssuer, tmp_path: Path, client: httpx.Client
) -> None:
    recorder = Recorder()
    with recorder.server() as service:
        environment = settings_for(issuer, PROXY_ADMIN="127.0.0.1:0", PROXY_TERMINATION_ENDPOINT="/end-it")
        environment["PROXY_FORWARD_AS"] = "apisix"
        proxy = start(entry, service.url, environment, *verbose(tmp_path))
        admin = admin_of(proxy)
        assert client.get(proxy.url, headers={"Authorization": CLIENT_CANARY}).status_code == 200
        assert client.get(proxy.url, headers={"Authorization": CLIENT_CANARY, "Host": "evil"}).status_code == 403
        shown = [client.get(f"{admin}{path}").text for path in ("/", "/status", "/metrics")]

        answers: list[tuple[int, int]] = []

        def ask(path: str) -> None:
            response = httpx.get(
                proxy.url + path, headers={"Authorization": CLIENT_CANARY}, trust_env=False, timeout=20
            )
            answers.append((response.status_code, len(response.content)))

        threads = [threading.Thread(target=ask, args=(path,)) for path in ("/slow?seconds=1", "/held")]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert recorder.waiting.acquire(timeout=10)
        if way == "admin":
            assert client.post(f"{admin}/quitquitquit").status_code == 200
        elif way == "endpoint":
            assert client.post(f"{proxy.url}/end-it").status_code == 200
        else:
            # As some programs do that run others: the whole group gets it, and they pass theirs on.
            for _ in range(2):
                proxy.process.send_signal(getattr(signal, way))
        eventually(lambda: not accepts(proxy.url))
        recorder.release.set()
        for thread in threads:
            thread.join(20)
        assert proxy.wait_until_ended() == 0
        assert sorted(answers) == [(200, 14), (200, 4_000_000)]

    assert "stopping: waiting up to 8 s for 2 requests" in proxy.output
    assert "Traceback" not in proxy.output
    files = [path.read_bytes() for path in (tmp_path / "flows", tmp_path / "all.har")]
    assert all(b"/held" in content and b"added by the proxy" in content for content in files)
    for content in (*files, proxy.output.encode(), *(text.encode() for text in shown)):
        assert not [canary for canary in canaries(issuer) if canary in content]


SCRIPT = """
from mitmproxy import ctx, flowfilter
is_get = flowfilter.parse("~m GET")

def response(flow):
    flow.response.headers["x-script"] = f"{bool(is_get(flow))} {len(ctx.master.commands.execute('oidc.status'))}"
"""


def test_what_mitmproxy_can_do_can_be_had_after_the_dashes(
    start: StartProxy, issuer: FakeIssuer, tmp_path: Path, client: httpx.Client
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "file.txt").write_text("from a file")
    options = (
        "modify_headers=/~m PUT/x-modified/yes",
        "block_list=:~u /blocked:404",
        f"map_local=|/local|{tmp_path / 'file.txt'}",
        "stickycookie=~all",
        "flow_detail=3",
    )
    arguments = [part for option in options for part in ("--set", option)]
    recorder = Recorder()
    with recorder.server() as service:
        more = ("-s", str(tmp_path / "script.py"), "-w", str(tmp_path / "flows"), "~m PUT")
        proxy = start("launcher", service.url, settings_for(issuer), *arguments, *more)
        answer = client.put(proxy.url, content=b'{"a": 1}', headers={"Content-Type": "application/json"})
        assert answer.status_code == 200
        assert answer.headers["x-script"].startswith("False ")
        assert dict(recorder.requests[-1].headers)["x-modified"] == "yes"
        answer = client.get(proxy.url)
        assert answer.headers["x-script"].startswith("True ")
        assert "x-modified" not in dict(recorder.requests[-1].headers)
        assert client.get(f"{proxy.url}/blocked").status_code == 404
        assert client.get(f"{proxy.url}/local").text == "from a file"
        assert proxy.stop() == 0
    # Those that the filter shows, and keeps.
    assert "PUT" in proxy.output
    assert "GET" not in proxy.output
    flows = (tmp_path / "flows").read_bytes()
    assert b"PUT" in flows
    assert b"/blocked" not in flows


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_a_second_signal_ends_at_once_even_while_a_name_is_looked_up(
    entry: str, start: StartProxy, issuer: FakeIssuer, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, time\n"
        "real = socket.getaddrinfo\n"
        "def slow(host, *rest, **options):\n"
        "    if host == 'silent.example':\n"
        "        print('looking up', flush=True)\n"
        "        time.sleep(60)\n"
        "    return real(host, *rest, **options)\n"
        "socket.getaddrinfo = slow\n"
    )
    environment = settings_for(issuer, PYTHONPATH=str(tmp_path))
    proxy = start(entry, "http://silent.example", environment, "-w", str(tmp_path / "flows"))
    with socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port or 0)) as connection:
        connection.sendall(b"GET /unanswered HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: "looking up" in proxy.output)
        proxy.process.send_signal(signal.SIGTERM)
        eventually(lambda: not accepts(proxy.url))
        assert proxy.process.poll() is None
        began = time.monotonic()
        assert proxy.stop_in_haste() == 0
        assert time.monotonic() - began < 4
    assert "Traceback" not in proxy.output
    assert b"/unanswered" in (tmp_path / "flows").read_bytes()
    assert not [canary for canary in canaries(issuer) if canary in (tmp_path / "flows").read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_python_still_imports_gives_no_traceback(
    number: signal.Signals, base_environment: dict[str, str], tmp_path: Path
) -> None:
    # The module that mitmproxy imports somewhere in the middle says that it is on its way.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Tell:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mitmproxy':\n"
        "            print('importing', flush=True)\n"
        "sys.meta_path.insert(0, Tell())\n"
    )
    environment = base_environment | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "run-mitmproxy.py"), "demo", "--once"]
    process = run_process(command, environment, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    output = process.communicate(timeout=20)[0]
    assert "Traceback" not in output
    # 0 where it has come further meanwhile.
    assert process.returncode in (-signal.SIGTERM, 0, 1, 130)


def test_mitmweb_shows_no_token_not_even_of_a_request_in_flight(
    base_environment: dict[str, str], issuer: FakeIssuer, tmp_path: Path, client: httpx.Client
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    recorder = Recorder()
    with recorder.server() as service:
        command = [str(Path(sys.executable).parent / "mitmweb"), "-s", str(ROOT / "mitmproxy-oidc-addon.py")]
        command += ["--no-web-open-browser", "--web-port", str(port), "--set", "web_password=pw"]
        command += ["--mode", f"reverse:{service.url}@127.0.0.1:0"]
        proxy = ProxyProcess(run_process(command, base_environment | settings_for(issuer), tmp_path))
        proxy.wait_until_started()
        try:
            headers = {"Authorization": CLIENT_CANARY}
            thread = threading.Thread(target=client.get, args=(f"{proxy.url}/held",), kwargs={"headers": headers})
            thread.start()
            assert recorder.waiting.acquire(timeout=10)
            pages = [
                httpx.get(f"http://127.0.0.1:{port}/{page}?token=pw", trust_env=False) for page in ("flows", "options")
            ]
            recorder.release.set()
            thread.join(10)
            pages += [
                httpx.get(f"http://127.0.0.1:{port}/{page}?token=pw", trust_env=False) for page in ("flows", "events")
            ]
        finally:
            proxy.stop()
    assert [page.status_code for page in pages] == [200] * 4
    assert "added by the proxy" in pages[0].text
    for page in pages:
        assert not [canary for canary in canaries(issuer) if canary in page.content]


def test_options_show_no_secret(base_environment: dict[str, str], issuer: FakeIssuer, tmp_path: Path) -> None:
    environment = base_environment | settings_for(issuer)
    command = [str(Path(sys.executable).parent / "mitmdump"), "-s", str(ROOT / "mitmproxy-oidc-addon.py"), "--options"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert not [canary for canary in canaries(issuer) if canary in done.stdout + done.stderr]


@pytest.mark.parametrize("entry", ["launcher", "addon"])
def test_mitmproxys_own_password_can_stand_before_the_proxy(
    entry: str, start: StartProxy, issuer: FakeIssuer, client: httpx.Client
) -> None:
    recorder = Recorder()
    with recorder.server() as service:
        proxy = start(entry, service.url, settings_for(issuer), "--proxyauth", "name:password")
        statuses = [
            client.get(proxy.url, auth=auth).status_code for auth in (None, ("name", "x"), ("name", "password"))
        ]
        assert statuses == [401, 401, 200]
    (received,) = recorder.requests
    assert issuer.accepts(received.values("Authorization")[0].removeprefix("Bearer "))


# --- the admin listener's address --------------------------------------------------------------------------------


def test_an_admin_address_in_use_ends_the_start_only_where_it_was_set(start: StartProxy, issuer: FakeIssuer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as usual:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for entry in ("launcher", "addon"):
            environment = settings_for(issuer, PROXY_ADMIN=address)
            proxy = start(entry, "http://127.0.0.1:9", environment, wait=False)
            assert proxy.wait_until_ended() == 1
            assert "PROXY_ADMIN" in proxy.output
            assert address in proxy.output
            assert "Traceback" not in proxy.output
        # Whoever else has it, the port of the default is taken now.
        with contextlib.suppress(OSError):
            usual.bind(("127.0.0.1", 8081))
            usual.listen()
        proxy = start("launcher", "http://127.0.0.1:9", settings_for(issuer, PROXY_ADMIN=""))
        assert proxy.url
        assert "without the admin listener" in proxy.output


def is_down(handler: Handler) -> bool:
    handler.answer(503, {})
    return True


def test_readiness_is_the_token_and_not_the_service(
    start: StartProxy, issuer: FakeIssuer, client: httpx.Client
) -> None:
    issuer.behaviour.fault = is_down
    proxy = start("launcher", "http://127.0.0.1:9", settings_for(issuer, PROXY_ADMIN="127.0.0.1:0"))
    admin = admin_of(proxy)
    assert client.get(f"{admin}/livez").status_code == 200
    response = client.get(f"{admin}/readyz")
    assert (response.status_code, response.headers["X-OIDC-Proxy-Error"]) == (503, "issuer_unavailable")
    assert response.json()["code"] == "issuer_unavailable"
    status = client.get(f"{admin}/status").json()
    assert (status["ready"], status["code"], status["token"]) == (False, "issuer_unavailable", None)
    assert status["refreshes"]["issuer_unavailable"] >= 1
    assert client.get(proxy.url).status_code == 503
    status = client.get(f"{admin}/status").json()
    assert status["errors"] == {"issuer_unavailable": 1}
    assert (status["state"], status["recent_errors"][0]["code"]) == ("failing", "issuer_unavailable")
    assert [problem["title"] for problem in status["problems"]] == ["The identity provider does not provide a token"]
    issuer.behaviour.fault = None
    # Nobody but the probe asks.
    eventually(lambda: client.get(f"{admin}/readyz").status_code == 200, timeout=30)
    assert client.get(proxy.url).status_code == 502
    status = client.get(f"{admin}/status").json()
    assert (status["state"], status["recent_errors"][0]["code"]) == ("ready", "upstream_unavailable")
    [problem] = status["problems"]
    assert problem["title"] == "The protected service does not answer"
    assert "127.0.0.1:9" in problem["detail"]
    assert problem["remedy"] == "check REMOTE_PROTECTED_DOMAIN, and that the service is running"


# --- TLS to the service ------------------------------------------------------------------------------------------


def test_over_http2_the_service_sees_its_own_name_and_is_verified_as_itself(
    start: StartProxy, issuer: FakeIssuer, certificate: Path
) -> None:
    with Http2Service(certificate) as service:
        url = service.url.replace("127.0.0.1", "localhost")
        for entry, trust in (
            ("launcher", {"TLS_CA_FILE": str(certificate)}),
            ("addon", ["--set", f"ssl_verify_upstream_trusted_ca={certificate}"]),
        ):
            more = trust if isinstance(trust, dict) else {}
            proxy = start(entry, url, settings_for(issuer, **more), *(trust if isinstance(trust, list) else []))
            port = urlsplit(proxy.url).port or 0
            assert http2_get(port, {"authorization": "Basic eDp5"}, server_name="other.example") == 200
            headers = service.requests.pop()
            assert headers.values(":authority") == [url.removeprefix("https://")]
            (credential,) = headers.values("authorization")
            assert issuer.accepts(credential.removeprefix("Bearer "))
            assert service.names.pop() == "localhost"


# --- forward mode ------------------------------------------------------------------------------------------------


def test_in_forward_mode_the_token_goes_to_the_named_hosts_only(
    start: StartProxy, issuer: FakeIssuer, certificate: Path
) -> None:
    chosen, other = Recorder(), Recorder()
    with (
        chosen.server() as service,
        other.server() as elsewhere,
        Http2Service(certificate) as secure,
        Http2Service(certificate) as secure_elsewhere,
    ):
        hosts = f"127.0.0.1:{service.port},localhost:{urlsplit(secure.url).port}"
        trust = ("--set", f"ssl_verify_upstream_trusted_ca={certificate}")
        proxy = start("addon", "", settings_for(issuer, PROXY_INJECT_HOSTS=hosts), *trust)
        port = urlsplit(proxy.url).port or 0
        assert f"-> {hosts.replace(',', ', ')} as alice" in proxy.output

        with httpx.Client(proxy=proxy.url, trust_env=False, timeout=20) as client:
            own = {"Authorization": "Basic eDp5"}
            assert client.get(f"{service.url}/x", headers=own).status_code == 200
            assert client.get(f"{elsewhere.url}/x", headers=own | {"Sec-Fetch-Site": "cross-site"}).status_code == 200
            for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                assert client.get(service.url, headers=headers).status_code == 403
                assert client.get(service.url, headers=headers).headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in client.get(f"{service.url}/cors").headers
            assert client.get(f"{elsewhere.url}/cors").headers["Access-Control-Allow-Origin"] == "*"
            # Another name of the same address is another host.
            assert client.get(f"http://localhost:{service.port}/y").status_code == 200
        named, _, unnamed = chosen.requests
        assert named.target == "/x"
        assert issuer.accepts(named.values("Authorization")[0].removeprefix("Bearer "))
        assert named.values("Host") == [f"127.0.0.1:{service.port}"]
        assert (unnamed.target, unnamed.values("Authorization")) == ("/y", [])
        assert other.requests[0].values("Authorization") == ["Basic eDp5"]

        assert exchange(port, f"GET /z HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\n\r\n".encode())[9:12] == b"400"
        assert len(chosen.requests) == 3

        # Looked into where the token goes; elsewhere the server's own certificate comes through.
        for target, is_ours in ((secure, True), (secure_elsewhere, False)):
            name = f"localhost:{urlsplit(target.url).port}"
            issuer_name = tunnel_certificate(port, name)
            assert (issuer_name != "test") is is_ours
            assert http2_get(port, {}, name, tunnel_to=name, server_name="other.example") == 200
            credentials = target.requests.pop().values("authorization")
            assert [issuer.accepts(text.removeprefix("Bearer ")) for text in credentials] == [True] * is_ours
            assert target.names.pop() == ("localhost" if is_ours else "other.example")
    assert "Traceback" not in proxy.output


def tunnel_certificate(port: int, target: str) -> str:
    """Return the common name of who issued the certificate that is shown behind CONNECT."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        plain.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert b" 200 " in plain.recv(4096)
        with context.wrap_socket(plain, server_hostname="localhost") as stream:
            certificate = x509.load_der_x509_certificate(stream.getpeercert(binary_form=True) or b"")
    return str(certificate.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


def test_check_leaves_no_trace_in_a_proxy_that_runs(
    start: StartProxy, base_environment: dict[str, str], issuer: FakeIssuer, tmp_path: Path, client: httpx.Client
) -> None:
    recorder = Recorder()
    with recorder.server() as service:
        environment = settings_for(issuer, PROXY_ADMIN="127.0.0.1:0", PROXY_ALLOWED_HOSTS="*")
        proxy = start("launcher", service.url, environment, *verbose(tmp_path))
        admin = admin_of(proxy)
        # What changes by itself is left out.
        counted = [line for line in client.get(f"{admin}/metrics").text.splitlines() if "_requests" in line]
        port = str(urlsplit(proxy.url).port)
        command = [sys.executable, str(ROOT / "run-mitmproxy.py"), "check"]
        here = base_environment | environment | {"REMOTE_PROTECTED_DOMAIN": service.url, "PROXY_PORT": port}
        done = subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert f"127.0.0.1:{port} is in use by a running OIDC proxy" in done.stdout, done.stdout + done.stderr
        assert [line for line in client.get(f"{admin}/metrics").text.splitlines() if "_requests" in line] == counted
        status = client.get(f"{admin}/status").json()
        assert (status["recent_errors"], status["requests"], status["errors"]) == ([], {}, {})
        # Only check's own two requests have reached the service, none of them through the proxy.
        assert [received.method for received in recorder.requests] == ["GET", "GET"]
        assert proxy.stop() == 0
    assert "check.invalid" not in proxy.output
    assert not any(b"check.invalid" in (tmp_path / name).read_bytes() for name in ("flows", "all.har"))
