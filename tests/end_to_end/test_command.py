"""The command as an installed package brings it: its names, and what it says without the extra `proxy`."""

import importlib.metadata
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eoepca_security.testing import FakeIssuer
from tests.support.processes import ROOT, ProxyProcess, run_process

HERE = Path(sys.executable).parent
CALLS = {
    "oidc-proxy": [str(HERE / "oidc-proxy")],
    "python -m eoepca_security.proxy": [sys.executable, "-m", "eoepca_security.proxy"],
    "run-mitmproxy.py": [sys.executable, str(ROOT / "run-mitmproxy.py")],
}


def run(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", CALLS)
def test_each_name_is_the_one_that_its_remedies_have(
    name: str, base_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mine").touch()
    done = run([*CALLS[name], "check", "--env-file", "mine"], base_environment, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    done = run([*CALLS[name], "serve", "--env-file", "mine"], base_environment, tmp_path)
    assert done.returncode == 2
    (session,) = [line for line in done.stderr.splitlines() if line.startswith("OPEN_ID_REFRESH_TOKEN: ")]
    assert f"{name} login --env-file mine`" in session.replace(f"{HERE}/", "").replace(f"{ROOT}/", "")


def test_the_package_brings_the_command() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="oidc-proxy")
    assert entry.dist is not None
    assert entry.dist.name == "eoepca-security"
    assert callable(entry.load())


def test_a_login_that_is_interrupted_ends_with_130(base_environment: dict[str, str], tmp_path: Path) -> None:
    with FakeIssuer() as issuer:
        issuer.behaviour.login.interval = 60
        settings = ["--issuer", issuer.url, "--client-id", issuer.client_id]
        environment = base_environment | {"OPEN_ID_TOKEN_STORE": str(tmp_path / "store")}
        process = run_process([*CALLS["oidc-proxy"], "login", *settings], environment, tmp_path)
        login = ProxyProcess(process)
        assert login.wait_for(re.compile("Waiting for confirmation"))
        process.send_signal(signal.SIGINT)
        assert login.wait_until_ended() == 130
    assert "Traceback" not in login.output
    assert re.search(r"user_code=\S+\n\non any device. If it asks for a code, enter\n\n  \S+\n", login.output)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("missing", ["click", "mitmproxy"])
def test_without_the_extra_one_line_says_what_to_install(
    name: str, missing: str, base_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    environment = base_environment | {"PYTHONPATH": str(tmp_path)}
    done = run([*CALLS[name], "demo", "--once"], environment, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"{name} needs the extra `proxy`, which is not installed ({missing} is missing)" in line
    assert ("--extra proxy run-mitmproxy.py demo" if "run" in name else "uv tool install '.[proxy]'") in line
