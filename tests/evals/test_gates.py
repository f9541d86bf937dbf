"""The quality gate: each rule's outcomes, the fold to one outcome, and its error rates."""

import dataclasses
import json
import math

import numpy as np
import pytest
from rank_model import pair

from evals.gates import Outcome, QualityEvidence, Rule, decide, enough_queries, non_inferiority, quality_gate
from evals.power import minimum_detectable_drop
from evals.significance import EvidenceError, paired_difference

_KNOBS = {
    "bm25_mrr": 0.70,
    "ann_recall": 0.99,
    "mrr_floor": 0.75,
    "margin": 0.02,
    "alpha": 0.05,
    "min_queries": 300,
    "ann_recall_floor": 0.95,
}


def _judge(candidate, champion, **knobs):
    return quality_gate(candidate=candidate, champion=champion, **(_KNOBS | knobs))


def _rule(result, name):
    return next(rule for rule in result.rules if rule.name == name)


def _failed(result):
    return [rule.name for rule in result.rules if not rule.passed]


def test_an_equal_candidate_passes():
    """A candidate as good as its champion passes every rule, and the summary says how good it is and what would have shown."""
    candidate, champion = pair(1, 1000)
    result = _judge(candidate, champion)
    assert result.outcome is Outcome.PASS
    rules = ["enough_queries", "non_inferiority", "no_slice_worse", "mrr_floor", "beats_bm25", "ann_recall"]
    assert [rule.name for rule in result.rules] == rules
    assert _failed(result) == []
    mrr = np.mean(list(candidate.values()))
    assert result.summary.startswith(f"PASS: MRR@10 {mrr:.3f} over 1,000 queries (95 % CI ")
    visible = minimum_detectable_drop(paired_difference(candidate, champion).sd, 1000)
    assert result.summary.endswith(f"the champion's {np.mean(list(champion.values())):.3f}; a drop from {visible:.3f} up would have shown")


def test_a_worse_candidate_fails_with_the_numbers():
    """A loss of about 0.1 is a FAIL, and its one line names both systems, the loss, its interval and the allowance."""
    candidate, champion = pair(2, 1000, mrr=0.88, changed=0.4, drop=0.1)
    result = _judge(candidate, champion)
    loss = paired_difference(candidate, champion)
    mrr = np.mean(list(candidate.values()))
    assert result.outcome is Outcome.FAIL
    assert _failed(result) == ["non_inferiority"]
    assert result.summary == (
        f"FAIL: MRR@10 {mrr:.3f} is {-loss.mean:.3f} below the champion's {mrr - loss.mean:.3f} "
        f"(95 % CI {loss.low:+.3f} to {loss.high:+.3f}; at most 0.020 is allowed)"
    )


def test_without_a_champion_nothing_is_compared():
    """The first release has no champion: the comparison is not a rule, the others hold."""
    candidate, _ = pair(1, 500)
    result = _judge(candidate, None)
    assert result.outcome is Outcome.PASS
    assert not {"non_inferiority", "no_slice_worse"} & {rule.name for rule in result.rules}
    assert "no champion" in result.summary


@pytest.mark.parametrize(
    ("knobs", "rule"), [({"mrr_floor": 0.95}, "mrr_floor"), ({"bm25_mrr": 0.95}, "beats_bm25"), ({"ann_recall": 0.94}, "ann_recall")]
)
@pytest.mark.parametrize("n", [1000, 20])
def test_an_absolute_rule_fails_alone(knobs, rule, n):
    """Each absolute rule refuses by itself, also with too few queries to pass anything."""
    result = _judge(*pair(1, n), **knobs)
    assert result.outcome is Outcome.FAIL
    assert rule in _failed(result)
    assert result.summary == f"FAIL: {_rule(result, rule).detail}"


def test_meeting_a_requirement_exactly_passes():
    """At the floor, at the baseline and at the recall floor is enough, whatever the rounding of a mean of thirds."""
    candidate = {f"q{number}": 1 / 3 for number in range(301)} | {f"p{number}": 0.1 for number in range(301)}
    mean = float(np.mean(list(candidate.values())))
    result = _judge(candidate, None, mrr_floor=mean + 1e-12, bm25_mrr=mean + 1e-12, ann_recall=0.95)
    assert result.outcome is Outcome.PASS


def test_too_few_queries_are_inconclusive():
    """Below the minimum neither a good nor a bad comparison decides."""
    good = _judge(*pair(1, 299))
    assert (good.outcome, "enough_queries" in _failed(good)) == (Outcome.INCONCLUSIVE, True)
    assert good.summary.startswith("INCONCLUSIVE: 299 queries were judged; this gate needs 300")
    bad = _judge(*pair(2, 299, mrr=0.9, changed=0.5, drop=0.1))
    assert bad.outcome is Outcome.INCONCLUSIVE
    assert bad.summary.endswith("(also: non_inferiority)")


def _compared(values, champion):
    names = [f"q{number}" for number in range(len(values))]
    return _judge(dict(zip(names, values, strict=True)), dict(zip(names, champion, strict=True)), bm25_mrr=0.1, mrr_floor=0.1)


def test_a_noisy_tie_is_inconclusive():
    """Many moves that cancel out show neither a loss nor its absence; the line says how many queries would."""
    better, worse = [1.0, 0.0] * 150, [0.0, 1.0] * 150
    result = _compared([*better, 0.5], [*worse, 0.5])
    assert result.outcome is Outcome.INCONCLUSIVE
    assert _failed(result) == ["non_inferiority"]
    assert "301 queries show drops from 0.143 up, about 15,4" in result.summary


def test_a_large_unproven_loss_fails():
    """A best estimate beyond the margin is a FAIL even where noise hides its significance."""
    result = _compared([1.0, 0.0] * 150 + [0.0] * 9, [0.0, 1.0] * 150 + [1.0] * 9)
    assert result.outcome is Outcome.FAIL
    assert _rule(result, "non_inferiority").observed < -0.02


def test_a_proven_loss_that_may_reach_the_margin_fails():
    """A significant loss of 0.015 whose bound reaches beyond 0.020 is a FAIL, not a call for more queries."""
    result = _compared([0.5] * 66 + [1.0] * 36 + [1.0] * 898, [1.0] * 66 + [0.5] * 36 + [1.0] * 898)
    assert result.outcome is Outcome.FAIL
    assert "0.015 below" in result.summary
    assert _rule(result, "non_inferiority").observed < -0.02


def test_a_proven_loss_inside_the_margin_passes():
    """A loss that is significant yet surely below the margin is one the margin allows."""
    champion = [1.0] * 2000
    candidate = [0.9] * 100 + [1.0] * 1900
    result = _compared(candidate, champion)
    names = [str(number) for number in range(2000)]
    assert paired_difference(dict(zip(names, candidate, strict=True)), dict(zip(names, champion, strict=True))).p_worse < 0.01
    assert result.outcome is Outcome.PASS


def test_losing_exactly_the_margin_everywhere_fails():
    """The margin itself is not allowed."""
    assert _compared([0.5 - 0.02] * 400, [0.5] * 400).outcome is Outcome.FAIL


def _with_a_bad_slice(loss, *, size=60, n=1200):
    """A candidate equal to its champion but for `size` queries of the slice service=s3, which lost `loss` each; services have 60 each."""
    champion = {f"q{number:04}": 0.9 for number in range(n)}
    candidate = {query_id: 0.9 - loss if number < size else 0.9 for number, query_id in enumerate(champion)}
    slices = {query_id: (f"service={'s3' if number < 60 else number // 60}",) for number, query_id in enumerate(champion)}
    return _judge(candidate, champion, slices=slices)


def test_a_slice_that_collapsed_fails_although_the_mean_hides_it():
    """Sixty queries that lost 0.2 move the mean by 0.01, inside the margin: the slice rule fails and the summary names the slice."""
    result = _with_a_bad_slice(0.2)
    assert result.outcome is Outcome.FAIL
    assert _failed(result) == ["no_slice_worse"]
    assert _rule(result, "no_slice_worse").observed == pytest.approx(-0.2)
    assert "FAIL: the slice service=s3 (60 queries) is 0.200 below the champion (p = 0.00" in result.summary
    assert "after Holm over 20 slices; at most 0.050 is allowed)" in result.summary


@pytest.mark.parametrize(("loss", "size"), [(0.05, 60), (0.04, 60), (0.5, 2)])
def test_a_slice_may_lose_a_little_or_by_chance(loss, size):
    """A significant loss within the slice margin passes, and so does a larger one that rests on two queries."""
    result = _with_a_bad_slice(loss, size=size)
    assert result.outcome is Outcome.PASS
    assert _rule(result, "no_slice_worse").detail.startswith(
        "none of 20 slices lost more than 0.050 significantly; the lowest is service=s3"
    )


def test_small_slices_are_not_judged():
    """Below the smallest size a slice is not compared, and the rule says that there was nothing to compare."""
    candidate, champion = pair(1, 1000)
    result = _judge(candidate, champion, slices={query_id: (f"id={query_id}",) for query_id in champion})
    assert _rule(result, "no_slice_worse").passed
    assert _rule(result, "no_slice_worse").detail == "no slice has 50 queries or more"


def _outcomes(drop, *, changed, trials=100, n=500):
    counts = dict.fromkeys(Outcome, 0)
    for seed in range(trials):
        candidate, champion = pair(seed, n, changed=changed, drop=drop)
        evidence = QualityEvidence(
            k=10,
            queries=n,
            mrr=float(np.mean(list(candidate.values()))),
            difference=paired_difference(candidate, champion, draws=499, seed=seed),
            **_KNOBS,
        )
        counts[decide("quality", [enough_queries(evidence), non_inferiority(evidence)], praise="").outcome] += 1
    return {outcome: count / trials for outcome, count in counts.items()}


def test_error_rates_of_the_comparison():
    """At 500 queries: an equal candidate hardly fails, one that lost 0.02 hardly passes, one that lost 0.05 never does and mostly fails."""
    equal, at_margin, beyond = _outcomes(0.0, changed=0.07), _outcomes(0.02, changed=0.07), _outcomes(0.05, changed=0.2)
    assert equal[Outcome.FAIL] <= 0.08
    assert equal[Outcome.PASS] >= 0.90
    assert at_margin[Outcome.PASS] <= 0.13
    assert beyond[Outcome.PASS] <= 0.01
    assert beyond[Outcome.FAIL] >= 0.98


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.2, math.inf])
@pytest.mark.parametrize("where", ["candidate", "champion", "bm25_mrr", "ann_recall"])
def test_impossible_metrics_are_refused(where, bad):
    """A NaN or a metric outside 0 to 1 is an error, never a verdict."""
    given = {"candidate": {"a": 1.0, "b": 0.5}, "champion": {"a": 1.0, "b": 0.5}, "bm25_mrr": 0.5, "ann_recall": 1.0}
    given[where] = {"a": 1.0, "b": bad} if isinstance(given[where], dict) else bad
    with pytest.raises(EvidenceError, match="not between 0 and 1") as raised:
        quality_gate(**(_KNOBS | given))
    assert raised.value.fix


def test_other_queries_and_no_queries_are_refused():
    """A champion measured on other queries is no comparison; no queries are no evidence."""
    with pytest.raises(EvidenceError, match="different queries"):
        _judge({"a": 1.0}, {"b": 1.0})
    with pytest.raises(EvidenceError, match="not a single query"):
        _judge({}, None)


def test_fold_of_rules():
    """A decided failure outranks an undecided one; others are named after the first; nothing checked is refused."""
    held = Rule("held", True, 1, 1, "held well")
    failed, second = Rule("failed", False, 0, 1, "failed badly"), Rule("second", False, 0, 1, "too")
    undecided = Rule("open", False, 0, 1, "still open", conclusive=False)
    assert decide("g", [held], praise="fine").summary == "PASS: fine"
    assert decide("g", [held, undecided], praise="").summary == "INCONCLUSIVE: still open"
    assert decide("g", [undecided, failed, second], praise="").summary == "FAIL: failed badly (also: second)"
    with pytest.raises(EvidenceError, match="no rules"):
        decide("g", [], praise="fine")


def test_a_result_is_plain_json():
    """A verdict can be stored: its dictionary survives JSON with the outcome as a word."""
    result = _judge(*pair(1, 400, changed=0.03))
    stored = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
    assert stored["outcome"] == "PASS"
    assert stored["rules"][1]["name"] == "non_inferiority"
    assert stored["rules"][1]["passed"] is True
    assert stored["rules"][1]["observed"] > stored["rules"][1]["required"] == -0.02
