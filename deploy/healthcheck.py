"""The container's health check: does the proxy answer? Needs the standard library only, to be over in no time.

Asks the admin listener for /livez, or for the path that is the argument (`readyz`: is there a usable token?). Where
`PROXY_ADMIN` is off it asks the proxy itself, in a way that is refused and so never forwarded. Exits with 0 or 1, and
with 0 while the container runs another command than `serve`. The options of `serve` come before the environment.
"""

import os
import socket
import sys
from itertools import pairwise
from pathlib import Path

TIMEOUT = 3.0
OTHER_COMMANDS = {"check", "demo", "exec", "login", "logout", "token"}


def main(path: str = "livez") -> int:
    """Ask, say what is wrong, and return the exit code."""
    _, _, line = Path("/proc/1/cmdline").read_bytes().partition(b"/run-mitmproxy.py\0")
    arguments, _, _ = line.decode(errors="replace").partition("\0--\0")
    given = arguments.split("\0")
    if OTHER_COMMANDS.intersection(given):
        return 0
    admin = setting(given, "--admin", "PROXY_ADMIN", "127.0.0.1:8081")
    try:
        if admin != "off":
            host, _, port = admin.rpartition(":")
            return _judge(_ask(host, port, f"GET /{path} HTTP/1.0\r\nHost: localhost\r\n\r\n"), b" 200 ")
        if path != "livez":
            print("PROXY_ADMIN is off, so nobody can tell")
            return 1
        host = setting(given, "--host", "PROXY_HOST", "127.0.0.1")
        port = setting(given, "--port", "PROXY_PORT", "8080")
        # There is no Host that is allowed where there is none.
        return _judge(_ask(host, port, "GET / HTTP/1.0\r\n\r\n"), b"HTTP/1.")
    except (OSError, ValueError) as error:
        print(f"no answer: {error}")
        return 1


def setting(given: list[str], option: str, variable: str, default: str) -> str:
    """Return the value of an option, or else of the environment variable, or else the default."""
    values = [after for before, after in pairwise(given) if before == option]
    values += [argument.removeprefix(f"{option}=") for argument in given if argument.startswith(f"{option}=")]
    return (values or [""])[-1] or os.environ.get(variable) or default


def _ask(host: str, port: str, request: str) -> bytes:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))  # noqa: S104
    with socket.create_connection((host, int(port)), TIMEOUT) as connection:
        connection.sendall(request.encode())
        return connection.recv(1024).partition(b"\r\n")[0]


def _judge(answer: bytes, wanted: bytes) -> int:
    if wanted in answer:
        return 0
    print(f"the answer is {answer!r}")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
