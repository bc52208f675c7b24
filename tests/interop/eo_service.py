"""A protected service as users of Earth observation data meet them: STAC, processes, rasters, search, uploads.

It names itself in its links by the host that it is called by, as such services do.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.testing import FakeIssuer
from tests.interop.kc_service import serving

SIZE = 8192  # pixels a side of the raster, a byte each: 64 MiB, and its overviews
ITEMS = 5
POLLS = 2
CONFORMANCE = ["core", "item-search", "ogcapi-features"]

PAGE = """<!doctype html><title>page</title><p id="said">nothing yet</p><p id="heard"></p><p id="closed"></p>
<script>
  fetch("/echo", {method: "POST", body: "from the page"})
    .then(answer => answer.text())
    .then(text => { document.getElementById("said").textContent = text; });
  const socket = new WebSocket(`ws://${location.host}/socket`);
  socket.onmessage = message => { document.getElementById("heard").textContent = message.data; };
  socket.onclose = closing => { document.getElementById("closed").textContent = `closed with ${closing.code}`; };
</script>"""


@dataclass(frozen=True)
class Asked:
    """A request, and whether it had a good token and no second one."""

    method: str
    path: str
    status: int
    sent: int
    headers: dict[str, str] = field(repr=False)


@dataclass
class EoService:
    """The service's URLs, without and with TLS, and what it was asked so far.

    With an `audience`, it takes no other tokens. `data_url` is where the assets of its items are, if not here.
    """

    issuer: FakeIssuer
    rasters: Path
    audience: str | None = None
    data_url: str | None = None
    url: str = ""
    tls_url: str = ""
    asked: list[Asked] = field(default_factory=list)
    polls: int = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.info),
                Route("/page", self.page),
                Route("/echo", self.echo, methods=["POST"]),
                WebSocketRoute("/socket", self.socket),
                Route("/upload", self.upload, methods=["PUT", "POST"]),
                Route("/_search", self.search, methods=["GET", "POST"]),
                Route("/stac", self.landing),
                Route("/stac/search", self.items, methods=["GET", "POST"]),
                Route("/stac/collections/c", self.collection),
                Route("/processes/ndvi/execution", self.execute, methods=["POST"]),
                Route("/jobs/1", self.job),
                Route("/jobs/1/results", self.results),
                Mount("/rasters", StaticFiles(directory=self.rasters)),
            ],
            middleware=[Middleware(Doorkeeper, service=self)],
        )

    def info(self, _: Request) -> Response:
        return JSONResponse({"version": {"distribution": "opensearch", "number": "2.0.0"}})

    def page(self, _: Request) -> Response:
        return HTMLResponse(PAGE)

    async def echo(self, request: Request) -> Response:
        return Response(await request.body())

    async def socket(self, socket: WebSocket) -> None:
        # As Jupyter and others do: no pages of other sites.
        if socket.headers["origin"] != f"http://{socket.headers['host']}":
            await socket.close(1008)
            return
        await socket.accept()
        await socket.send_text("from the service")
        await socket.close(1000)

    async def upload(self, request: Request) -> Response:
        digest, length = hashlib.sha256(), 0
        async for part in request.stream():
            digest.update(part)
            length += len(part)
        return JSONResponse({"sha256": digest.hexdigest(), "length": length})

    async def search(self, request: Request) -> Response:
        return JSONResponse({"hits": {"total": {"value": 1}}, "query": (await request.body()).decode()})

    def landing(self, request: Request) -> Response:
        root = f"{request.base_url}stac"
        searches = [link("search", f"{root}/search", "application/geo+json") | {"method": m} for m in ("GET", "POST")]
        links = [link("self", root), link("root", root), *searches]
        links.append(link("data", f"{root}/collections"))
        conforms = [f"https://api.stacspec.org/v1.0.0/{name}" for name in CONFORMANCE]
        return JSONResponse(catalog("Catalog", "catalogue") | {"links": links, "conformsTo": conforms})

    def collection(self, request: Request) -> Response:
        extent = {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}}
        return JSONResponse(catalog("Collection", "c") | {"links": [], "license": "other", "extent": extent})

    async def items(self, request: Request) -> Response:
        asked = await request.json() if request.method == "POST" else request.query_params
        start, limit = int(asked.get("token", 0)), int(asked.get("limit", 2))
        root = f"{request.base_url}stac"
        data_url = self.data_url or root.removesuffix("/stac")
        features = [item(root, data_url, number) for number in range(start, min(start + limit, ITEMS))]
        links = []
        if start + limit < ITEMS:
            following = {"token": str(start + limit), "limit": limit}
            if request.method == "POST":
                links.append(link("next", f"{root}/search") | {"method": "POST", "body": following})
            else:
                links.append(link("next", f"{root}/search?token={start + limit}&limit={limit}") | {"method": "GET"})
        return JSONResponse({"type": "FeatureCollection", "features": features, "links": links})

    async def execute(self, request: Request) -> Response:
        await request.json()
        job = f"{request.base_url}jobs/1"
        headers = {"Location": job, "Preference-Applied": "respond-async"}
        return JSONResponse({"jobID": "1", "status": "accepted", "links": [link("monitor", job)]}, 201, headers)

    def job(self, request: Request) -> Response:
        self.polls += 1
        status = "successful" if self.polls > POLLS else "running"
        return JSONResponse({"jobID": "1", "status": status, "type": "process"})

    def results(self, request: Request) -> Response:
        return JSONResponse({"ndvi": {"href": f"{request.base_url}rasters/large.tif"}})


@dataclass(frozen=True)
class Setup:
    """The service behind both forms of the proxy.

    `url` is the launcher's, which stands for the service; `forward_url` is a proxy for tools that know of proxies, and
    `authority` the CA that these have to trust.
    """

    issuer: FakeIssuer
    service: EoService
    url: str
    forward_url: str
    authority: Path

    def forget_the_last_token(self) -> None:
        """Have the service refuse the token that it was last given, and accept others."""
        self.issuer._issued.pop(self.service.asked[-1].headers["authorization"].removeprefix("Bearer "))


class Doorkeeper:
    """Lets in who has a token of the issuer, and asks the others for a password, as OpenSearch does."""

    def __init__(self, app: ASGIApp, service: EoService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HTTPConnection(scope)
        method = scope.get("method", "WEBSOCKET")
        status, sent = 0, 0

        async def noting(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        given = request.headers.getlist("Authorization")
        token = given[0].removeprefix("Bearer ") if len(given) == 1 else ""
        is_known = self._service.issuer.accepts(token)
        if self._service.audience is not None:
            is_known = is_known and unverified_claims(token)["aud"] == self._service.audience
        is_open = is_known and request.url.path != "/_plugins/_security/api"  # which is for nobody
        challenge = {"WWW-Authenticate": 'Basic realm="OpenSearch Security"'}
        app = self._app if is_open else Response("Unauthorized", 401, challenge)
        await app(scope, receive, noting)
        asked = Asked(method, request.url.path, status, sent, dict(request.headers))
        self._service.asked.append(asked)


def link(rel: str, href: str, media_type: str = "application/json") -> dict[str, Any]:
    return {"rel": rel, "href": href, "type": media_type}


def catalog(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "id": name, "stac_version": "1.0.0", "description": "for tests"}


def item(root: str, data_url: str, number: int) -> dict[str, Any]:
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": f"item-{number}",
        "geometry": {"type": "Point", "coordinates": [8.7, 49.9]},
        "bbox": [8.7, 49.9, 8.7, 49.9],
        "properties": {"datetime": "2026-01-01T00:00:00Z"},
        "links": [link("self", f"{root}/collections/c/items/item-{number}")],
        "assets": {"data": {"href": f"{data_url}/rasters/large.tif"}},
        "collection": "c",
    }


@contextmanager
def running_eo_service(
    issuer: FakeIssuer, rasters: Path, certificate: Path, audience: str | None = None, data_url: str | None = None
) -> Iterator[EoService]:
    service = EoService(issuer, rasters, audience, data_url)
    app = service.app()
    with serving(app) as service.url, serving(app, certificate) as service.tls_url:
        yield service
