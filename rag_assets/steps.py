"""From chunks to an evaluated and released snapshot: steps as plain functions of a workbench, called by assets and `ragline compare`."""

import asyncio
import json
import time
from dataclasses import dataclass

import numpy as np

from evals.collections import EvalSet, open_eval_set
from rag_assets.corpus import read_table
from rag_assets.embedding import Embedded, embed
from rag_assets.evaluation import Evaluation, evaluate, read_evaluation
from rag_assets.gating import release
from rag_assets.indexing import Health, Recipe, build_snapshot
from rag_assets.ingestion import document_ids, require_table
from rag_assets.tracking import TrackedRun, try_track
from rag_assets.workbench import Workbench
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import SnapshotError
from rag_serving.releases import Entry, Ledger, current_actor
from rag_serving.retrieval import embedded_text
from rag_serving.snapshots import Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class EmbeddedCorpus:
    """Vectors of all chunks and of their titles, in chunk order, with how many had to be computed and at what speed (texts a second)."""

    texts: Embedded
    titles: Embedded
    fingerprint: str
    seconds: float

    @property
    def computed(self) -> int:
        return self.texts.computed + self.titles.computed

    @property
    def norm_error(self) -> float:
        """Largest distance of a vector's norm from 1; NaN when a value is not finite."""
        norms = np.linalg.norm(np.concatenate([self.texts.vectors, self.titles.vectors]), axis=1)
        return float(np.abs(norms - 1).max())

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


@dataclass(frozen=True, slots=True)
class Measured:
    """An evaluation and where MLflow shows it; None when MLflow was not reached."""

    evaluation: Evaluation
    tracked: TrackedRun | None


def embed_corpus(bench: Workbench, model_name: str) -> EmbeddedCorpus:
    """Embed every chunk and every title that the store does not have yet."""
    _, chunks = read_table(bench.store, "chunks")
    model = bench.model(model_name)
    titles, texts = chunks["title"].to_pylist(), chunks["text"].to_pylist()
    contents = [embedded_text(title, text) for title, text in zip(titles, texts, strict=True)]
    headlines = [title.strip() or content for title, content in zip(titles, contents, strict=True)]
    started = time.perf_counter()
    with bench.reporter.bar(f"embedding texts with {model_name}") as bar:
        embedded_texts = embed(bench.store, model, contents, progress=bar)
    with bench.reporter.bar(f"embedding titles with {model_name}") as bar:
        embedded_titles = embed(bench.store, model, headlines, progress=bar)
    bench.tally["embedded"] += embedded_texts.computed + embedded_titles.computed
    return EmbeddedCorpus(embedded_texts, embedded_titles, model.fingerprint, time.perf_counter() - started)


def snapshot_corpus(bench: Workbench, model_name: str) -> BuiltSnapshot:
    """Build the snapshot of the current chunks for one embedding model, or find the one built from the same inputs."""
    table, chunks = read_table(bench.store, "chunks")
    embedded = embed_corpus(bench, model_name)
    champion = Ledger(bench.store).state().champion
    spec = bench.settings.model(model_name)
    recipe = Recipe(
        model=spec,
        fingerprint=embedded.fingerprint,
        corpus_sha256=table.content_sha256,
        documents=require_table(bench, "documents").rows,
        chunking=bench.settings.chunking.model_dump(),
        index=bench.settings.index,
        retrieval=bench.settings.retrieval.scaled(spec.dense_scale),
    )
    parent = champion.snapshot_id if champion else None
    build = build_snapshot(bench.store, recipe, chunks, embedded.texts.vectors, embedded.titles.vectors, parent=parent)
    manifest, health = asyncio.run(build)
    bench.store.write(_current_key(model_name), json.dumps({"snapshot_id": manifest.snapshot_id}).encode())
    bench.tally["built"] += health is not None
    return BuiltSnapshot(manifest, health)


def current_snapshot(bench: Workbench, model_name: str) -> Manifest | None:
    """The newest snapshot of one embedding model, None before its first build."""
    key = _current_key(model_name)
    return read_manifest(bench.store, json.loads(bench.store.read(key))["snapshot_id"]) if bench.store.exists(key) else None


def _current_key(model_name: str) -> str:
    return f"corpus/snapshot-{model_name}.json"


def load_eval_set(bench: Workbench) -> EvalSet:
    """The configured eval set, checked against the documents of the corpus."""
    eval_set = open_eval_set(bench.settings.eval.source, root=bench.settings.root)
    eval_set.validate(document_ids(bench))
    return eval_set


def evaluate_snapshot(bench: Workbench, manifest: Manifest, eval_set: EvalSet) -> Evaluation:
    """Measure a snapshot with its own embedding model, or return the stored evaluation while it is fresh."""
    model_name = manifest.embedding_model
    measured_before = [known for known in current_evaluations(bench, eval_set) if known.corpus_sha256 == manifest.corpus_sha256]
    with bench.reporter.bar(f"evaluating {model_name}") as bar:
        measured = evaluate(
            bench.store,
            manifest,
            eval_set,
            lambda: LocalEncoder(bench.model(model_name)),
            k=bench.settings.eval.k,
            max_age_days=bench.settings.gate.max_age_days,
            bm25=measured_before[0].bm25 if measured_before else None,
            progress=bar,
        )
        return asyncio.run(measured)


def current_evaluations(bench: Workbench, eval_set: EvalSet) -> list[Evaluation]:
    """Evaluations of the current corpus on this eval set, one a configured model at most: the comparable rows of the leaderboard."""
    chunks = require_table(bench, "chunks")
    manifests = [manifest for spec in bench.settings.models if (manifest := current_snapshot(bench, spec.name))]
    comparable = [manifest for manifest in manifests if manifest.corpus_sha256 == chunks.content_sha256]
    found = [read_evaluation(bench.store, manifest.sha256, eval_set.sha256) for manifest in comparable]
    return [evaluation for evaluation in found if evaluation and evaluation.k == bench.settings.eval.k]


def measure_current(bench: Workbench, model_name: str, *, dagster_run_id: str | None = None) -> Measured:
    """Evaluate the current snapshot of a model and show the result in MLflow."""
    manifest = current_snapshot(bench, model_name)
    if manifest is None:
        raise SnapshotError(f"there is no snapshot of {model_name} yet.", fix="Materialize index_snapshot first.")
    evaluation = evaluate_snapshot(bench, manifest, load_eval_set(bench))
    return Measured(evaluation, try_track(bench, manifest, evaluation, dagster_run_id=dagster_run_id))


def release_current(bench: Workbench) -> Entry | None:
    """Judge the current evaluations and promote the best that passes and brings something."""
    eval_set = load_eval_set(bench)
    return release(
        bench.store,
        current_evaluations(bench, eval_set),
        gate=bench.settings.gate,
        actor=current_actor(bench.settings.places.actor),
        champion_evaluation=lambda snapshot_id: evaluate_snapshot(bench, read_manifest(bench.store, snapshot_id), eval_set),
    )
