"""Compare the proxy's speed with bare mitmdump's: `uv run bench/proxy.py [--rounds N] [--write]`.

Everything runs on this machine in turns, so compare the ratios rather than the figures. `--write` writes them to
RESULTS.md. nginx is measured too, if it is installed.
"""

import argparse
import contextlib
import datetime
import http.client
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from eoepca_security.testing import Behaviour, FakeIssuer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONNECTIONS = (1, 16, 64)
LINK_DELAY = 0.025
DOWN = 1024 * 2**20
UP = 1024 * 2**20

KINDS = ("bare mitmdump", "mitmdump -s add-on", "launcher")
WITH_WORKERS = (*KINDS, "launcher, 2 workers")


@dataclass
class Process:
    """A process that listens on a port."""

    process: "subprocess.Popen[bytes]"
    port: int
    started_in: float

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(15)

    def _all(self) -> list[Path]:
        own = Path(f"/proc/{self.process.pid}")
        children = (own / "task" / own.name / "children").read_text().split()
        return [own, *(Path("/proc", child) for child in children)]

    def cpu_seconds(self) -> float:
        """Return the processor time of this process and its children."""
        fields = [(path / "stat").read_text().rpartition(")")[2].split() for path in self._all()]
        return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Return the resident size in bytes, including the children."""
        lines = [line for path in self._all() for line in (path / "status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@dataclass
class Bench:
    """The processes around the proxy, and the results by measure and kind."""

    folder: Path
    issuer: FakeIssuer
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def note(self, measure: str, kind: str, value: float) -> None:
        self.figures.setdefault(measure, {}).setdefault(kind, []).append(value)

    def start(self, kind: str, upstream: str) -> Process:
        port = free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "OPEN_ID_CONNECT_URL": self.issuer.url,
            "OPEN_ID_CONNECT_CLIENT_ID": self.issuer.client_id,
            "OPEN_ID_REFRESH_TOKEN": self.issuer.refresh_token,
            "OPEN_ID_TOKEN_STORE": "none",
            "TLS_CA_FILE": str(self.folder / "service.pem"),
            "REMOTE_PROTECTED_DOMAIN": upstream,
            "PROXY_PORT": str(port),
            "PROXY_ADMIN": "off",
            "PROXY_WORKERS": "2" if "workers" in kind else "1",
        }
        mitmdump = [str(Path(sys.executable).parent / "mitmdump"), "-q", "--mode", f"reverse:{upstream}"]
        mitmdump += ["--listen-host", "127.0.0.1", "--listen-port", str(port)]
        mitmdump += ["--set", f"ssl_verify_upstream_trusted_ca={self.folder / 'service.pem'}"]
        command = {
            "bare mitmdump": mitmdump,
            "mitmdump -s add-on": [*mitmdump, "-s", str(ROOT / "mitmproxy-oidc-addon.py")],
            "launcher": [sys.executable, str(ROOT / "run-mitmproxy.py")],
            "launcher, 2 workers": [sys.executable, str(ROOT / "run-mitmproxy.py")],
            "nginx": ["nginx", "-c", str(self._nginx_configuration(upstream, port))],
        }[kind]
        return self.run(command, port, environment)

    def run(self, command: list[str], port: int, environment: dict[str, str] | None = None) -> Process:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return Process(process, port, time.perf_counter() - started)
            if process.poll() is not None:
                raise SystemExit(f"{command} ended with {process.returncode}")
            time.sleep(0.005)

    def peer(self, *arguments: object) -> Process:
        port = free_port()
        kind, *rest = map(str, arguments)
        return self.run([sys.executable, str(HERE / "peers.py"), kind, str(port), *rest], port)

    def _nginx_configuration(self, upstream: str, port: int) -> Path:
        scheme, _, target = upstream.partition("://")
        path = self.folder / f"nginx-{port}.conf"
        path.write_text(
            f"daemon off; pid {path}.pid; error_log stderr crit; worker_processes 1; events {{ }}\n"
            f"http {{ access_log off; upstream service {{ server {target}; keepalive 32; }}\n"
            f"  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {scheme}://service;\n"
            f"    proxy_http_version 1.1;\n"
            f'    proxy_set_header Connection ""; proxy_set_header Authorization "Bearer x"; proxy_ssl_verify on;\n'
            f"    proxy_ssl_trusted_certificate {self.folder / 'service.pem'}; proxy_ssl_name 127.0.0.1; }} }} }}\n"
        )
        return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def make_certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1, and a file that also has its key."""
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(__import__("ipaddress").ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(Encoding.PEM)
    (folder / "service.pem").write_bytes(pem)
    both = folder / "service-key.pem"
    both.write_bytes(pem + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return both


# --- measurements ------------------------------------------------------------------------------------------------


def throughput(bench: Bench, rounds: int, seconds: float) -> None:
    """Measure requests per second, latencies and CPU time, with persistent connections."""
    with upstream(bench) as service:
        _throughput(bench, rounds, seconds, service)


def _throughput(bench: Bench, rounds: int, seconds: float, service: str) -> None:
    proxies = {kind: bench.start(kind, service) for kind in WITH_WORKERS}
    for round_number in range(rounds + 1):
        for connections in CONNECTIONS:
            for kind, proxy in proxies.items():
                before = proxy.cpu_seconds()
                result = load(proxy.port, connections, seconds)
                if round_number == 0:
                    continue  # the first round is for warming up
                requests = result["requests"]
                bench.note(f"requests/s, {connections} connections", kind, requests / result["seconds"])
                bench.note(f"p50 in ms, {connections} connections", kind, 1000 * result["p50"])
                bench.note(f"p99 in ms, {connections} connections", kind, 1000 * result["p99"])
                cpu = (proxy.cpu_seconds() - before) / requests
                bench.note(f"CPU time per request in µs, {connections} connections", kind, 1e6 * cpu)
    for process in proxies.values():
        process.stop()


@contextlib.contextmanager
def upstream(bench: Bench) -> Iterator[str]:
    """Run the service for small requests: nginx if it is installed, because it is the fastest."""
    if shutil.which("nginx"):
        port = free_port()
        path = bench.folder / "service.conf"
        path.write_text(
            f"daemon off; pid {path}.pid; error_log stderr crit; worker_processes 1; events {{ }}\n"
            f"http {{ access_log off; keepalive_requests 1000000;\n"
            f"  server {{ listen 127.0.0.1:{port}; location / {{ return 200 'hello, this is a small answer'; }} }} }}\n"
        )
        service = bench.run(["nginx", "-c", str(path)], port)
    else:
        service = bench.peer("service")
    yield f"http://127.0.0.1:{service.port}"
    service.stop()


def load(port: int, connections: int, seconds: float, requests: int = 0) -> dict[str, Any]:
    """Keep connections busy for some seconds, or for a number of requests."""
    command = [sys.executable, str(HERE / "peers.py"), "load", str(port), str(connections), str(seconds), str(requests)]
    result: dict[str, Any] = json.loads(subprocess.check_output(command))
    if result["failures"]:
        raise SystemExit(f"{result['failures']}")
    return result


def memory(bench: Bench) -> None:
    """Measure the launcher's memory after many requests."""
    with upstream(bench) as service:
        proxy = bench.start("launcher", service)
        for total, more in (("10,000", 10_000), ("100,000", 90_000), ("200,000", 100_000)):
            load(proxy.port, 16, 3600, more)
            bench.note(f"memory in MiB after {total} requests", "launcher", proxy.memory() / 2**20)
        proxy.stop()


def http2(bench: Bench, rounds: int) -> None:
    """Measure HTTP/2 with a TLS client, twenty requests at a time on one connection, to an HTTP/1 service."""
    with upstream(bench) as service:
        proxies = {kind: bench.start(kind, service) for kind in KINDS}
        for round_number in range(rounds + 1):
            for kind, proxy in proxies.items():
                before = proxy.cpu_seconds()
                command = [sys.executable, str(HERE / "peers.py"), "http2", str(proxy.port), "1000"]
                seconds = json.loads(subprocess.check_output(command))["seconds"]
                if round_number:
                    bench.note("HTTP/2 requests/s, 20 at a time", kind, 1000 / seconds)
                    cpu = (proxy.cpu_seconds() - before) / 1000
                    bench.note("CPU time per HTTP/2 request in µs", kind, 1e6 * cpu)
        for process in proxies.values():
            process.stop()


def one_shot(bench: Bench, rounds: int) -> None:
    """Measure a client that opens a TLS connection for each request, over a link with a round trip of 50 ms."""
    service = bench.peer("service", bench.folder / "service-key.pem")
    link = bench.peer("relay", service.port, LINK_DELAY)
    kinds = [*WITH_WORKERS, *(["nginx"] if shutil.which("nginx") else [])]
    proxies = {kind: bench.start(kind, f"https://127.0.0.1:{link.port}") for kind in kinds}
    for round_number in range(2 + 5 * rounds):
        for kind, proxy in proxies.items():
            started = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
            connection.request("GET", "/small")
            response = connection.getresponse()
            response.read()
            connection.close()
            if response.status != 200:
                raise SystemExit(f"{kind}: {response.status}")
            if round_number >= 2:
                bench.note(
                    "one-shot request over a 50 ms link with TLS, in ms", kind, 1000 * (time.perf_counter() - started)
                )
            time.sleep(0.02)
    for process in (*proxies.values(), link, service):
        process.stop()


def streams(bench: Bench) -> None:
    """Measure large bodies and events, and their memory."""
    service = bench.peer("service")
    for kind in KINDS:
        proxy = bench.start(kind, f"http://127.0.0.1:{service.port}")
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=300)
        connection.request("GET", "/small")
        connection.getresponse().read()
        before = proxy.memory()
        connection.request("GET", "/events")
        response = connection.getresponse()
        sent = float(response.readline().decode().removeprefix("data: "))
        bench.note("first event after, in ms", kind, 1000 * (time.time() - sent))
        response.read()

        connection.request("GET", f"/large/{DOWN}")
        response, peak = connection.getresponse(), 0
        while response.read(2**22):
            peak = max(peak, proxy.memory())
        bench.note("growth in MiB, 1 GiB down", kind, (peak - before) / 2**20)

        def body(proxy: Process = proxy) -> Iterator[bytes]:
            nonlocal peak
            for _ in range(UP // 2**20):
                peak = max(peak, proxy.memory())
                yield b"x" * 2**20

        connection.request("PUT", "/up", body=body(), headers={"Content-Length": str(UP)})
        response = connection.getresponse()
        response.read()
        bench.note("growth in MiB, 1 GiB up", kind, (peak - before) / 2**20)
        connection.close()
        proxy.stop()
    service.stop()


def start_up(bench: Bench, rounds: int) -> None:
    """Measure from the start of the process to the first answer."""
    service = bench.peer("service")
    for round_number in range(rounds + 1):
        for kind in KINDS:
            started = time.perf_counter()
            proxy = bench.start(kind, f"http://127.0.0.1:{service.port}")
            connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
            connection.request("GET", "/small")
            connection.getresponse().read()
            if round_number:
                bench.note("start to listening, in ms", kind, 1000 * proxy.started_in)
                bench.note("start to first answer, in ms", kind, 1000 * (time.perf_counter() - started))
            connection.close()
            proxy.stop()
    service.stop()


# --- output ------------------------------------------------------------------------------------------------------


def report(bench: Bench, rounds: int) -> str:
    """Return all medians as a table, with their ratios to bare mitmdump's."""
    kinds = [kind for kind in (*WITH_WORKERS, "nginx") if any(kind in by_kind for by_kind in bench.figures.values())]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mitmproxy", "eoepca-security"))
    setting = f"Python {platform.python_version()}, {versions}, {platform.system()} {platform.machine()}"
    today = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"{today}: {setting}, {os.cpu_count()} cores; medians of {rounds} rounds in turn, ratios to bare mitmdump's.",
        "",
        "| measure | " + " | ".join(kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for measure, by_kind in bench.figures.items():
        base = statistics.median(by_kind.get(KINDS[0], [0]))
        cells = []
        for kind in kinds:
            if kind not in by_kind:
                cells.append("")
                continue
            value = statistics.median(by_kind[kind])
            ratio = f" ({value / base:.2f}×)" if kind != KINDS[0] and base > 0 else ""
            cells.append(f"{value:,.1f}{ratio}" if value < 100 else f"{value:,.0f}{ratio}")
        lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="seconds of load for each measurement")
    parser.add_argument("--write", action="store_true", help="also write RESULTS.md")
    parser.add_argument("--only", choices=["throughput", "http2", "one-shot", "streams", "start-up", "memory"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, FakeIssuer(Behaviour(lifetime=3600)) as issuer:
        bench = Bench(Path(folder), issuer)
        make_certificate(bench.folder)
        if arguments.only in (None, "throughput"):
            throughput(bench, arguments.rounds, arguments.seconds)
        if arguments.only in (None, "http2"):
            http2(bench, arguments.rounds)
        if arguments.only in (None, "one-shot"):
            one_shot(bench, arguments.rounds)
        if arguments.only in (None, "streams"):
            streams(bench)
        if arguments.only in (None, "start-up"):
            start_up(bench, arguments.rounds)
        if arguments.only in (None, "memory"):
            memory(bench)
        text = report(bench, arguments.rounds)
    print(text)
    if arguments.write:
        (HERE / "RESULTS.md").write_text(f"# Results of `bench/proxy.py`\n\n{text}")


if __name__ == "__main__":
    main()
