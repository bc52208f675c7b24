"""The mitmproxy add-on: options -> TokenSource -> Authorization header.

mitmproxy goes on with a request whose hook raises, and a hook that hangs hangs the client. So a request has an answer,
an error, while it is decided about; nothing leaves without a clearance (see `policy.clearance`); and every wait has a
bound.
"""

from collections.abc import Callable

from mitmproxy import ctx
from mitmproxy.addonmanager import traverse
from mitmproxy.master import Master

from eoepca_security.errors import TokenError
from eoepca_security.proxy.addons.configuration import Configuration
from eoepca_security.proxy.addons.connections import Connections
from eoepca_security.proxy.addons.lifecycle import Lifecycle, exit_if_rejected, logger
from eoepca_security.proxy.addons.monitoring import Monitoring
from eoepca_security.proxy.addons.request_flow import RequestFlow
from eoepca_security.proxy.addons.state import State
from eoepca_security.proxy.admin.status import AdminSource
from eoepca_security.proxy.config.factory import make_source
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.session.source import TokenSource


class OIDCAuthProxy:
    """Puts an access token into every request that goes to the protected service, and answers those it has none for.

    `settings` come from the launcher; without them they are read from the add-on's options, the environment and `.env`.
    `on_started` is called once with the proxy's URL and what kept the first token from coming, if anything did.
    One that `joins` others goes on with their session, rather than ask the issuer whether it is good. `end` is called
    when a client ends the proxy, mitmproxy's shutdown unless it is given. `make_source` is called as the function of
    that name in `config.factory`.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        on_started: Callable[[str, TokenError | None], None] | None = None,
        *,
        joins: bool = False,
        end: Callable[[], None] | None = None,
        make_source: Callable[..., TokenSource] = make_source,
    ) -> None:
        self.state = State(end or _shut_down)
        self.monitoring = Monitoring(self.state)
        self.lifecycle = Lifecycle(
            self.state,
            self.admin_source(),
            on_started=on_started or exit_if_rejected,
            on_unloaded=_exit_if_unprotected,
        )
        self.request_flow = RequestFlow(self.state)
        # In this order: what is counted is what comes in, and it is decided about before anything else happens to it.
        self.addons = (
            Configuration(
                self.state, settings, joins=joins, make_source=make_source, observe=self.monitoring.refreshed
            ),
            self.monitoring,
            self.request_flow,
            Connections(self.state),
            self.lifecycle,
        )

    def begin(self) -> None:
        """Get the first token while mitmproxy still starts; the settings are known. There has to be an event loop."""
        self.lifecycle.begin()

    def admin_source(self) -> AdminSource:
        """Return what can be told of the proxy, and how to end it."""
        return self.monitoring.admin_source()


def _shut_down() -> None:
    ctx.master.shutdown()


def _exit_if_unprotected(master: Master) -> None:
    if not any(isinstance(addon, OIDCAuthProxy) for addon in traverse(master.addons.chain)):
        logger.error("the OIDC add-on was unloaded: ending, as requests would be forwarded without tokens")
        master.shutdown()
