"""Error rates of the whole quality gate, at the number of queries that its own power calculation names.

The rank model draws a share of the queries anew; one facet cuts them into six slices, another into three, as metadata would.
"""

import numpy as np
import pytest
from rank_model import pair

from evals.gates import Outcome, quality_gate
from evals.power import queries_needed
from evals.significance import paired_spread

DROP = 0.02


def _needed(changed):
    """The queries that show DROP with 80 % power, at the spread of the rank model."""
    candidate, champion = pair(0, 200_000, changed=changed, drop=DROP)
    return queries_needed(paired_spread(candidate, champion), DROP)


def _gate(seed, n, *, changed, drop):
    candidate, champion = pair(seed, n, changed=changed, drop=drop)
    rng = np.random.default_rng([seed, 1])  # of its own, so that no slice depends on how a system did
    slices = {query_id: (f"service={rng.integers(6)}", f"length={rng.integers(3)}") for query_id in champion}
    return quality_gate(
        candidate=candidate,
        champion=champion,
        bm25_mrr=0.5,
        ann_recall=1.0,
        mrr_floor=0.5,
        margin=DROP,
        alpha=0.05,
        min_queries=min(300, n),
        ann_recall_floor=0.95,
        slices=slices,
        draws=999,
        seed=seed,
    )


def _rates(trials, n, *, changed, drop):
    outcomes = [_gate(seed, n, changed=changed, drop=drop).outcome for seed in range(trials)]
    return {outcome: outcomes.count(outcome) / trials for outcome in Outcome}


def test_rates_in_short():
    """Forty candidates of either kind: of the equal ones hardly any fails, of those that lost 0.02 most are caught."""
    n = _needed(0.1)
    assert _rates(40, n, changed=0.1, drop=0.0)[Outcome.FAIL] <= 0.15
    assert _rates(40, n, changed=0.1, drop=DROP)[Outcome.PASS] <= 0.2


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("changed", [0.1, 0.2, 0.35])
def test_rates_at_the_number_that_the_power_calculation_names(changed):
    """Over 400 candidates each: at most 7 % of equal ones fail, at least 80 % of those that truly lost 0.02 are not let through."""
    trials, n = 400, _needed(changed)
    equal = _rates(trials, n, changed=changed, drop=0.0)
    worse = _rates(trials, n, changed=changed, drop=DROP)
    print(f"{changed:.0%} of ranks change, n = {n:,}: equal {equal}; lost {DROP} {worse}")
    assert equal[Outcome.FAIL] <= 0.07
    assert 1 - worse[Outcome.PASS] >= 0.80
    assert worse[Outcome.FAIL] >= 0.80 - 2.6 * np.sqrt(0.8 * 0.2 / trials)
