"""Sample sizes against simulated and hand-computed values."""

import pytest
from rank_model import pair

from evals.contrasts import Contrast
from evals.power import USUAL_SD, Sensitivity, minimum_detectable_drop, queries_needed, sensitivity_of
from evals.reports import LeaderboardRow, leaderboard_markdown, leaderboard_table
from evals.significance import EvidenceError, paired_difference, paired_spread


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


def test_sensitivity_says_both_ends():
    """A sensitivity holds the drops and the queries of both ends of its standard deviations, and one figure where they are equal."""
    found = Sensitivity(400, 0.1, 0.2)
    assert found.drops == (minimum_detectable_drop(0.1, 400), minimum_detectable_drop(0.2, 400))
    assert found.queries_for(0.02) == (queries_needed(0.1, 0.02), queries_needed(0.2, 0.02))
    assert found.sentence() == (
        "400 queries show a drop of MRR from 0.012 to 0.025 up with 80% power (alpha 0.05, paired differences of SD 0.10 to 0.20)"
    )
    assert "from 0.025 up" in Sensitivity(400, 0.2, 0.2).sentence()


def test_usual_differences_stand_in_for_none():
    """Where nothing was compared or nothing differed, the usual standard deviations are used instead of a promise to see any drop."""
    assert sensitivity_of(300) == sensitivity_of(300, 0.0) == Sensitivity(300, *USUAL_SD)
    assert sensitivity_of(300, 0.17) == Sensitivity(300, 0.17, 0.17)


def test_spread_is_that_of_the_comparison():
    """The standard deviation of the differences is the one that the paired comparison reports."""
    candidate, champion = pair(4, 200)
    assert paired_spread(candidate, champion) == paired_difference(candidate, champion, draws=99).sd
    assert paired_spread({"q": 1.0}, {"q": 0.5}) == 0.0
    with pytest.raises(EvidenceError, match="different queries"):
        paired_spread({"a": 1.0}, {"b": 1.0})


def test_every_leaderboard_says_what_it_can_show():
    """The foot of the table and of its Markdown has the detectable drop: at the measured differences if there are any, else the usual ones."""
    metrics = {"mrr_at_10": 0.8, "queries": 1344.0}
    alone = [LeaderboardRow("m", metrics, None, "champion")]
    usual = f"{sensitivity_of(1344).sentence()}."
    assert leaderboard_table(alone, k=10).caption == usual
    assert leaderboard_markdown(alone, k=10).endswith(f"\n\n{usual}\n")
    width = 2 * 1.96 * 0.2 / 1344**0.5
    compared = [*alone, LeaderboardRow("n", metrics, None, "passed", contrast=Contrast(0.0, -width / 2, width / 2, 1.0, "worse"))]
    assert leaderboard_table(compared, k=10).caption == f"{Sensitivity(1344, 0.2, 0.2).sentence()}."
    assert not leaderboard_table([LeaderboardRow("m", {}, None, "failed")], k=10).caption


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
