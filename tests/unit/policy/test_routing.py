"""Which of several services a request is for."""

import random
import re
from contextlib import suppress
from itertools import product
from time import process_time
from urllib.parse import unquote

import pytest

from eoepca_security.oauth.urls import Host, parse_host
from eoepca_security.proxy.config.settings import Service
from eoepca_security.proxy.policy.rewrite import naming_the_proxy
from eoepca_security.proxy.policy.routing import AmbiguousPath, Routes

# Three share a host, one of them inside another; one is alone with a path, one without.
DEFAULT = Service("default", "https://gateway.example")
API = Service("api", "https://gateway.example:443", "/api", port=8090, hosts=("api.svc",))
INNER = Service("inner", "https://gateway.example", "/api/inner")
PREFIXED = Service("prefixed", "https://prefixed.example:8443", "/v1")
ALONE = Service("alone", "http://[::1]:9200", port=8091)
ROUTES = Routes((DEFAULT, API, INNER, PREFIXED, ALONE))
WITHOUT_DEFAULT = Routes((API, INNER))


def way_in(service: Service) -> str | None:
    return f"http://{service.own_name}:8080"


@pytest.mark.parametrize(
    ("host", "port", "service"),
    [
        ("localhost:8080", 8080, DEFAULT),
        ("127.0.0.1", 8080, DEFAULT),
        ("proxy.example:8090", 8080, DEFAULT),
        ("default.localhost", 8080, DEFAULT),
        ("API.localhost:8080", 8080, API),
        ("api.svc:9000", 8080, API),
        ("api", 8080, DEFAULT),
        ("inner.localhost", 8080, INNER),
        # A misspelled name must not be another service's.
        ("iner.localhost", 8080, None),
        ("a.api.localhost", 8080, None),
        ("localhost", 8090, API),
        ("api.localhost:8090", 8090, API),
        ("proxy.example", 8090, API),
        ("api.svc", 8091, None),
        ("inner.localhost", 8091, None),
    ],
)
def test_name_and_port_decide_which_service_is_called(host: str, port: int, service: Service | None) -> None:
    assert ROUTES.called(parse_host(host), port) is service


def test_without_a_default_service_each_must_be_named() -> None:
    assert WITHOUT_DEFAULT.called(Host("localhost", 8080), 8080) is None
    assert WITHOUT_DEFAULT.called(Host("localhost", 8080), 8090) is API
    assert WITHOUT_DEFAULT.names == ("api.localhost", "api.svc", "inner.localhost")
    assert Routes(()).called(Host("localhost", 8080), 8080) is None


@pytest.mark.parametrize("service", [DEFAULT, PREFIXED])
def test_the_only_service_has_all_names(service: Service) -> None:
    routes = Routes((service,))
    for name in ("localhost", "proxy.example", service.own_name):
        assert routes.called(Host(name, None), 8080) is service
    others = routes.called(Host("anything.localhost", None), 8080)
    assert others is (service if service is DEFAULT else None)
    assert routes.names == ("localhost", service.own_name)


def test_services_are_found_by_name() -> None:
    assert ROUTES.named("inner") is INNER
    assert ROUTES.named("other") is None
    assert ROUTES.names[:3] == ("localhost", "default.localhost", "api.localhost")


@pytest.mark.parametrize(
    ("called", "path", "service", "upstream_path"),
    [
        (DEFAULT, "/", DEFAULT, "/"),
        (DEFAULT, "/apis/x?y=/../z", DEFAULT, "/apis/x?y=/../z"),
        (DEFAULT, "/api", API, "/api"),
        (DEFAULT, "/api?x", API, "/api?x"),
        (DEFAULT, "/api/inner/x", INNER, "/api/inner/x"),
        (API, "/", API, "/api/"),
        (API, "/x?a=%2e%2e/", API, "/api/x?a=%2e%2e/"),
        (API, "/inner", INNER, "/api/inner"),
        (API, "/inner/x", INNER, "/api/inner/x"),
        (API, "/innermost", API, "/api/innermost"),
        (INNER, "/api", INNER, "/api/inner/api"),
        (PREFIXED, "/x", PREFIXED, "/v1/x"),
        # These lead to the same service, however they are read.
        (API, "/a%2Fb", API, "/api/a%2Fb"),
        (API, "/a%2520b", API, "/api/a%2520b"),
        (API, "/proxy/https://x.example//y", API, "/api/proxy/https://x.example//y"),
        (API, "/a;v=1/b%20c.d/Zo%C3%AB/Zo%EB/100%25/..a/b..", API, "/api/a;v=1/b%20c.d/Zo%C3%AB/Zo%EB/100%25/..a/b.."),
        (API, "/x\\y", API, "/api/x\\y"),
        (API, "/Zo\udcebë", API, "/api/Zo\udcebë"),
        (API, "//", API, "/api//"),
        # Where there is no choice, paths are not looked at.
        (ALONE, "/a/../%2e%2e//b", ALONE, "/a/../%2e%2e//b"),
        (ALONE, "*", ALONE, "*"),
        (ALONE, "", ALONE, ""),
    ],
)
def test_the_path_decides_among_services_of_one_host(
    called: Service, path: str, service: Service, upstream_path: str
) -> None:
    assert ROUTES.route(called, path) == (service, upstream_path)
    if path.startswith("/"):
        assert ROUTES.at(*service.site, upstream_path) is service


DOTS = [".", "..", "%2e", "%2E%2e", ".%2e", "%252e%252e", "%25252e.", "..;x", "%2e%2e%3bx", "..%20", ".. ", "%c0%ae."]
DOTS += ["..%2f", "..\\", "%2e%2e%5cx", "..%00", "..%09", ".\t.", "%u002e%u002e", "\uff0e\uff0e", "%EF%BC%8E.", "..%23"]
DOTS += ["%e0%80%ae.", "%f0%80%80%ae.", "\udcc0\udcae.", "%%32%65.", "...", "%2%65%2e", "x%2f..%2fy", "x/../../y"]


@pytest.mark.parametrize("called", [DEFAULT, API, INNER, PREFIXED])
@pytest.mark.parametrize("dots", DOTS)
def test_dots_in_any_form_are_refused_where_paths_matter(called: Service, dots: str) -> None:
    for path in (f"/{dots}/x", f"/x/{dots}", f"/x/y/{dots}/inner/z?q"):
        with pytest.raises(AmbiguousPath):
            ROUTES.route(called, path)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "//inner",
            "/%69nner/x",
            "/inner%2fx",
            "/inner;x",
            "/inner;x/y",
            "/;a/inner",
            "/Inner/x",
            "/INNER",
            "/inner\\x",
        ),
        *(
            "/\\inner",
            "/%2finner",
            "/%5cinner",
            "/inner%3fx",
            "/inner%23x",
            "/inner#x",
            "/inner.",
            "/inner%20/x",
            "/%20/inner",
        ),
        *("/%2569nner", "/%25252569nner", "/%2525252569nner", "/inner%00", "/in\x00ner", "/in%0aner", "/in%7fner"),
        *("/\uff49nner", "/%ef%bd%89nner", "/inner%252f", "/%2F%2Finner", "/%3B/inner", "/inner%u002f", "/inner%c0%af"),
        *("*", "", "inner", "http://gateway.example/api", "/%25252525252525"),
    ],
)
def test_a_path_that_could_be_another_services_is_refused(path: str) -> None:
    with pytest.raises(AmbiguousPath):
        ROUTES.route(API, path)


PIECES = [
    "inner",
    "INNER",
    "%69nner",
    "inn",
    "er",
    "x",
    "api",
    "/",
    "/",
    "//",
    "%2f",
    "%252F",
    "\\",
    "%5c",
    "..",
    ".",
    "%2e",
]
PIECES += [
    "%252e",
    ";",
    ";v=1",
    "%3b",
    "%00",
    "%20",
    "%09",
    "%23",
    "%3f",
    "#",
    "%25",
    "%",
    "2e",
    "%c0%ae",
    "\uff0f",
    "é",
]


def read(path: str, *, decodings: int, slashes: str, params: bool, dots: bool, end: str) -> str:
    """Return a path as some server reads it."""
    for _ in range(decodings):
        path = unquote(path)
    path = re.split(f"[{end}]", path, maxsplit=1)[0] if end else path
    folders: list[str] = []
    for segment in re.split(f"[{slashes}]+", path):
        name = segment.partition(";")[0] if params else segment
        if dots and name == "..":
            del folders[-1:]
        elif name and not (dots and name == "."):
            folders.append(name)
    return "/" + "/".join(folders)


def test_whatever_way_a_server_reads_a_path_it_is_the_service_whose_token_it_gets() -> None:
    chance = random.Random(1)
    paths = ["/" + "".join(chance.choices(PIECES, k=chance.randint(1, 6))) for _ in range(3000)]
    slashes, ends, booleans = ["/", "/\\\\"], ["", "\0?#"], [True, False]
    servers = list(product([0, 1, 2], slashes, booleans, booleans, ends, booleans))
    accepted = 0
    for called, path in product((DEFAULT, API), paths):
        try:
            service, sent = ROUTES.route(called, path)
        except AmbiguousPath:
            continue
        accepted += 1
        # A fragment of the readings for each path: all of them take long.
        for decodings, slash, params, dots, end, ignores_case in chance.sample(servers, 16):
            is_read = read(sent, decodings=decodings, slashes=slash, params=params, dots=dots, end=end)
            is_read = is_read.lower() if ignores_case else is_read
            place = next(one for one in (INNER, API, DEFAULT) if f"{is_read}/".startswith(f"{one.path}/"))
            assert place is service, (sent, is_read)
    assert accepted > 500


def test_reading_a_long_path_takes_no_time() -> None:
    begin = process_time()
    for unit in ("%25", "%2525", ". ", "/", ";", "%c3%ab", "\\", "..", "ë", "%"):
        with suppress(AmbiguousPath):
            ROUTES.route(API, "/" + unit * (200_000 // len(unit)) + "x")
    assert process_time() - begin < 5


@pytest.mark.parametrize(
    ("url", "service"),
    [
        (("https", "GATEWAY.example", 443, "/api/x"), API),
        (("https", "gateway.example", 443, "/x"), DEFAULT),
        (("https", "gateway.example", 8443, "/x"), None),
        (("http", "gateway.example", 443, "/x"), None),
        (("https", "other.gateway.example", 443, "/x"), None),
        (("https", "prefixed.example", 8443, "/v1"), PREFIXED),
        (("https", "prefixed.example", 8443, "/v11/x"), None),
        (("https", "prefixed.example", 8443, "*"), None),
        (("http", "::1", 9200, "/../x"), ALONE),
    ],
)
def test_in_forward_mode_scheme_host_port_and_path_decide(
    url: tuple[str, str, int, str], service: Service | None
) -> None:
    assert ROUTES.at(*url) is service


@pytest.mark.parametrize("path", ["/V1/x", "/%761/x", "//v1", "/x/../v1", "/v1/../x"])
def test_in_forward_mode_too_a_path_must_be_clear(path: str) -> None:
    with pytest.raises(AmbiguousPath):
        ROUTES.at("https", "prefixed.example", 8443, path)


@pytest.mark.parametrize(
    ("came_from", "url", "expected"),
    [
        # The service itself
        (API, "/api/x?y#z", "/x?y#z"),
        (API, "/api", "/"),
        (API, "/api?x", "/?x"),
        (API, "https://gateway.example/api/x", "http://api.localhost:8080/x"),
        (API, "https://gateway.example/api?x", "http://api.localhost:8080/?x"),
        (API, "http://gateway.example:443/api/x", "http://api.localhost:8080/x"),
        (API, "HTTP://Gateway.example/api/x", "http://api.localhost:8080/x"),
        (API, "//gateway.example/api/x", "http://api.localhost:8080/x"),
        (API, "/api/Zo\xeb", "/Zo\xeb"),
        # `//` begins the name of a host.
        (API, "/api//evil.example/x", "http://api.localhost:8080//evil.example/x"),
        (API, "/api/\\evil.example/x", "http://api.localhost:8080/\\evil.example/x"),
        # relative to /api/jobs/1
        (API, "2", "/jobs/2"),
        (API, "../x?y", "/x?y"),
        (API, "./", "/jobs/"),
        (API, ".", "/jobs/"),
        (API, "..", "/"),
        (API, "../inner/x", "http://inner.localhost:8080/x"),
        (API, "../../../x", "http://default.localhost:8080/x"),
        (API, "?x", "?x"),
        (API, "#x", "#x"),
        (API, "", ""),
        # another service
        (API, "/api/inner/x", "http://inner.localhost:8080/x"),
        (API, "/login", "http://default.localhost:8080/login"),
        (API, "/api/../login", "http://default.localhost:8080/login"),
        (API, "https://prefixed.example:8443/v1/x", "http://prefixed.localhost:8080/x"),
        (API, "http://[0::1]:9200/x", "http://alone.localhost:8080/x"),
        (API, "http://[::1]:9200", "http://alone.localhost:8080"),
        (DEFAULT, "/api/x", "http://api.localhost:8080/x"),
        (DEFAULT, "/x", "/x"),
        (DEFAULT, "https://gateway.example", "http://default.localhost:8080/"),
        (PREFIXED, "/v1/x", "/x"),
        (PREFIXED, "https://prefixed.example:8443", "https://prefixed.example:8443"),
        # no service: the real server's
        (PREFIXED, "/v2/x?y", "https://prefixed.example:8443/v2/x?y"),
        (PREFIXED, "../../x", "https://prefixed.example:8443/x"),
        (PREFIXED, "https://prefixed.example:8443/v2", "https://prefixed.example:8443/v2"),
        (PREFIXED, "https://prefixed.example/v1/x", "https://prefixed.example/v1/x"),
        (PREFIXED, "http://gateway.example/api/x", "http://gateway.example/api/x"),
        (API, "/api/%69nner", "https://gateway.example:443/api/%69nner"),
        (API, "https://gateway.example/api/%2e%2e/x", "https://gateway.example/api/%2e%2e/x"),
        (API, "https://evil.example/api", "https://evil.example/api"),
        (API, "https://gateway.example@evil.example/api", "https://gateway.example@evil.example/api"),
        (API, "https://gateway.example\\@evil.example/api", "https://gateway.example\\@evil.example/api"),
        (API, "https://[::bad/api", "https://[::bad/api"),
        (API, "https:/api", "https:/api"),
        (API, "mailto:a@b.example", "mailto:a@b.example"),
        (API, "///gateway.example/api", "///gateway.example/api"),
        (API, "ftp://gateway.example/api", "ftp://gateway.example/api"),
        (ALONE, "/x/../y", "/x/../y"),
        (ALONE, "x", "x"),
    ],
)
def test_redirects_lead_to_the_proxys_name_for_a_service(came_from: Service, url: str, expected: str) -> None:
    moved = ROUTES.location(
        url.encode("latin-1"),
        called=came_from,
        came_from=came_from,
        path=f"{came_from.path}/jobs/1?a=/b/",
        way_in=way_in,
    )
    assert moved.decode("latin-1") == expected


def test_a_redirect_to_a_service_without_a_way_in_leads_to_the_real_one() -> None:
    def location(url: bytes) -> bytes:
        return ROUTES.location(url, called=DEFAULT, came_from=DEFAULT, path="/", way_in=lambda _: None)

    assert location(b"/api/x?y") == b"https://gateway.example/api/x?y"
    assert location(b"https://gateway.example/api/x") == b"https://gateway.example/api/x"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (b"next", b"http://old.example/v1/next"),
        (b"/v1/next", b"http://old.example/v1/next"),
        (b"http://old.example/v1/next", b"http://old.example/v1/next"),
        (b"https://api.example/x", b"http://api.localhost:8080/x"),
        (b"?x", b"?x"),
    ],
)
def test_an_answer_of_a_service_that_is_none_any_more_leads_to_where_it_came_from(url: bytes, expected: bytes) -> None:
    old, api = Service("api", "http://old.example", "/v1"), Service("api", "https://api.example")
    routes = Routes((api,))
    assert routes.location(url, called=old, came_from=old, path="/v1/1", way_in=way_in) == expected
    plain = Service("api", "https://plain.example")
    downgraded = b"http://plain.example/x"
    assert routes.location(downgraded, called=plain, came_from=plain, path="/", way_in=way_in) == downgraded


def test_a_relative_redirect_goes_on_when_the_path_of_its_service_has_just_changed() -> None:
    old, new = Service("api", "https://api.example", "/v1"), Service("api", "https://api.example")
    assert Routes((new,)).location(b"next", called=old, came_from=old, path="/v1/1", way_in=way_in) == (
        b"http://api.localhost:8080/v1/next"
    )


def test_a_redirect_stays_relative_when_the_services_have_just_been_read_again() -> None:
    called = Service("api", "https://api.example", "/v1")
    routes = Routes((Service("api", "https://api.example", "/v1"),))
    assert routes.location(b"/v1/x", called=called, came_from=called, path="/v1/", way_in=way_in) == b"/x"


def test_an_answer_from_inside_the_called_service_names_its_own_service() -> None:
    def location(url: bytes) -> bytes:
        path = "/api/inner/Zo\udcebë/1"
        return ROUTES.location(url, called=API, came_from=INNER, path=path, way_in=way_in)

    assert location(b"/api/inner/x") == b"http://inner.localhost:8080/x"
    assert location(b"2") == b"http://inner.localhost:8080/Zo\xeb\xc3\xab/2"
    assert location(b"/api/x") == b"/x"


@pytest.mark.parametrize(
    "url",
    [
        *("https://service.example/jobs/1?a=b#c", "https://SERVICE.example:443/", "https://service.example", "/jobs/1"),
        *(
            "https://service.example?a",
            "//service.example/jobs/1",
            "//service.example:80/",
            "//evil.example/",
            "x/../y",
        ),
        *("http://service.example/jobs/1", "http://service.example:80/", "HTTP://service.example:443/", "", "?a", "//"),
        *("http://service.example:8000/", "ftp://service.example/", "https://service.example@evil.example/", "https:x"),
        *("https://service.example:99999/", "https://[::bad/", "https://service.example/a/../%2e%2e//b", "///x"),
    ],
)
def test_the_only_service_of_a_host_redirects_as_it_would_without_others(url: str) -> None:
    service = Service("default", "https://service.example")
    moved = Routes((API, service)).location(
        url.encode(), called=service, came_from=service, path="/x", way_in=lambda _: "http://localhost:8080"
    )
    assert ((b"Location", moved),) == naming_the_proxy(
        ((b"Location", url.encode()),), "http://localhost:8080", service.upstream
    )
