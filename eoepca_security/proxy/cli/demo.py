"""The demo: an embedded issuer and protected service on free ports, with the real proxy in front."""

import http.client
import json
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

import click
from mitmproxy.tools.dump import DumpMaster

from eoepca_security.errors import TokenError, TokenInvalid
from eoepca_security.issuer.ca_trust import trust
from eoepca_security.issuer.provider import Provider
from eoepca_security.issuer.transport import HttpTransport
from eoepca_security.oauth.protocol import Client
from eoepca_security.proxy.addons.oidc import OIDCAuthProxy
from eoepca_security.proxy.config.services import default_service
from eoepca_security.proxy.config.settings import Address, Settings
from eoepca_security.proxy.runtime.serve import run as run_proxy
from eoepca_security.testing import Behaviour, FakeIssuer
from eoepca_security.testing.local_server import Handler, LocalServer

AUDIENCE = "demo-service"
ACCESS_TOKEN_LIFETIME = 60


@dataclass(frozen=True)
class Reply:
    """The answer to one request."""

    status: int
    body: str


def run(*, once: bool) -> int:
    """Show that a request is refused without the proxy and accepted through it; return the exit code.

    Stays up until Ctrl-C, unless `once` is true.
    """
    behaviour = Behaviour(
        lifetime=ACCESS_TOKEN_LIFETIME, refresh_tokens="rotate", audience=AUDIENCE, claims={"sub": "demo-user-1"}
    )
    behaviour.claims["preferred_username"] = "demo-user"
    with FakeIssuer(behaviour, client_id="demo-client") as issuer, LocalServer(_service(issuer.url)) as service:
        settings = Settings(
            issuer_url=issuer.url,
            client=Client("demo-client"),
            refresh_token=issuer.refresh_token,
            audience=AUDIENCE,
            upstream=service.url,
            services=(default_service(service.url, audience=AUDIENCE),),
            port=0,
            admin=Address("127.0.0.1", 0),
        )
        shown: list[bool] = []

        def started(master: DumpMaster, proxy_url: str, _error: TokenError | None) -> None:
            # The requests block, and the proxy that answers them runs in this thread.
            addon = master.addons.get("oidcauthproxy")
            page = addon.lifecycle.status_page if isinstance(addon, OIDCAuthProxy) else None
            threading.Thread(target=show, args=(master, proxy_url, page), daemon=True).start()

        def show(master: DumpMaster, proxy_url: str, page: str | None) -> None:
            try:
                shown.append(_show(issuer.url, service.url, proxy_url, page))
                if not once and shown[0]:
                    click.echo("\nThe demo stays up until you press Ctrl-C.")
            finally:
                if once or shown != [True]:
                    master.shutdown()

        code = run_proxy(settings, on_started=started)
        return code if shown == [True] else 1


def _show(issuer_url: str, service_url: str, proxy_url: str, status_page: str | None) -> bool:
    click.echo(
        f"identity provider  {issuer_url}\n"
        f"protected service  {service_url}  (requires an access token)\n"
        f"proxy              {proxy_url}  (adds one)\n"
        f"its status page    {status_page}\n"
    )
    refused = _try("1. without the proxy, the service refuses the request:", service_url)
    accepted = _try("2. through the proxy, it accepts it and knows the user:", proxy_url)
    ok = (refused.status, accepted.status) == (401, 200)
    click.echo("It works." if ok else "This is not the expected result: please report it.")
    return ok


def _try(title: str, url: str) -> Reply:
    # Connect directly: a proxy from the environment must not handle loopback addresses.
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("GET", "/whoami")
    response = connection.getresponse()
    reply = Reply(response.status, response.read().decode())
    connection.close()
    click.echo(f"{title}\n   curl -i {url}/whoami\n   -> {reply.status} {reply.body.strip()}\n")
    return reply


def _service(issuer_url: str) -> type[Handler]:
    provider = Provider(issuer_url, Client("demo-service"), HttpTransport(trust()))

    class Service(Handler):
        def respond(self) -> None:
            self.read_body()
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not token:
                self.answer(401, {"error": "an access token is required"}, {"WWW-Authenticate": "Bearer"})
                return
            try:
                claims = provider.verify(token, AUDIENCE)
            except TokenInvalid as error:
                self.answer(401, {"error": str(error)}, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
            except TokenError as error:
                self.answer(503, {"error": str(error)})
            else:
                body = {"hello": claims["preferred_username"], "sub": claims["sub"], "token_ends": claims["exp"]}
                self.answer(200, json.dumps(body).encode() + b"\n")

    return Service
