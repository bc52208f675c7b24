"""The sidecar of docs/migrating.md, beside the tool of a CronJob as EOEPCA's Resource Health makes it."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eoepca_security.testing import Behaviour
from tests.container.docker_host import (
    CA_FILE,
    ENVIRONMENT,
    Container,
    Outside,
    docker,
    options,
    outside,
    unique,
)
from tests.container.docker_pod import BASE
from tests.support.processes import ROOT

yaml = pytest.importorskip("yaml")

pytest_plugins = ["tests.container.docker_fixtures"]
pytestmark = [pytest.mark.container, pytest.mark.timeout(300)]

PAGE = (ROOT / "docs" / "migrating.md").read_text()
NEW = "PROXY_TERMINATION_ENDPOINT"
TOOL = """
import socket, sys, time, urllib.request
for _ in range(100):
    try:
        socket.create_connection(("127.0.0.1", 8080), 1).close()
        break
    except OSError:
        time.sleep(0.2)
for url in sys.argv[1:]:
    with urllib.request.urlopen(url, timeout=20) as response:
        print(response.status, response.read().decode().strip())
"""


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Outside]:
    with outside(tmp_path, Behaviour(audience="account"), client_secret="s3cret") as there:
        yield there


def sidecar(image: str, there: Outside, *, without: str | None = None) -> Container:
    """Start the page's container with the values of `there`."""
    (manifest,) = yaml.safe_load(block("yaml"))
    here = {
        "OPEN_ID_CONNECT_URL": f"{there.issuer.url}/.well-known/openid-configuration",
        "REMOTE_PROTECTED_DOMAIN": there.service_url,
        "OPEN_ID_REFRESH_TOKEN": there.issuer.refresh_token,
        "OPEN_ID_CONNECT_CLIENT_ID": there.issuer.client_id,
        "OPEN_ID_CONNECT_CLIENT_SECRET": "s3cret",
    }
    variables: list[dict[str, Any]] = manifest["env"]
    given = {each["name"]: here.get(each["name"]) or each["value"] for each in variables if each["name"] != without}
    assert given.keys() >= here.keys()
    # The issuer has a CA of its own, which a page for everybody cannot know.
    environment = options(given | {"TLS_CA_FILE": CA_FILE})
    return Container(image, *there.trust, *environment, command=tuple(manifest["args"]))


def run_tool(proxy: Container) -> list[str]:
    """Run what the page's CronJob runs beside the proxy, and return what it prints."""
    (quit_url,) = re.findall(r"^ +curl -s (\S+)$", PAGE, re.MULTILINE)
    urls = ("http://127.0.0.1:8080/collections", quit_url)
    done = docker("run", "--rm", "--network", f"container:{proxy.name}", BASE, "python3", "-c", TOOL, *urls)
    return done.stdout.splitlines()


def test_the_sidecar_of_the_page_serves_the_tool_and_ends_with_it(image: str, there: Outside) -> None:
    with sidecar(image, there) as proxy:
        assert run_tool(proxy) == ['200 {"path": "/collections"}', "200 ending"], proxy.logs
        assert proxy.exit_code() == 0
        assert re.search("OIDC proxy listening at .* as alice", proxy.logs)
    assert [(seen.target, seen.authorized) for seen in there.seen] == [("/collections", True)]


def test_an_image_with_the_setting_needs_no_change_of_the_manifest(image: str, there: Outside) -> None:
    text = block("dockerfile").replace("registry.example/mitmproxy-oidc", image)
    derived = unique("i")
    build = ["docker", "build", "-q", "-t", derived, "-"]
    subprocess.run(build, input=text, text=True, check=True, timeout=120, env=ENVIRONMENT, capture_output=True)
    try:
        with sidecar(derived, there, without=NEW) as proxy:
            assert run_tool(proxy)[-1] == "200 ending", proxy.logs
            assert proxy.exit_code() == 0
    finally:
        docker("rmi", "-f", derived)
