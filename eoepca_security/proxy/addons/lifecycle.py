"""Start and end: the first token, the start-up line, the admin listener, and an end that cuts nobody off."""

import asyncio
import logging
import math
from collections.abc import Callable
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
from eoepca_security.proxy.addons.addresses import addresses, exposure
from eoepca_security.proxy.addons.configuration import OPTION_NAMES, leave
from eoepca_security.proxy.addons.drain import DRAIN_TIMEOUT, drain, end_quietly, end_with_the_terminal
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.admin.status import AdminSource
from eoepca_security.proxy.config.settings import NO_VERIFY, Settings
from eoepca_security.proxy.patches.lazy_imports import without_cas
from eoepca_security.session.session import AccessToken

if TYPE_CHECKING:
    from eoepca_security.proxy.admin.server import Admin

STARTED: Final = "OIDC proxy listening at %s -> %s as %s; access tokens live %d s"
"""The line that says that the proxy works: its URL, the service, whose token it is, seconds."""

logger = logging.getLogger("eoepca_security.proxy.addon")


class Lifecycle:
    """Starts and ends the proxy.

    `on_started` is called once with the proxy's URL and what kept the first token from coming, if anything did;
    `on_unloaded` when the add-on ends and mitmproxy does not.
    """

    def __init__(
        self,
        state: State,
        admin_source: AdminSource,
        *,
        on_started: Callable[[str, TokenError | None], None],
        on_unloaded: Callable[[Master], None],
    ) -> None:
        self._state = state
        self._admin_source = admin_source
        self._on_started = on_started
        self._on_unloaded = on_unloaded
        self._first: asyncio.Future[AccessToken] | None = None
        self._admin: Admin | None = None

    def begin(self) -> None:
        """Get the first token while mitmproxy still starts."""
        if self._state.source is not None and not self._state.problems:
            self._first = asyncio.ensure_future(self._state.source.token())
            # Nobody may come to look at it.
            self._first.add_done_callback(lambda first: first.cancelled() or first.exception())

    def running(self) -> "asyncio.Task[None]":
        """Begin the first refresh.

        This is no coroutine function, because mitmproxy refuses those where it reloads a script that was edited.
        """
        self._state.is_running = True
        end_with_the_terminal(ctx.master.shutdown)
        return asyncio.get_running_loop().create_task(self._start())

    def done(self) -> "asyncio.Task[None]":
        """Let requests and a refresh that are under way end; end mitmproxy when it is the add-on alone that ends.

        A script that is edited badly is unloaded, and requests would go on without tokens.
        """
        master, state = ctx.master, self._state
        is_end = master.should_exit.is_set()
        if state.is_running and not is_end:
            # A script that is edited well is loaded anew before the loop comes to this.
            master.event_loop.call_soon(self._on_unloaded, master)
            # And its admin listener needs the address, and goes on with the session.
            self._stop_admin()
            if state.settings is not None and state.source is not None:
                leave(state.settings, state.source)
        return asyncio.get_running_loop().create_task(self._end(master if is_end else None))

    async def _start(self) -> None:
        state = self._state
        # With -s an unknown option is put aside without a word.
        unknown = [f"{name}: there is no such option" for name in ctx.options.deferred if _looks_like_ours(name)]
        for line in state.problems + unknown:
            logger.error("%s", line)  # mitmproxy ends with exit code 1 when an error is logged while it starts
        if state.problems or unknown or state.source is None or state.settings is None:
            return
        self._warn(state.settings)
        self._start_admin(state.settings)
        # mitmproxy does not end before this does, so whoever stops it now would wait for a silent issuer.
        first = self._first or asyncio.ensure_future(state.source.token())
        stopped = asyncio.ensure_future(ctx.master.should_exit.wait())
        either: set[asyncio.Future[Any]] = {first, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not first.done():
            first.cancel()
            return
        listener, upstream = addresses(state.settings)
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
                STARTED,
                listener,
                upstream,
                identity(unverified_claims(token.value)),
                math.ceil(token.ends_at - token.obtained_at),
            )
        self._on_started(listener, failure)

    def _warn(self, settings: Settings) -> None:
        for line in settings.warnings:
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
                    "stopping: waiting up to %g s for %s; a second signal ends it at once",
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
        # Takes long to load, which is done when the proxy listens already.
        with without_cas():
            from eoepca_security.proxy.admin.server import Admin  # noqa: PLC0415

        admin = Admin(settings, self._admin_source)
        if admin.start() is not None:
            self._admin = admin

    def _stop_admin(self) -> None:
        if self._admin is not None:
            self._admin.stop()
            self._admin = None


def exit_if_rejected(_listener: str, failure: TokenError | None) -> None:
    """Let mitmproxy end with exit code 1 where there can be no token."""
    if isinstance(failure, CredentialsRejected):
        # The source has told it at length.
        logger.error("ending, as there can be no token (%s): `run-mitmproxy.py check` says what to do", failure.code)


def _looks_like_ours(name: str) -> bool:
    return name.startswith("oidc_") or bool(get_close_matches(name, OPTION_NAMES, 1, 0.85))
