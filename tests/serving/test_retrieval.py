"""Retrieval in a snapshot: deterministic, total over odd queries, strict about vectors."""

import asyncio

import numpy as np
import pytest
from small_line import MODEL, build, chunk_table, passages, recipe_of

from rag_assets.indexing import build_snapshot
from rag_serving.errors import ModelMismatch, QueryError
from rag_serving.retrieval import Retriever
from rag_serving.settings import Retrieval, Weights

ODD = {
    "empty": "",
    "blank": " \n\t ",
    "stop words": "the of and is",
    "punctuation": "?!... ---",
    "10,000 characters": "word7 " * 1666,
    "one word of 10,000": "a" * 10_000,
    "quotes": '"topic3" \'word',
    "operators": "topic3 AND (word1 OR NOT word2) +a -b ~1 ^2 * title:x",
    "backslash": 'topic3\\" \\',
    "emoji": "🙂🙃 topic3",
    "CJK": "東京タワー",
    "right to left": "שלום topic3",
    "NUL": "topic3\x00word",
    "lone surrogate": "topic3 \ud800",
    "combining": "tópic3 e\u0301\u0301\u0301",
    "SQL": "'; DROP TABLE chunks; --",
}


@pytest.fixture(params=[0, 3], ids=["exact", "indexed"])
def snapshot(request, built):
    """A store folder and the id of a snapshot searched exactly, then of one with HNSW indexes."""
    from rag_serving.store import LocalStore

    return LocalStore(built[0]), built[1][request.param]


def search(snapshot, *queries, **changes):
    """The hits of each query in one opening of the snapshot; a query is text, or text with a vector."""

    async def run():
        store, manifest = snapshot
        retriever = await Retriever.open(store, manifest.snapshot_id)
        try:
            pairs = [query if isinstance(query, tuple) else (query, vector_of(query)) for query in queries]
            return [await retriever.retrieve(text, vector, **{"k": 5, **changes}) for text, vector in pairs]
        finally:
            retriever.close()

    return asyncio.run(run())


def vector_of(text: str):
    return MODEL.encode_queries([text])[0]


def test_finds_the_passage_with_the_words(snapshot):
    """A passage is the first hit for its own text, with its fields, span and the score of each signal."""
    tag = "first" if snapshot[1].rows == 40 else "indexed"
    (hits,) = search(snapshot, passages(40, tag=tag)[17])
    best = hits[0]
    assert (best.doc_id, best.uri, best.title) == ("d17", "u17", "title 17")
    assert best.text == passages(40, tag=tag)[17]
    assert (best.start, best.end) == (0, len(best.text))
    assert {"dense_text", "dense_title", "bm25_text", "bm25_title"} <= set(best.signals)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_same_query_same_hits(snapshot):
    """The same query gives the same hits and scores in one opening, in another, and when asked many times at once."""
    query = "topic3 and word12"

    async def at_once():
        store, manifest = snapshot
        retriever = await Retriever.open(store, manifest.snapshot_id)
        try:
            return await asyncio.gather(*(retriever.retrieve(query, vector_of(query), k=10) for _ in range(16)))
        finally:
            retriever.close()

    once, again = search(snapshot, query, query, k=10)
    assert once == again == search(snapshot, query, k=10)[0]
    assert all(hits == once for hits in asyncio.run(at_once()))


def test_fewer_hits_are_the_beginning_of_more(snapshot):
    """K = 3 gives the first three of k = 10."""
    assert search(snapshot, "topic3", k=3)[0] == search(snapshot, "topic3", k=10)[0][:3]


def test_ties_go_to_the_row_written_first(store):
    """Equal passages have equal scores and come as they were written, also where they are more than the candidates asked for."""
    manifest, _ = build(store, ["the same words everywhere"] * 60, title="one title", retrieval=Retrieval(candidates=10))
    for vector in (vector_of("same words"), None):
        for k in (5, 10, 60):
            (hits,) = search((store, manifest), ("same words", vector), k=k)
            assert [hit.doc_id for hit in hits] == [f"d{number}" for number in range(k)]
            assert len({hit.score for hit in hits[:10]}) == 1


@pytest.mark.parametrize("query", ODD.values(), ids=ODD.keys())
def test_odd_queries_are_answered(snapshot, query):
    """No text crashes the search: with a vector there are always hits, by words alone there may be none."""
    vector = vector_of("topic3")
    with_vector, alone = search(snapshot, (query, vector), (query, None))
    assert len(with_vector) == 5
    assert len(alone) <= 5
    assert all(np.isfinite(hit.score) for hit in with_vector + alone)


def test_more_than_there_is(snapshot):
    """A k beyond the rows gives every row once."""
    rows = snapshot[1].rows
    for k in (rows, rows + 1, 10 * rows):
        (hits,) = search(snapshot, "topic3", k=k)
        assert len({hit.chunk_id for hit in hits}) == len(hits) == rows


def test_no_hits_asked_for(snapshot):
    """A k below 1 is refused, not answered with a slice from the wrong end."""
    for k in (0, -1):
        with pytest.raises(QueryError, match=f"k is {k}"):
            search(snapshot, "topic3", k=k)


def _bad_vectors():
    good = vector_of("topic3")
    spoiled = good.copy()
    spoiled[3] = np.nan
    endless = good.copy()
    endless[3] = np.inf
    return {
        "NaN": (spoiled, QueryError),
        "infinite": (endless, QueryError),
        "zero": (np.zeros_like(good), QueryError),
        "unnormalised": (good * 2, QueryError),
        "short": (good[:32], ModelMismatch),
        "two rows": (np.stack([good, good]), ModelMismatch),
        "empty": (good[:0], ModelMismatch),
    }


@pytest.mark.parametrize(("vector", "error"), _bad_vectors().values(), ids=_bad_vectors().keys())
def test_bad_vectors_are_refused(snapshot, vector, error):
    """A vector of the wrong length, not finite or not of unit norm is refused, never searched."""
    with pytest.raises(error, match="the query vector has"):
        search(snapshot, ("topic3", vector))


def test_dense_weights_alone_still_answer_by_words(snapshot):
    """Without a vector, weights that name dense signals only fall back to full text."""
    assert search(snapshot, ("topic3", None), fusion=Retrieval(weights=Weights(bm25_text=0, bm25_title=0)))[0]


def test_no_active_signal(store):
    """Weights for titles alone, in a corpus without titles, are refused, not answered with nothing."""
    chunks = chunk_table(passages(10), title="")
    vectors = MODEL.encode_documents(passages(10))
    manifest, _ = asyncio.run(build_snapshot(store, recipe_of(chunks), chunks, vectors, vectors, parent=None))
    with pytest.raises(QueryError, match="no retrieval signal"):
        search((store, manifest), "topic3", fusion=Retrieval(weights=Weights(dense_text=0, bm25_text=0)))


def test_neighbours_agree_with_arithmetic(snapshot):
    """Exact neighbours are those of a full product in numpy, and the index finds nearly all of them."""
    store, manifest = snapshot
    tag = "first" if manifest.rows == 40 else "indexed"
    contents = [f"title {number}\n{text}" for number, text in enumerate(passages(manifest.rows, tag=tag))]
    cosines = MODEL.encode_documents(contents) @ vector_of("topic3 word12")

    async def run():
        retriever = await Retriever.open(store, manifest.snapshot_id)
        try:
            vector = vector_of("topic3 word12")
            return [await retriever.neighbours(vector, k=10, exact=exact) for exact in (True, False)]
        finally:
            retriever.close()

    exact, approximate = asyncio.run(run())
    np.testing.assert_allclose([hit.cosine for hit in exact], np.sort(cosines)[::-1][:10], atol=1e-5)
    assert len({hit.row for hit in exact} & {hit.row for hit in approximate}) >= 9
    if not manifest.index["vector_index"]:
        assert exact == approximate


def test_manifest_says_how_it_is_searched(built):
    """At and above the row threshold there is a vector index, below it none."""
    _, manifests = built
    assert [manifest.index["vector_index"] for manifest in manifests] == [None, None, None, "IVF_HNSW_SQ"]


def test_deep_candidates_in_an_index(store):
    """Candidates times the refinement beyond the configured `ef` are searched all the same."""
    manifest, _ = build(store, passages(150), hnsw_from_rows=100, retrieval=Retrieval(candidates=1000))
    assert len(search((store, manifest), "topic3", k=150)[0]) == 150
