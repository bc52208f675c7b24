"""The server on this machine that receives the browser's redirect after a login (RFC 8252 §7.3)."""

import base64
import hashlib
import html
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qsl, urlsplit

from eoepca_security.testing.local_server import Handler, LocalServer

PATH: Final = "/callback"
OUTCOME_TIMEOUT: Final = 30.0
"""How long the browser waits for the result of the login, in seconds."""

_STYLE: Final = (
    ":root{color-scheme:light dark;font:1.1rem/1.5 system-ui,sans-serif}"
    "body{display:grid;place-content:center;min-height:90vh;margin:0 1.5rem;text-align:center}"
    "h1{font-size:1.5rem;margin:0 0 .5rem}p{margin:0;max-width:32rem}"
)
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

    `is_expected` recognizes the right redirect by its query. Other requests are refused and change nothing. Raises
    OSError when the port is in use.
    """

    def __init__(self, port: int = 0) -> None:
        self.is_expected: Callable[[Parameters], bool] = lambda _parameters: False
        self._redirect: Future[Parameters] = Future()
        self._outcome: Future[tuple[bool, str, str]] = Future()
        self._answered = threading.Event()
        self._lock = threading.Lock()
        self._server = LocalServer(self._handler(), port)
        self.redirect_uri = self._server.url + PATH

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

    def _take(self, parameters: Parameters) -> bool:
        with self._lock:
            if self._redirect.done():
                return False
            self._redirect.set_result(parameters)
            return True

    def _handler(self) -> type[Handler]:
        loopback = self

        class Callback(Handler):
            def respond(self) -> None:
                target, own = urlsplit(self.path), urlsplit(loopback.redirect_uri)
                if self.command != "GET":
                    self._show(405, "Method not allowed", "Use GET.")
                elif target.path != own.path or self.headers.get_all("Host") != [own.netloc]:
                    self._show(404, "Page not found", "")
                elif not loopback.is_expected(parameters := _parameters(target.query)):
                    self._show(400, "This is not the expected login", "Start again in the terminal.")
                elif not loopback._take(parameters):
                    self._show(410, "This login is already complete", "See the terminal for the result.")
                else:
                    try:
                        ok, title, text = loopback._outcome.result(OUTCOME_TIMEOUT)
                    except TimeoutError:
                        ok, title, text = False, "The login is taking long", "See the terminal for the result."
                    try:
                        self._show(200 if ok else 400, title, text)
                    finally:
                        loopback._answered.set()

            def _show(self, status: int, title: str, text: str) -> None:
                self.close_connection = True
                allow = {"Allow": "GET"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
                self.answer(status, _page(title, text), _HEADERS | allow)

        return Callback


def _parameters(query: str) -> Parameters:
    try:
        return parse_qsl(query, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        return ()


def _page(title: str, text: str) -> bytes:
    title, text = html.escape(title), html.escape(text)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1><p>{text}</p></main></body>"
        "</html>\n"
    ).encode()
