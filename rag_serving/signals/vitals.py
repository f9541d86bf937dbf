"""The levels of a serving process, read when somebody collects its metrics: what is open, what the ledger says, what was measured last.

Measurements come from the records that the weekly run keeps in the store under `drift/`; those of a snapshot that is live no longer are left out,
so what nobody measured since a release is absent and not flattering.
"""

import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rag_serving import telemetry
from rag_serving.edge.shedding import Slots
from rag_serving.embedding.remote_encoder import MOST_CONNECTIONS, RemoteEncoder
from rag_serving.errors import StoreError
from rag_serving.live import Live
from rag_serving.pipeline import Service
from rag_serving.seals import unsealed
from rag_serving.signals import contract
from rag_serving.signals.contract import Metric
from rag_serving.signals.metrics import Level
from rag_serving.store import Store

DETECTORS = ("evaluation", "embedding", "query", "corpus", "index")
_EVALUATION: tuple[tuple[str, Metric], ...] = (
    ("mrr", contract.EVAL_MRR),
    ("mrr_at_release", contract.EVAL_MRR_AT_RELEASE),
    ("floor", contract.EVAL_FLOOR),
)
_INDEX: tuple[tuple[str, Metric], ...] = (
    ("unindexed_rows", contract.INDEX_UNINDEXED),
    ("corpus_behind", contract.INDEX_BEHIND),
    ("ann_recall", contract.ANN_RECALL),
)
_EMBEDDING: tuple[tuple[str, Metric], ...] = (("cosine_mean", contract.PAIRED_COSINE), ("same_model", contract.SAME_MODEL))

_BREAKER = {"closed": 0, "half_open": 1, "open": 2}
_CALLS = {"first": "requests", "retry": "retries", "hedge": "hedges", "failure": "failures", "refused": "refused"}

log = logging.getLogger(__name__)


def levels(service: Service, slots: Slots, store: Store) -> list[Level]:
    """Every level that is known; reads the store, so call it in a thread."""
    return [*_working(service, slots), *_released(service.live), *_measured(service.live, store)]


def _working(service: Service, slots: Slots) -> Iterator[Level]:
    model, observations, counts = service.writer.model, service.traffic.observations, service.traffic.counts
    if model is not None:
        yield Level(contract.BREAKER, _BREAKER[model.state], ("llm",))
    yield Level(contract.OBSERVATIONS, observations.written, ("written",))
    yield Level(contract.OBSERVATIONS, observations.dropped, ("dropped",))
    yield from (Level(contract.CANARY_ANSWERS, counts[result], (result,)) for result in ("fell_back", "shadowed", "dropped", "failed"))
    yield Level(contract.INFLIGHT, telemetry.inflight())
    yield Level(contract.WAITING, slots.waiting)
    yield Level(contract.RUNNING, slots.running)
    yield Level(contract.SLOTS, slots.limit)


def _asking(encoder: RemoteEncoder) -> Iterator[Level]:
    traffic = encoder.traffic
    yield Level(contract.BREAKER, _BREAKER[encoder.state], ("embedder",))
    yield Level(contract.POOL_IN_USE, traffic.in_flight)
    yield Level(contract.POOL_SIZE, MOST_CONNECTIONS)
    yield Level(contract.CACHED, traffic.cache_hits, ("hit",))
    yield Level(contract.CACHED, traffic.cache_misses, ("miss",))
    for kind in ("first", "retry", "hedge", "failure", "refused"):
        yield Level(contract.CALLS, getattr(traffic, _CALLS[kind]), (kind,))


def _released(live: Live) -> Iterator[Level]:
    state, serving = live.state, live.serving
    yield Level(contract.HOLDS, len(state.holds))
    if state.champion is not None:
        yield Level(contract.LEDGER_GENERATION, state.champion.number)
    if serving is not None:
        manifest = serving.snapshot.retriever.manifest
        yield Level(contract.INDEX_GENERATION, serving.number)
        yield Level(contract.INDEX_ROWS, manifest.rows)
        if isinstance(serving.snapshot.encoder, RemoteEncoder):
            yield from _asking(serving.snapshot.encoder)
        yield Level(contract.INDEX_AGE, (datetime.now(UTC) - datetime.fromisoformat(manifest.built_at)).total_seconds())
    if state.previous is not None:
        yield Level(contract.PREVIOUS_OPEN, float(live.manifest(state.previous.snapshot_id) is not None))


def _measured(live: Live, store: Store) -> Iterator[Level]:
    champion = live.state.champion
    if champion is None:
        return
    records = {name: record for name in DETECTORS if (record := _newest(store, name)).get("snapshot_id") == champion.snapshot_id}
    numbers: dict[str, Mapping[str, float]] = {name: record["numbers"] for name, record in records.items()}
    evaluation, index = numbers.get("evaluation", {}), numbers.get("index", {})
    for found, wanted in ((evaluation, _EVALUATION), (index, _INDEX), (numbers.get("embedding", {}), _EMBEDDING)):
        yield from (Level(metric, found[name]) for name, metric in wanted if name in found)
    for prefix, metric in (("ndcg_at_", contract.EVAL_NDCG), ("recall_at_", contract.EVAL_RECALL)):
        yield from (Level(metric, value) for name, value in evaluation.items() if name.startswith(prefix))
    for name, value in evaluation.items():
        if name.startswith("distinct_documents"):
            yield Level(contract.DIVERSITY, value, ("release" if name.endswith("_at_release") else "now",))
    for test in ("query", "corpus"):
        if "mmd" in numbers.get(test, {}):
            yield Level(contract.DRIFT_STATISTIC, numbers[test]["mmd"], (test,))
            yield Level(contract.DRIFT_P, numbers[test]["p_mmd"], (test,))
    if "mrr" in evaluation:
        yield Level(contract.EVAL_AT, _unix(records["evaluation"]["at"]))
    if len(records) == len(DETECTORS):
        yield Level(contract.DRIFT_AT, min(_unix(record["at"]) for record in records.values()))


def _newest(store: Store, detector: str) -> Mapping[str, Any]:
    """The newest record of a detector; empty when there is none or it cannot be read."""
    try:
        names = store.names(f"drift/{detector}")
        return unsealed(store.read(f"drift/{detector}/{names[-1]}")) if names else {}
    except (StoreError, ValueError) as error:
        log.warning("the newest drift record of %s cannot be read: %s", detector, error)
        return {}


def _unix(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
