"""Paired comparison, intervals and multiplicity; calibrated on simulated rankings with fixed seeds."""

import itertools

import numpy as np
import pytest
from rank_model import pair, reciprocal_ranks
from scipy.stats import binom, bootstrap, ttest_rel

from evals.power import queries_needed
from evals.significance import EvidenceError, bca_interval, holm, paired_difference


def test_false_alarms_stay_at_alpha():
    """Without a true difference, p_worse <= 0.05 in a share of runs inside the 99 % binomial band around 0.05."""
    trials = 300
    alarms = sum(paired_difference(*pair(seed, 200, changed=0.3), draws=399, seed=seed).p_worse <= 0.05 for seed in range(trials))
    assert binom.ppf(0.005, trials, 0.05) <= alarms <= binom.ppf(0.995, trials, 0.05)


def test_a_drop_of_five_hundredths_is_caught_as_power_promises():
    """A true MRR drop of 0.05 is found in about 80 % of runs with the queries that power analysis asks for, nearly always with twice."""
    candidate, champion = pair(0, 50_000, changed=0.2, drop=0.05)
    sd = np.std(np.subtract(list(candidate.values()), list(champion.values())))
    n = queries_needed(sd, 0.05)
    trials = 120

    def caught(queries):
        runs = (pair(seed, queries, changed=0.2, drop=0.05) for seed in range(trials))
        return sum(paired_difference(*run, draws=299).p_worse <= 0.05 for run in runs)

    assert 100 < n < 300
    assert binom.ppf(0.001, trials, 0.8) <= caught(n) <= binom.ppf(0.999, trials, 0.8)
    assert caught(2 * n) >= 0.95 * trials


def test_sign_flip_is_exact_on_a_small_case():
    """The sampled p-value is that of all 2^n sign patterns, up to the noise of sampling, ties included."""
    differences = [-0.5, -0.5, 0.25, -1.0, 0.5, -0.25, 0.0, -0.5]
    names = [str(number) for number in range(len(differences))]
    sums = [np.dot(signs, differences) for signs in itertools.product([-1, 1], repeat=len(differences))]
    exact = np.mean(np.array(sums) <= sum(differences) + 1e-9)
    result = paired_difference(dict(zip(names, differences, strict=True)), dict.fromkeys(names, 0.0))
    assert result.p_worse == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))


def test_a_p_value_is_never_zero():
    """However clear the loss, p is at least 1 / (draws + 1): the observed pattern is one of the possible ones."""
    champion = {f"q{number}": 1.0 for number in range(200)}
    candidate = {query: 0.1 + 0.001 * position for position, query in enumerate(champion)}
    assert paired_difference(candidate, champion, draws=999).p_worse == 1 / 1000


def test_permutation_and_t_test_agree():
    """On a plain case the sign-flip p-value is that of the paired t-test, as the literature says."""
    candidate, champion = pair(3, 1000, changed=0.2, drop=0.01)
    t_test = ttest_rel(list(candidate.values()), list(champion.values()), alternative="less").pvalue
    assert 0.001 < t_test < 0.5
    assert paired_difference(candidate, champion).p_worse == pytest.approx(t_test, abs=0.015)


def test_pairing_is_by_query_id():
    """Shuffling one mapping changes nothing; the seed alone decides the draws."""
    candidate, champion = pair(5, 300, changed=0.2, drop=0.03)
    shuffled = dict(sorted(champion.items(), key=lambda item: hash(item[0]) % 97))
    first, again = paired_difference(candidate, champion), paired_difference(candidate, shuffled)
    assert first == again
    assert first.mean == pytest.approx(np.mean(list(candidate.values())) - np.mean(list(champion.values())))
    assert first.low < first.lower_bound < first.mean < first.high


def test_identical_systems_show_no_loss():
    """A system against itself: no difference, p = 1, non-inferior at any margin, without a warning."""
    champion, _ = pair(6, 50)
    result = paired_difference(champion, champion)
    assert (result.mean, result.low, result.high, result.p_worse, result.sd) == (0, 0, 0, 1, 0)
    assert result.noninferior(0.001)
    assert result.p_value_noninferior(0.001) == 0
    lost = paired_difference({query: value - 0.1 for query, value in champion.items()}, champion)
    assert not lost.noninferior(0.02)
    assert lost.p_value_noninferior(0.02) == 1


def test_noninferiority_p_value_and_bound_agree():
    """The p-value is below alpha exactly when the bound clears the margin, and falls as the margin grows."""
    for seed, drop in itertools.product(range(4), (0.0, 0.02)):
        result = paired_difference(*pair(seed, 400, drop=drop), seed=seed)
        margins = np.linspace(0.001, 0.06, 60)
        p_values = [result.p_value_noninferior(margin) for margin in margins]
        assert all(later <= earlier for earlier, later in itertools.pairwise(p_values))
        for margin, p in zip(margins, p_values, strict=True):
            if abs(result.lower_bound + margin) > 2e-4:
                assert result.noninferior(margin) == (p < result.alpha)


@pytest.mark.parametrize("drop", [0.0, 0.02])
def test_noninferiority_rates_at_500_queries(drop):
    """At 500 queries and margin 0.02 an equal candidate passes mostly (0.96 by simulation), one that lost 0.02 seldom (0.07)."""
    trials = 100
    passed = sum(
        paired_difference(*pair(seed, 500, drop=drop), draws=999, seed=seed).noninferior(0.02) for seed in range(1000, 1000 + trials)
    )
    if drop:
        assert passed / trials <= 0.13
    else:
        assert passed / trials >= 0.90


def test_interval_covers_the_truth():
    """The 95 % interval holds the true mean of skewed reciprocal ranks in about 95 % of samples."""
    trials = 300
    covered = 0
    for seed in range(trials):
        low, high = bca_interval(reciprocal_ranks(np.random.default_rng(seed), 150, 0.8), draws=999, seed=seed)
        covered += low <= 0.8 <= high
    assert binom.ppf(0.001, trials, 0.94) <= covered <= binom.ppf(0.999, trials, 0.96)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_interval_is_the_bca_of_scipy(confidence):
    """With the same draws the interval equals that of scipy's BCa, also for few and for very skewed values."""
    for sample in (reciprocal_ranks(np.random.default_rng(1), 200, 0.8), np.array([0.1, 0.5, 1.0]), np.eye(1, 60)[0]):
        draws = {"n_resamples": 2000, "batch": 128, "rng": np.random.default_rng(7)}
        expected = bootstrap((sample,), np.mean, confidence_level=confidence, method="BCa", **draws).confidence_interval
        assert bca_interval(sample, confidence=confidence, draws=2000, seed=7) == pytest.approx(tuple(expected), abs=1e-12)


def test_equal_values_give_the_point():
    """A sample without spread has the point as its interval, and no warning."""
    assert bca_interval([0.5] * 20) == (0.5, 0.5)
    assert bca_interval([1.0]) == (1.0, 1.0)
    low, high = bca_interval([1.0] * 499 + [0.0])
    assert 0.98 < low < high <= 1.0


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf"), 0.1]])
def test_unusable_values_are_refused(values):
    """Nothing, NaN and infinity are errors that say what to do."""
    with pytest.raises(EvidenceError) as raised:
        bca_interval(values)
    assert raised.value.fix
    assert raised.value.what in str(raised.value)


def test_different_queries_are_refused():
    """Two systems measured on different queries are not compared; the error counts and names the odd ones."""
    with pytest.raises(EvidenceError, match=r"2 against 2, 2 not shared, such as 'b'"):
        paired_difference({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="not a single query"):
        paired_difference({}, {})


def test_holm_by_hand():
    """Adjusted values follow the step-down rule, keep the given order, never fall along it and never exceed 1."""
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    with pytest.raises(EvidenceError, match=r"'a' is 1\.5"):
        holm({"a": 1.5})
