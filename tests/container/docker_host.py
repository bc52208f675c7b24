"""The Docker engine, and what containers reach on its host: an issuer and a service, over TLS."""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from eoepca_security.testing.login import Logins
from tests.support.processes import ROOT
from tests.support.service import Seen
from tests.support.tls import write_certificate

SECONDS = 60.0
TAG = "mitmproxy-oidc-test"
CA_FILE = "/run/ca.pem"
PUBLISH = ("-p", "127.0.0.1::8080")
LOCKED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
HEALTHCHECK = ("python", "-I", "-S", "/opt/proxy/healthcheck.py")

# Both builders take the Dockerfile; the classic one needs nothing besides the engine.
ENVIRONMENT = {"DOCKER_BUILDKIT": "0", **os.environ}


def readme_lines() -> tuple[str, str]:
    """Return the README's `docker build` and `docker run` lines."""
    text = (ROOT / "README.md").read_text()
    build, run = (re.findall(rf"^docker {verb} .*$", text, re.MULTILINE) for verb in ("build", "run"))
    assert (len(build), len(run)) == (1, 1)
    return build[0], run[0]


def docker(*arguments: str, check: bool = True, timeout: float = SECONDS) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False, env=ENVIRONMENT
    )
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done


def inspect(name: str) -> dict[str, Any]:
    (found,) = json.loads(docker("inspect", name).stdout)
    assert isinstance(found, dict)
    return found


def has_engine() -> bool:
    return shutil.which("docker") is not None and docker("info", check=False).returncode == 0


def gateway() -> str:
    """Return the host's address on the bridge that containers are on."""
    (configuration, *_) = inspect("bridge")["IPAM"]["Config"]
    # An engine that has just made the bridge does not name it, but takes the first address (Docker 20.10).
    return str(configuration.get("Gateway") or next(ipaddress.ip_network(configuration["Subnet"]).hosts()))


def unique(purpose: str) -> str:
    return f"mitmproxy-oidc-test-{purpose}-{uuid.uuid4().hex[:8]}"


def until(condition: Callable[[], bool], timeout: float = 30) -> float:
    """Wait until `condition` holds, and return how many seconds that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout, "the condition did not come true in time"
        time.sleep(0.05)
    return time.monotonic() - begin


class Relay:
    """Takes TLS connections at `address` and hands what they bring to a port of 127.0.0.1, while its block lasts."""

    def __init__(self, address: str, port: int, tls: ssl.SSLContext) -> None:
        self._listener = socket.create_server((address, 0))
        self._port = port
        self._tls = tls
        self.url = f"https://{address}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            plain,
            self._tls.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(("127.0.0.1", self._port), SECONDS) as server,
        ):
            client.settimeout(SECONDS)
            # One request for each connection: so there is nothing to watch on two sides.
            server.sendall(_one_request(client))
            while data := server.recv(65536):
                client.sendall(data)


def _one_request(client: ssl.SSLSocket) -> bytes:
    """Read a request, and return it with the wish that its connection be closed after the answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(client)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    length = sum(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += _receive(client)
    kept = [line for line in lines if not line.lower().startswith((b"connection:", b"keep-alive:"))]
    return b"\r\n".join([*kept, b"Connection: close", b"", body])


def _receive(client: ssl.SSLSocket) -> bytes:
    data = client.recv(65536)
    if not data:
        raise ConnectionResetError
    return data


@dataclass
class Outside:
    """What a container is a client of. A request to /slow is answered when `release` is set."""

    issuer: FakeIssuer
    ca: Path
    service_url: str = ""
    seen: list[Seen] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "OPEN_ID_CONNECT_URL": self.issuer.url,
            "OPEN_ID_CONNECT_CLIENT_ID": self.issuer.client_id,
            "OPEN_ID_REFRESH_TOKEN": self.issuer.refresh_token,
            "REMOTE_PROTECTED_DOMAIN": self.service_url,
            "TLS_CA_FILE": CA_FILE,
        } | more

    @property
    def trust(self) -> tuple[str, ...]:
        """The arguments of docker that put the CA where the environment says."""
        return ("-v", f"{self.ca}:{CA_FILE}:ro")

    def handler(self) -> type[Handler]:
        outside = self

        class Protected(Handler):
            def respond(self) -> None:
                length = len(self.read_body())
                given = self.headers.get_all("Authorization") or []
                good = len(given) == 1 and outside.issuer.accepts(given[0].removeprefix("Bearer "))
                outside.seen.append(Seen(self.command, self.path, given, dict(self.headers), length, good))
                if self.path == "/slow":
                    outside.arrived.set()
                    outside.release.wait(SECONDS)
                self.answer(200 if good else 401, {"path": self.path})

        return Protected


@contextlib.contextmanager
def outside(folder: Path, behaviour: Behaviour | None = None, client_secret: str | None = None) -> Iterator[Outside]:
    address = gateway()
    tls = write_certificate(folder / "tls.pem", address=address)
    (folder / "ca.pem").write_text((folder / "tls.pem").read_text().partition("-----BEGIN PRIVATE KEY")[0])
    (folder / "ca.pem").chmod(0o644)
    issuer = FakeIssuer(behaviour, client_secret=client_secret)
    there = Outside(issuer, folder / "ca.pem")
    with (
        issuer,
        LocalServer(there.handler()) as service,
        Relay(address, int(issuer.url.split(":")[2].partition("/")[0]), tls) as issuer_relay,
        Relay(address, service.port, tls) as service_relay,
    ):
        issuer.url = f"{issuer_relay.url}/realms/test"
        issuer.logins = Logins(issuer.url, issuer.client_id)
        there.service_url = service_relay.url
        yield there
        there.release.set()


def options(environment: Mapping[str, str]) -> list[str]:
    return [part for name, value in environment.items() for part in ("-e", f"{name}={value}")]


class Container:
    """A container of a name of its own, removed with its anonymous volumes at the end of its `with` block."""

    def __init__(self, image: str, *arguments: str, command: tuple[str, ...] = ()) -> None:
        self.name = unique("c")
        docker("run", "-d", "--name", self.name, *arguments, image, *command)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        docker("rm", "-f", "-v", self.name)

    @property
    def url(self) -> str:
        """Where its port 8080 was published."""
        return f"http://{docker('port', self.name, '8080').stdout.splitlines()[0]}"

    @property
    def state(self) -> dict[str, Any]:
        state = inspect(self.name)["State"]
        assert isinstance(state, dict)
        return state

    @property
    def logs(self) -> str:
        done = docker("logs", self.name)
        return done.stdout + done.stderr

    def runs(self, *command: str) -> int:
        return docker("exec", self.name, *command, check=False).returncode

    def healthcheck(self, *arguments: str) -> int:
        return self.runs(*HEALTHCHECK, *arguments)

    def stop(self) -> tuple[int, float]:
        """Stop it as users do; returns its exit code and the seconds it took."""
        begin = time.monotonic()
        docker("stop", self.name)
        return int(self.state["ExitCode"]), time.monotonic() - begin

    def exit_code(self) -> int:
        return int(docker("wait", self.name).stdout)


def serving(image: str, there: Outside, *arguments: str, **environment: str) -> Container:
    """Start the proxy, with its port published."""
    return Container(image, *PUBLISH, *there.trust, *options(there.environment(**environment)), *arguments)


def answers(url: str, status: int = 200) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=20).status_code == status
    except httpx.HTTPError:
        return False


def wait_until_it_answers(container: Container, status: int = 200) -> float:
    """Return how many seconds that took; fails at once when the container ends."""

    def answers_or_ended() -> bool:
        assert container.state["Running"], container.logs
        return answers(url, status)

    url = container.url
    return until(answers_or_ended)
