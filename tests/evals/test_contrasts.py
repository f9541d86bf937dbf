"""Many systems against one: the signs, the correction, and what is refused."""

import numpy as np
import pytest

from evals.contrasts import contrasts
from evals.significance import EvidenceError, paired_difference

QUERIES = [f"q{number}" for number in range(200)]


def ranks(*, seed: int, lift: float = 0.0) -> dict[str, float]:
    values = np.random.default_rng(seed).choice([1.0, 0.5, 0.25, 0.0], len(QUERIES)) * 0.8 + lift
    return dict(zip(QUERIES, values.tolist(), strict=True))


REFERENCE = ranks(seed=1, lift=0.1)


def moved(by: float, *, share: float) -> dict[str, float]:
    """The reference with `by` added to a share of its queries, and noise of both signs on the others."""
    rng = np.random.default_rng(7)
    return {query: value + (by if rng.random() < share else rng.choice([-0.01, 0.01])) for query, value in REFERENCE.items()}


def test_verdicts_have_the_sign_of_the_difference():
    """A system that lost on most queries is worse, one that won is better, one that is the same shows no difference; p is two-sided."""
    found = contrasts({"worse": moved(-0.1, share=0.6), "better": moved(0.1, share=0.6), "same": dict(REFERENCE)}, REFERENCE)
    assert {name: contrast.verdict for name, contrast in found.items()} == {
        "worse": "worse",
        "better": "better",
        "same": "no difference seen",
    }
    assert found["worse"].mean < found["worse"].high < 0 < found["better"].low < found["better"].mean
    assert (found["same"].mean, found["same"].p) == (0.0, 1.0)
    mirrored = contrasts({"worse": moved(-0.1, share=0.6)}, REFERENCE)["worse"]
    assert mirrored.p == pytest.approx(2 * paired_difference(moved(-0.1, share=0.6), REFERENCE).p_worse)


def test_p_values_are_corrected_for_how_many_are_compared():
    """The same difference has the p-value of Holm's method: five times as large among five alike, and never below it alone."""
    one = moved(-0.004, share=0.5)
    alone = contrasts({"a": one}, REFERENCE)["a"].p
    among = contrasts(dict.fromkeys("abcde", one), REFERENCE)["a"].p
    assert among == pytest.approx(min(1.0, 5 * alone))
    assert alone < 1


def test_chance_alone_is_seldom_called_a_difference():
    """Of 60 systems without a true difference at most a handful are called better or worse, although each alone may err once in twenty."""
    rng = np.random.default_rng(3)
    systems = {str(number): {query: value + rng.normal(0, 0.2) for query, value in REFERENCE.items()} for number in range(60)}
    found = contrasts(systems, REFERENCE)
    assert sum(contrast.verdict != "no difference seen" for contrast in found.values()) <= 2


def test_other_queries_are_refused():
    """Systems measured on other queries than the reference are not compared."""
    with pytest.raises(EvidenceError, match="different queries"):
        contrasts({"other": {"q0": 1.0}}, REFERENCE)
