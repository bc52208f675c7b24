"""The image, built and run as its users do, against an issuer and a service on the host.

Run with `uv run --group container pytest -m container -n 0 tests/container`; needs a Docker engine.
"""

import concurrent.futures
import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import httpx
import pytest

from eoepca_security.testing import Behaviour
from tests.container.docker_host import (
    ENVIRONMENT,
    LOCKED,
    PUBLISH,
    TAG,
    Container,
    Outside,
    answers,
    docker,
    inspect,
    options,
    outside,
    readme_lines,
    serving,
    unique,
    until,
    wait_until_it_answers,
)
from tests.support.network import free_port
from tests.support.processes import ROOT

pytest_plugins = ["tests.container.docker_fixtures"]
pytestmark = [pytest.mark.container, pytest.mark.timeout(300)]

STORE = "/home/oidc/.local/state/eoepca-security"
MB = 1_000_000


def run_once(image: str, *arguments: str, command: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return docker("run", "--rm", *arguments, image, *command, check=False)


# --- what is in it -----------------------------------------------------------------------------------------------


def test_what_the_image_says_of_itself(image: str) -> None:
    config = inspect(image)["Config"]
    assert int(config["User"].partition(":")[0]) > 0
    assert config["Entrypoint"][0] == "python"
    assert config["ExposedPorts"].keys() == {"8080/tcp"}
    assert config["Volumes"].keys() == {config["WorkingDir"]} == {"/home/oidc"}
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert "curl" not in config["Healthcheck"]["Test"]
    environment = dict(pair.split("=", 1) for pair in config["Env"])
    assert (environment["PROXY_HOST"], environment["PROXY_ADMIN"]) == ("0.0.0.0", "0.0.0.0:8081")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert labels["org.opencontainers.image.base.name"] == "python:3.13-slim-bookworm"


def test_the_image_has_what_the_proxy_needs_and_no_more(image: str) -> None:
    base = inspect(image)["Config"]["Labels"]["org.opencontainers.image.base.name"]
    added = inspect(image)["Size"] - inspect(base)["Size"]
    print(f"the image adds {added / MB:.0f} MB to its base")
    assert added < 160 * MB
    script = (
        "import compileall, importlib.util as u, os, pathlib, shutil, sys, sysconfig\n"
        "print([n for n in ('fastapi', 'uvicorn', 'pytest', 'mypy', 'pip', 'uv') if u.find_spec(n)])\n"
        "print([n for n in ('uv', 'gcc', 'cc', 'make') if shutil.which(n)])\n"
        "here = pathlib.Path('/opt/proxy')\n"
        "print([str(p) for p in here.rglob('*') if p.is_dir() and p.name in ('test', 'tests', '.cache')])\n"
        "print([str(p) for p in [*here.rglob('*.pem'), *here.rglob('*.p12')] if p.name != 'cacert.pem'])\n"
        "import eoepca_security.proxy.runtime.serve, eoepca_security.proxy.cli.check, eoepca_security.proxy.cli.login\n"
        "specs = [s for m in sys.modules.values() if (s := getattr(m, '__spec__', None)) and s.has_location]\n"
        "print([s.name for s in specs if s.origin.endswith('.py') and not os.path.exists(s.cached or '')])\n"
        "print([str(p) for p in here.rglob('*') if not p.is_symlink() and os.access(p, os.W_OK)])\n"
    )
    shown = run_once(image, "--entrypoint", "python", command=("-c", script))
    assert shown.stdout.splitlines() == ["[]"] * 6, shown.stdout + shown.stderr


def test_no_secret_is_in_history_or_logs(image: str, there: Outside) -> None:
    history = docker("history", "--no-trunc", image).stdout
    assert not re.search(r"TOKEN=|SECRET=|PASSWORD", history)
    secret = "client-secret-in-the-environment"
    there.issuer.client_secret = secret
    with serving(image, there, OPEN_ID_CONNECT_CLIENT_SECRET=secret) as proxy:
        wait_until_it_answers(proxy)
        issued = [seen.authorization[0].removeprefix("Bearer ") for seen in there.seen]
        there.issuer.behaviour.down = True
        proxy.stop()
        assert issued
        assert "listening" in proxy.logs
        for value in (secret, there.issuer.refresh_token, *issued):
            assert value not in proxy.logs


# --- the README's lines ------------------------------------------------------------------------------------------


def test_the_lines_of_the_readme(image: str, there: Outside, volume: str, tmp_path: Path) -> None:
    build, run = readme_lines()
    assert build == "docker build -f Dockerfile.mitmproxy -t mitmproxy-oidc ."
    # As written, but for what may be in use: the port, and the names of image and volume.
    port, name = free_port(), unique("readme")
    words = shlex.split(run.replace("127.0.0.1:8080:", f"127.0.0.1:{port}:"))
    words = [
        volume + word.removeprefix("mitmproxy-oidc") if word.startswith("mitmproxy-oidc:") else word for word in words
    ]
    assert words[-1] == "mitmproxy-oidc"
    # The issuer has a certificate of a CA of its own, which a line for everybody cannot know.
    words = [*words[:-1], "--name", name, *there.trust, TAG]
    (tmp_path / ".env").write_text("".join(f"{key}={value}\n" for key, value in there.environment().items()))
    took: list[float] = []
    while not took or (min(took) > 5 and len(took) < 3):
        begin = time.monotonic()
        process = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        try:
            until(lambda: answers(f"http://localhost:{port}/collections"))
            took.append(time.monotonic() - begin)
            assert docker("exec", name, "id", "-u").stdout.strip() == "10001"
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            docker("rm", "-f", "-v", name, check=False)
            process.kill()
            process.communicate()
    print("seconds from `docker run` to the first answer:", [round(seconds, 2) for seconds in took])
    assert min(took) < 5
    assert all(seen.authorized for seen in there.seen)


# --- life --------------------------------------------------------------------------------------------------------


def test_locked_down_with_secrets_in_files_it_is_healthy_and_ends_without_cutting_off(
    image: str, there: Outside, tmp_path: Path
) -> None:
    secret = tmp_path / "refresh-token"
    secret.write_text(there.issuer.refresh_token + "\n")
    secret.chmod(0o644)
    mount = ("-v", f"{secret}:/run/secrets/refresh-token:ro", "--health-interval", "1s")
    given = {"OPEN_ID_REFRESH_TOKEN": "", "OPEN_ID_REFRESH_TOKEN_FILE": "/run/secrets/refresh-token"}
    with serving(image, there, *LOCKED, *mount, **given) as proxy, concurrent.futures.ThreadPoolExecutor(2) as pool:
        wait_until_it_answers(proxy)
        until(lambda: proxy.state["Health"]["Status"] == "healthy")
        assert [proxy.healthcheck(*path) for path in ((), ("livez",), ("readyz",))] == [0, 0, 0]
        assert proxy.runs("touch", "/opt/proxy/x") != 0
        url = proxy.url
        slow = pool.submit(httpx.get, f"{url}/slow", trust_env=False, timeout=30)
        assert there.arrived.wait(10)
        stopping = pool.submit(proxy.stop)
        until(lambda: not answers(url))
        assert not slow.done()
        there.release.set()
        assert slow.result().status_code == 200
        code, seconds = stopping.result()
        assert code == 0
        assert seconds < 10


def test_an_issuer_that_is_down_makes_it_unready_and_not_unhealthy(image: str, there: Outside) -> None:
    there.issuer.behaviour.down = True
    with serving(image, there, "--health-interval", "1s") as proxy:
        wait_until_it_answers(proxy, 503)
        until(lambda: proxy.state["Health"]["Status"] == "healthy")
        assert proxy.healthcheck("readyz") == 1
        there.issuer.behaviour.down = False
        until(lambda: proxy.healthcheck("readyz") == 0)


@pytest.mark.parametrize(
    ("settings", "alive", "ready"),
    [
        ({"PROXY_ADMIN": "off", "PROXY_ALLOWED_HOSTS": "*"}, 0, 1),
        ({"PROXY_ADMIN": "off", "PROXY_HOST": "::"}, 0, 1),
        ({"PROXY_ADMIN": "127.0.0.1:9000"}, 0, 0),
        ({"PROXY_ADMIN": ""}, 0, 0),
    ],
)
def test_health_wherever_the_admin_listener_is(
    image: str, there: Outside, settings: dict[str, str], alive: int, ready: int
) -> None:
    with serving(image, there, "--sysctl", "net.ipv6.conf.all.disable_ipv6=0", **settings) as proxy:
        until(lambda: proxy.healthcheck("readyz") == ready and proxy.healthcheck() == alive)
        assert there.seen == []
        # A process that does not do its work any more is not healthy, though its port takes connections.
        docker("kill", "--signal", "STOP", proxy.name)
        assert proxy.healthcheck() == 1
        docker("kill", "--signal", "CONT", proxy.name)


@pytest.mark.parametrize("init", [(), ("--init",)])
@pytest.mark.parametrize("command", [("serve",), ("login",)])
def test_a_stop_during_the_start_is_heard(
    image: str, there: Outside, command: tuple[str, ...], init: tuple[str, ...]
) -> None:
    there.issuer.behaviour.login.polls = ["authorization_pending"] * 1000
    arguments = (*there.trust, *options(there.environment()), *init)
    with Container(image, *arguments, command=command) as container:
        # What comes before Python has begun is lost in any container whose first process is Python.
        until(lambda: bool(init) or _heeds_sigterm(container))
        if command == ("login",):
            until(lambda: "/device" in container.logs)
            assert container.healthcheck() == 0  # there is nothing to be asked
        code, seconds = container.stop()
        assert code in (0, 143)
        assert seconds < 5


def _heeds_sigterm(container: Container) -> bool:
    status = docker("exec", container.name, "grep", "SigCgt", "/proc/1/status", check=False).stdout
    return bool(status and int(status.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def test_twenty_restarts_lose_no_session(image: str, volume: str, tmp_path: Path) -> None:
    behaviour = Behaviour(lifetime=2, refresh_tokens="rotate")
    with outside(tmp_path, behaviour) as there:
        keep = ("-v", f"{volume}:/home/oidc")
        with serving(image, there, *keep, *LOCKED) as proxy:
            wait_until_it_answers(proxy)
            for count in range(20):
                if count % 5 == 4:
                    docker("kill", proxy.name)  # not in the middle of a refresh: its answers are awaited
                    docker("start", proxy.name)
                else:
                    docker("restart", proxy.name)
                wait_until_it_answers(proxy)
        # Another container, and a second beside it, go on with what is in the volume.
        with serving(image, there, *keep) as first, serving(image, there, *keep) as second:
            for proxy in (first, second):
                wait_until_it_answers(proxy)
            used = len(there.issuer.requests)
            until(
                lambda: all(answers(proxy.url) for proxy in (first, second)) and len(there.issuer.requests) > used + 2
            )
            assert [proxy.stop()[0] for proxy in (first, second)] == [0, 0]
        assert there.issuer.reuses == 0
        assert len(there.issuer.requests) > 20
        assert all(seen.authorized for seen in there.seen)


# --- the other commands, other users, and what is wrong ----------------------------------------------------------


def test_without_settings_it_ends_with_2_and_names_them(image: str) -> None:
    done = run_once(image, *LOCKED)
    assert (done.returncode, done.stdout) == (2, "")
    for name in (
        "OPEN_ID_CONNECT_URL",
        "OPEN_ID_CONNECT_CLIENT_ID",
        "OPEN_ID_REFRESH_TOKEN",
        "REMOTE_PROTECTED_DOMAIN",
    ):
        assert sum(line.startswith(f"{name}: ") for line in done.stderr.splitlines()) == 1


def test_login_token_check_and_demo(image: str, volume: str, there: Outside) -> None:
    there.issuer.behaviour.refresh_tokens = "rotate"
    there.issuer.behaviour.login.interval = 0.1
    given = options(there.environment(OPEN_ID_REFRESH_TOKEN="", REMOTE_PROTECTED_ENDPOINT="/collections"))
    arguments = (*given, *there.trust, *LOCKED, "-v", f"{volume}:/home/oidc")
    assert run_once(image, *arguments, command=("serve",)).returncode == 2
    done = run_once(image, *arguments, command=("login",))
    assert done.returncode == 0, done.stderr
    done = run_once(image, *arguments, command=("token",))
    assert there.issuer.accepts(done.stdout.removesuffix("\n"))
    done = run_once(image, *arguments, command=("check",))
    assert done.returncode == 0, done.stdout
    assert there.seen[-1].target == "/collections"
    with Container(image, *arguments, *PUBLISH) as proxy:
        wait_until_it_answers(proxy)
    assert there.issuer.reuses == 0
    done = run_once(image, *LOCKED, "--network", "none", command=("demo", "--once"))
    assert (done.returncode, "It works." in done.stdout) == (0, True)


def test_localhost_is_explained(image: str, there: Outside) -> None:
    elsewhere = there.environment(REMOTE_PROTECTED_DOMAIN="http://localhost:9200")
    done = run_once(image, *options(elsewhere), *there.trust, command=("check",))
    assert done.returncode == 1
    assert "host.docker.internal" in done.stdout


def test_any_user_of_group_0_keeps_the_session_and_others_are_told(image: str, volume: str, there: Outside) -> None:
    there.issuer.behaviour.refresh_tokens = "rotate"
    for _ in range(2):
        with serving(image, there, "--user", "12345:0", "-v", f"{volume}:/home/oidc", *LOCKED) as proxy:
            wait_until_it_answers(proxy)
            assert "only in memory" not in proxy.logs
            assert proxy.runs("test", "-d", STORE) == 0
            proxy.stop()
    assert there.issuer.reuses == 0
    nowhere = run_once(image, "--user", "5555:5555", "--read-only", *options(there.environment(TLS_CA_FILE="")))
    assert (nowhere.returncode, len(nowhere.stderr.splitlines())) == (2, 1)
    assert nowhere.stderr.startswith("TMPDIR: ")
    with serving(image, there, "--user", "5555:5555", "--read-only", "--tmpfs", "/tmp") as proxy:
        wait_until_it_answers(proxy, 502)  # the token from the settings is used up
        assert "only in memory" in proxy.logs
