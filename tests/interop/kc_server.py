"""Keycloak on loopback: its Java found, its archive fetched, its realms imported, started and stopped by the tests.

Nothing is shared between runs but the downloaded archive: every run unpacks a copy of its own, because Keycloak writes
into its installation, and keeps its data in memory.
"""

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.interop.kc_process import running
from tests.support.network import free_port

VERSION = "26.7.3"
JAVA_MAJORS = (25, 21, 17)  # in order of preference: the LTS releases this version runs on
OLDEST = "20.0.0"
OLDEST_JAVA_MAJORS = (17, 11)
DOWNLOAD_SECONDS = 600.0
START_SECONDS = 300.0
REQUEST_SECONDS = 10.0

REALM = "eoepca"
ROTATING_REALM = "eoepca-rotating"  # as REALM, but a refresh token may be used once
INNER_REALM = "eoepca-inner"  # as REALM, but it calls itself by an address that only the outside knows
OUTER_ISSUER = f"https://sso.example.org/realms/{INNER_REALM}"
REALM_FILE = Path(__file__).with_name("realm-eoepca.json")


class KeycloakError(Exception):
    """Keycloak cannot be had on this machine; the message says what is missing."""


@dataclass(frozen=True)
class Client:
    """An OAuth client of the realm file; without a secret it is a public one."""

    client_id: str
    secret: str | None = None

    def form(self) -> dict[str, str]:
        """The client's part of a token request's form."""
        form = {"client_id": self.client_id}
        if self.secret is not None:
            form["client_secret"] = self.secret
        return form


CONFIDENTIAL = Client("eoepca-confidential", "test-only-client-secret")
PUBLIC = Client("eoepca-public")
ADMIN = ("admin", "test-only-admin-password")
INTERACTIVE = Client("eoepca-login")  # for users who log in themselves, by device or by browser
GATEWAY = Client("eoepca-gateway", "test-only-gateway-secret")  # for a gateway that logs users in
USERNAME = "alice"
PASSWORD = "test-only-password"
AUDIENCE = "eoepca-service"


@dataclass(frozen=True)
class Tokens:
    """What a login yields."""

    access_token: str
    refresh_token: str
    id_token: str


@dataclass(frozen=True)
class Keycloak:
    """A running Keycloak, spoken to as its own clients would, without the code under test."""

    url: str

    def issuer(self, realm: str) -> str:
        return f"{self.url}/realms/{realm}"

    def login(self, realm: str, client: Client) -> Tokens:
        """A new session of the test user, by the direct grant."""
        form = {"grant_type": "password", "username": USERNAME, "password": PASSWORD, "scope": "openid"}
        answer = self._post(realm, "token", client, **form)
        answer.raise_for_status()
        body = answer.json()
        return Tokens(body["access_token"], body["refresh_token"], body["id_token"])

    def refresh(self, realm: str, client: Client, refresh_token: str) -> httpx.Response:
        return self._post(realm, "token", client, grant_type="refresh_token", refresh_token=refresh_token)

    def logout(self, realm: str, client: Client, refresh_token: str) -> None:
        """End the session at the issuer."""
        self._post(realm, "logout", client, refresh_token=refresh_token).raise_for_status()

    def answers(self, realm: str) -> bool:
        """Whether the realm serves its discovery document."""
        try:
            answer = httpx.get(f"{self.issuer(realm)}/.well-known/openid-configuration", trust_env=False, timeout=2)
        except httpx.HTTPError:
            return False
        return answer.is_success

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """Call the admin API as the first administrator; what it answers, None where that is nothing."""
        form = {"grant_type": "password", "client_id": "admin-cli", "username": ADMIN[0], "password": ADMIN[1]}
        token = httpx.post(
            f"{self.issuer('master')}/protocol/openid-connect/token",
            data=form,
            trust_env=False,
            timeout=REQUEST_SECONDS,
        ).raise_for_status()
        answer = httpx.request(
            method,
            f"{self.url}/admin/realms/{path}".rstrip("/"),
            json=body,
            headers={"Authorization": f"Bearer {token.json()['access_token']}"},
            trust_env=False,
            timeout=REQUEST_SECONDS,
        ).raise_for_status()
        return answer.json() if answer.content else None

    def _post(self, realm: str, endpoint: str, client: Client, **form: str) -> httpx.Response:
        return httpx.post(
            f"{self.issuer(realm)}/protocol/openid-connect/{endpoint}",
            data={**client.form(), **form},
            trust_env=False,
            timeout=REQUEST_SECONDS,
        )


@contextmanager
def running_keycloak(
    folder: Path,
    realms: Sequence[Mapping[str, Any]] = (),
    *,
    version: str = VERSION,
    java_majors: Sequence[int] = JAVA_MAJORS,
) -> Iterator[Keycloak]:
    """Start Keycloak with the test realms or those given.

    `folder` takes its installation, removed at the end, and its log.
    """
    java_home = find_java_home(version, java_majors)
    archive = fetch_archive(java_home, version)
    home = folder / f"keycloak-{version}"
    realms = realms or all_realms()
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        imported = home / "data" / "import"
        imported.mkdir(parents=True)
        for realm in realms:
            (imported / f"{realm['realm']}.json").write_text(json.dumps(realm))
        port = free_port()
        keycloak = Keycloak(f"http://127.0.0.1:{port}")
        command = [
            str(home / "bin" / "kc.sh"),
            "start-dev",
            "--db=dev-mem",
            "--http-host=127.0.0.1",
            f"--http-port={port}",
            "--import-realm",
        ]
        if version == VERSION:
            # A realm with another name still gives the address that it was asked at for its token endpoint.
            command += [f"--hostname={keycloak.url}", "--hostname-backchannel-dynamic=true"]
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "JAVA_HOME": str(java_home),
            "JAVA_OPTS_KC_HEAP": "-Xms64m -Xmx512m",
            # A server that lives for minutes does not earn back what the optimizing compiler costs at its start.
            "JAVA_OPTS_APPEND": "-XX:TieredStopAtLevel=1 -XX:-UsePerfData",
            # The names since version 26, and before.
            **dict(zip(("KC_BOOTSTRAP_ADMIN_USERNAME", "KC_BOOTSTRAP_ADMIN_PASSWORD"), ADMIN, strict=True)),
            **dict(zip(("KEYCLOAK_ADMIN", "KEYCLOAK_ADMIN_PASSWORD"), ADMIN, strict=True)),
        }
        with running(command, env, home, folder / "keycloak.log") as child:
            child.wait_until(lambda: all(keycloak.answers(realm["realm"]) for realm in realms), START_SECONDS)
            yield keycloak
    finally:
        shutil.rmtree(home, ignore_errors=True)


def all_realms() -> list[dict[str, Any]]:
    """The realm file's, its rotating twin, and one that names itself differently."""
    realm = json.loads(REALM_FILE.read_text())
    outer = {"frontendUrl": OUTER_ISSUER.partition("/realms/")[0]}
    return [
        realm,
        {**realm, "realm": ROTATING_REALM, "revokeRefreshToken": True, "refreshTokenMaxReuse": 0},
        {**realm, "realm": INNER_REALM, "attributes": {**realm.get("attributes", {}), **outer}},
    ]


def fetch_archive(java_home: Path, version: str) -> Path:
    """The distribution's archive in the user's cache, downloaded by Maven when it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eoepca-security" / "keycloak"
    archive = cache / f"keycloak-quarkus-dist-{version}.tar.gz"
    if archive.exists():
        return archive
    maven = shutil.which("mvn")
    if maven is None:
        raise KeycloakError("Maven is needed to download Keycloak: no mvn on PATH")
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed only when complete, so that an interrupted download leaves nothing that looks like an archive.
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        command = [
            *(maven, "-q", "-B", "--strict-checksums", "dependency:copy"),
            f"-Dartifact=org.keycloak:keycloak-quarkus-dist:{version}:tar.gz",
            f"-DoutputDirectory={partial}",
        ]
        env = {**os.environ, "JAVA_HOME": str(java_home)}
        done = subprocess.run(
            command, env=env, cwd=partial, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
        if done.returncode != 0:
            raise KeycloakError(f"Maven could not download Keycloak {version}:\n{done.stdout}{done.stderr}")
        (Path(partial) / archive.name).replace(archive)
    return archive


def find_java_home(version: str, majors: Sequence[int]) -> Path:
    """JAVA_HOME when Keycloak runs on it, else the most preferred of the installed ones."""
    chosen = os.environ.get("JAVA_HOME")
    if chosen and java_major(Path(chosen)) in majors:
        return Path(chosen)
    candidates = sorted(Path("/usr/lib/jvm").glob("*/"))
    on_path = shutil.which("java")
    if on_path:
        candidates.insert(0, Path(on_path).resolve().parents[1])
    by_major = {java_major(home): home for home in reversed(candidates)}
    for major in majors:
        if major in by_major:
            return by_major[major]
    raise KeycloakError(f"Keycloak {version} needs Java {', '.join(map(str, majors))}: none found")


def java_major(home: Path) -> int | None:
    """The feature release of the Java in `home` (25 for 25.0.3), or None when none runs there."""
    try:
        done = subprocess.run(
            [home / "bin" / "java", "-version"], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError:
        return None
    version = re.search(r'version "(\d+)', done.stderr)
    return int(version[1]) if version else None
