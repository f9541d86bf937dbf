"""From a source to an evaluated and released snapshot: steps as plain functions of a workbench, called by assets and `ragline compare`."""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from evals.collections import EvalSet, open_eval_set
from rag_assets.attributes import attributed_chunks, attributes_sha256
from rag_assets.background import background_of, require_uncontaminated
from rag_assets.corpus import read_pointer, require_table, table_batches
from rag_assets.cutting import aliases, split_chunks
from rag_assets.embedding import embed_missing, remember_fingerprint
from rag_assets.evaluation import Evaluation, evaluate, read_evaluation
from rag_assets.freezing import Coverage, Health, cover
from rag_assets.increments import find_parent
from rag_assets.indexing import publish_snapshot
from rag_assets.ingestion import Ingested, document_ids, list_source_files, parse_documents
from rag_assets.local_reranking import local_reranker, rerank_rule
from rag_assets.measurement import held_documents
from rag_assets.recipe import Recipe
from rag_assets.survey import Rows, survey
from rag_assets.throughput import TimedEncoder, add_throughput
from rag_assets.vectors import EmbeddingCache, Vectors, text_keys
from rag_assets.workbench import Workbench
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import SnapshotError
from rag_serving.passages import embedded_text
from rag_serving.retrieval import QUERY_CODE, open_table
from rag_serving.signals import contract, work
from rag_serving.snapshots import Manifest, read_manifest, snapshot_key
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class EmbeddedCorpus:
    """Vectors of all chunks and of their titles: `covered` chunks have both, `computed` texts were embedded for it.

    `content_sha256` identifies the vectors: fingerprint and text keys in order. `norm_error` is the largest distance of a norm from 1, infinite
    when a value is not finite.
    """

    rows: int
    covered: int
    dims: int
    computed: int
    fingerprint: str
    content_sha256: str
    norm_error: float
    seconds: float

    @property
    def healthy(self) -> bool:
        return self.norm_error < 1e-3


@dataclass(frozen=True, slots=True)
class BuiltSnapshot:
    manifest: Manifest
    health: Health | None

    @property
    def reused(self) -> bool:
        return self.health is None


def ingest_corpus(bench: Workbench) -> tuple[Ingested, Ingested, Ingested]:
    """Bring the corpus tables up to the source: its listed files, their documents, and the chunks of these. Raises SourceError."""
    return list_source_files(bench), parse_documents(bench), split_chunks(bench)


def embed_corpus(bench: Workbench, model_name: str) -> EmbeddedCorpus:
    """Embed every chunk and every title that the store does not have yet, then read every vector back."""
    started = time.perf_counter()
    computed = _embed_missing(bench, model_name)
    model = bench.model(model_name)
    cache = EmbeddingCache(bench.store, model.fingerprint, model.dims)
    digest, covered, norm_error = hashlib.sha256(model.fingerprint.encode()), 0, 0.0
    for batch in table_batches(bench.store, "chunks", columns=("title", "text")):
        both = [text_keys(texts) for texts in embedded_texts(batch)]
        held = np.logical_and(*(cache.holds(keys) for keys in both))
        covered += int(held.sum())
        for keys in both:
            digest.update(keys.tobytes())
            norms = np.linalg.norm(cache.vectors(keys[held]), axis=1)
            norm_error = max(norm_error, float(np.nan_to_num(np.abs(norms - 1), nan=np.inf).max(initial=0)))
    seconds = time.perf_counter() - started
    rows = require_table(bench.store, "chunks").rows
    return EmbeddedCorpus(rows, covered, model.dims, computed, model.fingerprint, digest.hexdigest(), norm_error, seconds)


@work.worked(contract.EMBED, lambda computed: {contract.COMPUTED: computed})
def _embed_missing(bench: Workbench, model_name: str) -> int:
    model = bench.model(model_name)
    remember_fingerprint(bench.store, bench.settings.model(model_name), model.fingerprint)

    def batches(column: int) -> Iterator[Sequence[str]]:
        return (embedded_texts(batch)[column] for batch in table_batches(bench.store, "chunks", columns=("title", "text")))

    timed = TimedEncoder(model)
    with bench.reporter.bar(f"embedding texts with {model_name}") as bar:
        texts = embed_missing(bench.store, timed, lambda: batches(0), progress=bar)
    add_throughput(bench.store, model.fingerprint, timed.throughput)
    with bench.reporter.bar(f"embedding titles with {model_name}") as bar:
        titles = embed_missing(bench.store, model, lambda: batches(1), progress=bar)
    bench.tally["embedded"] += texts + titles
    return texts + titles


def embedded_texts(batch: pa.RecordBatch) -> tuple[list[str], list[str]]:
    """What is embedded of each chunk: its text under its title, and its title, for which the text stands in where there is none."""
    titles, texts = batch["title"].to_pylist(), batch["text"].to_pylist()
    contents = [embedded_text(title, text) for title, text in zip(titles, texts, strict=True)]
    return contents, [title.strip() or content for title, content in zip(titles, contents, strict=True)]


def recipe_of(bench: Workbench, model_name: str, *, fingerprint: str) -> Recipe:
    """The recipe of a snapshot of the current chunks."""
    spec = bench.settings.model(model_name)
    return Recipe(
        model=spec,
        fingerprint=fingerprint,
        corpus_sha256=require_table(bench.store, "chunks").content_sha256,
        documents=require_table(bench.store, "documents").rows,
        chunking=bench.settings.chunking.model_dump(),
        index=bench.settings.index,
        retrieval=bench.settings.retrieval.scaled(spec.dense_scale),
        rerank=rerank_rule(bench.settings, spec),
        attributes_sha256=attributes_sha256(bench.store, bench.settings.index.filters),
    )


@work.worked(
    contract.INDEX,
    lambda made: {contract.SNAPSHOT_ID: made.manifest.snapshot_id, contract.ROWS: made.manifest.rows, contract.AS_BEFORE: made.reused},
)
def snapshot_corpus(bench: Workbench, model_name: str) -> BuiltSnapshot:
    """Build the snapshot of the current chunks for one embedding model, or find the one built from the same inputs."""
    model = bench.model(model_name)
    recipe = recipe_of(bench, model_name, fingerprint=model.fingerprint)
    _embed_missing(bench, model_name)
    cache = EmbeddingCache(bench.store, model.fingerprint, model.dims)

    def vectors(batch: pa.RecordBatch) -> tuple[Vectors, Vectors]:
        texts, titles = (cache.vectors(text_keys(column)) for column in embedded_texts(batch))
        return texts, titles

    def tokens(texts: Sequence[str]) -> list[Vectors]:
        bench.tally["embedded"] += len(texts)
        return model.encode_tokens(texts, query=False)

    late = tokens if recipe.late_interaction else None
    rows, started = Rows(lambda: attributed_chunks(bench.store, recipe.index.filters), vectors, late), time.perf_counter()
    with bench.reporter.bar(f"indexing with {model_name}"):
        build = publish_snapshot(bench.store, recipe, rows, parent=find_parent(bench.store, recipe))
        manifest, health = asyncio.run(build)
    pointer = _current(bench.store, model_name) | {"snapshot_id": manifest.snapshot_id}
    if health is not None:
        pointer[f"{manifest.built}_build"] = {"rows": manifest.rows, "seconds": round(time.perf_counter() - started, 3)}
    bench.store.write(_current_key(model_name), json.dumps(pointer).encode())
    bench.tally["built"] += health is not None
    return BuiltSnapshot(manifest, health)


def cover_snapshot(bench: Workbench, manifest: Manifest) -> Coverage:
    """Compare a published snapshot with the current chunks: what was lost on the way, and what has no chunk."""

    async def compare() -> Coverage:
        table = await open_table(bench.store.folder(snapshot_key(manifest.snapshot_id)))
        try:
            return await cover(table, manifest, survey(table_batches(bench.store, "chunks")))
        finally:
            table.close()

    return asyncio.run(compare())


def current_snapshot(bench: Workbench, model_name: str) -> Manifest | None:
    """The newest snapshot of one embedding model, None before its first build."""
    pointer = _current(bench.store, model_name)
    return read_manifest(bench.store, pointer["snapshot_id"]) if pointer else None


def build_time(bench: Workbench, model_name: str, built: str) -> tuple[int, float] | None:
    """Rows and seconds of the last "full" or "incremental" build of a model's snapshot; None before the first."""
    record = _current(bench.store, model_name).get(f"{built}_build")
    return (record["rows"], record["seconds"]) if record else None


def _current(store: Store, model_name: str) -> dict[str, Any]:
    key = _current_key(model_name)
    return read_pointer(store, key) if store.exists(key) else {}


def _current_key(model_name: str) -> str:
    return f"corpus/snapshot-{model_name}.json"


def load_eval_set(bench: Workbench) -> EvalSet:
    """The configured eval set, checked against the documents of the corpus: their ids, and that they do not hold its queries."""
    eval_set = open_eval_set(bench.settings.eval.source, root=bench.settings.root)
    eval_set.validate(document_ids(bench))
    require_uncontaminated(bench.store, eval_set)
    return eval_set.standing_in(aliases(bench))


def _measured(evaluation: Evaluation) -> work.Facts:
    queries, as_before = int(evaluation.metrics["queries"]), evaluation.reused
    return {
        contract.SNAPSHOT_ID: evaluation.snapshot_id,
        contract.QUERIES: queries,
        contract.MRR: evaluation.mrr,
        contract.AS_BEFORE: as_before,
    }


@work.worked(contract.MEASURE, _measured)
def evaluate_snapshot(bench: Workbench, manifest: Manifest, eval_set: EvalSet, *, fresh: bool = False) -> Evaluation:
    """Measure a snapshot with its own embedding model, or return the stored evaluation while it is young enough, unless `fresh` is asked.

    Slices of queries are those of the current corpus, whatever corpus the snapshot holds; places of answers are known in the current one only.
    """
    model_name = manifest.embedding_model
    of_this_corpus = manifest.corpus_sha256 == require_table(bench.store, "chunks").content_sha256
    measured_before = [known for known in current_evaluations(bench, eval_set) if known.corpus_sha256 == manifest.corpus_sha256]
    background = partial(background_of, bench.store, eval_set)
    with bench.reporter.bar(f"evaluating {model_name}") as bar:
        measured = evaluate(
            bench.store,
            manifest,
            eval_set if of_this_corpus else _as_held(bench, manifest, eval_set),
            lambda: LocalEncoder(bench.model(model_name)),
            k=bench.settings.eval.k,
            max_age_days=bench.settings.gate.max_age_days,
            rerankers=partial(local_reranker, bench.store, bench.settings),
            bm25=measured_before[0].bm25 if measured_before else None,
            background=background if of_this_corpus else lambda: replace(background(), spans={}),
            fresh=fresh,
            progress=bar,
        )
        return asyncio.run(measured)


def _as_held(bench: Workbench, manifest: Manifest, eval_set: EvalSet) -> EvalSet:
    """The eval set for a snapshot of another corpus, where of equal documents another one may stand for all of them."""
    equal: dict[str, list[str]] = {}
    for doc_id, standing in aliases(bench).items():
        equal.setdefault(standing, []).append(doc_id)
    judged = {doc_id for row in eval_set.qrels.values() for doc_id in row} & equal.keys()
    wanted = judged.union(*(equal[doc_id] for doc_id in judged))
    held = asyncio.run(held_documents(bench.store, manifest.snapshot_id, wanted))
    others = {doc_id: next((each for each in equal[doc_id] if each in held), doc_id) for doc_id in judged - held}
    return eval_set.standing_in(others)


def current_evaluations(bench: Workbench, eval_set: EvalSet) -> list[Evaluation]:
    """Evaluations of the current corpus on this eval set by present code, one a configured model at most: comparable rows of a leaderboard."""
    chunks = require_table(bench.store, "chunks")
    manifests = [manifest for spec in bench.settings.models if (manifest := current_snapshot(bench, spec.name))]
    comparable = [manifest for manifest in manifests if manifest.corpus_sha256 == chunks.content_sha256]
    found = [read_evaluation(bench.store, manifest.sha256, eval_set.sha256) for manifest in comparable]
    wanted = (bench.settings.eval.k, QUERY_CODE)
    return [evaluation for evaluation in found if evaluation and (evaluation.k, evaluation.query_code) == wanted]


def measure_current(bench: Workbench, model_name: str, eval_set: EvalSet) -> Evaluation:
    """Evaluate the current snapshot of a model; SnapshotError before its first build."""
    manifest = current_snapshot(bench, model_name)
    if manifest is None:
        raise SnapshotError(f"there is no snapshot of {model_name} yet.", fix="Materialize index_snapshot first.")
    return evaluate_snapshot(bench, manifest, eval_set)
