"""Slices of queries: how they are named, and how both systems compare on each."""

import numpy as np
import pytest
from rank_model import pair

from evals.collections import Query
from evals.slices import MOST_VALUES, WordCounts, count_words, slice_differences, slice_queries


def test_metadata_that_groups_is_a_facet():
    """Strings and booleans of few values name slices; numbers, long texts, lists and keys of many values do not."""
    queries = [
        Query("a", "one two", {"service": "s3", "hard": True, "start": 4, "answer": "x" * 41, "answers": ["y"], "note": " "}),
        Query("b", "one two", {"service": "elastic  cache", "hard": False}),
        Query("c", "one two"),
    ]
    found = slice_queries(queries)
    assert found == {
        "a": ("hard=true", "service=s3", "words=1-5"),
        "b": ("hard=false", "service=elastic cache", "words=1-5"),
        "c": ("words=1-5",),
    }
    ids = [Query(f"q{number}", "one", {"ticket": f"t{number}"}) for number in range(MOST_VALUES + 1)]
    assert {name for names in slice_queries(ids).values() for name in names} == {"words=1-5"}
    assert "ticket=t0" in slice_queries(ids[:-1])["q0"]


@pytest.mark.parametrize(("words", "band"), [(1, "1-5"), (5, "1-5"), (6, "6-10"), (10, "6-10"), (11, "11-20"), (20, "11-20"), (21, "21+")])
def test_length_bands(words, band):
    """The number of words decides the band."""
    assert slice_queries([Query("q", "word " * words)])["q"] == (f"words={band}",)


def test_rarest_word_decides():
    """A query is as rare as its rarest word: in no document, in at most one of a thousand, or in more."""
    words = WordCounts(3000, {"bucket": 900, "glacier": 3, "vault": 4, "empty": 2000})
    texts = {"gone": "empty the Frobnicator bucket", "rare": "empty the GLACIER", "known": "empty vault bucket"}
    counts = WordCounts(words.documents, {**words.counts, "the": 3000})
    found = slice_queries([Query(name, text) for name, text in texts.items()], counts)
    assert [found[name][-1] for name in texts] == ["rarest_word=unseen", "rarest_word=rare", "rarest_word=common"]


def test_words_are_counted_by_document():
    """A word counts once a document, whatever its case; words that no query has are not counted."""
    counted = count_words([Query("q", "Bucket of ice")], ["bucket bucket BUCKET", "ice and fire", "none"])
    assert (counted.documents, dict(counted.counts)) == (3, {"bucket": 1, "ice": 1})


def test_differences_by_hand():
    """The mean is over the members of the slice; the largest loss stands first; small slices and the whole set are not compared."""
    champion = {f"q{number:02}": 1.0 for number in range(40)}
    candidate = {query_id: 0.5 if number < 20 else 1.0 for number, query_id in enumerate(champion)}
    slices = {query_id: (f"half={number // 20}", f"tiny={number // 4}", "all=1") for number, query_id in enumerate(champion)}
    lost, kept = slice_differences(candidate, champion, slices, min_queries=20)
    assert (lost.name, lost.queries, lost.mean) == ("half=0", 20, -0.5)
    assert (kept.name, kept.mean, kept.p_worse) == ("half=1", 0.0, 1.0)
    assert lost.p_worse == pytest.approx(2 / 10_001, rel=0.5)


def test_holm_over_the_slices():
    """The same loss is less significant among more slices."""
    candidate, champion = pair(3, 600, changed=0.3, drop=0.03)
    ids = sorted(champion)

    def p_of_first(count):
        found = slice_differences(candidate, champion, {each: (f"part={at % count}",) for at, each in enumerate(ids)}, min_queries=10)
        return {each.name: each.p_worse for each in found}

    alone = slice_differences(candidate, champion, dict.fromkeys(ids[::10], ("part=0",)), min_queries=10)[0].p_worse
    assert p_of_first(10)["part=0"] >= alone


def test_false_alarms_stay_within_alpha():
    """Over 200 equal candidates and nine overlapping slices at most 5 % (plus chance) have a slice that seems worse at alpha 0.05."""
    alarms = 0
    for seed in range(200):
        candidate, champion = pair(seed, 300, changed=0.2)
        rng = np.random.default_rng([seed, 1])
        slices = {each: (f"a={rng.integers(3)}", f"b={rng.integers(6)}") for each in champion}
        found = slice_differences(candidate, champion, slices, min_queries=30, draws=499, seed=seed)
        alarms += any(each.p_worse <= 0.05 for each in found)
    assert alarms <= 18
