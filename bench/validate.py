"""Compare the cost of a verification with PyJWT alone, fastapi-azure-auth and Authlib.

    uv run --group bench bench/validate.py

All verify the same RS256 token with the same cached key, in alternating rounds, so that a busy machine affects all
equally. The results are medians, and ratios to `jwt.decode`; below 1 is faster.
"""

import asyncio
import importlib.metadata
import platform
import statistics
import time
import warnings
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

import jwt
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import SecurityScopes
from fastapi_azure_auth import SingleTenantAzureAuthorizationCodeBearer
from starlette.requests import HTTPConnection, Request

from eoepca_security import OIDCProxyScheme
from eoepca_security.oauth.verify import Policy, TrustedKeys, read_access_token, read_keys
from eoepca_security.testing import FakeIssuer

with warnings.catch_warnings():
    import authlib.deprecate  # noqa: F401  turns on the warning that the next line ignores

    warnings.simplefilter("ignore")  # Authlib asks to move on to joserfc
    from authlib.jose import JsonWebKey, JsonWebToken

ROUNDS = 41
CALLS = 200
REQUIRED = ["exp", "iss", "sub", "aud"]


def make_claims(issuer: FakeIssuer) -> dict[str, Any]:
    """Return the claims of a Keycloak access token, with the additional claims of Entra's."""
    now = int(time.time())
    return {
        "exp": now + 3600,
        "iat": now,
        "nbf": now,
        "jti": "onrtro:8a5c1d0e-5f1e-4b52-a0a6-2a35ad8b6b4c",
        "iss": issuer.url,
        "aud": "service",
        "sub": "6f0c2c1a-6d53-4d37-9a3b-4b8c3c2f1e55",
        "typ": "Bearer",
        "azp": "gateway",
        "sid": "d2a7c1de-3b0c-4d5b-8a43-1f1c5c8f7f3a",
        "acr": "1",
        "allowed-origins": ["https://portal.example"],
        "realm_access": {"roles": ["default-roles-eoepca", "offline_access", "uma_authorization"]},
        "resource_access": {"account": {"roles": ["manage-account", "view-profile"]}},
        "scope": "openid email profile",
        "email_verified": True,
        "name": "Alice Example",
        "preferred_username": "alice",
        "email": "alice@example.org",
        "tid": "tenant",
        "ver": "2.0",
    }


def measure(contenders: dict[str, Callable[[], object]], base: str, unit: str) -> None:
    """Time all alternately, and print medians and ratios."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        for _ in range(CALLS):
            contender()
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                contender()
            times[name].append((time.perf_counter() - start) / CALLS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        ratio = f"{seconds / medians[base]:8.2f}"
        print(f"  {name:44} {seconds * 1e6:8.1f} us {1 / seconds:9.0f} {unit}/s {ratio}")


def run(awaitable_of: Callable[[], Awaitable[object]], loop: asyncio.AbstractEventLoop) -> Callable[[], object]:
    """Return a call that runs a coroutine on a loop, which costs the same for all."""

    async def once() -> object:
        return await awaitable_of()

    return lambda: loop.run_until_complete(once())


def main() -> None:
    """Run everything once and print it."""
    with FakeIssuer(algorithm="RS256") as issuer:
        loop = asyncio.new_event_loop()
        try:
            compare(issuer, loop)
        finally:
            loop.close()


def compare(issuer: FakeIssuer, loop: asyncio.AbstractEventLoop) -> None:
    """Compare verifications, then whole requests."""
    packages = ("eoepca-security", "pyjwt", "cryptography", "fastapi", "fastapi-azure-auth", "authlib")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages))
    token = issuer.sign(make_claims(issuer))
    (document,) = issuer.jwks()["keys"]
    public = jwt.PyJWK(document)
    headers = [(b"host", b"service"), (b"authorization", f"Bearer {token}".encode())]
    policy, keys = Policy("service"), TrustedKeys(issuer.url, read_keys(issuer.jwks()))
    scheme = OIDCProxyScheme(openIdConnectUrl=issuer.url, audience="service")

    azure = SingleTenantAzureAuthorizationCodeBearer(app_client_id="service", tenant_id="tenant", leeway=10)
    azure.openid_config.issuer = issuer.url
    azure.openid_config.signing_keys = {issuer.kid: public.key}
    azure.openid_config._config_timestamp = datetime.now()  # as after its first fetch

    authlib, authlib_key = JsonWebToken(["RS256"]), JsonWebKey.import_key(document)
    options = {
        "iss": {"essential": True, "value": issuer.url},
        "aud": {"essential": True, "value": "service"},
        "sub": {"essential": True},
        "exp": {"essential": True},
    }

    def with_pyjwt(key: Any = public) -> dict[str, Any]:
        return jwt.decode(
            token,
            key,
            algorithms=["RS256"],
            audience="service",
            issuer=issuer.url,
            leeway=10,
            options={"require": REQUIRED},
        )

    def with_authlib() -> dict[str, Any]:
        claims: Any = authlib.decode(token, authlib_key, claims_options=options)
        claims.validate(leeway=10)
        return dict(claims)

    def with_ours() -> dict[str, Any] | None:
        return keys.confirm(read_access_token(token, policy, now=time.time()))

    def connection() -> Request:
        return Request({"type": "http", "headers": headers, "state": {}})

    assert with_ours() == with_pyjwt() == with_pyjwt(public.key) == with_authlib()
    print(f"\nA verification ({len(token)} characters):")
    measure(
        {
            "jwt.decode, cached key": with_pyjwt,
            "jwt.decode, cached key without its JWK": lambda: with_pyjwt(public.key),
            "Authlib, cached key": with_authlib,
            "eoepca_security.oauth.verify": with_ours,
        },
        "jwt.decode, cached key",
        "token",
    )

    async def bare(request: Request) -> dict[str, Any]:
        word, _, value = request.headers.get("Authorization", "").partition(" ")
        if word.lower() != "bearer" or value != token:
            raise HTTPException(401)
        return with_pyjwt()

    print("\nThe dependency alone:")
    measure(
        {
            "jwt.decode in a function": run(lambda: bare(connection()), loop),
            "fastapi-azure-auth": run(lambda: azure(connection(), SecurityScopes()), loop),
            "OIDCProxyScheme": run(
                lambda: scheme(HTTPConnection({"type": "http", "headers": headers}), SecurityScopes()), loop
            ),
        },
        "jwt.decode in a function",
        "call",
    )

    async def nobody() -> None:
        return None

    def whole_request(dependency: Callable[..., Any]) -> Callable[[], object]:
        app = make_app(dependency)
        return run(lambda: request(app, headers), loop)

    print("\nA whole request through FastAPI (the difference to the first line is the added latency):")
    measure(
        {
            "no authentication": whole_request(nobody),
            "jwt.decode in a function": whole_request(bare),
            "fastapi-azure-auth": whole_request(azure),
            "OIDCProxyScheme": whole_request(scheme),
        },
        "jwt.decode in a function",
        "request",
    )
    assert issuer.fetches == {"openid-configuration": 1, "certs": 1}


def make_app(dependency: Callable[..., Any]) -> FastAPI:
    """Return an application with one route."""
    app = FastAPI()

    @app.get("/")
    async def root(_found: Annotated[Any, Depends(dependency)]) -> None:
        return None

    return app


async def request(app: FastAPI, headers: list[tuple[bytes, bytes]]) -> None:
    """Send one request; raises AssertionError unless it is answered with 200."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers, "state": {}}
    await app(scope, receive, send)


if __name__ == "__main__":
    main()
