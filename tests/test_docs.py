"""What the documents promise is what the code has."""

import re
import runpy
import tomllib
from dataclasses import replace
from typing import Any

from conftest import ROOT
from helpers_fastapi import bearer, get

import eoepca_security
from eoepca_security.proxy.settings import read_settings
from eoepca_security.proxy.variables import VARIABLES
from eoepca_security.testing import FakeIssuer

PATHS = ("/me", "/catalogue", "/admin")


def test_env_example_and_the_settings_page_are_as_the_code_describes_them() -> None:
    written = runpy.run_path(str(ROOT / "tools" / "settings_reference.py"))
    remedy = "run `uv run tools/settings_reference.py`"
    assert (ROOT / ".env.example").read_text() == written["env_example"](), remedy
    assert (ROOT / "docs" / "settings.md").read_text() == written["settings_page"](), remedy
    for variable in VARIABLES:
        assert f"\n### `{variable.env}`\n" in (ROOT / "docs" / "settings.md").read_text()


def test_the_defaults_that_are_described_are_those_in_force() -> None:
    needed = {
        "OPEN_ID_CONNECT_URL": "https://issuer.example",
        "OPEN_ID_CONNECT_CLIENT_ID": "client",
        "OPEN_ID_REFRESH_TOKEN": "refresh",
        "REMOTE_PROTECTED_DOMAIN": "https://service.example",
    }
    described = {variable.env: variable.default for variable in VARIABLES if variable.default}
    assert set(needed) >= {variable.env for variable in VARIABLES if variable.required}
    assert replace(read_settings(needed | described), admin_is_set=False) == read_settings(needed)


def test_every_setting_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"\b(?:OPEN_ID|PROXY|TLS|REMOTE)_[A-Z_]+\b", (ROOT / "README.md").read_text()))
    assert named
    assert named <= {variable.env for variable in VARIABLES}


def test_the_changelog_has_the_version_or_unreleased_changes() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## (Unreleased|{re.escape(version)})", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


async def test_the_protected_service_of_the_readme_works() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if "OIDCProxyScheme" in block)
    example: dict[str, Any] = {}
    with FakeIssuer() as issuer:
        exec(code.replace("https://keycloak.example/realms/eoepca", issuer.url), example)
        roles = {"resource_access": {"my-service": {"roles": ["admin"]}}, "scope": "catalogue:read"}
        user, admin = (bearer(issuer.issue(aud="my-service", **claims)) for claims in ({}, roles))
        answers = [await get(example["app"], headers, path) for headers in (user, admin) for path in PATHS]

    assert [answer.status_code for answer in answers] == [200, 403, 403, 200, 200, 200]
    assert answers[0].json() == "u-1"


def test_all_public_names_exist() -> None:
    for name in eoepca_security.__all__:
        assert getattr(eoepca_security, name).__doc__
