"""A protected service of Earth observation data and the proxy before it, in both of its forms.

A plugin's fixtures are there for all tests, so their names begin alike and none is used by itself.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eoepca_security.testing import FakeIssuer
from tests.interop.eo_service import SIZE, Setup, running_eo_service
from tests.support.environment import settings_for
from tests.support.processes import StartProxy


@pytest.fixture(scope="session")
def eo_rasters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a large cloud-optimized GeoTIFF, made by GDAL."""
    folder = tmp_path_factory.mktemp("rasters")
    plain = folder / "plain.tif"
    create = ["gdal_create", "-q", "-outsize", str(SIZE), str(SIZE), "-burn", "7", "-a_srs", "EPSG:4326"]
    subprocess.run([*create, "-a_ullr", "8", "50", "9", "49", str(plain)], check=True, timeout=60)
    translate = ["gdal_translate", "-q", "-of", "COG", "-co", "COMPRESS=NONE", str(plain), str(folder / "large.tif")]
    subprocess.run(translate, check=True, timeout=60)
    plain.unlink()
    return folder


@pytest.fixture(scope="module")
def eo_running(start: StartProxy, eo_rasters: Path, certificate: Path, home: Path) -> Iterator[Setup]:
    with FakeIssuer() as issuer, running_eo_service(issuer, eo_rasters, certificate) as service:
        settings = settings_for(issuer)
        host = service.tls_url.removeprefix("https://")
        forward = start("addon", "", {**settings, "PROXY_INJECT_HOSTS": host, "TLS_CA_FILE": str(certificate)})
        reverse = start("launcher", service.url, settings)
        yield Setup(issuer, service, reverse.url, forward.url, home / ".mitmproxy" / "mitmproxy-ca-cert.pem")


@pytest.fixture
def eo(eo_running: Setup) -> Setup:
    """The service that was asked nothing yet."""
    eo_running.service.asked.clear()
    return eo_running
