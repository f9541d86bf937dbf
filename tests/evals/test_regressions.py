"""The queries that lost most between two evaluations."""

import pytest

from evals.collections import EvalSet, Query
from evals.regressions import Regression, regressions_markdown, worst_regressions
from evals.significance import EvidenceError

EVAL_SET = EvalSet(
    "four",
    (Query("a", "first | question"), Query("b", "second"), Query("c", "third"), Query("d", "fourth")),
    {"a": {"d1": 1, "d2": 2, "d9": 0}, "b": {"d3": 1}, "c": {"d4": 1}, "d": {"d5": 1}},
)


def rows(**ranks: int | None):
    return [
        {
            "query_id": query_id,
            "rank": rank,
            "reciprocal_rank": 1 / rank if rank else 0.0,
            "retrieved": [f"{query_id}{place}" for place in range(5)],
        }
        for query_id, rank in ranks.items()
    ]


BEFORE = rows(a=1, b=1, c=4, d=2)
AFTER = rows(a=None, b=2, c=4, d=1)


def test_losses_by_hand_worst_first():
    """A query that fell out of the list stands before one that fell a place; those that kept or gained are not there."""
    lost, fell = worst_regressions(BEFORE, AFTER, EVAL_SET)
    assert lost == Regression("a", "first | question", ("d2", "d1"), ("a0", "a1", "a2"), 1, None, -1.0)
    assert (fell.query_id, fell.rank_before, fell.rank_after, fell.difference) == ("b", 1, 2, -0.5)
    assert worst_regressions(BEFORE, AFTER, EVAL_SET, limit=1) == [lost]
    assert worst_regressions(BEFORE, BEFORE, EVAL_SET) == []


def test_markdown_says_what_was_asked_expected_and_found():
    """One well-formed row a query, pipes escaped, a rank that is missing in words; no losses are a sentence."""
    text = regressions_markdown(worst_regressions(BEFORE, AFTER, EVAL_SET))
    assert "| first \\| question | d2, d1 | a0, a1, a2 | 1 | not found |" in text.splitlines()
    assert {line.replace("\\|", "").count("|") for line in text.splitlines()} == {6}
    assert regressions_markdown([]) == "No query lost reciprocal rank.\n"


def test_rows_of_other_queries_are_refused():
    """Rows that are not of this eval set are an error with the counts, not a table with holes."""
    with pytest.raises(EvidenceError, match="4 and 3 measured queries are not the 4"):
        worst_regressions(BEFORE, AFTER[:3], EVAL_SET)
