"""The environment of a command that `exec` starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from eoepca_security.proxy.cli.exec_environment import CA_FILES, environment, inherited_proxies, joined_cas
from eoepca_security.proxy.config.settings import Service
from tests.support.services import with_services
from tests.support.tls import write_certificate

URL = "http://exec:password@127.0.0.1:12345"
SETTINGS = with_services(
    Service("stac", "https://stac.example", "/api"),
    Service("my-data", "https://data.example:8443"),
    Service("local", "http://127.0.0.1:9000"),
)


def build(environ: dict[str, str]) -> dict[str, str]:
    return environment(environ, SETTINGS, URL, Path("/x/cas.pem"))


def test_a_command_finds_the_proxy_in_both_cases_the_cas_and_the_services() -> None:
    built = build({"PATH": "/bin", "SSL_CERT_FILE": "/own.pem"})
    assert {built[name] for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY")} == {URL}
    assert {built[name] for name in CA_FILES} == {"/x/cas.pem"}
    assert built["NODE_USE_ENV_PROXY"] == "1"
    assert {name: value for name, value in built.items() if name.startswith("OIDC_")} == {
        "OIDC_PROXY_URL_STAC": "https://stac.example/api",
        "OIDC_PROXY_URL_MY_DATA": "https://data.example:8443",
        "OIDC_PROXY_URL_LOCAL": "http://127.0.0.1:9000",
    }
    assert built["PATH"] == "/bin"
    assert not {"no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"} & set(built)


def test_a_command_gets_none_of_our_secrets() -> None:
    secrets = ("OPEN_ID_REFRESH_TOKEN", "OPEN_ID_AUTH_TOKEN", "OPEN_ID_CONNECT_CLIENT_SECRET")
    built = build(dict.fromkeys(secrets, "canary") | {"OPEN_ID_CONNECT_URL": "https://issuer.example"})
    assert "canary" not in built.values()
    assert built["OPEN_ID_CONNECT_URL"] == "https://issuer.example"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("internal.example,10.0.0.0/8", "internal.example,10.0.0.0/8"),
        ("one.test two.test", "one.test,two.test"),
        ("*", ""),
        ("example", ""),
        (".example", ""),
        ("*.example", ""),
        ("STAC.example:443,other.test", "other.test"),
        ("ac.example", ""),  # requests and wget look at the end only
        ("localhost,127.0.0.1,::1", "localhost,::1"),
        ("127.0.0.0/8", ""),
        ("[::1]:80", "[::1]:80"),
    ],
)
def test_services_are_taken_out_of_no_proxy(given: str, kept: str) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        built = build({name: given})
        assert (built.get("no_proxy", ""), built.get("NO_PROXY", "")) == (kept, kept)


def test_hosts_that_get_the_token_are_taken_out_of_no_proxy_too() -> None:
    settings = replace(SETTINGS, inject_hosts=("Injected.test:8443", "[::1]:80"))
    built = environment({"NO_PROXY": "injected.test,::1,other.test"}, settings, URL, Path("/x"))
    assert built["NO_PROXY"] == "other.test"


def test_other_proxies_are_found_in_both_cases() -> None:
    environ = {"http_proxy": "", "HTTPS_PROXY": "http://other.test", "all_proxy": "socks5://x", "NO_PROXY": "a"}
    assert list(inherited_proxies(environ)) == ["HTTPS_PROXY", "all_proxy"]


def test_the_joined_file_has_the_usual_cas_those_inherited_and_ours_once_and_no_key(tmp_path: Path) -> None:
    own, inherited = tmp_path / "own.pem", tmp_path / "inherited.pem"
    for file in (own, inherited):
        write_certificate(file)
    environ = {
        "GIT_SSL_CAINFO": str(inherited),
        "AWS_CA_BUNDLE": str(inherited),
        "PIP_CERT": str(tmp_path / "missing.pem"),
        "REQUESTS_CA_BUNDLE": str(tmp_path),
    }
    joined = joined_cas(environ, own).decode()
    assert "PRIVATE KEY" not in joined
    for file in (own, inherited):
        assert joined.count(file.read_text().partition("-----BEGIN PRIVATE KEY")[0].strip()) == 1
    assert joined.count("BEGIN CERTIFICATE") > 50
    with pytest.raises(FileNotFoundError):
        joined_cas({}, tmp_path / "missing.pem")
