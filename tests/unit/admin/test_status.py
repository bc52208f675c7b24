"""What the proxy tells of itself, as JSON, as a page and as lines."""

import html
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.admin.page import MAX_PROBLEMS, duration, lines, page, relative
from eoepca_security.proxy.admin.recent_errors import MAX_RECENT, RecentError, RecentErrors
from eoepca_security.proxy.admin.status import Answer, Refresh, ServiceState, State, status
from eoepca_security.proxy.config.services import default_service
from eoepca_security.proxy.config.settings import Service
from eoepca_security.session.session import AccessToken
from tests.support.services import DATA, PLAIN, STAC, with_services
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
        (
            "http://0.0.0.0:8080",
            {
                "mode": "forward",
                "proxy_auth": "alice:secret",
                "upstream": "http://127.0.0.1:9000",
                "services": (Service("stac", "http://127.0.0.1:9000", "/api"),),
                "endpoint": "/x?y&z",
            },
            "curl --proxy http://localhost:8080 --proxy-user USER:PASSWORD 'http://127.0.0.1:9000/api/x?y&z'",
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


OTHER_TOKEN = AccessToken("the-exchanged-token", NOW - 10, NOW + 290)
FAULT = RecentError("upstream_unavailable", "data at data.example:443: refused", NOW - 5, 1, "check url", "data")
OVER = CredentialsRejected("the issuer does not allow it", cause="no_exchange")

SERVING = replace(
    STATE,
    upstream="3 services",
    settings=with_services(),
    services=(
        ServiceState(STAC, OTHER_TOKEN, None, Refresh(NOW - 10, 0.02, None), Answer(200, NOW - 2)),
        ServiceState(DATA, None, None, Refresh(NOW - 400, 0.02, None), Answer(204, NOW - 300)),
        ServiceState(PLAIN),
    ),
)


def with_states(**changes: dict[str, Any]) -> State:
    services = (replace(one, **changes.get(one.service.name, {})) for one in SERVING.services)
    return replace(SERVING, services=tuple(services))


def test_each_service_is_told_of_and_no_token() -> None:
    told = status(SERVING)
    stac, data, plain = told["services"]
    assert stac == {
        "name": "stac",
        "addresses": ["http://stac.localhost:8080", "http://localhost:8090", "stac.proxy.svc"],
        "upstream": "https://stac.example/api",
        "token_kind": "exchange",
        "state": "ready",
        "code": None,
        "detail": None,
        "token": {"obtained_at": NOW - 10, "ends_at": NOW + 290, "lifetime_seconds": 300, "seconds_left": 290},
        "last_refresh": {"at": NOW - 10, "seconds": 0.02, "result": "success"},
        "last_answer": {"at": NOW - 2, "status": 200},
    }
    assert (data["state"], data["token"], data["token_kind"]) == ("idle", None, "scope")
    assert (plain["state"], plain["last_refresh"], plain["last_answer"]) == ("starting", None, None)
    assert told["problems"] == []
    assert told["example"] == "curl -i http://stac.localhost:8080/"
    text, shown = "\n".join(lines(told)), page(told)
    for part in (
        (
            "service stac: state: Ready; at: http://stac.localhost:8080, http://localhost:8090, stac.proxy.svc; "
            "forwarding to: https://stac.example/api; token: exchanged, expires "
        ),
        "last answer: 204 ",
        "service plain: state: Not in use yet; ",
    ):
        assert part in text
    assert shown.count("<h3>") == 3
    assert '<li class="good">\n<h3><span class="sign" aria-hidden="true">\N{CHECK MARK}</span> stac: ' in shown
    assert "<strong>Ready</strong> Requests get a token." in shown
    assert not [secret for secret in (*SECRETS, OTHER_TOKEN.value) if secret in shown + text + json.dumps(told)]


@pytest.mark.parametrize(
    ("changes", "tone", "headline", "problems"),
    [
        ({"data": {"fault": FAULT}}, "warn", "Not all services work", [("data", "service")]),
        ({"plain": {"last_answer": Answer(401, NOW - 1)}}, "warn", "Not all services work", [("plain", "service")]),
        ({"stac": {"token": None, "error": OVER}}, "warn", "Not all services work", [("stac", "token")]),
        ({"stac": {"error": OVER}}, "warn", "Ready, but not for long", [("stac", "token")]),
        (
            {"stac": {"token": None, "error": OVER}, "data": {"fault": FAULT}, "plain": {"fault": FAULT}},
            "bad",
            "Not working",
            [("stac", "token"), ("data", "service"), ("plain", "service")],
        ),
        ({"data": {"fault": FAULT, "last_answer": Answer(500, NOW - 4)}}, "good", "Ready", []),
    ],
)
def test_a_problem_of_a_service_has_its_name(
    changes: dict[str, dict[str, Any]], tone: str, headline: str, problems: list[tuple[str, str]]
) -> None:
    told = status(with_states(**changes))
    assert (told["state"], told["ready"], told["code"]) == ("ready", True, None)
    assert [(problem["service"], problem["about"]) for problem in told["problems"]] == problems
    shown = page(told)
    assert f'class="box {tone}" role="status"' in shown
    assert f"<strong>{headline}</strong>" in shown
    for problem in told["problems"]:
        title = html.escape(problem["title"])
        assert f"<h2>{problem['service']}: {title}</h2>" in shown
        assert f"{problem['service']}: {problem['title']}: {problem['detail']}" in lines(told)
        assert f"<dt>Problem</dt><dd>{title}: " in shown


def test_a_service_without_a_token_says_why_and_what_to_do() -> None:
    stac = status(with_states(stac={"token": None, "error": OVER}))["services"][0]
    assert (stac["state"], stac["code"]) == ("failing", "credentials_rejected")
    assert stac["detail"].startswith("the issuer does not allow it; ")
    assert status(with_states(stac={"error": OVER}))["services"][0]["state"] == "degraded"


def test_what_the_session_lacks_is_one_problem() -> None:
    lost = with_states(**{name: {"token": None, "error": REJECTED} for name in ("stac", "data", "plain")})
    told = status(replace(lost, token=None, error=REJECTED))
    [problem] = told["problems"]
    assert "service" not in problem
    assert {service["state"] for service in told["services"]} == {"failing"}
    assert "<strong>No token</strong>" in page(told)


def test_what_ails_a_services_token_is_told_with_its_own_settings() -> None:
    told = status(with_states(stac={"error": OVER, "token": None}))
    [problem] = told["problems"]
    assert "Standard Token Exchange" in problem["remedy"]
    assert "Standard Token Exchange" in told["services"][0]["detail"]
    other = status(replace(STATE, error=OVER))
    assert "Standard Token Exchange" not in other["detail"]


def test_very_many_problems_are_counted_on_the_page() -> None:
    services = tuple(Service(f"s{number}", "https://s.example") for number in range(500))
    states = tuple(ServiceState(one, OTHER_TOKEN, fault=FAULT) for one in services[1:])
    told = status(replace(SERVING, settings=with_services(*services), services=(ServiceState(services[0]), *states)))
    assert len(told["problems"]) == 499
    shown = page(told)
    assert shown.count('<div class="problem">') == MAX_PROBLEMS + 1
    assert "And 489 more: see the services below." in shown
    assert "Requests to 499 services fail." in shown


def test_with_one_service_the_page_stays_as_it_is() -> None:
    one = replace(STATE, services=(ServiceState(default_service("https://service.example:9200")),))
    assert page(status(one)) == page(status(STATE))
    assert lines(status(one)) == lines(status(STATE))
    assert status(one) | {"services": []} == status(STATE)
    [service] = status(one)["services"]
    assert (service["name"], service["addresses"]) == ("default", ["http://127.0.0.1:8080"])
    in_file = replace(SERVING, settings=with_services(STAC), services=SERVING.services[:1])
    assert "Services" not in page(status(in_file))
    for change, headline in (
        ({"last_answer": Answer(401, NOW)}, "Not working"),
        ({"error": OVER}, "Ready, but not for long"),
        ({"error": OVER, "token": None}, "No token"),
    ):
        failing = replace(in_file, services=(replace(in_file.services[0], **change),))
        assert f"<strong>{headline}</strong>" in page(status(failing))


def test_the_same_error_of_another_service_is_another_error() -> None:
    recent_errors = RecentErrors(lambda: NOW)
    for service in ("stac", "data", "stac"):
        recent_errors.add("token_invalid", "no", service=service)
    told = status(replace(SERVING, recent_errors=recent_errors.latest()))
    assert [(error["service"], error["count"]) for error in told["recent_errors"]] == [("stac", 2), ("data", 1)]
    assert "<p>stac: no</p>" in page(told)
    assert any(line.endswith(": stac: token_invalid: no (2 times)") for line in lines(told))
