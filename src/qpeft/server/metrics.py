"""What the server counts, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FILL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self._requests = Counter("qpeft_requests", "Responses", ["route", "status"], registry=own)
        self._latency = Histogram(
            "qpeft_request_seconds", "From request to response", ["route"], buckets=SECONDS, registry=own
        )
        self._fill = Histogram("qpeft_batch_fill", "Pairs of a batch / pairs allowed", buckets=FILL, registry=own)
        self._pairs = Counter("qpeft_pairs", "(query, document) pairs scored", registry=own)
        self._tokens = Counter("qpeft_tokens", "Tokens that the model read", registry=own)
        self._truncated = Counter("qpeft_truncated_documents", "Documents that were cut to fit", registry=own)
        self.queued = Gauge("qpeft_queued_pairs", "Pairs that wait for the model", registry=own)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a response; `route` is a pattern, not a path, so that clients cannot invent labels."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def batch(self, pairs: int, allowed: int) -> None:
        """Count a batch."""
        self._fill.observe(pairs / allowed)
        self._pairs.inc(pairs)

    def read(self, tokens: int, truncated: int) -> None:
        """Count what one request made the model read."""
        self._tokens.inc(tokens)
        self._truncated.inc(truncated)

    def watch(self, ready: Callable[[], bool], cache: Callable[[], tuple[int, int]]) -> None:
        """Say where to look, at every scrape, for readiness and for (hits, misses) of the passage cache."""
        self._registry.register(_Watched(ready, cache))

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Watched(Collector):
    def __init__(self, ready: Callable[[], bool], cache: Callable[[], tuple[int, int]]) -> None:
        self._ready, self._cache = ready, cache

    def collect(self) -> Iterator[Metric]:
        hits, misses = self._cache()
        yield GaugeMetricFamily("qpeft_ready", "1 while requests are taken", float(self._ready()))
        yield CounterMetricFamily("qpeft_passage_cache_hits", "Passages found encoded", hits)
        yield CounterMetricFamily("qpeft_passage_cache_misses", "Passages that had to be encoded", misses)
