"""What the documents promise is what the code has."""

import ast
import inspect
import json
import re
import runpy
import tomllib
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

import eoepca_security
from eoepca_security.oauth.urls import LOOPBACK_NAMES
from eoepca_security.proxy.admin.metrics import Metrics, exposition
from eoepca_security.proxy.cli.check import check
from eoepca_security.proxy.config import variables
from eoepca_security.proxy.config.loading import read_settings
from eoepca_security.proxy.config.variables import VARIABLES, Variable
from eoepca_security.proxy.policy.access import Guard
from eoepca_security.proxy.policy.problem_details import ANSWERS, parts
from eoepca_security.testing import Behaviour, FakeIssuer
from tests.support.fastapi import bearer, get
from tests.support.processes import ROOT

README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "python-api.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md")))
MIGRATING = (ROOT / "docs" / "migrating.md").read_text()
PATHS = ("/me", "/catalogue", "/admin")


def test_env_example_and_the_settings_page_are_as_the_code_describes_them() -> None:
    written = runpy.run_path(str(ROOT / "tools" / "settings_reference.py"))
    remedy = "run `uv run tools/settings_reference.py`"
    assert (ROOT / ".env.example").read_text() == written["env_example"](), remedy
    assert (ROOT / "docs" / "settings.md").read_text() == written["settings_page"](), remedy
    assert {value for value in vars(variables).values() if isinstance(value, Variable)} == set(VARIABLES)
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


def test_every_setting_that_the_documents_name_exists() -> None:
    known = {variable.env for variable in VARIABLES} | {f"{v.env}_FILE" for v in VARIABLES if v.secret}
    for page in PAGES:
        named = set(re.findall(r"\b(?:OPEN_ID|PROXY|TLS|REMOTE)_[A-Z_]+\b", page.read_text()))
        assert named <= known, page.name


def test_readme_and_troubleshooting_have_every_code_with_its_status() -> None:
    codes = {(code, str(status)) for code, (status, _) in ANSWERS.items()}
    rows = r"^\| (?:\[`(\w+)`\]\(#\1\)|`(\w+)`) \| (\d{3}) \|"
    for text in (README, TROUBLESHOOTING):
        assert {(a or b, status) for a, b, status in re.findall(rows, text, re.MULTILINE)} == codes
    answers, steps = TROUBLESHOOTING.split("\n## What `check` says\n")
    assert set(re.findall(r"^### `(\w+)`$", answers, re.MULTILINE)) == set(ANSWERS)
    environment = {variable.env: "https://127.0.0.1:1" for variable in VARIABLES if variable.required}
    settings = read_settings(environment | {"OPEN_ID_TOKEN_STORE": "none", "OPEN_ID_REFRESH_TOKEN": "refresh"})
    names = [step.name for step in check(settings, in_container=False)]
    assert re.findall(r"^### `(\w+)`$", steps, re.MULTILINE) == names


def test_the_messages_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    texts = [
        node.value
        for file in (ROOT / "eoepca_security").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    _, steps = TROUBLESHOOTING.split("\n## What `check` says\n")
    quoted = {
        quote for row in re.findall(r"^\| ([^|]+) \|", steps, re.MULTILINE) for quote in re.findall("`(.+?)`", row)
    }
    assert "the connection was refused" in quoted
    assert [quote for quote in quoted if not any(quote in text for text in texts)] == []


def test_troubleshooting_shows_an_answer_as_it_is() -> None:
    (shown,) = re.findall(r"^\$ curl -i http://(.+)/collections\n(HTTP/1.1 .*?)^```$", TROUBLESHOOTING, re.M | re.S)
    host, (head, body) = shown[0], shown[1].split("\n\n")
    refusal = Guard(LOOPBACK_NAMES).refusal("http", [host], lambda name: [host] if name == "Host" else [])
    assert refusal is not None
    status, headers, content = parts(refusal.code, refusal.detail)
    assert json.loads(body) == json.loads(content)
    lines = [f"{name}: {value}" for name, value in headers.items()]
    assert head.splitlines() == [f"HTTP/1.1 {status} Forbidden", *lines, f"content-length: {len(content)}"]


def test_operations_has_every_metric() -> None:
    shown = exposition(Metrics(lambda: 0, lambda: 0).families(), "")[0].decode()
    metrics = set(re.findall(r"^# TYPE (\w+?)(?<!_created) ", shown, re.MULTILINE))
    text = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^\| `(oidc_proxy_\w+)", text, re.MULTILINE)) == metrics


def test_the_site_has_every_page_and_every_picture() -> None:
    named = re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = (ROOT / "docs").rglob("*.md")
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in pages)
    for page in PAGES:
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)|<img[^>]* src=\"([^\"]+)\"", page.read_text())
        assert all((page.parent / (a or b)).is_file() for a, b in pictures), page.name
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        assert all((page.parent / link).exists() for link in links), page.name


def test_every_picture_has_a_description_and_drawings_load_nothing() -> None:
    for page in PAGES:
        assert not re.search(r"!\[\s*\]\(", page.read_text()), page.name
    for drawing in (ROOT / "docs" / "assets").rglob("*.svg"):
        text = drawing.read_text()
        parts = list(ElementTree.fromstring(text).iter())
        assert not [part.tag for part in parts if part.tag.endswith(("}script", "}image", "}foreignObject"))], drawing
        assert not re.search(r"@import|url\((?!#)|href=\"(?!#)", text), drawing
    pictures = [picture for picture in (ROOT / "docs" / "assets").rglob("*") if picture.is_file()]
    assert max(picture.stat().st_size for picture in pictures) < 120_000


def test_the_changelog_has_the_version_or_unreleased_changes() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## (Unreleased|{re.escape(version)})", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


async def test_the_protected_service_of_the_readme_works() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
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


def test_the_api_page_has_all_public_names() -> None:
    shown = set(re.findall(r"^::: eoepca_security\.[\w.]*?(\w+)$", API, re.MULTILINE))
    assert set(eoepca_security.__all__) | {"OIDCProxyScheme", "Authentication", "require_roles"} <= shown


async def test_the_python_example_of_the_api_page_gets_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    example, for_tests = re.findall(r"^```python\n(.*?)^```$", API, re.MULTILINE | re.DOTALL)
    with FakeIssuer(client_id="my-client") as issuer:
        code = example.replace("https://keycloak.example/realms/eoepca", issuer.url)
        code = code.replace("eyJhbGciOi…", issuer.refresh_token).replace("asyncio.run(main())", "")
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        await namespace["main"]()
    assert capsys.readouterr().out.startswith("good until ")
    exec(for_tests, {})
    assert "http://127.0.0.1:" in capsys.readouterr().out


def test_the_migration_page_has_every_name_that_is_gone() -> None:
    tokens = ("AuthToken", "DecodedAuthToken", "ValidatedAuthToken", "IDToken", "DecodedIDToken", "ValidatedIDToken")
    others = ("ClientCredentials", "OIDCUtil", "RefreshToken", "get_session_with_cache", "request_oidcutil")
    rows = MIGRATING.partition("These names are gone")[2]
    for name in (*tokens, *others):
        assert re.search(rf"`{name}\b", rows), name
        assert not hasattr(eoepca_security, name)


def test_the_python_example_of_the_migration_page_gets_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", MIGRATING, re.MULTILINE | re.DOTALL)
    behaviour = Behaviour(audience="account", refresh_tokens="rotate")
    with FakeIssuer(behaviour, client_id="my-client", client_secret="its-secret") as issuer:
        code = example.replace("https://keycloak.example/realms/eoepca", issuer.url)
        exec(code.replace("eyJhbGciOi…", issuer.refresh_token), {})
        subject, access_token, refresh_token = capsys.readouterr().out.split()
        assert subject == "u-1"
        assert issuer.accepts(access_token)
        assert refresh_token not in ("None", issuer.refresh_token)


def test_the_fastapi_page_has_every_argument_of_the_scheme_with_its_default() -> None:
    text = (ROOT / "docs" / "fastapi.md").read_text().partition("\n## Arguments\n")[2].partition("\n## ")[0]
    rows: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*) ?\|", text, re.MULTILINE):
        rows |= dict.fromkeys(re.findall(r"\w+", names), default.strip(" `").replace('"', "'"))
    arguments = inspect.signature(eoepca_security.OIDCProxyScheme).parameters.values()
    assert rows.keys() == {argument.name for argument in arguments}
    for argument in arguments:
        if argument.name not in ("scheme_name", "description"):
            assert rows[argument.name] == ("" if argument.default is argument.empty else repr(argument.default))
