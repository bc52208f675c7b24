"""The faults that `check` knows, and what it says to do about each."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.cli import service_steps
from eoepca_security.proxy.cli.check import check
from eoepca_security.proxy.cli.main import main
from eoepca_security.proxy.cli.steps import Step
from eoepca_security.proxy.config.factory import make_store
from eoepca_security.proxy.config.settings import Address, Settings
from eoepca_security.proxy.config.variables import VARIABLES
from eoepca_security.session.session import Stored
from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import set_environment
from tests.support.network import RawServer, free_port, http, replies, says_nothing
from tests.support.service import Service
from tests.support.tls import write_certificate

ORDER = ["settings", "store", "listener", "discovery", "clock", "client", "token", "audience", "upstream"]


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture
def service(issuer: FakeIssuer) -> Iterator[Service]:
    with Service(issuer) as service:
        yield service


@pytest.fixture
def settings(issuer: FakeIssuer, service: Service) -> Settings:
    return Settings(issuer.url, Client("client"), refresh_token=issuer.refresh_token, upstream=service.url, port=0)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def run(settings: Settings, **more: Any) -> dict[str, Step]:
    steps = list(check(settings, **{"in_container": False, **more}))
    assert [step.name for step in steps] == ORDER
    for step in steps:
        assert (step.remedy is not None) == (step.status in ("unproven", "fault"))
        assert "\n" not in step.detail + (step.remedy or "")
    return {step.name: step for step in steps}


def remedy(settings: Settings, name: str, **more: Any) -> str:
    """Run the check and return the remedy of the one step that has a fault; those before are good."""
    steps = run(settings, **more)
    assert {step.name for step in steps.values() if step.status == "fault"} == {name}, steps
    before = ORDER[: ORDER.index(name)]
    assert all(steps[other].status in ("ok", "skipped") for other in before)
    return str(steps[name].remedy)


def answers(status: int, headers: dict[str, str], body: bytes = b"") -> type[Handler]:
    class Answering(Handler):
        def respond(self) -> None:
            self.answer(status, body, headers)

    return Answering


def with_and_without(status: int, other: int, location: str = "") -> type[Handler]:
    """Return a service that answers with `status` when there is a token, and with `other` when there is none."""

    class Deciding(Handler):
        def respond(self) -> None:
            has_token = self.headers.get("Authorization", "").startswith("Bearer ")
            self.answer(status if has_token else other, b"", {"Location": location} if location else {})

    return Deciding


def test_all_is_well(settings: Settings, service: Service) -> None:
    steps = run(replace(settings, audience="service", endpoint="/collections?f=json"))
    assert {step.status for step in steps.values()} == {"ok"}
    assert "alice (sub u-1)" in steps["token"].detail
    asked = [(seen.method, seen.target, seen.authorized, len(seen.authorization)) for seen in service.seen]
    assert asked == [("GET", "/collections?f=json", True, 1), ("GET", "/collections?f=json", False, 0)]


# --- the issuer ---


def test_a_wrong_realm_path(settings: Settings) -> None:
    said = remedy(replace(settings, issuer_url=settings.issuer_url.replace("/realms/", "/realm/")), "discovery")
    assert "/realms/<name>" in said
    assert "OPEN_ID_CONNECT_URL" in said


def test_an_issuer_with_another_name(settings: Settings) -> None:
    said = remedy(replace(settings, issuer_url=settings.issuer_url.replace("127.0.0.1", "localhost")), "discovery")
    assert "the issuer's name" in said
    assert "OPEN_ID_CONNECT_URL" in said


def test_https_where_http_is_spoken(settings: Settings) -> None:
    said = remedy(replace(settings, issuer_url=settings.issuer_url.replace("http:", "https:")), "discovery")
    assert "should it be http://?" in said


@pytest.mark.parametrize(
    "answer",
    [b"\x15\x03\x01\x00\x02\x02F", http(b"Client sent an HTTP request to an HTTPS server.", status=400)],
    ids=["alert", "words"],
)
def test_http_where_https_is_spoken(answer: bytes, settings: Settings) -> None:
    with RawServer(replies(answer)) as server:
        assert "should it be https://?" in remedy(replace(settings, issuer_url=server.url), "discovery")


def test_an_unknown_ca(settings: Settings, tmp_path: Path) -> None:
    with RawServer(says_nothing, write_certificate(tmp_path / "c.pem")) as server:
        assert "set TLS_CA_FILE" in remedy(replace(settings, issuer_url=server.url), "discovery")


def test_a_certificate_that_is_over(settings: Settings, tmp_path: Path) -> None:
    with RawServer(says_nothing, write_certificate(tmp_path / "c.pem", days=-1)) as server:
        settings = replace(settings, issuer_url=server.url, ca_file=tmp_path / "c.pem")
        assert "renew its certificate" in remedy(settings, "discovery")


def test_an_unknown_host(settings: Settings) -> None:
    said = remedy(replace(settings, issuer_url="https://issuer.invalid/realms/r"), "discovery")
    assert "check the host in OPEN_ID_CONNECT_URL" in said


def test_an_issuer_that_is_not_there(settings: Settings) -> None:
    settings = replace(settings, issuer_url=f"http://127.0.0.1:{free_port()}/realms/r")
    assert "check the host and port in OPEN_ID_CONNECT_URL" in remedy(settings, "discovery")


def test_dockers_localhost(settings: Settings) -> None:
    away = f"http://localhost:{free_port()}"
    said = remedy(replace(settings, issuer_url=f"{away}/realms/r"), "discovery", in_container=True)
    assert said.startswith("is it running? localhost is this container itself")
    assert "host.docker.internal" in said
    assert "OPEN_ID_CONNECT_URL" in said
    said = remedy(replace(settings, upstream=away), "upstream", in_container=True)
    assert "host.docker.internal" in said
    assert "REMOTE_PROTECTED_DOMAIN" in said


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "HTTP_PROXY"])
def test_a_proxy_in_the_way_that_wants_a_password(
    variable: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RawServer(replies(http(b"<html>who are you?", status=407))) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        scheme = variable.removesuffix("_PROXY").lower()
        settings = replace(settings, issuer_url=f"{scheme}://issuer.example/realms/r", allow_http=True)
        said = remedy(settings, "discovery")
    assert "user and password" in said
    assert "NO_PROXY" in said


def test_a_proxy_in_the_way_that_is_not_there(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    said = remedy(replace(settings, issuer_url="https://issuer.example/realms/r"), "discovery")
    assert "add issuer.example to NO_PROXY" in said


def test_a_proxy_in_the_way_that_looks_into_tls(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = write_certificate(tmp_path / "c.pem")

    def tunnel(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        context.wrap_socket(connection, server_side=True).close()

    with RawServer(tunnel) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        said = remedy(replace(settings, issuer_url="https://issuer.example/realms/r"), "discovery")
    assert "the proxy on the network path" in said
    assert "TLS_CA_FILE" in said


@pytest.mark.parametrize("status", [200, 403, 503])
def test_a_page_in_place_of_the_issuer(status: int, settings: Settings) -> None:
    with RawServer(replies(http(b"<!DOCTYPE html><h1>Welcome to our Wi-Fi", status=status))) as server:
        said = remedy(replace(settings, issuer_url=server.url), "discovery")
    assert "login page" in said
    assert "NO_PROXY" in said


def test_a_redirect(settings: Settings) -> None:
    with RawServer(replies(http(b"", "Location: https://elsewhere.example/", status=301))) as server:
        said = remedy(replace(settings, issuer_url=server.url), "discovery")
    assert "set OPEN_ID_CONNECT_URL to the address that it redirects to" in said


def test_an_issuer_in_trouble(settings: Settings) -> None:
    with RawServer(replies(http(b"{}", status=503))) as server:
        assert "try again later" in remedy(replace(settings, issuer_url=server.url), "discovery")


@pytest.mark.parametrize(("offset", "says"), [(120, r"1[12]\d s behind"), (-3600, r"(3[56]\d\d) s ahead of")])
def test_a_clock_that_is_off(offset: float, says: str, settings: Settings, issuer: FakeIssuer) -> None:
    issuer.behaviour.clock_offset = offset
    steps = run(settings)
    assert steps["clock"].status == "fault"
    assert "timedatectl" in str(steps["clock"].remedy)
    assert re.search(says, steps["clock"].detail)
    assert steps["token"].remedy in (None, "correct the clock first")


def test_a_clock_that_could_not_be_compared_is_skipped_and_stops_nothing(
    settings: Settings, issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "date_time_string", lambda *_: "yesterday")
    steps = run(settings)
    assert (steps["clock"].status, steps["clock"].detail) == (
        "skipped",
        "not compared, because the issuer's answers have no date",
    )
    assert steps["upstream"].status == "ok"


# --- the client ---


def with_client(settings: Settings, **members: Any) -> Settings:
    return replace(settings, client=replace(settings.client, **members))


def test_a_wrong_client_secret(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.client_secret = "right"
    said = remedy(with_client(settings, secret="wrong-secret"), "client")
    assert "copy OPEN_ID_CONNECT_CLIENT_SECRET from the issuer" in said
    assert "wrong-secret" not in str(run(with_client(settings, secret="wrong-secret")))


def test_a_public_client_that_was_sent_a_secret(settings: Settings) -> None:
    said = remedy(with_client(settings, secret="needless"), "client")
    assert "public" in said
    assert "unset OPEN_ID_CONNECT_CLIENT_SECRET" in said


def test_a_confidential_client_without_its_secret(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.client_secret = "secret"
    assert "set OPEN_ID_CONNECT_CLIENT_SECRET" in remedy(settings, "client")


def test_an_unknown_client(settings: Settings) -> None:
    assert "check OPEN_ID_CONNECT_CLIENT_ID" in remedy(with_client(settings, client_id="unknown"), "client")


def test_a_way_to_authenticate_that_the_issuer_does_not_offer(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.behaviour.auth_methods = ("private_key_jwt",)
    assert "OPEN_ID_CONNECT_CLIENT_AUTH" in remedy(with_client(settings, secret="s"), "client")


def test_a_client_that_is_registered_for_another_method(settings: Settings, issuer: FakeIssuer) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST" and "Authorization" in handler.headers:
            handler.answer(401, {"error": "invalid_client"})
            return True
        return False

    issuer.behaviour.fault = fault
    issuer.client_secret = "right"
    issuer.behaviour.auth_methods = ("client_secret_basic", "client_secret_post")
    assert "set OPEN_ID_CONNECT_CLIENT_AUTH=client_secret_post" in remedy(
        with_client(settings, secret="right"), "client"
    )


def test_a_client_may_not_use_the_grant(issuer: FakeIssuer, settings: Settings) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST":
            handler.answer(401, {"error": "unauthorized_client"})
        return handler.command == "POST"

    issuer.behaviour.fault = fault
    settings = replace(with_client(settings, secret="s"), grant="client_credentials", refresh_token=None)
    assert "Service accounts" in remedy(settings, "client")


# --- the token ---


def test_no_session_yet(settings: Settings, issuer: FakeIssuer) -> None:
    said = remedy(replace(settings, refresh_token=None), "token")
    assert "oidc-proxy login" in said
    # The client was looked at all the same.
    issuer.client_secret = "secret"
    assert "OPEN_ID_CONNECT_CLIENT_SECRET" in remedy(replace(settings, refresh_token=None), "client")


def refresh_token_of(issuer: FakeIssuer, **claims: Any) -> str:
    return issuer.sign({"azp": "client", "iss": issuer.url, "typ": "Refresh", **claims})


def test_a_refresh_token_of_another_client(settings: Settings, issuer: FakeIssuer) -> None:
    token = refresh_token_of(issuer, azp="other-client")
    said = remedy(replace(settings, refresh_token=token), "token")
    assert "the refresh token was issued to the client other-client: set OPEN_ID_CONNECT_CLIENT_ID" in said


def test_a_refresh_token_of_another_client_as_the_issuer_says_it(settings: Settings, issuer: FakeIssuer) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST":
            handler.read_body()
            said = "Invalid refresh token. Token client and authorized client don't match"
            handler.answer(400, {"error": "invalid_grant", "error_description": said})
        return handler.command == "POST"

    issuer.behaviour.fault = fault
    assert "the refresh token may belong to another client: check OPEN_ID_CONNECT_CLIENT_ID" in remedy(
        settings, "token"
    )


def test_a_refresh_token_of_another_issuer(settings: Settings, issuer: FakeIssuer) -> None:
    token = refresh_token_of(issuer, iss="https://other.example/realms/r")
    said = remedy(replace(settings, refresh_token=token), "token")
    assert "issued by https://other.example/realms/r: set OPEN_ID_CONNECT_URL" in said


def test_a_session_that_a_person_has_to_confirm(settings: Settings, issuer: FakeIssuer) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST":
            handler.answer(400, {"error": "interaction_required"})
        return handler.command == "POST"

    issuer.behaviour.fault = fault
    assert "oidc-proxy login" in remedy(settings, "token")


@pytest.mark.parametrize("exp", [-(10**14), -(10**400)])
def test_a_session_whose_end_no_calendar_has(settings: Settings, issuer: FakeIssuer, exp: int) -> None:
    said = remedy(replace(settings, refresh_token=refresh_token_of(issuer, exp=exp)), "token")
    assert "the refresh token expired at 1970" in said


def test_an_expired_session(settings: Settings, issuer: FakeIssuer) -> None:
    token = refresh_token_of(issuer, exp=int(time.time()) - 86_400)
    said = remedy(replace(settings, refresh_token=token), "token")
    assert "the refresh token expired at 20" in said
    assert "oidc-proxy login" in said


def test_a_session_that_was_logged_out(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.end_sessions()
    said = remedy(settings, "token")
    assert "the session has ended" in said
    assert "oidc-proxy login" in said


def test_scopes_that_may_not_be_asked_for(settings: Settings, issuer: FakeIssuer) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST":
            handler.answer(400, {"error": "invalid_scope"})
        return handler.command == "POST"

    issuer.behaviour.fault = fault
    assert "OPEN_ID_CONNECT_SCOPE" in remedy(replace(settings, scope="x"), "token")


def test_no_token_is_lost_to_a_check(settings: Settings, issuer: FakeIssuer, tmp_path: Path) -> None:
    issuer.behaviour.refresh_tokens = "rotate"
    kept = replace(settings, token_store=tmp_path)
    for _ in range(2):
        assert all(step.status == "ok" for step in run(kept).values())
    assert issuer.reuses == 0
    in_memory = run(replace(settings, refresh_token=issuer.new_session()))
    assert in_memory["token"].status == "ok"
    assert "warning: the issuer replaced the refresh token" in in_memory["token"].detail


def test_a_stored_session_is_used(settings: Settings, issuer: FakeIssuer, tmp_path: Path) -> None:
    settings = replace(settings, refresh_token=None, token_store=tmp_path)
    store = make_store(settings)
    assert store is not None
    with store.locked():
        store.write(Stored(issuer.refresh_token))
    steps = run(settings)
    assert all(step.status == "ok" for step in steps.values())
    assert str(store.place) in steps["store"].detail


def log_in(settings: Settings, refresh_token: str) -> Path:
    store = make_store(replace(settings, refresh_token=None))
    assert store is not None
    with store.locked():
        store.write(Stored(refresh_token))
    return store.place


def test_a_login_that_took_over_is_told(settings: Settings, issuer: FakeIssuer, tmp_path: Path) -> None:
    settings = replace(settings, token_store=tmp_path)
    assert run(settings)["token"].status == "ok"
    issuer.end_sessions()
    place = log_in(settings, issuer.new_session())
    for says in ("found a session in ", f"found a login in {place}, which took over from OPEN_ID_REFRESH_TOKEN"):
        steps = run(settings)
        assert says in steps["store"].detail
        assert steps["token"].detail.endswith(", from the stored login: the issuer rejected OPEN_ID_REFRESH_TOKEN")
        assert steps["upstream"].status == "ok"


def test_a_login_of_another_user_is_told_and_not_used(settings: Settings, issuer: FakeIssuer, tmp_path: Path) -> None:
    settings = replace(settings, token_store=tmp_path)
    run(settings)
    issuer.end_sessions()
    issuer.behaviour.claims |= {"sub": "u-2", "preferred_username": "bob"}
    log_in(settings, issuer.new_session())
    steps = run(settings)
    assert (steps["token"].status, "another user, bob (sub u-2)" in steps["token"].detail) == ("fault", True)
    assert "or unset that to continue as the other one" in str(steps["token"].remedy)


def test_an_access_token_alone(settings: Settings, issuer: FakeIssuer) -> None:
    settings = replace(settings, refresh_token=None)
    steps = run(replace(settings, access_token=issuer.issue()))
    assert steps["upstream"].status == "ok"
    # Nobody has asked the issuer about the client.
    assert (steps["client"].status, "OPEN_ID_AUTH_TOKEN" in steps["client"].detail) == ("skipped", True)
    assert issuer.requests == []
    issuer.behaviour.lifetime = -60
    assert "timedatectl" in remedy(replace(settings, access_token=issuer.issue()), "token")


# --- the audience ---


def test_an_audience_that_is_not_in_the_token(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.behaviour.claims["aud"] = ["account", "other"]
    steps = run(replace(settings, audience="ogc-api"))
    assert (steps["audience"].status, steps["upstream"].status) == ("fault", "skipped")
    assert "account, other" in steps["audience"].detail
    assert "Included Custom Audience" in str(steps["audience"].remedy)
    assert "client-dedicated" in str(steps["audience"].remedy)
    assert "ogc-api" in str(steps["audience"].remedy)


def test_a_token_that_is_bound_to_a_key(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.behaviour.claims["cnf"] = {"jkt": "x"}
    steps = run(replace(settings, audience="service"))
    assert (steps["audience"].status, steps["upstream"].status) == ("fault", "skipped")
    assert "bound to a key" in steps["audience"].detail
    assert "DPoP" in str(steps["audience"].remedy)


def test_a_token_that_only_the_service_can_read(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.behaviour.opaque = True
    steps = run(replace(settings, audience="service"))
    assert (steps["audience"].status, steps["upstream"].status) == ("skipped", "ok")
    assert run(settings)["audience"].status == "ok"


# --- the protected service ---


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (401, {"WWW-Authenticate": 'Bearer error="invalid_token"'}, "which is for service"),
        (401, {"WWW-Authenticate": 'Basic realm="x"'}, "does not use Bearer tokens"),
        (403, {"WWW-Authenticate": 'Bearer error="insufficient_scope", scope="write"'}, "so that the token has write"),
        (401, {}, "which is for service"),
        (403, {}, "ask its operator for the role"),
        (
            302,
            {"Location": "https://kc.example/realms/r/protocol/openid-connect/auth?response_type=code"},
            "bearer_only",
        ),
        (503, {}, "see its log"),
    ],
)
def test_a_service_that_refuses_the_token(status: int, headers: dict[str, str], says: str, settings: Settings) -> None:
    with LocalServer(answers(status, headers)) as server:
        assert says in remedy(replace(settings, upstream=server.url), "upstream")


def test_a_service_that_repeats_the_token_in_its_refusal(settings: Settings, issuer: FakeIssuer) -> None:
    class Echo(Handler):
        def respond(self) -> None:
            given = self.headers["Authorization"].removeprefix("Bearer ")
            said = f'Bearer error="invalid_token", error_description="bad: {given}"'
            self.answer(401, {}, {"WWW-Authenticate": said})

    issuer.behaviour.opaque = True
    with LocalServer(Echo) as server:
        step = run(replace(settings, upstream=server.url))["upstream"]
    assert 'error="invalid_token"' in step.detail
    assert "opaque-" not in step.detail


@pytest.mark.parametrize(
    ("status", "other", "location"),
    [
        (200, 401, ""),
        (204, 403, ""),
        (200, 302, "https://kc.example/realms/r/protocol/openid-connect/auth?response_type=code"),
        (200, 303, "/users/sign_in"),
        (200, 302, "/accounts/login/?next=/"),
    ],
)
def test_a_service_that_lets_only_the_token_in_took_it(
    status: int, other: int, location: str, settings: Settings
) -> None:
    with LocalServer(with_and_without(status, other, location)) as server:
        step = run(replace(settings, upstream=server.url))["upstream"]
    assert (step.status, step.detail) == (
        "ok",
        f"{server.url}/ answered {status} with the token and {other} without it",
    )


@pytest.mark.parametrize(
    ("status", "other", "path"),
    [
        (200, 200, "needs a login"),
        (200, 404, "needs a login"),
        (200, 302, "needs a login"),
        (302, 302, "needs a login and does not redirect"),
        (301, 401, "needs a login and does not redirect"),
        (404, 404, "exists and needs a login"),
        (404, 401, "exists and needs a login"),
        (405, 401, "needs a login and answers GET with 200"),
        (429, 429, "needs a login and answers GET with 200"),
    ],
)
def test_an_answer_that_shows_nothing_about_the_token_is_unproven(
    status: int, other: int, path: str, settings: Settings
) -> None:
    with LocalServer(with_and_without(status, other, "/catalogue")) as server:
        step = run(replace(settings, upstream=server.url))["upstream"]
    assert (step.status, step.remedy) == ("unproven", f"set REMOTE_PROTECTED_ENDPOINT to a path that {path}")
    assert "shows nothing about the token" in step.detail
    assert (f"{status} (to /catalogue)" in step.detail) == (300 <= status < 400)


@pytest.mark.parametrize(("other", "says"), [(401, "knows the user"), (403, "also refuses this without a token")])
def test_a_forbidden_path_is_laid_on_the_user_only_where_the_token_makes_a_difference(
    other: int, says: str, settings: Settings
) -> None:
    with LocalServer(with_and_without(403, other)) as server:
        assert says in remedy(replace(settings, upstream=server.url), "upstream")


def test_a_service_that_hangs_up_without_a_token_proves_nothing(settings: Settings) -> None:
    class HangsUp(Handler):
        def respond(self) -> None:
            if "Authorization" in self.headers:
                self.answer(200, b"")
            else:
                self.close_connection = True

    with LocalServer(HangsUp) as server:
        step = run(replace(settings, upstream=server.url))["upstream"]
    assert (step.status, step.remedy) == ("unproven", "try again")
    assert "answered 200 with the token, but a request without it failed: " in step.detail


def test_a_redirect_shows_where_it_leads_without_what_is_secret(settings: Settings) -> None:
    location = "https://user:pass@kc.example:8443/auth?response_type=code&state=secret"
    with LocalServer(answers(302, {"Location": location})) as server:
        step = run(replace(settings, upstream=server.url))["upstream"]
    assert "answered 302 (to https://kc.example:8443) with the token" in step.detail
    assert "pass" not in step.detail


def test_an_issuer_that_does_not_say_whether_it_accepts_the_client(settings: Settings, issuer: FakeIssuer) -> None:
    def fault(handler: Handler) -> bool:
        if handler.command == "POST":
            handler.answer(500, {})
        return handler.command == "POST"

    issuer.behaviour.fault = fault
    steps = run(replace(settings, refresh_token=None))
    assert (steps["client"].status, steps["token"].status) == ("unproven", "fault")
    assert "oidc-proxy login" in str(steps["client"].remedy)


def test_a_service_with_an_unknown_ca(settings: Settings, tmp_path: Path) -> None:
    script = replies(http(b"ok"))
    with RawServer(script, write_certificate(tmp_path / "c.pem")) as server:
        settings = replace(settings, upstream=f"https://127.0.0.1:{server.port}")
        assert "set TLS_CA_FILE" in remedy(settings, "upstream")
        for trusting in (replace(settings, ca_file=tmp_path / "c.pem"), replace(settings, tls_no_verify=True)):
            assert "answered 200 with the token" in run(trusting)["upstream"].detail


def test_a_service_with_the_wrong_scheme(settings: Settings, service: Service, tmp_path: Path) -> None:
    said = remedy(replace(settings, upstream=service.url.replace("http:", "https:")), "upstream")
    assert "should it be http://?" in said
    with RawServer(replies(http(b"The plain HTTP request was sent to HTTPS port", status=400))) as server:
        said = remedy(replace(settings, upstream=f"http://127.0.0.1:{server.port}"), "upstream")
    assert "should it be https://?" in said


def test_a_service_that_is_not_there(settings: Settings) -> None:
    said = remedy(replace(settings, upstream=f"http://127.0.0.1:{free_port()}"), "upstream")
    assert said == "is it running? If not, start it; otherwise check the host and port in REMOTE_PROTECTED_DOMAIN"


def test_a_service_that_does_not_answer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_steps, "UPSTREAM_TIMEOUT", 0.2)
    with RawServer(says_nothing) as server:
        said = remedy(replace(settings, upstream=f"http://127.0.0.1:{server.port}"), "upstream")
    assert "firewalls" in said


# --- this machine ---


def test_a_port_that_is_taken(settings: Settings) -> None:
    with RawServer(replies(http(b"something else"))) as server:
        steps = run(replace(settings, port=server.port))
    assert "set PROXY_PORT to another port" in remedy_of(steps, "listener")


def test_the_admin_listeners_port_that_is_taken_is_a_fault_only_where_it_was_set(settings: Settings) -> None:
    free = Address("127.0.0.1", free_port())
    assert run(replace(settings, admin=free))["listener"].detail == f"127.0.0.1:0 is free; admin: {free} is free"
    with RawServer(replies(http(b"something else"), http(b"something else"))) as server:
        taken = Address("127.0.0.1", server.port)
        steps = run(replace(settings, admin=taken, admin_is_set=True))
        assert f"{taken} (Address already in use)" in steps["listener"].detail
        assert (
            remedy_of(steps, "listener")
            == "stop the program that uses it, or set PROXY_ADMIN to another address, or off"
        )
        step = run(replace(settings, admin=taken))["listener"]
    assert step.status == "ok"
    assert "there will be no admin listener: cannot listen on" in step.detail


def test_an_admin_address_of_another_machine(settings: Settings) -> None:
    steps = run(replace(settings, admin=Address("203.0.113.7", 0), admin_is_set=True))
    assert "change PROXY_ADMIN" in remedy_of(steps, "listener")


def remedy_of(steps: dict[str, Step], name: str) -> str:
    assert steps[name].status == "fault"
    return str(steps[name].remedy)


def test_a_port_that_a_proxy_of_ours_has(settings: Settings) -> None:
    with LocalServer(answers(403, {"X-OIDC-Proxy-Error": "host_not_allowed"})) as server:
        step = run(replace(settings, port=server.port))["listener"]
    assert step.status == "ok"
    assert "OIDC proxy" in step.detail


def test_an_address_of_another_machine(settings: Settings) -> None:
    assert "change PROXY_HOST" in remedy_of(run(replace(settings, host="203.0.113.7")), "listener")


def test_a_store_that_cannot_be_written(settings: Settings, issuer: FakeIssuer, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file, not a folder")
    steps = run(replace(settings, token_store=tmp_path / "store"))
    assert "set OPEN_ID_TOKEN_STORE to a folder that this user can write to" in remedy_of(steps, "store")
    # A refresh token that may be valid once is not used up when its successor cannot be kept.
    assert [steps[name].status for name in ("discovery", "client", "token", "upstream")] == [
        "ok",
        "skipped",
        "skipped",
        "skipped",
    ]
    assert issuer.requests == []


# --- the command ---


@pytest.fixture
def environment(
    issuer: FakeIssuer, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.env, raising=False)

    def set_(**more: str) -> None:
        set_environment(monkeypatch, issuer, REMOTE_PROTECTED_DOMAIN=service.url, PROXY_PORT="0", **more)

    set_()
    return set_


def test_a_line_each_and_0(environment: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[:2] for line in out.splitlines()] == [[name, "ok"] for name in ORDER]
    assert "\x1b" not in out


def test_a_fault_has_its_remedy_on_its_line_and_1(
    environment: Callable[..., None], issuer: FakeIssuer, capsys: pytest.CaptureFixture[str]
) -> None:
    issuer.end_sessions()
    assert main(["check"]) == 1
    out, _ = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["token"].split()[1] == "fault"
    assert "; remedy: the session has ended" in lines["token"]
    assert lines["upstream"].split()[1] == "skipped"
    assert issuer.refresh_token not in out


def test_a_login_that_took_over_is_told_once(
    environment: Callable[..., None],
    issuer: FakeIssuer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    issuer.behaviour.login.interval = 0.1
    environment(OPEN_ID_TOKEN_STORE=str(tmp_path / "store"), OPEN_ID_REFRESH_TOKEN="")
    assert main(["login"]) == 0
    environment(OPEN_ID_TOKEN_STORE=str(tmp_path / "store"), OPEN_ID_REFRESH_TOKEN="rejected")
    assert main(["check"]) == 0
    assert "from the stored login: the issuer rejected OPEN_ID_REFRESH_TOKEN" in capsys.readouterr().out
    assert caplog.text == ""


def test_json(environment: Callable[..., None], issuer: FakeIssuer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert [step["name"] for step in found["steps"]] == ORDER
    issuer.end_sessions()
    assert main(["check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert {step["status"] for step in found["steps"]} == {"ok", "fault", "skipped"}


def test_what_is_unproven_is_a_warning_and_an_error_where_that_is_wanted(
    environment: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "--strict"]) == 0
    with LocalServer(answers(404, {})) as server:
        monkeypatch.setenv("REMOTE_PROTECTED_DOMAIN", server.url)
        capsys.readouterr()
        for arguments, code in (([], 0), (["--strict"], 1), (["--json"], 0), (["--json", "--strict"], 1)):
            assert main(["check", *arguments]) == code
            out = capsys.readouterr().out
            if "--json" not in arguments:
                assert out.splitlines()[-1].split()[:2] == ["upstream", "unproven"]
                assert out.endswith("; remedy: set REMOTE_PROTECTED_ENDPOINT to a path that exists and needs a login\n")
                continue
            found = json.loads(out)
            assert (found["ok"], found["steps"][-1]["status"]) == (code == 0, "unproven")


def test_bad_settings_are_2_with_every_problem_on_its_line(
    environment: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    environment(OPEN_ID_CONNECT_URL="http://issuer.example/realms/r")
    for arguments in (["check"], ["check", "--json"]):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert line.startswith("OPEN_ID_CONNECT_URL: must use https://")
    assert json.loads(out)["steps"][0]["status"] == "fault"


def test_a_path_in_the_services_url_is_2(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMOTE_PROTECTED_DOMAIN", "https://service.example/collections")
    assert main(["check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("REMOTE_PROTECTED_DOMAIN: must be only scheme, host and port")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("collections", None),
        ("/collections?f=json", "/collections?f=json"),
        ("http://localhost:8080/collections#x", "/collections"),
        ("https://service.example", "/"),
        ("", "/"),
    ],
)
def test_the_endpoint_is_asked_of_the_service_whatever_host_it_names(
    value: str,
    path: str | None,
    environment: Callable[..., None],
    service: Service,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment(REMOTE_PROTECTED_ENDPOINT=value)
    assert main(["check"]) == (2 if path is None else 0)
    assert {seen.target for seen in service.seen} == (set() if path is None else {path})
    assert path is not None or capsys.readouterr().err.startswith("REMOTE_PROTECTED_ENDPOINT: ")
