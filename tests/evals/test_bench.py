"""Benches run at a tiny size: what they print must come from the run, on the same work on both sides."""

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest

from evals.bench import embedder, embedding, load, overhead, quality, reranking, retrieval, rollback, scale, verify
from evals.bench.__main__ import BENCHES, BY_NAME_ONLY, _chosen
from evals.bench.figures import DOUBT, Figure, Pairs, alternate, figures_table, kept, reached
from evals.bench.rig import Rig, clustered_vectors
from rag_assets.workbench import LogReporter
from rag_serving.errors import ModelError
from rag_serving.settings import Corpus, EvalSetChoice, ModelSpec, Settings

DIMS = 32
WORDS = ("bucket", "index", "vector", "snapshot", "ledger", "gate", "canary", "query", "score", "chunk", "drift", "hold")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> ModelSpec:
    """A real sentence-transformers model of a few kilobytes: one random vector a word."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, **{word: number for number, word in enumerate(WORDS, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(0).standard_normal((len(vocabulary), DIMS)).astype(np.float32)
    folder = tmp_path_factory.mktemp("model")
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu").save(str(folder))
    return ModelSpec(name="tiny", source=f"path:{folder}", dims=DIMS, max_tokens=128)


@pytest.fixture(scope="module")
def collections(tmp_path_factory) -> Path:
    """A folder with one BEIR collection, `scifact`, of 24 documents and 12 queries."""
    root = tmp_path_factory.mktemp("collections")
    folder = root / "scifact"
    (folder / "qrels").mkdir(parents=True)
    pairs = [(first, second) for at, first in enumerate(WORDS) for second in (WORDS[(at + 1) % 12], WORDS[(at + 5) % 12])]
    documents = [
        {"_id": f"d{n}", "title": f"{a} {b}", "text": f"The {a} and the {b} are told about here, in page {n}."}
        for n, (a, b) in enumerate(pairs)
    ]
    queries = [{"_id": f"q{n}", "text": f"tell me about {a} and {b}"} for n, (a, b) in enumerate(pairs[::2])]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{2 * n}\t1\n" for n in range(12)))
    return root


@pytest.fixture
def rig(tiny_model, collections, tmp_path) -> Rig:
    address = f"beir:{collections / 'scifact'}"
    settings = Settings(
        root=tmp_path,
        corpus=Corpus(source=address),
        eval=EvalSetChoice(source=address),
        models=(tiny_model,),
        default_models=("tiny",),
    )
    (tmp_path / "scratch").mkdir()
    return Rig(settings, tmp_path / "scratch", LogReporter(), "tiny")


SIZES = {
    "embedding": lambda rig, _: embedding.run(rig, texts=20, rounds=2),
    "retrieval": lambda rig, _: retrieval.run(rig, queries=6, rows=300, searches=10),
    "verify": lambda rig, _: verify.run(rig, rows=100, rounds=2),
    "rollback": lambda rig, _: rollback.run(rig, rows=30, rounds=2),
    "embedder": lambda rig, _: embedder.run(rig, texts=12, clients=3, rounds=2, singles=4),
    "scale": lambda rig, _: scale.run(rig, rows=300, searches=6),
    "overhead": lambda rig, _: overhead.run(rig, model="tiny", requests=5),
    "load": lambda rig, _: load.run(rig, model="tiny", seconds=1.0),
    "quality": lambda rig, collections: quality.run(rig, datasets=collections, queries=8),
    "reranking": lambda rig, collections: reranking.run(rig, datasets=collections, collections=["scifact"]),
}


def test_every_bench_has_a_tiny_size_here():
    """No bench is listed that the test below does not run."""
    assert SIZES.keys() == BENCHES.keys()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.heavy] if name in {"load", "overhead"} else []) for name in SIZES])
def test_bench_gives_finite_numbers(name, rig, collections):
    """Each bench runs from nothing and gives finite, sensible figures that the table can show."""
    figures = asyncio.run(SIZES[name](rig, collections))
    assert figures
    for figure in figures:
        numbers = [figure.ours, figure.peer, figure.ratio, *(figure.spread or ())]
        assert all(math.isfinite(number) for number in numbers if number is not None), figure
        assert figure.ours > 0 or "added" in figure.what, figure
        assert (figure.ratio is None) == (figure.peer is None), figure
    assert figures_table([(name, figures)]).row_count == len(figures)


def test_exact_search_has_full_recall(rig):
    """Without an HNSW index the served search is exact search, so the bench's recall is 1."""
    figures = asyncio.run(retrieval.run(rig, queries=3, rows=200, searches=8))
    assert next(figure for figure in figures if "recall" in figure.what).ours == 1.0


def test_quality_scores_what_is_there_and_skips_what_is_not(rig, collections, tmp_path):
    """A query that names two words of one title finds it; collections that are absent give no figures and no error."""
    figures = asyncio.run(quality.run(rig, datasets=collections))
    assert {figure.what.partition(":")[0] for figure in figures} == {"scifact"}
    assert next(figure for figure in figures if figure.what == "scifact: fused R@10").ours == 1.0
    assert [figure.peer for figure in figures if figure.peer_is == "published"] == list(quality.PUBLISHED["scifact"].values())
    assert asyncio.run(quality.run(rig, datasets=tmp_path / "nowhere")) == []


def test_sides_take_turns():
    """Both sides get each round's number, the side that goes first changes, and warm-up rounds are not counted."""
    calls: list[tuple[str, int]] = []

    async def ours(number: int) -> None:
        calls.append(("ours", number))

    pairs = asyncio.run(alternate(ours, lambda number: calls.append(("peer", number)), rounds=3, warm_up=1))
    assert calls[2:] == [("ours", 0), ("peer", 0), ("peer", 1), ("ours", 1), ("ours", 2), ("peer", 2)]
    assert len(pairs.ours) == len(pairs.peer) == 3


def test_ratio_is_of_paired_rounds():
    """A load that slows both sides of a round alike leaves the ratio as it was."""
    pairs = Pairs([1.0, 10.0, 4.0], [0.5, 5.0, 2.0])
    assert pairs.rate("x", 100, "texts/s", peer_is="limit").ratio == pytest.approx(0.5)
    figure = pairs.milliseconds("x", peer_is="limit")
    assert (figure.ours, figure.peer, figure.ratio) == pytest.approx((4000, 2000, 2.0))


@pytest.mark.parametrize(
    ("figure", "doubted"),
    [
        (Pairs([1.0], [1.5]).rate("x", 1, "texts/s", peer_is="limit"), True),
        (Pairs([1.0], [0.9]).rate("x", 1, "texts/s", peer_is="limit"), False),
        (Pairs([1.0], [1.5]).milliseconds("x", peer_is="limit"), True),
        (Pairs([1.0], [1.5]).milliseconds("x", peer_is="another way", limit=False), False),
    ],
)
def test_figure_that_passes_its_limit_is_marked(figure: Figure, doubted: bool):
    """A side cannot be quicker than a part of its own work: such a figure says so instead of passing for a result."""
    assert (DOUBT in figure.note) is doubted


def test_sides_that_differ_are_refused(rig):
    """Vectors of another model on the peer's side stop the bench."""
    vectors = clustered_vectors(8, DIMS, centres=2, seed=0)
    rig.check_same(vectors, 3 * vectors)
    with pytest.raises(ModelError, match="different vectors"):
        rig.check_same(vectors, vectors[::-1])


def test_promise_says_whether_it_was_kept():
    """The bar is printed with its outcome, also when it was missed."""
    assert kept(9.9, 10, "ms") == "< 10 ms: kept"
    assert kept(10.6, 10, "ms") == "< 10 ms: missed"
    assert reached(0.9, 0.9, "of the peer") == ">= 0.9 of the peer: kept"
    assert reached(0.79, 0.8) == ">= 0.8: missed"


def test_names(capsys):
    """Without names the quick benches run; an unknown name lists what there is."""
    assert set(_chosen([])) == set(BENCHES) - BY_NAME_ONLY
    assert _chosen(["quality"]) == ["quality"]
    with pytest.raises(SystemExit, match=r"(?s)No bench 'speed'.*rollback.*quality.*only by name"):
        _chosen(["speed"])
