"""What the next run will do and cost, said before it runs: documents, chunks, texts to embed, snapshots, minutes, and why. Reads only.

Documents are compared by version, as the run does it. What they will be cut into is not known before, so it is taken to be as much as now:
`exact` says whether anything had to be estimated.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from rag_assets import cutting, ingestion, steps
from rag_assets.attributes import attributed_chunks
from rag_assets.corpus import Table, table_batches, whole_table
from rag_assets.earlier import RowIndex
from rag_assets.embedding import known_fingerprint, missing
from rag_assets.increments import affordable, find_parent, increment_from
from rag_assets.recipe import Recipe
from rag_assets.survey import survey
from rag_assets.throughput import read_throughput
from rag_assets.vectors import EmbeddingCache
from rag_assets.workbench import Workbench
from rag_serving.snapshots import Manifest, manifests

_CHUNKS_A_DOCUMENT = 3.0  # before anything was cut


@dataclass(frozen=True, slots=True)
class CorpusPlan:
    """Items of the source: `changed` are new or changed, `parse` are those and what is parsed in another way now, `gone` are no longer there.

    `cut` documents become about `new_chunks` chunks. `chunks` is about how many there will be, `dropped` about how many of now will not.
    """

    items: int
    parse: int
    changed: int
    gone: int
    cut: int
    new_chunks: int
    dropped: int
    chunks: int
    because: tuple[str, ...]

    @property
    def unchanged(self) -> bool:
        return not (self.parse or self.gone or self.cut)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Texts to embed, titles among them, and the snapshot: "none" when the current one stays, "incremental" or "full".

    `minutes` is of embedding and indexing, from the speed of earlier runs; None without any of at least a hundredth of the size.
    """

    model: str
    texts: int
    snapshot: str
    minutes: float | None
    because: tuple[str, ...]
    exact: bool


@dataclass(frozen=True, slots=True)
class Plan:
    corpus: CorpusPlan
    models: tuple[ModelPlan, ...]

    @property
    def exact(self) -> bool:
        return all(model.exact for model in self.models)

    @property
    def minutes(self) -> float | None:
        known = [model.minutes for model in self.models if model.minutes is not None]
        return sum(known) if len(known) == len(self.models) else None


def plan(bench: Workbench, models: Sequence[str]) -> Plan:
    """What `ragline run` with these models would do now. Raises SourceError when the source cannot be listed."""
    corpus = plan_corpus(bench)
    return Plan(corpus, tuple(plan_model(bench, name, corpus) for name in models))


def plan_corpus(bench: Workbench) -> CorpusPlan:
    tables = {name: whole_table(bench.store, name) for name in ("documents", "quarantine", "chunks", "cuts")}
    documents, quarantine, chunks, cuts = tables.values()
    parsed_alike = documents is not None and documents.basis == ingestion.documents_basis(bench)
    cut_alike = cuts is not None and cuts.basis == cutting.chunks_basis(bench)
    found = _compare_items(bench, documents, quarantine)
    parse = found["new"] + found["changed"] if parsed_alike else found["items"]
    known = (documents.rows if documents else 0) + (quarantine.rows if quarantine else 0)
    gone = known - found["changed"] - found["same"]
    cut = parse if cut_alike else found["items"]
    per_document = chunks.rows / max(documents.rows, 1) if chunks and documents else _CHUNKS_A_DOCUMENT
    before = chunks.rows if chunks else 0
    new_chunks = round(cut * per_document)
    dropped = min(before, round((gone + cut - found["new"]) * per_document))
    because = [f"{found[name]} {word}" for name, word in (("new", "new"), ("changed", "changed")) if found[name]] + [f"{gone} gone"] * bool(
        gone
    )
    because += ["parsing, its limits or the source address changed: everything is parsed again"] * (
        documents is not None and not parsed_alike
    )
    because += ["chunking or the tokenizer that sizes chunks changed: everything is cut again"] * (cuts is not None and not cut_alike)
    return CorpusPlan(
        found["items"],
        parse,
        found["new"] + found["changed"],
        gone,
        cut,
        new_chunks,
        dropped,
        before - dropped + new_chunks,
        tuple(because),
    )


def _compare_items(bench: Workbench, documents: Table | None, quarantine: Table | None) -> Mapping[str, int]:
    """How many items there are, and how many of them are the same as in the tables, changed, or new."""
    indexes = [RowIndex(bench.store, table, key="item", version="version") for table in (documents, quarantine)]
    found = Counter(items=0, same=0, changed=0, new=0)
    for block in ingestion.blocks(ingestion.open_items(bench)):
        uris, versions = [item.uri for item in block], [ingestion.version_of(item) for item in block]
        places, same = zip(*(index.find(uris, versions) for index in indexes), strict=True)
        known, alike = (np.stack(places) >= 0).any(axis=0), np.stack(same).any(axis=0)
        found.update(items=len(block), same=int(alike.sum()), changed=int((known & ~alike).sum()), new=int((~known).sum()))
    return found


def plan_model(bench: Workbench, name: str, corpus: CorpusPlan) -> ModelPlan:
    spec = bench.settings.model(name)
    local = spec.source.startswith(("path:", "hashing:"))
    fingerprint = bench.model(name).fingerprint if local else known_fingerprint(bench.store, spec)
    if fingerprint is None:
        reason = "its row in ragline.toml changed" if steps.current_snapshot(bench, name) else "its first snapshot"
        return ModelPlan(name, 2 * corpus.chunks, "full", None, (reason,), exact=False)
    texts = 2 * corpus.new_chunks
    if whole_table(bench.store, "chunks"):
        cache = EmbeddingCache(bench.store, fingerprint, spec.dims)
        batches = table_batches(bench.store, "chunks", columns=("title", "text"))
        held_back = len(missing(cache, (texts for batch in batches for texts in steps.embedded_texts(batch)))[0])
        texts = held_back if corpus.unchanged else min(texts + held_back, 2 * corpus.chunks)
    snapshot, reasons = _plan_snapshot(bench, name, fingerprint, corpus)
    measured = read_throughput(bench.store, fingerprint)
    embedding = _minutes(texts, (measured.texts, measured.seconds) if measured else None)
    indexing = _minutes(corpus.chunks if snapshot != "none" else 0, steps.build_time(bench, name, snapshot))
    minutes = None if embedding is None or indexing is None else round(embedding + indexing, 4)
    return ModelPlan(name, texts, snapshot, minutes, tuple(reasons), exact=corpus.unchanged)


def _plan_snapshot(bench: Workbench, name: str, fingerprint: str, corpus: CorpusPlan) -> tuple[str, list[str]]:
    if whole_table(bench.store, "chunks") is None or whole_table(bench.store, "documents") is None:
        return "full", ["its first snapshot"]
    recipe = steps.recipe_of(bench, name, fingerprint=fingerprint)
    if corpus.unchanged and any(manifest.build_key == recipe.build_key for manifest in manifests(bench.store)):
        return "none", []
    parent = find_parent(bench.store, recipe)
    if parent is None:
        return "full", [_difference(recipe, steps.current_snapshot(bench, name))]
    if corpus.unchanged:
        found = survey(attributed_chunks(bench.store, bench.settings.index.filters))
        increment = asyncio.run(increment_from(bench.store, recipe, found, parent))
        return (
            ("incremental", [f"{increment.delta.rows} of {found.rows} rows differ"])
            if increment
            else ("full", [_exhausted(recipe, parent, corpus.chunks)])
        )
    delta = corpus.new_chunks + corpus.dropped
    if affordable(recipe, parent, delta=delta, rows=corpus.chunks):
        return "incremental", [f"about {delta} of {corpus.chunks} rows differ"]
    return "full", [_exhausted(recipe, parent, corpus.chunks)]


def _difference(recipe: Recipe, current: Manifest | None) -> str:
    if current is None:
        return "its first snapshot"
    if current.fingerprint != recipe.fingerprint:
        return "the model changed"
    if dict(current.chunking) != dict(recipe.chunking):
        return "the chunking changed"
    return "LanceDB changed" if current.lancedb != version("lancedb") else "the index settings changed"


def _exhausted(recipe: Recipe, parent: Manifest, rows: int) -> str:
    if recipe.index_of(rows)["vector_index"] != parent.index["vector_index"]:
        return f"the rows cross index.hnsw_from_rows ({recipe.index.hnsw_from_rows})"
    generation = parent.delta.get("generation", 0)
    if generation >= recipe.index.rebuild_after:
        return f"{generation} incremental builds since the last full one"
    return f"too many rows changed since the last full build (index.rebuild_share {recipe.index.rebuild_share:g})"


def _minutes(count: int, measured: tuple[int, float] | None) -> float | None:
    """How long this many take, by how many seconds so many took; None without that, and when it is less than a hundredth of them."""
    if not count:
        return 0.0
    if measured is None or measured[0] * 100 < count:
        return None
    return count / measured[0] * measured[1] / 60
