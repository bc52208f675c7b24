"""Glewlwyd, from Debian's packages: unpacked into a folder rather than installed, so that nothing runs as a service."""

import gzip
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from tests.interop.issuer import LIFETIME, PASSWORD, USERNAME, Endpoints, Issuer, answers
from tests.interop.kc_process import running
from tests.support.network import free_port

VERSION = "2.7.5"
DOWNLOAD_SECONDS = 180.0
START_SECONDS = 30.0
SECRET = "test-only-client-secret-of-some-length"
CLIENT_ID = "eoepca-login"
SCOPE = "openid offline_access"
ADMIN = {"username": "admin", "password": "password"}  # what its own first database has


class GlewlwydError(Exception):
    """Glewlwyd cannot be had on this machine, or refused to be set up; the message says how."""


class Glewlwyd:
    """A running one, spoken to as its own pages do."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.issuer_url = f"{url}/api/oidc"
        self._keys: list[dict[str, Any]] = []

    @contextmanager
    def logged_in(self, user: Mapping[str, str]) -> Iterator[httpx.Client]:
        """A browser in which somebody has logged in."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=30) as browser:
            browser.post("/api/auth/", json=user).raise_for_status()
            yield browser

    def set_up(self, clients: list[dict[str, Any]]) -> None:
        with self.logged_in(ADMIN) as admin:
            plugin = {"module": "oidc", "name": "oidc", "display_name": "oidc", "parameters": self._parameters()}
            _done(admin.post("/api/mod/plugin/", json=plugin))
            scope = {"name": "offline_access", "display_name": "Offline", "description": "Offline", "scheme": {}}
            _done(admin.post("/api/scope/", json={**scope, "password_required": False}))
            user = {"username": USERNAME, "password": PASSWORD, "name": USERNAME, "email": "alice@example.org"}
            _done(admin.post("/api/user/", json={**user, "scope": ["g_profile", *SCOPE.split()], "enabled": True}))
            for client in clients:
                _done(admin.post("/api/client/", json={"enabled": True, "confidential": True, **client}))

    def rotate_keys(self) -> None:
        with self.logged_in(ADMIN) as admin:
            plugin = {"module": "oidc", "name": "oidc", "display_name": "oidc", "parameters": self._parameters()}
            _done(admin.put("/api/mod/plugin/oidc", json=plugin))
            _done(admin.put("/api/mod/plugin/oidc/reset"))

    def revoke(self) -> None:
        """End the user's sessions, as their profile page does."""
        with self.logged_in({"username": USERNAME, "password": PASSWORD}) as browser:
            for token in browser.get("/api/oidc/token", params={"limit": 100}).raise_for_status().json():
                if token["enabled"]:
                    _done(browser.delete(f"/api/oidc/token/{token['token_hash']}"))

    def person(self, url: str) -> str:
        """What its login page, which is a script, does when somebody logs in and allows what is asked for."""
        with self.logged_in({"username": USERNAME, "password": PASSWORD}) as browser:
            asked: dict[str, list[str]] = {}
            while "callback_url" not in asked:
                url = browser.get(url).headers["Location"]
                asked = parse_qs(urlsplit(url).query)
            _done(browser.put(f"/api/auth/grant/{asked['client_id'][0]}", json={"scope": asked["scope"][0]}))
            answer = browser.get(f"{asked['callback_url'][0]}&g_continue", follow_redirects=True)
            assert answer.status_code == 200, f"{answer.url} answered {answer.status_code}: {answer.text}"
            return str(answer.text)

    def _parameters(self) -> dict[str, Any]:
        """The settings of its OpenID Connect plugin, with a new key; those before are published on."""
        key = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(generate_private_key(65537, 2048)))
        key = {name: value for name, value in key.items() if name != "key_ops"}
        self._keys.insert(0, {**key, "kid": f"key-{len(self._keys)}", "alg": "RS256", "use": "sig"})
        return {
            "iss": self.issuer_url,
            "jwks-private": json.dumps({"keys": self._keys}),
            "default-kid": self._keys[0]["kid"],
            "jwks-show": True,
            "jwt-type": "rsa",
            "jwt-key-size": "256",
            "access-token-duration": LIFETIME,
            "code-duration": 60,
            "refresh-token-duration": 3600,
            "refresh-token-rolling": True,
            "refresh-token-one-use": "always",
            "auth-type-client-enabled": True,
            "auth-type-code-enabled": True,
            "auth-type-device-enabled": True,
            "auth-type-password-enabled": False,
            "auth-type-refresh-enabled": True,
            "auth-type-token-enabled": False,
            "allow-non-oidc": True,
            "device-authorization-expiration": 600,
            "device-authorization-interval": 1,
            "introspection-revocation-allowed": True,
            "introspection-revocation-allow-target-client": True,
            "pkce-allowed": True,
            "pkce-method-plain-allowed": False,
            "subject-type": "public",
        }


@contextmanager
def confidential(folder: Path) -> Iterator[Issuer]:
    """A client with a secret; access tokens are JWTs, whose audience is their scopes."""
    root = _unpacked(folder)
    port, redirect_port = free_port(), free_port()
    glewlwyd = Glewlwyd(f"http://127.0.0.1:{port}")
    database = folder / "glewlwyd.sqlite"
    schema = gzip.decompress((root / "usr/share/doc/glewlwyd/database/init.sqlite3.sql.gz").read_bytes()).decode()
    with sqlite3.connect(database) as connection:
        connection.executescript(schema)
    connection.close()
    config = folder / "glewlwyd.conf"
    config.write_text(_configuration(root, port, database))
    libraries = sorted({str(path.parent) for path in root.glob("usr/lib/*/lib*.so*")})
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "LD_LIBRARY_PATH": ":".join(libraries)}
    command = [str(root / "usr/bin/glewlwyd"), f"--config-file={config}"]
    with running(command, env, folder, folder / "glewlwyd.log") as child:
        child.wait_until(lambda: "Glewlwyd started" in child.output(), START_SECONDS)
        machine = {
            "client_id": "eoepca-machine",
            "password": SECRET,
            "authorization_type": ["client_credentials"],
            "token_endpoint_auth_method": ["client_secret_basic"],
            "scope": ["openid", "offline_access"],
        }
        people = {
            "client_id": CLIENT_ID,
            "password": SECRET,
            "authorization_type": ["code", "device_authorization", "refresh_token", "client_credentials"],
            "redirect_uri": [f"http://127.0.0.1:{redirect_port}/callback"],
            "token_endpoint_auth_method": ["client_secret_basic"],
            "scope": [],
        }
        glewlwyd.set_up([machine, people])
        child.wait_until(lambda: answers(glewlwyd.issuer_url), START_SECONDS)
        endpoints = Endpoints.of(glewlwyd.issuer_url)
        yield Issuer(
            url=glewlwyd.issuer_url,
            settings={
                "OPEN_ID_CONNECT_CLIENT_ID": CLIENT_ID,
                "OPEN_ID_CONNECT_CLIENT_SECRET": SECRET,
                "OPEN_ID_CONNECT_AUDIENCE": SCOPE,
            },
            user_of=lambda token: USERNAME if endpoints.user_of_jwt(token, audience=SCOPE) else None,
            person=glewlwyd.person,
            revoke=glewlwyd.revoke,
            rotate_keys=glewlwyd.rotate_keys,
            audience=SCOPE,
            login_options=("--port", str(redirect_port)),
            clients={
                "client_secret_basic": {
                    "OPEN_ID_CONNECT_CLIENT_ID": "eoepca-machine",
                    "OPEN_ID_CONNECT_CLIENT_SECRET": SECRET,
                    "OPEN_ID_CONNECT_SCOPE": "offline_access",
                    "OPEN_ID_CONNECT_AUDIENCE": "offline_access",
                }
            },
            refusal="issuer_unavailable",
        )


def _done(answer: httpx.Response) -> None:
    if answer.status_code != 200:
        raise GlewlwydError(f"{answer.request.method} {answer.url} answered {answer.status_code}: {answer.text}")


def _configuration(root: Path, port: int, database: Path) -> str:
    modules = root / "usr/lib/glewlwyd"
    return f"""\
port = {port}
bind_address = "127.0.0.1"
external_url = "http://127.0.0.1:{port}"
login_url = "login.html"
api_prefix = "api"
static_files_path = "{root}/usr/share/glewlwyd/webapp/"
log_mode = "console"
log_level = "INFO"
cookie_domain = "127.0.0.1"
cookie_secure = 0
session_expiration = 2419200
session_key = "GLEWLWYD2_SESSION_ID"
admin_scope = "g_admin"
profile_scope = "g_profile"
user_module_path = "{modules}/user"
user_middleware_module_path = "{modules}/user_middleware"
client_module_path = "{modules}/client"
user_auth_scheme_module_path = "{modules}/scheme"
plugin_module_path = "{modules}/plugin"
hash_algorithm = "SHA512"
database = {{ type = "sqlite3" path = "{database}" }};
"""


def _unpacked(folder: Path) -> Path:
    """Fetch the packages and what they need that is not installed, as apt verifies them; return where they are."""
    apt, dpkg = (shutil.which(name) for name in ("apt-get", "dpkg-deb"))
    if apt is None or dpkg is None:
        raise GlewlwydError("apt-get and dpkg-deb are needed for Glewlwyd: this is not a Debian")
    archives, root = folder / "debs", folder / "root"
    (archives / "partial").mkdir(parents=True)
    packages = ["glewlwyd", "dbconfig-no-thanks"]
    options = ["--download-only", "--no-install-recommends", "-o", f"Dir::Cache::archives={archives}"]
    _run(apt, "install", "-y", "-qq", *options, "-o", "Debug::NoLocking=1", *packages)
    if not list(archives.glob(f"glewlwyd_{VERSION}*.deb")):
        raise GlewlwydError(f"the packages' Glewlwyd is another version than {VERSION}")
    for archive in archives.glob("*.deb"):
        _run(dpkg, "-x", str(archive), str(root))
    return root


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    if done.returncode != 0:
        raise GlewlwydError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
