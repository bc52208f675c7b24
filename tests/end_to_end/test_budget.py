"""What the proxy holds of bodies, for all clients together, and where it stops to read instead."""

import socket
import time

import httpx
import pytest

from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import RawServer
from tests.support.network import http as response
from tests.support.processes import ProxyProcess, StartProxy, admin_of
from tests.support.raw_http import launch, port_of, read_all, statuses
from tests.support.waiting import eventually

MIB = 1024 * 1024
BODY = b"x" * 60_000


def upload(path: str, length: int) -> bytes:
    head = f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    return head.encode()


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what comes until `end`, or nothing if the connection ends before."""
    data = b""
    while not data.endswith(end):
        if not (part := connection.recv(65536)):
            return b""
        data += part
    return data


class Refuses:
    """Refuses the first token that comes with each target, and counts the bodies of the uploads."""

    def __init__(self) -> None:
        self.refused: set[bytes] = set()

    def __call__(self, server: RawServer, connection: socket.socket) -> None:
        data = read_until(connection, BODY)
        if not data:
            return  # the client has gone
        target = data.split()[1]
        is_new = target not in self.refused
        self.refused.add(target)
        connection.sendall(response(b"no", status=401) if is_new else response(b"ok"))
        server.wait_for_end(connection)


def held(proxy: ProxyProcess) -> int:
    with httpx.Client(trust_env=False) as client:
        return int(client.get(f"{admin_of(proxy)}/status").json()["held_bytes"])


def token_ends_at(proxy: ProxyProcess) -> float:
    with httpx.Client(trust_env=False) as client:
        token = client.get(f"{admin_of(proxy)}/status").json()["token"]
    return float(token["ends_at"]) if token else 0.0


def put(proxy: ProxyProcess, path: str) -> list[int]:
    with socket.create_connection(("127.0.0.1", port_of(proxy)), 20) as client:
        client.sendall(upload(path, len(BODY)) + BODY)
        return statuses(read_all(client))


@pytest.mark.parametrize("entry", ["launcher", pytest.param("addon", marks=pytest.mark.soak)])
def test_what_does_not_fit_into_the_budget_streams_and_is_sent_once(entry: str, start: StartProxy) -> None:
    with FakeIssuer() as issuer, RawServer(Refuses()) as service:
        environment = settings_for(issuer, PROXY_HELD_BYTES="100000", PROXY_ADMIN="127.0.0.1:0")
        proxy = launch(start, entry, f"http://127.0.0.1:{service.port}", environment)
        assert put(proxy, "/fits") == [200]
        with socket.create_connection(("127.0.0.1", port_of(proxy)), 20) as stalled:
            stalled.sendall(upload("/stalled", len(BODY)) + BODY[:-1])
            eventually(lambda: held(proxy) == len(BODY))
            assert put(proxy, "/does-not-fit") == [401]
            with httpx.Client(trust_env=False) as client:
                metrics = client.get(f"{admin_of(proxy)}/metrics").text
            assert f"oidc_proxy_held_bytes {len(BODY)}.0\n" in metrics
        eventually(lambda: held(proxy) == 0)
        with socket.create_connection(("127.0.0.1", port_of(proxy)), 20) as another:
            another.sendall(upload("/stalled", len(BODY)) + BODY[:-1])
            eventually(lambda: held(proxy) == len(BODY))


def test_what_comes_before_there_is_a_token_stays_with_the_client(start: StartProxy) -> None:
    size, received = 64 * MIB, 0

    def script(server: RawServer, connection: socket.socket) -> None:
        nonlocal received
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        received = len(head.partition(b"\r\n\r\n")[2])
        while received < size:
            received += len(connection.recv(65536))
        connection.sendall(response(b"ok"))
        server.wait_for_end(connection)

    with FakeIssuer(Behaviour(lifetime=1)) as issuer, RawServer(script) as service:
        environment = settings_for(issuer, PROXY_ADMIN="127.0.0.1:0")
        proxy = start("launcher", f"http://127.0.0.1:{service.port}", environment)
        issuer.behaviour.delay = 3
        eventually(lambda: token_ends_at(proxy) < time.time())
        with socket.create_connection(("127.0.0.1", port_of(proxy)), 20) as client:
            client.sendall(upload("/", size))
            client.settimeout(1)
            sent, before = 0, None
            while sent < size:
                try:
                    sent += client.send(bytes(min(MIB, size - sent)))
                except TimeoutError:
                    before = sent if before is None else before
            assert before is not None
            assert before < 16 * MIB
            client.settimeout(20)
            assert statuses(read_all(client)) == [200]
        assert received == size
