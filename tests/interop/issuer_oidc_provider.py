"""npm's oidc-provider, run by Node; certified by the OpenID Foundation."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.interop.issuer import AUDIENCE, LIFETIME, PASSWORD, USERNAME, Endpoints, Issuer, answers, key_pair
from tests.interop.issuer_person import visit
from tests.interop.kc_process import Child, running
from tests.support.network import free_port

FOLDER = Path(__file__).with_name("oidc_provider")
VERSION = json.loads((FOLDER / "package.json").read_text())["dependencies"]["oidc-provider"]
INSTALL_SECONDS = 180.0
START_SECONDS = 60.0
SECRET = "test-only-client-secret-of-some-length"
OTHER_AUDIENCE = "https://other-service.example"
GRANTS = ["authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"]


class NodeError(Exception):
    """What is needed from Node cannot be had on this machine; the message says what."""


@contextmanager
def jwt_and_public(folder: Path) -> Iterator[Issuer]:
    """Access tokens that are JWTs for one resource, and a client without a secret."""
    client = {"client_id": "eoepca-login", "token_endpoint_auth_method": "none"}
    settings = {"OPEN_ID_CONNECT_CLIENT_ID": "eoepca-login", "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE}
    with _running(folder, client, settings, key_pair(folder), resource_by_default=True) as issuer:
        yield issuer


@contextmanager
def opaque_and_key(folder: Path) -> Iterator[Issuer]:
    """Opaque access tokens, and a client with a key."""
    key_file, public_key = key_pair(folder)
    client = {
        "client_id": "eoepca-login",
        "token_endpoint_auth_method": "private_key_jwt",
        "jwks": {"keys": [public_key]},
    }
    settings = {"OPEN_ID_CONNECT_CLIENT_ID": "eoepca-login", "OPEN_ID_CONNECT_CLIENT_KEY_FILE": str(key_file)}
    with _running(folder, client, settings, (key_file, public_key), resource_by_default=False) as issuer:
        yield issuer


@contextmanager
def _running(
    folder: Path,
    client: dict[str, Any],
    settings: dict[str, str],
    key: tuple[Path, dict[str, Any]],
    *,
    resource_by_default: bool,
) -> Iterator[Issuer]:
    npm, node = (shutil.which(name) for name in ("npm", "node"))
    if npm is None or node is None:
        raise NodeError("Node.js is needed for oidc-provider: no npm or node on PATH")
    home = folder / "oidc-provider"
    shutil.copytree(FOLDER, home, ignore=shutil.ignore_patterns("node_modules"))
    install = subprocess.run(
        [npm, "ci"], cwd=home, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
    )
    if install.returncode != 0:
        raise NodeError(f"npm could not install oidc-provider:\n{install.stdout}{install.stderr}")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # `native` lets a loopback redirect have any port (RFC 8252 §7.3); `web`, the default, does not.
    people = {
        "application_type": "native",
        "grant_types": GRANTS,
        "redirect_uris": ["http://127.0.0.1/callback"],
        "response_types": ["code"],
        **client,
    }
    machines, clients = _machines(*key)
    config = {
        "port": port,
        "issuer": url,
        "audience": AUDIENCE,
        "resources": [AUDIENCE, OTHER_AUDIENCE],
        "lifetime": LIFETIME,
        "rotate": True,
        "resource_by_default": resource_by_default,
        "clients": [people, *machines],
    }
    (home / "settings.json").write_text(json.dumps(config))
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    with running([node, "server.mjs", "settings.json"], env, home, folder / "oidc-provider.log") as child:
        child.wait_until(lambda: answers(url), START_SECONDS)
        endpoints = Endpoints.of(url)
        yield Issuer(
            url=url,
            settings=settings,
            user_of=endpoints.user_of_jwt if resource_by_default else endpoints.user_of_opaque,
            person=partial(visit, knows={"login": USERNAME, "password": PASSWORD}),
            revoke=partial(_revoke, child),
            rotate_keys=partial(_rotate_keys, child, endpoints),
            audience=AUDIENCE if resource_by_default else None,
            clients=clients,
            lacks={} if resource_by_default else {"test_scheme": "opaque access tokens cannot be verified with keys"},
        )


def _rotate_keys(child: Child, endpoints: Endpoints) -> None:
    before = endpoints.signing_kids()
    child.process.send_signal(signal.SIGHUP)
    child.wait_until(lambda: endpoints.signing_kids() > before, START_SECONDS)


def _revoke(child: Child) -> None:
    before = child.output().count("revoked")
    child.process.send_signal(signal.SIGUSR2)
    child.wait_until(lambda: child.output().count("revoked") > before, START_SECONDS)


def _machines(key_file: Path, public_key: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Clients that act for themselves: as the issuer is told of them, and the launcher's settings for them."""
    told, settings = [], {}
    for method in ("client_secret_basic", "client_secret_post", "client_secret_jwt", "private_key_jwt"):
        client_id = f"eoepca-{method}"
        has_key = method == "private_key_jwt"
        told.append(
            {
                "client_id": client_id,
                "token_endpoint_auth_method": method,
                "grant_types": ["client_credentials"],
                "redirect_uris": [],
                "response_types": [],
                **({"jwks": {"keys": [public_key]}} if has_key else {"client_secret": SECRET}),
            }
        )
        settings[method] = {
            "OPEN_ID_CONNECT_CLIENT_ID": client_id,
            "OPEN_ID_CONNECT_CLIENT_AUTH": method,
            **(
                {"OPEN_ID_CONNECT_CLIENT_KEY_FILE": str(key_file)}
                if has_key
                else {"OPEN_ID_CONNECT_CLIENT_SECRET": SECRET}
            ),
        }
    return told, settings
