"""The admin listener: probes, metrics, the status page and the shutdown endpoint."""

import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from mitmproxy.log import ALERT
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from eoepca_security.oauth.text import printable
from eoepca_security.oauth.urls import EVERYWHERE, LOOPBACK_NAMES, is_loopback
from eoepca_security.proxy.admin.metrics import exposition
from eoepca_security.proxy.admin.page import RESOURCES, page
from eoepca_security.proxy.admin.status import AdminSource
from eoepca_security.proxy.config.port_check import bind_host
from eoepca_security.proxy.config.settings import Address, Settings
from eoepca_security.proxy.config.variables import ADMIN
from eoepca_security.proxy.policy import problem_details
from eoepca_security.proxy.policy.access import Guard, listed

MAX_SIZE: Final = 16 * 1024
"""The longest header block and the longest body to read, in bytes."""

TIMEOUT: Final = 30.0
"""Seconds that a connection may be idle, or may take to send a request's headers."""

_NOTHING_ELSE: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": _NOTHING_ELSE,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


logger = logging.getLogger(__name__)


class Admin:
    """The server, which runs in the proxy's event loop."""

    def __init__(self, settings: Settings, subject: AdminSource) -> None:
        if settings.admin is None:
            raise ValueError("the settings turn the admin listener off")
        self._address = settings.admin
        self._is_set = settings.admin_is_set
        arguments = {"guard": admin_guard(settings, settings.admin), "subject": subject}
        pages = (("/", _Home), ("/livez", _Live), ("/readyz", _Ready), ("/metrics", _Metrics), ("/status", _Status))
        handlers: list[Any] = [(path, page, arguments) for path, page in (*pages, ("/quitquitquit", _Quit))]
        handlers += [(path, _Resource, arguments) for path in RESOURCES]
        self._server = HTTPServer(
            Application(
                handlers,
                default_handler_class=_Nothing,
                default_handler_args=arguments,
                log_function=lambda _handler: None,
            ),
            max_header_size=MAX_SIZE,
            max_body_size=MAX_SIZE,
            idle_connection_timeout=TIMEOUT,
            body_timeout=TIMEOUT,
        )

    def start(self) -> Address | None:
        """Listen and return the address, with the actual port; None if that fails."""
        try:
            sockets = bind_sockets(self._address.port, bind_host(self._address.host))
        except OSError as error:
            reason = f"{ADMIN.env}: cannot listen on {self._address} ({error.strerror or error})"
            if self._is_set:
                logger.error("%s: choose another address, or off", reason)  # noqa: TRY400  users need no traceback
            else:
                logger.warning("%s: continuing without the admin listener", reason)
            return None
        self._server.add_sockets(sockets)
        address = Address(self._address.host, sockets[0].getsockname()[1])
        logger.log(ALERT, "admin listener at http://%s", address)
        if not is_loopback(address.host):
            logger.warning("anything that can reach http://%s can see the proxy's state and stop it", address)
        return address

    def stop(self) -> None:
        """Stop listening. Connections end with the process."""
        self._server.stop()


def admin_guard(settings: Settings, address: Address) -> Guard:
    """Return the access rules of the admin listener.

    Probes use a pod's IP address, so a listener on all addresses accepts any IP address as `Host`. That is safe: a GET
    changes nothing here, and a POST from a web page names its origin.
    """
    is_everywhere = address.host in EVERYWHERE
    own = () if is_everywhere else (f"[{address.host}]" if ":" in address.host else address.host,)
    return Guard((*LOOPBACK_NAMES, *own, *settings.allowed_hosts), settings.allowed_origins, ip_addresses=is_everywhere)


class _Page(RequestHandler):
    allow = "GET, HEAD"

    def initialize(self, guard: Guard, subject: AdminSource) -> None:
        self.guard = guard
        self.subject = subject

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        values = self.request.headers.get_list
        if refusal := self.guard.refusal("http", values("Host"), values):
            self.tell(*problem_details.parts(refusal.code, refusal.detail))

    def tell(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.set_status(status)
        for name, value in headers.items():
            self.set_header(name, value)
        self.finish(body)

    def text(self, text: str, media_type: str = "text/plain; charset=utf-8") -> None:
        self.tell(200, {"Content-Type": media_type}, text.encode())

    def write_error(self, status_code: int, **_: Any) -> None:
        if status_code == 405:
            status, headers, body = problem_details.parts("method_not_allowed", f"this page takes {self.allow} only")
            self.tell(status, headers | {"Allow": self.allow}, body)
            return
        headers = {"Content-Type": "application/problem+json"}
        self.tell(status_code, headers, json.dumps({"status": status_code, "title": self._reason}).encode())

    async def head(self) -> None:
        # Tornado omits the body.
        await self.get()  # type: ignore[misc]


class _Nothing(_Page):
    def prepare(self) -> None:
        super().prepare()
        if not self._finished:
            raise HTTPError(404)


class _Live(_Page):
    async def get(self) -> None:
        self.text("ok\n")


class _Ready(_Page):
    async def get(self) -> None:
        named = self.get_query_arguments("service")
        if len(named) > 1:
            self.tell(*problem_details.parts("bad_request", "service: name one service, not several"))
            return
        names, name = self.subject.services(), named[0] if named else None
        if name is not None and name not in names:
            known = f"use {listed(names)}" if names else "there is none"
            self.tell(*problem_details.unknown_service(f"{printable(name, 80)!r} is not a service: {known}", names))
            return
        if error := await self.subject.ready(name):
            self.tell(*problem_details.parts(error.code, error.detail, status=503))
        else:
            self.text("ok\n")


class _Metrics(_Page):
    async def get(self) -> None:
        body, media_type = exposition(await self.subject.families(), self.request.headers.get("Accept", ""))
        self.tell(200, {"Content-Type": media_type}, body)


class _Status(_Page):
    async def get(self) -> None:
        self.text(json.dumps(await self.subject.status(), indent=2) + "\n", "application/json")


class _Home(_Page):
    async def get(self) -> None:
        own = "img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'"
        self.set_header("Content-Security-Policy", f"{_NOTHING_ELSE}; {own}")
        self.text(page(await self.subject.status()), "text/html; charset=utf-8")


class _Resource(_Page):
    async def get(self) -> None:
        media_type, content = RESOURCES[self.request.path]
        self.tell(200, {"Content-Type": media_type}, content)


class _Quit(_Page):
    allow = "POST"

    async def head(self) -> None:
        raise HTTPError(405)

    async def post(self) -> None:
        self.text("ending\n")
        self.subject.quit()
