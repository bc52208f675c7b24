"""Which of the two names of a site stands where."""

import pytest

from eoepca_security.proxy.policy.rewrite import naming_the_proxy, naming_the_service, shared

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
        ("//service.example/", "//service.example/"),
        ("http://service.example/", "http://service.example/"),
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


def test_a_page_of_the_proxy_is_one_of_the_service() -> None:
    page = b"http://localhost:8080/lab?x=http://localhost:8080/"
    fields = naming_the_service(((b"origin", b"http://LOCALHOST:8080"), (b"Referer", page)), PROXY, SERVICE)
    assert fields == (
        (b"origin", SERVICE.encode()),
        (b"Referer", f"{SERVICE}/lab?x=http://localhost:8080/".encode()),
    )


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
