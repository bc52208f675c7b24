"""The server on this machine that sends the browser to the issuer and receives its redirect (RFC 8252 §7.3)."""

import base64
import hashlib
import html
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from email.message import Message
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qsl, urlsplit

from eoepca_security.proxy.admin.page import RESOURCES
from eoepca_security.testing.local_server import Handler, LocalServer

PATH: Final = "/callback"
_START: Final = "/login/"
OUTCOME_TIMEOUT: Final = 30.0
"""How long the browser waits for the result of the login, in seconds."""

_STYLE: Final = RESOURCES["/status.css"][1].decode()
_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Connection": "close",
}

Parameters = Sequence[tuple[str, str]]


class RedirectServer:
    """A server on a loopback port (0: any free port) that accepts one redirect, for the duration of its `with` block.

    `is_expected` recognizes the right redirect by its query. Only a browser that opens a page is answered, not one that
    embeds, fetches or preloads. Other requests are refused and change nothing. Raises OSError when the port is in use.
    """

    def __init__(self, port: int = 0) -> None:
        self.is_expected: Callable[[Parameters], bool] = lambda _parameters: False
        self._redirect: Future[Parameters] = Future()
        self._outcome: Future[tuple[bool, str, str]] = Future()
        self._answered = threading.Event()
        self._lock = threading.Lock()
        self._starts: dict[str, str | None] = {}
        self._server = LocalServer(type("Callback", (_Callback,), {"loopback": self}), port)
        self.redirect_uri = self._server.url + PATH

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return self._server.port

    def one_time_address(self, url: str) -> str:
        """Return an address of this server that redirects to `url` once.

        The command line of a browser shows the address that it was started with to all users of the machine.
        """
        path = _START + secrets.token_urlsafe(24)
        self._starts[path] = url
        return self._server.url + path

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._outcome.done():
            self._answered.wait(OUTCOME_TIMEOUT)
        self._server.__exit__(kind, error, trace)

    def wait(self, timeout: float) -> Parameters:
        """Return the query of the redirect while the browser waits; raises TimeoutError after `timeout` seconds."""
        return self._redirect.result(timeout)

    def finish(self, title: str, text: str, *, ok: bool) -> None:
        """Show the result in the waiting browser."""
        self._outcome.set_result((ok, title, text))

    def _start(self, path: str) -> str | None:
        with self._lock:
            url, self._starts[path] = self._starts[path], None
            return url

    def _take(self, parameters: Parameters) -> bool:
        with self._lock:
            if self._redirect.done():
                return False
            self._redirect.set_result(parameters)
            return True


class _Callback(Handler):
    loopback: RedirectServer

    def respond(self) -> None:
        if self.command != "GET":
            self._show(405, "Method not allowed", "Use GET.")
        elif self.headers.get_all("Host") != [urlsplit(self.loopback.redirect_uri).netloc]:
            self._show(404, "Page not found", "")
        elif not _opens_a_page(self.headers):
            self._show(403, "This address only opens as a page", "")
        elif self.path in self.loopback._starts:
            self._send_on(self.loopback._start(self.path))
        elif urlsplit(self.path).path == PATH:
            self._come_back(_parameters(urlsplit(self.path).query))
        else:
            self._show(404, "Page not found", "")

    def _send_on(self, url: str | None) -> None:
        if url is None:
            text = "If you did not open it, press Ctrl-C in the terminal, and start again."
            self._show(410, "This address works only once", text)
        else:
            self.close_connection = True
            self.answer(302, b"", _HEADERS | {"Location": url})

    def _come_back(self, parameters: Parameters) -> None:
        if not self.loopback.is_expected(parameters):
            self._show(400, "This is not the expected login", "Start again in the terminal.")
        elif not self.loopback._take(parameters):
            self._show(410, "This login is already complete", "See the terminal for the result.")
        else:
            try:
                ok, title, text = self.loopback._outcome.result(OUTCOME_TIMEOUT)
            except TimeoutError:
                ok, title, text = False, "The login is taking long", "See the terminal for the result."
            try:
                self._show(200 if ok else 400, title, text)
            finally:
                self.loopback._answered.set()

    def _show(self, status: int, title: str, text: str) -> None:
        self.close_connection = True
        allow = {"Allow": "GET"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
        self.answer(status, _page(title, text, is_good=status == HTTPStatus.OK), _HEADERS | allow)


def _opens_a_page(headers: Message) -> bool:
    """Return whether the browser will show the answer as a page (W3C Fetch Metadata). Old browsers do not say."""
    return headers.get_all("Sec-Fetch-Dest") in (None, ["document"]) and "Sec-Purpose" not in headers


def _parameters(query: str) -> Parameters:
    try:
        return parse_qsl(query, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        return ()


def _page(title: str, text: str, *, is_good: bool) -> bytes:
    """Return a page that looks like the status page."""
    title, text = html.escape(title), html.escape(text)
    tone, sign = ("good", "\N{CHECK MARK}") if is_good else ("bad", "\N{MULTIPLICATION X}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} - OIDC proxy</title>
<style>{_STYLE}</style>
</head>
<body>
<h1><span>OIDC proxy</span> Login</h1>
<div class="box {tone}" role="status">
<p><span class="sign" aria-hidden="true">{sign}</span> <strong>{title}</strong> {text}</p>
</div>
</body>
</html>
""".encode()
