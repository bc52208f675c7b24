"""What `check` prints in the situations that people meet, word for word: read it aloud before you change it."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.cli.check import check
from eoepca_security.proxy.cli.check_report import report
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.network import RawServer, free_port, says_nothing
from tests.support.service import Service
from tests.support.tls import write_certificate

LOGIN_PAGE = "https://login.example/realms/x/protocol/openid-connect/auth?response_type=code"

# What is printed when all is well; a situation has only the lines that differ. ISSUER, SERVICE and FOLDER are replaced.
RIGHT = {
    "settings": "ok       client my-client, issuer ISSUER, service SERVICE",
    "store": "ok       no session yet in FOLDER",
    "listener": "ok       127.0.0.1:0 is free",
    "discovery": "ok       issuer ISSUER",
    "clock": "ok       agrees with the issuer's clock",
    "client": "ok       the issuer accepts my-client (client_secret_basic)",
    "token": "ok       for alice (sub u-1), valid for 3600 s",
    "audience": "ok       the token is for service",
    "upstream": "ok       SERVICE/ answered 200 with the token and 401 without it",
}


def skipped(cause: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"skipped  not tried, because of {cause}")


AFTER_DISCOVERY = skipped("discovery", "clock", "client", "token", "audience", "upstream")
AFTER_CLIENT = skipped("client", "token", "audience", "upstream")
AFTER_TOKEN = skipped("token", "audience", "upstream")


@dataclass
class World:
    """What `check` finds: the settings, and the issuer and the service as they are."""

    settings: Settings
    issuer: FakeIssuer
    folder: Path
    in_container: bool = False
    answer: Callable[[bool], tuple[int, dict[str, str]]] | None = None
    """The service's status and headers for a request with a token, or without."""

    def set(self, **changes: object) -> None:
        self.settings = replace(self.settings, **changes)  # type: ignore[arg-type]


def nothing(world: World) -> None:
    """Leave all as it is."""


def wrong_realm(world: World) -> None:
    world.set(issuer_url=f"{world.issuer.url}-2")


def wrong_client(world: World) -> None:
    world.set(client=Client("other-client", "right"))


def wrong_secret(world: World) -> None:
    world.set(client=Client("my-client", "wrong"))


def no_secret(world: World) -> None:
    world.set(client=Client("my-client"))


def expired_session(world: World) -> None:
    end = int(time.time()) - 86_400
    world.set(refresh_token=world.issuer.sign({"azp": "my-client", "iss": world.issuer.url, "exp": end}))


def ended_session(world: World) -> None:
    world.issuer.end_sessions()


def no_session(world: World) -> None:
    world.set(refresh_token=None)


def service_down(world: World) -> None:
    world.set(upstream=f"http://127.0.0.1:{free_port()}")


def service_down_in_container(world: World) -> None:
    world.set(upstream=f"http://localhost:{free_port()}")
    world.in_container = True


def issuer_in_unknown_container(world: World) -> None:
    world.set(issuer_url="http://no-such-keycloak:8080/realms/x", allow_http=True)


def open_service(world: World) -> None:
    world.answer = lambda _has_token: (200, {})


def not_found(world: World) -> None:
    world.answer = lambda has_token: (404 if has_token else 401, {})


def redirects(world: World) -> None:
    world.answer = lambda _has_token: (307, {"Location": "/catalogue/"})


def login_page(world: World) -> None:
    world.answer = lambda _has_token: (302, {"Location": LOGIN_PAGE})


def login_page_without_token(world: World) -> None:
    world.answer = lambda has_token: (200, {}) if has_token else (302, {"Location": LOGIN_PAGE})


def refused_token(world: World) -> None:
    world.answer = lambda _has_token: (401, {"WWW-Authenticate": 'Bearer error="invalid_token"'})


def other_audience(world: World) -> None:
    world.issuer.behaviour.claims["aud"] = "account"


def clock_ahead(world: World) -> None:
    world.issuer.behaviour.clock_offset = -7200


LOGIN = "run `oidc-proxy login`"

SITUATIONS: Mapping[Callable[[World], None], dict[str, str]] = {
    nothing: {},
    wrong_realm: AFTER_DISCOVERY
    | {
        "discovery": "fault    ISSUER/.well-known/openid-configuration answered 404; remedy: check the path in "
        "OPEN_ID_CONNECT_URL: Keycloak uses /realms/<name>, or /auth/realms/<name> before version 17"
    },
    wrong_client: AFTER_CLIENT
    | {
        "settings": "ok       client other-client, issuer ISSUER, service SERVICE",
        "client": "fault    the issuer answered invalid_client: client_secret_basic was not accepted; remedy: copy "
        "OPEN_ID_CONNECT_CLIENT_SECRET from the issuer again (Keycloak: Clients > other-client > Credentials), check "
        "OPEN_ID_CONNECT_CLIENT_ID, and set OPEN_ID_CONNECT_CLIENT_AUTH=client_secret_post if the client is registered "
        "for that",
    },
    wrong_secret: AFTER_CLIENT
    | {
        "client": "fault    the issuer answered invalid_client: client_secret_basic was not accepted; remedy: copy "
        "OPEN_ID_CONNECT_CLIENT_SECRET from the issuer again (Keycloak: Clients > my-client > Credentials), check "
        "OPEN_ID_CONNECT_CLIENT_ID, and set OPEN_ID_CONNECT_CLIENT_AUTH=client_secret_post if the client is registered "
        "for that",
    },
    no_secret: AFTER_CLIENT
    | {
        "client": "fault    the issuer answered invalid_client: the client must authenticate; remedy: check "
        "OPEN_ID_CONNECT_CLIENT_ID; if the client is confidential (Keycloak: Client authentication is on), set "
        "OPEN_ID_CONNECT_CLIENT_SECRET",
    },
    expired_session: AFTER_TOKEN
    | {
        "token": "fault    the issuer answered invalid_grant: Token is not active; remedy: the refresh token expired "
        f"at DATE UTC: {LOGIN}"
    },
    ended_session: AFTER_TOKEN
    | {
        "token": "fault    the issuer answered invalid_grant: Token is not active; remedy: the session has ended, was "
        f"logged out, or was used up by another program: {LOGIN}"
    },
    no_session: AFTER_TOKEN
    | {
        "token": f"fault    there is no session yet; remedy: {LOGIN}, or set OPEN_ID_REFRESH_TOKEN to the refresh "
        "token of a login"
    },
    service_down: {
        "upstream": "fault    SERVICE cannot be reached: the connection was refused; remedy: is it running? If not, "
        "start it; otherwise check the host and port in REMOTE_PROTECTED_DOMAIN"
    },
    service_down_in_container: {
        "upstream": "fault    SERVICE cannot be reached: the connection was refused; remedy: is it running? localhost "
        "is this container itself: to reach another container, set REMOTE_PROTECTED_DOMAIN to that one's name; to "
        "reach the host, to host.docker.internal (on Linux with --add-host host.docker.internal:host-gateway)"
    },
    issuer_in_unknown_container: AFTER_DISCOVERY
    | {
        "discovery": "fault    ISSUER/.well-known/openid-configuration cannot be reached: its host name is unknown; "
        "remedy: check the host in OPEN_ID_CONNECT_URL; if it is a container's name, only containers on the same "
        "network know it; if only a proxy can resolve it, set HTTPS_PROXY"
    },
    open_service: {
        "upstream": "unproven SERVICE/ answered 200 with the token and without it, which shows nothing about the "
        "token; remedy: set REMOTE_PROTECTED_ENDPOINT to a path that needs a login"
    },
    not_found: {
        "upstream": "unproven SERVICE/ answered 404 with the token and 401 without it, which shows nothing about the "
        "token; remedy: set REMOTE_PROTECTED_ENDPOINT to a path that exists and needs a login"
    },
    redirects: {
        "upstream": "unproven SERVICE/ answered 307 (to /catalogue/) with the token and without it, which shows "
        "nothing about the token; remedy: set REMOTE_PROTECTED_ENDPOINT to a path that needs a login and does not "
        "redirect"
    },
    login_page: {
        "upstream": "fault    SERVICE/ answered 302 (to https://login.example) with the token; remedy: the gateway "
        "redirects to a login page instead of accepting tokens: let it accept Bearer tokens (APISIX's openid-connect: "
        "bearer_only), or set REMOTE_PROTECTED_DOMAIN to the service itself"
    },
    login_page_without_token: {"upstream": "ok       SERVICE/ answered 200 with the token and 302 without it"},
    refused_token: {
        "upstream": 'fault    SERVICE/ answered 401 (Bearer error="invalid_token") with the token; remedy: the service '
        "does not accept the token, which is for service: compare with the issuer and audience that the service "
        "expects, and set OPEN_ID_CONNECT_AUDIENCE accordingly"
    },
    other_audience: {
        "audience": "fault    the token is not for the audience service (it is for account); remedy: add it to this "
        "client's tokens at the issuer (Keycloak: Clients > my-client > Client scopes > my-client-dedicated > Add "
        "mapper > By configuration > Audience, with service as Included Custom Audience and Add to access token on), "
        "or set OPEN_ID_CONNECT_AUDIENCE to the audience that the service expects"
    }
    | skipped("audience", "upstream"),
    clock_ahead: AFTER_TOKEN
    | {
        "clock": "fault    this machine's clock is 7200 s ahead of the issuer's; remedy: synchronize this machine's "
        "clock (`timedatectl set-ntp true`), or have the issuer's clock corrected",
        "token": "fault    the access token has already expired; remedy: correct the clock first",
    },
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    issuer = FakeIssuer(client_id="my-client", client_secret="right")
    issuer.behaviour.lifetime = 3600.5
    settings = Settings(
        issuer.url,
        Client("my-client", "right"),
        audience="service",
        refresh_token=issuer.refresh_token,
        token_store=tmp_path,
        port=0,
    )
    return World(settings, issuer, tmp_path)


def printed(world: World, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Run `check` and return what follows the name on each of its lines."""
    report(check(world.settings, in_container=world.in_container), as_json=False)
    out = capsys.readouterr().out
    for name, value in (
        ("ISSUER", world.settings.issuer_url),
        ("SERVICE", str(world.settings.upstream)),
        ("FOLDER", str(world.folder)),
    ):
        out = out.replace(value, name)
    out = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", out)
    # Whole seconds may pass on the way.
    out = re.sub(r"valid for 3(599|600|601) s", "valid for 3600 s", out)
    out = re.sub(r"7(199|20[01]) s", "7200 s", out)
    lines = (line.partition(" ") for line in out.splitlines())
    return {name: said.lstrip() for name, _, said in lines}


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_what_is_printed(situation: Callable[[World], None], world: World, capsys: pytest.CaptureFixture[str]) -> None:
    class Answering(Handler):
        def respond(self) -> None:
            assert world.answer is not None
            status, headers = world.answer("Authorization" in self.headers)
            self.answer(status, b"", headers)

    with world.issuer, Service(world.issuer) as service, LocalServer(Answering) as other:
        world.set(upstream=service.url)
        situation(world)
        if world.answer is not None:
            world.set(upstream=other.url)
        assert printed(world, capsys) == RIGHT | SITUATIONS[situation]


@pytest.mark.parametrize("variable", ["OPEN_ID_CONNECT_URL", "REMOTE_PROTECTED_DOMAIN"])
def test_a_self_signed_certificate(
    variable: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        world.issuer,
        Service(world.issuer) as service,
        RawServer(says_nothing, write_certificate(tmp_path / "c.pem")) as server,
    ):
        world.set(upstream=service.url)
        says = (
            "cannot be reached: its certificate is not trusted (self-signed certificate); remedy: set TLS_CA_FILE to a "
            "PEM file with the CA that signed it"
        )
        if variable == "OPEN_ID_CONNECT_URL":
            world.set(issuer_url=server.url)
            expected = AFTER_DISCOVERY | {"discovery": f"fault    ISSUER/.well-known/openid-configuration {says}"}
        else:
            world.set(upstream=server.url)
            expected = {"upstream": f"fault    SERVICE {says}"}
        assert printed(world, capsys) == RIGHT | expected
