"""A service behind a gateway: greets its users, and calls another protected service on their behalf.

The environment configures it, here from a file::

    uv run --env-file .env fastapi dev example/app.py --host=0.0.0.0

`OPEN_ID_CONNECT_URL`, `OPEN_ID_CONNECT_CLIENT_ID` and, if the client has one, `OPEN_ID_CONNECT_CLIENT_SECRET` must be
the gateway's, because the refresh tokens are. `OPEN_ID_CONNECT_AUDIENCE` is this service's audience, by default the
client id. `REMOTE_PROTECTED_ENDPOINT` is the URL to call; without it, the service only greets.

If refresh tokens are valid only once, the gateway and this service must not use the same one: then omit the background
calls.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI

from eoepca_security import (
    Authentication,
    Client,
    CredentialsRejected,
    HttpTransport,
    OIDCProxyScheme,
    Provider,
    SettingsError,
    TokenError,
    TokenSource,
    trust,
)
from eoepca_security.oauth.protocol import TokenResponse

INTERVAL = 20.0
DURATION = 180.0
"""How often and for how long to call the other service after a visit, in seconds."""

MAX_TASKS = 100
"""The maximum number of users with background calls at the same time."""

issuer_url = os.environ.get("OPEN_ID_CONNECT_URL", "")
client_id = os.environ.get("OPEN_ID_CONNECT_CLIENT_ID", "")
client_secret = os.environ.get("OPEN_ID_CONNECT_CLIENT_SECRET") or None
audience = os.environ.get("OPEN_ID_CONNECT_AUDIENCE") or client_id
endpoint = os.environ.get("REMOTE_PROTECTED_ENDPOINT", "")
if not issuer_url or not client_id:
    raise SettingsError("OPEN_ID_CONNECT_URL and OPEN_ID_CONNECT_CLIENT_ID must be set")

logger = logging.getLogger("uvicorn.error")  # fastapi and uvicorn log here
scheme = OIDCProxyScheme(openIdConnectUrl=issuer_url, audience=audience)
context = trust()
provider = Provider(issuer_url, Client(client_id, client_secret), HttpTransport(context))
tasks: dict[str, asyncio.Task[None]] = {}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Stop the background tasks when the service stops."""
    if not os.environ.get("OPEN_ID_CONNECT_AUDIENCE"):
        logger.warning(
            "OPEN_ID_CONNECT_AUDIENCE is not set, so tokens must be for %r: set it to the tokens' audience", audience
        )
    yield
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


app = FastAPI(title="Example behind a gateway", lifespan=lifespan)


@app.get("/")
async def greet(auth: Annotated[Authentication, Depends(scheme)]) -> dict[str, Any]:
    """Greet the caller, call the other service with their token, and keep calling it in the background."""
    claims = auth["claims"]
    name, user = claims.get("preferred_username") or claims["sub"], claims["sub"]
    answer = {"message": f"Hello, {name}!"}
    if endpoint:
        answer["remote"] = await call_endpoint(auth["access_token"])
        if user not in tasks and len(tasks) < MAX_TASKS:
            tasks[user] = asyncio.create_task(keep_calling(user, auth["access_token"], auth["refresh_token"]))
            tasks[user].add_done_callback(lambda _task: tasks.pop(user))
    return answer


async def call_endpoint(access_token: str) -> str:
    """Call the other service and return the outcome, without its body, which may contain tokens."""
    headers = {"Authorization": f"Bearer {access_token}"}
    try:
        # Do not follow redirects: they would send the token elsewhere.
        async with (
            asyncio.timeout(10),
            httpx.AsyncClient(verify=context, follow_redirects=False) as http,
            http.stream("GET", endpoint, headers=headers) as response,
        ):
            return f"answered {response.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        return f"not reached ({type(error).__name__})"


async def keep_calling(user: str, access_token: str, refresh_token: str | None) -> None:
    """Keep calling the other service, with new tokens if there is a refresh token."""

    def request_token(refresh_token: str | None) -> TokenResponse:
        if refresh_token is None:  # otherwise the provider requests a token for the client itself
            raise CredentialsRejected("the access token has expired, and the gateway sent no refresh token")
        return provider.request_token(refresh_token)

    source = TokenSource(request_token, refresh_token=refresh_token, access_token=access_token)
    try:
        async with asyncio.timeout(DURATION):
            while True:
                await asyncio.sleep(INTERVAL)
                token = await source.token()
                logger.info("%s on behalf of %r: %s", endpoint, user, await call_endpoint(token.value))
    except TimeoutError:
        pass
    except TokenError as error:
        logger.warning("no more calls on behalf of %r: %s", user, error)
    await source.finish()
