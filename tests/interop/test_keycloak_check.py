"""What `check` makes of Keycloak's own words; without a browser."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.interop.kc_server import AUDIENCE, CONFIDENTIAL, PUBLIC, REALM, Keycloak
from tests.interop.kc_service import Service
from tests.support.network import free_port

pytest_plugins = ["tests.interop.kc_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1000)]

LAUNCHER = Path(__file__).parents[2] / "run-mitmproxy.py"

Check = Callable[..., Mapping[str, str]]


@pytest.fixture
def check(keycloak: Keycloak, service: Service, tmp_path: Path) -> Check:
    """Run `check` with some settings changed; returns the step that has a fault, or nothing."""
    login = keycloak.login(REALM, CONFIDENTIAL)
    good = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OPEN_ID_CONNECT_URL": keycloak.issuer(REALM),
        "OPEN_ID_CONNECT_CLIENT_ID": CONFIDENTIAL.client_id,
        "OPEN_ID_CONNECT_CLIENT_SECRET": str(CONFIDENTIAL.secret),
        "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE,
        "OPEN_ID_REFRESH_TOKEN": login.refresh_token,
        "OPEN_ID_TOKEN_STORE": "none",
        "REMOTE_PROTECTED_DOMAIN": service.url,
        "REMOTE_PROTECTED_ENDPOINT": "/whoami",
        "PROXY_PORT": str(free_port()),
        "PROXY_ADMIN": "off",
    }

    def check(**changes: str) -> Mapping[str, str]:
        command = [sys.executable, str(LAUNCHER), "check", "--json"]
        done = subprocess.run(
            command, env=good | changes, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert "eyJ" not in done.stdout + done.stderr
        steps = json.loads(done.stdout)["steps"]
        faults = [step for step in steps if step["status"] == "fault"]
        assert (done.returncode, len(faults)) in ((0, 0), (1, 1)), done.stdout
        return faults[0] if faults else {}

    return check


def test_nothing_is_wrong(check: Check) -> None:
    assert check() == {}


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"OPEN_ID_CONNECT_CLIENT_SECRET": "wrong"}, "client", "copy OPEN_ID_CONNECT_CLIENT_SECRET from the issuer"),
        ({"OPEN_ID_CONNECT_CLIENT_SECRET": ""}, "client", "set OPEN_ID_CONNECT_CLIENT_SECRET"),
        ({"OPEN_ID_CONNECT_CLIENT_ID": "unknown"}, "client", "check OPEN_ID_CONNECT_CLIENT_ID"),
        (
            {"OPEN_ID_CONNECT_CLIENT_ID": PUBLIC.client_id, "OPEN_ID_CONNECT_CLIENT_SECRET": ""},
            "token",
            f"issued to the client {CONFIDENTIAL.client_id}",
        ),
        ({"OPEN_ID_REFRESH_TOKEN": "nonsense"}, "token", "run-mitmproxy.py login"),
        ({"OPEN_ID_CONNECT_SCOPE": "no-such-scope"}, "token", "OPEN_ID_CONNECT_SCOPE"),
        ({"OPEN_ID_CONNECT_AUDIENCE": "other"}, "audience", "Included Custom Audience"),
    ],
)
def test_a_fault(changes: dict[str, str], name: str, says: str, check: Check) -> None:
    fault = check(**changes)
    assert (fault["name"], says in fault["remedy"]) == (name, True), fault


def test_a_realm_that_does_not_exist(check: Check, keycloak: Keycloak) -> None:
    fault = check(OPEN_ID_CONNECT_URL=keycloak.issuer("nowhere"))
    assert (fault["name"], "/realms/<name>" in fault["remedy"]) == ("discovery", True), fault


def test_a_session_that_was_logged_out(check: Check, keycloak: Keycloak) -> None:
    login = keycloak.login(REALM, CONFIDENTIAL)
    keycloak.logout(REALM, CONFIDENTIAL, login.refresh_token)
    fault = check(OPEN_ID_REFRESH_TOKEN=login.refresh_token)
    assert (fault["name"], "the session has ended" in fault["remedy"]) == ("token", True), fault


def test_a_public_client_that_was_sent_a_secret(check: Check, keycloak: Keycloak) -> None:
    login = keycloak.login(REALM, PUBLIC)
    # Keycloak takes no notice of it, so nothing is wrong.
    assert (
        check(
            OPEN_ID_CONNECT_CLIENT_ID=PUBLIC.client_id,
            OPEN_ID_CONNECT_CLIENT_SECRET="needless",
            OPEN_ID_REFRESH_TOKEN=login.refresh_token,
        )
        == {}
    )
