"""A FastAPI service protected by the scheme under test, and clients that speak ASGI to it."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, Security, WebSocket

from eoepca_security import Authentication, OIDCProxyScheme, require_roles
from eoepca_security.testing import FakeIssuer

Found = dict[str, Any] | None
Headers = Mapping[str, str] | list[tuple[str, str | bytes]]


def make_scheme(issuer: FakeIssuer, **arguments: Any) -> OIDCProxyScheme:
    return OIDCProxyScheme(**{"openIdConnectUrl": issuer.url, "audience": "service", **arguments})


def make_app(scheme: OIDCProxyScheme) -> FastAPI:
    """Return a service whose routes answer with what the scheme found."""
    app = FastAPI()

    @app.get("/")
    async def depends(found: Annotated[Found, Depends(scheme)]) -> Found:
        return found

    @app.get("/scoped")
    async def scoped(found: Annotated[Found, Security(scheme, scopes=["read", "write"])]) -> Found:
        return found

    @app.get("/realm-role")
    async def realm_role(found: Annotated[Found, Depends(require_roles(scheme, "admin", "editor"))]) -> Found:
        return found

    client_role_needed = require_roles(scheme, "admin", client="my-client")

    @app.get("/client-role")
    async def client_role(found: Annotated[Authentication, Security(client_role_needed, scopes=["read"])]) -> Found:
        return found

    @app.get("/open")
    def unprotected() -> str:  # in the thread pool
        return "open"

    @app.websocket("/")
    async def socket(socket: WebSocket, found: Annotated[Found, Depends(scheme)]) -> None:
        await socket.accept()
        await socket.send_json(found)
        await socket.close()

    @app.websocket("/realm-role")
    async def role_socket(socket: WebSocket, found: Annotated[Found, Depends(require_roles(scheme, "admin"))]) -> None:
        await socket.accept()
        await socket.send_json(found)
        await socket.close()

    return app


async def get(app: FastAPI, headers: Headers = (), path: str = "/") -> httpx.Response:  # type: ignore[assignment]
    """Send one request to the service; an exception in it is raised here, as a server would answer it with 500."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        return await client.get(path, headers=[(n.encode(), encode(v)) for n, v in pairs])


def encode(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def open_socket(app: FastAPI, headers: Mapping[str, str], path: str = "/") -> Any:
    """Open a WebSocket; return the JSON that it sends, or the code that it is closed with."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": path,
        "query_string": b"",
        "subprotocols": [],
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    first, *others = sent
    return json.loads(others[0]["text"]) if first["type"] == "websocket.accept" else first["code"]
