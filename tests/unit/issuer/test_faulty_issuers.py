"""A real TokenSource and a real network against an issuer that does everything wrong: the right code, in time."""

import contextlib
import gzip
import time
from collections.abc import Callable

import pytest

from eoepca_security.errors import TokenError, TokenInvalid
from eoepca_security.oauth.protocol import MAX_LIFETIME
from eoepca_security.proxy.config.factory import make_source
from eoepca_security.proxy.config.loading import read_settings
from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.environment import settings_for

Fault = Callable[[Handler], bool]


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eoepca_security.issuer.provider.DISCOVERY_TIMEOUT", 1.5)
    monkeypatch.setattr("eoepca_security.issuer.provider.TOKEN_TIMEOUT", 1.5)


def says(status: int, body: object, **headers: str) -> Fault:
    def fault(handler: Handler) -> bool:
        handler.read_body()
        handler.answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def raw(data: bytes, pause: float = 0) -> Fault:
    """Send bytes, one at a time when there is a `pause`, and hang up."""

    def fault(handler: Handler) -> bool:
        handler.read_body()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            for piece in [data] if not pause else [data[i : i + 1] for i in range(len(data))]:
                handler.wfile.write(piece)
                time.sleep(pause)
        return True

    return fault


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

ANYWHERE = {
    "HTML": (says(200, b"<html>hello</html>"), "issuer_unavailable"),
    "empty": (says(200, b""), "issuer_unavailable"),
    "a list": (says(200, []), "issuer_unavailable"),
    "null": (says(200, None), "issuer_unavailable"),
    "3 MB": (says(200, b'{"access_token": "' + b"x" * 3_000_000 + b'"}'), "issuer_unavailable"),
    "deep JSON": (says(200, b"[" * 100_000), "issuer_unavailable"),
    "deep JSON object": (says(200, b'{"a":' * 40_000 + b"1" + b"}" * 40_000), "issuer_unavailable"),
    "not UTF-8": (says(200, b'{"access_token": "\xff"}'), "issuer_unavailable"),
    "NaN": (says(200, b'{"access_token": "t", "expires_in": NaN}'), "issuer_unavailable"),
    "404": (says(404, {"error": "Realm does not exist"}), "issuer_unavailable"),
    "403 HTML": (says(403, b"<html>blocked</html>"), "issuer_unavailable"),
    "400 HTML": (says(400, b"<html>bad</html>"), "issuer_unavailable"),
    "429": (says(429, {}, Retry_After="1"), "issuer_unavailable"),
    "500": (says(500, b"oops"), "issuer_unavailable"),
    "503": (says(503, {}, Retry_After="Mon, 01 Jan 2035 00:00:00 GMT"), "issuer_unavailable"),
    "redirect": (says(302, b"", Location="http://127.0.0.1:1/"), "issuer_unavailable"),
    "redirect that keeps the method": (says(307, b"", Location="http://127.0.0.1:1/"), "issuer_unavailable"),
    "gzip bomb": (says(200, gzip.compress(b" " * 10_000_000), Content_Encoding="gzip"), "issuer_unavailable"),
    "cut off": (raw(HEAD + b'Content-Length: 500\r\n\r\n{"access_token":'), "issuer_unavailable"),
    "cut off in the headers": (raw(HEAD[:30]), "issuer_unavailable"),
    "hangs up": (raw(b""), "issuer_unavailable"),
    "not HTTP": (raw(b"SSH-2.0-OpenSSH\r\n"), "issuer_unavailable"),
    "silent": (raw(b" ", pause=2), "issuer_unavailable"),
    "drips its headers": (raw(HEAD, pause=0.05), "issuer_unavailable"),
    "drips its body": (raw(HEAD + b"Content-Length: 900\r\n\r\n" + b" " * 900, pause=0.02), "issuer_unavailable"),
}

AT_THE_TOKEN_ENDPOINT = {
    "access token null": (says(200, {"access_token": None}), "token_invalid"),
    "no access token": (says(200, {}), "token_invalid"),
    "access token with a line break": (says(200, {"access_token": "a\r\nX-Evil: 1"}), "token_invalid"),
    "other token type": (says(200, {"access_token": "t", "token_type": "DPoP"}), "token_invalid"),
    "invalid_grant": (says(400, {"error": "invalid_grant"}), "credentials_rejected"),
    "invalid_client": (says(401, {"error": "invalid_client"}), "credentials_rejected"),
    "unauthorized_client": (says(400, {"error": "unauthorized_client"}), "credentials_rejected"),
    "unknown error": (says(400, {"error": "out_of_coffee"}), "credentials_rejected"),
    "error with status 200": (says(200, {"error": "bad_refresh_token"}), "credentials_rejected"),
    "no error": (says(400, {}), "issuer_unavailable"),
    "error is no string": (says(400, {"error": ["invalid_grant"]}), "issuer_unavailable"),
    "temporarily_unavailable": (says(400, {"error": "temporarily_unavailable"}), "issuer_unavailable"),
    "server error with an OAuth body": (says(500, {"error": "invalid_grant"}), "issuer_unavailable"),
}

CASES = [
    *(pytest.param("GET", fault, code, id=f"discovery: {name}") for name, (fault, code) in ANYWHERE.items()),
    *(
        pytest.param("POST", fault, code, id=f"token endpoint: {name}")
        for name, (fault, code) in (ANYWHERE | AT_THE_TOKEN_ENDPOINT).items()
        if name != "404"
    ),
]


@pytest.mark.parametrize(("method", "fault", "code"), CASES)
async def test_a_faulty_answer_has_its_code_and_the_next_request_tries_again(
    method: str, fault: Fault, code: str
) -> None:
    with FakeIssuer() as issuer:
        issuer.behaviour.fault = lambda handler: handler.command == method and fault(handler)
        source = make_source(read_settings(settings_for(issuer), need_upstream=False))
        started = time.monotonic()
        with pytest.raises(TokenError) as failure:
            await source.token()
        assert time.monotonic() - started < 4
        assert failure.value.code == code
        assert issuer.refresh_token not in str(failure.value)
        assert len(str(failure.value)) < 600
        assert "\n" not in str(failure.value)

        issuer.behaviour.fault = None
        assert issuer.accepts((await source.token()).value)


async def test_a_lifetime_without_end_is_cut_to_one_that_a_calendar_has() -> None:
    with FakeIssuer() as issuer:
        answer = {"access_token": "opaque", "expires_in": 9223372036854775, "refresh_expires_in": 10**300}
        issuer.behaviour.fault = lambda handler: handler.command == "POST" and says(200, answer)(handler)
        source = make_source(read_settings(settings_for(issuer), need_upstream=False))
        token = await source.token()
        assert time.time() + MAX_LIFETIME - 60 < token.ends_at < time.time() + MAX_LIFETIME + 60
        assert source.error is None


async def test_an_issuer_that_speaks_for_another_is_not_believed() -> None:
    with FakeIssuer() as issuer:
        document = issuer.discovery() | {"issuer": "https://other.example"}
        issuer.behaviour.fault = says(200, document)
        source = make_source(read_settings(settings_for(issuer), need_upstream=False))
        with pytest.raises(TokenError, match="another issuer"):
            await source.token()
        assert issuer.requests == []


async def test_the_discovery_documents_url_works_as_well() -> None:
    with FakeIssuer() as issuer:
        url = f"{issuer.url}/.well-known/openid-configuration"
        source = make_source(read_settings(settings_for(issuer, OPEN_ID_CONNECT_URL=url), need_upstream=False))
        assert issuer.accepts((await source.token()).value)


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        *(({"cnf": cnf}, "bound to a key") for cnf in ({"jkt": "x"}, {}, None, "x")),
        ({"token_use": "id"}, "not an access token"),
        ({"typ": "Serialized-ID"}, "not an access token"),
        ({"tokenName": "id_token"}, "not an access token"),
    ],
)
async def test_a_token_that_no_service_may_accept_is_invalid_where_the_audience_is_checked(
    claims: dict[str, object], says: str
) -> None:
    with FakeIssuer(Behaviour(audience="service")) as issuer:
        issuer.behaviour.claims.update(claims)
        settings = settings_for(issuer, OPEN_ID_CONNECT_AUDIENCE="service")
        with pytest.raises(TokenInvalid, match=says) as caught:
            await make_source(read_settings(settings, need_upstream=False)).token()
        assert (caught.value.claim == "cnf") == ("cnf" in claims)

        del settings["OPEN_ID_CONNECT_AUDIENCE"]
        assert issuer.accepts((await make_source(read_settings(settings, need_upstream=False)).token()).value)


@pytest.mark.parametrize("claims", [{"at_hash": "x" * 22}, {"nonce": "n"}])
async def test_what_the_issuer_gives_as_access_token_is_one_though_it_has_claims_of_an_id_token(
    claims: dict[str, object],
) -> None:
    with FakeIssuer(Behaviour(audience="service")) as issuer:
        issuer.behaviour.claims.update(claims)
        settings = settings_for(issuer, OPEN_ID_CONNECT_AUDIENCE="service")
        assert issuer.accepts((await make_source(read_settings(settings, need_upstream=False)).token()).value)

        settings["OPEN_ID_CONNECT_AUDIENCE"] = "another"
        with pytest.raises(TokenInvalid, match="not for the audience another"):
            await make_source(read_settings(settings, need_upstream=False)).token()


async def test_an_opaque_token_has_no_audience_to_check() -> None:
    with FakeIssuer() as issuer:
        issuer.behaviour.opaque = True
        settings = settings_for(issuer, OPEN_ID_CONNECT_AUDIENCE="service")
        source = make_source(read_settings(settings, need_upstream=False))
        assert issuer.accepts((await source.token()).value)
