"""Measure the memory of the launcher under loads that fill it: `uv run bench/memory.py [--case …] [--source …]`.

Each case has a proxy of its own. The figures are the peak of the resident size in MiB, with all its processes, while
the case runs, and what remains afterwards. `--source` measures another checkout of the project, and `--image` a
container image under a limit of 256 MiB, with the figures of its cgroup: what the kernel would end it for.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from eoepca_security.testing import Behaviour, FakeIssuer

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
BODY = MIB - 1024
TIMEOUT = 300.0
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
CHUNK = bytes(65536)

Case = Callable[[int, FakeIssuer], Awaitable[None]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def exchange(port: int, request: bytes, body: int = 0, *, stalls: bool = False) -> None:
    """Send one request on a connection of its own, and read the answer to its end, slowly enough for others."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        left = body - 1 if stalls else body
        while left > 0:
            writer.write(CHUNK[: min(left, len(CHUNK))])
            left -= len(CHUNK)
            await writer.drain()
        if stalls:
            await asyncio.sleep(5)
            return
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 101")):
            raise SystemExit(head[:200].decode("latin-1"))
        size = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        while size > 0:
            size -= len(await reader.read(min(size, 65536)))
    finally:
        writer.close()


def get(port: int, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()


def put(port: int, size: int) -> bytes:
    return f"PUT /up HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {size}\r\n\r\n".encode()


async def downloads(port: int, _: FakeIssuer) -> None:
    """180 clients download just under 1 MiB three times."""
    for _round in range(3):
        await asyncio.gather(*(exchange(port, get(port, f"/large/{BODY}")) for _client in range(180)))


async def uploads(port: int, _: FakeIssuer) -> None:
    """180 clients upload just under 1 MiB three times."""
    for _round in range(3):
        await asyncio.gather(*(exchange(port, put(port, BODY), BODY) for _client in range(180)))


async def both(port: int, issuer: FakeIssuer) -> None:
    """Run the downloads, and then the uploads."""
    await downloads(port, issuer)
    await uploads(port, issuer)


async def stalled(port: int, _: FakeIssuer) -> None:
    """190 clients upload 1 MiB, and stop before the last byte."""
    await asyncio.gather(*(exchange(port, put(port, BODY), BODY, stalls=True) for _ in range(190)))


async def websocket(port: int, _: FakeIssuer) -> None:
    """One client sends a WebSocket message of 600 MiB in frames of 1 MiB."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n" % (port, KEY)
    )
    await reader.readuntil(b"\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        for number in range(600):
            opcode = 0x02 if number == 0 else 0x00
            writer.write(bytes([opcode | (0x80 if number == 599 else 0), 0xFF]) + MIB.to_bytes(8) + bytes(4 + MIB))
            await writer.drain()
    writer.close()


async def waiting(port: int, issuer: FakeIssuer) -> None:
    """One client uploads 700 MiB while the proxy waits 5 seconds for a token."""
    issuer.behaviour.delay = 5
    await asyncio.sleep(1.1)  # the first token lives for a second
    size = 700 * MIB
    await exchange(port, put(port, size), size)
    issuer.behaviour.delay = 0


def busy(connections: int) -> Case:
    """Return the case of that many clients with 20 small requests each."""

    async def client(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(20):
            writer.write(get(port, "/small"))
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]))
        writer.close()

    async def case(port: int, _: FakeIssuer) -> None:
        await asyncio.gather(*(client(port) for _ in range(connections)))

    return case


CASES: dict[str, tuple[Case, int, float]] = {  # the case, workers, the lifetime of access tokens
    "180 x 3 downloads just under 1 MiB": (downloads, 1, 3600),
    "then 180 x 3 uploads": (both, 1, 3600),
    "190 stalled uploads of 1 MiB": (stalled, 1, 3600),
    "190 stalled uploads, 2 workers": (stalled, 2, 3600),
    "a WebSocket message of 600 MiB": (websocket, 1, 3600),
    "an upload of 700 MiB before a token": (waiting, 1, 1),
    "16 busy connections": (busy(16), 1, 3600),
    "256 busy connections": (busy(256), 1, 3600),
    "1,000 busy connections": (busy(1000), 1, 3600),
}


def processes(pid: int) -> list[Path]:
    """Return the folders in /proc of a process and its children."""
    own = Path(f"/proc/{pid}")
    return [own, *(Path("/proc", child) for child in (own / "task" / own.name / "children").read_text().split())]


def resident(pid: int, field: str) -> float:
    """Return a size in MiB: VmRSS or, for the peak, VmHWM."""
    lines = [line for path in processes(pid) for line in (path / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


class Host:
    """A launcher that runs on this machine."""

    def __init__(self, source: Path) -> None:
        self._source = source

    def command(self, _: Mapping[str, str]) -> list[str]:
        return [sys.executable, str(self._source / "run-mitmproxy.py")]

    def begin(self, pid: int) -> float:
        """Forget the peak so far, and return the size."""
        for path in processes(pid):
            (path / "clear_refs").write_text("5")
        return resident(pid, "VmRSS")

    def end(self, pid: int) -> tuple[float, float]:
        """Return the peak and what remains."""
        return resident(pid, "VmHWM"), resident(pid, "VmRSS")


class Container:
    """A container under a limit, with its own files."""

    NAME = "oidc-proxy-memory"
    FOLDERS = (
        "/sys/fs/cgroup/memory/docker/{}",
        "/sys/fs/cgroup/docker/{}",
        "/sys/fs/cgroup/system.slice/docker-{}.scope",
    )

    def __init__(self, image: str) -> None:
        self._image = image

    def command(self, environment: Mapping[str, str]) -> list[str]:
        own = {name: value for name, value in environment.items() if name not in ("HOME", "OPEN_ID_TOKEN_STORE")}
        settings = [argument for name, value in own.items() for argument in ("--env", f"{name}={value}")]
        limits = ["--memory=256m", "--memory-swap=256m", "--network=host"]
        return ["docker", "run", "--rm", f"--name={self.NAME}", *limits, *settings, self._image]

    def begin(self, _: int) -> float:
        """Return the size: the peak cannot be forgotten."""
        return self._read("memory.current", "memory.usage_in_bytes")

    def end(self, _: int) -> tuple[float, float]:
        """Return the peak and what remains; the container must still run."""
        return self._read("memory.peak", "memory.max_usage_in_bytes"), self.begin(0)

    def _read(self, *names: str) -> float:
        asked = ["docker", "inspect", "--format={{.Id}}", self.NAME]
        own = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        files = [Path(folder.format(own), name) for folder in self.FOLDERS for name in names]
        return int(next(file for file in files if file.exists()).read_text()) / MIB


def measure(name: str, runner: Host | Container) -> str:
    """Run one case and return its row."""
    case, workers, lifetime = CASES[name]
    with tempfile.TemporaryDirectory() as folder, FakeIssuer(Behaviour(lifetime=lifetime)) as issuer:
        service, port = free_port(), free_port()
        environment = {
            "HOME": folder,
            "OPEN_ID_CONNECT_URL": issuer.url,
            "OPEN_ID_CONNECT_CLIENT_ID": issuer.client_id,
            "OPEN_ID_REFRESH_TOKEN": issuer.refresh_token,
            "OPEN_ID_TOKEN_STORE": folder,
            "REMOTE_PROTECTED_DOMAIN": f"http://127.0.0.1:{service}",
            "PROXY_PORT": str(port),
            "PROXY_ADMIN": "off",
            "PROXY_WORKERS": str(workers),
        }
        commands = (
            ([sys.executable, str(ROOT / "bench" / "peers.py"), "service", str(service)], None),
            (runner.command(environment), environment | {"PATH": os.environ["PATH"]}),
        )
        with contextlib.ExitStack() as stack:
            for command, env in commands:
                process = subprocess.Popen(
                    command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                stack.callback(process.wait, 30)
                stack.callback(process.terminate)
            asyncio.run(answers(port))
            before = runner.begin(process.pid)
            asyncio.run(asyncio.wait_for(case(port, issuer), TIMEOUT))
            time.sleep(2)
            peak, after = runner.end(process.pid)
    return f"| {name} | {before:.0f} | {peak:.0f} | {after:.0f} |"


async def answers(port: int) -> None:
    """Wait until the proxy answers with the service's 200."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, SystemExit):
                return await exchange(port, get(port, "/small"))
            await asyncio.sleep(0.1)


def main() -> None:
    """Measure the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--source", type=Path, default=ROOT)
    parser.add_argument("--image")
    arguments = parser.parse_args()
    runner = Container(arguments.image) if arguments.image else Host(arguments.source.resolve())
    print("| case | before | peak | after |\n|---|---|---|---|")
    for name in arguments.case or CASES:
        print(measure(name, runner), flush=True)


if __name__ == "__main__":
    main()
