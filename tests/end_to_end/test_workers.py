"""Several processes behind one port, as their users see them: real processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from eoepca_security.proxy.addons.drain import DRAIN_TIMEOUT
from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import accepts
from tests.support.processes import ProxyProcess, StartProxy, admin_of
from tests.support.service import Recorder
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(Behaviour(lifetime=3, refresh_tokens="rotate")) as issuer:
        yield issuer


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def are_at_rest(pids: list[int]) -> bool:
    return all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" for pid in pids)


def workers(proxy: ProxyProcess) -> list[int]:
    # The admin listener's process was made last.
    return sorted(children(proxy.process.pid))[:-1]


def start_workers(start: StartProxy, service_url: str, issuer: FakeIssuer, **more: str) -> tuple[ProxyProcess, str]:
    environment = settings_for(issuer, PROXY_WORKERS="3", PROXY_ADMIN="127.0.0.1:0", **more)
    proxy = start("launcher", service_url, environment)
    return proxy, admin_of(proxy)


def connections_by_process(pids: list[int], port: int) -> dict[int, int]:
    """Return how many sockets of clients each has."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "01":
            inodes.add(f"socket:[{fields[9]}]")
    links = {pid: [str(path.readlink()) for path in _descriptors(pid)] for pid in pids}
    return {pid: sum(link in inodes for link in found) for pid, found in links.items()}


def _descriptors(pid: int) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from (path for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink())


def test_processes_share_the_port_and_the_session_and_one_that_dies_is_replaced(
    start: StartProxy, issuer: FakeIssuer, client: httpx.Client, tmp_path: Path
) -> None:
    began = time.monotonic()
    with Recorder().server() as service:
        proxy, admin = start_workers(start, service.url, issuer, OPEN_ID_TOKEN_STORE=str(tmp_path))
        port = urlsplit(proxy.url).port or 0
        with contextlib.ExitStack() as opened:
            for _ in range(24):
                connection = opened.enter_context(httpx.Client(trust_env=False, timeout=20))
                assert connection.get(proxy.url).status_code == 200
            shares = connections_by_process(workers(proxy), port)
            assert len(shares) == 3
            assert sum(shares.values()) == 24
        assert client.get(f"{admin}/status").json()["requests"] == {"2xx": 24}

        victim = workers(proxy)[0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim not in children(proxy.process.pid))
        for _ in range(12):
            assert httpx.get(proxy.url, trust_env=False, timeout=20).status_code == 200
        eventually(lambda: client.get(f"{admin}/status").json()["processes"] == 3)
        assert client.get(f"{admin}/status").json()["requests"] == {"2xx": 36}
        assert 'oidc_proxy_requests_total{code="",status_class="2xx"} 36.0' in client.get(f"{admin}/metrics").text
        assert client.get(f"{admin}/readyz").status_code == 200

        # Longer than a token, and the issuer takes each refresh token only once.
        ends = time.monotonic() + 4
        while time.monotonic() < ends:
            assert httpx.get(proxy.url, trust_env=False, timeout=20).status_code == 200
        assert issuer.reuses == 0
        # Two at the start, and then one for each token, which is replaced when three quarters of it have passed.
        asked, bound = len(issuer.requests), 3 + (time.monotonic() - began) / (0.75 * 3)
        speaker = sorted(children(proxy.process.pid))
        assert proxy.stop() == 0
    assert asked <= bound
    assert len(speaker) == 4
    assert proxy.output.count("OIDC proxy listening at") == 1
    assert proxy.output.count("was ended by SIGKILL; starting another") == 1


def test_each_of_them_serves_and_one_that_hangs_holds_nobody_up(start: StartProxy, client: httpx.Client) -> None:
    with FakeIssuer(Behaviour(lifetime=60)) as issuer, Recorder().server() as service:
        proxy, admin = start_workers(start, service.url, issuer)
        eventually(lambda: client.get(f"{admin}/status").json()["processes"] == 3)
        pids = workers(proxy)
        for serving in pids:
            stopped = [pid for pid in pids if pid != serving]
            try:
                for pid in stopped:
                    os.kill(pid, signal.SIGSTOP)
                # One that is not at rest yet might still take the connection.
                eventually(partial(are_at_rest, stopped))
                assert httpx.get(proxy.url, trust_env=False, timeout=10).status_code == 200
                told = client.get(f"{admin}/status").json()
                assert (told["processes"], told["ready"]) == (1, True)
            finally:
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("way", ["SIGTERM", "all", "admin", "endpoint", "Ctrl-C"])
def test_all_end_together_and_requests_in_flight_get_their_answers(
    way: str, start: StartProxy, issuer: FakeIssuer, client: httpx.Client
) -> None:
    recorder = Recorder()
    with recorder.server() as service:
        proxy, admin = start_workers(start, service.url, issuer, PROXY_TERMINATION_ENDPOINT="/end-it")
        folders = set(Path("/dev/shm").glob("oidc-proxy-*"))
        pids = children(proxy.process.pid)
        answers: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(len(httpx.get(f"{proxy.url}/held", trust_env=False, timeout=20).content))
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert recorder.waiting.acquire(timeout=10)
        match way:
            case "admin":
                # Whoever is impatient does not make it end in haste.
                for _ in range(2):
                    assert client.post(f"{admin}/quitquitquit").status_code == 200
            case "all":
                # As systemd does, and uv twice.
                for pid in (proxy.process.pid, *pids, proxy.process.pid):
                    os.kill(pid, signal.SIGTERM)
            case "endpoint":
                assert client.post(f"{proxy.url}/end-it").status_code == 200
            case "SIGTERM":
                proxy.process.send_signal(signal.SIGTERM)
            case _:
                proxy.process.send_signal(signal.SIGINT)
        eventually(lambda: not accepts(proxy.url))
        assert proxy.process.poll() is None
        recorder.release.set()
        for thread in threads:
            thread.join(20)
        assert proxy.wait_until_ended() == 0
        assert answers == [4_000_000] * 6
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not [folder for folder in folders if folder.exists() and is_ours(folder, issuer)]
    assert "Traceback" not in proxy.output


def test_a_second_signal_ends_them_at_once(start: StartProxy, issuer: FakeIssuer) -> None:
    recorder = Recorder()
    with recorder.server() as service:
        proxy, _ = start_workers(start, service.url, issuer)
        with httpx.Client(trust_env=False, timeout=20) as client, ThreadPoolExecutor(1) as pool:
            held = pool.submit(client.get, f"{proxy.url}/held")
            assert recorder.waiting.acquire(timeout=10)
            proxy.process.send_signal(signal.SIGTERM)
            eventually(lambda: not accepts(proxy.url))
            began = time.monotonic()
            assert proxy.stop_in_haste() == 0
            assert time.monotonic() - began < DRAIN_TIMEOUT / 2
            with pytest.raises(httpx.TransportError):
                held.result(10)
        recorder.release.set()


def is_ours(folder: Path, issuer: FakeIssuer) -> bool:
    return any(issuer.url in path.read_text(errors="replace") for path in folder.iterdir())


def test_none_outlives_the_one_that_started_them(start: StartProxy, issuer: FakeIssuer) -> None:
    with Recorder().server() as service:
        proxy, _ = start_workers(start, service.url, issuer)
        pids = children(proxy.process.pid)
        (folder,) = [path for path in Path("/dev/shm").glob("oidc-proxy-*") if is_ours(path, issuer)]
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(pids) == 4
        proxy.process.kill()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        assert not folder.exists()
        assert not accepts(proxy.url)


def test_a_rejected_login_ends_the_start_with_one_line(start: StartProxy, issuer: FakeIssuer) -> None:
    environment = settings_for(issuer, PROXY_WORKERS="2", PROXY_ADMIN="127.0.0.1:0", OPEN_ID_REFRESH_TOKEN="wrong")
    proxy = start("launcher", "http://127.0.0.1:9", environment, wait=False)
    assert proxy.wait_until_ended() == 1
    assert proxy.output.count("credentials_rejected: ") == 1
    assert "run-mitmproxy.py login" in proxy.output


def test_a_store_that_cannot_be_written_to_is_no_place_for_a_session_of_several(
    start: StartProxy, issuer: FakeIssuer, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    environment = settings_for(issuer, PROXY_WORKERS="2", OPEN_ID_TOKEN_STORE=str(tmp_path / "file" / "store"))
    proxy = start("launcher", "http://127.0.0.1:9", environment, wait=False)
    assert proxy.wait_until_ended() == 2
    assert proxy.output.startswith("OPEN_ID_TOKEN_STORE: ")
    assert "PROXY_WORKERS to 1" in proxy.output
    assert not issuer.requests


def test_what_fails_again_and_again_is_tried_ever_later(tmp_path: Path) -> None:
    script = tmp_path / "parts.py"
    script.write_text(
        "import json, os, sys, time\n"
        "from pathlib import Path\n"
        "from eoepca_security.proxy.runtime.supervisor import Part\n"
        "from eoepca_security.proxy.runtime.supervisor import supervise\n"
        "log = Path(sys.argv[1])\n"
        "def run(is_first, lifeline):\n"
        "    with log.open('a') as out:\n"
        "        out.write(json.dumps([is_first, time.monotonic()]) + '\\n')\n"
        "    count = len(log.read_text().splitlines())\n"
        # The fault at the start is one only the first time, and nobody need be there to be told.
        "    return (70, 1, 0)[count - 1] if count != 2 else os.kill(os.getpid(), 9)\n"
        "def mourn(*what):\n"
        "    print(*what, flush=True)\n"
        "    raise BrokenPipeError\n"
        "sys.exit(supervise([Part(run)], on_end=lambda: print('ends'), on_worker_exit=mourn))\n"
    )
    log = tmp_path / "log"
    result = subprocess.run([sys.executable, script, log], capture_output=True, text=True, timeout=30, check=False)
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert [is_first for is_first, _ in runs] == [True, False, False]
    gaps = [later - earlier for (_, earlier), (_, later) in pairwise(runs)]
    assert [round(gap) for gap in gaps] == [0, 1]
    assert result.stdout.splitlines() == ["0 failed", "0 was ended by SIGKILL", "ends"]
    assert result.returncode == 0


def test_a_port_that_is_taken_is_told_of_once(start: StartProxy, issuer: FakeIssuer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = settings_for(issuer, PROXY_WORKERS="2", PROXY_PORT=str(taken.getsockname()[1]))
        proxy = start("launcher", "http://127.0.0.1:9", environment, wait=False)
        assert proxy.wait_until_ended() == 1
    assert proxy.output.count("PROXY_PORT") == 1
