"""Which of the two names of a site stands where."""

import pytest
from mitmproxy.http import Headers

from eoepca_security.proxy.policy.rewrite import name_the_proxy, name_the_service, share

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
    headers = Headers([(b"location", value.encode()), (b"Content-Location", value.encode()), (b"Link", value.encode())])
    name_the_proxy(headers, PROXY, SERVICE)
    assert list(headers.values()) == [expected, expected, value]


def test_a_page_of_the_proxy_is_one_of_the_service() -> None:
    headers = Headers(origin="http://LOCALHOST:8080", referer="http://localhost:8080/lab?x=http://localhost:8080/")
    name_the_service(headers, PROXY, SERVICE)
    assert dict(headers) == {"origin": SERVICE, "referer": f"{SERVICE}/lab?x=http://localhost:8080/"}


@pytest.mark.parametrize("origin", ["null", "https://app.example", "http://localhost:3000", "https://localhost:8080"])
def test_other_pages_stay_what_they_are(origin: str) -> None:
    headers = Headers(origin=origin, referer=f"{origin}/page")
    name_the_service(headers, PROXY, SERVICE)
    assert dict(headers) == {"origin": origin, "referer": f"{origin}/page"}


def test_an_ipv6_address_and_a_default_port() -> None:
    headers = Headers(origin="http://[::1]", location="http://[0:0:0:0:0:0:0:2]:9000/")
    name_the_service(headers, "http://[::1]:80", SERVICE)
    name_the_proxy(headers, "http://[::1]:80", "http://[::2]:9000")
    assert dict(headers) == {"origin": SERVICE, "location": "http://[::1]:80/"}


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
    headers = Headers(OPEN_TO_ALL + FOR_READERS + REST)
    share(headers, None)
    assert headers.fields == (
        *REST,
        (b"Cross-Origin-Resource-Policy", b"same-origin"),
        (b"Vary", b"Origin, Sec-Fetch-Site"),
    )


def test_an_allowed_origin_gets_what_the_service_has_for_readers() -> None:
    headers = Headers(OPEN_TO_ALL + FOR_READERS + REST)
    share(headers, {"Access-Control-Allow-Origin": "https://app.example", "Vary": "Origin"})
    assert headers.fields == (
        *FOR_READERS,
        *REST,
        (b"Access-Control-Allow-Origin", b"https://app.example"),
        (b"Vary", b"Origin"),
    )
