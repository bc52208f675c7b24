"""The addresses by which clients reach services."""

from dataclasses import replace
from typing import Any

import pytest

from eoepca_security.proxy.admin.ways import MAX_LINES, destination, example, service_lines, ways_in
from eoepca_security.proxy.config.services import default_service
from eoepca_security.proxy.config.settings import Service
from tests.support.services import DATA, PLAIN, STAC, with_services
from tests.support.state import SETTINGS

HERE = "http://127.0.0.1:8080"
EVERYWHERE = "http://0.0.0.0:8080"
ELSEWHERE = "http://192.0.2.7:8080"
DEFAULT = default_service("https://service.example")


@pytest.mark.parametrize(
    ("listener", "change", "service", "ways"),
    [
        (HERE, {}, STAC, ("http://stac.localhost:8080", "http://localhost:8090", "stac.proxy.svc")),
        (EVERYWHERE, {}, STAC, ("http://stac.localhost:8080", "http://localhost:8090", "stac.proxy.svc")),
        # Where the proxy does not listen on loopback, *.localhost leads elsewhere.
        (ELSEWHERE, {}, STAC, ("http://192.0.2.7:8090", "stac.proxy.svc")),
        (ELSEWHERE, {}, DATA, ("http://data.localhost:8080",)),
        # Other names than those of services are for what PROXY_ALLOWED_HOSTS has.
        (EVERYWHERE, {"allowed_hosts": ("proxy",)}, replace(STAC, hosts=()), ("stac.localhost:8080", "proxy:8090")),
        (EVERYWHERE, {"allowed_hosts": ("proxy:80",)}, replace(STAC, hosts=()), ("stac.localhost:8080", "proxy:8090")),
        (HERE, {"allowed_hosts": ("127.0.0.1",)}, replace(STAC, hosts=()), ("stac.localhost:8080", "127.0.0.1:8090")),
        # The default service also has the names that are nobody's.
        (HERE, {}, DEFAULT, ("http://default.localhost:8080", "http://127.0.0.1:8080")),
    ],
)
def test_a_service_of_a_file_has_its_own_names_and_port(
    listener: str, change: dict[str, Any], service: Service, ways: tuple[str, ...]
) -> None:
    settings = with_services(service, PLAIN, settings=replace(SETTINGS, **change))
    found = ways_in(service, listener, settings)
    assert tuple(way.removeprefix("http://") for way in found) == tuple(way.removeprefix("http://") for way in ways)
    assert all(way.startswith("http://") != (way in service.hosts) for way in found)


def test_the_only_service_has_all_names() -> None:
    assert ways_in(DATA, HERE, with_services(DATA)) == ("http://data.localhost:8080", HERE)
    settings = replace(SETTINGS, services=(DEFAULT,))
    assert ways_in(DEFAULT, EVERYWHERE, settings) == ("http://localhost:8080",)


@pytest.mark.parametrize(
    ("listener", "services", "change", "command"),
    [
        (HERE, (STAC, DATA), {}, "curl -i http://stac.localhost:8080/"),
        (ELSEWHERE, (replace(STAC, port=None), DATA), {}, "curl -i http://stac.proxy.svc:8080/"),
        # The endpoint is for the service at REMOTE_PROTECTED_DOMAIN, which is the first.
        (HERE, (STAC, DATA), {"endpoint": "/items"}, "curl -i http://stac.localhost:8080/"),
        (
            HERE,
            (DEFAULT, DATA),
            {"endpoint": "/items", "upstream": DEFAULT.upstream},
            "curl -i http://default.localhost:8080/items",
        ),
    ],
)
def test_the_command_to_try_calls_the_first_service(
    listener: str, services: tuple[Service, ...], change: dict[str, Any], command: str
) -> None:
    assert example(listener, with_services(*services, settings=replace(SETTINGS, **change))) == command


def test_the_start_has_a_line_for_each_service_but_not_very_many() -> None:
    settings = with_services()
    assert destination(settings) == "3 services"
    assert service_lines(HERE, settings) == [
        (
            "service stac: http://stac.localhost:8080 (also http://localhost:8090, stac.proxy.svc) -> "
            "https://stac.example/api"
        ),
        "service data: http://data.localhost:8080 -> https://data.example",
        "service plain: http://plain.localhost:8080 -> https://plain.example",
    ]
    many = with_services(*(Service(f"s{number}", f"https://s{number}.example") for number in range(500)))
    lines = service_lines(HERE, many)
    assert len(lines) == MAX_LINES + 1
    assert lines[-1] == "and 480 more: see the status page"
    assert len(service_lines(HERE, with_services(*many.services[:MAX_LINES]))) == MAX_LINES


def test_without_a_file_the_start_has_no_more_lines_than_before() -> None:
    assert service_lines(HERE, replace(SETTINGS, services=(DEFAULT,))) == []
    assert destination(with_services(STAC)) == "https://stac.example/api"
