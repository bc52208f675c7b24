"""Spring Authorization Server, from Maven Central: a small application in Java, built with Maven."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx

from tests.interop.issuer import (
    AUDIENCE,
    LIFETIME,
    PASSWORD,
    REQUEST_SECONDS,
    USERNAME,
    Endpoints,
    Issuer,
    answers,
    key_pair,
)
from tests.interop.issuer_person import visit
from tests.interop.kc_process import running
from tests.support.network import free_port

FOLDER = Path(__file__).with_name("spring")
_VERSION_IN_POM = re.compile(r"<spring-authorization-server\.version>(.+?)<")
VERSION = _VERSION_IN_POM.findall((FOLDER / "pom.xml").read_text())[0]
BUILD_SECONDS = 300.0
START_SECONDS = 120.0
SECRET = "test-only-client-secret-of-some-length"
CLIENT_ID = "eoepca-login"


class SpringError(Exception):
    """The server cannot be built on this machine; the message says why."""


@contextmanager
def confidential(folder: Path) -> Iterator[Issuer]:
    """A client with a secret; access tokens are JWTs."""
    home = _built(folder)
    key_file, public_key = key_pair(folder)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    properties = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "test.issuer": url,
        "test.audience": AUDIENCE,
        "test.lifetime": LIFETIME,
        "test.username": USERNAME,
        "test.password": PASSWORD,
        "test.secret": SECRET,
        "test.client-key": json.dumps(public_key),
    }
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "SPRING_APPLICATION_JSON": json.dumps(properties)}
    # A server that lives for minutes does not earn back what the optimizing compiler costs at its start.
    command = ["java", "-XX:TieredStopAtLevel=1", "-Xmx256m", "-cp", "target/classes:target/lib/*", "issuer.Server"]
    with running(command, env, home, folder / "spring.log") as child:
        child.wait_until(lambda: answers(url), START_SECONDS)
        endpoints = Endpoints.of(url)
        yield Issuer(
            url=url,
            settings={
                "OPEN_ID_CONNECT_CLIENT_ID": CLIENT_ID,
                "OPEN_ID_CONNECT_CLIENT_SECRET": SECRET,
                "OPEN_ID_CONNECT_AUDIENCE": AUDIENCE,
            },
            user_of=endpoints.user_of_jwt,
            person=partial(visit, knows={"username": USERNAME, "password": PASSWORD}),
            revoke=partial(_tell, url, "revoke"),
            rotate_keys=partial(_rotate_keys, url, endpoints),
            audience=AUDIENCE,
            # It refuses the scope `openid` there.
            device_options=("--scope", "offline_access"),
            marks_id_tokens=False,
            clients=_machines(key_file),
        )


def _tell(url: str, what: str) -> None:
    httpx.post(f"{url}/test/{what}", trust_env=False, timeout=REQUEST_SECONDS).raise_for_status()


def _rotate_keys(url: str, endpoints: Endpoints) -> None:
    before = endpoints.signing_kids()
    _tell(url, "rotate")
    assert endpoints.signing_kids() > before


def _machines(key_file: Path) -> Mapping[str, Mapping[str, str]]:
    """The launcher's settings for the clients that act for themselves, by client authentication method."""
    methods = ("client_secret_basic", "client_secret_post", "client_secret_jwt")
    proofs = {method: {"OPEN_ID_CONNECT_CLIENT_SECRET": f"{SECRET}-{method}"} for method in methods}
    proofs["private_key_jwt"] = {"OPEN_ID_CONNECT_CLIENT_KEY_FILE": str(key_file)}
    return {
        method: {
            "OPEN_ID_CONNECT_CLIENT_ID": f"eoepca-{method}",
            "OPEN_ID_CONNECT_CLIENT_AUTH": method,
            **proof,
        }
        for method, proof in proofs.items()
    }


def _built(folder: Path) -> Path:
    """Build the server in a folder of its own, with its libraries next to it; return where it is."""
    maven = shutil.which("mvn")
    if maven is None or shutil.which("javac") is None:
        raise SpringError("Maven and a JDK are needed for Spring Authorization Server: no mvn or no javac on PATH")
    home = folder / "spring"
    shutil.copytree(FOLDER, home, ignore=shutil.ignore_patterns("target"))
    command = [
        *(maven, "-q", "-B", "--strict-checksums", "compile", "dependency:copy-dependencies"),
        *("-DincludeScope=runtime", "-DoutputDirectory=target/lib"),
    ]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    if done.returncode != 0:
        raise SpringError(f"Maven could not build Spring Authorization Server:\n{done.stdout}{done.stderr}")
    return home
