"""The mitmproxy add-on: options -> TokenSource -> Authorization header.

mitmproxy forwards a request whose hook raises, and a hook that hangs blocks the client. So each request has an error
response while we decide about it, nothing leaves without a clearance (see `policy.clearance`), and every wait has a
limit.
"""

from collections.abc import Callable

from mitmproxy import ctx
from mitmproxy.addonmanager import traverse
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.log import ALERT
from mitmproxy.master import Master

from eoepca_security.errors import TokenError
from eoepca_security.proxy.addons.configuration import Configuration
from eoepca_security.proxy.addons.connections import Connections
from eoepca_security.proxy.addons.drain import disconnect, stop_listening
from eoepca_security.proxy.addons.forward_mode import ForwardMode
from eoepca_security.proxy.addons.lifecycle import Lifecycle, exit_if_rejected, logger
from eoepca_security.proxy.addons.monitoring import Monitoring
from eoepca_security.proxy.addons.request_flow import RequestFlow
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.addons.token_files import TokenFiles
from eoepca_security.proxy.admin.status import AdminSource
from eoepca_security.proxy.config.factory import make_sources
from eoepca_security.proxy.config.settings import Service, Settings
from eoepca_security.session.service_tokens import Sources


class OIDCAuthProxy:
    """Adds an access token to every request to the protected service, and answers with an error if it has none.

    `settings` come from the launcher; without them, they come from the add-on's options, the environment and `.env`.
    `on_started` is called once with the proxy's URL and the error of the first token request, or None. With `joins`, it
    continues the session of other processes without asking the issuer first. Of several processes, one `keeps_files`
    with tokens. `end` is called when a client stops the proxy; the default is mitmproxy's shutdown. `make_sources`
    replaces the function in `config.factory`.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        on_started: Callable[[str, TokenError | None], None] | None = None,
        *,
        joins: bool = False,
        keeps_files: bool = True,
        end: Callable[[], None] | None = None,
        make_sources: Callable[..., Sources] = make_sources,
    ) -> None:
        self.state = State(end or _shut_down)
        self.monitoring = Monitoring(self.state)
        self.token_files = TokenFiles(self.state)
        configuration = Configuration(
            self.state,
            settings,
            joins=joins,
            make_sources=make_sources,
            observe=self._refreshed,
            on_sources=self.token_files.follow,
        )
        self.lifecycle = Lifecycle(
            self.state,
            self.admin_source(),
            on_started=on_started or exit_if_rejected,
            on_unloaded=_exit_unless_replaced,
            on_reread=configuration.reread,
        )
        forward_mode = ForwardMode(self.state)
        self.request_flow = RequestFlow(self.state, forward_mode)
        # The order matters: count a request as it arrives, and decide about it before anything else handles it.
        self.addons = (
            configuration,
            self.monitoring,
            forward_mode,
            self.request_flow,
            Connections(self.state),
            # At the end, no more tokens are asked for once the lifecycle waits for the last one.
            *((self.token_files,) if keeps_files else ()),
            self.lifecycle,
        )

    def begin(self) -> None:
        """Start to get the first token while mitmproxy is still starting. Needs the settings and an event loop."""
        self.lifecycle.begin()

    def admin_source(self) -> AdminSource:
        """Return what the admin listener needs to describe and stop the proxy."""
        return self.monitoring.admin_source()

    def _refreshed(self, service: Service | None, error: TokenError | None, seconds: float) -> None:
        self.monitoring.refreshed(service, error, seconds)
        self.token_files.refreshed()


def _shut_down() -> None:
    ctx.master.shutdown()


def _exit_unless_replaced(master: Master) -> None:
    """Say which version of an edited script serves; if none does, stop with exit code 1."""
    loaded = [addon.state for addon in traverse(master.addons.chain) if isinstance(addon, OIDCAuthProxy)]
    if not loaded:
        logger.error("the OIDC add-on was unloaded, and the edited script brought no other: stopping with exit code 1")
    elif not all(state.is_serving for state in loaded):
        logger.error("the edited script could not start the OIDC add-on: stopping with exit code 1")
    else:
        logger.log(ALERT, "the OIDC add-on was loaded again: the edited script serves from now on")
        return
    if master.addons.get(_ExitWith1.name) is None:
        master.addons.add(_ExitWith1())
    master.shutdown()


class _ExitWith1:
    """An add-on that is told last that mitmproxy ends, which otherwise ends with exit code 0."""

    name = "_exitwith1"

    async def done(self) -> None:
        server = ctx.master.addons.get("proxyserver")
        if isinstance(server, Proxyserver):
            await stop_listening(server)
            await disconnect(server)
        raise SystemExit(1)
