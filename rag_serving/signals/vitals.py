"""The levels of a serving process, read when somebody collects its metrics: what is open, what the ledger says, what was measured last.

Measurements come from the records that the weekly run keeps in the store under `drift/`; those of a snapshot that is live no longer are left out,
so what nobody measured since a release is absent and not flattering.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from rag_serving.connections import MOST_CONNECTIONS
from rag_serving.edge.shedding import Slots
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.embedding.vector_probe import VectorProbe
from rag_serving.errors import StoreError
from rag_serving.live import Live
from rag_serving.pipeline import Service
from rag_serving.refusals import last_refusal
from rag_serving.releases import Action, Entry
from rag_serving.seals import unsealed
from rag_serving.signals import contract, trace
from rag_serving.signals.contract import Metric
from rag_serving.signals.metrics import Level
from rag_serving.store import Store

DETECTORS = ("evaluation", "embedding", "query", "corpus", "index")
_EVALUATION: tuple[tuple[str, Metric], ...] = (
    ("mrr", contract.EVAL_MRR),
    ("queries", contract.EVAL_QUERIES),
    ("mrr_at_release", contract.EVAL_MRR_AT_RELEASE),
    ("floor", contract.EVAL_FLOOR),
)
_INDEX: tuple[tuple[str, Metric], ...] = (
    ("unindexed_rows", contract.INDEX_UNINDEXED),
    ("corpus_behind", contract.INDEX_BEHIND),
    ("source_changes", contract.SOURCE_CHANGES),
    ("ann_recall", contract.ANN_RECALL),
)
_EMBEDDING: tuple[tuple[str, Metric], ...] = (("cosine_mean", contract.PAIRED_COSINE), ("same_model", contract.SAME_MODEL))

_WHEN = (("_at_release", "release"), ("_before", "before"))
_BY_DEPTH = ((r"ndcg_at_\d+", contract.EVAL_NDCG), (r"recall_at_\d+", contract.EVAL_RECALL), (r"mrr_at_\d+_low", contract.EVAL_MRR_LOW))
_BREAKER = {"closed": 0, "half_open": 1, "open": 2}
_CALLS = {"first": "requests", "retry": "retries", "hedge": "hedges", "failure": "failures", "refused": "refused"}

log = logging.getLogger(__name__)


def levels(service: Service, slots: Slots, store: Store, probe: VectorProbe) -> list[Level]:
    """Every level that is known; reads the store, so call it in a thread."""
    live = service.live
    known = (
        _working(service, slots),
        _released(live),
        _compared(live, probe),
        _measured(live, store),
        _rehearsed(store),
        _watched(store),
        _refused(live, store),
    )
    return list(chain.from_iterable(known))


def _working(service: Service, slots: Slots) -> Iterator[Level]:
    model, observations, counts = service.writer.model, service.traffic.observations, service.traffic.counts
    if model is not None:
        yield Level(contract.BREAKER, _BREAKER[model.state], ("llm",))
    yield Level(contract.OBSERVATIONS, observations.written, ("written",))
    yield Level(contract.OBSERVATIONS, observations.dropped, ("dropped",))
    yield from (Level(contract.CANARY_ANSWERS, counts[result], (result,)) for result in ("fell_back", "shadowed", "dropped", "failed"))
    varied = service.results.mean_variety()
    if varied is not None:
        yield Level(contract.VARIETY, varied)
    yield Level(contract.INFLIGHT, trace.inflight())
    yield Level(contract.WAITING, slots.waiting)
    yield Level(contract.RUNNING, slots.running)
    yield Level(contract.SLOTS, slots.limit)


def _asking(encoder: RemoteEncoder) -> Iterator[Level]:
    traffic = encoder.traffic
    yield Level(contract.BREAKER, _BREAKER[encoder.state], ("embedder",))
    yield Level(contract.POOL_IN_USE, traffic.in_flight)
    yield Level(contract.POOL_SIZE, MOST_CONNECTIONS)
    yield Level(contract.POOL_WAITERS, max(0, traffic.in_flight - MOST_CONNECTIONS))
    yield Level(contract.CACHED, traffic.cache_hits, ("hit",))
    yield Level(contract.CACHED, traffic.cache_misses, ("miss",))
    for kind in ("first", "retry", "hedge", "failure", "refused"):
        yield Level(contract.CALLS, getattr(traffic, _CALLS[kind]), (kind,))


def _released(live: Live) -> Iterator[Level]:
    state, serving = live.state, live.serving
    yield Level(contract.HOLDS, len(state.holds))
    changes = Counter(_change(entry) for entry in live.entries)
    yield from (Level(contract.RELEASES, changes[result], (result,)) for result in ("promoted", "overridden", "rolled_back"))
    if state.champion is not None:
        yield Level(contract.LEDGER_GENERATION, state.champion.number)
    if serving is not None:
        manifest = serving.snapshot.retriever.manifest
        yield Level(contract.INDEX_GENERATION, serving.number)
        yield Level(contract.INDEX_ROWS, manifest.rows)
        if isinstance(serving.snapshot.encoder, RemoteEncoder):
            yield from _asking(serving.snapshot.encoder)
        if serving.snapshot.reranker is not None:
            yield Level(contract.BREAKER, _BREAKER[serving.snapshot.rerank_breaker.state], ("reranker",))
        yield Level(contract.INDEX_AGE, (datetime.now(UTC) - datetime.fromisoformat(manifest.built_at)).total_seconds())
    if state.previous is not None:
        yield Level(contract.PREVIOUS_OPEN, float(live.manifest(state.previous.snapshot_id) is not None))


def _change(entry: Entry) -> str:
    """How a ledger entry came to name what is live; empty when it names nothing that is."""
    if entry.action is Action.PROMOTE:
        return "overridden" if entry.evidence.get("override") else "promoted"
    return "rolled_back" if entry.action is Action.ROLLBACK else ""


def _refused(live: Live, store: Store) -> Iterator[Level]:
    refusal, champion = last_refusal(store), live.state.champion
    if refusal is not None and (champion is None or refusal.after >= champion.number):
        yield Level(contract.REFUSED_AT, refusal.at.timestamp())


def _rehearsed(store: Store) -> Iterator[Level]:
    """The newest drill that went well."""
    record = _newest(store, "drills")
    if record:
        yield from (Level(contract.RESTORE_SECONDS_LAST, record[f"{part}_seconds"], (part,)) for part in ("restore", "open", "answer"))
        yield Level(contract.DRILL_AT, _unix(record["at"]))


def _watched(store: Store) -> Iterator[Level]:
    for sensor in contract.HEARTBEAT.labels[0].values:
        try:
            key = f"heartbeats/{sensor}.json"
            if store.exists(key):
                yield Level(contract.HEARTBEAT, _unix(json.loads(store.read(key))["at"]), (sensor,))
        except (StoreError, ValueError, KeyError, TypeError) as error:
            log.warning("the heartbeat of %s cannot be read: %s", sensor, error)


def _compared(live: Live, probe: VectorProbe) -> Iterator[Level]:
    seen, serving = probe.seen, live.serving
    if seen is not None and serving is not None and seen.snapshot_id == serving.snapshot_id:
        yield Level(contract.SERVICE_COSINE, seen.cosine)
        if seen.same_model is not None:
            yield Level(contract.SERVICE_SAME_MODEL, float(seen.same_model))


def _measured(live: Live, store: Store) -> Iterator[Level]:
    champion = live.state.champion
    if champion is None:
        return
    records = {name: record for name in DETECTORS if (record := _newest(store, f"drift/{name}")).get("snapshot_id") == champion.snapshot_id}
    numbers: dict[str, Mapping[str, float]] = {name: record["numbers"] for name, record in records.items()}
    evaluation, index = numbers.get("evaluation", {}), numbers.get("index", {})
    for found, wanted in ((evaluation, _EVALUATION), (index, _INDEX), (numbers.get("embedding", {}), _EMBEDDING)):
        yield from (Level(metric, found[name]) for name, metric in wanted if name in found)
    for pattern, metric in _BY_DEPTH:
        yield from (Level(metric, value) for name, value in evaluation.items() if re.fullmatch(pattern, name))
    yield from _varied(evaluation)
    for test in ("query", "corpus"):
        if "mmd" in numbers.get(test, {}):
            yield Level(contract.DRIFT_STATISTIC, numbers[test]["mmd"], (test,))
            yield Level(contract.DRIFT_P, numbers[test]["p_mmd"], (test,))
    if "mrr" in evaluation:
        yield Level(contract.EVAL_AT, _unix(records["evaluation"]["at"]))
    if len(records) == len(DETECTORS):
        yield Level(contract.DRIFT_AT, min(_unix(record["at"]) for record in records.values()))


def _varied(evaluation: Mapping[str, float]) -> Iterator[Level]:
    for name, value in evaluation.items():
        when = next((word for suffix, word in _WHEN if name.endswith(suffix)), "now")
        if name.startswith("distinct_documents"):
            yield Level(contract.DIVERSITY, value, (when,))
        if name.startswith("intra_list_similarity"):
            yield Level(contract.UNLIKENESS, 1 - value, (when,))


def _newest(store: Store, folder: str) -> Mapping[str, Any]:
    """The newest record of a folder; empty when there is none or it cannot be read."""
    try:
        names = store.names(folder)
        return unsealed(store.read(f"{folder}/{names[-1]}")) if names else {}
    except (StoreError, ValueError) as error:
        log.warning("the newest record of %s cannot be read: %s", folder, error)
        return {}


def _unix(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
