"""Watching a comparison: stops are rare when nothing is wrong, soon when something is, and do not depend on when somebody looked."""

import math

import numpy as np
import pytest
from rank_model import reciprocal_ranks
from scipy.integrate import quad
from scipy.stats import norm

from evals.sequential import Look, any_time, constant_boundary, planned_looks
from evals.significance import EvidenceError

RUNS = 1000
PLANNED = 3000


def differences(seed: int, *, drop: float, changed: float = 0.2, n: int = PLANNED) -> np.ndarray:
    """Candidate minus champion by the rank model, in the order asked."""
    rng = np.random.default_rng(seed)
    champion = reciprocal_ranks(rng, n, 0.8)
    redrawn = reciprocal_ranks(rng, n, 0.8 - drop / changed)
    return np.where(rng.random(n) < changed, redrawn, champion) - champion


def stops(watch, *, drop: float, changed: float = 0.2) -> list[int]:
    """After how many differences each of RUNS seeded comparisons stopped; those that ran to the end are left out."""
    looks = [watch(differences(seed, drop=drop, changed=changed)) for seed in range(RUNS)]
    return [look.n for look in looks if look.outcome == "stop-bad"]


def any_time_of(sample):
    return any_time(sample, planned=PLANNED)


def thirty_looks(sample):
    return planned_looks(sample, planned=PLANNED, looks=30)


@pytest.mark.parametrize("changed", [0.07, 0.2, 0.35])
def test_any_time_rarely_stops_what_is_no_worse(changed):
    """Looked at after every difference, 30 looks among them, at most 5 % of 1,000 harmless comparisons are stopped."""
    share = len(stops(any_time_of, drop=0.0, changed=changed)) / RUNS
    print(f"any time, {changed:.0%} changed: {share:.3f} false stops")
    assert share <= 0.05


def test_any_time_catches_a_drop_soon():
    """A true drop of 0.02 is stopped in at least 95 % of 1,000 comparisons, half of them within 900 differences."""
    found = stops(any_time_of, drop=0.02)
    print(f"any time, drop 0.02: {len(found) / RUNS:.3f} stopped, median at {np.median(found):.0f}")
    assert len(found) / RUNS >= 0.95
    assert np.median(found) <= 900


def test_planned_looks_keep_alpha_and_have_power():
    """Thirty looks stop about 5 % of harmless comparisons (99 % binomial band) and at least 98 % of those with a drop of 0.02."""
    harmless, bad = stops(thirty_looks, drop=0.0), stops(thirty_looks, drop=0.02)
    print(f"30 looks: {len(harmless) / RUNS:.3f} false stops; drop 0.02: {len(bad) / RUNS:.3f} stopped, median at {np.median(bad):.0f}")
    assert len(harmless) / RUNS <= 0.05 + 2.576 * math.sqrt(0.05 * 0.95 / RUNS)
    assert len(bad) / RUNS >= 0.98


@pytest.mark.parametrize(("looks", "published"), [(1, 1.960), (2, 1.977), (3, 2.004), (4, 2.024), (5, 2.040), (10, 2.087)], ids=str)
def test_boundary_is_the_published_one(looks, published):
    """The O'Brien-Fleming constants of Jennison and Turnbull's table for a two-sided 5 % are those of one side at 2.5 %."""
    assert constant_boundary(looks, 0.025) == pytest.approx(published, abs=1e-3)


def test_ratio_is_the_mixture_integral():
    """The evidence equals the integral of the likelihood ratio over the half-normal mixture, done numerically."""
    sample = differences(3, drop=0.02, n=100)
    look = any_time(sample, planned=1000, minimum=100, tau=0.02)
    variance, mean = sample.var(ddof=1) / 100, sample.mean()

    def integrand(effect: float) -> float:
        likelihood = norm.pdf(mean, effect, math.sqrt(variance)) / norm.pdf(mean, 0, math.sqrt(variance))
        return float(2 * norm.pdf(effect, 0, 0.02) * likelihood)

    assert look.evidence == pytest.approx(quad(integrand, -0.2, 0)[0], rel=1e-6)
    assert (look.n, look.mean) == (100, pytest.approx(mean))


@pytest.mark.parametrize("watch", [any_time_of, thirty_looks])
def test_outcome_does_not_depend_on_when_one_looks(watch):
    """Looking at every prefix gives the stop that looking once at the end gives, and a stop is not forgotten when things get better."""
    sample = differences(5, drop=0.05)
    at_the_end = watch(sample)
    assert at_the_end.outcome == "stop-bad"
    assert watch(sample[: at_the_end.n]) == at_the_end
    assert watch(sample[: at_the_end.n - 1]).outcome == "continue"
    recovered = np.concatenate([sample[: at_the_end.n], np.ones(PLANNED - at_the_end.n)])
    assert watch(recovered) == at_the_end


@pytest.mark.parametrize("watch", [any_time_of, thirty_looks])
def test_continue_and_done(watch):
    """Equal systems are watched until the planned number, then done; more than planned is not used; a better one is never stopped."""
    assert watch([]) == Look("continue", 0, 0.0, 0.0, 0.0)
    assert watch([0.0] * 99).outcome == "continue"
    assert watch([0.0] * 5000).outcome == "done"
    assert watch([0.0] * 5000).n == PLANNED
    assert watch(-differences(1, drop=0.05)).outcome == "done"


@pytest.mark.parametrize("watch", [any_time_of, thirty_looks])
def test_a_loss_without_spread_is_stopped(watch):
    """A candidate that is worse by the same amount every time stops at the first look."""
    look = watch([-0.5] * 200)
    assert (look.outcome, look.n, look.mean) == ("stop-bad", 100, -0.5)
    assert math.isfinite(look.evidence)


@pytest.mark.parametrize(
    "call",
    [
        lambda: any_time([0.1, float("nan")], planned=10, minimum=2),
        lambda: any_time([0.1], planned=10, minimum=20),
        lambda: any_time([0.1], planned=10, minimum=2, tau=0),
        lambda: any_time([0.1], planned=1, minimum=2),
        lambda: any_time([0.1], planned=100, alpha=0.9),
        lambda: planned_looks([0.1], planned=10, looks=6),
        lambda: planned_looks([0.1], planned=10, looks=0),
        lambda: planned_looks([float("inf")], planned=10, looks=2),
    ],
)
def test_what_makes_no_plan_is_refused(call):
    """Values that are not finite and plans that cannot be kept are errors that say what to do."""
    with pytest.raises(EvidenceError) as raised:
        call()
    assert raised.value.fix
