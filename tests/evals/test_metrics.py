"""Ranking metrics and their aggregates."""

import math
from dataclasses import replace

import numpy as np
import pytest
import pytrec_eval

from evals.collections import split_of
from evals.metrics import QueryRow, SpanScore, aggregate, document_ranking, require_sound, score_rankings, score_spans, summarise
from evals.power import minimum_detectable_drop
from evals.significance import EvidenceError


def _reference(judgments, ranking, k):
    """The textbook formulas, written without the library under test."""
    gains = [max(0, judgments.get(doc_id, 0)) for doc_id, _ in ranking][:k]
    relevant = sum(value > 0 for value in judgments.values())
    ideal = sorted((max(0, value) for value in judgments.values()), reverse=True)[:k]

    def dcg(values):
        return sum(gain / math.log2(position + 2) for position, gain in enumerate(values))

    first = next((position + 1 for position, gain in enumerate(gains) if gain), None)
    hits = [position + 1 for position, gain in enumerate(gains) if gain]
    return {
        "reciprocal_rank": 1 / first if first else 0.0,
        "ndcg": dcg(gains) / dcg(ideal) if any(ideal) else 0.0,
        "recall": len(hits) / relevant if relevant else 0.0,
        "average_precision": sum((seen + 1) / rank for seen, rank in enumerate(hits)) / relevant if relevant else 0.0,
        "success": float(first == 1),
        "rank": first,
    }


def _random_case(seed):
    rng = np.random.default_rng(seed)
    docs = [f"d{number}" for number in range(30)]
    qrels, rankings = {}, {}
    for number in range(120):
        judged = rng.choice(docs, size=rng.integers(1, 6), replace=False)
        qrels[f"q{number}"] = {str(doc): int(rng.integers(0, 4)) for doc in judged}
        served = rng.choice(docs, size=rng.integers(0, 25), replace=False)
        scores = sorted(rng.integers(0, 4, size=len(served)).tolist(), reverse=True)
        if number % 7:
            rankings[f"q{number}"] = [(str(doc), float(score)) for doc, score in zip(served, scores, strict=True)]
    return qrels, rankings


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("seed", [1, 2])
def test_agrees_with_the_textbook(seed, k):
    """Every metric equals its formula on random rankings with graded judgments, tied scores, short, empty and missing rankings."""
    qrels, rankings = _random_case(seed)
    rows = score_rankings(qrels, rankings, k=k)
    assert [row.query_id for row in rows] == list(qrels)
    for row in rows:
        expected = _reference(qrels[row.query_id], rankings.get(row.query_id, []), k)
        observed = {name: getattr(row, name) for name in expected}
        assert observed == pytest.approx(expected)


def _trec_cases(seed, queries):
    """Random judgments and scores with many ties, and the rankings in trec_eval's order: by score, ties by document id from the back."""
    rng = np.random.default_rng(seed)
    docs = [f"d{number:02}" for number in range(40)]
    qrels, scores, rankings = {}, {}, {}
    for number in range(queries):
        name = f"q{number}"
        judged = rng.choice(docs, size=rng.integers(1, 9), replace=False)
        qrels[name] = {str(doc): int(rng.integers(0, 4)) for doc in judged}
        qrels[name][str(judged[0])] = 1 + int(rng.integers(0, 3))
        served = rng.choice(docs, size=rng.integers(1, 40), replace=False)
        scores[name] = {str(doc): float(rng.integers(0, 6)) / 4 for doc in served}
        rankings[name] = sorted(scores[name].items(), key=lambda item: (item[1], item[0]), reverse=True)
    return qrels, scores, rankings


@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_agrees_with_trec_eval_on_a_thousand_rankings(k):
    """Every metric equals trec_eval's own, to 1e-9, on 1,000 random rankings with graded judgments and ties in their scores."""
    qrels, scores, rankings = _trec_cases(20 + k, 1000)
    tied = sum(len(set(each.values())) < len(each) for each in scores.values())
    assert tied > 900
    measures = {f"ndcg_cut.{k}", f"recall.{k}", f"map_cut.{k}", f"success.{k},1", "recip_rank"}
    reference = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(scores)
    for row in score_rankings(qrels, rankings, k=k):
        expected = reference[row.query_id]
        reciprocal = expected["recip_rank"] if expected["recip_rank"] >= 1 / k - 1e-12 else 0.0
        assert row.reciprocal_rank == pytest.approx(reciprocal, abs=1e-9)
        assert row.ndcg == pytest.approx(expected[f"ndcg_cut_{k}"], abs=1e-9)
        assert row.recall == pytest.approx(expected[f"recall_{k}"], abs=1e-9)
        assert row.average_precision == pytest.approx(expected[f"map_cut_{k}"], abs=1e-9)
        assert row.success == expected["success_1"]
        assert float(row.rank is not None) == expected[f"success_{k}"]


def test_equal_scores_keep_the_served_order():
    """Ties are not reordered by document id, whichever way the ids sort."""
    for relevant in ("a", "z"):
        other = "z" if relevant == "a" else "a"
        (first,) = score_rankings({"q": {relevant: 1}}, {"q": [(relevant, 0.5), (other, 0.5)]})
        (second,) = score_rankings({"q": {relevant: 1}}, {"q": [(other, 0.5), (relevant, 0.5)]})
        assert (first.rank, second.rank) == (1, 2)


def test_nothing_retrieved_scores_zero():
    """A query without a result stays in the rows with zeros, so that it counts in every mean."""
    (found, lost) = score_rankings({"found": {"d": 1}, "lost": {"d": 1}}, {"found": [("d", 1.0)]})
    assert (found.reciprocal_rank, found.success, found.rank) == (1.0, 1.0, 1)
    assert (lost.reciprocal_rank, lost.ndcg, lost.recall, lost.average_precision, lost.success) == (0, 0, 0, 0, 0)
    assert lost.rank is None
    assert lost.retrieved == ()


def test_beyond_the_cutoff_is_not_found():
    """A first relevant document at rank k + 1 gives no reciprocal rank, and only k ids are kept."""
    ranking = [(f"d{number}", 1.0 / (number + 1)) for number in range(11)]
    (row,) = score_rankings({"q": {"d10": 1}}, {"q": ranking}, k=10)
    assert (row.reciprocal_rank, row.rank, len(row.retrieved)) == (0.0, None, 10)


def test_a_query_with_empty_judgments_has_a_row():
    """A query of the eval set without a single judgment is not dropped."""
    rows = score_rankings({"judged": {"d": 1}, "bare": {}}, {"judged": [("d", 1.0)], "bare": [("d", 1.0)]})
    assert [row.reciprocal_rank for row in rows] == [1.0, 0.0]


def test_unjudged_queries_are_ignored_but_a_foreign_run_is_refused():
    """An extra ranking does not matter; rankings of which none is judged are a mistake and not an MRR of 0."""
    assert len(score_rankings({"q": {"d": 1}}, {"q": [("d", 1.0)], "extra": [("d", 1.0)]})) == 1
    with pytest.raises(EvidenceError, match="none of the 1 ranked queries, such as 'extra'"):
        score_rankings({"q": {"d": 1}}, {"extra": [("d", 1.0)]})
    with pytest.raises(EvidenceError, match="no relevance judgments"):
        score_rankings({}, {})


def test_a_repeated_document_is_refused():
    """A document listed twice would be counted twice; the error names the query and the remedy."""
    with pytest.raises(EvidenceError, match=r"query 'q' repeats a document\. Fold chunks") as raised:
        score_rankings({"q": {"d": 1}}, {"q": [("d", 1.0), ("d", 0.5)]})
    assert raised.value.fix


def test_document_ranking_takes_the_best_chunk():
    """A document stands where its best chunk stood, with that chunk's score, even among equal scores."""
    hits = [("c1", "b", 0.9), ("c2", "a", 0.9), ("c3", "b", 0.8), ("c4", "c", 0.1), ("c5", "a", 0.05)]
    assert document_ranking(hits) == [("b", 0.9), ("a", 0.9), ("c", 0.1)]
    assert document_ranking([]) == []


def _row(query_id, reciprocal_rank, latency_ms=math.nan):
    return QueryRow(query_id, reciprocal_rank, 0.5, 1.0, 0.25, float(reciprocal_rank == 1), 1, ("d",), latency_ms)


def test_summary_is_the_mean_of_the_rows():
    """The summary's numbers are means of the same rows, its interval holds the mean, and the halves add up to the whole."""
    rows = [_row(f"q{number}", 1 / (1 + number % 4), latency_ms=float(number)) for number in range(200)]
    metrics = summarise(rows, k=10)
    values = [row.reciprocal_rank for row in rows]
    halves = {half: [row.reciprocal_rank for row in rows if split_of(row.query_id) == half] for half in ("tune", "heldout")}
    assert metrics["mrr_at_10"] == pytest.approx(np.mean(values))
    assert metrics["mrr_at_10_low"] < metrics["mrr_at_10"] < metrics["mrr_at_10_high"]
    for half, part in halves.items():
        assert metrics[f"mrr_at_10_{half}"] == pytest.approx(np.mean(part))
    assert metrics["success_at_1"] == 0.25
    assert (metrics["ndcg_at_10"], metrics["recall_at_10"], metrics["map_at_10"]) == (0.5, 1.0, 0.25)
    assert (metrics["queries"], metrics["latency_p50_ms"], metrics["latency_p95_ms"]) == pytest.approx((200, 99.5, 189.05))
    assert summarise(rows, k=10) == metrics


def test_summary_omits_what_was_not_measured():
    """An empty half and untimed queries have no key, instead of a NaN that a tracker would refuse or plot."""
    metrics = summarise([_row("q1", 1.0)], k=5)
    assert len([name for name in metrics if name.startswith("mrr_at_5_") and name.endswith(("tune", "heldout"))]) == 1
    assert not any("latency" in name for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_latencies_reach_their_rows():
    """A latency belongs to its query; one that is missing is NaN and out of the percentiles."""
    rows = score_rankings({"a": {"d": 1}, "b": {"d": 1}}, {"a": [("d", 1.0)]}, latencies_ms={"a": 4.0})
    assert rows[0].latency_ms == 4.0
    assert math.isnan(rows[1].latency_ms)
    assert summarise(rows, k=10)["latency_p95_ms"] == 4.0


def test_span_scores_by_hand():
    """The rank of the first passage that holds an answer, and the share of those that do, within k; an answer that none holds scores 0."""
    holding = {"both": {"c1", "c9"}, "late": {"c3"}, "beyond": {"c4"}, "cut in two": set(), "not served": {"c1"}}
    served = ["c0", "c1", "c3", "c4"]
    found = score_spans(holding, dict.fromkeys(["both", "late", "beyond", "cut in two"], served), k=3)
    assert found == {
        "both": SpanScore(1 / 2, 1 / 2),
        "late": SpanScore(1 / 3, 1.0),
        "beyond": SpanScore(0.0, 0.0),
        "cut in two": SpanScore(0.0, 0.0),
        "not served": SpanScore(0.0, 0.0),
    }


def test_spans_and_slices_reach_their_rows():
    """Both belong to their query; span means are over the queries that have an answer marked, and absent if none has."""
    qrels, ranking = {"a": {"d": 1}, "b": {"d": 1}}, {"a": [("d", 1.0)], "b": []}
    rows = score_rankings(qrels, ranking, slices={"a": ("words=1-5",)}, spans={"a": SpanScore(0.5, 0.25)})
    assert [(row.slices, row.span_reciprocal_rank, row.span_recall) for row in rows] == [(("words=1-5",), 0.5, 0.25), ((), None, None)]
    metrics = summarise(rows, k=10)
    assert (metrics["span_mrr_at_10"], metrics["span_recall_at_10"], metrics["span_queries"]) == (0.5, 0.25, 1)
    assert not any("span" in name for name in summarise(score_rankings(qrels, ranking), k=10))


def test_summary_says_success_and_what_it_can_show():
    """Success@k is the share of queries with a relevant document within k; the detectable drop is the one at the largest usual spread."""
    rows = [_row("a", 1.0), _row("b", 0.25), replace(_row("c", 0.0), rank=None)]
    metrics = summarise(rows, k=10)
    assert (metrics["success_at_1"], metrics["success_at_10"]) == pytest.approx((1 / 3, 2 / 3))
    assert metrics["detectable_drop"] == minimum_detectable_drop(0.22, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"reciprocal_rank": math.nan},
        {"reciprocal_rank": 1.5},
        {"ndcg": -0.1},
        {"recall": math.inf},
        {"span_recall": math.nan},
        {"latency_ms": -1.0},
        {"latency_ms": math.inf},
    ],
)
def test_impossible_rows_are_no_evidence(change):
    """A NaN, a score outside 0 to 1 and a negative latency are errors that name the query, before any mean is taken."""
    sound, broken = _row("fine", 1.0), replace(_row("broken", 1.0), **change)
    require_sound([sound])
    with pytest.raises(EvidenceError, match="'broken'") as raised:
        summarise([sound, broken], k=10)
    assert raised.value.fix


def test_aggregate_without_values_is_refused():
    """No queries give an error, not a mean of nothing."""
    with pytest.raises(EvidenceError, match="not a single query"):
        aggregate([])
    assert aggregate([0.5, 1.0, 0.25]).n == 3
