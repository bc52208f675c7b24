"""The image, built once, as a plugin: a second conftest.py would hide the first."""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.docker_host import ENVIRONMENT, TAG, Outside, docker, has_engine, outside, readme_lines, unique
from tests.support.processes import ROOT


@pytest.fixture(scope="session")
def image() -> str:
    """The README's build line as written but for the name: there may be an image of that name in use."""
    if not has_engine():
        pytest.fail("no Docker engine answers `docker info`")
    words = [TAG if word == "mitmproxy-oidc" else word for word in shlex.split(readme_lines()[0])]
    subprocess.run(words, cwd=ROOT, check=True, timeout=600, env=ENVIRONMENT)
    return TAG


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Outside]:
    with outside(tmp_path) as there:
        yield there


@pytest.fixture
def volume() -> Iterator[str]:
    name = unique("v")
    yield name
    docker("volume", "rm", "-f", name)
