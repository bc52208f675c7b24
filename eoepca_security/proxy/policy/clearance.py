"""That a request may leave, for one target and with the headers that it gets there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

from eoepca_security.proxy.policy.destination import Target


@dataclass(frozen=True)
class Clearance:
    """That a request may leave for `target`, with these headers in place of its own of the same names."""

    target: Target
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def fields(self) -> tuple[tuple[bytes, bytes], ...]:
        """The headers as they are sent."""
        return tuple((name.encode(), value.encode()) for name, value in self.headers.items())

    @cached_property
    def names(self) -> frozenset[bytes]:
        """Their names, in lower case."""
        return frozenset(name.lower() for name, _ in self.fields)


_cleared: WeakKeyDictionary[object, Clearance] = WeakKeyDictionary()


def clear(request: object, clearance: Clearance) -> None:
    """Let the request leave; it is known by its identity, so copies of it are not cleared."""
    _cleared[request] = clearance


def clearance(request: object) -> Clearance | None:
    """Return what the request was given, if anything."""
    return _cleared.get(request)
