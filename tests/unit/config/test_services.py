"""The file with the services behind one login."""

import os
import ssl
from pathlib import Path

import certifi
import pytest

from eoepca_security.errors import SettingsError
from eoepca_security.proxy.config.services import MAX_SERVICES, ServicesFile, default_service, read_services
from eoepca_security.proxy.config.settings import Address, Service

ADMIN = Address("127.0.0.1", 8081)
URL = 'url = "https://stac.example/api"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "services.toml"


def read(file: Path, text: str | bytes, *, host: str = "127.0.0.1", default: Service | None = None) -> ServicesFile:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_services(file, host=host, port=8080, admin=ADMIN, default=default)


def problems(file: Path, text: str | bytes, *, host: str = "127.0.0.1", default: Service | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(file, text, host=host, default=default)
    assert all(line.startswith("PROXY_SERVICES: ") and line.isprintable() for line in caught.value.problems)
    return [line.removeprefix("PROXY_SERVICES: ") for line in caught.value.problems]


def test_a_url_is_enough(file: Path) -> None:
    ((service,), warnings) = read(file, "[service.stac]\n" + URL)
    assert service == Service("stac", "https://stac.example", "/api")
    assert service.header_value("abc") == "Bearer abc"
    assert service.own_name == "stac.localhost"
    assert warnings == ()


def test_everything_can_be_set(file: Path) -> None:
    text = """
        [service.open-eo]
        url = "HTTPS://OpenEO.example:443/a/b.c/"
        port = 8090
        hosts = ["openeo.proxy.svc", "OpenEO", "openeo"]
        token = "exchange"
        audience = "openeo"
        resource = "https://openeo.example/"
        scope = "a b:c"
        header = "X-Token"
        format = "Bearer oidc/egi/{token}"
        tls_no_verify = true
    """
    ((service,), warnings) = read(file, text)
    assert service == Service(
        "open-eo",
        "https://openeo.example:443",
        "/a/b.c",
        port=8090,
        hosts=("openeo.proxy.svc", "openeo"),
        token="exchange",
        audience="openeo",
        resource="https://openeo.example/",
        scope="a b:c",
        header="X-Token",
        format="Bearer oidc/egi/{token}",
        tls_no_verify=True,
    )
    assert service.header_value("{token}") == "Bearer oidc/egi/{token}"
    assert service.site == ("https", "openeo.example", 443)
    (warning,) = warnings
    assert warning.startswith("PROXY_SERVICES: [service.open-eo] tls_no_verify is on: anyone on the network path")


def test_what_a_service_hears_of_the_proxy_must_not_have_its_path_twice(file: Path) -> None:
    ((service,), _) = read(file, '[service.stac]\nforwarded = true\nurl = "https://stac.example"')
    assert service.forwarded
    (line,) = problems(file, '[service.stac]\nforwarded = true\nurl = "https://stac.example/api"')
    assert line.startswith("[service.stac] forwarded: has the service repeat /api in its links")


def test_a_ca_file_is_beside_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "ca.pem").write_bytes(Path(certifi.where()).read_bytes())
    monkeypatch.chdir("/")
    ((service,), _) = read(file, f'[service.stac]\nca_file = "ca.pem"\n{URL}')
    assert service.ca_file == file.parent / "ca.pem"


def test_the_default_service_comes_first_and_may_be_the_only_one(file: Path) -> None:
    default = default_service("http://localhost:9200", audience="a", forward_as="apisix", tls_no_verify=True)
    assert (default.name, default.token, default.path, default.audience) == ("default", "shared", "", "a")
    # The warnings about it belong to the settings that it is from.
    assert read(file, "", default=default) == ((default,), ())
    services, _ = read(file, "[service.stac]\n" + URL, default=default)
    assert [service.name for service in services] == ["default", "stac"]
    (problem,) = problems(file, '[service.default]\nurl = "https://d.example"', default=default)
    assert problem == "[service.default]: REMOTE_PROTECTED_DOMAIN is this service: remove one of the two"
    assert read(file, '[service.default]\nurl = "https://d.example"').services[0].name == "default"


def test_plain_http_to_another_machine_is_warned_of(file: Path) -> None:
    warnings = read(file, '[service.a]\nurl = "http://a:9200"\n[service.b]\nurl = "http://[::1]:9200"').warnings
    assert warnings == (
        "PROXY_SERVICES: [service.a] url is plain http: anyone on the network path to a can read the token",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[service", "is not valid TOML: "),
        (b"\xff", "cannot be read (not UTF-8 text)"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"#" * (1024 * 1024 + 1), "longer than 1 MiB"),
        (b"", "has no service: add a table [service.NAME]"),
        (b"\xef\xbb\xbf[service]", "has no service"),
        (b"service = 1", "service is not a table"),
        (b"[services.a]\n[service.a]\nurl = 'https://a.example'", "'services' is unknown"),
        (b"[service]\nurl = 'https://a.example'", "[service] 'url': must be in a table"),
    ],
)
def test_a_file_of_another_form_is_told(file: Path, content: bytes, says: str) -> None:
    (line,) = problems(file, content)
    assert says in line


def test_a_file_that_is_not_there_is_told(file: Path) -> None:
    with pytest.raises(SettingsError, match=r"^--services: .*services.toml cannot be read \(No such file"):
        read_services(file, host="127.0.0.1", port=8080, admin=None, source="--services")


def test_there_is_a_limit(file: Path) -> None:
    text = "".join(f'[service.s{i}]\nurl = "https://s{i}.example"\n' for i in range(MAX_SERVICES))
    assert len(read(file, text).services) == MAX_SERVICES
    (line,) = problems(file, text + "[service.more]\n" + URL)
    assert "has 501 services" in line


@pytest.mark.parametrize("name", ["A", "a_b", "-a", "a-", '"a.b"', '""', '"a\\nb"', "a" * 64])
def test_a_name_is_a_dns_label(file: Path, name: str) -> None:
    (line,) = problems(file, f"[service.{name}]\n{URL}")
    assert line.endswith("]: is not a valid name: use up to 63 of a-z, 0-9 and -, with no - at the ends")


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("", "url", "is required"),
        ("url = 5", "url", "text in quotation marks"),
        ("url = ''", "url", "is empty"),
        (r'url = "https://a.example\n"', "url", "control characters"),
        ("url = 'a.example'", "url", "not a valid URL"),
        ("url = 'ftp://a.example'", "url", "not a valid URL"),
        ("url = 'https://a.example:0'", "url", "not a valid URL"),
        ("url = 'https://a.example:99999'", "url", "not a valid URL"),
        ("url = 'https://é.example'", "url", "not a valid URL"),
        ("url = 'https://user:canary@a.example'", "url", "before the @"),
        ("url = 'https://@a.example'", "url", "before the @"),
        ("url = 'https://a.example?'", "url", "? or # part"),
        ("url = 'https://a.example/#'", "url", "? or # part"),
        *(
            (f"url = 'https://a.example{path}'", "url", "different ways")
            for path in (
                *("/a/../b", "/..", "/./a", "//a", "/a//", "/a//b", "/a%2fb", "/%2E%2e", "/a;b", "/é", "/a b", "/a\\b"),
                *("/a%20b", "/%", "//", "/a./b", "/..."),
            )
        ),
        ("url = 'http://localhost:8080'", "url", "the proxy itself"),
        ("url = 'http://[::1]:8081/x'", "url", "the proxy itself"),
        ("url = 'http://0.0.0.0:8080'", "url", "the proxy itself"),
        ("url = 'http://a.localhost:8080'", "url", "the proxy itself"),
        ("port = 9000\nurl = 'http://127.0.0.1:9000'", "url", "the proxy itself"),
        (URL + "port = 99999", "port", "99999 is not a valid port: use 1 to 65535"),
        (URL + "port = 0", "port", "not a valid port"),
        (URL + "port = true", "port", "must be a number"),
        (URL + "port = '8090'", "port", "must be a number"),
        (URL + "port = 8080", "port", "the port of the proxy"),
        (URL + "port = 8081", "port", "the port of the admin listener"),
        (URL + "hosts = 'a'", "hosts", "list of names"),
        (URL + "hosts = [1]", "hosts", "list of names"),
        (URL + "hosts = ['a b']", "hosts", "not a valid name"),
        (URL + "hosts = ['*']", "hosts", "not a valid name"),
        (URL + "hosts = ['a:80']", "hosts", "without a port"),
        (URL + "hosts = ['LOCALHOST']", "hosts", "the proxy itself"),
        (URL + "hosts = ['[0:0::1]']", "hosts", "the proxy itself"),
        (URL + "token = 'magic'", "token", "use one of shared, scope, resource, exchange"),
        (URL + "token = 'scope'", "token", "scope needs scope"),
        (URL + "token = 'resource'\nscope = 'a'", "token", "resource needs resource"),
        (URL + "token = 'exchange'\nscope = 'a'", "token", "exchange needs audience or resource"),
        (URL + "scope = 'a'", "scope", 'has no effect with token = "shared": use token = "scope"'),
        (URL + "resource = 'https://r.example'", "resource", 'has no effect with token = "shared"'),
        (
            URL + "token = 'scope'\nscope = 'a'\nresource = 'https://r.example'",
            "resource",
            'has no effect with token = "scope": use token = "resource" or "exchange", or remove it',
        ),
        (URL + "token = 'scope'\nscope = 'a  b'", "scope", "one space"),
        (URL + "token = 'scope'\nscope = 'a\"b'", "scope", "one space"),
        *(
            (URL + f"token = 'resource'\nresource = '{resource}'", "resource", "not an absolute URI")
            for resource in ("r.example", "/a", "https:", "https://r.example#", "https://r.example/é", "https://a b")
        ),
        (URL + r'audience = "a\tb"', "audience", "control characters"),
        (URL + "credential = 'refresh_token'", "credential", "use one of access_token, id_token"),
        (
            URL + "token = 'exchange'\naudience = 'a'\ncredential = 'id_token'",
            "credential",
            'id_token needs token = "shared": an ID token is for the client',
        ),
        (URL + "credential = 'id_token'\naudience = 'a'", "audience", "has no effect"),
        *(
            (URL + f"header = '{header}'", "header", "another meaning")
            for header in (
                *("Host", "connection", "Content-Length", "TRANSFER-ENCODING", "Cookie", "Upgrade", "TE", "Trailer"),
                *(
                    "Expect",
                    "Proxy-Authorization",
                    "Forwarded",
                    "X-Forwarded-Host",
                    "Origin",
                    "Referer",
                    "Sec-Fetch-Site",
                ),
                *("Content_Type", "X_Forwarded_For", "Keep-Alive"),
            )
        ),
        *((URL + f"header = '{header}'", "header", "not a header") for header in ("A B", "A:", "é", "(a)")),
        *(
            (URL + f"format = '{form}'", "format", "must have {token} once")
            for form in (
                *(
                    "Bearer",
                    "{token} {token}",
                    "{token}{x}",
                    "{{token}}",
                    "{token",
                    " {token}",
                    "{token} ",
                    "é {token}",
                ),
                "{Token}",
            )
        ),
        (URL + r'format = "a\n{token}"', "format", "control characters"),
        (URL + "forward_as = 'nginx'", "forward_as", "use one of bearer, apisix"),
        (URL + "forward_as = 'apisix'\nheader = 'X-Token'", "header", 'has no effect with forward_as = "apisix"'),
        (URL + "forward_as = 'apisix'\nformat = '{token}'", "format", "has no effect"),
        (URL + "forward_as = 'apisix'\ncredential = 'id_token'", "credential", "has no effect"),
        (URL + "forwarded = 'yes'", "forwarded", "true or false"),
        (URL + "tls_no_verify = 1", "tls_no_verify", "true or false"),
        (URL + "ca_file = '/nowhere/ca'", "ca_file", "/nowhere/ca cannot be used: No such file"),
        (URL + "ca_file = 'services.toml'", "ca_file", "services.toml cannot be used"),
        (URL + "tokens = 'scope'", "tokens", "is unknown: did you mean token?"),
        (URL + "token_file = '/nowhere/token'", "token_file", "/nowhere does not exist: create it"),
        (URL + "token_file = 'services.toml'", "token_file", "services.toml has something else in it than a token"),
        (URL + "token_file = 1", "token_file", "text in quotation marks"),
        (URL + "client_cert_file = 'a'", "client_cert_file", "is unknown"),
        (URL + "secret_of_mine = 'canary'", "secret_of_mine", "is unknown: use url, port, "),
        (URL + "[service.a.audience]", "audience", "text in quotation marks"),
    ],
)
def test_each_problem_is_one_line_that_names_service_and_key(file: Path, text: str, key: str, says: str) -> None:
    lines = problems(file, "[service.a]\n" + text)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"[service.a] {key}: ")
    assert says in lines[0]
    assert "canary" not in lines[0]


def test_each_service_has_a_token_file_of_its_own_in_the_files_folder(file: Path) -> None:
    one, two = f"[service.a]\n{URL}token_file = 'a'\n", "[service.b]\nurl = 'https://b.example'\ntoken_file = "
    services = read(file, f"{one}{two}'{file.parent}/b'").services
    assert [service.token_file for service in services] == [file.parent / "a", file.parent / "b"]
    assert problems(file, f"{one}{two}'a'") == ["[service.b] token_file: is that of a: choose another one"]


def test_what_has_the_same_value_as_the_default_is_no_contradiction(file: Path) -> None:
    ((service,), _) = read(file, f"[service.a]\n{URL}forward_as = 'apisix'\nheader = 'Authorization'")
    assert service.forward_as == "apisix"


def test_an_address_of_another_interface_is_not_the_proxy(file: Path) -> None:
    service = "[service.a]\nurl = 'http://127.0.0.1:8080'"
    assert read(file, service, host="192.0.2.1").services
    assert problems(file, service, host="0.0.0.0")
    assert problems(file, "[service.a]\nurl = 'http://192.0.2.1:8080'", host="192.0.2.1")


def test_all_problems_are_told_at_once(file: Path) -> None:
    text = """
        [service.a]
        url = "https://x.example"
        port = 8090
        hosts = ["shared.svc", "b.localhost"]
        tls_no_verify = true
        [service.b]
        url = "https://X.example:443/"
        port = 8090
        hosts = ["Shared.svc", "b.localhost"]
        [service.c]
        url = "https://c.example/Api"
        [service.d]
        url = "https://c.example/api"
        headers = "X"
        [service.e]
        url = "https://x.example/e"
        tls_no_verify = true
        [service.f]
        url = "http://localhost:8090"
    """
    assert problems(file, text) == [
        "[service.d] headers: is unknown: did you mean header?",
        "[service.b] port: 8090 is the port of a: choose another",
        "[service.a] hosts: b.localhost is a name of b: choose another",
        "[service.b] hosts: shared.svc is a name of a: choose another",
        "[service.f] url: is the address of the proxy itself: change it or the proxy's port",
        "[service.b] url: is that of a: remove one, or give each a path of its own",
        "[service.b] ca_file, tls_no_verify: must be those of a, because both have the same scheme, host and port",
        "[service.d] url: is that of c: remove one, or give each a path of its own",
    ]


def test_the_default_service_takes_part_in_the_checks(file: Path) -> None:
    default = default_service("https://stac.example", tls_no_verify=True)
    (line,) = problems(file, "[service.stac]\n" + URL, default=default)
    assert line.startswith("[service.stac] ca_file, tls_no_verify: must be those of default")
    (line,) = problems(
        file, "[service.a]\nurl = 'https://stac.example:443/'", default=default_service("https://stac.example")
    )
    assert line.startswith("[service.a] url: is that of default")


def test_a_certificate_that_no_ca_made_is_no_surprise(file: Path) -> None:
    (file.parent / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(b"nothing"))
    (line,) = problems(file, f"[service.a]\n{URL}ca_file = 'ca.pem'")
    assert line.startswith("[service.a] ca_file: ")


def test_in_forward_mode_ports_and_names_at_the_proxy_have_no_effect(file: Path) -> None:
    file.write_text(
        f'[service.stac]\n{URL}port = 8080\nhosts = ["stac.svc"]\n[service.data]\nurl = "http://10.0.0.1"\n'
    )
    services, warnings = read_services(file, host="127.0.0.1", port=8080, admin=ADMIN, is_forward=True)
    assert [(service.port, service.hosts) for service in services] == [(None, ()), (None, ())]
    assert any("data" in warning and "plain http" in warning for warning in warnings)
    assert any("port and hosts of stac are not used" in warning for warning in warnings)
    own = read_services(file, host="127.0.0.1", port=0, admin=None, is_forward=True, tells_unused=False)
    assert own.services == services
    assert not any("not used" in warning for warning in own.warnings)


def test_a_ca_file_that_never_ends_is_a_problem(file: Path) -> None:
    os.mkfifo(file.parent / "pipe")
    for name in ("pipe", "/dev/zero"):
        (line,) = problems(file, f"[service.a]\n{URL}ca_file = '{name}'")
        assert line.startswith("[service.a] ca_file: ")
        assert line.endswith("it is not a file")


@pytest.mark.timeout(20)
def test_many_hosts_take_no_time(file: Path) -> None:
    names = ", ".join(f'"h{number}.svc"' for number in range(60_000))
    ((service,), _) = read(file, f"[service.a]\n{URL}hosts = [{names}]")
    assert len(service.hosts) == 60_000
