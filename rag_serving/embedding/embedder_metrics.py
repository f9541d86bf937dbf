"""What the embedding service counts, as Prometheus collects it at its /metrics."""

from prometheus_client import CollectorRegistry, generate_latest

from rag_serving.embedding.batching import Bench, Computed
from rag_serving.signals import contract
from rag_serving.signals.metrics import counter, gauge, histogram

_OUTCOMES = {200: "ok", 429: "rejected", 503: "unavailable", 504: "late"}


class EmbedderMetrics:
    """The metrics of one service, in a registry of its own. No label has a value that a client makes up."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = counter(contract.EMBEDDER_REQUESTS, self._registry)
        self._rejected = counter(contract.EMBEDDER_REJECTED, self._registry)
        self._late = counter(contract.EMBEDDER_LATE, self._registry)
        self._duration = histogram(contract.EMBEDDER_SECONDS, self._registry)
        self._batch_size = histogram(contract.EMBEDDER_BATCH, self._registry)
        self._batch_duration = histogram(contract.EMBEDDER_BATCH_SECONDS, self._registry)
        self._depth = gauge(contract.EMBEDDER_DEPTH, self._registry)
        for outcome in (*_OUTCOMES.values(), "client_error", "error"):
            self._requests.labels(outcome)
        for kind in ("query", "document"):
            self._batch_size.labels(kind)
            self._batch_duration.labels(kind)

    def answered(self, status: int, seconds: float) -> None:
        """A request to /v1/embeddings was answered."""
        outcome = _OUTCOMES.get(status) or ("error" if status >= 500 else "client_error")
        self._requests.labels(outcome).inc()
        self._duration.observe(seconds)
        if status == 429:
            self._rejected.inc()
        elif status == 504:
            self._late.inc()

    def computed(self, batch: Computed) -> None:
        kind = "query" if batch.query else "document"
        self._batch_size.labels(kind).observe(batch.texts)
        self._batch_duration.labels(kind).observe(batch.seconds)

    def watch(self, bench: Bench) -> None:
        """Read the depth of its lines at each scrape."""
        self._depth.labels("query").set_function(lambda: bench.waiting(query=True))
        self._depth.labels("document").set_function(lambda: bench.waiting(query=False))

    def exposition(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)
