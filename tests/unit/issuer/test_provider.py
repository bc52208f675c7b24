import json
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote_plus

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, SettingsError, TokenError, TokenInvalid
from eoepca_security.issuer.ca_trust import trust
from eoepca_security.issuer.provider import (
    DISCOVERY_TIMEOUT,
    KEYS_LIFETIME,
    METADATA_LIFETIME,
    RETRY_INTERVAL,
    TOKEN_TIMEOUT,
    Provider,
)
from eoepca_security.issuer.transport import Answer, Form, HttpTransport
from eoepca_security.oauth.protocol import Client, ProviderMetadata
from eoepca_security.session.file_store import LOCK_TIMEOUT
from eoepca_security.session.token_cycle import _GIVE_UP
from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.clock import Clock

ISSUER = "https://issuer.example/realms/test"
DISCOVERY = ISSUER + "/.well-known/openid-configuration"
KEYS = ISSUER + "/certs"
TOKEN = ISSUER + "/token"
SECRET = "a-client-secret-that-nobody-may-see+/="
REFRESH_TOKEN = "a-refresh-token-that-nobody-may-see"
PATIENCE = 5.0

Reply = Answer | IssuerUnavailable | Callable[[], Answer]


class FakeTransport:
    """Answers with what `replies` has for a URL, and keeps what was asked."""

    def __init__(self, **changes: Any) -> None:
        self.replies: dict[str, Reply] = {DISCOVERY: discovery(**changes), KEYS: ok({"keys": []})}
        self.gets: list[str] = []
        self.get_headers: Mapping[str, str] | None = None
        self.posts: list[tuple[str, Form, Mapping[str, str]]] = []
        self.timeouts: set[float] = set()

    def get(self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> Answer:
        self.gets.append(url)
        self.get_headers = headers
        self.timeouts.add(timeout)
        return self._reply(url)

    def post(self, url: str, *, form: Form, headers: Mapping[str, str], timeout: float) -> Answer:
        self.posts.append((url, form, headers))
        self.timeouts.add(timeout)
        return self._reply(url)

    def _reply(self, url: str) -> Answer:
        reply = self.replies[url]
        if isinstance(reply, IssuerUnavailable):
            raise reply
        return reply if isinstance(reply, Answer) else reply()


def ok(document: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(document).encode(), {k.replace("_", "-"): v for k, v in headers.items()})


def discovery(**changes: Any) -> Answer:
    members = {"issuer": ISSUER, "token_endpoint": TOKEN, "jwks_uri": KEYS, **changes}
    return ok({k: v for k, v in members.items() if v is not ...})


def down() -> IssuerUnavailable:
    return IssuerUnavailable("the connection was refused")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def provider(transport: FakeTransport, clock: Clock) -> Provider:
    return Provider(ISSUER, Client("client"), transport, now=clock)


# --- metadata -----------------------------------------------------------------------------------------------------


def test_metadata_is_fetched_once_within_its_lifetime_and_again_after_it(
    provider: Provider, transport: FakeTransport, clock: Clock
) -> None:
    assert provider.metadata() == ProviderMetadata(ISSUER, TOKEN, KEYS)
    clock.time += METADATA_LIFETIME - 1
    transport.replies[DISCOVERY] = discovery(token_endpoint=ISSUER + "/moved")

    assert provider.metadata().token_endpoint == TOKEN
    assert transport.gets == [DISCOVERY]
    clock.time += 1

    assert provider.metadata().token_endpoint == ISSUER + "/moved"
    assert transport.gets == [DISCOVERY, DISCOVERY]


@pytest.mark.parametrize("url", [ISSUER, ISSUER + "/", DISCOVERY])
def test_the_issuer_and_its_document_are_the_same_setting(url: str, transport: FakeTransport) -> None:
    assert Provider(url, Client("client"), transport).metadata().issuer == ISSUER


def test_a_discovery_document_with_a_query_is_fetched_as_it_is_given(transport: FakeTransport) -> None:
    url = f"{DISCOVERY}?p=B2C_1_login"
    transport.replies[url] = discovery(issuer=ISSUER + "/")
    transport.replies[f"{DISCOVERY}?p=other"] = discovery(issuer="https://issuer.example/realms/other")

    assert Provider(url, Client("client"), transport).metadata().issuer == ISSUER + "/"
    assert transport.gets == [url]
    with pytest.raises(IssuerUnavailable, match="names another issuer"):
        Provider(f"{DISCOVERY}?p=other", Client("client"), transport).metadata()
    with pytest.raises(SettingsError, match=r"issuer_url has a \? part"):
        Provider(f"{ISSUER}?p=B2C_1_login", Client("client"), transport)


def test_no_request_is_made_before_one_is_needed(transport: FakeTransport, provider: Provider) -> None:
    assert transport.gets == []


@pytest.mark.parametrize(
    "failure",
    [down(), ok({}, 503), ok({}, 404), ok([]), Answer(200, b"<html>"), discovery(issuer="https://evil.example")],
)
def test_earlier_metadata_serves_on_while_the_issuer_fails(
    failure: Reply, provider: Provider, transport: FakeTransport, clock: Clock
) -> None:
    first = provider.metadata()
    transport.replies[DISCOVERY] = failure
    clock.time += 10 * METADATA_LIFETIME

    assert provider.metadata() == first


def test_a_failed_renewal_is_logged(
    provider: Provider, transport: FakeTransport, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    provider.metadata()
    transport.replies[DISCOVERY] = down()
    clock.time += METADATA_LIFETIME
    with caplog.at_level("INFO"):
        provider.metadata()

    assert "the connection was refused" in caplog.text


def test_failed_renewals_are_some_time_apart_and_a_later_one_heals(
    provider: Provider, transport: FakeTransport, clock: Clock
) -> None:
    provider.metadata()
    transport.replies[DISCOVERY] = down()
    clock.time += METADATA_LIFETIME
    for _ in range(5):
        provider.metadata()
    assert len(transport.gets) == 2
    clock.time += RETRY_INTERVAL - 1
    provider.metadata()
    assert len(transport.gets) == 2
    clock.time += 1
    provider.metadata()
    assert len(transport.gets) == 3
    transport.replies[DISCOVERY] = discovery(token_endpoint=ISSUER + "/moved")
    clock.time += RETRY_INTERVAL

    assert provider.metadata().token_endpoint == ISSUER + "/moved"
    provider.metadata()
    assert len(transport.gets) == 4


def test_a_first_failure_is_raised_and_the_next_call_tries_again(provider: Provider, transport: FakeTransport) -> None:
    transport.replies[DISCOVERY] = down()
    with pytest.raises(IssuerUnavailable, match="refused"):
        provider.metadata()
    transport.replies[DISCOVERY] = discovery()

    assert provider.metadata().issuer == ISSUER


def test_a_clock_that_is_set_back_does_not_stop_renewals(
    provider: Provider, transport: FakeTransport, clock: Clock
) -> None:
    provider.metadata()
    clock.time -= 365 * 86400
    provider.metadata()
    clock.time += METADATA_LIFETIME
    provider.metadata()

    assert len(transport.gets) >= 2


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        ("0", 0.0),
        (None, None),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("\u0663", None),
        ("Mon, 01 Jan 2035 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_passed_on(
    value: str | None, seconds: float | None, provider: Provider, transport: FakeTransport
) -> None:
    headers = {} if value is None else {"Retry_After": value}
    transport.replies[DISCOVERY] = ok({}, 503, **headers)
    with pytest.raises(IssuerUnavailable) as from_discovery:
        provider.metadata()
    transport.replies |= {DISCOVERY: discovery(), TOKEN: ok({}, 429, **headers)}
    with pytest.raises(IssuerUnavailable) as from_token_endpoint:
        provider.request_token("r-1")

    assert from_discovery.value.retry_after == seconds
    assert from_token_endpoint.value.retry_after == seconds


@pytest.mark.parametrize(
    ("then", "seconds"), [("01 Jan 2035 00:00:25", 20), ("01 Jan 2035 00:00:01", 0), ("01 Jan 2036 00:00:00", None)]
)
def test_a_date_to_retry_after_is_counted_from_the_answers_own(
    then: str, seconds: float | None, provider: Provider, transport: FakeTransport
) -> None:
    headers = {"Retry_After": f"Mon, {then} GMT", "Date": "Mon, 01 Jan 2035 00:00:05 GMT"}
    transport.replies[DISCOVERY] = ok({}, 503, **headers)
    with pytest.raises(IssuerUnavailable) as caught:
        provider.metadata()
    assert caught.value.retry_after == seconds


def test_endpoints_over_plain_http_are_spoken_to_only_when_allowed(transport: FakeTransport) -> None:
    plain = "http://issuer.internal/token"
    transport.replies[DISCOVERY] = discovery(token_endpoint=plain)

    with pytest.raises(IssuerUnavailable, match="https://"):
        Provider(ISSUER, Client("client"), transport).metadata()
    assert Provider(ISSUER, Client("client"), transport, allow_http=True).metadata().token_endpoint == plain


def test_every_exchange_has_a_timeout_and_all_end_before_they_are_given_up(
    provider: Provider, transport: FakeTransport
) -> None:
    transport.replies[TOKEN] = ok({"access_token": "a", "token_type": "Bearer"})
    provider.request_token("r-1")

    assert len(transport.timeouts) == 2
    assert min(transport.timeouts) > 0
    assert sum(transport.timeouts) + LOCK_TIMEOUT < _GIVE_UP


@pytest.mark.parametrize("status", [401, 404, 405])
def test_an_endpoint_that_has_moved_is_found(
    status: int, provider: Provider, transport: FakeTransport, clock: Clock
) -> None:
    moved = f"{TOKEN}/moved"
    transport.replies[TOKEN] = transport.replies[moved] = ok({"error": "invalid_client"}, status)

    def fails(times: int) -> None:
        for _ in range(times):
            with pytest.raises((IssuerUnavailable, CredentialsRejected)):
                provider.request_token("r-1")

    fails(5)
    assert transport.gets.count(DISCOVERY) == 2  # or a wrong secret would double the load
    transport.replies |= {DISCOVERY: discovery(token_endpoint=moved), moved: ok({"access_token": "a"})}
    fails(1)
    clock.time += RETRY_INTERVAL
    assert provider.request_token("r-1").access_token == "a"


# --- several threads ----------------------------------------------------------------------------------------------


class Gate:
    """A reply that waits until it is opened."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._open = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self) -> Answer:
        self.entered.release()
        assert self._open.wait(PATIENCE)
        if isinstance(self._reply, IssuerUnavailable):
            raise self._reply
        assert isinstance(self._reply, Answer)
        return self._reply

    def open(self) -> None:
        self._open.set()


class Call(threading.Thread):
    """A call in a thread, with its outcome."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._function()
        except TokenError as error:
            self.outcome = error

    def wait(self, timeout: float = PATIENCE) -> object:
        self.join(timeout)
        return self.outcome


def test_threads_that_ask_at_once_share_one_fetch(provider: Provider, transport: FakeTransport) -> None:
    gate = Gate(discovery())
    transport.replies[DISCOVERY] = gate
    calls = [Call(provider.metadata) for _ in range(8)]
    assert gate.entered.acquire(timeout=PATIENCE)
    assert not gate.entered.acquire(timeout=0.1)
    gate.open()

    assert [call.wait() for call in calls] == [ProviderMetadata(ISSUER, TOKEN, KEYS)] * 8
    assert transport.gets == [DISCOVERY]


def test_threads_that_ask_at_once_share_one_failure(provider: Provider, transport: FakeTransport) -> None:
    gate = Gate(down())
    transport.replies[DISCOVERY] = gate
    calls = [Call(provider.metadata)]
    assert gate.entered.acquire(timeout=PATIENCE)
    calls += [Call(provider.metadata) for _ in range(7)]
    # The others have come to where they wait when nothing more happens.
    assert not gate.entered.acquire(timeout=0.1)
    gate.open()

    assert all(isinstance(call.wait(), IssuerUnavailable) for call in calls)
    # One, and perhaps one for threads that came too late for it.
    assert len(transport.gets) <= 2


def test_the_earlier_answer_is_given_while_another_thread_renews_it(
    provider: Provider, transport: FakeTransport, clock: Clock
) -> None:
    first = provider.metadata()
    gate = Gate(discovery(token_endpoint=ISSUER + "/moved"))
    transport.replies[DISCOVERY] = gate
    clock.time += METADATA_LIFETIME
    renewing = Call(provider.metadata)
    assert gate.entered.acquire(timeout=PATIENCE)

    try:
        assert Call(provider.metadata).wait(timeout=1) == first
    finally:
        gate.open()
        renewing.wait()
    assert len(transport.gets) == 2


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> HttpTransport:
    return HttpTransport(trust())


@pytest.fixture
def issuer() -> Iterator[FakeIssuer]:
    with FakeIssuer(client_secret=SECRET) as issuer:
        yield issuer


METHODS = {
    "client_secret_basic": None,
    "client_secret_post": None,
    "client_secret_jwt": None,
    "none": None,
    "private_key_jwt": ed25519.Ed25519PrivateKey.generate(),
    "private_key_jwt with RSA": rsa.generate_private_key(65537, 2048),
    "private_key_jwt with P-384": ec.generate_private_key(ec.SECP384R1()),
}


@pytest.mark.parametrize("grant", ["refresh_token", "client_credentials"])
@pytest.mark.parametrize("case", METHODS)
def test_gets_a_token_with_every_client_authentication_method(network: HttpTransport, case: str, grant: str) -> None:
    method, key = case.partition(" ")[0], METHODS[case]
    secret = SECRET if method.startswith("client_secret") else None
    with FakeIssuer(client_secret=secret, client_key=key) as issuer:
        issuer.behaviour.auth_methods = (method,)
        provider = Provider(issuer.url, Client("client", secret, "auto", key), network, scope="openid")
        refresh_token = issuer.refresh_token if grant == "refresh_token" else None

        response = provider.request_token(refresh_token)

        assert issuer.accepts(response.access_token)
        assert (response.expires_in, response.refresh_token) == (60, refresh_token)
        (seen,) = issuer.requests
    assert (seen.method, seen.form["grant_type"], seen.form["scope"]) == (method, grant, "openid")
    assert seen.form.get("refresh_token") == refresh_token


def test_a_wrong_secret_rejects_the_credentials(network: HttpTransport, issuer: FakeIssuer) -> None:
    provider = Provider(issuer.url, Client("client", "wrong-secret"), network)

    with pytest.raises(CredentialsRejected, match="invalid_client"):
        provider.request_token(issuer.refresh_token)


def test_an_ended_session_rejects_the_credentials(network: HttpTransport, issuer: FakeIssuer) -> None:
    issuer.end_sessions()

    with pytest.raises(CredentialsRejected, match=r"^the issuer answered invalid_grant"):
        Provider(issuer.url, Client("client", SECRET), network).request_token(issuer.refresh_token)


def test_a_rotated_refresh_token_is_handed_on(network: HttpTransport, issuer: FakeIssuer) -> None:
    issuer.behaviour.refresh_tokens = "rotate"
    provider = Provider(issuer.url, Client("client", SECRET), network)

    second = provider.request_token(issuer.refresh_token).refresh_token

    assert second not in (None, issuer.refresh_token)
    assert provider.request_token(second).refresh_token not in (None, second)


def test_no_token_is_asked_for_without_discovery(provider: Provider, transport: FakeTransport) -> None:
    transport.replies[DISCOVERY] = down()

    with pytest.raises(IssuerUnavailable):
        provider.request_token(REFRESH_TOKEN)
    assert transport.posts == []


def test_no_token_is_asked_for_without_token_endpoint_but_keys_are_used(verifying: "Verifying") -> None:
    verifying.transport.replies[DISCOVERY] = discovery(token_endpoint=...)

    with pytest.raises(IssuerUnavailable, match=rf"{DISCOVERY} has no token_endpoint"):
        verifying.provider.request_token(REFRESH_TOKEN)
    assert verifying.transport.posts == []
    assert verifying.provider.verify(verifying.token(), "service")["sub"] == "u-1"


def test_each_token_request_is_sent_once_even_when_it_fails(provider: Provider, transport: FakeTransport) -> None:
    transport.replies[TOKEN] = down()

    with pytest.raises(IssuerUnavailable):
        provider.request_token(REFRESH_TOKEN)
    assert [(url, form["refresh_token"]) for url, form, _ in transport.posts] == [(TOKEN, REFRESH_TOKEN)]


@pytest.mark.parametrize(("asked", "sent"), [(None, "openid"), ("openid stac:read", "openid stac:read")])
def test_a_token_for_one_service_is_asked_for_by_scope_and_resource(
    transport: FakeTransport, asked: str | None, sent: str
) -> None:
    provider = Provider(ISSUER, Client("client"), transport, scope="openid")
    transport.replies[TOKEN] = ok({"access_token": "a", "token_type": "Bearer"})

    provider.request_token(REFRESH_TOKEN, scope=asked, resource="https://stac.example")
    provider.request_token(REFRESH_TOKEN)

    first, second = (form for _, form, _ in transport.posts)
    assert (first["scope"], first["resource"]) == (sent, "https://stac.example")
    assert (second["scope"], "resource" in second) == ("openid", False)


EXCHANGED = {
    "access_token": "exchanged",
    "token_type": "Bearer",
    "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
    "expires_in": 60,
}


def test_an_access_token_is_exchanged_for_one_of_another_service(transport: FakeTransport) -> None:
    provider = Provider(ISSUER, Client("client", SECRET), transport, scope="openid offline_access")
    transport.replies[TOKEN] = ok(EXCHANGED)

    response = provider.exchange_token("subject", audience="stac-api", resource="https://stac.example", scope="read")

    assert (response.access_token, response.expires_in) == ("exchanged", 60)
    ((url, form, headers),) = transport.posts
    assert (url, "Authorization" in headers) == (TOKEN, True)
    assert form["subject_token"] == "subject"
    assert [form[name] for name in ("audience", "resource", "scope")] == ["stac-api", "https://stac.example", "read"]
    # The login's scope is no business of an exchange.
    provider.exchange_token("subject")
    assert "scope" not in transport.posts[-1][1]
    assert transport.timeouts == {DISCOVERY_TIMEOUT, TOKEN_TIMEOUT}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (ok({"error": "access_denied"}, 403), CredentialsRejected),
        (ok({"error": "invalid_target"}, 400), CredentialsRejected),
        (ok({**EXCHANGED, "issued_token_type": "x"}), TokenInvalid),
        (ok({}, 503, Retry_After="7"), IssuerUnavailable),
        (down(), IssuerUnavailable),
    ],
)
def test_an_exchange_fails_as_a_refresh_does(
    provider: Provider, transport: FakeTransport, reply: Reply, error: type[TokenError]
) -> None:
    transport.replies[TOKEN] = reply

    with pytest.raises(error) as caught:
        provider.exchange_token("subject", audience="stac-api")
    if isinstance(reply, Answer) and reply.status == 503:
        assert getattr(caught.value, "retry_after", None) == 7


def test_an_exchange_that_an_issuer_may_have_moved_asks_it_for_its_endpoint(
    provider: Provider, transport: FakeTransport, clock: Clock
) -> None:
    transport.replies[TOKEN] = ok({}, 404)
    with pytest.raises(IssuerUnavailable):
        provider.exchange_token("subject")
    clock.time += RETRY_INTERVAL
    transport.replies[DISCOVERY] = discovery(token_endpoint=TOKEN + "2")
    transport.replies[TOKEN + "2"] = ok(EXCHANGED)

    assert provider.exchange_token("subject").access_token == "exchanged"


def test_a_token_that_an_issuer_repeats_when_it_refuses_the_exchange_is_hidden(
    provider: Provider, transport: FakeTransport
) -> None:
    transport.replies[TOKEN] = ok({"error": "invalid_request", "error_description": f"bad {REFRESH_TOKEN}"}, 400)

    with pytest.raises(CredentialsRejected, match=r"bad …$"):
        provider.exchange_token(REFRESH_TOKEN)


@pytest.mark.parametrize("was_sent", [False, True])
def test_a_lost_answer_of_the_token_endpoint_is_told(
    provider: Provider, transport: FakeTransport, was_sent: bool
) -> None:
    transport.replies[TOKEN] = IssuerUnavailable("timed out", was_sent=was_sent)

    with pytest.raises(IssuerUnavailable) as caught:
        provider.request_token(REFRESH_TOKEN)
    assert caught.value.was_sent == was_sent


def test_a_lost_discovery_document_is_no_lost_token(provider: Provider, transport: FakeTransport) -> None:
    transport.replies[DISCOVERY] = IssuerUnavailable("timed out", was_sent=True)

    with pytest.raises(IssuerUnavailable) as caught:
        provider.request_token(REFRESH_TOKEN)
    assert transport.posts == []
    assert not caught.value.was_sent


@pytest.mark.parametrize(
    ("secret", "error"),
    [("client", "invalid_client"), ("invalid_client", "invalid_client"), ("grant", "invalid_grant")],
)
def test_a_secret_that_is_a_word_of_an_error_code_does_not_change_its_meaning(
    transport: FakeTransport, secret: str, error: str
) -> None:
    provider = Provider(ISSUER, Client("client", secret), transport)
    transport.replies[TOKEN] = ok({"error": error}, 401)

    with pytest.raises(CredentialsRejected):
        provider.request_token(REFRESH_TOKEN)


def secrets_of(form: Form, headers: Mapping[str, str]) -> list[str]:
    """Return our secrets, and how the client's was sent."""
    as_sent = headers.get("Authorization") or form.get("client_assertion") or form["client_secret"]
    return [REFRESH_TOKEN, SECRET, str(as_sent)]


ECHOES: list[Any] = [
    pytest.param(lambda secret: f"bad value {secret} here", id="as it is"),
    pytest.param(lambda secret: secret, id="alone"),
    pytest.param(lambda secret: f"{secret} and {secret}", id="twice"),
    pytest.param(lambda secret: "x" * 190 + secret, id="where the text is cut"),
    pytest.param(quote_plus, id="form-encoded"),
]


@pytest.mark.parametrize("make_echo", ECHOES)
@pytest.mark.parametrize("member", ["error", "error_description"])
@pytest.mark.parametrize("method", ["client_secret_post", "client_secret_basic", "client_secret_jwt"])
def test_what_an_issuer_repeats_of_our_secrets_is_hidden(
    transport: FakeTransport, method: str, member: str, make_echo: Callable[[str], str]
) -> None:
    def repeat(which: int) -> Answer:
        secret = secrets_of(*transport.posts[-1][1:])[which]
        return ok({"error": "invalid_grant", member: make_echo(secret)}, 400)

    provider = Provider(ISSUER, Client("client", SECRET, method), transport)
    for which in range(3):
        transport.replies[TOKEN] = partial(repeat, which)

        with pytest.raises(TokenError) as caught:
            provider.request_token(REFRESH_TOKEN)

        secret = secrets_of(*transport.posts[-1][1:])[which]
        shown = "".join(traceback.format_exception(caught.value))
        assert not any(secret[i : i + 8] in shown for i in range(len(secret) - 8)), shown


def test_words_of_an_error_that_are_no_secrets_are_kept(transport: FakeTransport) -> None:
    provider = Provider(ISSUER, Client("client", "an"), transport)
    transport.replies[TOKEN] = ok({"error": "invalid_grant", "error_description": "Session not active"}, 400)

    with pytest.raises(CredentialsRejected, match=r"invalid_grant: Session not active$"):
        provider.request_token("is")


# --- verification -------------------------------------------------------------------------------------------------


class Verifying:
    """A provider, behind a fake transport, of an issuer whose keys we have."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.signer = FakeIssuer()
        self.transport = FakeTransport()
        self.provider = Provider(ISSUER, Client("client"), self.transport, now=clock)
        self.publish()

    def publish(self) -> None:
        self.transport.replies[KEYS] = ok(self.signer.jwks())

    def claims(self, **changes: Any) -> dict[str, Any]:
        return {"iss": ISSUER, "aud": "service", "sub": "u-1", "exp": int(self.clock()) + 1000, **changes}

    def token(self, headers: Mapping[str, Any] | None = None, **changes: Any) -> str:
        return self.signer.sign(self.claims(**changes), headers)

    def token_without_kid(self, signer: FakeIssuer) -> str:
        return jwt.encode(self.claims(), signer.key, signer.algorithm)

    @property
    def key_fetches(self) -> int:
        return self.transport.gets.count(KEYS)


@pytest.fixture
def verifying(clock: Clock) -> Iterator[Verifying]:
    made = Verifying(clock)
    with made.signer:
        yield made


def test_a_token_of_the_issuer_is_verified_over_the_network(network: HttpTransport, issuer: FakeIssuer) -> None:
    provider = Provider(issuer.url, Client("client"), network)

    claims = provider.verify(issuer.issue(), "service")

    assert (claims["sub"], claims["preferred_username"]) == ("u-1", "alice")
    with pytest.raises(TokenInvalid, match="not for the audience other"):
        provider.verify(issuer.issue(), "other")


def test_a_token_that_the_issuer_gives_needs_no_subject(verifying: Verifying) -> None:
    claims = verifying.claims()
    del claims["sub"]
    assert "sub" not in verifying.provider.verify(verifying.signer.sign(claims), "service")


def test_keys_are_fetched_once_within_their_lifetime_and_again_after_it(verifying: Verifying) -> None:
    for _ in range(3):
        verifying.provider.verify(verifying.token(), "service")
    verifying.clock.time += KEYS_LIFETIME - 1
    verifying.provider.verify(verifying.token(), "service")
    assert verifying.key_fetches == 1
    verifying.clock.time += 1
    verifying.provider.verify(verifying.token(), "service")
    assert verifying.key_fetches == 2


def test_a_key_that_is_no_longer_published_is_no_longer_trusted(verifying: Verifying) -> None:
    old = verifying.token()
    verifying.provider.verify(old, "service")
    verifying.signer.rotate_keys()
    verifying.publish()
    verifying.clock.time += KEYS_LIFETIME

    with pytest.raises(TokenInvalid, match="none of the issuer's keys"):
        verifying.provider.verify(old, "service")


@pytest.mark.parametrize("has_kid", [True, False])
def test_a_key_that_was_replaced_under_its_name_is_fetched_when_a_token_needs_it(
    verifying: Verifying, has_kid: bool
) -> None:
    def publish_and_sign() -> str:
        verifying.signer.kid = "the-only-one"
        verifying.publish()
        return verifying.token() if has_kid else verifying.token_without_kid(verifying.signer)

    verifying.provider.verify(publish_and_sign(), "service")
    for fetches in (2, 3):
        verifying.signer.rotate_keys()
        assert verifying.provider.verify(publish_and_sign(), "service")["sub"] == "u-1"
        assert verifying.key_fetches == fetches
        verifying.clock.time += RETRY_INTERVAL


def test_a_new_key_is_fetched_when_a_token_needs_it(verifying: Verifying) -> None:
    verifying.provider.verify(verifying.token(), "service")
    for fetches in (2, 3):
        verifying.signer.rotate_keys()
        verifying.publish()
        assert verifying.provider.verify(verifying.token(), "service")["sub"] == "u-1"
        assert verifying.key_fetches == fetches
        verifying.clock.time += RETRY_INTERVAL


@pytest.mark.parametrize("fails", [False, True])
def test_tokens_that_need_a_new_key_at_once_share_one_fetch(verifying: Verifying, fails: bool) -> None:
    verifying.provider.verify(verifying.token(), "service")
    verifying.signer.rotate_keys()
    gate = Gate(down() if fails else ok(verifying.signer.jwks()))
    verifying.transport.replies[KEYS] = gate
    verifying.clock.time += RETRY_INTERVAL
    text = verifying.token()
    calls = [Call(lambda: verifying.provider.verify(text, "service")) for _ in range(4)]
    assert gate.entered.acquire(timeout=PATIENCE)
    assert not gate.entered.acquire(timeout=0.1)
    gate.open()

    outcomes = [call.wait() for call in calls]
    assert all(isinstance(outcome, TokenInvalid if fails else dict) for outcome in outcomes), outcomes
    assert verifying.key_fetches == 2


def test_tokens_that_no_key_fits_do_not_make_us_fetch_more_often_than_that(verifying: Verifying) -> None:
    verifying.provider.verify(verifying.token(), "service")
    with FakeIssuer() as forger:
        forger.kid = verifying.signer.kid
        for second in range(120):
            for kid in ("garbage-1", "garbage-2", f"garbage-{second}"):
                with pytest.raises(TokenInvalid, match="none of the issuer's keys"):
                    verifying.provider.verify(verifying.token({"kid": kid}), "service")
            for forged in (forger.sign(verifying.claims()), verifying.token_without_kid(forger)):
                with pytest.raises(TokenInvalid, match="signature is not valid"):
                    verifying.provider.verify(forged, "service")
            verifying.clock.time += 1

    assert verifying.key_fetches == 1 + 4
    assert verifying.provider.verify(verifying.token(), "service")["sub"] == "u-1"


def test_earlier_keys_serve_on_while_the_issuer_fails(verifying: Verifying) -> None:
    verifying.provider.verify(verifying.token(), "service")
    for failure in (down(), ok({}, 500), Answer(200, b"<html>"), ok({"error": "x"})):
        verifying.transport.replies[KEYS] = failure
        verifying.clock.time += KEYS_LIFETIME
        fetches = verifying.key_fetches
        for _ in range(3):
            assert verifying.provider.verify(verifying.token(), "service")["sub"] == "u-1"
        assert verifying.key_fetches == fetches + 1


@pytest.mark.parametrize(
    "failure",
    [ok({"keys": []}, 500), ok({"keys": []}, 404), Answer(200, b"<html>"), Answer(200, b""), ok([]), ok({}), down()],
)
def test_without_keys_the_issuer_is_unavailable(verifying: Verifying, failure: Reply) -> None:
    verifying.transport.replies[KEYS] = failure

    with pytest.raises(IssuerUnavailable):
        verifying.provider.verify(verifying.token(), "service")
    verifying.publish()
    assert verifying.provider.verify(verifying.token(), "service")["sub"] == "u-1"


def test_an_issuer_without_keys_cannot_be_verified_against(verifying: Verifying) -> None:
    verifying.transport.replies[DISCOVERY] = discovery(jwks_uri=...)

    with pytest.raises(IssuerUnavailable, match="has no jwks_uri"):
        verifying.provider.verify(verifying.token(), "service")


@pytest.mark.parametrize("keys", [[], None, "text", [1, None]])
def test_a_key_set_without_usable_keys_fits_no_token(verifying: Verifying, keys: object) -> None:
    verifying.transport.replies[KEYS] = ok({"keys": keys})

    with pytest.raises(TokenInvalid, match="none of the issuer's keys"):
        verifying.provider.verify(verifying.token(), "service")


def test_what_can_be_refused_without_keys_asks_the_issuer_nothing(verifying: Verifying) -> None:
    for text in ("", "opaque", "a.b.c", "a.b.c.d.e", "x" * 20_000, verifying.token({"crit": ["exp"]})):
        with pytest.raises(TokenInvalid):
            verifying.provider.verify(text, "service")

    assert verifying.transport.gets == []


def test_the_issuer_of_a_token_has_to_be_spelled_as_in_its_discovery_document(verifying: Verifying) -> None:
    verifying.transport.replies[DISCOVERY] = discovery(issuer=ISSUER + "/")

    assert verifying.provider.verify(verifying.token(iss=ISSUER + "/"), "service")["sub"] == "u-1"
    with pytest.raises(TokenInvalid, match="another issuer"):
        verifying.provider.verify(verifying.token(), "service")


def test_the_issuer_of_access_tokens_is_the_one_that_the_discovery_document_gives(verifying: Verifying) -> None:
    trust_name = "http://issuer.example/adfs/services/trust"
    verifying.transport.replies[DISCOVERY] = discovery(access_token_issuer=trust_name)

    assert verifying.provider.verify(verifying.token(iss=trust_name), "service")["sub"] == "u-1"
    with pytest.raises(TokenInvalid, match="another issuer"):
        verifying.provider.verify(verifying.token(), "service")


def test_times_are_compared_with_the_clock_that_was_given(verifying: Verifying) -> None:
    text = verifying.token(exp=int(verifying.clock()) + 60)
    verifying.provider.verify(text, "service")
    verifying.clock.time += 71

    with pytest.raises(TokenInvalid, match="expired"):
        verifying.provider.verify(text, "service")


def test_a_key_set_over_the_network_may_fail_too(network: HttpTransport, issuer: FakeIssuer) -> None:
    def fault(handler: Handler) -> bool:
        if not handler.path.endswith("/certs"):
            return False
        handler.answer(500, b"<html>oops</html>")
        return True

    issuer.behaviour.fault = fault
    provider = Provider(issuer.url, Client("client"), network)

    with pytest.raises(IssuerUnavailable, match="answered 500 without a set of keys"):
        provider.verify(issuer.issue(), "service")
    issuer.behaviour.fault = None
    assert provider.verify(issuer.issue(), "service")["sub"] == "u-1"


def test_an_issuer_that_must_not_be_spoken_to_is_refused_at_once(transport: FakeTransport) -> None:
    with pytest.raises(SettingsError, match="https"):
        Provider("http://issuer.example", Client("client"), transport)
    Provider("http://issuer.example", Client("client"), transport, allow_http=True)
    assert transport.gets == []


# --- claims about the user ---------------------------------------------------------------------------------------

USERINFO = f"{ISSUER}/userinfo"


def test_userinfo_is_asked_with_the_access_token() -> None:
    transport = FakeTransport(userinfo_endpoint=USERINFO)
    transport.replies[USERINFO] = ok({"sub": "u", "name": "A"})
    provider = Provider(ISSUER, Client("client"), transport)
    assert provider.userinfo("the-token") == {"sub": "u", "name": "A"}
    assert transport.get_headers == {"Authorization": "Bearer the-token"}
    for reply in (ok({}, 401), Answer(200, b"eyJ.signed.jwt"), ok({}), down()):
        transport.replies[USERINFO] = reply
        with pytest.raises(IssuerUnavailable) as caught:
            provider.userinfo("the-token")
        assert "the-token" not in str(caught.value)


@pytest.mark.parametrize("endpoint", [None, 5, "http://issuer.example/userinfo", "nonsense"])
def test_an_issuer_without_a_good_userinfo_endpoint_is_not_asked(endpoint: object) -> None:
    transport = FakeTransport(userinfo_endpoint=endpoint)
    assert Provider(ISSUER, Client("client"), transport).userinfo("the-token") is None
    assert transport.gets == [DISCOVERY]
