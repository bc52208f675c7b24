"""Settings: where they come from, and what is said when they are wrong."""

import os
import ssl
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from mitmproxy.options import Options

from eoepca_security.errors import SettingsError
from eoepca_security.proxy.config.command import Command
from eoepca_security.proxy.config.factory import make_store
from eoepca_security.proxy.config.loading import read_dotenv, read_settings, settings_in
from eoepca_security.proxy.config.services import services_of
from eoepca_security.proxy.config.settings import Service, TerminationEndpoint
from eoepca_security.proxy.config.variables import VARIABLES
from eoepca_security.session.file_store import TokenStore
from eoepca_security.session.session import Stored

GOOD = {
    "OPEN_ID_CONNECT_URL": "https://issuer.example/realms/r",
    "OPEN_ID_CONNECT_CLIENT_ID": "client",
    "OPEN_ID_REFRESH_TOKEN": "refresh",
    "REMOTE_PROTECTED_DOMAIN": "https://service.example:9200",
    "OPEN_ID_TOKEN_STORE": "none",
}


def problems(environment: Mapping[str, str]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        read_settings(environment)
    return caught.value.problems


def test_the_two_listeners_need_an_address_each() -> None:
    both = GOOD | {"PROXY_PORT": "8080", "PROXY_ADMIN": "127.0.0.1:8080"}
    assert problems(both) == ("PROXY_ADMIN: 127.0.0.1:8080 is the address of the proxy itself: choose another port",)
    assert read_settings(both | {"PROXY_PORT": "0", "PROXY_ADMIN": "127.0.0.1:0"}).admin is not None


def test_defaults() -> None:
    settings = read_settings(GOOD)
    assert (settings.host, settings.port, settings.grant, settings.client.auth_method) == (
        "127.0.0.1",
        8080,
        "refresh_token",
        "auto",
    )
    assert settings.upstream == "https://service.example:9200"
    assert (settings.client.secret, settings.audience, settings.scope, settings.ca_file) == (None, None, None, None)
    assert not settings.tls_no_verify
    assert settings.warnings == ()


def test_cookies_pass_unless_they_are_to_be_dropped() -> None:
    assert read_settings(GOOD).cookies == "pass"
    assert read_settings(GOOD | {"PROXY_COOKIES": "drop"}).cookies == "drop"


def test_a_session_is_needed_only_where_that_is_said() -> None:
    without = GOOD | {"OPEN_ID_REFRESH_TOKEN": ""}
    (problem,) = problems(without)
    assert problem.startswith("OPEN_ID_REFRESH_TOKEN: ")
    assert "oidc-proxy login" in problem
    assert read_settings(without, need_session=False).refresh_token is None


def test_secrets_do_not_show() -> None:
    secrets = {
        "OPEN_ID_REFRESH_TOKEN": "canary-1",
        "OPEN_ID_CONNECT_CLIENT_SECRET": "canary-2",
        "OPEN_ID_AUTH_TOKEN": "canary-3",
    }
    assert "canary" not in repr(read_settings(GOOD | secrets))


@pytest.mark.parametrize(
    ("change", "variable", "says"),
    [
        ({"OPEN_ID_CONNECT_URL": ""}, "OPEN_ID_CONNECT_URL", "required"),
        ({"OPEN_ID_CONNECT_URL": "  "}, "OPEN_ID_CONNECT_URL", "required"),
        ({"OPEN_ID_CONNECT_URL": "issuer.example"}, "OPEN_ID_CONNECT_URL", "https://"),
        ({"OPEN_ID_CONNECT_URL": "ftp://issuer.example"}, "OPEN_ID_CONNECT_URL", "not a valid URL"),
        ({"OPEN_ID_CONNECT_URL": "http://issuer.example"}, "OPEN_ID_CONNECT_URL", "https"),
        ({"OPEN_ID_CONNECT_URL": "https://u:p@issuer.example"}, "OPEN_ID_CONNECT_URL", "@"),
        ({"OPEN_ID_CONNECT_URL": "https://issuer.example?x=1"}, "OPEN_ID_CONNECT_URL", "has a ? part"),
        ({"OPEN_ID_CONNECT_URL": "https://issuer.example#x"}, "OPEN_ID_CONNECT_URL", "has a # part"),
        ({"OPEN_ID_CONNECT_URL": "https://issuer.example:x"}, "OPEN_ID_CONNECT_URL", "not a valid URL"),
        ({"OPEN_ID_CONNECT_ISSUER": "issuer"}, "OPEN_ID_CONNECT_ISSUER", "not a valid URL"),
        ({"OPEN_ID_CONNECT_ISSUER": "https://i.example?x=1"}, "OPEN_ID_CONNECT_ISSUER", "has a ? part"),
        (
            {"OPEN_ID_CONNECT_ISSUER": "https://i.example/.well-known/openid-configuration"},
            "OPEN_ID_CONNECT_ISSUER",
            "the issuer itself",
        ),
        ({"OPEN_ID_CONNECT_PARAMS": "audience"}, "OPEN_ID_CONNECT_PARAMS", "form-encoded"),
        ({"OPEN_ID_CONNECT_PARAMS": "a=1&&b=2"}, "OPEN_ID_CONNECT_PARAMS", "form-encoded"),
        ({"OPEN_ID_CONNECT_PARAMS": "a=1&a=2"}, "OPEN_ID_CONNECT_PARAMS", "once"),
        ({"OPEN_ID_CONNECT_PARAMS": "=1"}, "OPEN_ID_CONNECT_PARAMS", "name"),
        ({"OPEN_ID_CONNECT_PARAMS": "grant_type=password&state=x"}, "OPEN_ID_CONNECT_PARAMS", "grant_type, state"),
        ({"OPEN_ID_CONNECT_CLIENT_ID": ""}, "OPEN_ID_CONNECT_CLIENT_ID", "required"),
        ({"OPEN_ID_REFRESH_TOKEN": ""}, "OPEN_ID_REFRESH_TOKEN", "required"),
        ({"OPEN_ID_REFRESH_TOKEN": "a b"}, "OPEN_ID_REFRESH_TOKEN", "spaces"),
        ({"OPEN_ID_REFRESH_TOKEN": "a\n"}, "OPEN_ID_REFRESH_TOKEN", "line break"),
        ({"OPEN_ID_AUTH_TOKEN": "Bearer x"}, "OPEN_ID_AUTH_TOKEN", "spaces"),
        ({"OPEN_ID_TOKEN_FILE": "/nowhere/token"}, "OPEN_ID_TOKEN_FILE", "/nowhere does not exist: create it"),
        ({"OPEN_ID_TOKEN_FILE": "/dev/null"}, "OPEN_ID_TOKEN_FILE", "/dev/null is not a regular file"),
        ({"OPEN_ID_TOKEN_FILE": "/tmp/"}, "OPEN_ID_TOKEN_FILE", "/tmp is a folder: choose a file in it"),
        ({"OPEN_ID_TOKEN_FILE": "/etc/hosts"}, "OPEN_ID_TOKEN_FILE", "/etc/hosts "),
        ({"OPEN_ID_TOKEN_FILE_MODE": "600x"}, "OPEN_ID_TOKEN_FILE_MODE", "use 0600, 0640 or 0644"),
        ({"OPEN_ID_TOKEN_FILE_MODE": "0700"}, "OPEN_ID_TOKEN_FILE_MODE", "not a valid mode"),
        ({"OPEN_ID_TOKEN_FILE_MODE": "0660"}, "OPEN_ID_TOKEN_FILE_MODE", "not a valid mode"),
        ({"OPEN_ID_TOKEN_FILE_MARGIN": "0"}, "OPEN_ID_TOKEN_FILE_MARGIN", "use 1 to 86400"),
        ({"OPEN_ID_TOKEN_FILE_MARGIN": "1m"}, "OPEN_ID_TOKEN_FILE_MARGIN", "not a valid number of seconds"),
        ({"OPEN_ID_CONNECT_GRANT": "password"}, "OPEN_ID_CONNECT_GRANT", "client_credentials"),
        ({"OPEN_ID_CONNECT_GRANT": "client_credentials"}, "OPEN_ID_CONNECT_GRANT", "OPEN_ID_CONNECT_CLIENT_SECRET"),
        ({"OPEN_ID_CONNECT_CLIENT_AUTH": "magic"}, "OPEN_ID_CONNECT_CLIENT_AUTH", "client_secret_post"),
        ({"OPEN_ID_CONNECT_CLIENT_AUTH": "client_secret_jwt"}, "OPEN_ID_CONNECT_CLIENT_AUTH", "CLIENT_SECRET"),
        (
            {"OPEN_ID_CONNECT_CLIENT_ASSERTION_AUDIENCE": "both"},
            "OPEN_ID_CONNECT_CLIENT_ASSERTION_AUDIENCE",
            "issuer, token_endpoint",
        ),
        ({"OPEN_ID_CONNECT_CLIENT_AUTH": "private_key_jwt"}, "OPEN_ID_CONNECT_CLIENT_AUTH", "CLIENT_KEY_FILE"),
        (
            {"OPEN_ID_CONNECT_CLIENT_AUTH": "none", "OPEN_ID_CONNECT_CLIENT_SECRET": "s"},
            "OPEN_ID_CONNECT_CLIENT_AUTH",
            "contradicts",
        ),
        ({"OPEN_ID_CONNECT_CLIENT_KEY_FILE": "/nowhere/key"}, "OPEN_ID_CONNECT_CLIENT_KEY_FILE", "No such file"),
        ({"OPEN_ID_CONNECT_DANGEROUSLY_ALLOW_HTTP": "?"}, "OPEN_ID_CONNECT_DANGEROUSLY_ALLOW_HTTP", "true or false"),
        ({"TLS_NO_VERIFY": "maybe"}, "TLS_NO_VERIFY", "true or false"),
        ({"TLS_CA_FILE": "/nowhere/ca"}, "TLS_CA_FILE", "No such file"),
        ({"REMOTE_PROTECTED_DOMAIN": ""}, "REMOTE_PROTECTED_DOMAIN", "required"),
        ({"REMOTE_PROTECTED_DOMAIN": "service.example"}, "REMOTE_PROTECTED_DOMAIN", "https://"),
        ({"REMOTE_PROTECTED_DOMAIN": "https://service.example/api"}, "REMOTE_PROTECTED_DOMAIN", "path"),
        (
            {"REMOTE_PROTECTED_DOMAIN": "https://u:p@service.example"},
            "REMOTE_PROTECTED_DOMAIN",
            "scheme, host and port",
        ),
        ({"REMOTE_PROTECTED_DOMAIN": "https://service.example:99999"}, "REMOTE_PROTECTED_DOMAIN", "not a valid URL"),
        ({"REMOTE_PROTECTED_DOMAIN": "https://a b"}, "REMOTE_PROTECTED_DOMAIN", "not a valid URL"),
        ({"REMOTE_PROTECTED_DOMAIN": "http://localhost:8080"}, "REMOTE_PROTECTED_DOMAIN", "itself"),
        ({"REMOTE_PROTECTED_DOMAIN": "https://[1:2]"}, "REMOTE_PROTECTED_DOMAIN", "not a valid URL"),
        ({"PROXY_SERVICES": "a\nb"}, "PROXY_SERVICES", "line break"),
        ({"PROXY_SERVICES": "/nowhere/services.toml"}, "PROXY_SERVICES", "No such file"),
        ({"PROXY_SERVICES": "/nowhere", "REMOTE_PROTECTED_DOMAIN": ""}, "PROXY_SERVICES", "No such file"),
        ({"PROXY_HOST": "not an address"}, "PROXY_HOST", "127.0.0.1"),
        ({"PROXY_HOST": "300.1.1.1"}, "PROXY_HOST", "not a valid address"),
        ({"PROXY_ADMIN": "8081"}, "PROXY_ADMIN", "host:port"),
        ({"PROXY_ADMIN": "localhost:99999"}, "PROXY_ADMIN", "host:port"),
        ({"PROXY_ADMIN": "::1:8081"}, "PROXY_ADMIN", "host:port"),
        ({"PROXY_ALLOWED_HOSTS": "good.example,http://bad.example"}, "PROXY_ALLOWED_HOSTS", "http://bad.example"),
        ({"PROXY_ALLOWED_HOSTS": "*.example"}, "PROXY_ALLOWED_HOSTS", "not a valid host"),
        ({"PROXY_ALLOWED_ORIGINS": "*"}, "PROXY_ALLOWED_ORIGINS", "not a valid origin"),
        ({"PROXY_ALLOWED_ORIGINS": "null"}, "PROXY_ALLOWED_ORIGINS", "not a valid origin"),
        ({"PROXY_ALLOWED_ORIGINS": "app.example"}, "PROXY_ALLOWED_ORIGINS", "not a valid origin"),
        ({"PROXY_ALLOWED_ORIGINS": "https://app.example/"}, "PROXY_ALLOWED_ORIGINS", "not a valid origin"),
        ({"PROXY_TERMINATION_ENDPOINT": "/"}, "PROXY_TERMINATION_ENDPOINT", "not a valid path"),
        ({"PROXY_TERMINATION_ENDPOINT": "end"}, "PROXY_TERMINATION_ENDPOINT", "not a valid path"),
        ({"PROXY_TERMINATION_ENDPOINT": "/end?now"}, "PROXY_TERMINATION_ENDPOINT", "not a valid path"),
        *(
            ({"PROXY_TERMINATION_ENDPOINT": url}, "PROXY_TERMINATION_ENDPOINT", "must have a host and a path")
            for url in (
                "http://0.0.0.0",
                "http://0.0.0.0:8080/",
                "http:///end",
                "http://user:secret@proxy/end",
                "http://proxy/end?now",
                "http://proxy/end#now",
                "http://proxy:0/end",
                "http://proxy/e nd",
                "ftp://proxy/end",
            )
        ),
        ({"PROXY_MODE": "regular"}, "PROXY_MODE", "reverse, forward"),
        ({"PROXY_AUTH_FILE": "a\nb"}, "PROXY_AUTH_FILE", "line break"),
        ({"PROXY_FORWARD_AS": "nginx"}, "PROXY_FORWARD_AS", "bearer, apisix"),
        ({"PROXY_COOKIES": "no"}, "PROXY_COOKIES", "pass, drop"),
        ({"PROXY_INJECT_HOSTS": "*"}, "PROXY_INJECT_HOSTS", "not a valid host"),
        ({"PROXY_PORT": "eighty"}, "PROXY_PORT", "number"),
        ({"PROXY_PORT": "65536"}, "PROXY_PORT", "65535"),
        ({"PROXY_PORT": "-1"}, "PROXY_PORT", "number"),
    ],
)
def test_each_problem_is_one_line_that_names_its_variable(change: dict[str, str], variable: str, says: str) -> None:
    lines = problems(GOOD | change)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{variable}: ")
    assert says in lines[0]
    assert "\n" not in lines[0]


def test_all_problems_are_told_at_once() -> None:
    lines = problems({"PROXY_PORT": "x", "TLS_NO_VERIFY": "x"})
    assert [line.partition(":")[0] for line in lines] == [
        "OPEN_ID_CONNECT_URL",
        "OPEN_ID_CONNECT_CLIENT_ID",
        "OPEN_ID_REFRESH_TOKEN",
        "TLS_NO_VERIFY",
        "PROXY_PORT",
        "REMOTE_PROTECTED_DOMAIN",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("1", True),
        ("YES", True),
        ("on", True),
        ("False", False),
        ("0", False),
        ("no", False),
        ("", False),
    ],
)
def test_booleans(text: str, value: bool) -> None:
    assert read_settings(GOOD | {"TLS_NO_VERIFY": text}).tls_no_verify is value


def test_the_address_of_a_discovery_document_may_have_a_query() -> None:
    url = "https://issuer.example/v2.0/.well-known/openid-configuration?p=B2C_1_login"
    settings = read_settings(GOOD | {"OPEN_ID_CONNECT_URL": url})

    assert settings.issuer_url == url
    assert settings.login != read_settings(GOOD | {"OPEN_ID_CONNECT_URL": url.partition("?")[0]}).login


@pytest.mark.parametrize("url", ["http://localhost:1/realms/r", "http://127.0.0.1", "http://[::1]:8080/x"])
def test_plain_http_is_accepted_for_an_issuer_on_this_machine(url: str) -> None:
    assert read_settings(GOOD | {"OPEN_ID_CONNECT_URL": url}).issuer_url == url


def test_plain_http_elsewhere_needs_the_setting_with_the_dangerous_name() -> None:
    environment = GOOD | {
        "OPEN_ID_CONNECT_URL": "http://keycloak:8080/realms/r",
        "OPEN_ID_CONNECT_DANGEROUSLY_ALLOW_HTTP": "true",
    }
    assert read_settings(environment).allow_http


def test_a_token_over_plain_http_to_another_machine_is_warned_of() -> None:
    (warning,) = read_settings(GOOD | {"REMOTE_PROTECTED_DOMAIN": "http://opensearch:9200"}).warnings
    assert "opensearch" in warning
    assert read_settings(GOOD | {"REMOTE_PROTECTED_DOMAIN": "http://localhost:9200"}).warnings == ()


def test_client_credentials_need_no_refresh_token_and_warn_of_one() -> None:
    environment = GOOD | {"OPEN_ID_CONNECT_GRANT": "client_credentials", "OPEN_ID_CONNECT_CLIENT_SECRET": "s"}
    settings = read_settings(environment)
    assert settings.refresh_token is None
    assert "OPEN_ID_REFRESH_TOKEN" in settings.warnings[0]
    assert read_settings(environment | {"OPEN_ID_REFRESH_TOKEN": ""}).warnings == ()


def test_an_access_token_alone_is_enough_to_begin_with() -> None:
    assert read_settings(GOOD | {"OPEN_ID_REFRESH_TOKEN": "", "OPEN_ID_AUTH_TOKEN": "t"}).access_token == "t"


def test_the_upstream_is_not_asked_for_where_it_is_not_needed() -> None:
    environment = GOOD | {"REMOTE_PROTECTED_DOMAIN": ""}
    assert read_settings(environment, need_upstream=False).upstream is None


@pytest.mark.parametrize(
    ("url", "upstream"),
    [
        ("https://Service.Example:9200/", "https://service.example:9200"),
        ("http://[::1]:9200", "http://[::1]:9200"),
        ("http://my_service:80", "http://my_service:80"),
    ],
)
def test_the_upstream_is_kept_as_scheme_host_and_port(url: str, upstream: str) -> None:
    assert read_settings(GOOD | {"REMOTE_PROTECTED_DOMAIN": url}).upstream == upstream


def test_the_upstream_is_the_default_service() -> None:
    settings = read_settings(
        GOOD | {"OPEN_ID_CONNECT_AUDIENCE": "a", "PROXY_FORWARD_AS": "apisix", "TLS_NO_VERIFY": "true"}
    )
    (service,) = settings.services
    assert service == Service(
        "default", "https://service.example:9200", audience="a", forward_as="apisix", tls_no_verify=True
    )
    assert settings.services_file is None
    assert read_settings(GOOD, need_upstream=False).services == ()


def test_a_file_has_further_services(tmp_path: Path) -> None:
    file = tmp_path / "services.toml"
    file.write_text('[service.stac]\nurl = "http://stac"\nport = 8090')
    settings = read_settings(GOOD | {"PROXY_SERVICES": str(file)})
    assert settings.services_file == file
    assert [service.name for service in settings.services] == ["default", "stac"]
    assert settings.services[1] == Service("stac", "http://stac", port=8090)
    (warning,) = settings.warnings
    assert warning.startswith("PROXY_SERVICES: [service.stac] url is plain http")
    by_option = read_settings(GOOD, options={"services": str(file)})
    for found in (by_option, read_settings(GOOD, flags={"--services": str(file)})):
        assert found.services == settings.services
        assert found.command.line("login") == f"oidc-proxy login --services {file}"
    for changed in ({"PROXY_PORT": "8090"}, {"PROXY_ADMIN": "localhost:8090"}):
        (line,) = problems(GOOD | {"PROXY_SERVICES": str(file)} | changed)
        assert line.startswith("PROXY_SERVICES: [service.stac] port: 8090 is the port of the ")


def test_all_of_our_commands_know_the_default_service_where_there_are_others(tmp_path: Path) -> None:
    file = tmp_path / "services.toml"
    file.write_text('[service.stac]\nurl = "https://stac.example"')
    named = GOOD | {"PROXY_SERVICES": str(file)}
    of_ours = read_settings(named, flags={}, need_upstream=False)
    of_mitmdump = read_settings(named, need_upstream=False)
    assert [service.name for service in of_ours.services] == ["default", "stac"]
    assert [service.name for service in of_mitmdump.services] == ["stac"]
    assert read_settings(GOOD, flags={}, need_upstream=False).services == ()


def test_the_upstream_or_a_file_of_services_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "services.toml"
    file.write_text('[service.stac]\nurl = "https://stac.example"')
    settings = read_settings(GOOD | {"PROXY_SERVICES": str(file), "REMOTE_PROTECTED_DOMAIN": ""})
    assert settings.upstream is None
    assert [service.name for service in settings.services] == ["stac"]
    (line,) = problems(GOOD | {"REMOTE_PROTECTED_DOMAIN": ""})
    assert "PROXY_SERVICES" in line
    file.write_text('[service.default]\nurl = "https://stac.example"')
    (line,) = problems(GOOD | {"PROXY_SERVICES": str(file)})
    assert "REMOTE_PROTECTED_DOMAIN" in line
    assert problems(GOOD | {"PROXY_SERVICES": str(file), "PROXY_PORT": "x", "REMOTE_PROTECTED_DOMAIN": "x"})[1:] == (
        "REMOTE_PROTECTED_DOMAIN: is not a valid URL: it must look like https://service.example:9200",
    )


def test_an_id_token_needs_a_login(tmp_path: Path) -> None:
    file = tmp_path / "services.toml"
    file.write_text('[service.stac]\nurl = "https://stac.example"\ncredential = "id_token"')
    own = {"OPEN_ID_CONNECT_GRANT": "client_credentials", "OPEN_ID_CONNECT_CLIENT_SECRET": "s"}
    (line,) = problems(GOOD | own | {"PROXY_SERVICES": str(file)})
    assert line.startswith("PROXY_SERVICES: [service.stac] credential: id_token needs a login")
    assert read_settings(GOOD | {"PROXY_SERVICES": str(file)}).services


# --- sources -----------------------------------------------------------------------------------------------------


def test_options_come_before_the_environment_and_that_before_dotenv() -> None:
    name = "OPEN_ID_CONNECT_CLIENT_ID"
    environment = {key: value for key, value in GOOD.items() if key != name}
    assert read_settings(environment, dotenv={name: "c"}).client.client_id == "c"
    assert read_settings(environment | {name: "b"}, dotenv={name: "c"}).client.client_id == "b"
    options = {"oidc_client_id": "a"}
    assert read_settings(environment | {name: "b"}, dotenv={name: "c"}, options=options).client.client_id == "a"
    # An empty string counts as unset, everywhere.
    assert (
        read_settings(environment | {name: ""}, dotenv={name: "c"}, options={"oidc_client_id": ""}).client.client_id
        == "c"
    )


def test_dotenv_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "# a comment\nA='single # quoted'\nexport B=\"double\"\nC=bare # comment\nD='${HOME}'\nE\r\n"
    )
    assert read_dotenv(tmp_path) == {"A": "single # quoted", "B": "double", "C": "bare", "D": "${HOME}"}
    assert read_dotenv(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize("content", [b"A=\xff\xfe\n", None])
def test_a_dotenv_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / ".env"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"^\.env: "):
        read_dotenv(tmp_path)


def test_a_folder_that_is_closed_to_this_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_fifo", refuse)
    with pytest.raises(SettingsError, match=r"^\.env: cannot be read \(Permission denied\)"):
        read_dotenv(tmp_path)


def test_a_dotenv_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".env")
    with pytest.raises(SettingsError, match="pipe"):
        read_dotenv(tmp_path)


@pytest.mark.parametrize(
    ("variable", "attribute"),
    [("OPEN_ID_REFRESH_TOKEN", "refresh_token"), ("OPEN_ID_AUTH_TOKEN", "access_token")],
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_secrets_are_read_from_files(tmp_path: Path, variable: str, attribute: str, end: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(f"from-file{end}".encode())
    environment = {key: value for key, value in GOOD.items() if key != variable} | {f"{variable}_FILE": str(path)}
    assert getattr(read_settings(environment), attribute) == "from-file"


def test_a_client_secret_keeps_all_but_the_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(" s: %+é \n")
    environment = GOOD | {"OPEN_ID_CONNECT_CLIENT_SECRET_FILE": str(path)}
    assert read_settings(environment).client.secret == " s: %+é "


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b"\n", "is empty"), (b"\xff\xfe", "UTF-8"), (b"x" * 70_000, "64 KiB"), (None, "No such file")],
)
def test_a_secret_file_that_cannot_be_used_is_told(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    (line,) = problems(GOOD | {"OPEN_ID_REFRESH_TOKEN": "", "OPEN_ID_REFRESH_TOKEN_FILE": str(path)})
    assert line.startswith("OPEN_ID_REFRESH_TOKEN_FILE: ")
    assert says in line


@pytest.mark.parametrize("variable", ["OPEN_ID_REFRESH_TOKEN_FILE", "OPEN_ID_CONNECT_CLIENT_KEY_FILE"])
def test_a_secret_in_the_place_of_its_file_is_not_shown(variable: str) -> None:
    (line,) = problems(GOOD | {"OPEN_ID_REFRESH_TOKEN": "", "OPEN_ID_AUTH_TOKEN": "a", variable: "canary.x.y"})
    assert line.startswith(f"{variable}: ")
    assert "canary" not in line


def test_secrets_that_all_users_can_read_draw_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, key, dotenv = tmp_path / "secret", tmp_path / "key.pem", tmp_path / ".env"
    secret.write_text("from-file")
    key.write_bytes(generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    dotenv.write_text("OPEN_ID_REFRESH_TOKEN=refresh\n")
    files = {"OPEN_ID_CONNECT_CLIENT_SECRET_FILE": str(secret), "OPEN_ID_CONNECT_CLIENT_KEY_FILE": str(key)}

    def warnings(mode: int) -> tuple[str, ...]:
        for path in (secret, key, dotenv):
            path.chmod(mode)
        return settings_in(tmp_path, GOOD | files | {"OPEN_ID_REFRESH_TOKEN": ""}).exposed

    expected = (
        f"OPEN_ID_CONNECT_CLIENT_SECRET_FILE: all users can read {secret}: set its mode to 0600",
        f"OPEN_ID_CONNECT_CLIENT_KEY_FILE: all users can read {key}: set its mode to 0600",
        f".env: all users can read {dotenv}, which has OPEN_ID_REFRESH_TOKEN: set its mode to 0600",
    )
    assert warnings(0o644) == warnings(0o604) == expected
    # A group may be there for that, as in Kubernetes.
    assert warnings(0o600) == warnings(0o440) == ()
    with monkeypatch.context() as windows:
        windows.delattr(os, "geteuid")
        assert warnings(0o644) == ()
    # A read-only mount is not the user's to change, as in a container.
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((0,) * 8 + (os.ST_RDONLY, 255)))
    assert warnings(0o644) == ()


def test_a_dotenv_without_secrets_may_be_read_by_all(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OPEN_ID_CONNECT_CLIENT_SECRET=\nPROXY_PORT=9000\n")
    (tmp_path / ".env").chmod(0o644)
    assert settings_in(tmp_path, GOOD).exposed == ()


def test_a_store_that_others_control_is_wrong_unless_nothing_is_stored(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "something").write_text("")
    folder.chmod(0o777)
    environment = GOOD | {"OPEN_ID_TOKEN_STORE": str(folder)}
    assert problems(environment) == (f"OPEN_ID_TOKEN_STORE: all users can write to {folder}: set its mode to 0700",)
    own = {"OPEN_ID_CONNECT_GRANT": "client_credentials", "OPEN_ID_CONNECT_CLIENT_SECRET": "s"}
    assert read_settings(environment | own | {"OPEN_ID_REFRESH_TOKEN": ""}).grant == "client_credentials"
    folder.chmod(0o700)
    assert read_settings(environment).token_store == folder


def test_there_are_no_token_files_unless_they_are_set(tmp_path: Path) -> None:
    settings = read_settings(GOOD)
    assert (settings.token_file, settings.token_file_mode, settings.token_file_margin) == (None, 0o600, 30)
    given = {"OPEN_ID_TOKEN_FILE": "~/token", "OPEN_ID_TOKEN_FILE_MODE": "644", "OPEN_ID_TOKEN_FILE_MARGIN": "5"}
    settings = read_settings(GOOD | given | {"HOME": str(tmp_path)})
    assert (settings.token_file, settings.token_file_mode, settings.token_file_margin) == (tmp_path / "token", 0o644, 5)


def test_a_token_in_the_place_of_its_file_is_not_shown() -> None:
    (line,) = problems(GOOD | {"OPEN_ID_TOKEN_FILE": "canary.x.y"})
    assert line == "OPEN_ID_TOKEN_FILE: is not the path of a file: begin it with / or ./"


def test_a_token_file_is_none_of_the_other_files(tmp_path: Path) -> None:
    secret, services = tmp_path / "secret", tmp_path / "services.toml"
    secret.write_text("refresh")
    given = GOOD | {"OPEN_ID_REFRESH_TOKEN": "", "OPEN_ID_REFRESH_TOKEN_FILE": str(secret)}
    (line,) = problems(given | {"OPEN_ID_TOKEN_FILE": str(secret)})
    assert line == f"OPEN_ID_TOKEN_FILE: {secret} is the file of another setting: choose another one"
    services.write_text("[service.a]\nurl = 'https://a.example'\ntoken_file = 'secret'")
    (line,) = problems(given | {"PROXY_SERVICES": str(services)})
    assert line == "PROXY_SERVICES: [service.a] token_file: is the file of another setting: choose another one"
    services.write_text("[service.a]\nurl = 'https://a.example'\ntoken_file = 'token'")
    (line,) = problems(GOOD | {"PROXY_SERVICES": str(services), "OPEN_ID_TOKEN_FILE": str(tmp_path / "token")})
    assert line == "PROXY_SERVICES: [service.a] token_file: is also in OPEN_ID_TOKEN_FILE: choose another one"


def test_a_secret_and_its_file_contradict_each_other(tmp_path: Path) -> None:
    (line,) = problems(GOOD | {"OPEN_ID_REFRESH_TOKEN_FILE": str(tmp_path / "secret")})
    assert line.startswith("OPEN_ID_REFRESH_TOKEN: ")
    assert "unset one" in line


def test_the_environments_file_comes_before_dotenvs_value(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("from-file")
    environment = {key: value for key, value in GOOD.items() if key != "OPEN_ID_REFRESH_TOKEN"}
    settings = read_settings(
        environment | {"OPEN_ID_REFRESH_TOKEN_FILE": str(path)}, dotenv={"OPEN_ID_REFRESH_TOKEN": "from-dotenv"}
    )
    assert settings.refresh_token == "from-file"


def test_files_that_are_no_keys_or_certificates_are_told(tmp_path: Path) -> None:
    path = tmp_path / "file.pem"
    path.write_text("nothing of the kind")
    assert "PEM" in problems(GOOD | {"OPEN_ID_CONNECT_CLIENT_KEY_FILE": str(path)})[0]
    assert str(path) in problems(GOOD | {"TLS_CA_FILE": str(path)})[0]


def test_whom_assertions_are_for_can_be_set() -> None:
    assert read_settings(GOOD).client.assertion_audience == "issuer"
    variable = read_settings(GOOD | {"OPEN_ID_CONNECT_CLIENT_ASSERTION_AUDIENCE": "token_endpoint"})
    option = read_settings(GOOD, options={"oidc_client_assertion_audience": "token_endpoint"})
    assert variable.client.assertion_audience == option.client.assertion_audience == "token_endpoint"


def test_a_ca_file_with_a_byte_order_mark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    cas = Path(ssl.get_default_verify_paths().cafile or pytest.skip("no CA file on this system")).read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + cas[cas.index(b"-----BEGIN") :])
    (problem,) = problems(GOOD | {"TLS_CA_FILE": str(path)})
    assert problem.startswith(f"TLS_CA_FILE: {path} cannot be used: ")
    assert "byte order mark" in problem


def test_a_key_and_a_ca_file_are_accepted(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    ca = Path(ssl.get_default_verify_paths().cafile or pytest.skip("no CA file on this system"))
    environment = GOOD | {
        "OPEN_ID_CONNECT_CLIENT_KEY_FILE": str(key),
        "OPEN_ID_CONNECT_CLIENT_AUTH": "private_key_jwt",
        "TLS_CA_FILE": str(ca),
    }
    settings = read_settings(environment)
    assert settings.client.key is not None
    assert settings.ca_file == ca


def test_no_option_has_a_name_that_mitmproxy_uses() -> None:
    assert {variable.option for variable in VARIABLES if variable.option}.isdisjoint(Options().keys())


# --- what is missing or misspelt ---------------------------------------------------------------------------------


def test_a_misspelt_name_in_the_environment_is_told_and_another_programs_is_not() -> None:
    others = ("PROXY_PASS", "PROXY_USER", "HTTPS_PROXY", "TLS_CERT_FILE", "REMOTE_HOST", "PROXY_PORT_8080_TCP_ADDR")
    misspelt = ("PROXY_ALLOWED_HOST", "TLS_CAFILE", "REMOTE_PROTECTED_DOMIAN", "OPEN_ID_REFESH_TOKEN", "OPEN_ID_X")
    warnings = read_settings(GOOD | dict.fromkeys((*others, *misspelt), "x")).warnings
    assert warnings == (
        "OPEN_ID_REFESH_TOKEN is not a setting: did you mean OPEN_ID_REFRESH_TOKEN?",
        warnings[1],
        "PROXY_ALLOWED_HOST is not a setting: did you mean PROXY_ALLOWED_HOSTS?",
        "REMOTE_PROTECTED_DOMIAN is not a setting: did you mean REMOTE_PROTECTED_DOMAIN?",
        "TLS_CAFILE is not a setting: did you mean TLS_CA_FILE?",
    )
    assert warnings[1].startswith("OPEN_ID_X is not a setting")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OPEN_ID_CONNECT_SECRET", "OPEN_ID_CONNECT_CLIENT_SECRET"),  # not _SCOPE, although it has more in common
        ("OPEN_ID_CONNECT_CLIENTID", "OPEN_ID_CONNECT_CLIENT_ID"),
        ("OPENID_CONNECT_URL", "OPEN_ID_CONNECT_URL"),
        ("OPEN_ID_CONNECT_ULR", "OPEN_ID_CONNECT_URL"),
        ("OPEN_ID_CONNECT_FOO", None),
        ("OPEN_ID_CONNECT_REALM", None),
        ("OPEN_ID_X", None),
    ],
)
def test_a_setting_is_suggested_only_for_a_near_miss(name: str, meant: str | None) -> None:
    (warning,) = read_settings(GOOD | {name: "x"}).warnings
    assert warning == f"{name} is not a setting" + (f": did you mean {meant}?" if meant else " of this program")


def test_a_wrong_grant_is_one_problem() -> None:
    without = {name: value for name, value in GOOD.items() if name != "OPEN_ID_REFRESH_TOKEN"}
    (problem,) = problems(without | {"OPEN_ID_CONNECT_GRANT": "client_credential"})
    assert problem.startswith("OPEN_ID_CONNECT_GRANT: ")


def test_where_dotenv_was_looked_for_is_told_when_something_is_missing(tmp_path: Path) -> None:
    hint = f".env: not found in {tmp_path}: run this in the folder that has it"
    missing = {name: value for name, value in GOOD.items() if name != "OPEN_ID_CONNECT_URL"}
    for environment, says in ((missing, True), (GOOD | {"PROXY_PORT": "x"}, False)):
        with pytest.raises(SettingsError) as caught:
            settings_in(tmp_path, environment)
        assert (hint in caught.value.problems) is says
    with pytest.raises(SettingsError) as caught:
        settings_in(tmp_path, missing, command=Command(is_container=True))
    assert "as environment variables" in caught.value.problems[-1]
    with pytest.raises(SettingsError) as caught:
        settings_in(tmp_path, missing, flags={})
    assert "--env-file" in caught.value.problems[-1]
    (tmp_path / ".env.example").touch()
    with pytest.raises(SettingsError) as caught:
        settings_in(tmp_path, missing)
    assert "copy .env.example to .env" in caught.value.problems[-1]
    (tmp_path / ".env").write_text("PROXY_PORT=9000")
    with pytest.raises(SettingsError) as caught:
        settings_in(tmp_path, missing)
    assert hint not in caught.value.problems
    assert settings_in(tmp_path, GOOD).port == 9000


# --- the token store ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"OPEN_ID_TOKEN_STORE": "/data/tokens", "HOME": "/home/u"}, "/data/tokens"),
        ({"OPEN_ID_TOKEN_STORE": "~/tokens", "HOME": "/home/u"}, "/home/u/tokens"),
        ({"OPEN_ID_TOKEN_STORE": "", "HOME": "/home/u"}, "/home/u/.local/state/eoepca-security"),
        ({"OPEN_ID_TOKEN_STORE": "", "HOME": "/home/u", "XDG_STATE_HOME": "/state"}, "/state/eoepca-security"),
    ],
)
def test_the_token_store_is_where_programs_keep_their_state(environment: dict[str, str], folder: str) -> None:
    assert read_settings(GOOD | environment).token_store == Path(folder)


def test_the_token_store_can_be_switched_off() -> None:
    assert read_settings(GOOD | {"OPEN_ID_TOKEN_STORE": "none", "HOME": "/home/u"}).token_store is None


def test_without_a_home_the_session_is_kept_in_memory_and_that_is_said() -> None:
    settings = read_settings(GOOD | {"OPEN_ID_TOKEN_STORE": ""})
    assert settings.token_store is None
    assert "OPEN_ID_TOKEN_STORE" in settings.warnings[0]


def test_a_session_in_the_store_makes_a_refresh_token_optional(tmp_path: Path) -> None:
    environment = GOOD | {"OPEN_ID_REFRESH_TOKEN": "", "OPEN_ID_TOKEN_STORE": str(tmp_path)}
    assert problems(environment)[0].startswith("OPEN_ID_REFRESH_TOKEN: ")
    store = TokenStore(tmp_path, issuer_url=GOOD["OPEN_ID_CONNECT_URL"], client_id="client", origin=None)
    store.write(Stored("r", "a", 0.0, 60.0))
    assert read_settings(environment).refresh_token is None


def test_sessions_are_known_by_the_issuers_name_whatever_address_it_is_reached_at(tmp_path: Path) -> None:
    store = TokenStore(tmp_path, issuer_url=GOOD["OPEN_ID_CONNECT_URL"], client_id="client", origin=None)
    store.write(Stored("r", "a", 0.0, 60.0))
    inner = GOOD | {
        "OPEN_ID_CONNECT_URL": "http://127.0.0.1:8080/realms/test",
        "OPEN_ID_REFRESH_TOKEN": "",
        "OPEN_ID_TOKEN_STORE": str(tmp_path),
    }

    assert problems(inner)[0].startswith("OPEN_ID_REFRESH_TOKEN: ")
    settings = read_settings(inner | {"OPEN_ID_CONNECT_ISSUER": GOOD["OPEN_ID_CONNECT_URL"]})
    found = make_store(settings)
    assert found is not None
    assert found.place == store.place
    assert settings.login == (*read_settings(GOOD).login[:3], None)


def test_parameters_for_the_issuer_are_decoded() -> None:
    text = "audience=https%3A%2F%2Fapi.example&kc_idp_hint=a+b&empty="
    expected = {"audience": "https://api.example", "kc_idp_hint": "a b", "empty": ""}

    assert read_settings(GOOD | {"OPEN_ID_CONNECT_PARAMS": text}).client.params == expected
    assert read_settings(GOOD, options={"oidc_params": text}).client.params == expected
    assert read_settings(GOOD).client.params == {}


def test_the_admin_listener_has_a_default_under_the_launcher_only() -> None:
    launcher, alone = read_settings(GOOD), read_settings(GOOD, need_upstream=False)
    assert (launcher.admin, launcher.admin_is_set) == (("127.0.0.1", 8081), False)
    assert (alone.admin, alone.admin_is_set) == (None, False)
    for value, address in (("off", None), ("0.0.0.0:0", ("0.0.0.0", 0)), ("[::1]:8081", ("::1", 8081))):
        for need_upstream in (True, False):
            settings = read_settings(GOOD | {"PROXY_ADMIN": value}, need_upstream=need_upstream)
            assert (settings.admin, settings.admin_is_set) == (address, True)
    assert str(read_settings(GOOD | {"PROXY_ADMIN": "[::1]:8081"}).admin) == "[::1]:8081"


def test_lists_of_hosts_and_origins() -> None:
    lists = {
        "PROXY_ALLOWED_HOSTS": " proxy , Proxy.Test:8080,::1, [fd00::2]:80,*,*.localhost",
        "PROXY_ALLOWED_ORIGINS": "HTTPS://App.example:443, http://localhost:3000",
        "PROXY_INJECT_HOSTS": "service.example,localhost:9000",
        "PROXY_TERMINATION_ENDPOINT": "/end/it",
    }
    settings = read_settings(GOOD | lists, need_upstream=False)
    assert settings.allowed_hosts == ("proxy", "proxy.test:8080", "[::1]", "[fd00::2]:80", "*", "*.localhost")
    assert settings.allowed_origins == ("https://app.example", "http://localhost:3000")
    assert settings.inject_hosts == ("service.example", "localhost:9000")
    assert settings.termination_endpoint == TerminationEndpoint("/end/it")
    assert settings.warnings == ()
    (warning,) = read_settings(GOOD | lists).warnings
    assert "PROXY_INJECT_HOSTS is not used" in warning


def test_how_much_a_process_holds() -> None:
    held = [read_settings(GOOD | given).held_bytes for given in ({}, {"PROXY_HELD_BYTES": " 0 "})]
    assert held == [64 * 2**20, 0]
    for wrong in ("-1", "64MiB", "1e6", "٣", "1" * 16):
        (problem,) = problems(GOOD | {"PROXY_HELD_BYTES": wrong})
        assert problem.startswith("PROXY_HELD_BYTES: ")
        assert "number of bytes: use one like 67108864, or 0" in problem


def test_the_time_that_a_client_has() -> None:
    times = [read_settings(GOOD | given).client_timeout for given in ({}, {"PROXY_CLIENT_TIMEOUT": " 300 "})]
    assert times == [60, 300]
    for wrong in ("0", "-1", "86401", "1.5", "60s", "٣", "1e3"):
        (problem,) = problems(GOOD | {"PROXY_CLIENT_TIMEOUT": wrong})
        assert problem.startswith("PROXY_CLIENT_TIMEOUT: ")
        assert "use 1 to 86400" in problem


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://0.0.0.0/end", None, None),
        ("http://[::]:8080/end", None, 8080),
        ("http://Proxy.test/end", "proxy.test", None),
        ("https://[0::1]:1/end", "[::1]", 1),
    ],
)
def test_where_every_method_ends_the_proxy(url: str, host: str | None, port: int | None) -> None:
    found = read_settings(GOOD | {"PROXY_TERMINATION_ENDPOINT": url}).termination_endpoint
    assert found == TerminationEndpoint("/end", host, port, any_method=True)


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (read_settings(GOOD).workers, read_settings(GOOD | {"PROXY_WORKERS": " 4 "}).workers) == (1, 4)
    for wrong in ("0", "-1", "65", "two", "1.5", "٣"):
        (problem,) = problems(GOOD | {"PROXY_WORKERS": wrong})
        assert problem.startswith("PROXY_WORKERS: ")
        assert "use 1 to 64" in problem
    monkeypatch.delattr(os, "fork")
    assert read_settings(GOOD | {"PROXY_WORKERS": "1"}).workers == 1
    assert problems(GOOD | {"PROXY_WORKERS": "2"}) == ("PROXY_WORKERS: must be 1 on this system, which cannot fork",)


# --- forward mode ------------------------------------------------------------------------------------------------

FORWARD = GOOD | {"PROXY_MODE": "forward"}


def test_forward_mode_needs_one_of_the_settings_that_name_a_service(tmp_path: Path) -> None:
    services = tmp_path / "services.toml"
    services.write_text('[service.stac]\nurl = "https://stac.example"\n')
    alone = FORWARD | {"REMOTE_PROTECTED_DOMAIN": ""}
    assert problems(alone)[0].startswith("REMOTE_PROTECTED_DOMAIN: is required")
    assert [service.name for service in read_settings(FORWARD).services] == ["default"]
    settings = read_settings(alone | {"PROXY_INJECT_HOSTS": "a.example"})
    assert (settings.mode, settings.services, settings.inject_hosts) == ("forward", (), ("a.example",))
    settings = read_settings(alone | {"PROXY_SERVICES": str(services), "PROXY_INJECT_HOSTS": "a.example"})
    assert [service.name for service in settings.services] == ["stac"]
    assert [service.name for service in services_of(settings)] == ["default", "stac"]
    assert services_of(replace(settings, inject_hosts=())) == settings.services


def test_beyond_this_machine_forward_mode_needs_a_password(tmp_path: Path) -> None:
    (line,) = problems(FORWARD | {"PROXY_HOST": "0.0.0.0"})
    assert line.startswith("PROXY_AUTH_FILE: is required")
    for host in ("127.0.0.1", "::1", "localhost"):
        assert read_settings(FORWARD | {"PROXY_HOST": host}).proxy_auth is None
    file = tmp_path / "auth"
    file.write_text("ålice:päss:word \n")
    file.chmod(0o644)
    settings = read_settings(FORWARD | {"PROXY_HOST": "0.0.0.0", "PROXY_AUTH_FILE": str(file)})
    assert settings.proxy_auth == "ålice:päss:word "
    assert "word" not in repr(settings)
    assert settings.exposed == (f"PROXY_AUTH_FILE: all users can read {file}: set its mode to 0600",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"hunter2", "user:password"),
        (b":hunter2", "user:password"),
        (b"user:", "user:password"),
        (b"user:hunter2\nother:hunter2", "user:password"),
        (b"user:\xff", "not UTF-8 text"),
        (b"user:" + bytes(70_000), "longer than 64 KiB"),
    ],
)
def test_a_password_file_that_cannot_be_used_is_one_problem_without_its_content(
    content: bytes | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "auth"
    if content is not None:
        file.write_bytes(content)
    (line,) = problems(FORWARD | {"PROXY_HOST": "0.0.0.0", "PROXY_AUTH_FILE": str(file)})
    assert line.startswith("PROXY_AUTH_FILE: ")
    assert says in line
    assert "hunter2" not in line


def test_settings_of_the_other_mode_are_told_of(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("user:password")
    file.chmod(0o600)
    (line,) = problems(GOOD | {"PROXY_AUTH_FILE": str(file)})
    assert line.startswith("PROXY_AUTH_FILE: works only with PROXY_MODE=forward")
    settings = read_settings(GOOD | {"PROXY_INJECT_HOSTS": "a.example"})
    assert (settings.inject_hosts, len(settings.warnings)) == ((), 1)
    settings = read_settings(FORWARD | {"PROXY_ALLOWED_HOSTS": "*", "PROXY_TERMINATION_ENDPOINT": "/end"})
    assert [line.split()[0] for line in settings.warnings] == ["PROXY_ALLOWED_HOSTS", "PROXY_TERMINATION_ENDPOINT"]
    # mitmdump -s has a mode of its own.
    assert read_settings(GOOD | {"PROXY_AUTH_FILE": str(file)}, need_upstream=False).proxy_auth == "user:password"


def test_a_proxy_for_a_command_is_a_forward_proxy_whatever_the_settings_say_about_one_for_others(
    tmp_path: Path,
) -> None:
    services = tmp_path / "services.toml"
    services.write_text('[service.stac]\nurl = "https://stac.example"\nport = 8090\n')
    for_others = {
        "PROXY_MODE": "reverse",
        "PROXY_HOST": "0.0.0.0",
        "PROXY_PORT": "9000",
        "PROXY_ADMIN": "127.0.0.1:8082",
        "PROXY_WORKERS": "4",
        "PROXY_AUTH_FILE": "missing",
        "PROXY_ALLOWED_HOSTS": "a.example",
        "PROXY_TERMINATION_ENDPOINT": "/quit",
        "OPEN_ID_TOKEN_FILE": str(tmp_path / "token"),
        "PROXY_SERVICES": str(services),
    }
    for environ, dotenv in ((GOOD | for_others, {}), (GOOD, for_others)):
        settings = read_settings(environ, dotenv=dotenv, for_command=True)
        assert (settings.mode, settings.host, settings.port, settings.workers) == ("forward", "127.0.0.1", 0, 1)
        assert (settings.admin, settings.proxy_auth, settings.token_file) == (None, None, None)
        assert [service.port for service in settings.services] == [None, None]
        assert settings.warnings == ()
