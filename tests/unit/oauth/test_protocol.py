import base64
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import unquote_plus

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, TokenError, TokenInvalid
from eoepca_security.oauth.protocol import (
    ACCESS_TOKEN_TYPE,
    CLIENT_AUTH_METHODS,
    EXCHANGE_GRANT,
    GRANTS,
    JWT_TYPE,
    MAX_LIFETIME,
    Client,
    PrivateKey,
    ProviderMetadata,
    TokenRequest,
    TokenResponse,
    build_exchange_request,
    build_token_request,
    choose_auth_method,
    load_private_key,
    narrow_scope,
    read_exchange_response,
    read_metadata,
    read_token_response,
)
from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import (
    discovery_url,
    is_loopback,
    issuer_of,
    issuer_url_problem,
    split_url,
    url_problem,
)

ISSUER = "https://issuer.example/realms/test"
DOCUMENT_URL = ISSUER + "/.well-known/openid-configuration"
NOW = 1_750_000_000.75
SECRET = "a-secret-that-nobody-may-see-0123456789"

DISCOVERY = {
    "issuer": ISSUER,
    "token_endpoint": ISSUER + "/token",
    "jwks_uri": ISSUER + "/certs",
    "token_endpoint_auth_methods_supported": ["private_key_jwt", "client_secret_post"],
    "token_endpoint_auth_signing_alg_values_supported": ["PS256", "ES256"],
}
METADATA = ProviderMetadata(ISSUER, ISSUER + "/token")


@functools.cache
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def metadata(*auth_methods: str, algs: tuple[str, ...] = ()) -> ProviderMetadata:
    return ProviderMetadata(ISSUER, ISSUER + "/token", None, auth_methods, algs)


def document(**changes: Any) -> bytes:
    return json.dumps({k: v for k, v in {**DISCOVERY, **changes}.items() if v is not ...}).encode()


# --- URLs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [ISSUER, ISSUER + "/", ISSUER + "//", DOCUMENT_URL, DOCUMENT_URL + "/"])
def test_issuer_and_document_lead_to_the_same_discovery_url(given: str) -> None:
    assert discovery_url(given) == DOCUMENT_URL


@pytest.mark.parametrize("given", [DOCUMENT_URL, DOCUMENT_URL + "/", ISSUER + "//.well-known/openid-configuration"])
def test_a_query_of_the_document_is_kept_and_is_no_part_of_the_issuer(given: str) -> None:
    url = discovery_url(f"{given}?p=B2C_1_login&x=https://a/")

    assert url == f"{DOCUMENT_URL}?p=B2C_1_login&x=https://a/"
    assert issuer_of(url) == ISSUER
    assert discovery_url(f"{given}?") == DOCUMENT_URL


@pytest.mark.parametrize("url", [ISSUER, DOCUMENT_URL, f"{DOCUMENT_URL}?p=B2C_1_login", f"{DOCUMENT_URL}/?p=x"])
def test_an_issuer_is_named_by_itself_or_by_its_document(url: str) -> None:
    assert issuer_url_problem(url) is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (f"{ISSUER}?p=x", "has a ? part"),
        (f"{ISSUER}?", "has a ? part"),
        (f"{ISSUER}?p=/.well-known/openid-configuration", "has a ? part"),
        (f"{DOCUMENT_URL}/other?p=x", "has a ? part"),
        (f"{ISSUER}#x", "has a # part"),
        (f"{DOCUMENT_URL}#x", "has a # part"),
        (f"{DOCUMENT_URL}?p=x#x", "has a # part"),
        (f"{DOCUMENT_URL}#?p=x", "has a # part"),
        ("http://issuer.example/.well-known/openid-configuration?p=x", "https://"),
        ("issuer.example", "not a valid URL"),
    ],
)
def test_what_cannot_name_an_issuer_is_refused(url: str, problem: str) -> None:
    assert problem in (issuer_url_problem(url) or "")


def test_an_issuer_without_path_has_its_discovery_document_at_the_root() -> None:
    assert discovery_url("https://issuer.example/") == "https://issuer.example/.well-known/openid-configuration"


@pytest.mark.parametrize(
    "url",
    [
        "https://issuer.example",
        "https://issuer.example:8443/realms/a%20b?x=y",
        "https://10.0.0.1/realms/test",
        "https://[2001:db8::1]/realms/test",
        "http://localhost/realms/test",
        "http://LOCALHOST:8080",
        "http://127.0.0.1:8080/realms/test",
        "http://127.0.0.2",
        "http://[::1]:8080/realms/test",
    ],
)
def test_the_issuer_may_be_spoken_to_over_https_and_on_loopback(url: str) -> None:
    assert url_problem(url) is None


@pytest.mark.parametrize(
    "host",
    [
        "issuer.example",
        "10.0.0.1",
        "0.0.0.0",
        "[::]",
        "[2001:db8::1]",
        "localhost.evil.example",
        "evil-localhost",
        "localhost.",
        "127.0.0.1.evil.example",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "127.1",
    ],
)
def test_plain_http_beyond_loopback_is_refused_unless_allowed(host: str) -> None:
    url = f"http://{host}/realms/test"

    assert "https://" in (url_problem(url) or "")
    assert url_problem(url, allow_http=True) is None


@pytest.mark.parametrize("allow_http", [False, True])
@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "not a valid URL"),
        ("issuer.example", "not a valid URL"),
        ("//issuer.example", "not a valid URL"),
        ("https://", "not a valid URL"),
        ("https:///realms/test", "not a valid URL"),
        ("https://:8443/", "not a valid URL"),
        ("ftp://issuer.example", "not a valid URL"),
        ("file:///etc/passwd", "not a valid URL"),
        ("javascript:alert(1)", "not a valid URL"),
        ("https://issuer.example:0", "not a valid URL"),
        ("https://issuer.example:port", "not a valid URL"),
        ("https://issuer.example:99999", "not a valid URL"),
        ("https://[::1", "not a valid URL"),
        ("https://user@issuer.example", "user name or password"),
        ("https://user:password@issuer.example", "user name or password"),
        ("https://:password@issuer.example", "user name or password"),
        ("https://@issuer.example", "user name or password"),
        ("http://localhost@evil.example", "user name or password"),
        ("http://localhost\\@evil.example", "user name or password"),
        ("https://issuer.example/realms/a b", "spaces"),
        (" https://issuer.example", "spaces"),
        ("https://issuer.example\n", "spaces"),
        ("https://issuer.example/\r\nX: y", "spaces"),
        ("https://issuer.example/\t", "spaces"),
        ("https://issuer.exämple/", "spaces"),
        ("http://loc\N{SOFT HYPHEN}alhost/", "spaces"),
        ("https://issuer.example/" + "a" * 2000, "too long"),
    ],
)
def test_what_is_no_clean_http_url_is_refused(url: str, problem: str, allow_http: bool) -> None:
    assert problem in (url_problem(url, allow_http=allow_http) or "")


@pytest.mark.parametrize("allow_http", [False, True])
@pytest.mark.parametrize(
    "host",
    [
        "[::1].evil.example",
        "[::1]evil.example",
        "evil.example[::1]",
        "[localhost]",
        "[::1",
        "localhost%2eevil.example",
        "localhost\\.evil.example",
        "localhost;evil.example",
        "localhost,evil.example",
        "localhost:80:80",
        "localhost:+80",
        "%00",
    ],
)
def test_a_host_that_programs_could_read_differently_is_refused(host: str, allow_http: bool) -> None:
    for scheme in ("http", "https"):
        assert url_problem(f"{scheme}://{host}/realms/test", allow_http=allow_http) is not None
        with pytest.raises(ValueError, match=r".+"):
            split_url(f"{scheme}://{host}/realms/test")


def test_splits_a_url_into_what_it_names() -> None:
    parts = split_url("https://user@[::1]:8443/realms/test?x=y")

    assert (parts.scheme, parts.hostname, parts.port, parts.path) == ("https", "::1", 8443, "/realms/test")


@pytest.mark.parametrize("host", [None, "", "localhost.evil.example", "10.0.0.1", "::", "2130706433", "0.0.0.0"])
def test_other_hosts_are_not_loopback(host: str | None) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "127.255.255.254", "::1"])
def test_this_machine_is_loopback(host: str) -> None:
    assert is_loopback(host)


# --- discovery ----------------------------------------------------------------------------------------------------


def test_reads_a_discovery_document() -> None:
    assert read_metadata(200, document(), url=DOCUMENT_URL) == ProviderMetadata(
        issuer=ISSUER,
        token_endpoint=ISSUER + "/token",
        jwks_uri=ISSUER + "/certs",
        auth_methods=("private_key_jwt", "client_secret_post"),
        auth_signing_algs=("PS256", "ES256"),
    )


@pytest.mark.parametrize("absent", [..., None, [], "client_secret_post", [1, None]])
def test_no_list_of_authentication_methods_means_basic(absent: object) -> None:
    body = document(token_endpoint_auth_methods_supported=absent, token_endpoint_auth_signing_alg_values_supported=...)

    answer = read_metadata(200, body, url=DOCUMENT_URL)

    assert (answer.auth_methods, answer.auth_signing_algs) == (("client_secret_basic",), ())


@pytest.mark.parametrize("absent", [..., None])
def test_an_issuer_may_publish_no_keys(absent: object) -> None:
    assert read_metadata(200, document(jwks_uri=absent), url=DOCUMENT_URL).jwks_uri is None


@pytest.mark.parametrize(
    ("status", "cause"), [(404, "not_there"), (403, "not_there"), (500, None), (503, None), (204, None)]
)
def test_a_failing_discovery_names_its_status_and_what_to_look_at(status: int, cause: str | None) -> None:
    with pytest.raises(IssuerUnavailable, match=f"{DOCUMENT_URL} answered {status}") as caught:
        read_metadata(status, document(), url=DOCUMENT_URL)
    assert (caught.value.cause, caught.value.url) == (cause, DOCUMENT_URL)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>Sign in</html>", b"[]", b"null", b'{"issuer": NaN}', b"\xff", b"[" * 100_000],
    ids=["empty", "HTML", "list", "null", "NaN", "not UTF-8", "deep"],
)
def test_what_is_no_json_object_is_no_discovery_document(body: bytes) -> None:
    with pytest.raises(IssuerUnavailable, match="is not a discovery document"):
        read_metadata(200, body, url=DOCUMENT_URL)


@pytest.mark.parametrize("url", [DOCUMENT_URL, discovery_url(ISSUER + "/"), f"{DOCUMENT_URL}?p=B2C_1_login"])
@pytest.mark.parametrize("issuer", [ISSUER, ISSUER + "/"])
def test_a_trailing_slash_of_the_issuer_may_differ_and_its_own_spelling_is_kept(url: str, issuer: str) -> None:
    assert read_metadata(200, document(issuer=issuer), url=url).issuer == issuer


@pytest.mark.parametrize("url", [DOCUMENT_URL, f"{DOCUMENT_URL}?p=x", f"{DOCUMENT_URL}?iss=https://evil.example"])
@pytest.mark.parametrize(
    "issuer",
    [
        "https://issuer.example/realms/other",
        "https://issuer.example/realms",
        "https://issuer.example/realms/test2",
        "https://issuer.example/realms/tes",
        "https://issuer.example",
        "https://ISSUER.example/realms/test",
        "http://issuer.example/realms/test",
        "https://evil.example/realms/test",
        DOCUMENT_URL,
        f"{ISSUER}?p=x",
        "",
        ...,
        None,
        1,
        [ISSUER],
    ],
)
def test_a_document_of_another_issuer_is_refused(issuer: object, url: str) -> None:
    with pytest.raises(IssuerUnavailable, match="names another issuer") as caught:
        read_metadata(200, document(issuer=issuer), url=url)
    assert caught.value.cause == "other_issuer"


def test_a_document_at_another_address_has_to_name_the_issuer_that_is_set() -> None:
    inner = "http://localhost:8080/realms/test/.well-known/openid-configuration"

    assert read_metadata(200, document(), url=inner, issuer=ISSUER).issuer == ISSUER
    assert read_metadata(200, document(), url=inner, issuer=f"{ISSUER}/").issuer == ISSUER
    for named in ("http://localhost:8080/realms/test", f"{ISSUER}x", None):
        with pytest.raises(IssuerUnavailable, match="names another issuer"):
            read_metadata(200, document(issuer=named), url=inner, issuer=ISSUER)


def test_the_name_of_another_issuer_is_shown_without_its_control_characters() -> None:
    with pytest.raises(IssuerUnavailable) as caught:
        read_metadata(200, document(issuer="evil\r\n\x1b[31m" + "x" * 5000), url=DOCUMENT_URL)

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("value", "is_taken"),
    [
        ("http://issuer.example/adfs/services/trust", True),
        ("https://ISSUER.example:8443", True),
        ("https://evil.example/realms/test", False),
        ("https://issuer.example.evil.example", False),
        ("https://evil.example@issuer.example.evil.example", False),
        ("urn:federation:issuer.example", False),
        ("https://[issuer.example", False),
        ("", False),
        (None, False),
        (1, False),
        (["https://issuer.example"], False),
    ],
)
def test_the_issuer_of_access_tokens_has_to_be_on_the_host_of_the_issuer(value: object, is_taken: bool) -> None:
    metadata = read_metadata(200, document(access_token_issuer=value), url=DOCUMENT_URL)

    assert metadata.access_token_issuer == (value if is_taken else None)


@pytest.mark.parametrize("name", ["token_endpoint", "jwks_uri"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("http://issuer.example/token", "https://"),
        ("https://user:password@issuer.example/token", "user name"),
        ("/realms/test/token", "not a valid URL"),
        ("", "not a valid URL"),
        ("https://issuer.example/a b", "spaces"),
        (1, "not a string"),
        (["https://issuer.example/token"], "not a string"),
        (False, "not a string"),
    ],
)
def test_an_endpoint_that_must_not_be_spoken_to_is_refused_by_name(name: str, value: object, problem: str) -> None:
    with pytest.raises(IssuerUnavailable, match=f"{name} .*{problem}") as caught:
        read_metadata(200, document(**{name: value}), url=DOCUMENT_URL)
    assert caught.value.cause == ("plain_http" if problem == "https://" else None)


@pytest.mark.parametrize("absent", [..., None])
def test_a_document_may_be_without_token_endpoint(absent: object) -> None:
    assert read_metadata(200, document(token_endpoint=absent), url=DOCUMENT_URL).token_endpoint == ""


def test_endpoints_over_plain_http_are_taken_when_allowed() -> None:
    url = "http://issuer.internal/.well-known/openid-configuration"
    body = document(issuer="http://issuer.internal", token_endpoint="http://issuer.internal/t", jwks_uri=...)

    assert read_metadata(200, body, url=url, allow_http=True).token_endpoint == "http://issuer.internal/t"


# --- client authentication ----------------------------------------------------------------------------------------

WITH_SECRET = Client("client", SECRET)
WITH_KEY = Client("client", key=ed25519.Ed25519PrivateKey.generate())
WITH_BOTH = Client("client", SECRET, key=ed25519.Ed25519PrivateKey.generate())


@pytest.mark.parametrize(
    ("client", "offered", "chosen"),
    [
        (Client("client"), ("client_secret_basic",), "none"),
        (Client("client"), ("none",), "none"),
        (WITH_SECRET, ("client_secret_jwt", "client_secret_post", "client_secret_basic"), "client_secret_basic"),
        (WITH_SECRET, ("client_secret_jwt", "client_secret_post"), "client_secret_post"),
        (WITH_SECRET, ("private_key_jwt", "client_secret_jwt"), "client_secret_jwt"),
        (WITH_KEY, ("client_secret_basic", "private_key_jwt"), "private_key_jwt"),
        (WITH_BOTH, ("client_secret_basic", "private_key_jwt"), "private_key_jwt"),
        (WITH_BOTH, ("client_secret_post",), "client_secret_post"),
    ],
)
def test_auto_takes_the_best_method_that_is_offered_and_possible(
    client: Client, offered: tuple[str, ...], chosen: str
) -> None:
    assert choose_auth_method(client, metadata(*offered)) == chosen


@pytest.mark.parametrize(
    ("client", "offered"),
    [
        (WITH_SECRET, ("private_key_jwt", "tls_client_auth")),
        (WITH_SECRET, ("none",)),
        (WITH_KEY, ("client_secret_basic", "client_secret_post")),
        (WITH_BOTH, ("tls_client_auth",)),
    ],
)
def test_auto_refuses_when_nothing_offered_is_possible_and_says_so(client: Client, offered: tuple[str, ...]) -> None:
    with pytest.raises(CredentialsRejected, match=", ".join(offered)) as caught:
        choose_auth_method(client, metadata(*offered))
    assert caught.value.cause == "no_auth_method"


@pytest.mark.parametrize(
    "method", ["client_secret_basic", "client_secret_post", "client_secret_jwt", "private_key_jwt", "none"]
)
def test_a_method_that_is_set_is_used_whatever_the_issuer_offers(method: str) -> None:
    assert choose_auth_method(Client("client", SECRET, method), metadata("tls_client_auth")) == method


def test_the_names_of_methods_and_grants_are_those_of_the_settings() -> None:
    methods = {"client_secret_basic", "client_secret_post", "client_secret_jwt", "private_key_jwt", "none"}

    assert set(CLIENT_AUTH_METHODS) == {"auto"} | methods
    assert set(GRANTS) == {"refresh_token", "client_credentials"}


# --- token request ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [None, "openid profile"])
def test_a_refresh_request_carries_the_refresh_token_and_scope(scope: str | None) -> None:
    request = build_token_request(Client("client"), METADATA, now=NOW, refresh_token="r-1", scope=scope)

    expected = {"grant_type": "refresh_token", "refresh_token": "r-1", "client_id": "client"}
    assert request.url == METADATA.token_endpoint
    assert request.form == (expected if scope is None else {**expected, "scope": scope})
    assert request.headers == {}


@pytest.mark.parametrize("refresh_token", ["r-1", None])
def test_a_token_request_carries_the_clients_own_parameters_but_never_in_place_of_the_protocols(
    refresh_token: str | None,
) -> None:
    client = Client("client", params={"audience": "https://api.example", "grant_type": "password", "scope": "all"})
    request = build_token_request(client, METADATA, now=NOW, refresh_token=refresh_token, scope="openid")

    assert request.form["audience"] == "https://api.example"
    assert request.form["grant_type"] == ("refresh_token" if refresh_token else "client_credentials")
    assert request.form["scope"] == "openid"
    assert "api.example" not in repr(client)


@pytest.mark.parametrize("refresh_token", ["r-1", None])
def test_a_token_request_names_the_resource_that_it_is_for(refresh_token: str | None) -> None:
    client = Client("client", params={"resource": "https://other.example", "audience": "other", "tenant": "t-1"})
    for_service = functools.partial(build_token_request, client, METADATA, now=NOW, refresh_token=refresh_token)

    asked = for_service(resource="https://stac.example").form
    # The token would be for both.
    assert (asked["resource"], "audience" in asked, asked["tenant"]) == ("https://stac.example", False, "t-1")
    usual = for_service().form
    assert (usual["resource"], usual["audience"]) == ("https://other.example", "other")


@pytest.mark.parametrize(
    ("scope", "login_scope", "narrow"),
    [
        ("stac:read", "openid offline_access stac:read stac:write", "stac:read openid offline_access"),
        ("stac:read", "stac:read openid profile", "stac:read openid"),
        ("b a b", "offline_access", "b a offline_access"),
        ("offline_access a openid", "openid offline_access a", "offline_access a openid"),
        ("stac:read", None, "stac:read"),
        ("stac:read", "openid2 offline_access.x", "stac:read"),
        ("", "openid", "openid"),
    ],
)
def test_a_narrower_refresh_keeps_what_makes_the_session_last(scope: str, login_scope: str | None, narrow: str) -> None:
    assert narrow_scope(scope, login_scope) == narrow


@pytest.mark.parametrize("scope", [None, "openid profile"])
def test_a_client_credentials_request_carries_scope_and_no_refresh_token(scope: str | None) -> None:
    request = build_token_request(WITH_SECRET, metadata("client_secret_post"), now=NOW, scope=scope)

    expected = {"grant_type": "client_credentials", "client_id": "client", "client_secret": SECRET}
    assert request.form == (expected if scope is None else {**expected, "scope": scope})
    assert request.headers == {}


@pytest.mark.parametrize(
    ("client_id", "secret"),
    [
        ("client", "secret"),
        ("cl:ient", "sec:ret"),
        ("cl%3Aient", "100%"),
        ("a+b", "c+d"),
        ("with space", " both ends "),
        ("über-client", "größe€🌍"),
        ("https://client.example/id", "a&b=c~d"),
    ],
)
def test_basic_decodes_back_at_a_server_that_form_decodes(client_id: str, secret: str) -> None:
    request = build_token_request(
        Client(client_id, secret, "client_secret_basic"), METADATA, now=NOW, refresh_token="r-1"
    )

    scheme, _, encoded = request.headers["Authorization"].partition(" ")
    pair = base64.b64decode(encoded, validate=True).decode("ascii")
    assert scheme == "Basic"
    assert pair.count(":") == 1
    assert [unquote_plus(part) for part in pair.split(":")] == [client_id, secret]
    assert request.form == {"grant_type": "refresh_token", "refresh_token": "r-1"}


def assertion_of(client: Client, *algs: str) -> str:
    request = build_token_request(client, metadata(algs=algs), now=NOW, refresh_token="r-1")
    assert request.headers == {}
    assert {name: value for name, value in request.form.items() if name != "client_assertion"} == {
        "grant_type": "refresh_token",
        "refresh_token": "r-1",
        "client_id": client.client_id,
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    }
    return request.form["client_assertion"]


def claims_of(assertion: str, key: Any, algorithm: str) -> dict[str, Any]:
    header = jwt.get_unverified_header(assertion)
    assert header == {"alg": algorithm, "typ": "JWT"}
    options: Any = {"verify_exp": False, "verify_iat": False, "require": ["iss", "sub", "aud", "jti", "iat", "exp"]}
    claims: dict[str, Any] = jwt.decode(
        assertion, key, algorithms=[algorithm], audience=METADATA.issuer, options=options
    )
    return claims


@pytest.mark.parametrize(
    ("make_key", "offered", "algorithm"),
    [
        (rsa_key, (), "RS256"),
        (rsa_key, ("RS256", "PS256"), "RS256"),
        (rsa_key, ("PS256", "ES256"), "PS256"),
        (rsa_key, ("PS512", "RS384"), "RS384"),
        (rsa_key, ("RS512",), "RS512"),
        (rsa_key, ("PS384",), "PS384"),
        (rsa_key, ("PS512",), "PS512"),
        (rsa_key, ("ES256", "HS256"), "RS256"),
        (lambda: ec.generate_private_key(ec.SECP256R1()), (), "ES256"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), ("RS256", "ES256"), "ES384"),
        (lambda: ec.generate_private_key(ec.SECP521R1()), ("ES512",), "ES512"),
        (ed25519.Ed25519PrivateKey.generate, ("RS256",), "EdDSA"),
    ],
)
def test_a_key_signs_assertions_with_an_algorithm_of_its_own_that_the_issuer_prefers(
    make_key: Callable[[], PrivateKey], offered: tuple[str, ...], algorithm: str
) -> None:
    key = make_key()

    claims = claims_of(
        assertion_of(Client("client", None, "private_key_jwt", key), *offered), key.public_key(), algorithm
    )

    del claims["jti"]
    assert claims == {
        "iss": "client",
        "sub": "client",
        "aud": METADATA.issuer,
        "iat": int(NOW),
        "exp": int(NOW) + 60,
    }


@pytest.mark.parametrize(
    ("secret", "offered", "algorithm"),
    [
        (SECRET * 2, (), "HS256"),
        (SECRET * 2, ("RS256", "HS512"), "HS512"),
        (SECRET * 2, ("HS384",), "HS384"),
        ("größe" * 20, (), "HS256"),
    ],
)
def test_a_secret_signs_assertions(secret: str, offered: tuple[str, ...], algorithm: str) -> None:
    assertion = assertion_of(Client("client", secret, "client_secret_jwt"), *offered)

    assert claims_of(assertion, secret, algorithm)["iss"] == "client"
    assert secret not in assertion


@pytest.mark.parametrize("secret", ["short", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "ssh-rsa A"])
def test_any_secret_that_an_issuer_gives_signs_assertions_without_warning(secret: str) -> None:
    assertion = assertion_of(Client("client", secret, "client_secret_jwt"))

    signed, _, signature = assertion.rpartition(".")
    algorithm = jwt.get_algorithm_by_name("HS256")
    assert algorithm.verify(signed.encode(), secret.encode(), base64.urlsafe_b64decode(signature + "=="))


@pytest.mark.parametrize(
    ("client", "offered"),
    [
        (Client("client", None, "private_key_jwt", ed25519.Ed25519PrivateKey.generate()), ()),
        (Client("client", SECRET, "client_secret_jwt"), ("HS256",)),
    ],
)
def test_an_assertion_is_for_one_audience_of_two(client: Client, offered: tuple[str, ...]) -> None:
    def audience(client: Client) -> object:
        return jwt.decode(assertion_of(client, *offered), options={"verify_signature": False})["aud"]

    assert audience(client) == ISSUER
    assert audience(replace(client, assertion_audience="issuer")) == ISSUER
    assert audience(replace(client, assertion_audience="token_endpoint")) == f"{ISSUER}/token"


@pytest.mark.parametrize(
    ("offered", "algorithm"),
    [(("Ed25519",), "Ed25519"), (("ES256", "Ed25519"), "Ed25519"), (("EdDSA", "Ed25519"), "EdDSA"), ((), "EdDSA")],
)
def test_an_ed25519_key_signs_under_the_name_that_is_offered(offered: tuple[str, ...], algorithm: str) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    assertion = assertion_of(Client("client", None, "private_key_jwt", key), *offered)

    head, payload, signature = assertion.split(".")
    assert json.loads(base64.urlsafe_b64decode(head + "==")) == {"alg": algorithm, "typ": "JWT"}
    key.public_key().verify(base64.urlsafe_b64decode(signature + "=="), f"{head}.{payload}".encode())


def test_every_assertion_has_a_jti_of_its_own() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    client = Client("client", None, "private_key_jwt", key)

    seen = {claims_of(assertion_of(client), key.public_key(), "EdDSA")["jti"] for _ in range(50)}

    assert len(seen) == 50
    assert min(map(len, seen)) >= 16


# --- exchange -----------------------------------------------------------------------------------------------------

EXCHANGE = {
    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
    "subject_token": "a.b.c",
    "subject_token_type": "urn:ietf:params:oauth:token-type:access_token",
    "requested_token_type": "urn:ietf:params:oauth:token-type:access_token",
}


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"audience": "stac-api"},
        {"resource": "https://stac.example"},
        {"audience": "stac-api", "resource": "https://stac.example", "scope": "stac:read"},
    ],
)
def test_an_exchange_asks_for_an_access_token_for_a_service(target: dict[str, str]) -> None:
    request = build_exchange_request(Client("client"), METADATA, now=NOW, subject_token="a.b.c", **target)

    assert request.url == METADATA.token_endpoint
    assert request.form == {**EXCHANGE, **target, "client_id": "client"}
    assert EXCHANGE["grant_type"] == EXCHANGE_GRANT


def test_the_client_authenticates_in_an_exchange_as_everywhere() -> None:
    basic = metadata("client_secret_basic")
    request = build_exchange_request(WITH_SECRET, basic, now=NOW, subject_token="a.b.c", audience="stac-api")

    assert request.headers == build_token_request(WITH_SECRET, basic, now=NOW).headers != {}
    assert request.form == {**EXCHANGE, "audience": "stac-api"}


@pytest.mark.parametrize("target", ["audience", "resource"])
def test_a_service_is_the_only_target_of_its_exchange(target: str) -> None:
    client = Client("client", params={"audience": "other", "resource": "https://other.example", "tenant": "t-1"})
    request = build_exchange_request(client, METADATA, now=NOW, subject_token="a.b.c", **{target: "urn:stac"})

    asked = {name: request.form.get(name) for name in ("audience", "resource", "tenant")}
    assert asked == {"audience": None, "resource": None, "tenant": "t-1", target: "urn:stac"}


@pytest.mark.parametrize(
    ("scope", "sent"),
    [
        ("offline_access", None),
        ("openid offline_access stac:read", "openid stac:read"),
        ("offline_access.not", "offline_access.not"),
        ("", None),
    ],
)
def test_an_exchange_starts_no_session(scope: str, sent: str | None) -> None:
    request = build_exchange_request(Client("client"), METADATA, now=NOW, subject_token="a.b.c", scope=scope)

    assert request.form.get("scope") == sent


def test_the_exchanged_token_is_a_secret() -> None:
    request = build_exchange_request(Client("client"), METADATA, now=NOW, subject_token=SECRET)

    assert SECRET in request.secrets
    assert SECRET not in repr(request)


def exchange_body(**changes: Any) -> bytes:
    return token_body(**{"issued_token_type": ACCESS_TOKEN_TYPE, **changes})


@pytest.mark.parametrize("kind", [ACCESS_TOKEN_TYPE, JWT_TYPE])
@pytest.mark.parametrize("token_type", ["Bearer", "bearer"])
def test_an_exchange_gives_an_access_token_and_no_session(kind: str, token_type: str) -> None:
    body = exchange_body(
        issued_token_type=kind,
        token_type=token_type,
        expires_in="300",
        refresh_token="r-2",
        refresh_expires_in=600,
        id_token="e30.e30.x",
        scope="stac:read",
    )

    assert read_exchange_response(200, body) == TokenResponse(
        "a.b.c", 300, None, None, id_token="e30.e30.x", scope="stac:read"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"issued_token_type": ...}, "of type unknown"),
        ({"issued_token_type": [ACCESS_TOKEN_TYPE]}, "of type unknown"),
        ({"issued_token_type": "urn:ietf:params:oauth:token-type:refresh_token"}, r"type urn:\S*:refresh_token; only"),
        ({"issued_token_type": f"my-{SECRET}"}, "of type my-…"),
        ({"token_type": "N_A"}, "of type N_A; only Bearer"),
        ({"token_type": "DPoP"}, "of type DPoP; only Bearer"),
        ({"access_token": ...}, "without a usable access_token"),
        ({"access_token": "a b"}, "without a usable access_token"),
    ],
)
def test_another_kind_of_token_is_not_taken_from_an_exchange(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TokenInvalid, match=said) as caught:
        read_exchange_response(200, exchange_body(refresh_token="r-2", **changes), secrets=(SECRET,))

    assert caught.value.refresh_token is None


@pytest.mark.parametrize("code", ["unauthorized_client", "access_denied", "invalid_target", "invalid_request"])
def test_a_refused_exchange_says_why(code: str) -> None:
    with pytest.raises(CredentialsRejected) as caught:
        read_exchange_response(
            400, json.dumps({"error": code, "error_description": f"No {SECRET}"}).encode(), secrets=(SECRET,)
        )

    assert (caught.value.issuer_error, caught.value.description) == (code, "No …")


@pytest.mark.parametrize(
    ("status", "code", "said", "cause"),
    [
        # What Keycloak 26.7.3 answers.
        (400, "invalid_request", "Standard token exchange is not enabled for the requested client", "no_exchange"),
        (400, "invalid_client", "Public client is not allowed to exchange token", "public_client"),
        (400, "invalid_client", "Audience not found", "unknown_audience"),
        (400, "invalid_client", "Client disabled", "unknown_audience"),
        (400, "invalid_request", "Requested audience not available: stac-api", "no_audience"),
        (403, "access_denied", "Client is not within the token audience", "subject_token"),
        (400, "invalid_request", "Invalid token", "subject_token"),
        (400, "invalid_scope", "Invalid scopes: nonsense", None),
        (401, "unauthorized_client", "Invalid client or Invalid client credentials", None),
        (401, "invalid_client", "Invalid client or Invalid client credentials", None),
        # What RFC 6749 and RFC 8693 have.
        (400, "unauthorized_client", None, "no_exchange"),
        (400, "unsupported_grant_type", None, "no_exchange"),
        (400, "invalid_target", None, "no_audience"),
        (400, "invalid_grant", "Token is not active", "subject_token"),
        (401, "invalid_client", None, None),
        (400, "invalid_request", None, None),
        (400, "access_denied", "Denied by policy", None),
    ],
)
def test_a_refused_exchange_carries_its_cause(status: int, code: str, said: str | None, cause: str | None) -> None:
    body = json.dumps({"error": code, "error_description": said}).encode()

    with pytest.raises(CredentialsRejected) as caught:
        read_exchange_response(status, body)

    assert (caught.value.issuer_error, caught.value.description, caught.value.cause) == (code, said, cause)


def test_an_exchange_at_an_issuer_that_is_busy_can_be_tried_again() -> None:
    with pytest.raises(IssuerUnavailable) as caught:
        read_exchange_response(503, b"", retry_after=7)

    assert caught.value.retry_after == 7


# --- token response -----------------------------------------------------------------------------------------------


def token_body(**changes: Any) -> bytes:
    members = {"access_token": "a.b.c", "token_type": "Bearer", **changes}
    return json.dumps({k: v for k, v in members.items() if v is not ...}).encode()


def test_reads_a_token_response() -> None:
    answer = read_token_response(200, token_body(expires_in=300, refresh_token="r-2"))

    assert answer == TokenResponse("a.b.c", 300, "r-2")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 599])
@pytest.mark.parametrize("body", [b"", b'{"error": "invalid_grant"}', token_body()], ids=["empty", "error", "token"])
def test_an_issuer_that_fails_is_unavailable_and_says_when_to_come_back(status: int, body: bytes) -> None:
    with pytest.raises(IssuerUnavailable, match=str(status)) as caught:
        read_token_response(status, body, retry_after=17)

    assert caught.value.retry_after == 17


@pytest.mark.parametrize("status", [200, 201, 302, 400, 401, 403, 404])
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>Sign in</html>", b"[]", b'"text"', b"null", b'{"error": NaN}', b"\xff", b'{"access_token": "a'],
    ids=["empty", "HTML", "list", "string", "null", "NaN", "not UTF-8", "cut off"],
)
def test_an_issuer_that_does_not_speak_json_is_unavailable(status: int, body: bytes) -> None:
    with pytest.raises(IssuerUnavailable, match=f"{status} without the JSON") as caught:
        read_token_response(status, body)

    assert caught.value.retry_after is None
    # Some issuers refuse like this, but not every answer like this is a refusal.
    assert (caught.value.cause == "unclear_refusal") == (status in (400, 401, 403))


@pytest.mark.parametrize("status", [400, 401, 403])
@pytest.mark.parametrize(
    "error",
    [
        "invalid_grant",
        "invalid_client",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
        "invalid_request",
        "invalid_target",
        "access_denied",
    ],
)
def test_a_no_that_repetition_does_not_change_rejects_the_credentials(status: int, error: str) -> None:
    body = json.dumps({"error": error, "error_description": "Not this time"}).encode()

    with pytest.raises(CredentialsRejected, match=f"{error}: Not this time$") as caught:
        read_token_response(status, body)
    assert (caught.value.issuer_error, caught.value.description) == (error, "Not this time")


@pytest.mark.parametrize("status", [302, 400, 401, 404])
@pytest.mark.parametrize(
    "members",
    [
        {"error": "server_error"},
        {"error": "temporarily_unavailable"},
        {"error": "Slow_Down"},
        {"error": None},
        {"error": 1},
        {"error": ["invalid_grant"]},
        {"error": {"code": 403, "message": "Forbidden"}},
        {},
        {"access_token": "a.b.c", "token_type": "Bearer"},
    ],
)
def test_an_answer_that_is_no_clear_no_is_worth_another_try(status: int, members: dict[str, Any]) -> None:
    with pytest.raises(IssuerUnavailable, match=str(status)):
        read_token_response(status, json.dumps(members).encode())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 200])
@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"error": "interaction_required"}, "interaction_required"),
        ({"error": "invalid_refresh_token", "ok": False}, "invalid_refresh_token"),
        ({"error": "bad_verification_code"}, "bad_verification_code"),
        ({"error": "Invalid_Grant"}, "invalid_grant"),
        ({"error": {"code": "INVALID_GRANT"}}, "invalid_grant"),
        ({"error": {"code": 403, "status": "PERMISSION_DENIED"}}, "PERMISSION_DENIED"),
    ],
)
def test_an_error_code_that_does_not_promise_better_is_final_even_with_status_200(
    status: int, members: dict[str, Any], code: str
) -> None:
    with pytest.raises(CredentialsRejected, match=f"answered {code}$") as caught:
        read_token_response(status, json.dumps(members).encode())
    assert caught.value.issuer_error == code


def test_oktas_error_code_is_one_where_nothing_was_given() -> None:
    with pytest.raises(CredentialsRejected) as caught:
        read_token_response(401, b'{"errorCode": "E0000011", "errorSummary": "Invalid token provided"}')
    assert (caught.value.issuer_error, caught.value.description) == ("E0000011", "Invalid token provided")


@pytest.mark.parametrize(
    ("status", "error"),
    [(200, "authorization_pending"), (200, "server_error"), (408, "x"), (425, "invalid_grant"), (429, "slow_down")],
)
def test_what_may_pass_is_no_refusal_whatever_the_status(status: int, error: str) -> None:
    with pytest.raises(IssuerUnavailable, match=error) as caught:
        read_token_response(status, json.dumps({"error": error}).encode(), retry_after=3)
    assert caught.value.retry_after == 3


def test_tokens_are_taken_though_an_error_is_named_beside_them() -> None:
    assert read_token_response(200, token_body(error="")).access_token == "a.b.c"
    assert read_token_response(200, token_body(error="invalid_grant")).access_token == "a.b.c"


@pytest.mark.parametrize("status", [200, 400, 500, 503])
@pytest.mark.parametrize(
    "members",
    [
        {"error": "x", "error_description": "Ask the help desk"},
        {"error": {"message": "Ask the help desk"}},
        {"error": {"code": 403, "description": "Ask the help desk"}},
        {"error": {"code": "x", "message": ""}, "message": "Ask the help desk"},
        {"errorCode": "E0000047", "errorSummary": "Ask the help desk", "error": 1},
        {"error": "x", "detail": "Ask the help desk"},
    ],
)
def test_the_issuers_own_words_are_told_without_our_secrets(status: int, members: dict[str, Any]) -> None:
    body = json.dumps(members).replace("the help desk", f"the help desk about {SECRET}").encode()

    with pytest.raises(TokenError, match=r": Ask the help desk about …$") as caught:
        read_token_response(status, body, secrets=(SECRET,))
    assert SECRET not in str(caught.value)


def test_an_error_code_does_not_show_our_secrets() -> None:
    with pytest.raises(CredentialsRejected) as caught:
        read_token_response(400, json.dumps({"error": f"bad_{SECRET}"}).encode(), secrets=(SECRET,))
    assert SECRET not in f"{caught.value} {caught.value.issuer_error}"


def test_a_description_of_three_sentences_is_told_to_its_end() -> None:
    said = (
        "The provided authorization grant (e.g., authorization code, resource owner credentials) or refresh token is "
        "invalid, expired, revoked, does not match the redirection URI used in the authorization request, or was "
        "issued to another client. The refresh token has not been found: not_found."
    )
    with pytest.raises(CredentialsRejected) as caught:
        read_token_response(400, json.dumps({"error": "invalid_grant", "error_description": said}).encode())
    assert caught.value.description == said


@pytest.mark.parametrize("description", ["", None, 1, ["x"], {}])
def test_an_odd_error_description_is_left_out(description: object) -> None:
    body = json.dumps({"error": "invalid_grant", "error_description": description}).encode()

    with pytest.raises(CredentialsRejected, match=r"^the issuer answered invalid_grant$") as caught:
        read_token_response(400, body)
    assert caught.value.description is None


@pytest.mark.parametrize("hostile", ["\r\nX: y", "\x00", "\x1b[31m", "\N{RIGHT-TO-LEFT OVERRIDE}", "\ud800", "\x85"])
def test_error_texts_are_shown_on_one_line_without_control_characters(hostile: str) -> None:
    description = json.dumps({"error": "invalid_grant", "error_description": f"a{hostile}b"}).encode()
    code = json.dumps({"error": f"a{hostile}b"}).encode()

    for body in (description, code):
        with pytest.raises(TokenError) as caught:
            read_token_response(400, body)
        assert str(caught.value).isprintable()


def test_a_long_error_text_is_cut() -> None:
    text = "x " * 50_000
    for error in ({"error": text}, {"error": "invalid_grant", "error_description": text}):
        with pytest.raises(TokenError, match=r"(x ){100}…") as caught:
            read_token_response(400, json.dumps(error).encode())
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "access_token",
    [
        ...,
        None,
        "",
        1,
        True,
        ["a.b.c"],
        {},
        "a b",
        " a",
        "a\n",
        "a\r\nX: y",
        "a\tb",
        "a\x00b",
        "a\x7f",
        "größe",
        "a\xa0",
    ],
)
def test_a_success_without_a_usable_access_token_is_invalid(access_token: object) -> None:
    with pytest.raises(TokenInvalid, match="without a usable access_token"):
        read_token_response(200, token_body(access_token=access_token))


@pytest.mark.parametrize("token_type", ["Bearer", "bearer", "BEARER", ...])
def test_bearer_tokens_are_taken(token_type: object) -> None:
    assert read_token_response(200, token_body(token_type=token_type)).access_token == "a.b.c"


@pytest.mark.parametrize("token_type", ["DPoP", "mac", "", "Bearer ", None, 1, ["Bearer"], {}])
def test_tokens_that_are_not_bearer_tokens_are_invalid(token_type: object) -> None:
    with pytest.raises(TokenInvalid, match="only Bearer"):
        read_token_response(200, token_body(token_type=token_type))


@pytest.mark.parametrize(
    ("written", "lifetime"),
    [
        ("300", 300.0),
        ("0.5", 0.5),
        ('"3600"', 3600.0),
        ('"12.5"', 12.5),
        ("1e3", 1000.0),
        ("99999999", 99999999.0),
        ("9223372036854775", MAX_LIFETIME),
        ('"1e300"', MAX_LIFETIME),
    ],
)
def test_a_lifetime_may_be_a_number_or_its_text(written: str, lifetime: float) -> None:
    body = f'{{"access_token": "a", "expires_in": {written}}}'.encode()

    assert read_token_response(200, body).expires_in == lifetime


@pytest.mark.parametrize(
    "written",
    [
        "0",
        "-1",
        "-0.5",
        "true",
        "false",
        "null",
        "[300]",
        "{}",
        '""',
        '"soon"',
        '"NaN"',
        '"Infinity"',
        '"-1"',
        "1e999",
        "9" * 400,
    ],
)
def test_a_lifetime_that_is_no_positive_number_counts_as_not_said(written: str) -> None:
    body = f'{{"access_token": "a", "expires_in": {written}}}'.encode()

    assert read_token_response(200, body).expires_in is None


@pytest.mark.parametrize(
    ("said", "lifetime"), [(1800, 1800), ("1800", 1800), (0, None), (None, None), (..., None), (True, None)]
)
def test_the_refresh_tokens_own_lifetime_is_read_where_it_has_an_end(said: object, lifetime: float | None) -> None:
    assert read_token_response(200, token_body(refresh_expires_in=said)).refresh_expires_in == lifetime


@pytest.mark.parametrize("spoilt", [{"access_token": None}, {"access_token": "a b"}, {"token_type": "DPoP"}])
def test_a_refresh_token_in_an_answer_that_is_no_good_otherwise_is_handed_on(spoilt: dict[str, object]) -> None:
    with pytest.raises(TokenInvalid) as caught:
        read_token_response(200, token_body(**{"refresh_token": "r-2", **spoilt}))
    assert caught.value.refresh_token == "r-2"
    assert "r-2" not in repr(caught.value)


def test_any_status_of_success_brings_tokens() -> None:
    assert read_token_response(201, token_body(refresh_token="r-2")).refresh_token == "r-2"


def test_the_id_token_is_read_and_not_shown() -> None:
    response = read_token_response(200, token_body(id_token="e30.e30.canary"))
    assert response.id_token == "e30.e30.canary"
    assert "canary" not in repr(response)
    assert read_token_response(200, token_body(id_token=["x"])).id_token is None


@pytest.mark.parametrize("refresh_token", [..., None, "", 1, True, ["r-2"], {}, "line\nbreak", "\udc80"])
def test_an_odd_refresh_token_counts_as_none(refresh_token: object) -> None:
    assert read_token_response(200, token_body(refresh_token=refresh_token)).refresh_token is None


@pytest.mark.parametrize(
    ("said", "scope"),
    [("openid stac:read", "openid stac:read"), ("", None), (["openid"], None), ("a\nb", None), ("a" * 4001, None)],
)
def test_the_scope_of_the_token_is_read_where_it_is_named(said: object, scope: str | None) -> None:
    assert read_token_response(200, token_body(scope=said)).scope == scope
    assert read_token_response(200, token_body()).scope is None


# --- what is shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Client("client", SECRET),
        TokenRequest("https://issuer.example/token", {"client_secret": SECRET}, {"Authorization": SECRET}),
        TokenResponse(SECRET, 60, SECRET),
    ],
)
def test_secrets_are_not_shown(value: object) -> None:
    assert SECRET not in repr(value)
    assert SECRET not in str(value)


def test_a_client_does_not_show_its_key() -> None:
    assert "key" not in repr(WITH_KEY).lower()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("größe 🌍", "größe 🌍"),
        ("a\nb\x1bc", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"),
        (None, "None"),
        (["a\n"], "['a\\n']"),
        ("x" * 10, "x" * 10),
        ("x" * 11, "x" * 10 + "…"),
        (["x" * 100], "['" + "x" * 8 + "…"),
    ],
)
def test_text_from_strangers_fits_on_a_log_line(value: object, shown: str) -> None:
    assert printable(value, 20 if len(shown) > 11 else 10) == shown


# --- private keys -------------------------------------------------------------------------------------------------


def pem(key: Any, password: bytes | None = None, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return bytes(key.private_bytes(Encoding.PEM, form, encryption))


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize(
    "make_key",
    [
        rsa_key,
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
    ],
)
def test_loads_private_keys(make_key: Callable[[], PrivateKey], form: PrivateFormat) -> None:
    key = make_key()

    assert load_private_key(pem(key, form=form)).public_key() == key.public_key()


def test_loads_an_ed25519_key() -> None:
    key = ed25519.Ed25519PrivateKey.generate()

    assert load_private_key(b"# a comment before it\n" + pem(key)).public_key() == key.public_key()


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_is_refused_with_the_remedy(form: PrivateFormat) -> None:
    with pytest.raises(ValueError, match="encrypted with a password: store it without one"):
        load_private_key(pem(rsa_key(), b"password", form))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\xff\x00",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nMA8CAQAwBQYDKgMEBAMEAQA=\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        rsa_key().private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    ],
    ids=["empty", "garbage", "bytes", "empty PEM", "unknown kind", "certificate", "public key", "DER"],
)
def test_what_is_no_private_key_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a private key in PEM form"):
        load_private_key(data)


@pytest.mark.parametrize(
    "make_key",
    [
        lambda: dsa.generate_private_key(1024),
        x25519.X25519PrivateKey.generate,
        ed448.Ed448PrivateKey.generate,
    ],
    ids=["DSA", "X25519", "Ed448"],
)
def test_a_key_of_a_kind_that_signs_no_jwt_here_is_refused(make_key: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must be RSA, EC or Ed25519"):
        load_private_key(pem(make_key()))


def test_a_curve_without_an_algorithm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"secp256k1.*P-256, P-384 or P-521"):
        load_private_key(pem(ec.generate_private_key(ec.SECP256K1())))
