"""What to do about an error, in settings and commands, and that only the proxy speaks of those."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

import eoepca_security
from eoepca_security.errors import Cause, CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.proxy.config.variables import UPSTREAM
from eoepca_security.proxy.policy.remedies import (
    Place,
    command_remedy,
    exchange_remedy,
    failure_remedy,
    login_remedy,
    network_remedy,
    told,
)

SETTINGS = Settings("https://issuer.example/realms/x", Client("c", "hush-hush"), audience="service")
PACKAGE = Path(eoepca_security.__file__).parent


def rejected(issuer_error: str) -> CredentialsRejected:
    return CredentialsRejected(f"the issuer answered {issuer_error}", issuer_error=issuer_error)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (rejected("invalid_grant"), "run `oidc-proxy login`"),
        (rejected("invalid_grant"), "expired, was revoked or used up"),
        (rejected("invalid_grant"), "OPEN_ID_REFRESH_TOKEN"),
        (rejected("interaction_required"), "run `oidc-proxy login`"),
        (rejected("bad_refresh_token"), "run `oidc-proxy login`"),
        (rejected("invalid_client"), "set OPEN_ID_CONNECT_CLIENT_AUTH=client_secret_post"),
        (CredentialsRejected("x", cause="no_session"), "run `oidc-proxy login`"),
        (CredentialsRejected("x", cause="no_session"), "OPEN_ID_REFRESH_TOKEN"),
        (rejected("invalid_client"), "OPEN_ID_CONNECT_CLIENT_SECRET"),
        (rejected("invalid_client"), "OPEN_ID_CONNECT_CLIENT_ID"),
        (rejected("invalid_client"), "OPEN_ID_CONNECT_CLIENT_AUTH"),
        (rejected("invalid_client"), "if the client is public, unset OPEN_ID_CONNECT_CLIENT_SECRET"),
        (rejected("unauthorized_client"), "OPEN_ID_CONNECT_CLIENT_SECRET"),
        (rejected("unauthorized_client"), "OPEN_ID_CONNECT_GRANT"),
        (rejected("unsupported_grant_type"), "OPEN_ID_CONNECT_GRANT"),
        (rejected("invalid_scope"), "OPEN_ID_CONNECT_SCOPE"),
        (rejected("invalid_request"), "settings"),
        (rejected("invalid_target"), "settings"),
        (rejected("access_denied"), "settings"),
        (CredentialsRejected("x", cause="no_auth_method"), "OPEN_ID_CONNECT_CLIENT_AUTH"),
        (TokenInvalid("x", claim="aud"), "OPEN_ID_CONNECT_AUDIENCE"),
        (TokenInvalid("x", claim="aud"), "Included Custom Audience"),
        (TokenInvalid("x", claim="cnf"), "turn off DPoP-bound"),
        (TokenInvalid("x", cause="clock"), "timedatectl"),
        (TokenInvalid("x"), "the client's settings at the issuer"),
        (
            IssuerUnavailable("x", cause="not_there"),
            "check the path in OPEN_ID_CONNECT_URL: Keycloak uses /realms/",
        ),
        (IssuerUnavailable("x", cause="other_issuer"), "set OPEN_ID_CONNECT_URL to the issuer's name"),
        (IssuerUnavailable("x", cause="other_issuer"), "if this address is right, set OPEN_ID_CONNECT_ISSUER"),
        (
            IssuerUnavailable(
                "x", cause="other_issuer", url="https://a/.well-known/openid-configuration?p=B2C_1_login"
            ),
            "followed by /.well-known/openid-configuration?p=B2C_1_login",
        ),
        (IssuerUnavailable("x", cause="plain_http"), "OPEN_ID_CONNECT_DANGEROUSLY_ALLOW_HTTP"),
        (IssuerUnavailable("x", cause="redirect"), "set OPEN_ID_CONNECT_URL"),
        (IssuerUnavailable("x", cause="environment"), "fix or unset that variable"),
        (IssuerUnavailable("x", cause="unclear_refusal"), "OPEN_ID_CONNECT_CLIENT_SECRET"),
        (IssuerUnavailable("x", cause="unclear_refusal"), "oidc-proxy login"),
        (IssuerUnavailable("x", cause="unknown_ca"), "set TLS_CA_FILE"),
        (IssuerUnavailable("x", cause="no_tls"), "should it be http://?"),
        (IssuerUnavailable("x", cause="ended", url="http://issuer.example/token"), "should it be https://?"),
        (
            IssuerUnavailable("x", cause="refused", url="https://token.example/t", by_proxy=True),
            "add token.example to",
        ),
        (IssuerUnavailable("x"), "later"),
    ],
)
def test_each_error_has_its_remedy(error: TokenError, remedy: str) -> None:
    said = command_remedy(error, SETTINGS, in_container=False)
    assert remedy in said
    assert "hush-hush" not in said
    assert "retries automatically" not in said
    running = failure_remedy(error, SETTINGS, in_container=False)
    assert remedy in running.replace("automatically; if the error persists", "later")
    assert ("retries automatically" in running) == isinstance(error, IssuerUnavailable)


def test_a_public_client_is_not_told_of_its_secret() -> None:
    settings = replace(SETTINGS, client=Client("c"))
    assert "set OPEN_ID_CONNECT_CLIENT_SECRET" in command_remedy(
        rejected("invalid_client"), settings, in_container=False
    )


def test_a_client_that_signs_assertions_is_told_whom_they_may_have_to_be_for() -> None:
    settings = replace(SETTINGS, client=Client("c", "hush-hush", "client_secret_jwt"))
    remedy = command_remedy(rejected("invalid_client"), settings, in_container=False)
    assert "OPEN_ID_CONNECT_CLIENT_ASSERTION_AUDIENCE=token_endpoint" in remedy


def test_a_proxy_that_is_not_configured_leads_to_its_log() -> None:
    error = IssuerUnavailable("x", cause="not_configured")
    for settings in (None, SETTINGS):
        assert failure_remedy(error, settings, in_container=False) == "fix the errors in the proxy's log"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (rejected("access_denied"), "allow it"),
        (rejected("expired_token"), "in time: log in again"),
        (rejected("invalid_grant"), "log in again"),
        (rejected("not_allowed"), "--scope openid"),
        (rejected("invalid_scope"), "--scope"),
        (rejected("unauthorized_client"), "Device Authorization Grant"),
        (rejected("unauthorized_client"), "OPEN_ID_CONNECT_CLIENT_SECRET"),
        (rejected("invalid_client"), "OPEN_ID_CONNECT_CLIENT_SECRET"),
        (rejected("server_error"), "log in again"),
        (CredentialsRejected("x"), "log in again"),
        (CredentialsRejected("x", cause="no_device_login"), "login --browser"),
        (CredentialsRejected("x", cause="no_browser_login"), "run `oidc-proxy login`"),
        (CredentialsRejected("x", cause="no_answer"), "redirect URI"),
        (CredentialsRejected("x", cause="no_refresh_token"), "--scope"),
        (CredentialsRejected("x", cause="mix_up"), "check the address of the page before you enter your password"),
        (CredentialsRejected("x", cause="no_auth_method"), "OPEN_ID_CONNECT_CLIENT_AUTH"),
        (TokenInvalid("x", cause="clock"), "timedatectl"),
        (IssuerUnavailable("x", cause="unknown_ca"), "TLS_CA_FILE"),
    ],
)
def test_a_login_that_fails_has_its_remedy(error: TokenError, remedy: str) -> None:
    assert remedy in login_remedy(error, SETTINGS, in_container=False)


def test_what_happened_and_what_to_do_are_one_line() -> None:
    assert told("it failed", "mind the gap") == "it failed; mind the gap"
    assert told(TokenInvalid("it failed"), "") == "it failed"


@pytest.mark.parametrize("cause", get_args(Cause))
def test_no_cause_is_without_a_remedy(cause: Cause) -> None:
    for error in (IssuerUnavailable("x", cause=cause), CredentialsRejected("x", cause=cause)):
        assert command_remedy(error, SETTINGS, in_container=False)
        assert login_remedy(error, SETTINGS, in_container=False)


@pytest.mark.parametrize(
    ("host", "refused", "unknown"),
    [
        ("issuer.example", None, None),
        ("localhost", None, None),
        ("192.0.2.1", None, None),
        ("[2001:db8::1]", None, None),
        ("keycloak", "in its container, it may listen on another port", "if it is a container's name"),
        ("host.docker.internal", "it must listen on more than 127.0.0.1", "which only containers know"),
    ],
)
def test_containers_are_spoken_of_only_where_the_name_suggests_one(
    host: str, refused: str | None, unknown: str | None
) -> None:
    causes: tuple[tuple[Cause, str | None], ...] = (("refused", refused), ("unknown_host", unknown))
    for cause, says in causes:
        place = Place(UPSTREAM.env, f"http://{host}:8000", in_container=False)
        remedy = network_remedy(place, cause, by_proxy=False)
        assert "check the host" in remedy
        assert remedy.startswith("is it running? If not, start it; ") == (cause == "refused")
        assert says in remedy if says is not None else "contain" not in remedy
    inside = network_remedy(Place(UPSTREAM.env, f"http://{host}:8000", in_container=True), "refused", by_proxy=False)
    assert inside.startswith("is it running? ")
    assert ("this container itself" in inside) == (host == "localhost")


def test_only_the_proxy_speaks_of_settings_and_commands() -> None:
    base = [PACKAGE / "errors.py", PACKAGE / "__init__.py"]
    for wing in ("oauth", "issuer", "session", "fastapi", "testing"):
        base += (PACKAGE / wing).glob("*.py")
    assert len(base) > 15
    for file in base:
        text = file.read_text()
        commands = ("run-mitmproxy", "oidc-proxy", "--browser", "--scope")
        for word in ("OPEN_ID_", "TLS_", "PROXY_", "REMOTE_", "HTTPS_PROXY", *commands):
            assert word not in text.replace("PROTOCOL_TLS_", ""), f"{word} in {file}"


@pytest.mark.parametrize(
    ("code", "cause", "remedy"),
    [
        ("invalid_request", "no_exchange", "Clients > proxy > Settings > Capability config > Standard Token Exchange"),
        ("unsupported_grant_type", "no_exchange", 'set `token` of the service to "scope"'),
        ("invalid_client", "public_client", "turn on Client authentication for proxy"),
        ("invalid_client", "public_client", "OPEN_ID_CONNECT_CLIENT_SECRET"),
        ("invalid_client", "unknown_audience", "correct `audience` of the service, or register stac-api"),
        ("invalid_request", "no_audience", "with stac-api as Included Client Audience"),
        ("invalid_request", "no_audience", "set `scope` of the service"),
        ("invalid_target", "no_audience", "let the client ask for stac-api"),
        ("invalid_request", "subject_token", "was not issued to proxy"),
        ("invalid_scope", None, "set `scope` of the service"),
        ("access_denied", None, "does not allow this user a token for stac-api"),
    ],
)
def test_a_refused_exchange_names_the_switch(code: str, cause: Cause | None, remedy: str) -> None:
    error = CredentialsRejected("x", cause=cause, issuer_error=code)

    assert remedy in (exchange_remedy(error, "proxy", "stac-api") or "")
    assert "stac-api" not in (exchange_remedy(error, "proxy", None) or "")


def test_what_is_no_fault_of_the_exchange_has_another_remedy() -> None:
    for code in ("invalid_client", "unauthorized_client", "invalid_request"):
        assert exchange_remedy(CredentialsRejected("x", issuer_error=code), "proxy", "stac-api") is None


STAC = Service("stac", "https://stac.example")
SERVICES = replace(SETTINGS, services_file=Path("services.toml"), services=(STAC,))


@pytest.mark.parametrize(
    ("error", "changes", "remedy"),
    [
        (TokenInvalid("x", claim="aud"), {"audience": "stac-api"}, "with stac-api as Included Custom Audience"),
        (TokenInvalid("x", claim="aud"), {"audience": "stac-api"}, "set [service.stac] audience"),
        (
            TokenInvalid("x", claim="aud"),
            {"token": "resource", "resource": "urn:x"},
            "some issuers ignore `resource`: then set another `token` for stac; or add it",
        ),
        (
            TokenInvalid("x", claim="aud"),
            {"token": "exchange", "audience": "stac-api"},
            "with stac-api as Included Client Audience",
        ),
        (rejected("invalid_scope"), {"token": "scope", "scope": "read"}, "run `oidc-proxy login`, which asks for them"),
        (rejected("invalid_scope"), {"token": "scope", "scope": "read"}, "correct [service.stac] scope"),
        (rejected("invalid_target"), {"token": "resource", "resource": "urn:x"}, "correct [service.stac] resource"),
        (rejected("invalid_scope"), {"token": "exchange", "scope": "read"}, "set `scope` of [service.stac]"),
        (
            CredentialsRejected("x", cause="no_exchange", issuer_error="invalid_request"),
            {"token": "exchange"},
            "Standard Token Exchange",
        ),
        (rejected("invalid_grant"), {"token": "scope", "scope": "read"}, "expired, was revoked or used up"),
        (rejected("invalid_client"), {"token": "exchange", "audience": "a"}, "OPEN_ID_CONNECT_CLIENT_SECRET"),
        (TokenInvalid("x", cause="no_id_token"), {"credential": "id_token"}, "run `oidc-proxy login`"),
    ],
)
def test_the_remedy_for_a_services_own_token_names_its_settings(
    error: TokenError, changes: dict[str, Any], remedy: str
) -> None:
    said = command_remedy(error, SERVICES, replace(STAC, **changes), in_container=False)
    assert remedy in said
    assert "OPEN_ID_CONNECT_AUDIENCE" not in said
    assert failure_remedy(error, SERVICES, replace(STAC, **changes), in_container=False) == said


def test_the_service_of_the_other_settings_keeps_their_names() -> None:
    service = Service("default", "https://service.example", audience="service")
    settings = replace(SERVICES, upstream=service.upstream, services=(service, STAC))
    said = command_remedy(TokenInvalid("x", claim="aud"), settings, service, in_container=False)
    assert "set OPEN_ID_CONNECT_AUDIENCE" in said
    in_file = replace(settings, upstream=None)
    said = command_remedy(TokenInvalid("x", claim="aud"), in_file, service, in_container=False)
    assert "set [service.default] audience" in said


def test_scopes_of_a_login_without_openid_are_to_have_it() -> None:
    settings = replace(SERVICES, scope="read")
    said = command_remedy(TokenInvalid("x", cause="no_id_token"), settings, STAC, in_container=False)
    assert said.startswith("add openid to OPEN_ID_CONNECT_SCOPE, and run `oidc-proxy login`; ")


def test_scopes_that_a_narrower_refresh_took_away_name_the_services_that_do_it() -> None:
    narrow = tuple(replace(STAC, name=f"s{number}", token="scope", scope="read") for number in range(12))
    said = command_remedy(rejected("invalid_scope"), replace(SERVICES, services=narrow), in_container=False)
    assert "set another `token` for s0, s1" in said
    assert said.endswith("s9 and others, and run `oidc-proxy login`")
    with_scope = replace(SERVICES, services=narrow, scope="read")
    assert "set OPEN_ID_CONNECT_SCOPE" in command_remedy(rejected("invalid_scope"), with_scope, in_container=False)
