"""Measure several services behind one login: `uv run bench/services.py [--rounds N] [--seconds S]`.

First, what one service's clients notice of the others': its latency while clients call other services, ten times a
second each, that work, or whose exchange is refused, takes five seconds, or whose service is away. Both in turns, and
the ratio. Then what services cost that nobody calls: the start and the memory of a proxy with one and with fifty.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from eoepca_security.testing import Behaviour, FakeIssuer

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 4
INTERVAL = 0.1
TIMEOUT = 60.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def serve(listener: socket.socket) -> None:
    """Answer every request at once."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ANSWER)
        writer.close()

    async with await asyncio.start_server(answer, sock=listener) as server:
        await server.serve_forever()


@contextlib.contextmanager
def upstream() -> Iterator[str]:
    """Run the services, which are one, in a process of its own; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = os.fork()
        if pid == 0:
            asyncio.run(serve(listener))
        port = listener.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def proxy(issuer: FakeIssuer, services: str) -> Iterator[tuple[int, int, float]]:
    """Run the launcher; yields its port, its process ID, and the seconds from its start to its first answer."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        file = Path(folder, "services.toml")
        file.write_text(services)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": folder,
            "OPEN_ID_CONNECT_URL": issuer.url,
            "OPEN_ID_CONNECT_CLIENT_ID": issuer.client_id,
            "OPEN_ID_CONNECT_CLIENT_SECRET": issuer.client_secret or "",
            "OPEN_ID_REFRESH_TOKEN": issuer.refresh_token,
            "OPEN_ID_TOKEN_STORE": "none",
            "PROXY_SERVICES": str(file),
            "PROXY_PORT": str(port),
            "PROXY_ADMIN": "off",
        }
        began = time.monotonic()
        command = [sys.executable, str(ROOT / "run-mitmproxy.py"), "serve"]
        output = subprocess.DEVNULL
        with subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output) as process:
            try:
                asyncio.run(first_answer(port))
                yield port, process.pid, time.monotonic() - began
            finally:
                process.terminate()


async def first_answer(port: int) -> None:
    async with asyncio.timeout(TIMEOUT):
        while True:
            with contextlib.suppress(OSError):
                await ask(*await asyncio.open_connection("127.0.0.1", port), "good")
                return
            await asyncio.sleep(0.005)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
    """Ask a service for something, and read the answer."""
    writer.write(f"GET / HTTP/1.1\r\nHost: {name}.localhost\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length or 0))


async def latencies(port: int, seconds: float, others: tuple[str, ...]) -> list[float]:
    """Return how long each request to the good service took, in milliseconds, while others call the others."""
    until, found = time.monotonic() + seconds, list[float]()

    async def call_good() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < until:
            began = time.monotonic()
            await ask(reader, writer, "good")
            found.append(1000 * (time.monotonic() - began))
            await asyncio.sleep(0.01)
        writer.close()

    async def call_other(name: str) -> None:
        while time.monotonic() < until:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(INTERVAL):
                    await ask(reader, writer, name)
            writer.close()
            await asyncio.sleep(INTERVAL)

    await asyncio.gather(*(call_good() for _ in range(CONNECTIONS)), *(call_other(name) for name in others))
    return found


def service(name: str, url: str) -> str:
    return f'[service.{name}]\nurl = "{url}/{name}"\ntoken = "exchange"\naudience = "{name}"\n'


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def apart(rounds: int, seconds: float) -> None:
    """Print what the good service's clients notice."""
    behaviour = Behaviour(lifetime=3, exchange_delays={"slow": 5.0}, exchange_errors={"refused": "invalid_target"})
    well, ill = ("one", "two", "three"), ("slow", "refused", "away")
    with FakeIssuer(behaviour, client_secret="of-the-benchmark") as issuer, upstream() as url:
        services = [service(name, url) for name in ("good", *well, "slow", "refused")]
        services.append(service("away", "http://127.0.0.1:9"))
        with proxy(issuer, "".join(services)) as (port, _, _):
            ratios: dict[str, list[float]] = {"p50": [], "p99": []}
            for _round in range(rounds):
                found = [asyncio.run(latencies(port, seconds, others)) for others in (well, ill)]
                for name, share in (("p50", 0.5), ("p99", 0.99)):
                    before, during = (percentile(values, share) for values in found)
                    ratios[name].append(during / before)
                    print(f"{name}: {before:.2f} ms beside services that work, {during:.2f} ms beside others")
            for name, values in ratios.items():
                print(f"{name}: {statistics.median(values):.2f} times, median of {rounds}")


def many(rounds: int) -> None:
    """Print what services cost that nobody calls."""
    with FakeIssuer(client_secret="of-the-benchmark") as issuer, upstream() as url:
        for count in (1, 50):
            services = service("good", url) + "".join(service(f"s{i}", url) for i in range(count - 1))
            starts, sizes = [], []
            for _round in range(rounds):
                with proxy(issuer, services) as (_, pid, started):
                    starts.append(1000 * started)
                    fields = Path(f"/proc/{pid}/status").read_text().split()
                    sizes.append(int(fields[fields.index("VmRSS:") + 1]) / 1024)
            print(
                f"{count} services: first answer {statistics.median(starts):.0f} ms, {statistics.median(sizes):.1f} MiB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15)
    arguments = parser.parse_args()
    apart(arguments.rounds, arguments.seconds)
    many(arguments.rounds)


if __name__ == "__main__":
    main()
