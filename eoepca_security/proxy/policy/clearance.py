"""Clearances: permission for a request to leave, for one target and with given headers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

from eoepca_security.proxy.config.settings import Service
from eoepca_security.proxy.policy.destination import Target


@dataclass(frozen=True)
class Clearance:
    """Permission for a request to leave for `target`.

    `headers` replace its own headers of the same names, and its credentials. They have the `token` of `service`; all
    three are missing for what goes elsewhere. `called` is the service whose name the client used, or None in forward
    mode.
    """

    target: Target
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    service: Service | None = None
    token: str = field(default="", repr=False)
    called: Service | None = None

    @cached_property
    def fields(self) -> tuple[tuple[bytes, bytes], ...]:
        """The headers, encoded as they are sent."""
        return tuple((name.encode(), value.encode()) for name, value in self.headers.items())

    @cached_property
    def names(self) -> frozenset[bytes]:
        """The names of headers that the request must not have of its own, in lower case."""
        return frozenset({b"authorization", *(name.lower() for name, _ in self.fields)})


_cleared: WeakKeyDictionary[object, Clearance] = WeakKeyDictionary()


def clear(request: object, clearance: Clearance) -> None:
    """Let the request leave. This applies to the object itself, so copies of it are not cleared."""
    _cleared[request] = clearance


def clearance(request: object) -> Clearance | None:
    """Return the request's clearance, or None."""
    return _cleared.get(request)
