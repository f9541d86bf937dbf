"""Token vectors in a snapshot: written once, added to by increments, copied by rebuilds, and what reranking reads is what was encoded."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_line import MODEL, SPEC, chunk_table, passages, recipe_of, vectors_of

from evals.collections import EvalSet, Query
from evals.metrics import document_ranking
from rag_assets.evaluation import evaluate, read_rows
from rag_assets.increments import find_parent
from rag_assets.indexing import build_snapshot
from rag_assets.local_reranking import local_reranker, rerank_rule
from rag_assets.token_vectors import principal_axes, write_tokens
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import SnapshotError
from rag_serving.passages import embedded_text
from rag_serving.ranking.maxsim import FOLDER, TokenVectors, maxsim, passage_keys, unit_rows
from rag_serving.reranking import reordered
from rag_serving.retrieval import Retriever
from rag_serving.settings import Rerank, RerankWeights, Settings
from rag_serving.snapshots import link_files, snapshot_key, verify
from rag_serving.store import LocalStore

LATE = Settings(root=Path(), rerank=Rerank(method="maxsim", pool=20, weights=RerankWeights(fused=0.0, relevance=1.0)), models=(SPEC,))


class Counted:
    """The model's token vectors, and how many texts were asked for."""

    def __init__(self) -> None:
        self.texts = 0

    def __call__(self, texts) -> list:
        self.texts += len(texts)
        return MODEL.encode_tokens(texts, query=False)


def build_late(store, texts, *, settings=LATE, encode=None, parent=None, **recipe):
    chunks = chunk_table(texts)
    late = replace(recipe_of(chunks, **recipe), rerank=rerank_rule(settings, SPEC))
    parent = find_parent(store, late) if parent == "newest" else parent
    built = build_snapshot(store, late, chunks, *vectors_of(chunks), parent=parent, tokens=encode or Counted())
    return asyncio.run(built)[0]


def contents(texts):
    return [embedded_text(f"title {number}", text) for number, text in enumerate(texts)]


def open_tokens(store, manifest):
    return TokenVectors(store.folder(snapshot_key(manifest.snapshot_id)))


def test_what_is_stored_is_what_was_encoded(store):
    """Every chunk's vectors come back within the rounding of 8 bits, in order, and the manifest states their number, length and bytes."""
    texts = passages(30)
    manifest = build_late(store, texts)
    tokens = open_tokens(store, manifest)
    encoded = MODEL.encode_tokens(contents(texts), query=False)
    for (integers, scales), rows in zip(tokens.read(passage_keys(contents(texts))), encoded, strict=True):
        wanted = unit_rows(rows @ tokens.axes)
        assert np.abs(integers * scales[:, None] - wanted).max() <= scales.max() / 2 + 1e-6
    stated = manifest.rerank["tokens"]
    folder = store.folder(snapshot_key(manifest.snapshot_id)) / FOLDER
    assert stated["vectors"] == tokens.vectors == sum(map(len, encoded))
    assert stated["dims"] == tokens.axes.shape[1] == SPEC.dims
    assert stated["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_scores_are_maxsim_of_the_encoded_tokens(store):
    """Scores out of the packed files are those of plain MaxSim over the model's own token vectors, within 0.01."""
    texts = passages(25)
    tokens = open_tokens(store, build_late(store, texts))
    query = MODEL.encode_tokens(["which passage tells about topic3 and word10"], query=True)[0]
    exact = maxsim(query, MODEL.encode_tokens(contents(texts), query=False))
    assert np.abs(tokens.scores(query, contents(texts)) - exact).max() < 0.01


def test_an_increment_adds_a_segment(store):
    """A child encodes its new chunks alone, keeps its parent's files as they are, and scores old and new chunks."""
    before = passages(40)
    parent = build_late(store, before)
    after = [*before, "a passage that nobody wrote before"]
    encode = Counted()
    child = build_late(store, after, encode=encode, parent="newest")
    assert (child.built, child.parent, encode.texts) == ("incremental", parent.snapshot_id, 1)
    tokens = open_tokens(store, child)
    assert tokens.holds(passage_keys(contents(after))).all()
    assert child.rerank["tokens"]["vectors"] > parent.rerank["tokens"]["vectors"]
    folders = [store.folder(snapshot_key(each.snapshot_id)) / FOLDER / "000" / "vectors.i8" for each in (parent, child)]
    assert folders[0].samefile(folders[1])
    verify(store, parent.snapshot_id)
    verify(store, child.snapshot_id)


def test_a_full_build_copies_what_another_snapshot_has(store):
    """A build without a parent encodes no chunk whose token vectors stand in a sound snapshot of the model."""
    first = build_late(store, passages(30))
    encode = Counted()
    second = build_late(store, passages(30), encode=encode, hnsw_from_rows=10)
    assert second.snapshot_id != first.snapshot_id
    assert (second.built, encode.texts) == ("full", 0)
    same = open_tokens(store, first).read(passage_keys(contents(passages(30))))
    for (left, _), (right, _) in zip(same, open_tokens(store, second).read(passage_keys(contents(passages(30)))), strict=True):
        assert (left == right).all()


def test_a_damaged_snapshot_is_not_copied_from(store):
    """Token vectors whose bytes changed are encoded anew rather than copied."""
    first = build_late(store, passages(30))
    path = store.folder(snapshot_key(first.snapshot_id)) / FOLDER / "000" / "vectors.i8"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    encode = Counted()
    build_late(store, passages(30), encode=encode, hnsw_from_rows=10)
    assert encode.texts >= 30


def test_nothing_new_writes_no_segment(tmp_path):
    """A child without new texts has its parent's segments alone; a text that comes twice is stored once."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    for each in (parent, child):
        each.mkdir()
    encode = Counted()
    written = write_tokens(parent, [["one text", "another"], ["one text"]], encode, sample=["one text"])
    link_files(parent, child)
    again = write_tokens(child, [["another"]], encode, sample=["one text"])
    assert (written.computed, again.computed, again.vectors) == (2, 0, written.vectors)
    assert [each.name for each in sorted((child / FOLDER).iterdir())] == ["000", "axes.npy"]


@pytest.mark.parametrize("name", ["axes.npy", "000/keys.npy", "000/places.npy", "000/vectors.i8", "000/scales.f4"])
def test_broken_files_are_named(store, name):
    """A file of a segment that is cut short is a SnapshotError on opening, never a wrong score."""
    manifest = build_late(store, passages(10))
    path = store.folder(snapshot_key(manifest.snapshot_id)) / FOLDER / name
    path.write_bytes(path.read_bytes()[: -SPEC.dims])
    with pytest.raises(SnapshotError, match="cannot be read"):
        open_tokens(store, manifest)


def test_a_text_without_token_vectors_is_an_error(store):
    """Scoring a passage that the snapshot does not hold says so."""
    tokens = open_tokens(store, build_late(store, passages(10)))
    with pytest.raises(SnapshotError, match="1 of 2 passages"):
        tokens.scores(MODEL.encode_tokens(["word1"], query=True)[0], [contents(passages(10))[0], "never seen"])


def test_the_rule_needs_token_vectors(store):
    """A snapshot is never published with a late-interaction rule and without the vectors for it."""
    chunks = chunk_table(passages(10))
    late = replace(recipe_of(chunks), rerank=rerank_rule(LATE, SPEC))
    with pytest.raises(SnapshotError, match="no token vectors"):
        asyncio.run(build_snapshot(store, late, chunks, *vectors_of(chunks), parent=None))


def test_another_rule_is_another_snapshot(store):
    """Each setting that decides the order gives another build key; the budget, which does not, gives the same."""
    chunks = chunk_table(passages(5))

    def key(**changes):
        settings = LATE.model_copy(update={"rerank": LATE.rerank.model_copy(update=changes)})
        return replace(recipe_of(chunks), rerank=rerank_rule(settings, SPEC)).build_key

    assert key() == key(budget_ms=10.0)
    assert len({key(), key(pool=10), key(diversity=0.3), key(method="none"), key(weights=RerankWeights(relevance=3.0))}) == 5


def test_dense_scale_weighs_late_interaction():
    """A model whose cosines count four times has its token cosines counted so too; other methods' scores are not cosines of the model."""
    scaled = SPEC.model_copy(update={"dense_scale": 4.0})
    endpoint = LATE.model_copy(update={"rerank": Rerank(method="endpoint")})
    assert rerank_rule(LATE, scaled)["rule"]["weights"]["relevance"] == 4.0
    assert rerank_rule(endpoint, scaled)["rule"]["weights"]["relevance"] == 1.0


def test_a_snapshot_without_token_vectors_is_not_reranked(line):
    """A snapshot built before, or without reranking, opens and has no reranker."""
    store, (manifest, *_) = line
    assert manifest.rerank == {}

    async def opened():
        retriever, encoder = await Retriever.open(store, manifest.snapshot_id), LocalEncoder(MODEL)
        found = local_reranker(store, LATE, retriever, encoder)
        retriever.close()
        await encoder.aclose()
        return found

    assert asyncio.run(opened()) is None


def test_axes_keep_what_is_there():
    """The axes are orthonormal; as many as the vectors need lose nothing, fewer keep the longest directions."""
    rng = np.random.default_rng(3)
    rows = unit_rows((rng.normal(size=(200, 6)) @ rng.normal(size=(6, 40))).astype(np.float32))
    axes = principal_axes([rows[:50], rows[50:]], most=6)
    assert np.allclose(axes.T @ axes, np.eye(6), atol=1e-5)
    assert np.allclose(rows @ axes @ axes.T, rows, atol=1e-5)
    fewer = principal_axes([rows], most=2)
    random_plane, _ = np.linalg.qr(rng.normal(size=(40, 2)))
    assert np.square(rows @ fewer).sum() > np.square(rows @ random_plane).sum()


def test_an_evaluation_measures_what_is_served(store, tmp_path):
    """The rows of an evaluation are those of the reranked order, computed here from the model by hand."""
    texts = passages(40)
    manifest = build_late(store, texts)
    questions = ["topic3 and word10", "passage number 5 about topic5", "word39 is told", "topic0"]
    eval_set = EvalSet(
        "by hand", tuple(Query(f"q{at}", text) for at, text in enumerate(questions)), {f"q{at}": {f"d{at}": 1} for at in range(4)}
    )

    def reranker(retriever, encoder):
        return local_reranker(store, LATE, retriever, encoder)

    found = evaluate(store, manifest, eval_set, lambda: LocalEncoder(MODEL), k=10, max_age_days=7, rerankers=reranker)
    rows = {row["query_id"]: tuple(row["retrieved"]) for row in read_rows(store, asyncio.run(found))}

    async def by_hand(text):
        retriever = await Retriever.open(store, manifest.snapshot_id)
        hits = await retriever.retrieve(text, MODEL.encode_queries([text])[0], k=50)
        pool = hits[: LATE.rerank.pool]
        judged = open_tokens(store, manifest).scores(
            MODEL.encode_tokens([text], query=True)[0], [embedded_text(hit.title, hit.text) for hit in pool]
        )
        ordered = [*reordered(pool, judged.tolist(), weights=LATE.rerank.weights, distinctness=1.0), *hits[LATE.rerank.pool :]]
        retriever.close()
        return tuple(doc_id for doc_id, _ in document_ranking((hit.chunk_id, hit.doc_id, hit.score) for hit in ordered))[:10]

    assert rows == {query.query_id: asyncio.run(by_hand(query.text)) for query in eval_set.queries}
    plain = evaluate(LocalStore(store.root), manifest, eval_set, lambda: LocalEncoder(MODEL), k=10, max_age_days=7, fresh=True)
    assert {row["query_id"]: tuple(row["retrieved"]) for row in read_rows(store, asyncio.run(plain))} != rows
