"""The tools that people have, each getting through the proxy to a protected service.

Run with `uv run --group interop pytest -m interop tests/interop/test_clients.py`; needs curl, Node.js, and Debian's
gdal-bin, chromium and chromium-driver.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests

from eoepca_security.testing import FakeIssuer
from tests.interop.eo_service import ITEMS, SIZE, Setup, running_eo_service
from tests.support.environment import settings_for
from tests.support.processes import ROOT, StartProxy

pytest.importorskip("pystac_client")

import pystac_client
from pystac.errors import STACError

from tests.interop.kc_browser import wait_for_text
from tests.support.browser import chromium

pytest_plugins = ["tests.interop.eo_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

SECONDS = 30
ALL_ITEMS = [f"item-{number}" for number in range(ITEMS)]


def run(*command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def environment(base_environment: dict[str, str]) -> dict[str, str]:
    return base_environment


@pytest.fixture
def forward_environment(eo: Setup, base_environment: dict[str, str]) -> dict[str, str]:
    """What makes curl, GDAL and whatever uses them go by the forward proxy."""
    return base_environment | {"https_proxy": eo.forward_url, "CURL_CA_BUNDLE": str(eo.authority)}


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
def test_curl(version: str, eo: Setup, environment: dict[str, str]) -> None:
    shown = run("curl", "-sSf", version, f"{eo.url}/", environment=environment)
    assert "opensearch" in shown
    shown = run("curl", "-sSf", version, "-u", "me:pw", "--anyauth", f"{eo.url}/", environment=environment)
    assert "opensearch" in shown


def test_curl_by_the_forward_proxy(eo: Setup, forward_environment: dict[str, str]) -> None:
    assert "opensearch" in run("curl", "-sSf", f"{eo.service.tls_url}/", environment=forward_environment)


def test_requests(eo: Setup) -> None:
    with requests.Session() as session:
        session.auth = ("me", "a password that the service does not know")
        for _ in range(2):
            assert session.get(f"{eo.url}/", timeout=SECONDS).json()["version"]["distribution"] == "opensearch"


def test_httpx(eo: Setup) -> None:
    with httpx.Client(trust_env=False, timeout=SECONDS) as client:
        assert client.get(f"{eo.url}/").status_code == 200


async def test_httpx_without_blocking(eo: Setup) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=SECONDS) as client:
        assert (await client.post(f"{eo.url}/echo", content=b"x")).text == "x"


def test_httpx_by_the_forward_proxy(eo: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", eo.forward_url)
    monkeypatch.setenv("SSL_CERT_FILE", str(eo.authority))
    with httpx.Client(timeout=SECONDS) as client:
        assert client.get(f"{eo.service.tls_url}/").status_code == 200


def test_node_fetch(eo: Setup, environment: dict[str, str]) -> None:
    script = "fetch(process.argv[1], {method: 'POST', body: 'x'}).then(a => a.text()).then(console.log)"
    assert run("node", "-e", script, f"{eo.url}/echo", environment=environment) == "x\n"


def test_pystac_client_that_is_told_where_the_links_lead(eo: Setup) -> None:
    text = (ROOT / "docs" / "upstreams.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    example: dict[str, Any] = {}
    for documented, real in (("https://service.example", eo.service.url), ("http://localhost:8080", eo.url)):
        code = code.replace(documented, real)
    exec(code, example)
    for method in ("GET", "POST"):
        assert [item.id for item in example["catalog"].search(limit=2, method=method).items()] == ALL_ITEMS
    assert {asked.status for asked in eo.service.asked} == {200}


def test_pystac_client_by_the_forward_proxy(eo: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", eo.forward_url)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(eo.authority))
    catalog = pystac_client.Client.open(f"{eo.service.tls_url}/stac")
    for method in ("GET", "POST"):
        assert [item.id for item in catalog.search(limit=2, method=method).items()] == ALL_ITEMS
    assert {asked.status for asked in eo.service.asked} == {200}


def test_pystac_client_that_is_not_told_follows_links_past_the_proxy(eo: Setup) -> None:
    catalog = pystac_client.Client.open(f"{eo.url}/stac")
    with pytest.raises(STACError):
        list(catalog.search(limit=2).items())
    last = eo.service.asked[-1]
    assert (last.status, "authorization" in last.headers) == (401, False)


@pytest.mark.parametrize("by", ["reverse", "forward"])
def test_gdal(
    by: str, eo: Setup, environment: dict[str, str], forward_environment: dict[str, str], tmp_path: Path
) -> None:
    base, env = (eo.url, environment) if by == "reverse" else (eo.service.tls_url, forward_environment)
    url = f"/vsicurl/{base}/rasters/large.tif"
    env = env | {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".tif"}
    assert json.loads(run("gdalinfo", "-json", url, environment=env))["size"] == [SIZE, SIZE]
    window = ["-srcwin", "4000", "4000", "600", "600"]
    run("gdal_translate", "-q", *window, url, str(tmp_path / "window.tif"), environment=env)
    read = json.loads(run("gdalinfo", "-json", "-stats", str(tmp_path / "window.tif"), environment=env))
    assert (read["size"], read["bands"][0]["minimum"], read["bands"][0]["maximum"]) == ([600, 600], 7, 7)
    asked = eo.service.asked
    assert {(each.path, each.status) for each in asked} == {("/rasters/large.tif", 200), ("/rasters/large.tif", 206)}
    assert sum(each.sent for each in asked) < SIZE * SIZE / 20


def test_a_catalogue_leads_to_data_on_another_host(
    start: StartProxy,
    eo_rasters: Path,
    certificate: Path,
    home: Path,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = home / ".mitmproxy" / "mitmproxy-ca-cert.pem"
    with (
        FakeIssuer(client_secret="secret-of-the-client") as issuer,
        running_eo_service(issuer, eo_rasters, certificate, "data") as data,
        running_eo_service(issuer, eo_rasters, certificate, "catalogue", data.tls_url) as catalogue,
    ):
        file = tmp_path / "services.toml"
        file.write_text(
            "".join(
                f'[service.{each.audience}]\nurl = "{each.tls_url}"\ntoken = "exchange"\naudience = "{each.audience}"\n'
                for each in (catalogue, data)
            )
        )
        more = {"PROXY_MODE": "forward", "PROXY_SERVICES": str(file), "TLS_CA_FILE": str(certificate)}
        proxy = start("launcher", "", settings_for(issuer, **more))
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
        found = list(pystac_client.Client.open(f"{catalogue.tls_url}/stac").search(limit=2).items())
        assert [item.id for item in found] == ALL_ITEMS
        env = environment | {"https_proxy": proxy.url, "CURL_CA_BUNDLE": str(authority)}
        env |= {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".tif"}
        asset = f"/vsicurl/{found[0].assets['data'].href}"
        assert json.loads(run("gdalinfo", "-json", asset, environment=env))["size"] == [SIZE, SIZE]
    assert {asked.status for asked in catalogue.asked} == {200}
    assert {asked.status for asked in data.asked} == {200, 206}


def test_gdal_waits_for_an_issuer_that_is_away(eo: Setup, start: StartProxy, environment: dict[str, str]) -> None:
    eo.issuer.behaviour.down = True
    try:
        proxy = start("launcher", eo.service.url, settings_for(eo.issuer))
        command = ["gdalinfo", "-json", f"/vsicurl/{proxy.url}/rasters/large.tif"]
        patient = {
            "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
            "GDAL_HTTP_MAX_RETRY": "5",
            "GDAL_HTTP_RETRY_DELAY": "1",
        }
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment | patient, stdout=pipe, stderr=pipe, text=True) as gdal:
            assert gdal.stderr is not None
            assert "503" in gdal.stderr.readline()
            eo.issuer.behaviour.down = False
            shown, complaints = gdal.communicate(timeout=SECONDS)
        assert gdal.returncode == 0, complaints
        assert json.loads(shown)["size"] == [SIZE, SIZE]
    finally:
        eo.issuer.behaviour.down = False


@pytest.mark.browser
def test_a_browser(eo: Setup, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as driver:
        driver.get(f"{eo.url.replace('127.0.0.1', 'localhost')}/page")
        wait_for_text(driver, "from the page")
        assert "from the service" in wait_for_text(driver, "closed with 1000")
    assert {asked.status for asked in eo.service.asked if asked.method != "WEBSOCKET"} <= {200, 404}
