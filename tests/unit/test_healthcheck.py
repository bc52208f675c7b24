"""Where the container's health check asks. The container's tests run it."""

import re
import runpy

import pytest

from tests.support.processes import ROOT


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ([], None, "default"),
        ([], "of the environment", "of the environment"),
        (["serve", "--admin", "of the option", "--port", "1"], "of the environment", "of the option"),
        (["--admin=of the option"], "of the environment", "of the option"),
        (["--admin", "", "serve"], None, "default"),
    ],
)
def test_options_come_before_the_environment(
    given: list[str], environ: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = runpy.run_path(str(ROOT / "deploy" / "healthcheck.py"))["setting"]
    monkeypatch.setenv("PROXY_ADMIN", environ or "")
    assert setting(given, "--admin", "PROXY_ADMIN", "default") == expected


def test_all_probes_run_it_as_the_image_does() -> None:
    # With -O, Python would not use the byte code in the image, and a probe would take several times as long.
    own = re.search(r'CMD \["(python.*healthcheck\.py)"\]', (ROOT / "Dockerfile.mitmproxy").read_text())
    assert own is not None
    manifests = [path.read_text() for path in (ROOT / "deploy").rglob("*.yaml")]
    probes = [probe for text in manifests for probe in re.findall(r"(python.*healthcheck\.py)", text)]
    assert len(probes) == 4
    assert set(probes) == {own[1].replace('"', "")}
