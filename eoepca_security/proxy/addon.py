"""The mitmproxy add-on: options -> TokenSource -> Authorization header.

A hook that raises forwards the request as it is, and one that hangs hangs the client; so every hook that decides about
a request stands inside one `try`, and waits with a bound.
"""

import asyncio
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from mitmproxy import ctx
from mitmproxy.addonmanager import Loader, traverse
from mitmproxy.addons.clientplayback import ReplayHandler
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.exceptions import OptionsError
from mitmproxy.http import HTTPFlow, Response
from mitmproxy.log import ALERT
from mitmproxy.master import Master
from mitmproxy.proxy.mode_specs import ProxyMode, ReverseMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from eoepca_security.errors import CredentialsRejected, IssuerUnavailable, SettingsError, TokenError
from eoepca_security.protocol import is_loopback, printable
from eoepca_security.proxy import problem
from eoepca_security.proxy.settings import OPTIONS, Settings, read_dotenv, read_settings
from eoepca_security.proxy.wiring import make_source
from eoepca_security.session import AccessToken
from eoepca_security.source import TokenSource
from eoepca_security.verify import unverified_claims

MAX_REPLAYED_BODY: Final = 1024 * 1024
"""Longest request body, in bytes, that is sent again when the service refuses the token."""

# mitmproxy's own options that would undo what this add-on is for.
_REFUSED_OPTIONS: Final = {
    "allow_hosts": "connections to other hosts would bypass the add-on",
    "ignore_hosts": "connections to these hosts would bypass the add-on",
    "map_remote": "it would carry the token elsewhere",
    "proxy_debug": "it would show the token",
    "stickyauth": "it would overwrite the token",
    "stream_large_bodies": "error answers to large requests would hang",
    "tcp_hosts": "connections to these hosts would bypass the add-on",
    "upstream_auth": "it would overwrite the token",
}

# And those whose defaults do not suit a proxy that adds credentials.
_PREFERRED_OPTIONS: Final = {
    "connection_strategy": "lazy",  # eager gives the client an empty reply when the service is down
    "onboarding": False,  # mitm.it would be answered by mitmproxy itself
    "rawtcp": False,  # what is not HTTP cannot carry a token
}

_OPTION_NAMES: Final = frozenset(str(variable.option) for variable in OPTIONS)

logger = logging.getLogger(__name__)


class OIDCAuthProxy:
    """Puts an access token into every request that goes to the protected service, and answers those it has none for.

    `settings` come from the launcher; without them they are read from the add-on's options, the environment and `.env`.
    `on_started` is called once with the proxy's URL and what kept the first token from coming, if anything did.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        on_started: Callable[[str, TokenError | None], None] | None = None,
    ) -> None:
        self._given = settings
        self._on_started = on_started or _exit_if_rejected
        self._settings: Settings | None = None
        self._source: TokenSource | None = None
        self._settings_problems: list[str] | None = None
        self._problems: list[str] = []
        self._running = False

    def load(self, loader: Loader) -> None:
        """Declare the options: all are strings, as a mistyped value of another type would unload the add-on."""
        for variable in OPTIONS:
            loader.add_option(str(variable.option), str, "", f"{variable.help} Otherwise {variable.env} is used.")
        loader.master.options.update_known(**_PREFERRED_OPTIONS)

    def configure(self, updated: set[str]) -> None:
        """Read the settings; what is wrong ends the start, and later is refused so that the old ones stay."""
        # Only when they may have changed: this is called for every option, and a secret's file may be a pipe.
        if self._settings_problems is None or not _OPTION_NAMES.isdisjoint(updated):
            self._read_settings()
        problems = _problems_with_mitmproxy_options() + (self._settings_problems or [])
        if problems and self._running:
            raise OptionsError("; ".join(problems))
        self._problems = problems

    def _read_settings(self) -> None:
        try:
            settings = self._given or read_settings(
                os.environ,
                dotenv=read_dotenv(Path.cwd()),
                options={name: getattr(ctx.options, name) for name in _OPTION_NAMES},
                need_upstream=False,
            )
        except SettingsError as error:
            self._settings_problems = list(error.problems)
            return
        self._settings_problems = []
        if settings == self._settings:
            return
        before = self._source
        # A new source would forget what is kept in memory only.
        goes_on = self._settings is not None and self._settings.login == settings.login
        self._settings, self._source = settings, make_source(settings, continues=before if goes_on else None)
        if before is not None:
            before.retire()

    def running(self) -> "asyncio.Task[None]":
        """Begin the first refresh.

        This is no coroutine function, because mitmproxy refuses those where it reloads a script that was edited.
        """
        self._running = True
        return asyncio.get_running_loop().create_task(self._start())

    def done(self) -> "asyncio.Task[None] | None":
        """Give a refresh that is under way a moment to end, and end mitmproxy when it is the add-on alone that ends.

        A script that is edited badly is unloaded, and requests would go on without tokens.
        """
        master = ctx.master
        if self._running and not master.should_exit.is_set():
            # A script that is edited well is loaded anew before the loop comes to this.
            master.event_loop.call_soon(_exit_if_unprotected, master)
        return asyncio.get_running_loop().create_task(self._source.finish()) if self._source is not None else None

    async def requestheaders(self, flow: HTTPFlow) -> None:
        """Authorize the request before any of it leaves."""
        # mitmproxy calls this for requests that it has refused already, too.
        if flow.error is None and flow.response is None:
            await self._authorize(flow)

    async def request(self, flow: HTTPFlow) -> None:
        """Authorize again what was held back until its body was complete: the token may have ended meanwhile."""
        if flow.error is None and flow.response is None and not flow.request.stream:
            await self._authorize(flow)

    async def response(self, flow: HTTPFlow) -> None:
        """Ask the service again, once and with another token, when it refuses this one."""
        if flow.response is None or flow.response.status_code != 401 or flow.is_replay or self._source is None:
            return
        if flow.request.stream or flow.response.stream or len(flow.request.raw_content or b"") > MAX_REPLAYED_BODY:
            return
        try:
            refused = flow.request.headers.get("Authorization", "").removeprefix("Bearer ")
            if await self._source.replace(refused) is None:
                return
            again = flow.copy()
            again.response = again.error = None
            again.is_replay = "request"
            # Runs all hooks, so the request is authorized anew.
            await ReplayHandler(again, ctx.options).replay()
            flow.response = again.response or flow.response
        except TokenError as error:
            logger.info("the service refused the token, and there is no other: %s", error)
        except Exception as error:  # noqa: BLE001  the client still has the service's own answer
            logger.warning("a refused request was not repeated because of an unexpected %s", type(error).__name__)

    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        """Say what keeps requests from the service; the client gets mitmproxy's 502."""
        logger.warning("the protected service cannot be reached: %s", printable(data.server.error))

    async def _authorize(self, flow: HTTPFlow) -> None:
        # Whatever goes wrong: without a token nothing leaves. Requests are answered, never killed: mitmproxy 12 leaves
        # the connection open when it kills a request whose body is still arriving, and its client hangs.
        flow.response = problem.LAST_RESORT.copy()
        if not _is_one_request(flow):
            flow.response = Response.make(400, b"the request is not well-formed\n")
            return
        try:
            token = await self._token(flow)
        except TokenError as error:
            retry_after = self._source.retry_after() if self._source else 1.0
            flow.response = problem.answer(error, method=flow.request.method, retry_after=retry_after)
        else:
            flow.request.headers["Authorization"] = f"Bearer {token.value}"
            if not (flow.request.is_http2 or flow.request.is_http3):
                # An absolute target (RFC 9112 §3.2.2) would be forwarded with the token, and names any host.
                flow.request.authority = ""
            flow.response = None

    async def _token(self, flow: HTTPFlow) -> AccessToken:
        if self._source is None:
            raise IssuerUnavailable("the proxy is not configured")
        if not _is_protected(flow.client_conn.proxy_mode):
            raise IssuerUnavailable("the proxy does not work in this mode")
        try:
            return await self._source.token()
        except TokenError:
            raise
        except Exception as error:
            raise IssuerUnavailable(f"unexpected {type(error).__name__}") from error

    async def _start(self) -> None:
        # With -s an unknown option is put aside without a word.
        unknown = [f"{name}: there is no such option" for name in ctx.options.deferred if name.startswith("oidc_")]
        for line in self._problems + unknown:
            logger.error("%s", line)  # mitmproxy ends with exit code 1 when an error is logged while it starts
        if self._problems or unknown or self._source is None or self._settings is None:
            return
        for line in self._settings.warnings:
            logger.warning("%s", line)
        listener, upstream = _addresses()
        if not is_loopback(urlsplit(listener).hostname):
            logger.warning("whatever can reach %s acts with this identity: listen on 127.0.0.1 if you can", listener)
        # mitmproxy does not end before this does, so whoever stops it now would wait for a silent issuer.
        first = asyncio.ensure_future(self._source.token())
        stopped = asyncio.ensure_future(ctx.master.should_exit.wait())
        await asyncio.wait({first, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not first.done():
            first.cancel()
            return
        failure: TokenError | None = None
        try:
            token = first.result()
        except TokenError as error:
            failure = error
            if not isinstance(error, CredentialsRejected):
                logger.log(ALERT, "OIDC proxy listening at %s -> %s, without a token yet", listener, upstream)
        else:
            logger.log(
                ALERT,
                "OIDC proxy listening at %s -> %s as %s; access tokens live %d s",
                listener,
                upstream,
                identity(token),
                math.ceil(token.ends_at - token.obtained_at),
            )
        self._on_started(listener, failure)


def identity(token: AccessToken) -> str:
    """Say whose token this is, as far as it tells; for people to read, not for deciding anything."""
    claims = unverified_claims(token.value)
    name, subject = claims.get("preferred_username"), claims.get("sub")
    if not isinstance(name, str):
        return printable(subject) if isinstance(subject, str) else "someone (the token does not say)"
    return f"{printable(name)} (sub {printable(subject)})" if isinstance(subject, str) else printable(name)


def _exit_if_rejected(_listener: str, failure: TokenError | None) -> None:
    if isinstance(failure, CredentialsRejected):
        logger.error("%s: %s", failure.code, failure)


def _exit_if_unprotected(master: Master) -> None:
    if not any(isinstance(addon, OIDCAuthProxy) for addon in traverse(master.addons.chain)):
        logger.error("the OIDC add-on was unloaded: ending, as requests would be forwarded without tokens")
        master.shutdown()


def _is_one_request(flow: HTTPFlow) -> bool:
    """Tell whether it stays one request as HTTP/1; mitmproxy 11 lets line breaks from HTTP/2 pass."""
    request = flow.request.data
    return (
        re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", request.method) is not None
        and re.fullmatch(rb"\*|/[^\x00-\x20\x7f]*", request.path) is not None
        and not any(re.search(rb"[\r\n\x00]", part) for field in request.headers.fields for part in field)
    )


def _is_protected(mode: ProxyMode) -> bool:
    return isinstance(mode, ReverseMode) and mode.scheme in ("http", "https")


def _problems_with_mitmproxy_options() -> list[str]:
    problems = [
        f"{name}: cannot be used together with the OIDC add-on, {reason}"
        for name, reason in _REFUSED_OPTIONS.items()
        if getattr(ctx.options, name, None)
    ]
    if not all(_is_protected(ProxyMode.parse(mode)) for mode in ctx.options.mode):
        problems.append("mode: the OIDC add-on needs --mode reverse:https://service.example (or http://)")
    return problems


def _addresses() -> tuple[str, str]:
    server = ctx.master.addons.get("proxyserver")
    addresses = server.listen_addrs() if isinstance(server, Proxyserver) else []
    host, port = addresses[0][:2] if addresses else ("nowhere", 0)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}", ctx.options.mode[0].removeprefix("reverse:")
