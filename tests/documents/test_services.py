"""What the documents say of several services is what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest

from eoepca_security.proxy.config.services import read_services
from eoepca_security.proxy.config.settings import Address, Service
from tests.support.processes import ROOT

PAGE = (ROOT / "docs" / "services.md").read_text()
SIDECAR = (ROOT / "deploy" / "kubernetes" / "services" / "services.toml").read_text()
EXAMPLES = [
    text
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for text in re.findall(r"^ *```toml\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    if "[service." in text
]


@pytest.mark.parametrize("text", [*EXAMPLES, SIDECAR])
def test_every_example_is_accepted_without_a_warning(tmp_path: Path, text: str) -> None:
    file = tmp_path / "services.toml"
    file.write_text(text.replace("/run/user/1000", str(tmp_path)))  # which not every machine has
    services, warnings = read_services(file, host="127.0.0.1", port=8080, admin=Address("127.0.0.1", 8081))
    assert len(services) == len(re.findall(r"^ *\[service\.", text, re.MULTILINE))
    assert warnings == ()


def test_the_page_has_every_key_with_its_default() -> None:
    section = PAGE.partition("\n## Settings of a service\n")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", section, re.MULTILINE))
    assert shown.pop("url") == ""
    defaults = {field.name: field.default for field in dataclasses.fields(Service)}
    for name in ("name", "upstream", "path"):
        del defaults[name]
    written = {None: "none", (): "none", False: "`false`"}
    expected = {
        key: f'`"{value}"`' if isinstance(value, str) else written[value]  # type: ignore[index]
        for key, value in defaults.items()
    }
    assert shown == expected


def test_the_calls_of_the_platform_name_its_services() -> None:
    (text,) = (example for example in EXAMPLES if "eo.example/ogc-api" in example)
    names = set(re.findall(r"^\[service\.(\w+)\]$", text, re.MULTILINE))
    calls = PAGE.partition("### 4. Calls")[2]
    assert set(re.findall(r"http://(\w+)\.localhost:8080", calls)) - {"localhost"} == names
    rows = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \| `(https://[^`]+)` \|$", PAGE, re.MULTILINE)
    assert {name for name, _, _ in rows} == names
    for name, client, url in rows:
        table = text.partition(f"[service.{name}]\n")[2].partition("\n[")[0]
        assert f'url = "{url}"' in table
        assert f'audience = "{client}"' in table
        assert re.search(rf"^for NAME in .*\b{client}\b.*; do$", PAGE, re.MULTILINE)
