"""A service behind the proxy as it is behind APISIX: the proxy sends what the gateway would, the scheme believes it."""

import base64
import threading
from collections.abc import Iterator
from typing import Any

import fastapi
import httpx
import pytest
import uvicorn

from eoepca_security import OIDCProxyScheme
from eoepca_security.testing import FakeIssuer
from eoepca_security.testing.local_server import Handler
from tests.support.environment import settings_for
from tests.support.processes import StartProxy
from tests.support.waiting import eventually


class Issuer(FakeIssuer):
    """Gives ID tokens, and claims about the user to who has an access token."""

    def discovery(self) -> dict[str, Any]:
        return super().discovery() | {"userinfo_endpoint": f"{self.url}/userinfo"}

    def answer_token_request(self, authorization: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        status, answer = super().answer_token_request(authorization, body)
        if status == 200:
            answer["id_token"] = self.id_token(answer["access_token"], name="Zoë")
        return status, answer


def userinfo(handler: Handler) -> bool:
    """Answer requests to that endpoint, and leave others to the issuer."""
    if not handler.path.endswith("/userinfo"):
        return False
    known = handler.headers.get("Authorization", "").startswith("Bearer ey")
    handler.answer(200 if known else 401, {"sub": "u-1", "email": "zoe@example"} if known else {})
    return True


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        issuer.behaviour.fault = userinfo
        yield issuer


@pytest.fixture
def service(issuer: Issuer) -> Iterator[str]:
    app = fastapi.FastAPI()
    url, audience = issuer.url, issuer.behaviour.audience
    careful = OIDCProxyScheme(openIdConnectUrl=url, audience=audience)
    trusting = OIDCProxyScheme(
        openIdConnectUrl=url, audience=audience, trust_unsigned_id_token=True, scheme_name="trusting"
    )

    async def careful_route(who: Any = fastapi.Depends(careful)) -> Any:  # noqa: B008  how FastAPI has it
        return {"claims": who["claims"], "id_token": who["id_token"]}

    async def trusting_route(request: fastapi.Request, who: Any = fastapi.Depends(trusting)) -> Any:  # noqa: B008
        return {"claims": who["claims"], "userinfo": request.headers["X-Userinfo"], "raw": who["access_token"]}

    async def socket_route(socket: fastapi.WebSocket, _who: Any = fastapi.Depends(careful)) -> None:  # noqa: B008
        await socket.accept()

    app.websocket("/socket")(socket_route)
    app.get("/careful")(careful_route)
    app.get("/trusting")(trusting_route)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_a_service_behind_a_gateway_can_be_developed_behind_the_proxy(
    start: StartProxy, issuer: Issuer, service: str, client: httpx.Client
) -> None:
    assert client.get(f"{service}/careful").status_code == 401
    proxy = start("launcher", service, settings_for(issuer, PROXY_FORWARD_AS="apisix"))
    # Whatever the client says it is.
    forged = {"X-ID-Token": "e30=", "X_ID_Token": "e30=", "X-Userinfo": "e30="}
    careful = client.get(f"{proxy.url}/careful", headers=forged)
    assert careful.status_code == 200, careful.text
    assert careful.json()["id_token"] is None
    assert (careful.json()["claims"]["sub"], careful.json()["claims"]["preferred_username"]) == ("u-1", "alice")
    trusting = client.get(f"{proxy.url}/trusting", headers=forged).json()
    assert trusting["claims"]["name"] == "Zoë"
    assert base64.b64decode(trusting["userinfo"], validate=True) == b'{"sub":"u-1","email":"zoe@example"}'
    assert issuer.accepts(trusting["raw"])


def test_a_refused_websocket_is_a_refused_handshake_to_its_client(
    issuer: Issuer, service: str, client: httpx.Client
) -> None:
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
    }
    refused = client.get(f"{service}/socket", headers=handshake)
    assert (refused.status_code, refused.content) == (403, b"")
    with client.stream(
        "GET", f"{service}/socket", headers=handshake | {"Authorization": f"Bearer {issuer.issue()}"}
    ) as accepted:
        assert accepted.status_code == 101


@pytest.mark.parametrize("claims", [{"cnf": {"jkt": "x"}}, {"token_use": "id"}])
def test_neither_the_service_nor_the_proxy_accepts_a_token_that_is_bound_to_a_key_or_for_another_use(
    start: StartProxy, issuer: Issuer, service: str, client: httpx.Client, claims: dict[str, Any]
) -> None:
    issuer.behaviour.claims |= claims
    unchecked = start("launcher", service, settings_for(issuer))
    refused = client.get(f"{unchecked.url}/careful")
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')

    checked = start("launcher", service, settings_for(issuer, OPEN_ID_CONNECT_AUDIENCE=issuer.behaviour.audience))
    answer = client.get(f"{checked.url}/careful")
    assert (answer.status_code, answer.headers["X-OIDC-Proxy-Error"]) == (502, "token_invalid")
