"""Where the container's health check asks. The container's tests run it."""

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
