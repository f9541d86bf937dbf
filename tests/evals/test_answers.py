"""Where answers stand, and which eval sets can carry evidence."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.answers import occurrences
from evals.collections import AnswerSpan, EvalSet, EvalSetError, Query, json_lines, load_beir, plain_or_gz

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "datasets"


def asked(metadata, qrels=None):
    return EvalSet("tiny", (Query("q", "where?", metadata),), {"q": qrels or {"d": 1}})


def test_every_whole_occurrence_is_a_span():
    """Each verbatim occurrence counts, one within a longer word does not, and edges that are no word characters are free."""
    assert occurrences("yes", "yes, yesterday and eyes: yes") == [(0, 3), (25, 28)]
    assert occurrences("$12", "US$12 or $125") == [(2, 5)]
    assert occurrences("no", "yes") == []


def test_white_space_matches_any():
    """An answer whose line was wrapped is found; white space around an answer is no part of its span."""
    assert occurrences("two words", "in two\n  words here") == [(3, 14)]
    assert occurrences("  two words ", "two words") == [(0, 9)]


def test_a_true_offset_names_one_occurrence():
    """With an offset that is true only that place counts; with one that is not, each occurrence does."""
    assert occurrences("it ", "it or it or it", start=6) == [(6, 8)]
    assert occurrences("it", "it or it", start=3) == [(0, 2), (6, 8)]
    assert occurrences("it", "it", start=-1) == [(0, 2)]


@settings(max_examples=100)
@given(st.text(alphabet="ab $.\n", max_size=30), st.text(alphabet="ab $.", min_size=1, max_size=6).filter(str.strip))
def test_spans_hold_the_answer(text, answer):
    """Whatever the text: a span is inside it and holds the answer's words and nothing else."""
    for start, end in occurrences(answer, text):
        assert text[start:end].split() == answer.split()


def test_answers_are_sought_in_relevant_documents_only():
    """An irrelevant or unknown document gives no span; spans come in order; `answers` and `answer` both count."""
    texts = {"d": "blue, then red and blue", "e": "blue", "f": "blue"}
    found = asked({"answers": ["blue", "red"]}, {"d": 1, "e": 0, "gone": 1, "f": 2}).answer_spans(texts)
    assert found == {"q": (AnswerSpan("d", 0, 4), AnswerSpan("d", 11, 14), AnswerSpan("d", 19, 23), AnswerSpan("f", 0, 4))}
    assert asked({"answer": "blue", "start": 19}).answer_spans(texts) == {"q": (AnswerSpan("d", 19, 23),)}


@pytest.mark.parametrize("metadata", [{}, {"answers": []}, {"answers": ["green"]}, {"answers": "blue"}, {"answer": 7}, {"answer": " "}])
def test_no_answer_no_span(metadata):
    """A query without a usable answer, or whose answer stands nowhere, is left out and raises nothing."""
    assert asked(metadata).answer_spans({"d": "blue"}) == {}


@pytest.mark.skipif(not DATASETS.is_dir(), reason="needs the collections at ../shared/datasets")
@pytest.mark.parametrize(("name", "spans"), [("squad-dev", 10_569), ("covidqa-long", 1_380), ("scifact", 0)])
def test_public_sets_have_their_answers(name, spans):
    """All answers of SQuAD (but one that is part of a word) and of COVID-QA stand where they should; SciFact has none. All may be evidence."""
    folder = DATASETS / name
    documents = {row["_id"]: row["text"] for _, row in json_lines(plain_or_gz(folder / "corpus.jsonl"))}
    eval_set = load_beir(folder)
    eval_set.validate(documents)
    assert len(eval_set.answer_spans(documents)) == spans


def many(count, *more):
    queries = tuple(Query(f"q{number}", f"question {number}") for number in range(count)) + tuple(query for query, _ in more)
    return EvalSet("many", queries, {query.query_id: {"d": 1} for query in queries} | {query.query_id: row for query, row in more})


@pytest.mark.parametrize(("count", "what"), [(0, "has no queries"), (1, "has one query")])
def test_too_few_to_be_a_set(count, what):
    """No query and one query are errors: nothing can be said of their mean."""
    with pytest.raises(EvalSetError, match=what):
        many(count).validate({"d"})


def test_equal_words_judged_otherwise_are_refused():
    """Two queries of the same words, case and spaces aside, with other judgments are an error that names them."""
    eval_set = many(50, (Query("twin", " QUESTION  7"), {"e": 1}))
    assert eval_set.ambiguous == ("q7", "twin")
    with pytest.raises(EvalSetError, match=r"same words but different judgments.*q7, twin") as raised:
        eval_set.validate({"d", "e"})
    assert raised.value.fix


def test_equal_words_judged_alike_are_counted():
    """A repeated query with the same judgments is no error and is counted."""
    eval_set = many(50, (Query("twin", "question 7"), {"d": 1}))
    eval_set.validate({"d"})
    assert (eval_set.duplicate_texts, eval_set.ambiguous) == (1, ())


def test_very_few_ambiguous_queries_are_let_be():
    """Two in a thousand cannot move MRR by more than 0.002, and every large public set has some."""
    eval_set = many(1000, (Query("twin", "question 7"), {"e": 1}))
    eval_set.validate({"d", "e"})
    assert len(eval_set.ambiguous) > 0
