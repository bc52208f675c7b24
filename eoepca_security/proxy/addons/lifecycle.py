"""Start and stop: the first token, the start-up line, the admin listener and the graceful shutdown."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from mitmproxy import ctx
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.log import ALERT
from mitmproxy.master import Master

from eoepca_security.errors import CredentialsRejected, TokenError
from eoepca_security.oauth.text import identity
from eoepca_security.oauth.urls import is_loopback
from eoepca_security.oauth.verify import unverified_claims
from eoepca_security.proxy.addons.addresses import addresses, browser_address, ca_for_clients, exposure
from eoepca_security.proxy.addons.configuration import OPTION_NAMES, hand_over
from eoepca_security.proxy.addons.drain import DRAIN_TIMEOUT, drain, end_quietly, has_terminal, on_hangup
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.admin.status import AdminSource
from eoepca_security.proxy.admin.ways import example, on_this_machine, service_lines
from eoepca_security.proxy.config.settings import NO_VERIFY, Settings
from eoepca_security.proxy.patches.lazy_imports import without_cas
from eoepca_security.session.session import AccessToken

if TYPE_CHECKING:
    from eoepca_security.proxy.admin.server import Admin

STARTED: Final = "OIDC proxy listening at %s -> %s as %s; access tokens live %d s"
"""The start-up line: the proxy's URL, the service, the token's user and its lifetime in seconds."""

IN_BROWSER: Final = "in a browser"
STATUS_PAGE: Final = "status page"
TRY: Final = "try"
"""What the record of the start-up line has in `more`, for a summary: addresses or a command, or None."""

PATIENCE: Final = 1.0
"""Seconds after which the log says that the proxy waits for its first token."""

logger = logging.getLogger("eoepca_security.proxy.addon")


class Lifecycle:
    """Starts and stops the proxy.

    `on_started` is called once with the proxy's URL and the error of the first token request, or None. `on_unloaded` is
    called when the add-on is unloaded while mitmproxy goes on, and `on_reread` to read the services again (SIGHUP).
    """

    def __init__(
        self,
        state: State,
        admin_source: AdminSource,
        *,
        on_started: Callable[[str, TokenError | None], None],
        on_unloaded: Callable[[Master], None],
        on_reread: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._state = state
        self._admin_source = admin_source
        self._on_started = on_started
        self._on_unloaded = on_unloaded
        self._on_reread = on_reread
        self._rereading: asyncio.Task[None] | None = None
        self._must_reread = False
        self._first: asyncio.Future[AccessToken] | None = None
        self._admin: Admin | None = None
        self.status_page: str | None = None
        """The address of the status page for a client on this machine, or None."""

    def begin(self) -> None:
        """Start to get the first token while mitmproxy is still starting."""
        if self._state.source is not None and not self._state.problems:
            self._first = asyncio.ensure_future(self._state.source.token())
            # Retrieve the error, in case nobody else does.
            self._first.add_done_callback(lambda first: first.cancelled() or first.exception())

    def running(self) -> "asyncio.Task[None]":
        """Start up: log the warnings, start the admin listener and wait for the first token.

        This is not a coroutine function, because mitmproxy refuses those when it reloads an edited script.
        """
        self._state.is_running = True
        settings = self._state.settings
        rereads = settings is not None and settings.services_file is not None and not has_terminal()
        on_hangup(self._reread if rereads else ctx.master.shutdown)
        return asyncio.get_running_loop().create_task(self._start())

    def _reread(self) -> None:
        self._must_reread = True
        if self._rereading is None or self._rereading.done():
            self._rereading = asyncio.get_running_loop().create_task(self._reread_all())

    async def _reread_all(self) -> None:
        # The file may have changed again while it was read.
        while self._must_reread:
            self._must_reread = False
            await self._on_reread()

    def done(self) -> "asyncio.Task[None]":
        """Let running requests and a running refresh finish; stop mitmproxy if only the add-on is unloaded.

        mitmproxy unloads a script with an error, and would then forward requests without tokens.
        """
        master, state = ctx.master, self._state
        is_end = master.should_exit.is_set()
        if state.is_running and not is_end:
            # A valid script is loaded again before the loop runs this.
            master.event_loop.call_soon(self._on_unloaded, master)
            # The new add-on's admin listener needs the address, and it continues the session.
            self._stop_admin()
            if state.settings is not None and state.source is not None:
                hand_over(state.settings, state.source)
        return asyncio.get_running_loop().create_task(self._end(master if is_end else None))

    async def _start(self) -> None:
        state = self._state
        # With -s, mitmproxy silently ignores unknown options.
        unknown = [f"{name}: unknown option" for name in ctx.options.deferred if _looks_like_ours(name)]
        for line in state.problems + unknown:
            logger.error("%s", line)  # mitmproxy exits with code 1 if an error is logged during its start
        if state.problems or unknown or state.source is None or state.settings is None:
            return
        self._warn(state.settings)
        self._start_admin(state.settings)
        # mitmproxy waits for this task, so without `stopped` a silent issuer would delay its exit.
        first = self._first or asyncio.ensure_future(state.source.token())
        stopped = asyncio.ensure_future(ctx.master.should_exit.wait())
        either: set[asyncio.Future[Any]] = {first, stopped}
        done, _ = await asyncio.wait(either, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            logger.log(ALERT, "waiting for a token from %s", state.settings.known_as)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not first.done():
            first.cancel()
            return
        listener, upstream = addresses(state.settings)
        failed: TokenError | None = None
        try:
            token = first.result()
        except TokenError as error:
            failed = error
            if not isinstance(error, CredentialsRejected):
                logger.log(ALERT, "OIDC proxy listening at %s -> %s, without a token yet", listener, upstream)
        else:
            logger.log(
                ALERT,
                STARTED,
                listener,
                upstream,
                identity(unverified_claims(token.value)),
                math.ceil(token.ends_at - token.obtained_at),
                extra={
                    "more": {
                        IN_BROWSER: browser_address(
                            listener,
                            upstream,
                            state.guard,
                            state.settings.services if state.settings.services_file is not None else (),
                        ),
                        STATUS_PAGE: self.status_page,
                        TRY: example(listener, state.settings),
                    }
                },
            )
        if not isinstance(failed, CredentialsRejected):
            _tell_how_to_call(listener, state.settings)
        self._on_started(listener, failed)

    def _warn(self, settings: Settings) -> None:
        for line in (*settings.warnings, *settings.exposed):
            logger.warning("%s", line)
        if ctx.options.ssl_insecure and not settings.tls_no_verify:
            logger.warning("%s", NO_VERIFY.format("ssl_insecure"))
        listener, _ = addresses(settings)
        if not is_loopback(urlsplit(listener).hostname):
            logger.warning("%s", exposure(listener, settings))

    async def _end(self, master: Master | None) -> None:
        source = self._state.source
        finishing = asyncio.ensure_future(source.finish()) if source is not None else None
        server = master.addons.get("proxyserver") if master is not None else None
        hurried = False
        if isinstance(server, Proxyserver):
            self._state.is_ending = True
            if (number := self._serving()) > 0:
                requests = "1 request" if number == 1 else f"{number} requests"
                logger.log(
                    ALERT,
                    "stopping: waiting up to %g s for %s; send a second signal to stop at once",
                    DRAIN_TIMEOUT,
                    requests,
                )
            hurried = await drain(server, lambda: self._serving() > 0 or not (finishing is None or finishing.done()))
        if finishing is not None and not hurried:
            await finishing
        self._stop_admin()
        if master is not None:
            end_quietly()

    def _serving(self) -> int:
        return sum(bool(flow.live and not flow.websocket) for flow in self._state.in_flight)

    def _start_admin(self, settings: Settings) -> None:
        if settings.admin is None:
            return
        # Slow to import, so do it once the proxy is listening.
        with without_cas():
            from eoepca_security.proxy.admin.server import Admin  # noqa: PLC0415

        admin = Admin(settings, self._admin_source)
        if (address := admin.start()) is not None:
            self._admin = admin
            self.status_page = f"{on_this_machine(f'http://{address}')}/"

    def _stop_admin(self) -> None:
        if self._admin is not None:
            self._admin.stop()
            self._admin = self.status_page = None


def _tell_how_to_call(listener: str, settings: Settings) -> None:
    for line in service_lines(listener, settings):
        logger.log(ALERT, "%s", line)
    if (ca_file := ca_for_clients()) is not None:
        logger.log(ALERT, "clients get certificates of the proxy's own CA for these hosts: let them trust %s", ca_file)


def exit_if_rejected(_listener: str, error: TokenError | None) -> None:
    """Let mitmproxy exit with code 1 if the issuer rejected the credentials."""
    if isinstance(error, CredentialsRejected):
        # The source has already logged the details and the remedy.
        logger.error("stopping without a token (%s)", error.code)


def _looks_like_ours(name: str) -> bool:
    return name.startswith("oidc_") or bool(get_close_matches(name, OPTION_NAMES, 1, 0.85))
