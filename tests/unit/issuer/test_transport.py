import codecs
import errno
import gc
import gzip
import ipaddress
import socket
import ssl
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import certifi
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from eoepca_security.errors import IssuerUnavailable
from eoepca_security.issuer.ca_trust import begin_to_trust, ca_bundle, trust, usable_cas
from eoepca_security.issuer.transport import MAX_BODY, Answer, HttpTransport, _DeadlineAdapter, explain
from tests.support.network import PATIENCE, RawServer, drips, free_port, http, replies, says_nothing

SHORT = 0.2
"""A deadline that passes in these tests, in seconds."""
SECRET = "a-secret-that-nobody-may-see"

Script = Callable[[RawServer, socket.socket], None]


@pytest.fixture(autouse=True)
def _no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def transport() -> HttpTransport:
    return HttpTransport(trust())


@dataclass(frozen=True)
class Authority:
    """A CA of our own, and contexts of servers that it vouches for."""

    file: Path
    pem: str
    server: ssl.SSLContext
    other_name: ssl.SSLContext


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("ca")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test CA")])
    certificate = _certificate(name, name, key, key, is_ca=True)
    pem = certificate.public_bytes(Encoding.PEM).decode()
    file = folder / "ca.pem"
    file.write_text(pem)

    def server(address: str) -> ssl.SSLContext:
        server_key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test server")])
        names = [x509.IPAddress(ipaddress.ip_address(address)), x509.DNSName("issuer.invalid")]
        alternative = x509.SubjectAlternativeName(names)
        made = _certificate(subject, name, server_key, key, alternative)
        chain = folder / f"{address}.pem"
        private = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain.write_bytes(private + made.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context

    return Authority(file, pem, server("127.0.0.1"), server("127.0.0.9"))


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    alternative: x509.SubjectAlternativeName | None = None,
    *,
    is_ca: bool = False,
) -> x509.Certificate:
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        ["content_commitment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"], False
    )
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_encipherment=False, key_cert_sign=is_ca, crl_sign=is_ca, **usage),
            critical=True,
        )
    )
    if alternative is not None:
        builder = builder.add_extension(alternative, critical=False)
    return builder.sign(issuer_key, SHA256())


@contextmanager
def ends_in_time() -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < PATIENCE


# --- an exchange --------------------------------------------------------------------------------------------------


def test_a_get_returns_status_headers_and_body(transport: HttpTransport) -> None:
    with RawServer(replies(http(b'{"a": 1}', "Retry-After: 7", status=503))) as server:
        answer = transport.get(server.url, timeout=PATIENCE)

    assert (answer.status, answer.body, answer.headers.get("retry-after")) == (503, b'{"a": 1}', "7")
    assert server.requests[0].startswith(b"GET /realms/test HTTP/1.1\r\n")


def test_a_post_sends_form_and_headers(transport: HttpTransport) -> None:
    form = {"grant_type": "refresh_token", "refresh_token": "ü & = +"}
    with RawServer(replies(http(b"{}"))) as server:
        transport.post(server.url, form=form, headers={"Authorization": "Basic eDp5"}, timeout=PATIENCE)

    head, _, body = server.requests[0].decode().partition("\r\n\r\n")
    assert head.startswith("POST /realms/test HTTP/1.1\r\n")
    assert "\r\nAuthorization: Basic eDp5\r\n" in head + "\r\n"
    assert "\r\nContent-Type: application/x-www-form-urlencoded\r\n" in head + "\r\n"
    assert dict(parse_qsl(body)) == form


def test_only_json_without_compression_is_asked_for(transport: HttpTransport) -> None:
    with RawServer(replies(http(b"{}"))) as server:
        transport.get(server.url, timeout=PATIENCE)

    head = server.requests[0].decode() + "\r\n"
    assert "\r\nAccept: application/json\r\n" in head
    assert "\r\nAccept-Encoding: identity\r\n" in head


def test_cookies_are_not_kept(transport: HttpTransport) -> None:
    with RawServer(replies(http(b"{}", "Set-Cookie: session=1; Path=/"))) as server:
        for _ in range(2):
            transport.get(server.url, timeout=PATIENCE)

    assert len(server.requests) == 2
    assert b"cookie" not in server.requests[1].lower()


def test_an_answer_does_not_show_its_body_and_headers() -> None:
    assert repr(Answer(200, SECRET.encode(), {"X": SECRET})) == "Answer(status=200)"


# --- in time ------------------------------------------------------------------------------------------------------

LATE: list[Any] = [
    pytest.param(says_nothing, id="says nothing"),
    pytest.param(drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="drips interim answers"),
    pytest.param(drips(b"HTTP/1.1 ", b"2"), id="drips the status line"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), id="drips header lines"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\nX: ", b"y"), id="drips a header's bytes"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\n\r\n{}", b" "), id="drips a body without length"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{}", b" "), id="drips a body with length"),
    pytest.param(
        drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", b"1\r\n \r\n"), id="drips chunks"
    ),
]


@pytest.mark.parametrize("script", LATE)
def test_an_exchange_ends_in_time(transport: HttpTransport, script: Script) -> None:
    with RawServer(script) as server, ends_in_time():
        with pytest.raises(IssuerUnavailable, match=rf"{server.url} did not answer within 0\.2 s"):
            transport.get(server.url, timeout=SHORT)

        assert server.ended.wait(PATIENCE)


def test_a_post_ends_in_time(transport: HttpTransport) -> None:
    with RawServer(says_nothing) as server, ends_in_time(), pytest.raises(IssuerUnavailable, match=r"within 0\.2 s"):
        transport.post(server.url, form={"a": "b"}, headers={}, timeout=SHORT)


def test_a_tls_handshake_ends_in_time(transport: HttpTransport) -> None:
    with RawServer(says_nothing) as server, ends_in_time():
        with pytest.raises(IssuerUnavailable, match=r"did not answer within 0\.2 s"):
            transport.get(server.url.replace("http:", "https:"), timeout=SHORT)

        assert server.ended.wait(PATIENCE)


def test_an_exchange_over_tls_ends_in_time(authority: Authority) -> None:
    script = drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n")
    with RawServer(script, authority.server) as server, ends_in_time():
        with pytest.raises(IssuerUnavailable, match=r"did not answer within 0\.2 s"):
            HttpTransport(trust(authority.file)).get(server.url, timeout=SHORT)

        assert server.ended.wait(PATIENCE)


@pytest.mark.parametrize(
    ("scheme", "script"),
    [("http", drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n")), ("https", replies(keep_open=True))],
)
def test_an_exchange_through_a_proxy_ends_in_time(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch, scheme: str, script: Script
) -> None:
    with RawServer(script) as proxy, ends_in_time():
        monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(IssuerUnavailable, match=r"did not answer within 0\.2 s"):
            transport.get(f"{scheme}://issuer.invalid/", timeout=SHORT)

        assert proxy.ended.wait(PATIENCE)
    assert b"issuer.invalid" in proxy.requests[0]


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int, dead: int) -> None:
    """Give every name one address for each of `ports`; connecting to the one at `dead` gets no answer."""
    connect: Callable[[socket.socket, Any], None] = socket.socket.connect

    def connect_or_wait(connection: socket.socket, address: Any) -> None:
        if address[1] != dead:
            return connect(connection, address)
        time.sleep(connection.gettimeout() or PATIENCE)
        raise TimeoutError

    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    monkeypatch.setattr(socket.socket, "connect", connect_or_wait)


def test_an_address_in_brackets_is_connected_to_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    with RawServer(replies(http(b"{}"))) as server:

        def resolve(*names: object, **_: object) -> list[object]:
            asked.append(names)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        HttpTransport(trust()).get("http://[::1]:8443/", timeout=PATIENCE)

    assert asked == [("::1", 8443)]


def test_a_name_with_many_dead_addresses_does_not_multiply_the_deadline(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = free_port()
    resolve_to(monkeypatch, *[dead] * 8, dead=dead)
    begin = time.monotonic()

    with pytest.raises(IssuerUnavailable, match=r"did not answer within 0\.2 s"):
        transport.get("http://issuer.example/", timeout=SHORT)

    assert time.monotonic() - begin < 4 * SHORT


def test_a_name_server_that_hangs_does_not_hold_up_the_exchange(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: hang.wait(PATIENCE))
    started = time.monotonic()
    with pytest.raises(IssuerUnavailable, match="did not answer within") as caught:
        transport.get("https://issuer.example/x", timeout=0.2)
    assert time.monotonic() - started < PATIENCE
    assert not caught.value.was_sent
    hang.set()


def test_a_dead_address_leaves_time_for_the_next_one(transport: HttpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = free_port()
    with RawServer(replies(http(b"{}"))) as server:
        resolve_to(monkeypatch, dead, server.port, dead=dead)

        assert transport.get("http://issuer.example/", timeout=1).body == b"{}"


def test_a_connection_that_is_made_when_time_is_up_is_closed(transport: HttpTransport) -> None:
    adapter = _DeadlineAdapter(trust(), PATIENCE)
    with RawServer(says_nothing) as server:
        adapter.cut()

        with pytest.raises(TimeoutError):
            adapter.connect("127.0.0.1", server.port)

        assert server.ended.wait(PATIENCE)


def test_a_connection_does_not_hold_back_small_packets() -> None:
    adapter = _DeadlineAdapter(trust(), PATIENCE)
    with RawServer(says_nothing) as server, adapter.connect("127.0.0.1", server.port) as connection:
        adapter.forget()
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "answer",
    [
        http(b"{}"),
        http(b"{}", "Location: /", status=302),
        http(b"x" * (MAX_BODY + 1)),
        http(b"{}", "Content-Encoding: gzip"),
        b"nonsense\r\n\r\n",
    ],
    ids=["success", "redirect", "too long", "encoded", "nonsense"],
)
def test_no_connection_is_left_open(transport: HttpTransport, answer: bytes) -> None:
    # A collection would close what was forgotten, and hide it.
    gc.disable()
    try:
        with RawServer(replies(answer, keep_open=True)) as server:
            with suppress(IssuerUnavailable):
                transport.get(server.url, timeout=PATIENCE)

            assert server.ended.wait(PATIENCE)
    finally:
        gc.enable()


def test_the_watch_over_an_exchange_ends_with_it(transport: HttpTransport) -> None:
    with RawServer(replies(http(b"{}"))) as server:
        transport.get(server.url, timeout=60)

    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(PATIENCE)
            assert not thread.is_alive()


# --- within bounds ------------------------------------------------------------------------------------------------


def framed(body: bytes, framing: str) -> bytes:
    match framing:
        case "length":
            return http(body)
        case "chunks":
            chunks = [body[i : i + 50_000] for i in range(0, len(body), 50_000)]
            data = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
            return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data
        case _:
            return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body


@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
@pytest.mark.parametrize("size", [0, 1, MAX_BODY - 1, MAX_BODY])
def test_a_body_up_to_the_limit_is_read_as_a_whole(transport: HttpTransport, framing: str, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with RawServer(replies(framed(body, framing))) as server:
        assert transport.get(server.url, timeout=PATIENCE).body == body


@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
def test_a_longer_body_is_refused(transport: HttpTransport, framing: str) -> None:
    with (
        RawServer(replies(framed(b"x" * (MAX_BODY + 1), framing))) as server,
        pytest.raises(IssuerUnavailable, match="more than 256 KiB"),
    ):
        transport.get(server.url, timeout=PATIENCE)


def test_an_endless_body_is_refused_without_waiting_for_the_deadline(transport: HttpTransport) -> None:
    endless = drips(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, interval=0)
    with RawServer(endless) as server, ends_in_time():
        with pytest.raises(IssuerUnavailable, match="more than 256 KiB"):
            transport.get(server.url, timeout=60)

        assert server.ended.wait(PATIENCE)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 20",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{}",
        b"SSH-2.0-server\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    ],
    ids=[
        "nothing",
        "cut in the status line",
        "cut in the body",
        "cut before the body",
        "no last chunk",
        "cut in a chunk",
        "another protocol",
        "long header",
        "many headers",
        "two lengths",
    ],
)
def test_what_is_no_whole_http_answer_is_a_failure(transport: HttpTransport, answer: bytes) -> None:
    with RawServer(replies(answer)) as server, pytest.raises(IssuerUnavailable, match="cannot be reached"):
        transport.get(server.url, timeout=PATIENCE)


# --- nowhere else -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_redirect_is_not_followed(transport: HttpTransport, status: int, method: str) -> None:
    def post(url: str, *, timeout: float) -> Answer:
        return transport.post(url, form={"a": "b"}, headers={}, timeout=timeout)

    send = transport.get if method == "GET" else post
    with RawServer(replies(http(b"{}"))) as target:
        answer = http(b"{}", f"Location: {target.url}", status=status)
        with RawServer(replies(answer)) as server, pytest.raises(IssuerUnavailable, match=rf"redirect \({status}\)"):
            send(server.url, timeout=PATIENCE)

    assert (server.connections, target.connections) == (1, 0)


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def bare_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("Identity", b"{}"),
        ("", b"{}"),
        (" , ", b"{}"),
        ("gzip", gzipped(b"{}")),
        ("GZIP", gzipped(b"{}")),
        ("x-gzip", gzipped(b"{}")),
        ("identity, gzip", gzipped(b"{}")),
        ("gzip", gzipped(b"{") + gzipped(b"") + gzipped(b"}")),
        ("deflate", zlib.compress(b"{}")),
        ("deflate", bare_deflate(b"{}")),
    ],
)
def test_a_body_that_is_compressed_though_that_was_not_asked_for_is_read(
    transport: HttpTransport, encoding: str, body: bytes
) -> None:
    with RawServer(replies(http(body, f"Content-Encoding: {encoding}"))) as server:
        assert transport.get(server.url, timeout=PATIENCE).body == b"{}"


def test_no_body_is_in_no_encoding(transport: HttpTransport) -> None:
    with RawServer(replies(http(b"", "Content-Encoding: gzip"))) as server:
        assert transport.get(server.url, timeout=PATIENCE).body == b""


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("br", b"{}"),
        ("zstd", b"{}"),
        ("gzip, gzip", gzipped(gzipped(b"{}"))),
        ("gzip", b"{}"),
        ("gzip", zlib.compress(b"{}")),
        ("gzip", gzipped(b"{}")[:-9]),
        ("gzip", gzipped(b"{}")[:-8] + bytes(8)),
        ("gzip", gzipped(b"{}") + b"{}"),
        ("deflate", gzipped(b"{}")),
        ("deflate", zlib.compress(b"{}")[:-1]),
    ],
)
def test_a_body_that_cannot_be_decoded_is_refused(transport: HttpTransport, encoding: str, body: bytes) -> None:
    answer = http(body, f"Content-Encoding: {encoding}")
    with RawServer(replies(answer)) as server, pytest.raises(IssuerUnavailable, match=r"encoding|cut off") as caught:
        transport.get(server.url, timeout=PATIENCE)
    assert caught.value.was_sent


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, bare_deflate])
@pytest.mark.parametrize("size", [MAX_BODY, MAX_BODY + 1, 50_000_000])
def test_a_compressed_body_has_the_same_limit(
    transport: HttpTransport, compress: Callable[[bytes], bytes], size: int
) -> None:
    encoding = "gzip" if compress is gzip.compress else "deflate"
    with RawServer(replies(http(compress(bytes(size)), f"Content-Encoding: {encoding}"))) as server:
        if size == MAX_BODY:
            assert transport.get(server.url, timeout=PATIENCE).body == bytes(size)
        else:
            with pytest.raises(IssuerUnavailable, match="more than 256 KiB"):
                transport.get(server.url, timeout=PATIENCE)


def test_a_bomb_of_many_parts_has_the_same_limit(transport: HttpTransport) -> None:
    body = gzip.compress(bytes(100_000)) * 1000
    with (
        RawServer(replies(http(body, "Content-Encoding: gzip"))) as server,
        pytest.raises(IssuerUnavailable, match="more than 256 KiB"),
    ):
        transport.get(server.url, timeout=PATIENCE)


@pytest.mark.parametrize("status", [200, 201, 204, 299, 400, 401, 404, 429, 500, 503, 599])
def test_every_other_status_is_handed_on(transport: HttpTransport, status: int) -> None:
    with RawServer(replies(http(b"", status=status))) as server:
        assert transport.get(server.url, timeout=PATIENCE).status == status


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("https://login.example/oauth2/token", " to https://login.example/oauth2/token,"),
        ("//login.example/x", " to http://login.example/x,"),
        ("/other", r" to http://127\.0\.0\.1:\d+/other,"),
        ("https://user:word@login.example/x?code=secret#secret", " to https://login.example/x,"),
        ("http://[", r"redirect \(302\),"),
        ("", r"redirect \(302\),"),
    ],
)
def test_a_redirect_says_where_it_leads(transport: HttpTransport, location: str, said: str) -> None:
    with (
        RawServer(replies(http(b"", f"Location: {location}", status=302))) as server,
        pytest.raises(IssuerUnavailable, match=said) as caught,
    ):
        transport.get(server.url, timeout=PATIENCE)
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("where", ["NETRC", "HOME"])
def test_a_netrc_entry_for_the_host_is_not_used(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login ambient password credentials\n")
    file.chmod(0o600)
    monkeypatch.setenv(where, str(file if where == "NETRC" else tmp_path))
    with RawServer(replies(http(b"{}"))) as server:
        assert requests.utils.get_netrc_auth(server.url) == ("ambient", "credentials")
        transport.get(server.url, timeout=PATIENCE)
        transport.post(server.url, form={}, headers={"Authorization": "Basic b3Vyczpvbmx5"}, timeout=PATIENCE)

    get, post = server.requests
    assert b"authorization" not in get.lower()
    assert [line for line in post.split(b"\r\n") if line.lower().startswith(b"authorization:")] == [
        b"Authorization: Basic b3Vyczpvbmx5"
    ]


# --- what went wrong ----------------------------------------------------------------------------------------------


def test_a_refused_connection_is_named(transport: HttpTransport) -> None:
    url = f"http://127.0.0.1:{free_port()}/token"

    with pytest.raises(IssuerUnavailable, match=f"{url} cannot be reached: the connection was refused"):
        transport.get(url, timeout=PATIENCE)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_the_environment_names_is_told(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{free_port()}")

    with pytest.raises(
        IssuerUnavailable, match=r"cannot be reached \(through the proxy .*: the connection was refused"
    ):
        transport.get(f"{scheme}://issuer.invalid/", timeout=PATIENCE)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "{}_PROXY", "{}_proxy"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("socks5h://user:word@127.0.0.1:1", "names a SOCKS proxy"),
        ("SOCKS4://127.0.0.1:1", "names a SOCKS proxy"),
        ("proxy:3128", "is not the address of a proxy"),
        ("http://", "is not the address of a proxy"),
        ("http://[::1", "is not the address of a proxy"),
        ("http://127.0.0.1:99999", "is not the address of a proxy"),
        ("ftp://user:word@127.0.0.1:1", "is not the address of a proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_told_by_its_variable(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch, scheme: str, name: str, value: str, said: str
) -> None:
    name = name.format(scheme.upper() if "PROXY" in name else scheme)
    monkeypatch.setenv(name, value)

    with pytest.raises(IssuerUnavailable, match=f"cannot be reached: {name} {said}") as caught:
        transport.get(f"{scheme}://issuer.invalid/", timeout=PATIENCE)
    assert (caught.value.cause, caught.value.was_sent) == ("environment", False)
    assert "word" not in str(caught.value)
    assert transport_says_nothing_of_proxies_here(transport)


def transport_says_nothing_of_proxies_here(transport: HttpTransport) -> bool:
    with RawServer(replies(http(b"{}"))) as server:
        return transport.get(server.url, timeout=PATIENCE).status == 200


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff"])
def test_a_bundle_of_cas_that_cannot_be_used_is_told_by_its_variable(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes | None
) -> None:
    file = tmp_path / "bundle.pem"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv(name, str(file))
    with RawServer(replies(http(b"{}")), authority.server) as server:
        with pytest.raises(IssuerUnavailable, match=f"cannot be reached: {name} does not name a PEM") as caught:
            HttpTransport(trust(authority.file)).get(server.url, timeout=PATIENCE)
        assert (caught.value.cause, caught.value.was_sent) == ("environment", False)

        file.write_text(authority.pem)
        assert HttpTransport(trust()).get(server.url, timeout=PATIENCE).body == b"{}"


ODD = ["x", "::::", "http://[", "/nowhere", "/dev/null", " ", "\udcff", "http://\udcff:1", "http://a b:1", "a" * 5000]


@pytest.mark.parametrize("value", ODD, ids=ascii)
@pytest.mark.parametrize(
    "name",
    ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"],
)
def test_an_odd_environment_makes_no_other_error(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _nobody_is_known)
    monkeypatch.setenv(name, value)
    for scheme in ("http", "https"):
        with pytest.raises(IssuerUnavailable, match="cannot be reached") as caught:
            transport.get(f"{scheme}://issuer.example/", timeout=PATIENCE)
        assert str(caught.value).isprintable()


def test_whatever_a_library_raises_is_an_issuer_that_is_not_reached(
    transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> object:
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(_DeadlineAdapter, "connect", fails)
    with pytest.raises(IssuerUnavailable, match="cannot be reached"):
        transport.get("http://127.0.0.1:1/", timeout=PATIENCE)


def _nobody_is_known(*_: object, **__: object) -> object:
    raise socket.gaierror


@pytest.mark.parametrize("value", ["/nowhere/keys", "/"])
def test_a_file_for_keys_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", value)
    with pytest.raises(IssuerUnavailable, match="SSLKEYLOGFILE is set but cannot be written"):
        HttpTransport(trust).get("https://127.0.0.1:1/", timeout=PATIENCE)


def test_this_machine_is_behind_no_proxy(transport: HttpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(replies(http(b"{}"))) as server, RawServer(replies(http(b"[]"))) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("all_proxy", f"http://127.0.0.1:{proxy.port}")

        assert transport.get(server.url, timeout=PATIENCE).body == b"{}"
        assert transport.get(server.url.replace("127.0.0.1", "localhost"), timeout=PATIENCE).body == b"{}"
    assert (server.connections, proxy.connections) == (2, 0)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_unknown_host_is_named(transport: HttpTransport, scheme: str) -> None:
    with pytest.raises(IssuerUnavailable, match=r"cannot be reached: its host name is unknown"):
        transport.get(f"{scheme}://issuer.invalid/", timeout=PATIENCE)


def test_tls_to_a_plain_port_is_named(transport: HttpTransport) -> None:
    def answers_in_plain_text(_: RawServer, connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.recv(65536)

    with (
        RawServer(answers_in_plain_text) as server,
        pytest.raises(IssuerUnavailable, match=r"the server does not speak TLS \(.+\)$") as caught,
    ):
        transport.get(server.url.replace("http:", "https:"), timeout=PATIENCE)
    assert caught.value.cause == "no_tls"


@pytest.mark.parametrize(
    "url", ["http://[::1].evil.example/", "https://a..b/", f"https://{'a' * 64}.example/", "x://y"]
)
def test_an_address_that_cannot_be_is_a_failure_like_others(transport: HttpTransport, url: str) -> None:
    with pytest.raises(IssuerUnavailable, match="cannot be reached"):
        transport.get(url, timeout=PATIENCE)


def test_an_untrusted_certificate_is_named(transport: HttpTransport, authority: Authority) -> None:
    with (
        RawServer(replies(http(b"{}")), authority.server) as server,
        pytest.raises(IssuerUnavailable, match=r"certificate is not trusted \(.+\)$") as caught,
    ):
        transport.get(server.url, timeout=PATIENCE)

    assert caught.value.cause == "unknown_ca"
    assert server.requests == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError(), "timeout"),
        (requests.ConnectionError(TimeoutError()), "timeout"),
        (requests.ConnectionError(ConnectionRefusedError()), "refused"),
        (OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), "refused"),
        (OSError("Tunnel connection failed: 407 Proxy Authentication Required"), "proxy"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]"), "no_tls"),
        (ConnectionResetError(), "ended"),
    ],
)
def test_what_kind_of_trouble_the_network_had(error: Exception, kind: str) -> None:
    assert explain(error)[0] == kind


def test_the_kind_of_trouble_goes_with_the_error(transport: HttpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(IssuerUnavailable) as caught:
        transport.get(f"http://127.0.0.1:{port}/", timeout=5)
    url = f"http://127.0.0.1:{port}/"
    assert (caught.value.cause, caught.value.by_proxy, caught.value.url) == ("refused", False, url)


def test_a_certificate_for_another_address_is_refused(authority: Authority) -> None:
    with (
        RawServer(replies(http(b"{}")), authority.other_name) as server,
        pytest.raises(IssuerUnavailable, match=r"certificate is not trusted .*mismatch"),
    ):
        HttpTransport(trust(authority.file)).get(server.url, timeout=PATIENCE)

    assert server.requests == []


@pytest.mark.parametrize(
    ("script", "was_sent"),
    [
        pytest.param(None, False, id="refused"),
        pytest.param(replies(), True, id="hung up"),
        pytest.param(says_nothing, True, id="late"),
        pytest.param(replies(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"), True, id="cut off"),
        pytest.param(replies(http(b"x" * (MAX_BODY + 1))), True, id="too long"),
        pytest.param(replies(http(b"x", "Content-Encoding: gzip")), True, id="encoded"),
    ],
)
def test_a_failure_says_whether_the_request_may_have_been_served(
    transport: HttpTransport, script: Script | None, was_sent: bool
) -> None:
    with RawServer(script or says_nothing) as server:
        url = server.url if script else f"http://127.0.0.1:{free_port()}/token"
        with pytest.raises(IssuerUnavailable) as caught:
            transport.post(url, form={"a": "b"}, headers={}, timeout=SHORT if script is says_nothing else PATIENCE)

    assert caught.value.was_sent == was_sent


@pytest.mark.parametrize("script", [None, says_nothing])
def test_nothing_is_sent_before_the_tls_handshake_is_done(
    transport: HttpTransport, authority: Authority, script: Script | None
) -> None:
    tls = None if script else authority.server
    with RawServer(script or replies(http(b"{}")), tls) as server, pytest.raises(IssuerUnavailable) as caught:
        transport.get(server.url.replace("http:", "https:"), timeout=SHORT)

    assert server.requests == []
    assert not caught.value.was_sent


def test_a_failure_does_not_give_away_what_was_sent(transport: HttpTransport) -> None:
    with pytest.raises(IssuerUnavailable) as caught:
        transport.post(
            f"http://127.0.0.1:{free_port()}/token",
            form={"refresh_token": SECRET},
            headers={"Authorization": SECRET},
            timeout=PATIENCE,
        )

    assert SECRET not in "".join(traceback.format_exception(caught.value))


# --- trust --------------------------------------------------------------------------------------------------------


def trusted(context: ssl.SSLContext) -> set[bytes]:
    return set(context.get_ca_certs(binary_form=True))


def loaded(*files: str | Path) -> set[bytes]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for file in files:
        context.load_verify_locations(file)
    return trusted(context)


@pytest.fixture
def system_ca(authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file with the system's CAs, with one CA in it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "System CA")])
    file = tmp_path / "system.pem"
    file.write_bytes(_certificate(name, name, key, key, is_ca=True).public_bytes(Encoding.PEM))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    return file


def test_a_server_is_trusted_through_the_extra_ca(authority: Authority) -> None:
    with RawServer(replies(http(b"{}")), authority.server) as server:
        assert HttpTransport(trust(authority.file)).get(server.url, timeout=PATIENCE).body == b"{}"


def test_a_server_behind_a_proxy_is_trusted_through_the_extra_ca(
    authority: Authority, transport: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tunnels_to_a_server(server: RawServer, connection: socket.socket) -> None:
        server.read_request(connection)
        connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        with authority.server.wrap_socket(connection.dup(), server_side=True) as inner:
            server.read_request(inner)
            inner.sendall(http(b"{}"))

    with RawServer(tunnels_to_a_server) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        url = "https://issuer.invalid:8443/"

        assert HttpTransport(trust(authority.file)).get(url, timeout=PATIENCE).body == b"{}"
        with pytest.raises(IssuerUnavailable, match="certificate is not trusted"):
            transport.get(url, timeout=PATIENCE)
    connect, get, *_ = proxy.requests
    assert connect.startswith(b"CONNECT issuer.invalid:8443 ")
    assert get.startswith(b"GET / ")


def test_the_extra_ca_is_added_to_the_others(authority: Authority, system_ca: Path) -> None:
    context = trust(authority.file)

    assert loaded(authority.file, system_ca, certifi.where()) <= trusted(context)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_without_an_extra_ca_the_systems_and_certifis_are_trusted(authority: Authority, system_ca: Path) -> None:
    everything = trusted(trust())

    assert loaded(system_ca, certifi.where()) <= everything
    assert not loaded(authority.file) & everything


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff\xfe"])
def test_a_ca_file_that_cannot_be_used_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(OSError, match=r".+"):
        trust(file)


def test_a_ca_that_a_byte_order_mark_hides_is_refused_wherever_it_is(authority: Authority, tmp_path: Path) -> None:
    marked = codecs.BOM_UTF8 + authority.pem.encode()
    for index, content in enumerate((marked, authority.pem.encode() + marked)):
        file = tmp_path / f"{index}.pem"
        file.write_bytes(content)
        for use in (trust, usable_cas, ca_bundle):
            with pytest.raises(OSError, match="byte order mark"):
                use(file)
    commented = tmp_path / "commented.pem"
    commented.write_bytes(codecs.BOM_UTF8 + b"# Our CA\n" + authority.pem.encode())
    assert loaded(authority.file) <= trusted(trust(usable_cas(commented)))


def test_the_bundle_has_the_extra_ca_and_the_others(authority: Authority, system_ca: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(ca_bundle(authority.file))

    assert authority.pem in bundle.read_text()
    assert loaded(bundle) == loaded(authority.file, system_ca, certifi.where())


def test_files_that_do_not_end_in_a_line_break_are_not_run_together(
    authority: Authority, system_ca: Path, tmp_path: Path
) -> None:
    cut, bundle = tmp_path / "cut.pem", tmp_path / "bundle.pem"
    cut.write_text(authority.pem.strip())
    bundle.write_bytes(ca_bundle(cut))

    assert loaded(bundle) == loaded(authority.file, system_ca, certifi.where())


def test_the_bundle_of_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ca_bundle(tmp_path / "missing.pem")


def test_the_bundle_takes_every_file_that_is_trusted(authority: Authority, tmp_path: Path) -> None:
    commented = tmp_path / "commented.pem"
    commented.write_bytes("# Prüfstelle\n".encode("latin-1") + authority.pem.encode())
    assert loaded(authority.file) <= trusted(trust(commented))

    assert authority.pem.encode() in ca_bundle(commented)


def test_who_hangs_up_without_tls_may_want_it(transport: HttpTransport) -> None:
    with (
        RawServer(replies()) as server,
        pytest.raises(IssuerUnavailable, match=r"ended early$") as caught,
    ):
        transport.get(server.url, timeout=PATIENCE)
    assert caught.value.cause == "ended"


def test_whom_to_trust_is_asked_once_and_only_when_needed(tmp_path: Path) -> None:
    made: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        made.append(trust())
        return made[-1]

    transport = HttpTransport(make)
    assert not made
    for _ in range(2):
        with pytest.raises(IssuerUnavailable, match="refused"):
            transport.get("http://127.0.0.1:9/", timeout=PATIENCE)
    assert len(made) == 1
    gone = HttpTransport(lambda: trust(tmp_path / "gone.pem"))
    with pytest.raises(IssuerUnavailable, match="the CAs cannot be read"):
        gone.get("http://127.0.0.1:9/", timeout=PATIENCE)


def test_reading_the_cas_can_begin_before_they_are_needed(tmp_path: Path) -> None:
    begin_to_trust()
    begun = trust()
    assert begun is not trust()
    assert begun.get_ca_certs() == trust().get_ca_certs()
    begin_to_trust(tmp_path / "gone.pem")
    with pytest.raises(FileNotFoundError):
        trust(tmp_path / "gone.pem")
