"""What `check` finds out about several services behind one login."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.cli import check_services
from eoepca_security.proxy.cli.check import check
from eoepca_security.proxy.cli.check_report import report
from eoepca_security.proxy.cli.main import main
from eoepca_security.proxy.cli.steps import Step
from eoepca_security.proxy.config.factory import make_store
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.session.session import Stored
from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import set_environment
from tests.support.network import RawServer, free_port, replies
from tests.support.tls import write_certificate

SCOPE = "openid offline_access data:read geo:read"
OF_LOGIN = ["settings", "store", "listener", "discovery", "clock", "client", "token"]


class Protected:
    """A service that wants a token in any header, and writes down what reaches it."""

    def __init__(self, issuer: FakeIssuer) -> None:
        self.targets: list[str] = []
        self.sent: list[str] = []
        protected = self

        class ProtectedHandler(Handler):
            def respond(self) -> None:
                value = self.headers.get("Authorization") or self.headers.get("X-Token") or ""
                protected.targets.append(self.path)
                protected.sent += [value] if value else []
                token = value.rpartition(" ")[2].rpartition("/")[2]
                self.answer(200 if issuer.accepts(token) or token.startswith("ey") else 401, b"")

        self.server = LocalServer(ProtectedHandler)
        self.url = self.server.url


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(Behaviour(refresh_tokens="rotate", scope=SCOPE)) as issuer:
        yield issuer


@pytest.fixture
def protected(issuer: FakeIssuer) -> Iterator[Protected]:
    protected = Protected(issuer)
    with protected.server:
        yield protected


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def settings(issuer: FakeIssuer, protected: Protected, tmp_path: Path) -> Settings:
    """Return settings with a service of each kind, and a session that knows its scope."""
    stac = Service("stac", protected.url, "/stac", token="exchange", audience="stac-api", header="X-Token")
    services = (
        replace(stac, format="oidc/{token}"),
        Service("data", protected.url, "/data", token="scope", scope="data:read"),
        Service("geo", protected.url, "/geo", token="scope", scope="geo:read"),
        Service("tiles", protected.url, "/tiles", token="resource", resource="urn:tiles"),
        Service("plain", protected.url, "/plain"),
    )
    settings = Settings(
        issuer.url,
        Client("client"),
        refresh_token=issuer.refresh_token,
        token_store=tmp_path / "store",
        services_file=tmp_path / "services.toml",
        services=services,
        endpoint="/me?f=json",
        port=0,
    )
    store = make_store(settings)
    assert store is not None
    with store.locked():
        store.write(Stored(issuer.refresh_token, scope=SCOPE))
    return settings


def run(settings: Settings) -> dict[str, Step]:
    steps = list(check(settings, in_container=False))
    kinds = ("token", "audience", "upstream")
    expected = OF_LOGIN + [f"{kind}:{service.name}" for service in settings.services for kind in kinds]
    assert [step.name for step in steps if step.name != "scope"] == expected
    for step in steps:
        assert (step.remedy is not None) == (step.status in ("unproven", "fault"))
        assert "\n" not in step.detail + (step.remedy or "")
    return {step.name: step for step in steps}


def wrong(steps: dict[str, Step]) -> dict[str, str]:
    return {step.name: step.status for step in steps.values() if step.status != "ok"}


def only(settings: Settings, *names: str, **changes: object) -> Settings:
    """Leave only these services, the first of them with changes."""
    services = [service for service in settings.services if service.name in names]
    first = replace(services[0], **changes)  # type: ignore[arg-type]
    return replace(settings, services=(first, *services[1:]))


def test_all_is_well(settings: Settings, issuer: FakeIssuer, protected: Protected) -> None:
    steps = run(settings)
    assert wrong(steps) == {}
    assert steps["settings"].detail.endswith(", 5 services")
    assert steps["token:stac"].detail.startswith("by exchange, for alice (sub u-1), valid for ")
    assert steps["token:data"].detail.startswith("for the scope data:read, for alice")
    assert steps["audience:stac"].detail == "the token is for stac-api"
    assert steps["audience:tiles"].detail == "the token is for urn:tiles"
    assert "[service.plain] audience is not set" in steps["audience:plain"].detail
    assert steps["upstream:stac"].detail == (
        f"{protected.url}/stac/me?f=json answered 200 with the token and 401 without it"
    )
    assert sorted(protected.targets) == sorted([f"/{s.name}/me?f=json" for s in settings.services] * 2)
    assert sum(value.startswith("oidc/ey") for value in protected.sent) == 1
    assert sum(value.startswith("Bearer ey") for value in protected.sent) == 4
    assert issuer.reuses == 0


def test_the_session_lives_on_afterwards(settings: Settings, issuer: FakeIssuer) -> None:
    for _ in range(2):
        assert wrong(run(settings)) == {}
    store = make_store(settings)
    assert store is not None
    stored = store.read()
    assert stored is not None
    assert stored.scope == SCOPE
    assert issuer.reuses == 0


def test_without_a_store_each_refresh_token_is_used_once(settings: Settings, issuer: FakeIssuer) -> None:
    steps = run(replace(settings, token_store=None, scope=SCOPE))
    assert wrong(steps) == {}
    assert "may be used up" in steps["token"].detail
    assert issuer.reuses == 0


def test_the_fault_of_a_service_stops_only_its_own_steps(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.behaviour.exchange = False
    plain = replace(settings.services[4], upstream=f"http://127.0.0.1:{free_port()}")
    steps = run(replace(settings, services=(*settings.services[:4], plain)))
    assert wrong(steps) == {
        "token:stac": "fault",
        "audience:stac": "skipped",
        "upstream:stac": "skipped",
        "upstream:plain": "fault",
    }
    assert "Standard Token Exchange" in str(steps["token:stac"].remedy)
    assert steps["audience:stac"].detail == "not tried, because of token:stac"
    assert "check the host and port in [service.plain] url" in str(steps["upstream:plain"].remedy)


def test_a_wrong_audience_names_the_mapper_and_the_services_own_setting(settings: Settings, issuer: FakeIssuer) -> None:
    steps = run(only(settings, "plain", audience="plain-api"))
    assert wrong(steps) == {"audience:plain": "fault", "upstream:plain": "skipped"}
    assert "it is for service" in steps["audience:plain"].detail
    assert "Included Custom Audience" in str(steps["audience:plain"].remedy)
    assert "set [service.plain] audience" in str(steps["audience:plain"].remedy)
    issuer.behaviour.fault = other_audience(issuer)
    steps = run(only(settings, "stac"))
    assert "with stac-api as Included Client Audience" in str(steps["audience:stac"].remedy)


def other_audience(issuer: FakeIssuer) -> Callable[[Handler], bool]:
    def fault(handler: Handler) -> bool:
        if not handler.path.endswith("/token"):
            return False
        body = handler.read_body()
        status, answer = issuer.answer_token_request(None, body)
        if b"token-exchange" in body:
            answer["access_token"] = issuer.issue(aud="another")
        handler.answer(status, answer)
        return True

    return fault


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (401, {}, "and set [service.data] audience accordingly"),
        (403, {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}, "set [service.data] scope so that"),
        (302, {"Location": "/login"}, "or set [service.data] url to the service itself"),
    ],
)
def test_a_service_that_refuses_names_its_own_settings(
    status: int, headers: dict[str, str], says: str, settings: Settings
) -> None:
    class Refusing(Handler):
        def respond(self) -> None:
            self.answer(status, b"", headers)

    with LocalServer(Refusing) as server:
        steps = run(only(settings, "data", upstream=server.url))
    assert says in str(steps["upstream:data"].remedy)


def test_a_login_without_an_id_token_is_to_ask_for_openid(settings: Settings, protected: Protected) -> None:
    steps = run(only(settings, "plain", credential="id_token"))
    assert steps["token:plain"].status == "fault"
    assert "run `oidc-proxy login`, which asks for openid" in str(steps["token:plain"].remedy)
    assert protected.targets == []


def test_a_service_with_a_ca_of_its_own(settings: Settings, tmp_path: Path) -> None:
    context, _ = (write_certificate(tmp_path / f"{name}.pem") for name in ("own", "other"))
    with RawServer(replies(b"HTTP/1.1 204 No Content\r\n\r\n"), context) as server:
        for service, says in (
            ({"ca_file": tmp_path / "own.pem"}, "204 with the token"),
            ({"tls_no_verify": True}, "204 with the token"),
            ({"ca_file": tmp_path / "other.pem"}, "set [service.plain] ca_file to"),
            ({}, "set [service.plain] ca_file to"),
        ):
            step = run(only(settings, "plain", upstream=server.url, **service))["upstream:plain"]
            assert says in f"{step.detail} {step.remedy}"


# --- scopes ----------------------------------------------------------------------------------------------------------


def test_an_issuer_that_gives_scopes_again(settings: Settings, issuer: FakeIssuer) -> None:
    step = run(only(settings, "data", "geo"))["scope"]
    assert step.detail == "after a refresh for data:read, the issuer gives all scopes of the login again"
    narrow, wide = [request.form.get("scope") for request in issuer.requests[-2:]]
    assert narrow == "data:read openid offline_access"
    assert wide == SCOPE


def test_an_issuer_that_refuses_to_give_scopes_again_costs_no_session(settings: Settings, issuer: FakeIssuer) -> None:
    issuer.behaviour.widens = False
    settings = only(settings, "data", "plain")
    step = run(settings)["scope"]
    assert (step.status, "the issuer refuses the login's scopes" in step.detail) == ("unproven", True)
    assert "set another `token` for data" in str(step.remedy)
    assert issuer.reuses == 0
    steps = run(settings)
    assert "invalid_scope" in steps["token"].detail  # and not that the session has ended
    assert "set another `token` for data" in str(steps["token"].remedy)


def test_an_issuer_that_silently_keeps_scopes_back(settings: Settings, issuer: FakeIssuer) -> None:
    answer_token_request, last = issuer.answer_token_request, [0]

    def fault(handler: Handler) -> bool:
        if not handler.path.endswith("/token"):
            return False
        body = handler.read_body()
        last[0] += b"data%3Aread+openid" in body
        status, answer = answer_token_request(None, body)
        if last[0]:
            answer["access_token"] = issuer.issue(scope="openid data:read")
        handler.answer(status, answer)
        return True

    issuer.behaviour.fault = fault
    step = run(only(settings, "data"))["scope"]
    assert (step.status, step.detail) == (
        "unproven",
        "after a refresh for data:read, the login's token is without geo:read",
    )


def test_a_login_without_the_scopes_of_services(settings: Settings, issuer: FakeIssuer) -> None:
    store = make_store(settings)
    assert store is not None
    with store.locked():
        store.write(Stored(issuer.refresh_token, scope="openid data:read"))
    issuer.behaviour.scope = "openid data:read"
    steps = run(settings)
    assert "the login is without geo:read" in steps["scope"].detail
    assert "run `oidc-proxy login`, which asks for them" in str(steps["scope"].remedy)
    assert "[service.geo] scope" in str(steps["token:geo"].remedy)
    assert steps["token:data"].status == "ok"


def test_without_narrower_scopes_there_is_no_such_step(settings: Settings) -> None:
    assert "scope" not in run(only(settings, "plain", "tiles"))


# --- limits ----------------------------------------------------------------------------------------------------------


def test_services_are_looked_at_several_at_a_time_and_shown_in_their_order(
    settings: Settings, issuer: FakeIssuer
) -> None:
    barrier = threading.Barrier(check_services.AT_ONCE, timeout=10)
    together: list[int] = []

    class Waiting(Handler):
        def respond(self) -> None:
            if self.headers.get("Authorization"):
                together.append(barrier.wait())
            self.answer(200 if self.headers.get("Authorization") else 401, b"")

    with LocalServer(Waiting) as server:
        services = tuple(
            Service(f"s{number}", server.url, f"/{number}") for number in range(2 * check_services.AT_ONCE)
        )
        assert wrong(run(replace(settings, services=services))) == {}
    assert len(together) == len(services)


def test_all_services_together_have_a_limit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_services, "TOTAL", 0.3)
    release = threading.Event()

    class Hanging(Handler):
        def respond(self) -> None:
            release.wait(20)
            self.answer(200, b"")

    with LocalServer(Hanging) as server:
        started_at = time.monotonic()
        steps = run(only(settings, "plain", upstream=server.url))
        took = time.monotonic() - started_at
        release.set()
    assert "all services together took over 0.3 s" in steps["upstream:plain"].detail
    assert took < 5


def test_without_a_token_no_service_is_tried(
    settings: Settings, issuer: FakeIssuer, protected: Protected, capsys: pytest.CaptureFixture[str]
) -> None:
    issuer.end_sessions()
    steps = run(settings)
    assert {step.detail for name, step in steps.items() if ":" in name} == {"not tried, because of token"}
    assert protected.targets == []
    assert report(check(settings, in_container=False), as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:] == [f"{s.name:<10} skipped  not tried, because of token" for s in settings.services]


def test_a_service_whose_port_is_taken(settings: Settings, protected: Protected) -> None:
    port = int(protected.url.rpartition(":")[2])
    steps = run(only(settings, "plain", port=port))
    assert wrong(steps) == {"listener": "fault"}
    assert "set [service.plain] port to another one" in str(steps["listener"].remedy)


def test_an_access_token_alone_serves_those_who_share_it(settings: Settings, issuer: FakeIssuer) -> None:
    settings = replace(settings, refresh_token=None, access_token=issuer.issue(), token_store=None)
    steps = run(settings)
    assert {name for name in wrong(steps) if name.startswith("token:")} == {"token:data", "token:geo", "token:tiles"}
    assert steps["upstream:stac"].status == steps["upstream:plain"].status == "ok"


# --- output ----------------------------------------------------------------------------------------------------------


def test_a_service_that_works_is_one_line_and_another_one_only_what_is_wrong(
    settings: Settings, issuer: FakeIssuer, protected: Protected, capsys: pytest.CaptureFixture[str]
) -> None:
    issuer.behaviour.exchange = False
    assert report(check(settings, in_container=False), as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()[len(OF_LOGIN) :]
    assert [line.split()[:2] for line in lines] == [
        ["token:stac", "fault"],
        ["data", "ok"],
        ["geo", "ok"],
        ["tiles", "ok"],
        ["plain", "ok"],
        ["scope", "ok"],
    ]
    assert lines[3] == (
        "tiles      ok       for the resource urn:tiles; answered 200 with the token and 401 without it"
    )


def test_the_command(
    issuer: FakeIssuer,
    protected: Protected,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "services.toml").write_text(
        f"""
        [service.stac]
        url = "{protected.url}/stac"
        token = "exchange"
        audience = "stac-api"
        [service.a-rather-long-name]
        url = "{protected.url}/other"
        """
    )
    monkeypatch.chdir(tmp_path)
    more = {"PROXY_PORT": str(free_port()), "OPEN_ID_TOKEN_STORE": str(tmp_path / "store")}
    set_environment(monkeypatch, issuer, REMOTE_PROTECTED_DOMAIN=protected.url, **more)
    arguments = ["check", "--json", "--strict", "--services", "services.toml"]
    assert main(arguments) == 0
    found = json.loads(capfd.readouterr().out)
    services = ("default", "stac", "a-rather-long-name")
    names = [f"{kind}:{name}" for name in services for kind in ("token", "audience", "upstream")]
    assert [step["name"] for step in found["steps"]] == OF_LOGIN + names
    assert found["steps"][7].keys() == {"name", "status", "detail", "remedy"}
    assert main([argument for argument in arguments if argument != "--json"]) == 0
    assert f"\n{'a-rather-long-name':<18} ok       the login's token; answered 200" in capfd.readouterr().out
    issuer.behaviour.exchange = False
    assert main(arguments) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["ok"] is False
    assert err == ""  # the steps say it all
