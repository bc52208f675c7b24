"""HTTP to the proxy byte by byte, for tests of what it does with exactly these bytes."""

import contextlib
import json
import re
import socket

from tests.support.processes import ProxyProcess, StartProxy

ENTRIES: dict[str, dict[str, str]] = {"launcher": {}, "addon": {}, "workers": {"PROXY_WORKERS": "2"}}


def launch(start: StartProxy, entry: str, url: str, environment: dict[str, str], *arguments: str) -> ProxyProcess:
    name = "addon" if entry == "addon" else "launcher"
    return start(name, url, environment | ENTRIES[entry], *arguments)


def port_of(proxy: ProxyProcess) -> int:
    return int(proxy.url.rpartition(":")[2])


def send(proxy: ProxyProcess, *parts: bytes, half_close: bool = False) -> bytes:
    """Send `parts`, each after the first bytes of an answer to the one before; return all until the connection ends.

    One that is reset rather than closed raises.
    """
    with socket.create_connection(("127.0.0.1", port_of(proxy)), 10) as stream:
        received = b""
        for number, part in enumerate(parts):
            if number:
                received += stream.recv(65536)
            with contextlib.suppress(BrokenPipeError):
                stream.sendall(part)
        if half_close:
            stream.shutdown(socket.SHUT_WR)
        return received + read_all(stream)


def read_all(stream: socket.socket) -> bytes:
    received = b""
    while data := stream.recv(65536):
        received += data
    return received


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]


def assert_refused(answer: bytes, status: int, code: str = "bad_request") -> None:
    """Check that this is one answer, in the usual form, and announces the end of the connection."""
    assert statuses(answer) == [status]
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert b"x-oidc-proxy-error: " + code.encode() in lines
    assert b"content-type: application/problem+json" in lines
    assert b"connection: close" in lines
    problem = json.loads(body)
    assert (problem["code"], problem["status"]) == (code, status)
