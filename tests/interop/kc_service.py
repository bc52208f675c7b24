"""A protected service that judges access tokens with PyJWT alone, so it shares no fault with the code under test."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.types import ASGIApp

STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Seen:
    """One request as the service judged it; `fault` is None when the token was accepted."""

    path: str
    fault: str | None
    jti: str | None


@dataclass(frozen=True)
class Service:
    """A running service and every request it got, oldest first."""

    url: str
    seen: list[Seen]

    def faults(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.fault is not None]


@dataclass(frozen=True)
class Judge:
    """Verifies `Authorization` against an issuer's keys, with no leeway on the clock."""

    issuer: str
    audience: str
    keys: jwt.PyJWKClient

    def claims(self, authorization: list[str]) -> dict[str, Any]:
        """The token's claims; raise PyJWTError when there is not exactly one good token."""
        if len(authorization) != 1:
            raise jwt.InvalidTokenError(f"{len(authorization)} Authorization headers")
        scheme, _, token = authorization[0].partition(" ")
        if scheme != "Bearer":
            raise jwt.InvalidTokenError("not a Bearer token")
        return jwt.decode(
            token,
            self.keys.get_signing_key_from_jwt(token).key,
            algorithms=["RS256"],
            issuer=self.issuer,
            audience=self.audience,
            leeway=0,
            options={"require": ["aud", "exp", "iat", "iss", "jti", "sub"]},
        )


def build_app(judge: Judge, seen: list[Seen]) -> FastAPI:
    """The service: `GET /whoami` tells the caller who the token says it is."""
    app = FastAPI()

    @app.get("/whoami")
    def whoami(request: Request) -> dict[str, Any]:
        try:
            claims = judge.claims(request.headers.getlist("authorization"))
        except jwt.PyJWTError as error:
            seen.append(Seen(request.url.path, f"{type(error).__name__}: {error}", None))
            raise HTTPException(401, str(error), {"WWW-Authenticate": "Bearer"}) from error
        seen.append(Seen(request.url.path, None, claims["jti"]))
        return {
            "username": claims.get("preferred_username"),
            **{name: claims.get(name) for name in ("sub", "azp", "exp", "iat", "jti")},
        }

    return app


@contextmanager
def serving(app: ASGIApp, certificate: Path | None = None) -> Iterator[str]:
    """Run an application in a thread on a free loopback port, over TLS with a certificate; yields its URL."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="wsproto", ssl_certfile=certificate)
    server = uvicorn.Server(config)
    # The socket listens before the thread runs: a client that is early waits in its queue.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"{'https' if certificate else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)


@contextmanager
def running_service(issuer: str, audience: str) -> Iterator[Service]:
    """Run the service in a thread on a free loopback port."""
    discovery = httpx.get(f"{issuer}/.well-known/openid-configuration", trust_env=False).raise_for_status().json()
    seen: list[Seen] = []
    with serving(build_app(Judge(issuer, audience, jwt.PyJWKClient(discovery["jwks_uri"])), seen)) as url:
        yield Service(url, seen)
