"""Comparing chunkings: a row each on the same documents, and refusals that say what to write."""

import json

import pytest

from rag_assets.compare import chunking_of, compare
from rag_assets.workbench import LogReporter
from rag_serving.errors import ConfigError
from rag_serving.settings import Chunking, ModelSpec, Settings

MODELS = tuple(ModelSpec(name=f"h{dims}", source=f"hashing:{dims}", dims=dims, max_tokens=256) for dims in (32, 64))


@pytest.fixture
def folder(tmp_path):
    """A BEIR folder of 12 documents of several sentences, with a query a document."""
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    texts = [" ".join(f"Sentence {n} of topic{number} tells about word{number}x{n}." for n in range(12)) for number in range(12)]
    documents = [{"_id": f"d{number}", "title": f"Topic {number}", "text": text} for number, text in enumerate(texts)]
    queries = [{"_id": f"q{number}", "text": f"what of word{number}x{number}?"} for number in range(12)]
    documents.append({**documents[0], "_id": "copy"})
    for name, rows in (("corpus", documents), ("queries", queries)):
        (beir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged = "".join(f"q{number}\t{'copy' if number == 0 else f'd{number}'}\t1\n" for number in range(12))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    return beir


def test_a_row_a_model_and_chunking(folder, tmp_path):
    """Every chunking is measured with every model on the same documents; a query judged on a copy finds the document that stands for it."""
    settings = Settings(root=tmp_path, models=MODELS, default_models=("h32",))
    rows = compare(settings, folder, models=["h32", "h64"], chunkings=["structure:32", "fixed:24:8"], reporter=LogReporter())
    assert [row.embedding_model for row in rows] == ["h32 structure:32", "h64 structure:32", "h32 fixed:24:8", "h64 fixed:24:8", "BM25"]
    assert len({row.snapshot_id for row in rows[:4]}) == 4
    assert all(row.metrics["recall_at_10"] > 0.9 for row in rows)
    again = compare(settings, folder, models=["h32"], reporter=LogReporter())
    assert [row.embedding_model for row in again] == ["h32", "BM25"]


def test_a_chunking_in_words():
    """What a chunking leaves out is as configured."""
    configured = Chunking(max_tokens=100, overlap=10)
    assert chunking_of("", configured) == configured
    assert chunking_of("sentence", configured) == Chunking(strategy="sentence", max_tokens=100, overlap=10)
    assert chunking_of("fixed:64:0", configured) == Chunking(strategy="fixed", max_tokens=64, overlap=0)


@pytest.mark.parametrize("text", ["paragraph", "fixed:many", "fixed:64:40", "fixed:64:0:1", "fixed:3"])
def test_a_chunking_that_is_none(text):
    """A chunking that cannot be is named, with how to write one."""
    with pytest.raises(ConfigError, match=f"{text}.*such as sentence:200:40"):
        chunking_of(text, Chunking())
