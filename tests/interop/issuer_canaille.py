"""Canaille, from PyPI: built with Authlib, as many issuers in Python are. It runs in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from tests.interop.issuer import AUDIENCE, PASSWORD, USERNAME, Endpoints, Issuer, answers
from tests.interop.issuer_person import visit
from tests.interop.kc_process import running
from tests.support.network import free_port

REQUIREMENTS = Path(__file__).with_name("canaille") / "requirements.txt"
VERSION = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("canaille")).partition("==")[2]
INSTALL_SECONDS = 300.0
COMMAND_SECONDS = 60.0
START_SECONDS = 60.0
# Its refresh tokens live no longer than its access tokens, and it restarts for a new key.
LIFETIME = 40
SECRET = "test-only-client-secret-of-some-length"
CLIENT_ID = "eoepca-login"
CREATED = "2026-01-01T00:00:00+00:00"


class CanailleError(Exception):
    """What is needed cannot be had on this machine, or a command failed; the message says which."""


class Canaille:
    """Its folder, its command line, and its server."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._bin = _installed(folder)
        self._port = free_port()
        self._server = stack.enter_context(ExitStack())
        self._keys: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self._port}"

    def does(self, *arguments: str, given: str = "") -> None:
        """Run a command."""
        done = subprocess.run(
            [self._bin / "canaille", *arguments],
            env=self._env(),
            cwd=self._folder,
            input=given,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise CanailleError(f"canaille {' '.join(arguments)}:\n{done.stdout}{done.stderr}")

    def configure(self) -> None:
        """Sign with a new key from the next start on; the ones before are published on."""
        key = jwt.algorithms.RSAAlgorithm.to_jwk(generate_private_key(65537, 2048), as_dict=True)
        members = {name: str(value) for name, value in key.items() if name not in ("key_ops", "oth")}
        self._keys.insert(0, {**members, "kid": str(uuid.uuid4()), "use": "sig"})
        active, *inactive = (
            f"{{{', '.join(f'{name} = {json.dumps(value)}' for name, value in key.items())}}}" for key in self._keys
        )
        (self._folder / "config.toml").write_text(f"""\
SECRET_KEY = "of-tests-only"
SERVER_NAME = "127.0.0.1:{self._port}"
PREFERRED_URL_SCHEME = "http"

[OAUTH2_TOKEN_EXPIRES_IN]
authorization_code = {LIFETIME}
refresh_token = {LIFETIME}

[CANAILLE]
DATABASE = "sql"
CAPTCHA_ENABLED = false

[CANAILLE_SQL]
DATABASE_URI = "sqlite:///{self._folder / "canaille.sqlite"}"

[CANAILLE_OIDC]
ACTIVE_JWKS = [{active}]
INACTIVE_JWKS = [{", ".join(inactive)}]
""")

    def start(self) -> None:
        """Start the server, or start it again."""
        self._server.close()
        command = [str(self._bin / "canaille"), "run", "--bind", f"127.0.0.1:{self._port}"]
        child = self._server.enter_context(running(command, self._env(), self._folder, self._folder / "canaille.log"))
        child.wait_until(lambda: answers(self.url), START_SECONDS)

    def _env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "CANAILLE_CONFIG": str(self._folder / "config.toml"),
        }


@contextmanager
def confidential(folder: Path) -> Iterator[Issuer]:
    """A client with a secret; access tokens are JWTs."""
    with ExitStack() as stack:
        canaille = Canaille(folder, stack)
        canaille.configure()
        canaille.does("install")
        redirect_port = free_port()
        machine, machine_settings = _machine()
        models = {"user": [_user()], "client": [*_people(redirect_port), machine]}
        canaille.does("restore", given=json.dumps(models))
        canaille.start()
        endpoints = Endpoints.of(canaille.url)
        yield Issuer(
            url=canaille.url,
            settings={
                "OPEN_ID_CONNECT_CLIENT_ID": CLIENT_ID,
                "OPEN_ID_CONNECT_CLIENT_SECRET": SECRET,
                "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE,
            },
            user_of=endpoints.user_of_jwt,
            person=partial(visit, knows={"login": USERNAME, "password": PASSWORD}, says_yes={("answer", "accept")}),
            revoke=partial(canaille.does, "delete", "token", "--noconfirm", "--subject", USERNAME),
            rotate_keys=partial(_rotate_keys, canaille, endpoints),
            audience=AUDIENCE,
            # Two tokens of one second are the same to the letter, which its database refuses: it answers 500 then.
            pace=1.0,
            lifetime=LIFETIME,
            login_options=("--port", str(redirect_port)),
            clients={"client_secret_basic": machine_settings},
            lacks={"test_login_by_device": "it has no device authorization grant"},
        )


def _rotate_keys(canaille: Canaille, endpoints: Endpoints) -> None:
    before = endpoints.signing_kids()
    canaille.configure()
    canaille.start()
    assert endpoints.signing_kids() > before


def _user() -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "user_name": USERNAME,
        "family_name": "Example",
        "emails": ["alice@example.org"],
        "password": PASSWORD,
    }


def _people(redirect_port: int) -> list[dict[str, Any]]:
    """The client that people log in with, and the service, which is a client, too: audiences are clients here."""
    service_id, login_id = (str(uuid.uuid4()) for _ in range(2))
    service = {"id": service_id, "client_id": AUDIENCE, "client_name": "Service", "client_id_issued_at": CREATED}
    login = {
        "id": login_id,
        "client_id": CLIENT_ID,
        "client_id_issued_at": CREATED,
        "client_name": "Login",
        # ID tokens get the same audiences as access tokens, and have to be for the client.
        "audience": [login_id, service_id],
        "grant_types": ["authorization_code", "refresh_token"],
        "redirect_uris": [f"http://127.0.0.1:{redirect_port}/callback"],
        "response_types": ["code"],
        "scope": ["openid", "profile", "email"],
        # With `none` nobody could log out: its revocation endpoint takes client_secret_basic only.
        "client_secret": SECRET,
        "token_endpoint_auth_method": "client_secret_basic",
    }
    return [service, login]


def _machine() -> tuple[dict[str, Any], dict[str, str]]:
    """A client that acts for itself, and the launcher's settings for it; only one way is open to such clients."""
    client_id = "eoepca-machine"
    told = {
        "id": str(uuid.uuid4()),
        "client_id": client_id,
        "client_id_issued_at": CREATED,
        "client_name": client_id,
        "client_secret": SECRET,
        "grant_types": ["client_credentials"],
        "token_endpoint_auth_method": "client_secret_basic",
    }
    return told, {"OPEN_ID_CONNECT_CLIENT_ID": client_id, "OPEN_ID_CONNECT_CLIENT_SECRET": SECRET}


def _installed(folder: Path) -> Path:
    """Install it by the uv that runs the tests, or by pip; return the folder of its commands."""
    environment = folder / "venv"
    python = environment / "bin" / "python"
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        commands = [
            [uv, "venv", "--quiet", "--python", sys.executable, str(environment)],
            [uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(REQUIREMENTS)],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", str(environment)],
            [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)],
        ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if done.returncode != 0:
            raise CanailleError(f"Canaille cannot be installed:\n{done.stdout}{done.stderr}")
    return environment / "bin"
