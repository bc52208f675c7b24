"""What the proxy counts, for Prometheus and for the status page."""

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from eoepca_security.errors import TokenError

_NO_ANSWER: Final = "none"


class Metrics:
    """The counts of one proxy since it started; `in_flight` tells how many requests are being served."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        self.started_at = time.time()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "oidc_proxy_requests_total",
            "Requests by class of status (none: ended without an answer) and by the proxy's own error code, if any.",
            ("status_class", "code"),
            registry=self._registry,
        )
        self._refreshes = Counter(
            "oidc_proxy_refreshes_total",
            "Attempts to get an access token, by result: success or an error code.",
            ("result",),
            registry=self._registry,
        )
        self._refresh_duration = Histogram(
            "oidc_proxy_refresh_duration_seconds",
            "Time that attempts to get an access token took.",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20),
            registry=self._registry,
        )
        self._token_expiry = Gauge(
            "oidc_proxy_token_expiry_timestamp_seconds",
            "When the access token at hand ends, in seconds since 1970; 0 without one.",
            registry=self._registry,
        )
        gauge = Gauge("oidc_proxy_requests_in_flight", "Requests that are being served.", registry=self._registry)
        gauge.set_function(in_flight)

    def request_ended(self, status: int | None, code: str = "") -> None:
        """Count a request; `status` is None when it got no answer, `code` the proxy's own error code."""
        self._requests.labels(f"{status // 100}xx" if status else _NO_ANSWER, code).inc()

    def refreshed(self, failure: TokenError | None, seconds: float) -> None:
        """Count an attempt to get a token."""
        self._refreshes.labels(failure.code if failure else "success").inc()
        self._refresh_duration.observe(max(0.0, seconds))

    def token_ends(self, at: float | None) -> None:
        """Note when the access token at hand ends, in epoch seconds."""
        self._token_expiry.set(at or 0)

    def requests(self) -> dict[str, int]:
        """Return the numbers of requests by class of status."""
        return _sums(self._requests, "status_class")

    def errors(self) -> dict[str, int]:
        """Return the numbers of requests that the proxy answered itself with an error code."""
        return {code: number for code, number in _sums(self._requests, "code").items() if code}

    def refreshes(self) -> dict[str, int]:
        """Return the numbers of attempts to get a token, by result."""
        return _sums(self._refreshes, "result")

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return Prometheus' text in the form that fits the `Accept` header, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


def _sums(counter: Counter, label: str) -> dict[str, int]:
    sums: dict[str, int] = {}
    for family in counter.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                sums[sample.labels[label]] = sums.get(sample.labels[label], 0) + int(sample.value)
    return sums
