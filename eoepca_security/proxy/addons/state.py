"""The state that the add-ons of one proxy share."""

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

    The configuration sets `settings`, `source`, `guard` and `apisix` from the options, and `problems` to one line for
    each error in them. `source` is None while the settings are wrong. `end_all` stops the proxy with all its processes.
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

    @property
    def is_serving(self) -> bool:
        """Whether the add-on has started, with settings that are right."""
        return self.is_running and self.source is not None and not self.problems

    def remedy(self, error: TokenError) -> str:
        """Return the remedy for an error that leaves the proxy without a token."""
        return failure_remedy(error, self.settings, in_container=self.in_container)

    def describe(self, error: TokenError) -> str:
        """Return what happened and the remedy, in one line."""
        return told(error, self.remedy(error))
