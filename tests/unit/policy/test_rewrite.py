"""Which of the two names of a site stands where."""

import pytest

from eoepca_security.proxy.policy.rewrite import (
    naming_the_proxy,
    naming_the_service,
    shared,
    with_locations,
    with_usable_cookies,
    without_cookies,
)

PROXY = "http://localhost:8080"
SERVICE = "https://service.example"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://service.example/jobs/1?a=b#c", "http://localhost:8080/jobs/1?a=b#c"),
        ("https://SERVICE.example:443/", "http://localhost:8080/"),
        ("https://service.example", "http://localhost:8080"),
        ("https://service.example?a", "http://localhost:8080?a"),
        ("https://service.example/Zoë", "http://localhost:8080/Zoë"),
        ("https://sérvice.example/", "https://sérvice.example/"),
        ("/jobs/1", "/jobs/1"),
        ("//service.example/jobs/1", "http://localhost:8080/jobs/1"),
        ("//SERVICE.example:443", "http://localhost:8080"),
        ("//service.example:80/", "//service.example:80/"),
        ("//evil.example/", "//evil.example/"),
        ("///service.example/", "///service.example/"),
        # As services say that do not know of the server that speaks TLS for them.
        ("http://service.example/jobs/1", "http://localhost:8080/jobs/1"),
        ("http://service.example:80/", "http://localhost:8080/"),
        ("HTTP://service.example:443/", "http://localhost:8080/"),
        ("http://service.example:8000/", "http://service.example:8000/"),
        ("http://evil.example/", "http://evil.example/"),
        ("ftp://service.example/", "ftp://service.example/"),
        ("https://service.example:8443/", "https://service.example:8443/"),
        ("https://service.example.evil.example/", "https://service.example.evil.example/"),
        ("https://service.example@evil.example/", "https://service.example@evil.example/"),
        ("https://evil.example/https://service.example/", "https://evil.example/https://service.example/"),
        (
            "https://keycloak.example/login?to=https://service.example/",
            "https://keycloak.example/login?to=https://service.example/",
        ),
        ("https://[::bad/", "https://[::bad/"),
        ("https://service.example:99999/", "https://service.example:99999/"),
        ("", ""),
    ],
)
def test_only_what_leads_to_the_service_itself_leads_to_the_proxy(value: str, expected: str) -> None:
    fields = tuple((name, value.encode()) for name in (b"location", b"Content-Location", b"Link"))
    assert [moved.decode() for _, moved in naming_the_proxy(fields, PROXY, SERVICE)] == [expected, expected, value]


@pytest.mark.parametrize(
    ("service", "location", "is_moved"),
    [
        ("https://service.example:9200", "http://service.example:9200/", True),
        ("https://service.example:9200", "http://service.example/", False),
        ("https://service.example:9200", "//service.example:9200/", True),
        ("https://service.example:9200", "//service.example/", False),
        ("http://service.example", "//service.example/", True),
        # Whoever is sent from http to https has to get there.
        ("http://service.example", "https://service.example/", False),
        ("http://service.example:9200", "https://service.example:9200/", False),
    ],
)
def test_what_a_service_calls_itself_depends_on_its_port(service: str, location: str, is_moved: bool) -> None:
    ((_, moved),) = naming_the_proxy(((b"Location", location.encode()),), PROXY, service)
    assert moved.decode() == (f"{PROXY}/" if is_moved else location)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("5; url=https://service.example/a?b", "5; url=http://localhost:8080/a?b"),
        ("0;URL='http://service.example/a'", "0;URL='http://localhost:8080/a'"),
        (' 0.5 , "//service.example/a"', ' 0.5 , "http://localhost:8080/a"'),
        ("3; https://service.example", "3; http://localhost:8080"),
        ("5", "5"),
        ("5; url=/a", "5; url=/a"),
        (
            "5; url=https://evil.example/?https://service.example/",
            "5; url=https://evil.example/?https://service.example/",
        ),
    ],
)
def test_refresh_is_like_location(value: str, expected: str) -> None:
    assert naming_the_proxy(((b"refresh", value.encode()),), PROXY, SERVICE) == ((b"refresh", expected.encode()),)


@pytest.mark.parametrize(
    ("proxy", "cookie", "expected"),
    [
        (PROXY, "a=b; Path=/; Secure; HttpOnly", "a=b; Path=/; HttpOnly"),
        (PROXY, "a=b;secure;DOMAIN = .service.example;Max-Age=5", "a=b;Max-Age=5"),
        (PROXY, "a=b; SameSite=None; Secure; Partitioned", "a=b"),
        (PROXY, "a=b; SameSite=Lax; Secure", "a=b; SameSite=Lax"),
        (PROXY, "secure=domain; Path=/secure", "secure=domain; Path=/secure"),
        (PROXY, "Secure", "Secure"),
        (PROXY, "__Host-a=b; Path=/; Secure", "__Host-a=b; Path=/; Secure"),
        (PROXY, "__secure-a=b; Domain=service.example; Secure; SameSite=None", "__secure-a=b; Secure; SameSite=None"),
        ("https://localhost:8080", "a=b; Secure; SameSite=None; Domain=service.example", "a=b; Secure; SameSite=None"),
    ],
)
def test_cookies_fit_the_address_that_the_client_uses(proxy: str, cookie: str, expected: str) -> None:
    fields = ((b"set-cookie", cookie.encode()), (b"X", b"Secure"))
    assert with_usable_cookies(fields, proxy) == ((b"set-cookie", expected.encode()), (b"X", b"Secure"))


@pytest.mark.parametrize(
    ("cookie", "expected"),
    [
        ("a=b; Path=/api/x", "a=b; Path=/x"),
        ("a=b;PATH = /api/x/ ; HttpOnly", "a=b;PATH =/x/; HttpOnly"),
        ("a=b; Path=/api/; path=/api", "a=b; Path=/; path=/"),
        ("a=b; Path=/api//evil", "a=b; Path=//evil"),
        ("a=b; Path=/", "a=b; Path=/"),
        ("__Host-a=b; Path=/; Secure", "__Host-a=b; Path=/; Secure"),
        ("a=b; Path=/apis/x", "a=b; Path=/"),
        ("a=b; Path=/other", "a=b; Path=/"),
        # Clients take the folder of the page for these (RFC 6265 §5.1.4), which they see without the prefix.
        ("a=b", "a=b"),
        ("a=b; Path", "a=b; Path"),
        ("a=b; Path=api", "a=b; Path=api"),
        ("Path=/api/x; X-Path=/api/x", "Path=/api/x; X-Path=/api/x"),
    ],
)
def test_paths_of_cookies_are_those_that_the_client_uses(cookie: str, expected: str) -> None:
    assert with_usable_cookies(((b"Set-Cookie", cookie.encode()),), PROXY, "/api") == (
        (b"Set-Cookie", expected.encode()),
    )


def test_cookies_are_dropped() -> None:
    kept = ((b"Accept", b"a=b"), (b"X-Cookie", b"a=b"))
    cookies = ((b"cookie", b"a=b"), (b"Cookie", b"c=d"), (b"SET-COOKIE", b"e=f"))
    assert without_cookies((kept[0], *cookies, kept[1])) == kept


def test_a_page_of_the_proxy_is_one_of_the_service() -> None:
    page = b"http://localhost:8080/lab?x=http://localhost:8080/"
    fields = naming_the_service(((b"origin", b"http://LOCALHOST:8080"), (b"Referer", page)), PROXY, SERVICE)
    assert fields == (
        (b"origin", SERVICE.encode()),
        (b"Referer", f"{SERVICE}/lab?x=http://localhost:8080/".encode()),
    )


def test_a_page_of_the_proxy_has_the_services_prefix() -> None:
    fields = ((b"Origin", PROXY.encode()), (b"referer", f"{PROXY}/x?y".encode()), (b"Referer", PROXY.encode()))
    assert naming_the_service(fields, PROXY, SERVICE, "/api") == (
        (b"Origin", SERVICE.encode()),
        (b"referer", f"{SERVICE}/api/x?y".encode()),
        (b"Referer", f"{SERVICE}/api".encode()),
    )


def test_all_locations_can_be_rewritten() -> None:
    fields = (
        (b"LOCATION", b"/a"),
        (b"Content-Location", b""),
        (b"Link", b"/a"),
        (b"refresh", b"5"),
        (b"refresh", b"5;"),
        (b"Refresh", b"0; URL = /a"),
        (b"Refresh", b"0;url='/a'; b"),
        (b"Refresh", b'0;"/a'),
        (b"Refresh", b"/a"),
    )
    assert [value for _, value in with_locations(fields, lambda url: b"<" + url + b">")] == [
        b"</a>",
        b"<>",
        b"/a",
        b"5",
        b"5;<>",
        b"0; URL = </a>",
        b"0;url='</a>'; b",
        b'0;"</a>',
        b"/a",
    ]


@pytest.mark.parametrize("origin", ["null", "https://app.example", "http://localhost:3000", "https://localhost:8080"])
def test_other_pages_stay_what_they_are(origin: str) -> None:
    fields = ((b"origin", origin.encode()), (b"referer", f"{origin}/page".encode()))
    assert naming_the_service(fields, PROXY, SERVICE) == fields


def test_an_ipv6_address_and_a_default_port() -> None:
    request = naming_the_service(((b"origin", b"http://[::1]"),), "http://[::1]:80", SERVICE)
    assert request == ((b"origin", SERVICE.encode()),)
    answer = ((b"location", b"http://[0:0:0:0:0:0:0:2]:9000/"),)
    assert naming_the_proxy(answer, "http://[::1]:80", "http://[::2]:9000") == ((b"location", b"http://[::1]:80/"),)


OPEN_TO_ALL = (
    (b"Access-Control-Allow-Origin", b"*"),
    (b"access-control-allow-credentials", b"true"),
    (b"ACCESS-CONTROL-ALLOW-HEADERS", b"*"),
    (b"Access-Control-Allow-Origin", b"null"),
    (b"Access-Control-Whatever-Comes", b"1"),
    (b"Cross-Origin-Resource-Policy", b"cross-origin"),
    (b"cross-origin-resource-policy", b"same-site"),
)
FOR_READERS = ((b"Access-Control-Expose-Headers", b"Link"), (b"Timing-Allow-Origin", b"*"))
REST = ((b"Vary", b"Accept"), (b"Cross-Origin-Opener-Policy", b"same-origin"), (b"ETag", b"1"))


def test_what_the_service_says_about_other_sites_is_replaced() -> None:
    assert shared(OPEN_TO_ALL + FOR_READERS + REST, None) == (
        *REST,
        (b"Cross-Origin-Resource-Policy", b"same-origin"),
        (b"Vary", b"Origin, Sec-Fetch-Site"),
    )


def test_an_allowed_origin_gets_what_the_service_has_for_readers() -> None:
    sharing = {"Access-Control-Allow-Origin": "https://app.example", "Vary": "Origin"}
    assert shared(OPEN_TO_ALL + FOR_READERS + REST, sharing) == (
        *FOR_READERS,
        *REST,
        (b"Access-Control-Allow-Origin", b"https://app.example"),
        (b"Vary", b"Origin"),
    )
