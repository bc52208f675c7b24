"""That a request may leave, for one target and with the headers that it gets there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

from mitmproxy.http import Request

from eoepca_security.proxy.policy import headers
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


_cleared: WeakKeyDictionary[Request, Clearance] = WeakKeyDictionary()


def clear(request: Request, clearance: Clearance) -> None:
    """Let the request leave."""
    _cleared[request] = clearance


def clearance(request: Request) -> Clearance | None:
    """Return what the request was given, if anything."""
    return _cleared.get(request)


def outgoing(request: Request, target: Target) -> Request | None:
    """Return the request as it goes to `target`, or None when it must not."""
    given = _cleared.get(request)
    if given is None or given.target != target:
        return None
    if not given.headers:
        return request
    kept = [field for field in request.data.headers.fields if field[0].lower() not in given.names]
    return headers.with_headers(request, (*kept, *given.fields))
