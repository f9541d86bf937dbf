"""An eval set that grows by one judgment at a time, and never half."""

import gzip
import multiprocessing
import os

import pytest

from evals.collections import EvalSet, EvalSetError, Query, load_beir
from evals.living import add_judged, add_negative, open_living, write_beir
from evals.negatives import Grade, load_negatives


def test_the_first_judgment_makes_the_set(tmp_path):
    """A folder that is not there is an empty eval set; the first judged query makes it one that load_beir reads."""
    folder = tmp_path / "living"
    assert open_living(folder).queries == ()
    grown = add_judged(folder, "How to delete?", {"a": 2, "b": 0}, metadata={"origin": "log"})
    assert load_beir(folder).sha256 == grown.sha256
    assert grown.qrels[grown.queries[0].query_id] == {"a": 2, "b": 0}
    assert grown.queries[0].metadata == {"origin": "log"}


def test_the_same_words_are_one_query(tmp_path):
    """A question asked again, in other case or spacing, adds its judgments to the one that is there."""
    write_beir(EvalSet("x", (Query("q1", "How to delete?"),), {"q1": {"a": 1}}), tmp_path)
    grown = add_judged(tmp_path, " how  to DELETE?", {"b": 1})
    assert [query.query_id for query in grown.queries] == ["q1"]
    assert grown.qrels == {"q1": {"a": 1, "b": 1}}


def test_a_gzipped_set_grows_too(tmp_path):
    """A set that came gzipped keeps its queries and judgments when one is added."""
    write_beir(EvalSet("x", (Query("q1", "one two"),), {"q1": {"a": 1}}), tmp_path)
    (tmp_path / "queries.jsonl.gz").write_bytes(gzip.compress((tmp_path / "queries.jsonl").read_bytes()))
    (tmp_path / "queries.jsonl").unlink()
    add_judged(tmp_path, "three four", {"b": 1})
    assert {query.text for query in load_beir(tmp_path).queries} == {"one two", "three four"}


def test_a_query_without_a_relevant_document_is_no_judgment(tmp_path):
    """Grades that are all 0 are refused with what to do instead; nothing is written."""
    with pytest.raises(EvalSetError, match="negative"):
        add_judged(tmp_path / "x", "what?", {"a": 0})
    assert not (tmp_path / "x").exists()


def test_negatives_are_added_once(tmp_path):
    """The same unanswerable question twice is one negative; its first grade stays."""
    add_negative(tmp_path, "Where is Mars?", Grade.OFF_DOMAIN)
    add_negative(tmp_path, "where is  mars?", Grade.NEAR_MISS)
    assert [(each.text, each.grade) for each in load_negatives(tmp_path)] == [("Where is Mars?", Grade.OFF_DOMAIN)]


def test_a_crash_between_the_two_files_loses_no_judgment(tmp_path, monkeypatch):
    """When the process dies after the queries were replaced and before the judgments, the set reads as it was before."""
    before = add_judged(tmp_path, "one two", {"a": 1})
    replace = os.replace
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: replace(self, target) if target.name == "queries.jsonl" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_judged(tmp_path, "three four", {"b": 1})
    monkeypatch.undo()
    assert load_beir(tmp_path).sha256 == before.sha256
    assert len(add_judged(tmp_path, "three four", {"b": 1}).queries) == 2


def test_queries_of_another_split_stay(tmp_path):
    """A query that only another split judges, or none, is still in the folder after an addition; a new judgment makes it count."""
    write_beir(EvalSet("x", (Query("q1", "one"), Query("q2", "two", {"n": 1}), Query("q3", "three")), {"q1": {"a": 1}}), tmp_path)
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\ta\t1\n")
    grown = add_judged(tmp_path, "four", {"b": 1})
    assert load_beir(tmp_path).sha256 == grown.sha256
    assert load_beir(tmp_path, "train").queries == (Query("q2", "two", {"n": 1}),)
    assert load_beir(tmp_path).unjudged == 2


def test_a_folder_that_cannot_be_one_is_an_error(tmp_path):
    """A file where the folder should be is an EvalSetError for judgments, negatives and exports."""
    (tmp_path / "file").write_text("x")
    for write in (
        lambda folder: add_judged(folder, "what?", {"a": 1}),
        lambda folder: add_negative(folder, "what?", Grade.NEAR_MISS),
        lambda folder: write_beir(EvalSet("x", (Query("q1", "one"),), {"q1": {"a": 1}}), folder),
    ):
        with pytest.raises(EvalSetError, match="cannot write"):
            write(tmp_path / "file")


def _add(folder, start):
    for number in range(start, start + 10):
        add_judged(folder, f"question number {number}", {f"d{number}": 1})


def test_two_writers_lose_nothing(tmp_path):
    """Two processes that add at once end with the judgments of both."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_add, args=(tmp_path, start)) for start in (0, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len(load_beir(tmp_path).queries) == 20
