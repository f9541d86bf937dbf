"""The canary gate on replayed queries: harm is shown early, thin traffic shows nothing, and no champion is no obstacle."""

import numpy as np
import pytest

from evals.significance import EvidenceError
from rag_assets.replay import canary_gate

GATE = {"margin": 0.02, "alpha": 0.05, "min_queries": 300}


def ranks(count: int, *, seed: int = 0, worse: float = 0.0) -> dict[str, float]:
    """Reciprocal ranks of `count` queries; a share `worse` of them fell from rank 1 to rank 2."""
    fell = np.random.default_rng(seed).random(count) < worse
    return {f"q{number}": 0.5 if fell[number] else 1.0 for number in range(count)}


def test_the_first_release_has_nothing_to_compare_with():
    """Without a champion the canary passes and says why."""
    result = canary_gate(ranks(1), None, **GATE)
    assert (result.outcome, result.summary) == ("PASS", "PASS: nothing is live to compare with")


def test_equal_answers_pass():
    """A challenger that answers as the champion does passes, whatever order the queries are given in."""
    champion = ranks(400)
    result = canary_gate(dict(reversed(champion.items())), champion, **GATE)
    assert result.outcome == "PASS"
    assert "400 of 400 queries" in result.summary


def test_harm_is_shown_before_all_traffic_was_seen():
    """A loss of 0.15 is a FAIL that says after how many queries it was shown; the same comparison repeats to the letter."""
    champion, challenger = ranks(1000), ranks(1000, worse=0.3)
    result = canary_gate(challenger, champion, **GATE)
    assert result.outcome == "FAIL"
    assert "over 100 of 1,000 queries" in result.summary
    assert canary_gate(challenger, champion, **GATE) == result


def test_thin_traffic_is_inconclusive():
    """Fewer queries than the minimum pass nothing, however good; they can still fail what does gross harm."""
    assert canary_gate(ranks(299), ranks(299), **GATE).outcome == "INCONCLUSIVE"
    assert canary_gate(ranks(1), ranks(1), **GATE).outcome == "INCONCLUSIVE"
    assert canary_gate(dict.fromkeys(ranks(200), 0.0), ranks(200), **GATE).outcome == "FAIL"


def test_a_loss_seen_but_not_shown_is_inconclusive():
    """A mean loss beyond the margin that chance may explain is neither passed nor failed."""
    result = canary_gate({**ranks(300), "q7": 0.0, **{f"q{number}": 0.5 for number in range(20, 36)}}, ranks(300), **GATE)
    assert result.outcome == "INCONCLUSIVE"
    assert "-0.03" in result.summary


@pytest.mark.parametrize("seed", range(12))
def test_no_false_alarm_at_equal_quality(seed):
    """Two systems that differ by chance alone: at every query a look, and no harm is shown."""
    result = canary_gate(ranks(600, seed=seed, worse=0.2), ranks(600, seed=100 + seed, worse=0.2), **GATE)
    assert result.outcome != "FAIL"


def test_other_queries_are_no_comparison():
    """Challenger and champion must have answered the same queries."""
    with pytest.raises(EvidenceError, match="different queries"):
        canary_gate(ranks(300), ranks(301), **GATE)
