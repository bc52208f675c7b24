"""Logging in and out, as the command line does it, with an issuer that lets everybody in."""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eoepca_security.errors import CredentialsRejected
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.cli import login as login_module
from eoepca_security.proxy.cli.login import by_device
from eoepca_security.proxy.cli.main import main
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.factory import make_provider, make_store
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.config.variables import VARIABLES
from eoepca_security.session.session import Stored
from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.clock import Clock
from tests.support.environment import set_environment
from tests.support.waiting import eventually

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer() as issuer:
        issuer.behaviour.login.interval = 0.01
        yield issuer


@pytest.fixture
def run(issuer: FakeIssuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with settings that have no refresh token; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.env, raising=False)
    no_session = {"OPEN_ID_REFRESH_TOKEN": "", "OPEN_ID_TOKEN_STORE": str(tmp_path / "store")}

    def run(*arguments: str, **more: str) -> tuple[int, str, str]:
        set_environment(monkeypatch, issuer, **{**no_session, **more})
        code = main(arguments, Command())
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[httpx.Response]]:
    """What the browser saw; it is a thread that follows redirects."""
    seen: list[httpx.Response] = []
    threads: list[threading.Thread] = []

    def visit(url: str) -> None:
        seen.append(httpx.get(url, follow_redirects=True, trust_env=False))

    def open_browser(url: str) -> bool:
        threads.append(threading.Thread(target=visit, args=(url,)))
        threads[-1].start()
        return True

    monkeypatch.setattr("webbrowser.open", open_browser)
    yield seen
    for thread in threads:
        thread.join()


def stored(issuer: FakeIssuer, folder: Path, origin: str | None = None) -> Stored | None:
    settings = Settings(issuer.url, Client(issuer.client_id), refresh_token=origin, token_store=folder / "store")
    store = make_store(settings)
    assert store is not None
    return store.read()


def test_a_device_login_shows_code_and_place_and_keeps_the_session(
    run: Run, issuer: FakeIssuer, tmp_path: Path
) -> None:
    code, out, err = run("login")
    assert (code, err) == (0, "")
    for part in (f"{issuer.url}/device?user_code=WDJB-MJHT", "WDJB-MJHT", "Logged in as alice (sub u-1)"):
        assert part in out
    session = stored(issuer, tmp_path)
    assert session is not None
    assert str(tmp_path / "store") in out
    assert "To start one, run `oidc-proxy serve`." in out
    assert session.refresh_token not in out
    (seen,) = issuer.logins.seen
    assert (seen["client_id"], seen["scope"]) == ("client", "openid offline_access")
    code, token, _ = run("token")
    assert code == 0
    assert issuer.accepts(token.strip())


def test_other_scopes(run: Run, issuer: FakeIssuer) -> None:
    assert run("login", OPEN_ID_CONNECT_SCOPE="openid read")[0] == 0
    assert run("login", "--scope", "profile")[0] == 0
    assert [seen["scope"] for seen in issuer.logins.seen] == ["openid offline_access read", "profile"]


SERVICES = """
    [service.stac]
    url = "https://stac.example"
    token = "resource"
    resource = "https://stac.example"
    scope = "stac:read"
    [service.data]
    url = "https://data.example"
    token = "scope"
    scope = "data:read stac:read"
    [service.geo]
    url = "https://geo.example"
    token = "resource"
    resource = "urn:geo"
    [service.tiles]
    url = "https://tiles.example"
    token = "exchange"
    audience = "tiles"
    scope = "tiles:read"
    [service.ids]
    url = "https://ids.example"
    credential = "id_token"
    """


@pytest.mark.parametrize("arguments", [("login",), ("login", "--browser")])
def test_a_login_is_for_what_services_will_ask_for(
    arguments: tuple[str, ...], run: Run, issuer: FakeIssuer, tmp_path: Path, visits: list[httpx.Response]
) -> None:
    (tmp_path / "services.toml").write_text(SERVICES)
    code, out, err = run(*arguments, "--services", "services.toml")
    assert (code, err) == (0, "")
    assert "Logged in as alice (sub u-1) for stac, data, geo, tiles, ids.\n" in out
    (seen,) = issuer.logins.seen
    assert seen["scope"] == "openid offline_access stac:read data:read"
    assert seen["resource"] == "https://stac.example urn:geo"
    session = stored(issuer, tmp_path)
    assert session is not None
    assert session.scope == seen["scope"]


@pytest.mark.parametrize(
    ("arguments", "more", "name"),
    [(("--scope", "openid data:read"), {}, "--scope"), ((), {"OPEN_ID_CONNECT_SCOPE": "data:read"}, "_CONNECT_SCOPE")],
)
def test_scopes_that_were_chosen_stay_and_what_services_miss_is_told(
    arguments: tuple[str, ...], more: dict[str, str], name: str, run: Run, issuer: FakeIssuer, tmp_path: Path
) -> None:
    (tmp_path / "services.toml").write_text(SERVICES)
    code, _, err = run("login", *arguments, PROXY_SERVICES="services.toml", **more)
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith("warning: the login is without stac:read, which services want: add it to ")
    assert line.endswith(name)
    assert "stac:read" not in issuer.logins.seen[0]["scope"]
    code, _, err = run("login", "--scope", "stac:read data:read", PROXY_SERVICES="services.toml")
    assert "without openid, which" in err


def test_the_scope_that_the_issuer_granted_is_kept(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    issuer.behaviour.scope = "openid"
    assert run("login")[0] == 0
    session = stored(issuer, tmp_path)
    assert session is not None
    assert session.scope == "openid"


def test_a_refused_resource_names_the_file(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    (tmp_path / "services.toml").write_text(SERVICES)
    issuer.behaviour.login.polls = ["invalid_target"]
    code, _, err = run("login", PROXY_SERVICES="services.toml")
    assert code == 1
    assert "each `resource` in services.toml" in err


def test_a_login_belongs_to_the_settings_it_was_made_with(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    assert run("login", OPEN_ID_REFRESH_TOKEN="used-up")[0] == 0
    assert stored(issuer, tmp_path) is None
    assert stored(issuer, tmp_path, origin="used-up") is not None
    assert run("token", OPEN_ID_REFRESH_TOKEN="used-up")[0] == 0
    assert run("token")[0] == 2


def test_a_login_comes_after_whatever_a_killed_process_left(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    assert run("login")[0] == 0
    (file,) = (tmp_path / "store").glob("*.json")
    before = stored(issuer, tmp_path)
    file.with_suffix(".next").write_bytes(file.read_bytes().replace(b'"serial": 1', b'"serial": 7'))
    assert run("login")[0] == 0
    after = stored(issuer, tmp_path)
    assert before is not None
    assert after is not None
    assert after.refresh_token != before.refresh_token


def test_a_session_that_ends_is_kept_with_its_end(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    issuer.behaviour.refresh_expires_in = 1800
    assert run("login")[0] == 0
    session = stored(issuer, tmp_path)
    assert session is not None
    assert session.session_ends_at is not None
    assert session.session_ends_at - issuer.now() == pytest.approx(1800, abs=30)


def test_a_confidential_client_proves_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visits: list[httpx.Response]
) -> None:
    with FakeIssuer(client_secret="s:%") as issuer:
        issuer.behaviour.login.interval = 0.01
        set_environment(monkeypatch, issuer, OPEN_ID_TOKEN_STORE=str(tmp_path))
        assert main(["login"]) == 0
        assert main(["login", "--browser"]) == 0
        assert main(["logout"]) == 0
        assert {seen.method for seen in issuer.requests} == {"client_secret_basic"}
        assert len(issuer.revoked) == 1


def poll(issuer: FakeIssuer, clock: Clock) -> None:
    settings = Settings(issuer.url, Client(issuer.client_id))
    by_device(make_provider(settings), "openid", sleep=clock.sleep, now=clock)


def test_polls_keep_the_default_pace_and_slow_down(issuer: FakeIssuer) -> None:
    issuer.behaviour.login.interval = None
    issuer.behaviour.login.polls = ["authorization_pending", "slow_down", "authorization_pending"]
    clock = Clock()
    poll(issuer, clock)
    assert clock.slept == [5, 5, 10, 10]


def test_polls_become_rare_while_the_issuer_is_in_trouble(issuer: FakeIssuer) -> None:
    troubles = [503, 503]

    def fault(handler: Handler) -> bool:
        if handler.path.endswith("/token") and troubles:
            handler.answer(troubles.pop(), {}, {"Retry-After": "17"} if troubles else {})
            return True
        return False

    issuer.behaviour.login.interval = None
    issuer.behaviour.fault = fault
    clock = Clock()
    poll(issuer, clock)
    assert clock.slept == [5, 17, 34]


def test_a_login_that_nobody_confirms_ends_with_its_time(issuer: FakeIssuer) -> None:
    issuer.behaviour.login.polls = ["authorization_pending"] * 100
    issuer.behaviour.login.interval = None
    issuer.behaviour.login.expires_in = 60
    clock = Clock()
    with pytest.raises(CredentialsRejected, match="nobody confirmed"):
        poll(issuer, clock)
    assert clock.slept == [5] * 11


@pytest.mark.parametrize(
    ("error", "says"), [("access_denied", "the login was denied"), ("expired_token", "in time: log in again")]
)
def test_a_device_login_that_fails_says_why(error: str, says: str, run: Run, issuer: FakeIssuer) -> None:
    issuer.behaviour.login.polls = ["authorization_pending", error]
    code, _, err = run("login")
    assert (code, len(err.splitlines())) == (1, 1)
    assert error in err
    assert says in err


def test_without_device_logins_the_other_way_is_named(run: Run, issuer: FakeIssuer) -> None:
    issuer.behaviour.login.without = ["device_authorization_endpoint"]
    code, _, err = run("login")
    assert code == 1
    assert "login --browser" in err


def test_a_login_without_a_refresh_token_is_none(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    issuer.behaviour.login.refresh_token = False
    code, _, err = run("login")
    assert code == 1
    assert "--scope" in err
    assert stored(issuer, tmp_path) is None


def test_a_forged_id_token_is_refused(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    issuer.behaviour.login.id_claims = {"aud": "another-client"}
    code, _, err = run("login")
    assert (code, err) == (1, "token_invalid: the ID token is for another client\n")
    assert stored(issuer, tmp_path) is None


# --- by browser ---


def test_a_login_by_browser_ends_with_a_page_and_a_session(
    run: Run, issuer: FakeIssuer, tmp_path: Path, visits: list[httpx.Response]
) -> None:
    code, out, err = run("login", "--browser")
    assert (code, err) == (0, "")
    assert "Logged in as alice (sub u-1)" in out
    session = stored(issuer, tmp_path)
    assert session is not None
    assert session.refresh_token not in out
    (query,) = issuer.logins.seen
    assert query["redirect_uri"].startswith("http://127.0.0.1:")
    assert (query["code_challenge_method"], query["scope"], query["prompt"]) == (
        "S256",
        "openid offline_access",
        "consent",
    )
    assert len({query["state"], query["nonce"], query["code_challenge"]}) == 3
    assert not any(query[name] in out for name in ("state", "nonce", "code_challenge"))
    eventually_seen(visits)
    (page,) = visits
    assert page.status_code == 200
    assert "You are logged in" in page.text
    assert "alice (sub u-1)" in page.text


def test_the_browser_and_the_terminal_get_addresses_that_tell_nothing(
    run: Run, issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(login_module.by_browser, "__kwdefaults__", {"timeout": 0.2})
    _, out, _ = run("login", "--browser")
    (printed,) = re.findall(r"^  (http\S+)$", out, re.MULTILINE)
    (address,) = opened
    assert printed != address
    for url in (printed, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/login/[\w-]+", url)
    assert "ssh" not in out


def test_over_ssh_the_way_to_this_machine_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda _url: False)
    monkeypatch.setattr(login_module.by_browser, "__kwdefaults__", {"timeout": 0.05})
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.1 50000 192.0.2.2 22")
    _, out, _ = run("login", "--browser")
    (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)/login/", out)
    assert f"ssh -N -L {port}:127.0.0.1:{port} THIS-MACHINE" in out


def test_the_browser_comes_back_to_the_port_that_was_asked_for(
    run: Run, issuer: FakeIssuer, visits: list[httpx.Response]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("login", "--browser", "--port", str(port))
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert err.startswith(f"--port: cannot listen on 127.0.0.1:{port}: ")
        assert issuer.logins.seen == []
    assert run("login", "--browser", "--port", str(port))[0] == 0
    (query,) = issuer.logins.seen
    assert query["redirect_uri"] == f"http://127.0.0.1:{port}/callback"


def test_a_port_is_for_browsers(run: Run) -> None:
    code, out, err = run("login", "--port", "8765")
    assert (code, out) == (2, "")
    assert "--port needs --browser" in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"iss": "https://evil.example"}, "from another issuer"),
        ({"iss": None}, "from another issuer"),
        ({"error": "access_denied", "code": None}, "the login was denied"),
        ({"error": "server_error", "error_description": "<b>x</b>", "code": None}, "server_error"),
        ({"code": None}, "without a code"),
        ({"code": "stolen"}, "invalid_grant"),
    ],
)
def test_a_redirect_that_is_not_right_gives_no_session(
    change: dict[str, str | None],
    says: str,
    run: Run,
    issuer: FakeIssuer,
    tmp_path: Path,
    visits: list[httpx.Response],
) -> None:
    issuer.behaviour.login.redirect = change
    code, _, err = run("login", "--browser")
    assert (code, len(err.splitlines())) == (1, 1)
    assert says in err
    assert stored(issuer, tmp_path) is None
    eventually_seen(visits)
    assert visits[0].status_code == 400
    assert "Login failed" in visits[0].text


def eventually_seen(visits: list[httpx.Response]) -> None:
    eventually(lambda: bool(visits))
    assert len(visits) == 1


def test_an_issuer_that_does_not_name_itself_need_not(
    run: Run, issuer: FakeIssuer, visits: list[httpx.Response]
) -> None:
    issuer.behaviour.login.without = ["authorization_response_iss_parameter_supported"]
    issuer.behaviour.login.redirect = {"iss": None}
    assert run("login", "--browser")[0] == 0
    issuer.behaviour.login.redirect = {"iss": "https://evil.example"}
    assert run("login", "--browser")[0] == 1


@pytest.mark.parametrize("id_claims", [{"nonce": "another"}, {"aud": "another"}, {"iss": "https://evil.example"}, None])
def test_an_id_token_of_another_login_gives_no_session(
    id_claims: dict[str, Any] | None,
    run: Run,
    issuer: FakeIssuer,
    tmp_path: Path,
    visits: list[httpx.Response],
) -> None:
    issuer.behaviour.login.id_claims = id_claims
    code, _, err = run("login", "--browser")
    assert code == 1
    assert "token_invalid" in err
    assert stored(issuer, tmp_path) is None


def test_a_browser_that_does_not_come_back_is_not_waited_for_for_ever(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda _url: False)
    monkeypatch.setattr(login_module.by_browser, "__kwdefaults__", {"timeout": 0.05})
    code, _, err = run("login", "--browser")
    assert code == 1
    assert re.search(r"nothing came back to http://127\.0\.0\.1:\d+/callback within .* redirect URI", err)


def test_a_login_by_browser_says_how_long_it_waits(run: Run, visits: list[httpx.Response]) -> None:
    assert "Waiting for the browser, at most 5 min" in run("login", "--browser")[1]


def test_without_an_authorization_endpoint_the_other_way_is_named(run: Run, issuer: FakeIssuer) -> None:
    issuer.behaviour.login.without = ["authorization_endpoint"]
    code, _, err = run("login", "--browser")
    assert code == 1
    assert "run `oidc-proxy login`\n" in err


# --- where there is nothing to log in to ---


@pytest.mark.parametrize(
    ("more", "variable"),
    [
        ({"OPEN_ID_TOKEN_STORE": "none"}, "OPEN_ID_TOKEN_STORE"),
        (
            {"OPEN_ID_CONNECT_GRANT": "client_credentials", "OPEN_ID_CONNECT_CLIENT_SECRET": "s"},
            "OPEN_ID_CONNECT_GRANT",
        ),
    ],
)
def test_settings_that_a_login_makes_no_sense_with(
    more: dict[str, str], variable: str, run: Run, issuer: FakeIssuer
) -> None:
    code, out, err = run("login", **more)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"{variable}: ")
    assert issuer.fetches.total() == 0


def test_a_store_that_cannot_be_used_is_told_of_before_the_login(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file, not a folder")
    code, _, err = run("login")
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.startswith("OPEN_ID_TOKEN_STORE: ")
    assert issuer.fetches.total() == 0


# --- out ---


def test_logout_ends_the_session_there_and_here(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    run("login")
    session = stored(issuer, tmp_path)
    assert session is not None
    code, out, err = run("logout")
    assert (code, err) == (0, "")
    assert "The issuer has ended the session" in out
    assert issuer.revoked == [session.refresh_token]
    assert stored(issuer, tmp_path) is None
    assert session.refresh_token not in out
    assert run("logout")[:2] == (
        0,
        f"There is no session for these settings in {tmp_path / 'store'}: there is nothing to do.\n",
    )


def test_logout_of_what_a_token_in_the_settings_grew_into(run: Run, issuer: FakeIssuer) -> None:
    issuer.behaviour.refresh_tokens = "rotate"
    origin = issuer.refresh_token
    assert run("token", OPEN_ID_REFRESH_TOKEN=origin)[0] == 0
    code, out, _ = run("logout", OPEN_ID_REFRESH_TOKEN=origin)
    assert code == 0
    assert "OPEN_ID_REFRESH_TOKEN is still set" in out
    assert issuer.revoked != [origin]
    assert run("token", OPEN_ID_REFRESH_TOKEN=origin)[0] == 1


def test_logout_tells_of_the_login_that_would_take_over(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    origin = issuer.refresh_token
    assert run("token", OPEN_ID_REFRESH_TOKEN=origin)[0] == 0
    assert run("login")[0] == 0
    code, out, _ = run("logout", OPEN_ID_REFRESH_TOKEN=origin)
    assert (code, "takes over when the issuer rejects it" in out) == (0, True)
    assert "unset OPEN_ID_REFRESH_TOKEN and log out again" in out
    # It does.
    code, token, err = run("token", OPEN_ID_REFRESH_TOKEN=origin)
    assert (code, issuer.accepts(token.strip())) == (0, True), err
    assert run("logout")[0] == 0
    assert run("token", OPEN_ID_REFRESH_TOKEN=origin)[0] == 1


def test_logout_forgets_even_when_the_issuer_refuses(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    def fault(handler: Handler) -> bool:
        if handler.path.endswith("/revoke"):
            handler.answer(400, {"error": "unsupported_token_type"})
            return True
        return False

    run("login")
    issuer.behaviour.fault = fault
    code, out, err = run("logout")
    assert code == 1
    assert "unsupported_token_type" in err
    assert "removed here" in out
    assert stored(issuer, tmp_path) is None


def test_logout_without_revocation_says_so(run: Run, issuer: FakeIssuer, tmp_path: Path) -> None:
    run("login")
    issuer.behaviour.login.without = ["revocation_endpoint"]
    code, out, _ = run("logout")
    assert code == 0
    assert "RFC 7009" in out
    assert stored(issuer, tmp_path) is None


def test_logout_where_nothing_is_kept(run: Run) -> None:
    code, out, _ = run("logout", OPEN_ID_TOKEN_STORE="none")
    assert code == 0
    assert "nothing to do" in out
