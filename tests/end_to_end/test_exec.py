"""`exec`: a command whose requests to a service get a token. Real processes."""

import base64
import json
import os
import pty
import re
import select
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from eoepca_security.testing import FakeIssuer
from tests.support.environment import settings_for
from tests.support.network import RawServer, accepts, says_nothing
from tests.support.processes import ROOT
from tests.support.service import Recorder
from tests.support.waiting import eventually

EXEC = [sys.executable, str(ROOT / "run-mitmproxy.py"), "exec", "--"]
WAITS = "import sys; print('ready', flush=True); sys.stdin.read()"


@dataclass
class Setup:
    """A service that wants a token, another server, and the environment in which `exec` is called."""

    issuer: FakeIssuer
    service: Recorder
    other: Recorder
    url: str
    other_urls: tuple[str, str]
    environment: dict[str, str]
    folder: Path

    @property
    def temporary(self) -> Path:
        return Path(self.environment["TMPDIR"])

    def run(self, *command: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*EXEC, *command],
            env=self.environment | more,
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """Run a command, in a session of its own and so without a terminal."""
        with subprocess.Popen(
            [*EXEC, *command],
            env=self.environment,
            cwd=self.folder,
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            yield process
            if process.returncode is None:
                process.communicate(timeout=20)  # which ends its input


@pytest.fixture(scope="module")
def running(
    certificate: Path, base_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("exec")
    (folder / "tmp").mkdir()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    service, other = Recorder(), Recorder()
    with (
        FakeIssuer(client_secret="canary-of-the-client") as issuer,
        service.server(tls) as serving,
        other.server(tls) as other_serving,
        other.server() as plain,
    ):
        url = f"https://localhost:{serving.port}"
        settings = settings_for(issuer, REMOTE_PROTECTED_DOMAIN=url, TLS_CA_FILE=str(certificate))
        environment = base_environment | settings | {"TMPDIR": str(folder / "tmp"), "PROXY_MODE": "reverse"}
        urls = (f"https://localhost:{other_serving.port}/other", f"http://127.0.0.1:{plain.port}/plain")
        yield Setup(issuer, service, other, url, urls, environment, folder)


@pytest.fixture
def setup(running: Setup) -> Setup:
    running.service.requests.clear()
    running.other.requests.clear()
    return running


# --- clients ---------------------------------------------------------------------------------------------------------

CLIENTS = {
    "urllib": "import sys, urllib.request\nfor url in sys.argv[1:]: urllib.request.urlopen(url, timeout=20).read()",
    "requests": "import sys, requests\nfor url in sys.argv[1:]: requests.get(url, timeout=20).raise_for_status()",
    "httpx": "import sys, httpx\nfor url in sys.argv[1:]: httpx.get(url, timeout=20).raise_for_status()",
    "curl": ["curl", "-sSf"],
}


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_get_the_token_at_the_service_and_nowhere_else_by_their_own_defaults(client: str, setup: Setup) -> None:
    code = CLIENTS[client]
    command = [sys.executable, "-c", code] if isinstance(code, str) else code
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = setup.run(*command, f"{setup.url}/x", *setup.other_urls)
    assert (done.returncode, done.stderr) == (0, "")
    (asked,) = setup.service.requests
    (value,) = asked.values("Authorization")
    assert setup.issuer.accepts(value.removeprefix("Bearer "))
    assert [request.target for request in setup.other.requests] == ["/other", "/plain"]
    for request in setup.other.requests:
        assert not request.names & {"authorization", "proxy-authorization"}


def test_hosts_outside_the_services_get_what_the_client_sent(setup: Setup) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = setup.run("curl", "-sSf", "-u", "own:password", *setup.other_urls)
    assert (done.returncode, done.stderr) == (0, "")
    own = "Basic " + base64.b64encode(b"own:password").decode()
    assert [request.values("Authorization") for request in setup.other.requests] == [[own], [own]]


def test_services_of_a_file_are_named_in_the_environment_and_no_secret_is(setup: Setup, tmp_path: Path) -> None:
    file = tmp_path / "services.toml"
    file.write_text(f'[service.my-stac]\nurl = "{setup.url}/api"\nport = 8090\nhosts = ["stac.svc"]\n')
    done = setup.run(
        *(sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"),
        REMOTE_PROTECTED_DOMAIN="",
        PROXY_SERVICES=str(file),
        NO_PROXY="localhost,kept.test",
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["OIDC_PROXY_URL_MY_STAC"] == f"{setup.url}/api"
    assert found["no_proxy"] == found["NO_PROXY"] == "kept.test"
    assert "canary-of-the-client" not in found.values()
    assert "OPEN_ID_REFRESH_TOKEN" not in found


def test_files_with_tokens_are_left_to_a_proxy_for_others(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from another proxy")
    file = tmp_path / "services.toml"
    file.write_text(f'[service.stac]\nurl = "{setup.url}/api"\ntoken_file = "{tmp_path}/stac-token"\n')
    done = setup.run("ls", str(tmp_path), OPEN_ID_TOKEN_FILE=str(tmp_path / "token"), PROXY_SERVICES=str(file))
    assert (done.stderr, done.stdout.split()) == ("", ["services.toml", "token"])
    assert (tmp_path / "token").read_text() == "from another proxy"


# --- who may use the proxy -------------------------------------------------------------------------------------------


def test_without_the_environment_of_the_command_the_answer_is_407_and_nothing_goes_out(setup: Setup) -> None:
    code = f"import os; print(os.environ['HTTPS_PROXY'], os.getppid(), flush=True)\n{WAITS}"
    with setup.running(sys.executable, "-c", code) as process:
        assert process.stdout is not None
        proxy, parent = process.stdout.readline().split()
        parts = urlsplit(proxy)
        assert parts.password is not None
        for user in ("", "exec:wrong@"):
            address = f"http://{user}127.0.0.1:{parts.port}"
            with httpx.Client(proxy=address, trust_env=False, timeout=20) as client:
                assert client.get(setup.other_urls[1]).status_code == 407
                with pytest.raises(httpx.ProxyError, match="407"):
                    client.get(setup.url)
        assert (setup.service.requests, setup.other.requests) == ([], [])
        if sys.platform == "linux":
            listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
            assert "run-mitmproxy.py exec" in listed
            assert parts.password not in listed
            # Nor is it where the proxy's own environment would show it.
            assert parts.password not in Path(f"/proc/{parent}/environ").read_text()


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["a-command-that-is-not-there"], 127),
        (["./not-executable"], 126),
    ],
)
def test_the_exit_code_is_that_of_the_command_or_of_a_shell(command: list[str], code: int, setup: Setup) -> None:
    (setup.folder / "not-executable").touch(mode=0o600)
    done = setup.run(*command)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"{command[0]}: " if code in (126, 127) else "")
    assert len(done.stderr.splitlines()) == (code in (126, 127))


def test_the_standard_streams_are_those_of_the_command(setup: Setup) -> None:
    code = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('told')"
    done = setup.run(sys.executable, "-c", code, stdin="words\nwithout an end")
    assert (done.returncode, done.stdout, done.stderr) == (0, "WORDS\nWITHOUT AN END", "told")


def test_nothing_is_left_when_the_command_has_ended_even_what_it_left_running(setup: Setup) -> None:
    code = (
        "import os, subprocess, sys\n"
        f"ask = 'import urllib.request; urllib.request.urlopen(\"{setup.url}/held\")'\n"
        "none = subprocess.DEVNULL\n"
        "subprocess.Popen([sys.executable, '-c', ask], stdin=none, stdout=none, stderr=none)\n"
        "sys.stdin.read(1)\n"
        "print(os.environ['HTTP_PROXY'], os.environ['SSL_CERT_FILE'], flush=True)"
    )
    with setup.running(sys.executable, "-c", code) as process:
        assert setup.service.waiting.acquire(timeout=20)
        began = time.monotonic()
        output, errors = process.communicate("x", 20)
        took = time.monotonic() - began
    setup.service.release.set()
    assert (process.returncode, errors) == (0, "")
    assert took < 5  # a proxy for others waits longer for requests
    proxy, ca_file = output.split()
    assert not accepts(proxy.replace(urlsplit(proxy).netloc, f"127.0.0.1:{urlsplit(proxy).port}"))
    assert not Path(ca_file).exists()
    assert list(setup.temporary.iterdir()) == []


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not Path("/usr/bin/python3").exists(),
    reason="only root can be another user, who needs a Python",
)
def test_another_user_cannot_read_the_password_or_use_the_proxy_without_it(setup: Setup) -> None:
    code = f"import os; print(os.environ['HTTP_PROXY'], os.getpid(), os.environ['PIP_CERT'], flush=True)\n{WAITS}"
    with setup.running(sys.executable, "-c", code) as process:
        assert process.stdout is not None
        proxy, child, ca_file = process.stdout.readline().split()
        for file in (f"/proc/{child}/environ", ca_file):
            assert Path(file).read_bytes()
            read = subprocess.run(["cat", file], user=65534, cwd="/", capture_output=True, text=True, check=False)
            assert (read.returncode, read.stdout) == (1, "")
            assert "Permission denied" in read.stderr
        code = (
            "import socket, sys\n"
            f"stream = socket.create_connection(('127.0.0.1', {urlsplit(proxy).port}), 10)\n"
            f"stream.sendall(b'GET {setup.other_urls[1]} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
            "print(stream.recv(100).split()[1].decode())"
        )
        asked = subprocess.run(
            ["/usr/bin/python3", "-c", code], user=65534, cwd="/", capture_output=True, text=True, check=False
        )
        assert asked.stdout == "407\n", asked.stderr
        assert setup.other.requests == []


def test_the_cas_are_in_a_folder_of_this_user(setup: Setup) -> None:
    code = "import os; file = os.environ['SSL_CERT_FILE']; print(oct(os.stat(os.path.dirname(file)).st_mode & 0o777))"
    assert setup.run(sys.executable, "-c", code).stdout == "0o700\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1])
def test_signals_reach_the_command_which_decides_what_they_mean(number: signal.Signals, setup: Setup) -> None:
    code = f"import signal, sys; signal.signal({int(number)}, lambda *_: sys.exit(33))\n{WAITS}"
    with setup.running(sys.executable, "-c", code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == 33
    with setup.running(
        sys.executable, "-c", WAITS.replace("import sys", f"import sys, signal; signal.signal({int(number)}, 0)")
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert list(setup.temporary.iterdir()) == []


def test_signals_that_were_ignored_are_ignored_in_the_command_too_and_no_others(setup: Setup) -> None:
    show = (
        "import signal; print([n.name for n in signal.valid_signals() if isinstance(n, signal.Signals)"
        " and signal.getsignal(n) is signal.SIG_IGN], flush=True)"
    )
    plain = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout
    assert setup.run(sys.executable, "-c", show).stdout == plain  # those that Python ignores
    quoted = " ".join(f"'{word}'" for word in (*EXEC, sys.executable, "-c", show))
    done = subprocess.run(
        ["sh", "-c", f"trap '' HUP INT; exec {quoted}"],
        env=setup.environment,
        cwd=setup.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "'SIGHUP'" in done.stdout
    assert "'SIGINT'" in done.stdout


# --- at a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """An interactive bash at a terminal."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment | {"PS1": "prompt> "})
        self._shown = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._terminal)
        os.waitpid(self._pid, 0)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str, timeout: float = 20) -> str:
        """Wait for a text after the last one, and return it."""
        deadline = time.monotonic() + timeout
        while (match := re.search(pattern, self._shown)) is None:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._shown!r}"
            self._shown += os.read(self._terminal, 65536).decode()
        self._shown = self._shown[match.end() :]
        return match[0]


JOB = """
import os, signal, sys
def told(number, _):
    print("got", number, flush=True)
signal.signal(signal.SIGINT, told)
signal.signal(signal.SIGCONT, told)
print("pids", os.getpid(), os.getppid(), flush=True)
for line in sys.stdin:
    print("read", line, flush=True)
    if line == "end\\n":
        sys.exit(9)
"""


def state_of(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("bash") is None, reason="needs bash and /proc")
def test_job_control_is_that_of_the_command(setup: Setup) -> None:
    (setup.folder / "job.py").write_text(JOB)
    quoted = " ".join(f"'{word}'" for word in (*EXEC, sys.executable, "job.py"))
    with Terminal(setup.environment, setup.folder) as terminal:
        terminal.wait_for("prompt> ")
        terminal.type(f"{quoted}; echo code=$?\n")
        child, proxy = terminal.wait_for(r"pids \d+ \d+").split()[1:]
        terminal.type("\x03")
        terminal.wait_for("got 2")
        terminal.type("one\n")
        terminal.wait_for("read one")
        for _ in range(3):
            terminal.type("\x1a")
            terminal.wait_for("Stopped")
            assert (state_of(child), state_of(proxy)) == ("T", "T")
            terminal.type("fg\n")
            terminal.wait_for("got 18")
            terminal.type("two\n")
            terminal.wait_for("read two")
            eventually(lambda: "T" not in (state_of(child), state_of(proxy)))
        terminal.type("\x1a")
        terminal.wait_for("Stopped")
        terminal.type("kill %1; fg; echo code=$?\n")
        terminal.wait_for("code=143")

        terminal.type(f"{quoted}; echo code=$?\n")
        terminal.wait_for(r"pids \d+ \d+")
        terminal.type("\x03")
        terminal.wait_for("got 2")
        terminal.type("end\n")
        # It came once: we do not pass on what the terminal sends to all.
        assert "got 2" not in terminal.wait_for("(?s).*code=9")
    assert list(setup.temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("bash") is None, reason="needs bash and /proc")
def test_a_shell_is_a_command_like_others_with_jobs_of_its_own(setup: Setup) -> None:
    quoted = " ".join(f"'{word}'" for word in (*EXEC, "bash", "--norc", "--noprofile", "-i"))
    with Terminal(setup.environment, setup.folder) as terminal:
        terminal.wait_for("prompt> ")
        terminal.type(f"PS1='inner> ' {quoted}; echo code=$?\n")
        terminal.wait_for("inner> $")
        terminal.type("sh -c 'echo begun; exec cat'\n")
        terminal.wait_for("begun\r")
        terminal.type("\x1a")
        terminal.wait_for("(?s)Stopped.*inner> $")
        terminal.type("fg\n")
        terminal.wait_for("exec cat'\r")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\nhello")
        terminal.type("\x03")
        terminal.wait_for("inner> ")
        terminal.type("exit 5\n")
        terminal.wait_for("code=5")


# --- when it does not start ------------------------------------------------------------------------------------------


def test_without_a_token_the_command_is_not_started_and_the_reason_is_told(setup: Setup) -> None:
    done = setup.run("sh", "-c", "echo started", OPEN_ID_REFRESH_TOKEN="another-token")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("credentials_rejected: ")
    assert " login" in done.stderr
    assert len(done.stderr.splitlines()) == 1

    done = setup.run("sh", "-c", "echo started", OPEN_ID_CONNECT_URL="http://127.0.0.1:9/realms/test")
    assert (done.returncode, done.stdout) == (1, "")
    assert "issuer_unavailable: " in done.stderr
    assert list(setup.temporary.iterdir()) == []


def test_ctrl_c_while_it_waits_for_a_token_ends_with_130(setup: Setup) -> None:
    with RawServer(says_nothing) as silent:
        environment = setup.environment | {"OPEN_ID_CONNECT_URL": silent.url}
        with subprocess.Popen(
            [*EXEC, "sh", "-c", "echo started"],
            env=environment,
            cwd=setup.folder,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            eventually(lambda: silent.connections > 0)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=20)
        assert (process.returncode, output) == (130, "")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"REMOTE_PROTECTED_DOMAIN": "ftp://x"}, "REMOTE_PROTECTED_DOMAIN: "),
        ({"REMOTE_PROTECTED_DOMAIN": ""}, "REMOTE_PROTECTED_DOMAIN: "),
        ({"https_proxy": "http://other.test:3128"}, "https_proxy: "),
        ({"ALL_PROXY": "socks5://other.test"}, "ALL_PROXY: "),
    ],
)
def test_wrong_settings_end_with_2(more: dict[str, str], told: str, setup: Setup) -> None:
    done = setup.run("sh", "-c", "echo started", **more)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(told)


def test_without_a_command_there_is_nothing_to_run(setup: Setup) -> None:
    done = setup.run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "after --" in done.stderr
