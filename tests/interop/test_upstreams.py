"""Services as users of Earth observation data meet them, behind the proxy; Jupyter has a file of its own.

Run with `uv run --group interop pytest -m interop tests/interop/test_upstreams.py`; needs curl and Debian's gdal-bin.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
import requests

from eoepca_security.testing.local_server import Handler, LocalServer
from tests.interop.eo_service import POLLS, SIZE, Setup
from tests.support.environment import settings_for
from tests.support.processes import StartProxy
from tests.support.service import echo_one_message, websocket_echo

pytest_plugins = ["tests.interop.eo_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

SECONDS = 30
MEBIBYTE = 1 << 20


@pytest.fixture
def client(eo: Setup) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=eo.url, trust_env=False, timeout=SECONDS) as http:
        yield http


# OpenSearch


def test_a_password_for_opensearch_gives_way_to_the_token(eo: Setup, client: httpx.Client) -> None:
    challenged = httpx.get(eo.service.url, trust_env=False)
    assert (challenged.status_code, challenged.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    answer = client.post("/_search", json={"query": {"match_all": {}}}, auth=("admin", "admin"))
    assert (answer.status_code, answer.json()["hits"]["total"]["value"]) == (200, 1)


def test_opensearch_that_forgets_a_token_gets_another(eo: Setup, client: httpx.Client) -> None:
    assert client.get("/").status_code == 200
    eo.forget_the_last_token()
    answer = client.post("/_search", json={"query": {"match_all": {}}})
    assert (answer.status_code, answer.json()["query"]) == (200, '{"query":{"match_all":{}}}')
    assert [asked.status for asked in eo.service.asked] == [200, 401, 200]


def test_a_challenge_that_no_token_meets_reaches_the_client(eo: Setup) -> None:
    with requests.Session() as session:
        session.auth = ("admin", "admin")
        answer = session.get(f"{eo.url}/_plugins/_security/api", timeout=SECONDS)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Basic realm="OpenSearch Security"')
    assert "X-OIDC-Proxy-Error" not in answer.headers


# STAC


def test_links_in_bodies_lead_to_the_service_and_past_the_proxy(eo: Setup, client: httpx.Client) -> None:
    page = client.get("/stac/search", params={"limit": 2}).json()
    (following,) = (link["href"] for link in page["links"] if link["rel"] == "next")
    assert following == f"{eo.service.url}/stac/search?token=2&limit=2"
    assert httpx.get(following, trust_env=False).status_code == 401
    assert client.get(following.replace(eo.service.url, eo.url)).json()["features"][0]["id"] == "item-2"


# OGC API - Processes


def test_a_job_is_started_watched_and_fetched(eo: Setup, start: StartProxy) -> None:
    # One that has not asked for another token in the last two minutes.
    proxy = start("launcher", eo.service.url, settings_for(eo.issuer))
    with httpx.Client(base_url=proxy.url, trust_env=False, timeout=SECONDS) as client:
        assert client.get("/").status_code == 200
        eo.forget_the_last_token()
        answer = client.post("/processes/ndvi/execution", json={"inputs": {}}, headers={"Prefer": "respond-async"})
        assert (answer.status_code, answer.headers["Preference-Applied"]) == (201, "respond-async")
        assert [asked.status for asked in eo.service.asked] == [200, 401, 201]
        job = answer.headers["Location"]
        assert job == f"{proxy.url}/jobs/1"
        statuses = [client.get(job).json()["status"] for _ in range(POLLS + 1)]
        assert statuses == ["running"] * POLLS + ["successful"]
        assert client.get(f"{job}/results").json()["ndvi"]["href"].startswith(eo.service.url)


# Rasters


def test_ranges_of_a_large_raster(eo: Setup, client: httpx.Client) -> None:
    url = "/rasters/large.tif"
    size = int(client.head(url).headers["Content-Length"])
    assert size > SIZE * SIZE
    whole = (eo.service.rasters / "large.tif").read_bytes()
    for first, last in ((0, 16383), (size - 100, size - 1), (size // 2, size // 2 + 3 * MEBIBYTE)):
        answer = client.get(url, headers={"Range": f"bytes={first}-{last}"})
        assert (answer.status_code, answer.headers["Content-Range"]) == (206, f"bytes {first}-{last}/{size}")
        assert answer.content == whole[first : last + 1]
    assert client.get(url, headers={"Range": f"bytes={size}-"}).status_code == 416
    etag = client.head(url).headers["ETag"]
    several = client.get(url, headers={"Range": "bytes=0-1,10-11", "If-Range": etag})
    assert (several.status_code, several.headers["Content-Type"].partition(";")[0]) == (206, "multipart/byteranges")
    with client.stream("GET", url) as answer:
        assert hashlib.sha256(b"".join(answer.iter_bytes())).digest() == hashlib.sha256(whole).digest()


# Uploads


def test_a_chunked_upload(eo: Setup, base_environment: dict[str, str]) -> None:
    part = hashlib.sha256(b"a part").digest() * (MEBIBYTE // 32)
    count = 48
    command = ["curl", "-sS", "-f", "-T", "-", f"{eo.url}/upload"]
    with subprocess.Popen(command, env=base_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as curl:
        assert curl.stdin is not None
        assert curl.stdout is not None
        for _ in range(count):
            curl.stdin.write(part)
        curl.stdin.close()
        shown = json.loads(curl.stdout.read())
    assert shown == {"sha256": hashlib.sha256(part * count).hexdigest(), "length": count * MEBIBYTE}
    (asked,) = eo.service.asked
    assert (asked.headers["transfer-encoding"], "content-length" in asked.headers) == ("chunked", False)


def test_an_upload_that_is_refused_gets_through_the_next_time(eo: Setup, start: StartProxy) -> None:
    proxy = start("launcher", eo.service.url, settings_for(eo.issuer))
    with httpx.Client(base_url=proxy.url, trust_env=False, timeout=SECONDS) as client:
        assert client.get("/").status_code == 200
        eo.forget_the_last_token()
        assert [client.put("/upload", content=iter([b"x"] * 3)).status_code for _ in range(2)] == [401, 200]


# WebSockets


def test_a_websocket_that_is_refused_gets_through_the_next_time(eo: Setup, start: StartProxy) -> None:
    tokens: list[str] = []

    class EchoHandler(Handler):
        def respond(self) -> None:
            tokens.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
            if eo.issuer.accepts(tokens[-1]):
                echo_one_message(self)
            else:
                self.answer(401, {})

    with LocalServer(EchoHandler) as server:
        proxy = start("launcher", server.url, settings_for(eo.issuer))
        port = urlsplit(proxy.url).port or 0
        assert websocket_echo(port, "hello", []) == "hello"
        eo.issuer._issued.pop(tokens[-1])
        assert [websocket_echo(port, "hello", []) for _ in range(2)] == [401, "hello"]
    assert len(tokens) == 3
