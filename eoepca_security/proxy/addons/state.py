"""The state that the add-ons of one proxy share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakSet

from mitmproxy.http import HTTPFlow

from eoepca_security.errors import TokenError
from eoepca_security.proxy.config.services import DEFAULT
from eoepca_security.proxy.config.settings import Service, Settings, Site
from eoepca_security.proxy.patches.service_tls import Trust
from eoepca_security.proxy.policy.access import Guard
from eoepca_security.proxy.policy.apisix import ApisixHeaders
from eoepca_security.proxy.policy.remedies import failure_remedy, runs_in_container, told
from eoepca_security.proxy.policy.routing import Routes
from eoepca_security.session.service_tokens import Sources
from eoepca_security.session.source import TokenSource
from eoepca_security.session.token_cycle import TokenCycle


@dataclass(eq=False)
class State:
    """The state of one proxy.

    The configuration sets `settings`, `sources`, `guard`, `routes`, `services` and `apisix` from the options, and
    `problems` to one line for each error in them. `sources` is None while the settings are wrong. `services` are by
    name, and `routes` lead to them; it is None where mitmproxy's mode alone says what the only one is. `apisix` has the
    headers of the services that want them, by name. `trust` has the services that trust others than the proxy does.
    `end_all` stops the proxy with all its processes.
    """

    end_all: Callable[[], None]
    settings: Settings | None = None
    sources: Sources | None = None
    guard: Guard = field(default_factory=lambda: Guard(()))
    routes: Routes | None = None
    services: dict[str, Service] = field(default_factory=dict)
    apisix: dict[str, ApisixHeaders] = field(default_factory=dict)
    trust: dict[Site, Trust] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    in_container: bool = field(default_factory=runs_in_container)
    is_running: bool = False
    is_ending: bool = False
    in_flight: WeakSet[HTTPFlow] = field(default_factory=WeakSet)

    @property
    def default(self) -> Service | None:
        """The service of the settings without a file, or None if there is none."""
        return self.services.get(DEFAULT)

    @property
    def source(self) -> TokenSource | None:
        """The token source of the login, or None while the settings are wrong."""
        return self.sources.login if self.sources is not None else None

    def tokens_of(self, service: Service | None) -> TokenCycle | None:
        """Return the token source of a service, or None if the settings have it no more, or are wrong.

        After a change of the settings, the name alone may mean another service, whose token this one must not get.
        """
        if self.sources is None or service is None:
            return None
        known = self.services.get(service.name)
        return self.sources.services.get(service.name) if known is service or known == service else None

    def name_of(self, service: Service | None) -> str:
        """Return what logs, metrics and the status call a service: its name, or nothing without a file of services."""
        has_file = self.settings is not None and self.settings.services_file is not None
        return service.name if has_file and service is not None else ""

    @property
    def is_serving(self) -> bool:
        """Whether the add-on has started, with settings that are right."""
        return self.is_running and self.source is not None and not self.problems

    def remedy(self, error: TokenError, service: Service | None = None) -> str:
        """Return the remedy for an error that leaves the proxy without a token, for `service` if it is given."""
        if service is not None and self.sources is not None and not self.sources.is_own(error, service.name):
            service = None
        return failure_remedy(error, self.settings, service, in_container=self.in_container)

    def describe(self, error: TokenError, service: Service | None = None) -> str:
        """Return what happened and the remedy, in one line."""
        return told(error, self.remedy(error, service))
