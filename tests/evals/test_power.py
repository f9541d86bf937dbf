"""Sample sizes against simulated and hand-computed values."""

import pytest

from evals.power import minimum_detectable_drop, queries_needed
from evals.significance import EvidenceError


@pytest.mark.parametrize(
    ("sd", "drop", "simulated"),
    [
        (0.131, 0.02, 266),
        (0.159, 0.02, 393),
        (0.195, 0.02, 587),
        (0.171, 0.02, 452),
        (0.219, 0.02, 739),
        (0.145, 0.01, 1303),
        (0.183, 0.01, 2082),
        (0.193, 0.05, 92),
    ],
)
def test_queries_needed_matches_the_simulated_table(sd, drop, simulated):
    """The formula gives the sample sizes for 80 % power of the simulated rank model, whose SDs are rounded to three digits."""
    assert queries_needed(sd - 0.0006, drop) <= simulated <= queries_needed(sd + 0.0006, drop)


def test_both_directions_agree():
    """What n queries can just show needs n queries."""
    for n in (50, 300, 1344):
        drop = minimum_detectable_drop(0.159, n)
        assert queries_needed(0.159, drop * 1.000001) == n
        assert queries_needed(0.159, drop * 0.99) > n


def test_by_hand():
    """(1.6449 + 0.8416) * 0.2 / sqrt(400) = 0.02486; a stricter alpha and more power ask for more."""
    assert minimum_detectable_drop(0.2, 400) == pytest.approx(0.024865, abs=1e-5)
    assert minimum_detectable_drop(0.2, 400, alpha=0.01) > minimum_detectable_drop(0.2, 400)
    assert queries_needed(0.2, 0.02, power=0.9) > queries_needed(0.2, 0.02)
    assert queries_needed(0.0, 0.02) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: minimum_detectable_drop(0.1, 0),
        lambda: minimum_detectable_drop(-0.1, 10),
        lambda: minimum_detectable_drop(float("nan"), 10),
        lambda: queries_needed(0.1, 0.0),
        lambda: queries_needed(0.1, float("nan")),
        lambda: queries_needed(0.1, 0.02, alpha=0.0),
        lambda: queries_needed(0.1, 0.02, power=1.0),
    ],
)
def test_impossible_questions_are_refused(call):
    """Values for which the formula means nothing are errors with a remedy."""
    with pytest.raises(EvidenceError) as raised:
        call()
    assert raised.value.fix
