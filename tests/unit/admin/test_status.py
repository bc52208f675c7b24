"""What the proxy tells of itself, as JSON, as a page and as lines."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.admin.page import duration, lines, page, relative
from eoepca_security.proxy.admin.recent_errors import MAX_RECENT, RecentError, RecentErrors
from eoepca_security.proxy.admin.status import Answer, status
from tests.support.state import NOW, SECRETS, SETTINGS, STATE

REJECTED = CredentialsRejected("the issuer answered invalid_grant: Token; not active", issuer_error="invalid_grant")
REFUSED = IssuerUnavailable("https://issuer.example cannot be reached: Connection refused", cause="refused")


def test_the_address_for_browsers_is_told_and_is_no_link() -> None:
    told = status(replace(STATE, browser_address="http://stac.localhost:8080"))
    assert told["browser_address"] == "http://stac.localhost:8080"
    assert "in a browser: http://stac.localhost:8080" in lines(told)
    # The proxy refuses links from pages of other sites, and the status page is one.
    assert "<dt>In a browser</dt><dd>http://stac.localhost:8080</dd>" in page(told)


def test_all_of_it_is_told_and_no_secret() -> None:
    told = status(STATE)
    assert told["identity"] == {"sub": "6f0c", "preferred_username": "alice"}
    assert told["token"] == {
        "obtained_at": NOW - 19,
        "ends_at": NOW + 41,
        "lifetime_seconds": 60,
        "seconds_left": 41,
    }
    assert told["last_refresh"] == {"at": NOW - 19, "seconds": 0.031, "result": "success"}
    text = "\n".join(lines(told))
    for part in (
        "identity: alice (sub 6f0c)",
        "listening at: http://127.0.0.1:8080",
        "forwarding to: https://service.example:9200",
        "identity provider: https://issuer.example/realms/x",
        "(in 41 s)",
        "lifetime: 1 min, renewed automatically",
        "(19 s ago)",
        "result: success, after 31 ms",
        "refreshes: 3 success, 1 issuer_unavailable",
        "answers from the service, 2xx, success: 5",
        "answers from the service, 4xx, refused: 4",
        "answers from the service, in progress: 2",
        "answers from the proxy, host_not_allowed: 3",
        "answers from the proxy, upstream_unavailable: 1",
        "try it: curl -i http://127.0.0.1:8080/",
    ):
        assert part in text
    assert "in a browser" not in text
    shown = page(told)
    assert "running since" in shown
    assert "(2 h 1 min ago)" in shown
    assert not [secret for secret in SECRETS if secret in shown + text + json.dumps(told)]


def test_the_page_shows_no_epoch_seconds() -> None:
    telling = replace(STATE, recent_errors=(RecentError("host_not_allowed", "no", NOW - 90_000),))
    shown = re.sub(r"<[^>]*>", "", page(status(telling)))
    assert not re.search(r"\d{9}", shown)
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ \(1 d 1 h ago\)", shown)
    assert not re.search(r"\d{9}", "\n".join(lines(status(telling))))


@pytest.mark.parametrize(
    ("change", "name", "tone", "headline"),
    [
        ({}, "ready", "good", "Ready"),
        ({"error": REFUSED}, "degraded", "warn", "Ready, but not for long"),
        ({"error": REFUSED, "token": None}, "failing", "bad", "No token"),
        ({"token": None}, "idle", "good", "Ready"),
        ({"token": None, "last_refresh": None}, "starting", "wait", "Starting"),
        ({"token": None, "settings": None}, "failing", "bad", "No token"),
    ],
)
def test_the_state_is_named(change: dict[str, Any], name: str, tone: str, headline: str) -> None:
    told = status(replace(STATE, **change))
    assert (told["state"], told["ready"]) == (name, name in ("ready", "degraded", "idle"))
    assert f"<strong>{headline}</strong>" in page(told)
    assert f'class="box {tone}" role="status"' in page(told)
    assert lines(told)[0].startswith(f"{headline}: ")


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        (REJECTED, "run `oidc-proxy login`, which a running proxy picks up; or set OPEN_ID_REFRESH_TOKEN"),
        (CredentialsRejected("there is no session", cause="no_session"), "run `oidc-proxy login`"),
        (
            CredentialsRejected("no", issuer_error="invalid_client"),
            "copy OPEN_ID_CONNECT_CLIENT_SECRET from the issuer",
        ),
        (CredentialsRejected("no", issuer_error="invalid_scope"), "set OPEN_ID_CONNECT_SCOPE"),
        (
            REFUSED,
            "otherwise check the host and port in OPEN_ID_CONNECT_URL; the proxy retries automatically",
        ),
        (IssuerUnavailable("it answered 500"), "the proxy retries automatically"),
        (TokenInvalid("the token is not for the audience my-service", claim="aud"), "with my-service as Included"),
        (TokenInvalid("the token has expired", cause="clock"), "synchronize this machine's clock"),
        (TokenInvalid("the token's signature is not valid"), "run `oidc-proxy check`"),
    ],
)
def test_a_failure_comes_with_its_remedy(failure: TokenError, remedy: str) -> None:
    told = status(replace(STATE, token=None, error=failure))
    [problem] = told["problems"]
    assert remedy in problem["remedy"]
    assert problem["detail"] == str(failure)
    assert (told["code"], told["detail"]) == (failure.code, f"{failure}; {problem['remedy']}")
    assert f"remedy: {problem['remedy']}" in lines(told)
    assert "Remedy:" in page(told)


def test_the_page_leads_with_whom_whether_it_works_and_until_when() -> None:
    shown = page(status(STATE))
    order = [shown.index(part) for part in ("alice</h1>", "sub 6f0c", "<strong>Ready</strong>", "Next login", "<main")]
    assert order == sorted(order)
    problem = page(status(replace(STATE, token=None, error=REJECTED)))
    assert problem.count('class="box bad"') == 1
    box = problem[problem.index('id="state"') : problem.index('id="lead"')]
    assert "rejected the proxy" in box
    assert "Remedy:" in box
    assert problem.count("Remedy:") == 1


@pytest.mark.parametrize(
    ("change", "needed", "shown"),
    [
        ({}, "later", "next login: not before "),
        ({"session_ends_at": NOW - 60}, "later", "next login: soon: the session was to end "),
        ({"session_ends_at": None}, "unknown", "next login: unknown: the identity provider does not say"),
        ({"error": REJECTED}, "now", "next login: now"),
        ({"error": CredentialsRejected("none", cause="no_session"), "token": None}, "now", "next login: now"),
        ({"error": CredentialsRejected("no", issuer_error="invalid_client")}, "later", "next login: not before "),
        ({"settings": replace(SETTINGS, grant="client_credentials")}, "never", "next login: never"),
    ],
)
def test_it_says_when_somebody_has_to_log_in_again(change: dict[str, Any], needed: str, shown: str) -> None:
    told = status(replace(STATE, **change))
    assert told["session"]["login_needed"] == needed
    assert shown in "\n".join(lines(told))


@pytest.mark.parametrize(
    ("listener", "change", "command"),
    [
        ("http://127.0.0.1:8080", {}, "curl -i http://127.0.0.1:8080/"),
        ("http://0.0.0.0:8080", {"endpoint": "/items?limit=1&x"}, "curl -i 'http://localhost:8080/items?limit=1&x'"),
        ("http://[::]:8080", {"allowed_hosts": ("proxy",)}, "curl -i http://proxy:8080/"),
        ("http://[::]:8080", {"allowed_hosts": ("proxy:80", "other")}, "curl -i http://proxy:80/"),
        ("http://[::]:8080", {"allowed_hosts": ("[fd00::1]",)}, "curl -i 'http://[fd00::1]:8080/'"),
        ("http://0.0.0.0:8080", {"allowed_hosts": ("proxy", "*")}, "curl -i http://localhost:8080/"),
        (
            "http://127.0.0.1:8080",
            {"inject_hosts": ("service.example", "other.example")},
            "curl --proxy http://127.0.0.1:8080 --cacert ~/.mitmproxy/mitmproxy-ca-cert.pem https://service.example/",
        ),
    ],
)
def test_the_command_to_try_uses_a_name_that_the_proxy_answers_to(
    listener: str, change: dict[str, Any], command: str
) -> None:
    told = status(replace(STATE, listener=listener, settings=replace(SETTINGS, **change)))
    assert told["example"] == command
    assert status(replace(STATE, settings=None))["example"] is None


def test_in_a_container_localhost_is_the_container() -> None:
    settings = replace(SETTINGS, issuer_url="http://localhost:9000/realms/x")
    told = status(replace(STATE, settings=settings, error=REFUSED, in_container=True))
    assert "host.docker.internal" in told["problems"][0]["remedy"]


def test_a_service_that_fails_is_a_problem_until_it_answers() -> None:
    refused = "service.example:443: Connection refused"
    fault = RecentError("upstream_unavailable", refused, NOW - 5, remedy="check that it is up; or not")
    failing = replace(STATE, recent_errors=(fault,), last_answer=Answer(200, NOW - 9))
    assert status(failing)["problems"] == [
        {
            "about": "service",
            "title": "The protected service does not answer",
            "detail": "service.example:443: Connection refused",
            "remedy": "check that it is up; or not",
        }
    ]
    assert status(failing)["recent_errors"][0]["detail"] == f"{refused}; check that it is up; or not"
    assert "<strong>Not working</strong>" in page(status(failing))
    assert not status(replace(failing, last_answer=Answer(500, NOW - 4)))["problems"]
    [problem] = status(replace(failing, last_answer=Answer(401, NOW - 4)))["problems"]
    assert problem["title"] == "The protected service refuses the token"


def test_whatever_comes_from_elsewhere_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    state = replace(
        STATE,
        claims={"sub": evil, "preferred_username": evil},
        error=CredentialsRejected(evil),
        listener=evil,
        upstream=evil,
        settings=replace(SETTINGS, issuer_url=evil, client=Client(evil)),
        recent_errors=(RecentError(evil, evil, NOW),),
        counts={name: {evil: 1} for name in ("refreshes", "requests", "service_answers", "errors")},
    )
    shown = page(status(state))
    assert shown.count("<script") == 1  # the page's own
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;") == 11


def test_errors_are_counted_and_the_oldest_forgotten() -> None:
    times = iter(range(100))
    recent_errors = RecentErrors(lambda: next(times))
    for detail in ("a", "b", "a"):
        recent_errors.add("host_not_allowed", detail)
    assert recent_errors.latest() == (
        RecentError("host_not_allowed", "a", 2, 2),
        RecentError("host_not_allowed", "b", 1),
    )
    for number in range(MAX_RECENT - 1):
        recent_errors.add("host_not_allowed", f"{number}")
    assert [one.detail for one in recent_errors.latest()][-1] == "a"
    assert len(recent_errors.latest()) == MAX_RECENT
    recent_errors.add("host_not_allowed", "\n" * 1000)
    assert len(recent_errors.latest()[0].detail) == 501


def test_durations_have_at_most_two_units() -> None:
    said = [duration(seconds) for seconds in (0, 0.9, 41.9, 60, 185, 3600, 7800, 273_600)]
    assert said == ["0 s", "0 s", "41 s", "1 min", "3 min 5 s", "1 h", "2 h 10 min", "3 d 4 h"]
    assert [relative(seconds) for seconds in (0.5, -0.5, 12, -185)] == ["now", "now", "in 12 s", "3 min 5 s ago"]
