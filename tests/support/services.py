"""A proxy with several services behind one login."""

from dataclasses import replace
from pathlib import Path

from eoepca_security.proxy.config.settings import Service, Settings
from tests.support.state import SETTINGS

STAC = Service("stac", "https://stac.example", "/api", port=8090, hosts=("stac.proxy.svc",), token="exchange")
DATA = Service("data", "https://data.example", token="scope", scope="data:read")
PLAIN = Service("plain", "https://plain.example")


def with_services(*services: Service, settings: Settings = SETTINGS) -> Settings:
    """Return settings with these services from a file."""
    return replace(settings, services=services or (STAC, DATA, PLAIN), services_file=Path("services.toml"))
