"""The proxy's metrics, for Prometheus and the status page."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from eoepca_security.errors import TokenError

_NO_ANSWER: Final = "none"
_SERVICE: Final = "service"
_EXPIRY: Final = "oidc_proxy_token_expiry_timestamp_seconds"


class Metrics:
    """The metrics of one proxy since it started.

    The label `service` has a service's name; it is empty for the session, and for requests to no service. Names come
    from the file of services only, so that clients cannot make more of them.

    `in_flight` returns the number of running requests, and `held` the bytes of bodies that are held.
    """

    def __init__(self, in_flight: Callable[[], int], held: Callable[[], int]) -> None:
        self.started_at = time.time()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "oidc_proxy_requests_total",
            "Requests by status class (none: ended without an answer) and by the proxy's own error code, if any.",
            ("status_class", "code", _SERVICE),
            registry=self._registry,
        )
        self._refreshes = Counter(
            "oidc_proxy_refreshes_total",
            "Attempts to get an access token, by result: success or an error code.",
            ("result", _SERVICE),
            registry=self._registry,
        )
        self._refresh_duration = Histogram(
            "oidc_proxy_refresh_duration_seconds",
            "Duration of attempts to get an access token.",
            (_SERVICE,),
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20),
            registry=self._registry,
        )
        self._token_expiry = Gauge(
            _EXPIRY,
            "When the current access token expires, in seconds since 1970; 0 without one.",
            (_SERVICE,),
            registry=self._registry,
        )
        gauge = Gauge("oidc_proxy_requests_in_flight", "Requests in progress.", registry=self._registry)
        gauge.set_function(in_flight)
        gauge = Gauge(
            "oidc_proxy_held_bytes",
            "Bytes of bodies that are held, to be sent again if the service refuses the token.",
            registry=self._registry,
        )
        gauge.set_function(held)

        # The session's are there from the start.
        self._refresh_duration.labels("")
        self._token_expiry.labels("")

        self._ended = cache(self._counter)

    def _counter(self, hundreds: int | None, code: str, service: str) -> Counter:
        return self._requests.labels(f"{hundreds}xx" if hundreds else _NO_ANSWER, code, service)

    def request_ended(self, status: int | None, code: str = "", service: str = "") -> None:
        """Count a request. `status` is None without an answer; `code` is the proxy's own error code."""
        self._ended(status and status // 100, code, service).inc()

    def refreshed(self, error: TokenError | None, seconds: float, service: str = "") -> None:
        """Count an attempt to get a token."""
        self._refreshes.labels(error.code if error else "success", service).inc()
        self._refresh_duration.labels(service).observe(max(0.0, seconds))

    def token_ends(self, at: float | None, service: str = "") -> None:
        """Record when the current access token expires, in epoch seconds; None without one."""
        self._token_expiry.labels(service).set(at or 0)

    def families(self, services: Collection[str] | None = None) -> list[Metric]:
        """Return all current metrics.

        `services` are the names in the file of services; without one, there is no label for them. A service that has
        gone from the file keeps its counts, but has no token that could expire.
        """
        families = list(self._registry.collect())
        for family in families:
            if services is None:
                for sample in family.samples:
                    sample.labels.pop(_SERVICE, None)
            elif family.name == _EXPIRY:
                family.samples = [one for one in family.samples if one.labels[_SERVICE] in ("", *services)]
        return families


def counts(families: Iterable[Metric]) -> dict[str, dict[str, int]]:
    """Return the counts for the status page.

    `requests` are by status class: all of them, and as `service_answers` those that the proxy did not answer itself.
    `errors`, which it did, are by code, and `refreshes`, those of the session, by result.
    """
    found: dict[str, dict[str, int]] = {"refreshes": {}, "requests": {}, "service_answers": {}, "errors": {}}
    for sample in (sample for family in families for sample in family.samples):
        for name, total, label in (
            ("requests", "oidc_proxy_requests_total", "status_class"),
            ("errors", "oidc_proxy_requests_total", "code"),
            ("refreshes", "oidc_proxy_refreshes_total", "result"),
        ):
            is_of_session = name != "refreshes" or not sample.labels.get(_SERVICE)
            if sample.name == total and is_of_session and (value := sample.labels[label]):
                _count(found[name], value, sample)
                if name == "requests" and not sample.labels["code"]:
                    _count(found["service_answers"], value, sample)
    return found


def _count(into: dict[str, int], name: str, sample: Sample) -> None:
    into[name] = into.get(name, 0) + int(sample.value)


def exposition(families: Sequence[Metric], accept: str) -> tuple[bytes, str]:
    """Return the Prometheus text in a format for the `Accept` header, and its media type."""
    encode, media_type = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(_Given(families))
    return encode(registry), media_type


def merged(parts: Iterable[Sequence[Metric]]) -> list[Metric]:
    """Return the families of several processes, merged into one."""
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in (family for part in parts for family in part):
        families.setdefault(family.name, family)
        sums = values.setdefault(family.name, {})
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.items()))
            sums[key] = _joined(sample.name, sums[key], sample.value) if key in sums else sample.value
    result = []
    for name, family in families.items():
        joined = Metric(name, family.documentation, family.type)
        for (sample_name, labels), value in values[name].items():
            joined.add_sample(sample_name, dict(labels), value)
        result.append(joined)
    return result


def lasting(families: Iterable[Metric]) -> list[Metric]:
    """Return the metrics of an ended process that still count."""
    return [family for family in families if family.type in ("counter", "histogram")]


def to_json(families: Iterable[Metric]) -> list[Any]:
    """Return the families as JSON values, for `from_json`."""
    return [
        [family.name, family.documentation, family.type, [[s.name, s.labels, s.value] for s in family.samples]]
        for family in families
    ]


def from_json(data: Iterable[Any]) -> list[Metric]:
    """Return the families from the output of `to_json`."""
    families = []
    for name, documentation, kind, samples in data:
        family = Metric(name, documentation, kind)
        for sample in samples:
            family.add_sample(*sample)
        families.append(family)
    return families


class _Given(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


def _joined(name: str, one: float, other: float) -> float:
    if name == _EXPIRY:
        return max(one, other)
    return min(one, other) if name.endswith("_created") else one + other
