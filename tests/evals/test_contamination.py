"""Queries that the corpus holds word for word."""

import html
import re
import time
from pathlib import Path

import pytest

from evals.collections import EvalSet, EvalSetError, Query, json_lines, load_beir, open_eval_set, plain_or_gz
from evals.contamination import COPIED_SHARE, Leak, find_leaks, refuse_contaminated, words_of
from evals.sample.reference import services

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "datasets"
QUERY = Query("q0", "How is a versioned bucket emptied?")


def a_set(count):
    queries = (QUERY, *(Query(f"q{number}", f"what does operation number {number} do exactly") for number in range(1, count)))
    return EvalSet("by hand", queries, {query.query_id: {"d": 1} for query in queries})


@pytest.mark.parametrize(
    "text",
    [
        "Before. How is a versioned bucket emptied? After.",
        "how  is a VERSIONED\nbucket emptied",
        "Q: “How is a versioned bucket emptied?”",
        "how is a versioned how is a versioned bucket emptied",
    ],
)
def test_case_space_and_punctuation_do_not_hide_a_copy(text):
    """The words in a row are a copy, however they are set."""
    assert find_leaks([QUERY], [("other", {"text": "nothing"}), ("d7", {"text": text})]) == (Leak("q0", QUERY.text, "d7", "text"),)


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "how is a versioned bucket kept, and then emptied"},
        {"text": "how is a versioned bucket emptiedness"},
        {"title": "How is a versioned", "text": "bucket emptied?"},
    ],
)
def test_other_words_between_or_across_fields_are_no_copy(fields):
    """A word more, a longer word, or words that only meet across two fields are no copy."""
    assert find_leaks([QUERY], [("d", fields)]) == ()


def test_queries_under_five_words_are_not_looked_for():
    """Names and short phrases stand in any text; they say nothing of a leak."""
    assert find_leaks([Query("q", "delete a bucket now")], [("d", {"text": "delete a bucket now"})]) == ()


def test_metadata_outranks_text():
    """Of several places the one in metadata is named, as it is the one that forbids a verdict."""
    documents = [("d1", {"text": QUERY.text}), ("d2", {"metadata.question": QUERY.text}), ("d3", {"text": QUERY.text})]
    (leak,) = find_leaks([QUERY], documents)
    assert (leak.doc_id, leak.place) == ("d2", "metadata.question")


def test_one_query_in_metadata_is_refused():
    """A single planted query of a thousand is an error that names query and document."""
    with pytest.raises(EvalSetError, match=r"contaminated: 1 of its 1,000 .*'q0' \('How is a versioned.*metadata.faq of 'd9'") as raised:
        refuse_contaminated(a_set(1000), [("d9", {"text": "nothing", "metadata.faq": QUERY.text})])
    assert (raised.value.code, bool(raised.value.fix)) == ("contaminated", True)


@pytest.mark.parametrize("place", ["text", "title"])
def test_a_share_of_copies_is_refused_and_a_few_are_reported(place):
    """One copy in a hundred may be chance and is returned; one in fifty is refused."""
    documents = [("d9", {place: QUERY.text})]
    assert [leak.query_id for leak in refuse_contaminated(a_set(100), documents)] == ["q0"]
    with pytest.raises(EvalSetError, match="contaminated") as raised:
        refuse_contaminated(a_set(50), documents)
    assert raised.value.code == "contaminated"


@pytest.mark.skipif(not DATASETS.is_dir(), reason="needs the collections at ../shared/datasets")
@pytest.mark.parametrize(("name", "copies"), [("squad-dev", 0), ("covidqa-long", 0), ("multihop-wiki", 0), ("scifact", 1)])
def test_public_sets_are_not_refused(name, copies):
    """Honest collections pass, with the copies they are known to hold."""
    rows = [row for _, row in json_lines(plain_or_gz(DATASETS / name / "corpus.jsonl"))]
    documents = [(row["_id"], {"title": row.get("title") or "", "text": row["text"]}) for row in rows]
    assert len(refuse_contaminated(load_beir(DATASETS / name), documents)) == copies


def test_the_sample_is_not_refused():
    """Nine of the sample's 1,344 queries are phrases of its documents: reported, below the share that is refused."""
    documents = [
        (f"{service.name}.{operation}", {"text": html.unescape(re.sub(r"<[^>]+>", " ", page))})
        for service in services("full")
        for operation, page in service.operations.items()
    ]
    eval_set = open_eval_set("sample:", root=Path())
    leaks = refuse_contaminated(eval_set, documents)
    assert len(leaks) == 9
    assert len(leaks) < COPIED_SHARE * len(eval_set.queries)


def test_cost_does_not_grow_with_the_queries():
    """Twenty times the queries take nowhere near twenty times as long over the same 400,000 words."""
    documents = [(f"d{number}", {"text": " ".join(f"word{(number * 7 + at) % 5000}" for at in range(1000))}) for number in range(400)]

    def seconds(count):
        queries = [Query(f"q{number}", f"what does operation number {number} do exactly") for number in range(count)]
        started = time.process_time()
        assert find_leaks(queries, documents) == ()
        return time.process_time() - started

    assert min(seconds(10_000) for _ in range(2)) < 10 * min(seconds(500) for _ in range(2))


def test_words():
    """Words are folded by NFKC and case."""
    assert words_of("Ｆｕｌｌ-WIDTH Straße, 2nd") == ["full", "width", "strasse", "2nd"]  # noqa: RUF001
