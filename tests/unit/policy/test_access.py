"""Which requests may come in, and where the token may go: the tables."""

from collections.abc import Sequence
from typing import Any

import pytest

from eoepca_security.oauth.urls import LOOPBACK_NAMES, Host, parse_host, parse_origin
from eoepca_security.proxy.policy.access import Guard
from eoepca_security.proxy.policy.destination import may_get_token

GUARD = Guard((*LOOPBACK_NAMES, "proxy.test", "[2001:db8::1]", "pinned.test:9000"), ["https://app.example"])


def code(guard: Guard, hosts: Sequence[str] = ("localhost:8080",), scheme: str = "http", **headers: Any) -> str:
    """Return the refusal's code; a header's value may be a list of several."""

    def values(name: str) -> list[str]:
        given = headers.get(name.replace("-", "_").lower(), [])
        return [given] if isinstance(given, str) else list(given)

    headers.setdefault("host", list(hosts))
    refusal = guard.refusal(scheme, hosts, values)
    assert refusal is None or refusal.detail
    return refusal.code if refusal else ""


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LOCALHOST:80",
        "LocalHost:1",
        "127.0.0.1",
        "127.0.0.1:8080",
        "[::1]",
        "[::1]:8080",
        "[0:0:0:0:0:0:0:1]:8080",
        "proxy.test:65535",
        "[2001:DB8::1]",
        "pinned.test:9000",
    ],
)
def test_names_of_the_proxy_pass(host: str) -> None:
    assert code(GUARD, [host]) == ""


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("stac.localhost", ""),
        ("STAC.localhost:8080", ""),
        ("my-service_2.localhost:1", ""),
        ("localhost", "host_not_allowed"),
        ("a.b.localhost", "host_not_allowed"),
        (".localhost", "host_not_allowed"),
        ("stac.localhost.", "host_not_allowed"),
        ("stac.localhost.evil.example", "host_not_allowed"),
        ("stac-localhost", "host_not_allowed"),
        ("*.localhost", "host_not_allowed"),
    ],
)
def test_names_of_this_machine_pass_where_they_are_allowed(host: str, expected: str) -> None:
    assert code(Guard(["*.localhost"]), [host]) == expected
    assert code(Guard(["localhost"]), [host]) == ("host_not_allowed" if host != "localhost" else "")


def test_names_of_this_machine_are_sites_of_their_own() -> None:
    guard = Guard(["localhost", "*.localhost"])
    for sender in ("http://localhost:8080", "http://other.localhost:8080"):
        assert code(guard, ["stac.localhost:8080"], origin=sender) == "cross_site_request"
    assert code(guard, ["stac.localhost:8080"], origin="http://stac.localhost:8080") == ""


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "evil-localhost",
        "xlocalhost",
        "localhost.",
        "localhost..",
        ".localhost",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io",
        "127.0.0.2",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0.0.0.0",
        "0",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::1%25lo]",
        "::1",
        "user@localhost",
        "localhost@evil.example",
        "localhost:80@evil.example",
        "http://localhost",
        "localhost/",
        "localhost#",
        "localhost:",
        "localhost:x",
        "localhost:99999",
        "localhost:80:80",
        "localhost, evil.example",
        "localhost localhost",
        " localhost",
        "l\N{CYRILLIC SMALL LETTER O}calhost",
        "pinned.test",
        "pinned.test:9001",
        "",
    ],
)
def test_other_names_do_not(host: str) -> None:
    assert code(GUARD, [host]) == "host_not_allowed"


def test_a_request_has_one_host() -> None:
    assert code(GUARD, []) == "host_not_allowed"
    assert code(GUARD, ["localhost", "evil.example"]) == "host_not_allowed"
    assert code(GUARD, ["localhost", "127.0.0.1"]) == "host_not_allowed"
    assert code(GUARD, ["localhost"], host=["localhost", "localhost"]) == "host_not_allowed"
    # HTTP/2's :authority, or an absolute target, and a Host that agrees.
    assert code(GUARD, ["localhost:1", "LOCALHOST:1"], host="LOCALHOST:1") == ""
    assert code(GUARD, ["localhost:1", "localhost:2"], host="localhost:2") == "host_not_allowed"


def test_a_star_allows_all_names_and_nothing_else() -> None:
    guard = Guard(["*"])
    assert code(guard, ["evil.example"]) == ""
    assert code(guard, ["evil.example/"]) == "host_not_allowed"
    assert code(guard, ["evil.example"], origin="https://other.example") == "cross_site_request"


def test_ip_addresses_can_be_allowed_as_a_whole() -> None:
    guard = Guard((), ip_addresses=True)
    for host in ("10.1.2.3:8081", "[fd00::1]:8081"):
        assert code(guard, [host]) == ""
    for host in ("evil.example", "2130706433", "10.1", "localhost"):
        assert code(guard, [host]) == "host_not_allowed"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec_fetch_site": "none"},
        {"sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"},
        {"sec_fetch_site": "same-site", "origin": "https://app.example"},
        {"sec_fetch_site": "same-site", "referer": "https://app.example/page"},
        {
            "sec_fetch_site": "same-site",
            "sec_fetch_mode": "navigate",
            "sec_fetch_dest": "iframe",
            "referer": "https://app.example/",
        },
        {
            "sec_fetch_site": "none",
            "sec_fetch_mode": "navigate",
            "sec_purpose": "prefetch",
            "referer": "https://app.example/",
        },
        {"sec_fetch_site": "same-origin", "sec_purpose": "prefetch"},
        {"origin": "http://localhost:8080", "sec_fetch_site": "same-origin"},
        {"origin": "HTTP://LOCALHOST:8080"},
        {"referer": "https://evil.example/page"},
        {"origin": "https://app.example", "sec_fetch_site": "cross-site"},
        {"origin": "https://app.example:443"},
        {"referer": "https://app.example/page?q", "sec_fetch_site": "cross-site"},
        {"referer": "https://app.example", "sec_fetch_site": "cross-site"},
    ],
)
def test_what_the_own_origin_an_allowed_one_or_no_page_sends_passes(headers: dict[str, str]) -> None:
    assert code(GUARD, **headers) == ""


@pytest.mark.parametrize(
    "headers",
    [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "Cross-Site"},
        {"sec_fetch_site": "cross-site, same-origin"},
        {"sec_fetch_site": ["same-origin", "same-origin"]},
        {"sec_fetch_site": ""},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "Same-Site"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors", "sec_fetch_dest": "image"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors", "referer": "http://localhost:3000/"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors", "sec_fetch_dest": "document"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": ["navigate", "navigate"]},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "object"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": ["document", "iframe"]},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "origin": "http://localhost:3000"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "origin": "null"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"},
        {"sec_purpose": "prefetch"},
        {"sec_fetch_site": "none", "sec_fetch_mode": "navigate", "sec_purpose": "prefetch"},
        {"sec_fetch_site": "none", "sec_fetch_mode": "navigate", "sec_purpose": "prefetch;prerender"},
        {"sec_fetch_site": "none", "sec_purpose": "prefetch", "referer": "https://evil.example/"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "sec_purpose": "prefetch"},
        {"service_worker": "script"},
        {"service_worker": "script", "sec_fetch_site": "same-origin", "sec_fetch_mode": "same-origin"},
        {"service_worker": "script", "origin": "https://app.example"},
        {"sec_fetch_site": "cross-site", "origin": "http://localhost:8080"},
        {"sec_fetch_site": "cross-site", "referer": "https://evil.example/https://app.example"},
        {"sec_fetch_site": "cross-site", "referer": ["https://app.example/", "https://app.example/"]},
        {"sec_fetch_site": "cross-site", "referer": "https://app.example.evil.example/"},
        {"sec_fetch_site": "cross-site", "referer": "https://app.example@evil.example/"},
        {"sec_fetch_site": "cross-site", "origin": "https://evil.example", "referer": "https://app.example/"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "https://evil.example"},
        {"origin": "https://evil.example", "sec_fetch_site": "same-origin"},
        {"origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
        {"origin": "https://localhost:8080"},
        {"origin": "http://localhost"},
        {"origin": "http://127.0.0.1:8080"},
        {"origin": "http://localhost:8080.evil.example"},
        {"origin": "http://localhost:8080/"},
        {"origin": "http://localhost:8080 https://app.example"},
        {"origin": "http://app.example"},
        {"origin": "https://app.example:444"},
        {"origin": "https://x.app.example"},
        {"origin": ["https://app.example", "https://app.example"]},
        {"origin": ["http://localhost:8080", "https://evil.example"]},
    ],
)
def test_what_another_site_sends_does_not(headers: dict[str, Any]) -> None:
    assert code(GUARD, **headers) == "cross_site_request"


def test_the_own_origin_has_the_clients_scheme_and_no_default_port() -> None:
    assert code(GUARD, ["localhost"], origin="http://localhost") == ""
    assert code(GUARD, ["localhost:80"], origin="http://localhost") == ""
    assert code(GUARD, ["localhost"], "https", origin="https://localhost:443") == ""
    assert code(GUARD, ["localhost"], "https", origin="http://localhost") == "cross_site_request"


def preflight(guard: Guard, method: str = "OPTIONS", **headers: str) -> dict[str, str] | None:
    return guard.preflight(method, lambda name: [headers[key] for key in headers if key == name.replace("-", "_")])


def test_a_preflight_of_an_allowed_origin_is_granted_what_it_asks_for() -> None:
    asked = {"Origin": "https://app.example", "Access_Control_Request_Method": "PUT"}
    granted = preflight(GUARD, **asked)
    assert granted is not None
    assert granted["Access-Control-Allow-Methods"] == "PUT"
    assert "Access-Control-Allow-Headers" not in granted
    assert "Access-Control-Allow-Private-Network" not in granted
    more = preflight(
        GUARD, **asked, Access_Control_Request_Headers="x-a,x-b", Access_Control_Request_Private_Network="true"
    )
    assert more is not None
    assert more["Access-Control-Allow-Headers"] == "x-a,x-b"
    assert more["Access-Control-Allow-Private-Network"] == "true"
    assert not [name for name in more if "Credentials" in name]
    shared = sharing("OPTIONS", **asked)
    assert shared is not None
    assert granted.items() < shared.items()
    assert shared["Access-Control-Allow-Origin"] == "https://app.example"


def sharing(method: str = "GET", **headers: Any) -> dict[str, str] | None:
    def values(name: str) -> list[str]:
        given = headers.get(name.replace("-", "_"), [])
        return [given] if isinstance(given, str) else given

    return GUARD.sharing(method, values)


def test_an_answer_is_shared_with_the_allowed_origin_that_asks() -> None:
    may_load = {"Cross-Origin-Resource-Policy": "cross-origin"}
    may_read = may_load | {"Access-Control-Allow-Origin": "https://app.example", "Vary": "Origin"}
    assert sharing(Origin="https://app.example") == may_read
    assert sharing(Origin="https://app.example", Referer="https://evil.example/") == may_read
    # A browser tells the Origin of whoever is to read the answer.
    assert sharing(Referer="https://app.example/map") == may_load | {"Vary": "Origin, Referer"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://localhost:8080"},
        {"Origin": "null"},
        {"Origin": "https://evil.example"},
        {"Origin": ["https://app.example", "https://app.example"]},
        {"Origin": "null", "Referer": "https://app.example/"},
        {"Origin": "http://localhost:8080", "Referer": "https://app.example/"},
        {"Referer": "http://localhost:8080/"},
        {"Referer": "https://evil.example/https://app.example"},
        {"Referer": "https://app.example@evil.example/"},
        {"Referer": ["https://app.example/", "https://app.example/"]},
    ],
)
def test_an_answer_is_shared_with_nobody_else(headers: dict[str, Any]) -> None:
    assert sharing(**headers) is None


def test_what_is_no_preflight_of_an_allowed_origin_is_not_answered() -> None:
    asked = {"Access_Control_Request_Method": "PUT"}
    assert preflight(GUARD, **asked) is None
    assert preflight(GUARD, **asked, Origin="http://localhost:8080") is None
    assert preflight(GUARD, "GET", **asked, Origin="https://app.example") is None
    assert preflight(GUARD, Origin="https://app.example") is None


def test_hosts_and_origins_are_read_strictly() -> None:
    assert parse_host("Example.ORG:80") == Host("example.org", 80)
    assert str(parse_host("[::1]:80")) == "[::1]:80"
    assert parse_origin("HTTPS://Example.org:443") == "https://example.org"
    assert parse_origin("chrome-extension://abcdef") == "chrome-extension://abcdef"
    for text in ("null", "https://", "example.org", "https://example.org/", "*"):
        with pytest.raises(ValueError, match=r"not a valid (host|origin)"):
            parse_origin(text)


@pytest.mark.parametrize(
    ("scheme", "host", "port", "allowed"),
    [
        ("https", "service.example", 443, True),
        ("https", "SERVICE.example", 443, True),
        ("https", "service.example", 8443, False),
        ("http", "service.example", 80, False),
        ("http", "service.example", 443, False),
        ("https", "other.example", 9200, True),
        ("https", "other.example", 443, False),
        ("http", "other.example", 9200, False),
        ("http", "127.0.0.1", 9000, True),
        ("https", "127.0.0.1", 9000, True),
        ("http", "127.0.0.1", 80, False),
        ("http", "localhost", 80, True),
        ("http", "localhost", 81, False),
        ("http", "::1", 7000, True),
        ("https", "x.service.example", 443, False),
        ("https", "xservice.example", 443, False),
        ("https", "service.example.evil.example", 443, False),
        ("https", "service.example.", 443, False),
        ("https", "service.example@evil.example", 443, False),
        ("https", "evil.example", 443, False),
        ("ftp", "localhost", 80, False),
        ("", "localhost", 80, False),
    ],
)
def test_the_token_goes_to_exactly_these_hosts_and_never_readably(
    scheme: str, host: str, port: int, allowed: bool
) -> None:
    names = ("service.example", "other.example:9200", "127.0.0.1:9000", "localhost", "[::1]:7000")
    assert may_get_token([parse_host(name) for name in names], scheme, host, port) is allowed
    assert may_get_token([], scheme, host, port) is False
