"""Retrieval in a snapshot: deterministic, total over odd queries, strict about vectors."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from small_line import MODEL, build, chunk_table, passages, recipe_of, vectors_of

from rag_assets.indexing import build_snapshot
from rag_serving.errors import ModelMismatch, QueryError, SnapshotError
from rag_serving.filters import condition, filterable, parse_filter
from rag_serving.passages import Passages
from rag_serving.retrieval import Retriever
from rag_serving.settings import Retrieval, Weights, Wording
from rag_serving.snapshots import snapshot_key

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


FILTERS = {"part": "text", "number": "number"}


def reader_of(number: int) -> list[str]:
    """Who may read the document: every 75th is for few, of the rest every 10th for some; then many for most, and the others for everyone."""
    if number % 75 == 7:
        return ["few"]
    return ["some"] if number % 10 == 3 else ["most", "all but guests"] if number % 10 < 8 else []


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """A store with two snapshots of 600 documents with access lists and metadata: searched exactly, and by HNSW."""
    from rag_serving.store import LocalStore

    store = LocalStore(tmp_path_factory.mktemp("closed"))
    texts = [f"passage {number} tells about topic{number % 7} and word{number % 40}" for number in range(600)]
    metadata = {"part": lambda number: "rare" if number % 75 == 7 else "ab"[number % 2], "number": lambda number: number}
    chunks = chunk_table(texts, acl=reader_of, metadata=lambda number: {key: of(number) for key, of in metadata.items()}, filters=FILTERS)
    recipes = [recipe_of(chunks, hnsw_from_rows=rows) for rows in (10_000, 100)]
    recipes = [replace(recipe, index=recipe.index.model_copy(update={"filters": FILTERS})) for recipe in recipes]
    vectors = vectors_of(chunks)
    return store, [asyncio.run(build_snapshot(store, recipe, chunks, *vectors, parent=None))[0] for recipe in recipes], vectors[0]


@pytest.fixture(params=[0, 1], ids=["exact", "indexed"])
def guarded(request, closed):
    return closed[0], closed[1][request.param]


def numbers(hits) -> list[int]:
    return [int(hit.doc_id[1:]) for hit in hits]


GROUPS = [frozenset(), frozenset({"few"}), frozenset({"some"}), frozenset({"few", "most"}), frozenset({"*", "=", "=few", "nobody"})]


@pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: "+".join(sorted(groups)) or "anonymous")
def test_nobody_finds_what_they_may_not_read(guarded, groups):
    """However many hits are asked for, by vectors and words, they are all the documents that are public or of the caller's groups, and no other."""
    readable = [number for number in range(600) if not reader_of(number) or groups & {*reader_of(number)}]
    by_both, by_words = search(guarded, "passage topic3", ("passage topic3", None), k=600, groups=groups)
    assert sorted(numbers(by_both)) == sorted(numbers(by_words)) == readable
    for hits in search(guarded, *(f"topic{number} word{3 * number}" for number in range(7)), k=10, groups=groups):
        assert len(hits) == 10
        assert {*numbers(hits)} <= {*readable}


def test_without_groups_only_what_is_public(guarded):
    """A caller of whom no groups are told finds public documents alone; only who asks for all may find all."""
    assert all(not reader_of(number) for number in numbers(search(guarded, "passage", k=600)[0]))
    assert len(search(guarded, "passage", k=600, groups=None)[0]) == 600


DENSE = Retrieval(weights=Weights(dense_text=1, dense_title=0, bm25_text=0, bm25_title=0), wording=Wording(pool=0))


@pytest.mark.parametrize("groups", [frozenset({"few"}), frozenset({"some"}), frozenset({"most"}), None], ids=str)
def test_recall_among_readable_documents(guarded, closed, groups):
    """Under an access list the nearest documents are those of exact search among the readable ones: the search itself is restricted."""
    readable = np.array([number for number in range(600) if groups is None or not reader_of(number) or groups & {*reader_of(number)}])
    shares = []
    queries = [f"topic{number} word{5 * number}" for number in range(7)]
    for query, hits in zip(queries, search(guarded, *queries, k=10, groups=groups, fusion=DENSE), strict=True):
        cosines = closed[2][readable] @ vector_of(query)
        nearest = np.sort(cosines)[-10]
        shares.append(np.mean([hit.signals["dense_text"] >= nearest - 1e-5 for hit in hits]))
        assert len(hits) == 10
    assert np.mean(shares) >= 0.95


def test_a_rare_group_is_found_in_full(guarded):
    """Of 8 documents of 600 that a filter and a group leave over, all 8 are found, and nothing pads them; others find none."""
    (hits,) = search(guarded, "topic3", k=50, groups=frozenset({"few"}), where=parse_filter({"part": {"eq": "rare"}}))
    assert sorted(numbers(hits)) == [number for number in range(600) if number % 75 == 7]
    assert search(guarded, "topic3", k=50, groups=frozenset({"most"}), where=parse_filter({"part": {"eq": "rare"}})) == [[]]


@pytest.mark.parametrize("signal", ["dense_text", "dense_title", "bm25_text", "bm25_title"])
def test_restrictions_come_before_the_search(closed, signal):
    """The plan of every signal has filter and access list as index queries below the search, and filters nothing of what was found."""

    async def run():
        retriever = await Retriever.open(closed[0], closed[1][1].snapshot_id)
        try:
            said = condition(parse_filter({"part": {"eq": "a"}}), filterable(FILTERS), readable_by=frozenset({"few"}))
            return await retriever._query(signal, "topic3", vector_of("topic3"), depth=10, allowed=said).explain_plan(verbose=True)
        finally:
            retriever.close()

    above, search_step, below = asyncio.run(run()).partition("MatchQuery" if signal.startswith("bm25") else "ANNSubIndex")
    assert search_step
    assert "array_has_any" not in above
    assert "meta_part" not in above
    (scalar,) = [line for line in below.splitlines() if "ScalarIndexQuery" in line]
    assert "acl_idx(LabelList)" in scalar
    assert "meta_part_idx(BTree)" in scalar


def test_filters_restrict_what_is_found(guarded):
    """Metadata, ids and uris restrict the hits, alone and together, by words alone as well."""
    asked = {"part": {"eq": "a"}, "number": {"range": {"gte": 100, "lt": 200}}}
    for vector in (vector_of("topic3"), None):
        (hits,) = search(guarded, ("topic3 passage", vector), k=600, where=parse_filter(asked), groups=None)
        assert sorted(numbers(hits)) == list(range(100, 200, 2))
    (hits,) = search(guarded, "topic3", k=600, where=parse_filter({"doc_id": {"prefix": "d59"}}), groups=None)
    assert sorted(numbers(hits)) == [59, *range(590, 600)]
    assert search(guarded, "topic3", where=parse_filter({"part": {"eq": "no such"}}), groups=None) == [[]]


def test_a_field_that_the_index_does_not_declare(snapshot):
    """A filter on metadata that this snapshot does not have is refused by a code of its own."""
    with pytest.raises(QueryError, match="there is no such field; there are doc_id, uri") as raised:
        search(snapshot, "topic3", where=parse_filter({"part": {"eq": "a"}}))
    assert raised.value.code == "invalid_filter"


LOST = {"text_index": ("metadata.lance", ["bm25_text", "bm25_title"]), "vector_index": ("auxiliary.idx", ["dense_text", "dense_title"])}


def break_indexes(store, manifest, *names):
    """Take away the files of an index while a snapshot is open, as a failing disk would."""
    for name in names:
        for path in store.folder(snapshot_key(manifest.snapshot_id)).glob(f"**/_indices/*/{name}"):
            for file in path.parent.iterdir():
                file.unlink()


def degraded_search(store, manifest, *broken, told=True, k=5):
    """Hits and what was told, of a search in a snapshot whose indexes vanish once it is open."""

    async def run():
        retriever, lost = await Retriever.open(store, manifest.snapshot_id), []
        try:
            break_indexes(store, manifest, *broken)
            hits = await retriever.retrieve("topic3 word12", vector_of("topic3 word12"), k=k, degrade=lost.append if told else None)
            return hits, lost
        finally:
            retriever.close()

    return asyncio.run(run())


@pytest.mark.parametrize("part", LOST)
def test_one_kind_of_signal_is_enough(line, part):
    """When full text cannot be searched vectors answer, and the other way round; what is missing is told and counts nothing."""
    store, manifests = line
    file, signals = LOST[part]
    hits, lost = degraded_search(store, manifests[3], file)
    assert lost == [part]
    assert len(hits) == 5
    assert all(not {*signals} & {*hit.signals} for hit in hits)


def test_what_is_left_ranks_as_it_would_alone(line):
    """Without full text the hits are those of the vectors alone, with the same wording evidence."""
    store, manifests = line
    weights = manifests[3].fusion().weights.model_copy(update={"bm25_text": 0.0, "bm25_title": 0.0})
    alone = search((store, manifests[3]), "topic3 word12", fusion=Retrieval(weights=weights))[0]
    assert degraded_search(store, manifests[3], "metadata.lance")[0] == alone


@pytest.mark.parametrize(("broken", "told"), [(["metadata.lance"], False), (["metadata.lance", "auxiliary.idx"], True)], ids=str)
def test_a_search_without_any_index_is_an_error(line, broken, told):
    """With nothing left to search, or nobody to tell, a damaged snapshot is an error: an evaluation never measures half a search."""
    store, manifests = line
    with pytest.raises(SnapshotError, match=f"{manifests[3].snapshot_id} cannot be searched"):
        degraded_search(store, manifests[3], *broken, told=told)


@pytest.mark.parametrize("room", [0, 5_000, 10_000_000], ids=["no passages kept", "a few kept", "all kept"])
def test_passages_kept_in_memory_change_nothing(snapshot, room):
    """However many passages are kept, hits are the same, the first time and again; what is kept never outgrows its room."""
    queries = ["topic3 word12", "passage 7", "topic3 word12", "word1"]
    wanted = search(snapshot, *queries, k=20)

    async def run():
        retriever = await Retriever.open(snapshot[0], snapshot[1].snapshot_id)
        retriever._passages = Passages(retriever._table, most_bytes=room)
        try:
            found = [await retriever.retrieve(query, vector_of(query), k=20) for query in queries]
            return found, retriever._passages.size, len(retriever._passages)
        finally:
            retriever.close()

    found, size, kept = asyncio.run(run())
    assert found == wanted
    assert size <= room
    assert (kept > 0) == (room > 0)
