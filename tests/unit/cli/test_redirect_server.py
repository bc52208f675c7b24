"""The place that a browser comes back to: what it takes, and what it shows."""

import base64
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from eoepca_security.proxy.admin.page import RESOURCES
from eoepca_security.proxy.cli.redirect_server import Parameters, RedirectServer


@pytest.fixture
def loopback() -> Iterator[RedirectServer]:
    with RedirectServer() as loopback:
        loopback.is_expected = lambda parameters: ("state", "right") in parameters
        yield loopback


@pytest.fixture
def browser() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def come_back(loopback: RedirectServer, browser: httpx.Client, *, ok: bool = True) -> tuple[Parameters, httpx.Response]:
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(browser.get, f"{loopback.redirect_uri}?code=x%26y&state=right&empty=")
        parameters = loopback.wait(10)
        loopback.finish("A <title>", "as <b>alice</b> & co", ok=ok)
        return parameters, response.result()


def test_the_right_redirect_is_taken_and_answered_with_what_became_of_it(
    loopback: RedirectServer, browser: httpx.Client
) -> None:
    parameters, response = come_back(loopback, browser)
    assert list(parameters) == [("code", "x&y"), ("state", "right"), ("empty", "")]
    assert response.status_code == 200
    assert '<div class="box good" role="status">' in response.text
    assert "<strong>A &lt;title&gt;</strong>" in response.text
    assert "as &lt;b&gt;alice&lt;/b&gt; &amp; co" in response.text
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Connection"] == "close"


def test_a_failed_login_has_another_status(loopback: RedirectServer, browser: httpx.Client) -> None:
    response = come_back(loopback, browser, ok=False)[1]
    assert response.status_code == 400
    assert '<div class="box bad" role="status">' in response.text


def test_the_page_looks_like_the_status_page(loopback: RedirectServer, browser: httpx.Client) -> None:
    _, response = come_back(loopback, browser)
    style = RESOURCES["/status.css"][1]
    assert f"<style>{style.decode()}</style>" in response.text
    digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in response.headers["Content-Security-Policy"]


def test_the_page_may_load_nothing_and_keeps_its_address(loopback: RedirectServer, browser: httpx.Client) -> None:
    _, response = come_back(loopback, browser)
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert (response.headers["Referrer-Policy"], response.headers["Cache-Control"]) == ("no-referrer", "no-store")
    assert not re.search(r"https?:|src=|href=|<script", response.text)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/callback?state=wrong", {}, 400),
        ("GET", "/callback", {}, 400),
        ("GET", "/callback?" + "&".join(f"a{n}=1" for n in range(30)) + "&state=right", {}, 400),
        ("GET", "/callback/?state=right", {}, 404),
        ("GET", "/?state=right", {}, 404),
        ("GET", "/callback?state=right", {"Host": "evil.example"}, 404),
        ("GET", "/callback?state=right", {"Host": "localhost"}, 404),
        ("GET", "/callback?state=right", {"Sec-Fetch-Dest": "image"}, 403),
        ("GET", "/callback?state=right", {"Sec-Fetch-Dest": "iframe", "Sec-Fetch-Mode": "navigate"}, 403),
        ("GET", "/callback?state=right", {"Sec-Fetch-Dest": "empty"}, 403),
        ("GET", "/callback?state=right", {"Sec-Fetch-Dest": "document", "Sec-Purpose": "prefetch;prerender"}, 403),
        ("GET", "/login/guessed", {}, 404),
        ("POST", "/callback?state=right", {}, 405),
        ("HEAD", "/callback?state=right", {}, 405),
        ("OPTIONS", "/callback?state=right", {}, 405),
    ],
)
def test_whatever_else_comes_is_refused_and_changes_nothing(
    method: str, path: str, headers: dict[str, str], status: int, loopback: RedirectServer, browser: httpx.Client
) -> None:
    url = loopback.redirect_uri.removesuffix("/callback")
    response = browser.request(method, url + path, headers=headers)
    assert response.status_code == status
    assert ("Allow" in response.headers) == (status == 405)
    assert "Access-Control-Allow-Origin" not in response.headers
    with pytest.raises(TimeoutError):
        loopback.wait(0)
    assert come_back(loopback, browser)[1].status_code == 200


def test_only_the_first_of_several_is_taken(loopback: RedirectServer, browser: httpx.Client) -> None:
    come_back(loopback, browser)
    assert browser.get(f"{loopback.redirect_uri}?state=right").status_code == 410


def test_a_page_may_bring_the_redirect(loopback: RedirectServer, browser: httpx.Client) -> None:
    browser.headers["Sec-Fetch-Dest"] = "document"
    assert come_back(loopback, browser)[1].status_code == 200


def test_several_tabs_come_back_and_the_first_one_counts(loopback: RedirectServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        tabs = [
            pool.submit(httpx.get, f"{loopback.redirect_uri}?code={n}&state=right", trust_env=False) for n in range(4)
        ]
        taken = dict(loopback.wait(10))["code"]
        loopback.finish("Done", "", ok=True)
        answers = [tab.result() for tab in tabs]
    assert [answer.status_code for answer in answers].count(410) == 3
    assert answers[int(taken)].status_code == 200
    assert all("already complete" in answer.text for answer in answers if answer.status_code == 410)


# --- the way to the issuer ---

ISSUER = "https://issuer.example/auth?state=secret"


def test_an_address_leads_to_the_issuer_once(loopback: RedirectServer, browser: httpx.Client) -> None:
    first, second = loopback.one_time_address(ISSUER), loopback.one_time_address(ISSUER)
    for address in (first, second):
        assert re.fullmatch(rf"http://127\.0\.0\.1:{loopback.port}/login/[\w-]{{32}}", address)
        sent = browser.get(address)
        assert (sent.status_code, sent.headers["Location"]) == (302, ISSUER)
        assert (sent.headers["Referrer-Policy"], sent.headers["Cache-Control"]) == ("no-referrer", "no-store")
        again = browser.get(address)
        assert (again.status_code, "Location" in again.headers) == (410, False)
        assert "If you did not open it" in again.text
    assert first != second
    assert come_back(loopback, browser)[1].status_code == 200


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("HEAD", {}, 405),
        ("POST", {}, 405),
        ("GET", {"Host": "evil.example"}, 404),
        ("GET", {"Sec-Fetch-Dest": "image"}, 403),
        ("GET", {"Sec-Fetch-Dest": "document", "Sec-Purpose": "prefetch"}, 403),
    ],
)
def test_only_a_page_uses_the_address_up(
    method: str, headers: dict[str, str], status: int, loopback: RedirectServer, browser: httpx.Client
) -> None:
    address = loopback.one_time_address(ISSUER)
    refused = browser.request(method, address, headers=headers)
    assert (refused.status_code, "Location" in refused.headers) == (status, False)
    assert browser.get(address).headers["Location"] == ISSUER


def test_it_listens_on_loopback_only_and_not_after_its_time() -> None:
    with RedirectServer() as loopback:
        uri = loopback.redirect_uri
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/callback", uri)
        assert loopback._server._server.server_address[0] == "127.0.0.1"
    with pytest.raises(httpx.ConnectError):
        httpx.get(uri, trust_env=False)


def test_the_browser_is_answered_before_the_server_ends(browser: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        with RedirectServer() as loopback:
            loopback.is_expected = lambda _parameters: True
            answer = pool.submit(browser.get, f"{loopback.redirect_uri}?state=s")
            loopback.wait(10)
            loopback.finish("Done", "", ok=True)
        assert "Done" in answer.result().text
