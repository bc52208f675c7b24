"""Fixtures: a controllable issuer, a recording service, and the real proxy as a process between them."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.support.processes import ROOT, ProxyProcess, StartProxy, run_process
from tests.support.tls import write_certificate

# Under nohup, programs that tests start would ignore it, too: they inherit that, but no handler.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what takes so long: workers find all tests before the first one runs."""
    workers = len(config.option.tx)
    if not workers:
        return None
    everything = "" if config.invocation_params.args else "; all of them take two to three minutes on two cores"
    return f"{workers} workers start and look for tests, for some ten seconds{everything}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup`, give a worker all that shares what a session starts once (see `_group`)."""
    if config.getvalue("dist") != "loadgroup":
        return None
    # xdist's own, which goes by marks, does nothing with pytest 9.2.
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = _group
    return scheduling


def _group(nodeid: str) -> str:
    """Return what a test belongs to: the tests of one Keycloak, a row of the issuers' table, or its file."""
    file, _, test = nodeid.partition("::")
    if "/test_keycloak" in file or file.endswith("/test_apache.py"):
        return "keycloak"
    if "/test_service" in file and "/interop/" in file:
        return "services"
    return f"{file}{test[test.find('[') :]}" if file.endswith("/test_issuers.py") else file


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder; mitmproxy makes its own CA in it once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def base_environment(home: Path) -> dict[str, str]:
    """The environment of child processes: nothing of ours, no proxies."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def start(base_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartProxy]:
    """Start the launcher, or mitmdump with the add-on (in regular mode where there is no service's URL).

    All are stopped at the end of the module, and must not have crashed on the way.
    """
    started: list[ProxyProcess] = []

    def start_proxy(
        entry: str, service_url: str, environment: Mapping[str, str], *arguments: str, wait: bool = True
    ) -> ProxyProcess:
        environment = dict(environment)
        if entry == "launcher":
            command = [sys.executable, str(ROOT / "run-mitmproxy.py"), "serve", "--", *arguments]
            environment = {"PROXY_PORT": "0", "REMOTE_PROTECTED_DOMAIN": service_url, **environment}
        else:
            mitmdump = str(Path(sys.executable).parent / "mitmdump")
            mode = f"reverse:{service_url}" if service_url else "regular"
            command = [mitmdump, "-s", str(ROOT / "mitmproxy-oidc-addon.py")]
            command += ["--mode", f"{mode}@127.0.0.1:{environment.get('PROXY_PORT', '0')}", *arguments]
        proxy = ProxyProcess(run_process(command, base_environment | environment, tmp_path_factory.mktemp("cwd")))
        started.append(proxy)
        return proxy.wait_until_started() if wait else proxy

    yield start_proxy
    with ThreadPoolExecutor() as together:  # each may have something to wait for
        list(together.map(ProxyProcess.stop, started))
    crashes = [proxy.output for proxy in started if "has crashed" in proxy.output or "Traceback" in proxy.output]
    assert not crashes, "\n\n".join(crashes)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 and localhost, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    write_certificate(path)
    return path


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """An HTTP client that goes straight to where it is sent."""
    with httpx.Client(trust_env=False, timeout=20) as http:
        yield http
