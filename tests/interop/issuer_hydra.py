"""Ory Hydra, built by Go from its module. Its pages for people are not part of it: the tests answer in their stead."""

import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import httpx

from tests.interop.issuer import AUDIENCE, LIFETIME, REQUEST_SECONDS, USERNAME, Endpoints, Issuer, answers, key_pair
from tests.interop.kc_process import running
from tests.support.network import free_port

VERSION = "2.3.0"
MODULE = "github.com/ory/hydra/v2"
BUILD_SECONDS = 500.0
START_SECONDS = 60.0
MOST_REDIRECTS = 12
SECRET = "test-only-client-secret-of-some-length"
CLIENT_ID = "eoepca-login"
KEY_SETS = ("hydra.jwt.access-token", "hydra.openid.id-token")


class HydraError(Exception):
    """Hydra cannot be built on this machine; the message says why."""


class Hydra:
    """A running one, spoken to by its admin API."""

    def __init__(self, admin_url: str) -> None:
        self._admin_url = admin_url

    def does(self, method: str, path: str, query: Mapping[str, str], body: Any = None) -> Any:
        answer = httpx.request(
            method, f"{self._admin_url}/admin{path}", params=query, json=body, trust_env=False, timeout=REQUEST_SECONDS
        ).raise_for_status()
        return answer.json() if answer.content else None

    def person(self, url: str) -> str:
        """What the pages for login and consent do when somebody logs in and allows what is asked for."""
        with httpx.Client(trust_env=False, timeout=REQUEST_SECONDS) as browser:
            for _ in range(MOST_REDIRECTS):
                answer = browser.get(url)
                if not answer.has_redirect_location:
                    assert answer.status_code == 200, f"{answer.url} answered {answer.status_code}: {answer.text}"
                    return str(answer.text)
                url = self._next(urljoin(url, answer.headers["Location"]))
        raise AssertionError(f"there is no end to the redirects; the last was {url}")

    def _next(self, url: str) -> str:
        asked = parse_qs(urlsplit(url).query)
        for kind in ("login", "consent"):
            if f"{kind}_challenge" in asked:
                path, query = f"/oauth2/auth/requests/{kind}", {f"{kind}_challenge": asked[f"{kind}_challenge"][0]}
                requested = self.does("GET", path, query)["requested_scope"]
                body = {
                    "login": {"subject": USERNAME},
                    "consent": {"grant_scope": requested, "grant_access_token_audience": [AUDIENCE]},
                }[kind]
                return str(self.does("PUT", f"{path}/accept", query, body)["redirect_to"])
        return url

    def revoke(self) -> None:
        self.does("DELETE", "/oauth2/auth/sessions/consent", {"subject": USERNAME, "all": "true"})

    def rotate_keys(self, endpoints: Endpoints) -> None:
        before = endpoints.signing_kids()
        for name in KEY_SETS:
            self.does("POST", f"/keys/{name}", {}, {"alg": "RS256", "use": "sig", "kid": str(uuid.uuid4())})
        assert endpoints.signing_kids() > before


@contextmanager
def public(folder: Path) -> Iterator[Issuer]:
    """A client without a secret; access tokens are JWTs."""
    program = _built()
    key_file, public_key = key_pair(folder)
    port, admin_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DSN": "memory",
        "SECRETS_SYSTEM": "test-only-system-secret",
        "SERVE_PUBLIC_HOST": "127.0.0.1",
        "SERVE_PUBLIC_PORT": str(port),
        "SERVE_ADMIN_HOST": "127.0.0.1",
        "SERVE_ADMIN_PORT": str(admin_port),
        "SQA_OPT_OUT": "true",  # telemetry
        "STRATEGIES_ACCESS_TOKEN": "jwt",
        "TTL_ACCESS_TOKEN": f"{LIFETIME}s",
        "URLS_CONSENT": f"{url}/consent",
        "URLS_LOGIN": f"{url}/login",
        "URLS_SELF_ISSUER": url,
    }
    with running([str(program), "serve", "all", "--dev"], env, folder, folder / "hydra.log") as child:
        child.wait_until(lambda: answers(url), START_SECONDS)
        hydra = Hydra(f"http://127.0.0.1:{admin_port}")
        told, clients = _machines(key_file, public_key)
        people = {
            "client_id": CLIENT_ID,
            "token_endpoint_auth_method": "none",
            "grant_types": ["authorization_code", "refresh_token"],
            "response_types": ["code"],
            "redirect_uris": ["http://127.0.0.1/callback"],
            "scope": "openid offline_access",
            "audience": [AUDIENCE],
        }
        for client in (people, *told):
            hydra.does("POST", "/clients", {}, client)
        endpoints = Endpoints.of(url)
        yield Issuer(
            url=url,
            settings={"OPEN_ID_CONNECT_CLIENT_ID": CLIENT_ID, "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE},
            user_of=endpoints.user_of_jwt,
            person=hydra.person,
            revoke=hydra.revoke,
            rotate_keys=partial(hydra.rotate_keys, endpoints),
            audience=AUDIENCE,
            clients=clients,
            lacks={
                "test_login_by_device": "this version has no device authorization grant",
                "test_key_rotation": "with a new key, the tokens of sessions that exist name the old one, so their "
                "signature is not valid",
            },
        )


def _machines(key_file: Path, public_key: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Clients that act for themselves: as the issuer is told of them, and the launcher's settings for them."""
    told, settings = [], {}
    for method in ("client_secret_basic", "client_secret_post", "private_key_jwt"):
        client_id, has_key = f"eoepca-{method}", method == "private_key_jwt"
        client: dict[str, Any] = {
            "client_id": client_id,
            "token_endpoint_auth_method": method,
            "grant_types": ["client_credentials"],
        }
        setting = {
            "OPEN_ID_CONNECT_CLIENT_ID": client_id,
            "OPEN_ID_CONNECT_CLIENT_AUTH": method,
            # Its tokens for these clients have no audience unless one is asked for.
            "OPEN_ID_CONNECT_AUDIENCE": "",
        }
        if has_key:
            client |= {"jwks": {"keys": [public_key]}, "token_endpoint_auth_signing_alg": "ES256"}
            setting["OPEN_ID_CONNECT_CLIENT_KEY_FILE"] = str(key_file)
            setting["OPEN_ID_CONNECT_CLIENT_ASSERTION_AUDIENCE"] = "token_endpoint"
        else:
            client["client_secret"] = setting["OPEN_ID_CONNECT_CLIENT_SECRET"] = SECRET
        told.append(client)
        settings[method] = setting
    return told, settings


def _built() -> Path:
    """The program in the user's cache, built from the module when it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eoepca-security" / "hydra"
    program = cache / f"hydra-{VERSION}"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None or shutil.which("gcc") is None:
        raise HydraError("Go and a C compiler are needed to build Hydra: no go or no gcc on PATH")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        module = json.loads(_run(Path(folder), go, "mod", "download", "-json", f"{MODULE}@v{VERSION}"))
        source = Path(folder) / "source"
        shutil.copytree(module["Dir"], source, copy_function=shutil.copyfile)
        for path in (source, *source.rglob("*/")):
            path.chmod(0o755)
        # The module lacks the folder that it takes its own client from; the published client does as well.
        _run(source, go, "mod", "edit", "-dropreplace=github.com/ory/hydra-client-go/v2")
        _run(source, go, "build", "-mod=mod", "-tags=sqlite,sqlite_omit_load_extension", "-o", "../hydra", ".")
        # Renamed only when complete, so that an interrupted build leaves nothing that looks like a program.
        (Path(folder) / "hydra").replace(program)
    return program


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    if done.returncode != 0:
        raise HydraError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout
