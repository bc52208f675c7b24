"""What the add-ons of one proxy share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakSet

from mitmproxy.http import HTTPFlow

from eoepca_security.errors import TokenError
from eoepca_security.proxy.config.settings import Settings
from eoepca_security.proxy.policy.access import Guard
from eoepca_security.proxy.policy.apisix import ApisixHeaders
from eoepca_security.proxy.policy.remedies import failure_remedy, runs_in_container, told
from eoepca_security.session.source import TokenSource


@dataclass(eq=False)
class State:
    """The state of one proxy.

    `settings`, `source`, `guard` and `apisix` are what the configuration makes of the options; `problems` is a line for
    each thing that is wrong with them. `source` is None while the settings are wrong. `end_all` ends the proxy, with
    all its processes.
    """

    end_all: Callable[[], None]
    settings: Settings | None = None
    source: TokenSource | None = None
    guard: Guard = field(default_factory=lambda: Guard(()))
    apisix: ApisixHeaders | None = None
    problems: list[str] = field(default_factory=list)
    in_container: bool = field(default_factory=runs_in_container)
    is_running: bool = False
    is_ending: bool = False
    in_flight: WeakSet[HTTPFlow] = field(default_factory=WeakSet)

    def remedy(self, error: TokenError) -> str:
        """Return what to do about an error that keeps the proxy from a token."""
        return failure_remedy(error, self.settings, in_container=self.in_container)

    def describe(self, error: TokenError) -> str:
        """Say what happened and what to do about it."""
        return told(error, self.remedy(error))
