"""S3 storage that boto3 and GDAL open with the token file, as docs/s3.md says.

The storage is a small stand-in. Run with `uv run --group interop pytest -m interop tests/interop/test_s3.py`; needs
Debian's gdal-bin.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer
from tests.support.environment import settings_for
from tests.support.processes import ROOT, StartProxy
from tests.support.waiting import eventually

pytest.importorskip("boto3")

import boto3
from botocore.exceptions import ClientError

pytest_plugins = ["tests.interop.eo_fixtures"]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

SECONDS = 60
LIFETIME = 4  # seconds that a token is good for
GOOD = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId>
<SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{session}</SessionToken><Expiration>{end}</Expiration>
</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""
REFUSED = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>ExpiredTokenException</Code><Message>The token has expired.</Message></Error></ErrorResponse>"""
DENIED = "<Error><Code>AccessDenied</Code><Message>These are no keys of this storage.</Message></Error>"


@dataclass(frozen=True)
class Keys:
    """What a token was exchanged for; they end with the token, as MinIO's do."""

    token: str
    end: int
    method: str
    key: str = field(default_factory=lambda: f"ASIA{secrets.token_hex(8).upper()}")
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32))


@dataclass
class Storage:
    """A stand-in for S3 storage, with STS at the same address, as MinIO and Ceph have it."""

    issuer: FakeIssuer
    files: Path
    role: str
    issued: list[Keys] = field(default_factory=list)
    reads: list[tuple[int, str]] = field(default_factory=list)
    before_answer: Callable[[], object] = lambda: None
    host: str = ""

    @property
    def tokens(self) -> list[str]:
        """The tokens that were exchanged, each once."""
        return list(dict.fromkeys(keys.token for keys in self.issued))

    def respond(self, request: Handler) -> None:
        sent = request.read_body().decode() if request.command == "POST" else urlsplit(request.path).query
        form = dict(parse_qsl(sent))
        if form.get("Action") == "AssumeRoleWithWebIdentity":
            self._exchange(request, form)
        else:
            self._read(request)

    def _exchange(self, request: Handler, form: dict[str, str]) -> None:
        token = form["WebIdentityToken"]
        if form["RoleArn"] != self.role or not self.issuer.accepts(token):
            request.answer(400, REFUSED.encode(), {"Content-Type": "text/xml"})
            return
        keys = Keys(token, unverified_claims(token)["exp"], request.command)
        self.issued.append(keys)
        end = datetime.fromtimestamp(keys.end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = GOOD.format(key=keys.key, secret=secrets.token_hex(20), session=keys.session, end=end)
        request.answer(200, body.encode(), {"Content-Type": "text/xml"})

    def _read(self, request: Handler) -> None:
        named = re.search(r"^AWS4-HMAC-SHA256 Credential=(\w+)/", request.headers.get("Authorization", ""))
        session = request.headers.get("X-Amz-Security-Token")
        known = {(keys.key, keys.session): keys for keys in self.issued if time.time() < keys.end}
        keys = known.get((named[1] if named else "", session or ""))
        if keys is None:
            self.reads.append((403, ""))
            request.answer(403, DENIED.encode(), {"Content-Type": "application/xml"})
            return
        self.reads.append((200, keys.token))
        self.before_answer()
        self._send(request, self.files / Path(urlsplit(request.path).path).name)

    def _send(self, request: Handler, path: Path) -> None:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        start, end = (int(asked[1]), min(int(asked[2]), size - 1)) if asked else (0, size - 1)
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start + 1)
        headers = {"Content-Type": "image/tiff", "Accept-Ranges": "bytes", "ETag": '"1"'}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        request.answer(206 if asked else 200, content, headers)


@contextmanager
def running_storage(issuer: FakeIssuer, files: Path, role: str) -> Iterator[Storage]:
    storage = Storage(issuer, files, role)

    class S3(Handler):
        def respond(self) -> None:
            storage.respond(self)

    with LocalServer(S3) as server:
        storage.host = f"127.0.0.1:{server.port}"
        yield storage


def documented(title: str) -> dict[str, str]:
    """Return the variables that a section of the page sets."""
    text = (ROOT / "docs" / "s3.md").read_text()
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^export (\w+)=(\S+)", section, re.MULTILINE))


def variables(client: str, storage: Storage, token_file: Path) -> dict[str, str]:
    """Return the documented variables of a client, for the stand-in, which has no TLS."""
    given = documented("The variables of all clients") | documented(client)
    assert given["AWS_WEB_IDENTITY_TOKEN_FILE"] == "/run/user/1000/s3-token"
    changed = {"AWS_WEB_IDENTITY_TOKEN_FILE": str(token_file), "AWS_HTTPS": "NO", "AWS_EC2_METADATA_DISABLED": "true"}
    at = {
        name: value.replace("https://s3.example", f"http://{storage.host}").replace("s3.example", storage.host)
        for name, value in given.items()
    }
    return at | changed


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    return folder / "s3-token"


@pytest.fixture
def storage(start: StartProxy, token_file: Path, eo_rasters: Path) -> Iterator[Storage]:
    """The storage, and a proxy that keeps a token for it in the file."""
    role = documented("The variables of all clients")["AWS_ROLE_ARN"]
    with FakeIssuer(Behaviour(lifetime=LIFETIME)) as issuer, running_storage(issuer, eo_rasters, role) as storage:
        proxy = start("launcher", "http://127.0.0.1:9", settings_for(issuer, OPEN_ID_TOKEN_FILE=str(token_file)))
        eventually(token_file.exists)
        yield storage
        assert proxy.stop() == 0


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, str]], Any]:
    """Return an S3 client of boto3 in an environment of these variables."""

    def client(environment: dict[str, str]) -> Any:
        for name in os.environ:
            if name.startswith("AWS_") or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        for name, value in ({"HOME": str(tmp_path)} | environment).items():
            monkeypatch.setenv(name, value)
        return boto3.Session().client("s3")

    return client


def read(s3: Any) -> bytes:
    content: bytes = s3.get_object(Bucket="bucket", Key="large.tif", Range="bytes=0-3")["Body"].read()
    return content


def test_boto3_reads_on_for_longer_than_a_token_lasts(
    storage: Storage, token_file: Path, use: Callable[[dict[str, str]], Any]
) -> None:
    s3 = use(variables("boto3 and the AWS CLI", storage, token_file))
    eventually(lambda: read(s3)[:2] == b"II" and len(storage.tokens) >= 4, timeout=SECONDS)
    assert {status for status, _ in storage.reads} == {200}
    assert {token for _, token in storage.reads} == set(storage.tokens)
    assert {keys.method for keys in storage.issued} == {"POST"}
    ends = [unverified_claims(token)["exp"] for token in storage.tokens]
    assert ends[-1] - ends[0] > LIFETIME


def test_boto3_fails_with_a_copy_of_the_file_when_its_token_has_ended(
    storage: Storage, token_file: Path, tmp_path: Path, use: Callable[[dict[str, str]], Any]
) -> None:
    copy = tmp_path / "copy"
    shutil.copy(token_file, copy)
    s3 = use(variables("boto3 and the AWS CLI", storage, copy))
    assert read(s3)[:2] == b"II"
    eventually(lambda: not storage.issuer.accepts(copy.read_text()))
    with pytest.raises(ClientError, match="ExpiredTokenException"):
        read(s3)
    assert storage.tokens == [copy.read_text()]


def test_one_run_of_gdal_takes_up_a_renewed_file(
    storage: Storage, token_file: Path, base_environment: dict[str, str], tmp_path: Path
) -> None:
    def wait_for_a_newer_token() -> None:
        eventually(lambda: token_file.read_text() != storage.issued[-1].token)

    storage.before_answer = wait_for_a_newer_token
    environment = base_environment | variables("GDAL", storage, token_file)
    window = ["-srcwin", "0", "0", "8192", "1024"]
    command = ["gdal_translate", "-q", *window, "/vsis3/bucket/large.tif", str(tmp_path / "window.tif")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        ["gdalinfo", "-json", "-stats", str(tmp_path / "window.tif")], capture_output=True, check=True, timeout=SECONDS
    )
    assert json.loads(shown.stdout)["bands"][0]["minimum"] == 7
    assert {status for status, _ in storage.reads} == {200}
    assert len({token for _, token in storage.reads}) == len(storage.reads) >= 3
    assert {keys.method for keys in storage.issued} == {"GET"}  # so the token is in the address
