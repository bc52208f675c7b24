"""Services as users of Earth observation data meet them, behind the proxy; Jupyter has a file of its own.

Run with `uv run --group interop pytest -m interop tests/interop/test_upstreams.py`; needs curl and Debian's gdal-bin.
"""

from collections.abc import Iterator

import httpx
import pytest
import requests
from eo_service import Setup

pytest_plugins = ["eo_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

SECONDS = 30
MEBIBYTE = 1 << 20


@pytest.fixture
def client(setup: Setup) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=setup.url, trust_env=False, timeout=SECONDS) as http:
        yield http


# OpenSearch


def test_a_password_for_opensearch_gives_way_to_the_token(setup: Setup, client: httpx.Client) -> None:
    challenged = httpx.get(setup.service.url, trust_env=False)
    assert (challenged.status_code, challenged.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    answer = client.post("/_search", json={"query": {"match_all": {}}}, auth=("admin", "admin"))
    assert (answer.status_code, answer.json()["hits"]["total"]["value"]) == (200, 1)


def test_opensearch_that_forgets_a_token_gets_another(setup: Setup, client: httpx.Client) -> None:
    setup.issuer.forget_access_tokens()
    answer = client.post("/_search", json={"query": {"match_all": {}}})
    assert (answer.status_code, answer.json()["query"]) == (200, '{"query":{"match_all":{}}}')
    assert [asked.status for asked in setup.service.asked] == [401, 200]


def test_opensearch_that_stays_with_no_is_passed_on_as_it_is(setup: Setup) -> None:
    # Within two minutes of the one before there is no other token.
    setup.issuer.forget_access_tokens()
    try:
        with requests.Session() as session:
            session.auth = ("admin", "admin")
            answer = session.get(f"{setup.url}/_search", timeout=SECONDS)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Basic realm="OpenSearch Security"')
        assert "X-OIDC-Proxy-Error" not in answer.headers
    finally:
        raise SystemExit
