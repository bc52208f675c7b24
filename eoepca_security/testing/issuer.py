"""FakeIssuer: an OpenID Connect issuer in a thread, whose behaviour you can change while it runs.

With pytest::

    @pytest.fixture
    def issuer():
        with FakeIssuer() as issuer:
            yield issuer

    def test_alice_is_greeted(issuer):
        scheme = OIDCProxyScheme(openIdConnectUrl=issuer.url, audience="service")
        ...  # a request with the header Authorization: f"Bearer {issuer.issue(scope='read')}"
"""

import base64
import hashlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs, unquote_plus, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from eoepca_security.oauth.protocol import ACCESS_TOKEN_TYPE, EXCHANGE_GRANT, PrivateKey
from eoepca_security.oauth.strict_json import parse_object
from eoepca_security.testing.local_server import Handler, LocalServer
from eoepca_security.testing.login import LOGIN_GRANTS, LoginBehaviour, Logins

ALL_AUTH_METHODS: Final = (
    "client_secret_basic",
    "client_secret_post",
    "client_secret_jwt",
    "private_key_jwt",
    "none",
)

_NEW_KEY: Final[Mapping[str, Callable[[], PrivateKey]]] = {
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


@dataclass
class Behaviour:
    """How the issuer behaves. You can change it at any time. Times are in seconds."""

    lifetime: float = 60
    """The lifetime of access tokens."""
    refresh_tokens: str = "keep"
    """`keep` answers with the same one, `omit` with none, `rotate` with a new one. Reuse then ends the session."""
    opaque: bool = False
    """Whether access tokens are random strings instead of JWTs."""
    expires_in: bool = True
    """Whether token responses include the token's lifetime."""
    refresh_expires_in: float | None = None
    """The refresh token's lifetime in token responses. It is not enforced."""
    clock_offset: float = 0
    """How far the issuer's clock is ahead of this machine's."""
    delay: float = 0
    """How long the token endpoint takes to answer."""
    auth_methods: tuple[str, ...] = ALL_AUTH_METHODS
    """The client authentication methods that the issuer advertises and accepts."""
    audience: str = "service"
    claims: dict[str, Any] = field(default_factory=lambda: {"sub": "u-1", "preferred_username": "alice"})
    """Claims of every access token, besides the issuer's own."""
    scope: str | None = None
    """The scope of sessions, of which a refresh may ask for a part. None allows any scope."""
    widens: bool = True
    """Whether a refresh may ask for scopes of the session that an earlier refresh left out."""
    exchange: bool = True
    """Whether the client may exchange access tokens for ones of other audiences."""
    exchange_delays: dict[str, float] = field(default_factory=dict)
    """How long exchanges take to answer, by audience or resource."""
    exchange_errors: dict[str, str] = field(default_factory=dict)
    """The error codes with which exchanges are refused, by audience or resource."""
    down: bool = False
    """Whether the issuer closes every connection without an answer."""
    login: LoginBehaviour = field(default_factory=LoginBehaviour)
    """How device and browser logins behave."""
    fault: Callable[[Handler], bool] | None = None
    """Called first with each request. It returns True if it has handled the request."""


@dataclass(frozen=True)
class TokenRequestSeen:
    """A request that reached the token endpoint."""

    at: float
    method: str
    form: Mapping[str, str]


class FakeIssuer:
    """An issuer with one client, on a free loopback port for the duration of its `with` block.

    `behaviour` can be changed at any time. `refresh_token` is valid at the start. `requests` lists the token requests
    so far, and `fetches` counts all requests by the last part of their path (`openid-configuration`, `certs`, `token`).
    `logins` has the logins started so far, `revoked` the revoked refresh tokens. `key` is the signing key, for the
    `algorithm` ES256, RS256 or EdDSA.
    """

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        client_id: str = "client",
        client_secret: str | None = None,
        client_key: PrivateKey | None = None,
        path: str = "/realms/test",
        algorithm: str = "ES256",
    ) -> None:
        self.behaviour = behaviour or Behaviour()
        self.client_id = client_id
        self.client_secret = client_secret
        self.client_key = client_key
        self.algorithm = algorithm
        self.requests: list[TokenRequestSeen] = []
        self.fetches: Counter[str] = Counter()
        self.reuses = 0
        self._lock = threading.Lock()
        self._issued: dict[str, float] = {}
        self._sessions: dict[str, str] = {}
        self._used: dict[str, str] = {}
        self._narrowed: dict[str, str] = {}
        self.rotate_keys()
        self.refresh_token = self.new_session()
        self._server = LocalServer(self._handler())
        self.url = self._server.url + path
        self.logins = Logins(self.url, client_id)
        self.revoked: list[str] = []

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def now(self) -> float:
        """Return the issuer's current time in epoch seconds."""
        return time.time() + self.behaviour.clock_offset

    def rotate_keys(self) -> None:
        """Sign with a new key from now on, and publish only the new key."""
        self.key = _NEW_KEY[self.algorithm]()
        self.kid = secrets.token_hex(4)

    def new_session(self) -> str:
        """Return the refresh token of a new login."""
        token = secrets.token_urlsafe(24)
        self._sessions[token] = secrets.token_hex(4)
        return token

    def end_sessions(self) -> None:
        """End all sessions: their refresh tokens become invalid."""
        with self._lock:
            self._sessions.clear()

    def forget_access_tokens(self) -> None:
        """Make `accepts` refuse all access tokens issued so far, as a service does after their revocation."""
        self._issued.clear()

    def sign(self, claims: Mapping[str, Any], headers: Mapping[str, Any] | None = None) -> str:
        """Return a JWT with exactly these claims, signed with the issuer's key."""
        return jwt.encode(
            dict(claims), self.key, algorithm=self.algorithm, headers={"kid": self.kid, **(headers or {})}
        )

    def issue(self, **claims: Any) -> str:
        """Return a new access token, as the token endpoint does. `claims` add to its claims or override them."""
        now, behaviour = self.now(), self.behaviour
        if behaviour.opaque:
            token = "opaque-" + secrets.token_urlsafe(24)
            end = now + behaviour.lifetime
        else:
            end = int(now) + int(behaviour.lifetime)
            token = self.sign(
                {
                    "iss": self.url,
                    "aud": behaviour.audience,
                    "iat": int(now),
                    "exp": end,
                    "jti": secrets.token_hex(8),
                    **behaviour.claims,
                    **claims,
                }
            )
        self._issued[token] = end
        return token

    def id_token(self, access_token: str, **claims: Any) -> str:
        """Return the client's ID token for an access token. `claims` add to its claims or override them."""
        now = int(self.now())
        # No standard defines the hash for EdDSA; SHA-512 is usual for Ed25519.
        digest = hashlib.new("sha512" if self.algorithm == "EdDSA" else "sha256", access_token.encode()).digest()
        half = base64.urlsafe_b64encode(digest[: len(digest) // 2]).rstrip(b"=").decode()
        own = {"iss": self.url, "aud": self.client_id, "azp": self.client_id, "typ": "ID", "at_hash": half}
        times = {"iat": now, "exp": now + int(self.behaviour.lifetime)}
        return self.sign({**own, **times, **self.behaviour.claims, **claims})

    def accepts(self, token: str) -> bool:
        """Return whether the issuer issued this access token and it has not expired, without leeway."""
        return self.now() < self._issued.get(token, 0)

    def jwks(self) -> dict[str, Any]:
        """Return the JWK Set."""
        algorithm: Any = jwt.get_algorithm_by_name(self.algorithm)
        key = algorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {"keys": [{**key, "kid": self.kid, "use": "sig", "alg": self.algorithm, "key_ops": ["verify"]}]}

    def discovery(self) -> dict[str, Any]:
        """Return the discovery document."""
        return {
            "issuer": self.url,
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/certs",
            "token_endpoint_auth_methods_supported": list(self.behaviour.auth_methods),
            "grant_types_supported": ["refresh_token", "client_credentials", EXCHANGE_GRANT, *LOGIN_GRANTS],
            **self.logins.discovery(self.behaviour.login),
        }

    def answer_token_request(self, authorization: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return status and JSON for a POST to the token endpoint."""
        form = _form(body)
        method, refusal = self._refuse_client(authorization, form)
        with self._lock:
            self.requests.append(TokenRequestSeen(time.time(), method, form))
        time.sleep(self.behaviour.delay)
        if refusal:
            return refusal
        if form.get("grant_type") == EXCHANGE_GRANT:
            return self._exchange(form)
        if form.get("grant_type") not in ("refresh_token", "client_credentials", *LOGIN_GRANTS):
            return 400, {"error": "unsupported_grant_type"}
        with self._lock:
            error, refresh_token, nonce = self._grant(form)
            if error is not None:
                said = {"error_description": "Token is not active"} if error == "invalid_grant" else {}
                return 400, {"error": error, **said}
            scope = form.get("scope") or self._scope_of(refresh_token)
            answer = self._answer(scope, form.get("resource"))
        if self.behaviour.refresh_expires_in is not None:
            answer["refresh_expires_in"] = self.behaviour.refresh_expires_in
        if refresh_token is not None and self.behaviour.refresh_tokens != "omit":
            answer["refresh_token"] = refresh_token
        if form["grant_type"] in LOGIN_GRANTS and self.behaviour.login.id_claims is not None:
            claims = ({"nonce": nonce} if nonce is not None else {}) | self.behaviour.login.id_claims
            answer["id_token"] = self.id_token(answer["access_token"], **claims)
        return 200, answer

    def answer_device_request(self, authorization: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return status and JSON for a POST to the device authorization endpoint."""
        form = _form(body)
        _, refusal = self._refuse_client(authorization, form)
        return refusal or (200, self.logins.begin_by_device(self.behaviour.login, form))

    def answer_revocation(self, authorization: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        """Revoke a refresh token and its session (RFC 7009); return status and JSON."""
        form = _form(body)
        _, refusal = self._refuse_client(authorization, form)
        if refusal:
            return refusal
        with self._lock:
            self.revoked.append(form.get("token", ""))
            session = self._sessions.get(form.get("token", ""))
            self._sessions = {t: s for t, s in self._sessions.items() if s != session}
        return 200, {}

    def _grant(self, form: Mapping[str, str]) -> tuple[str | None, str | None, str | None]:
        """Return a token request's error, the refresh token for the answer, and the nonce of its login."""
        if form["grant_type"] in LOGIN_GRANTS:
            error, nonce = self.logins.finish(self.behaviour.login, form)
            gives = error is None and self.behaviour.login.refresh_token
            return error, self.new_session() if gives else None, nonce
        if form["grant_type"] == "refresh_token":
            used, scope = form.get("refresh_token", ""), form.get("scope")
            granted = self._scope_of(used)
            if used in self._sessions and scope and granted and not set(scope.split()) <= set(granted.split()):
                return "invalid_scope", None, None
            refresh_token = self._use(used)
            if refresh_token is None:
                return "invalid_grant", None, None
            if scope and not self.behaviour.widens:
                self._narrowed[self._sessions[refresh_token]] = scope
            return None, refresh_token, None
        return None, None, None

    def _exchange(self, form: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        """Return status and JSON for an exchange (RFC 8693)."""
        targets = [form[name] for name in ("audience", "resource") if name in form]
        time.sleep(max((self.behaviour.exchange_delays.get(target, 0) for target in targets), default=0))
        refusals = [self.behaviour.exchange_errors[t] for t in targets if t in self.behaviour.exchange_errors]
        if not self.behaviour.exchange:
            refusals = ["unauthorized_client"]
        if refusals:
            return 400, {"error": refusals[0], "error_description": "The exchange was refused"}
        types = (form.get("subject_token_type"), form.get("requested_token_type", ACCESS_TOKEN_TYPE))
        if types != (ACCESS_TOKEN_TYPE, ACCESS_TOKEN_TYPE) or not self.accepts(form.get("subject_token", "")):
            # RFC 8693 §2.2.2
            return 400, {"error": "invalid_request", "error_description": "The subject token is not valid"}
        return 200, {**self._answer(form.get("scope"), *targets), "issued_token_type": ACCESS_TOKEN_TYPE}

    def _answer(self, scope: str | None, *targets: str | None) -> dict[str, Any]:
        """Return a token response with an access token for `targets`, or for the usual audience."""
        audiences = [target for target in targets if target is not None]
        claims: dict[str, Any] = {"scope": scope} if scope else {}
        if audiences:
            claims["aud"] = audiences if len(audiences) > 1 else audiences[0]
        answer: dict[str, Any] = {"access_token": self.issue(**claims), "token_type": "Bearer"}
        if scope:
            answer["scope"] = scope
        if self.behaviour.expires_in:
            answer["expires_in"] = self.behaviour.lifetime
        return answer

    def _scope_of(self, refresh_token: str | None) -> str | None:
        """Return the scope that a session has by now."""
        session = self._sessions.get(refresh_token or "", "")
        return self._narrowed.get(session, self.behaviour.scope)

    def _use(self, token: str) -> str | None:
        """Use a refresh token and return the one that is valid from now on, or None if it is not valid."""
        session = self._sessions.get(token)
        if session is None:
            if token in self._used:
                # RFC 9700 §4.14.2: two parties have the token, so the session ends for both.
                self.reuses += 1
                self._sessions = {t: s for t, s in self._sessions.items() if s != self._used[token]}
            return None
        if self.behaviour.refresh_tokens != "rotate":
            return token
        del self._sessions[token]
        self._used[token] = session
        successor = secrets.token_urlsafe(24)
        self._sessions[successor] = session
        return successor

    def _refuse_client(
        self, authorization: str | None, form: Mapping[str, str]
    ) -> tuple[str, tuple[int, dict[str, Any]] | None]:
        """Return the client authentication method, and the error response if it was not successful."""
        method, authentic = self._authenticate(authorization, form)
        if authentic and method in self.behaviour.auth_methods:
            return method, None
        why = "the client must authenticate" if method == "none" else f"{method} was not accepted"
        return method, (401, {"error": "invalid_client", "error_description": why})

    def _authenticate(self, authorization: str | None, form: Mapping[str, str]) -> tuple[str, bool]:
        """Return the client authentication method, and whether the credentials are valid."""
        if authorization is not None:
            try:
                pair = base64.b64decode(authorization.removeprefix("Basic "), validate=True).decode()
            except ValueError:
                return "client_secret_basic", False
            client_id, _, secret = (unquote_plus(part) for part in pair.partition(":"))
            return "client_secret_basic", (client_id, secret) == (self.client_id, self.client_secret)
        known = form.get("client_id") == self.client_id
        if "client_assertion" in form:
            method, holds = self._check_assertion(form["client_assertion"])
            return method, known and holds
        if "client_secret" in form:
            return "client_secret_post", known and form["client_secret"] == self.client_secret
        return "none", known and self.client_secret is None and self.client_key is None

    def _check_assertion(self, assertion: str) -> tuple[str, bool]:
        """Check a client assertion (RFC 7523 §3) ourselves: PyJWT warns about short secrets, which tests may use."""
        try:
            head, payload, signature = assertion.split(".")
            algorithm = jwt.get_unverified_header(assertion)["alg"]
            symmetric = algorithm.startswith("HS")
            credential = self.client_secret if symmetric else self.client_key
            key: Any = credential.encode() if isinstance(credential, str) else credential and credential.public_key()
            genuine = credential is not None and jwt.get_algorithm_by_name(algorithm).verify(
                f"{head}.{payload}".encode(), key, jwt.utils.base64url_decode(signature)
            )
            claims = parse_object(jwt.utils.base64url_decode(payload))
            holds = (
                genuine
                and claims["iss"] == claims["sub"] == self.client_id
                and claims["aud"] in (self.url, f"{self.url}/token")
                and isinstance(claims["jti"], str)
                and claims["iat"] - 10 <= self.now() < claims["exp"]
            )
        except Exception:  # noqa: BLE001  any error means that it is not valid
            return "private_key_jwt", False
        return ("client_secret_jwt" if symmetric else "private_key_jwt"), holds

    def _handler(self) -> type[Handler]:
        issuer = self
        posts = {
            "/token": self.answer_token_request,
            "/auth/device": self.answer_device_request,
            "/revoke": self.answer_revocation,
        }

        class IssuerHandler(Handler):
            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string(issuer.now() if timestamp is None else timestamp)

            def respond(self) -> None:
                issuer.fetches[urlsplit(self.path).path.rpartition("/")[2]] += 1
                if issuer.behaviour.down:
                    self.close_connection = True
                    return
                if issuer.behaviour.fault is not None and issuer.behaviour.fault(self):
                    return
                base = urlsplit(issuer.url).path
                authorization = self.headers.get("Authorization")
                match self.command, urlsplit(self.path).path.removeprefix(base):
                    case "GET", "/.well-known/openid-configuration":
                        self.answer(200, issuer.discovery())
                    case "GET", "/certs":
                        self.answer(200, issuer.jwks())
                    case "POST", path if path in posts:
                        self.answer(*posts[path](authorization, self.read_body()))
                    case "GET", "/auth":
                        query = _parameters(urlsplit(self.path).query)
                        target = issuer.logins.begin_by_browser(issuer.behaviour.login, query)
                        self.answer(303 if target else 400, {}, {"Location": target} if target else {})
                    case _:
                        self.answer(404, {"error": "not found"})

        return IssuerHandler


def _form(body: bytes) -> dict[str, str]:
    return _parameters(body.decode())


def _parameters(query: str) -> dict[str, str]:
    """Return the parameters, with spaces between the values of one that is there several times (RFC 8707 §2)."""
    return {name: " ".join(values) for name, values in parse_qs(query, keep_blank_values=True).items()}
