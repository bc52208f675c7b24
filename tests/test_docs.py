"""What the documents promise is what the code has."""

import re
import tomllib
from typing import Any

from conftest import ROOT
from helpers_fastapi import bearer, get

import eoepca_security
from eoepca_security.proxy.settings import VARIABLES
from eoepca_security.testing import FakeIssuer

PATHS = ("/me", "/catalogue", "/admin")


def test_env_example_explains_every_variable_and_no_other() -> None:
    text = (ROOT / ".env.example").read_text()
    blocks = re.findall(r"^((?:# .*\n|#\n)+)((?:#?[A-Z_]+=.*\n)+)", text, re.MULTILINE)
    explained = {name for _, lines in blocks for name in re.findall(r"^#?([A-Z_]+)=", lines, re.MULTILINE)}
    assert explained == {variable.env for variable in VARIABLES}
    for comment, lines in blocks:
        is_secret = any(variable.secret and f"{variable.env}=" in lines for variable in VARIABLES)
        assert ("(secret)" in comment) == is_secret, comment


def test_env_example_shows_the_defaults() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    values = dict(line.removeprefix("#").split("=", 1) for line in lines if re.match(r"#[A-Z_]+=", line))
    # Comments, so that a container's own values stand when a copy of the file is its environment.
    assert not any(re.match(r"[A-Z_]+=.", line) for line in lines)
    assert values == {
        "OPEN_ID_CONNECT_CLIENT_AUTH": "auto",
        "OPEN_ID_CONNECT_GRANT": "refresh_token",
        "OPEN_ID_CONNECT_DANGEROUSLY_ALLOW_HTTP": "false",
        "REMOTE_PROTECTED_ENDPOINT": "/",
        "TLS_NO_VERIFY": "false",
        "PROXY_HOST": "127.0.0.1",
        "PROXY_PORT": "8080",
        "PROXY_ADMIN": "127.0.0.1:8081",
        "PROXY_FORWARD_AS": "bearer",
    }


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
