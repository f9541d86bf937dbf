"""Many systems against one on the same queries: paired differences whose p-values are corrected for how many are looked at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evals.significance import SEED, holm, paired_difference, sign_flip_p_worse

Direction = Literal["better", "worse", "no difference seen"]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A system minus the reference: the mean with its 95 % BCa interval, and the two-sided sign-flip p-value after Holm's correction.

    `verdict` is "better" or "worse" where `p` is at most alpha, else "no difference seen", which does not say that there is none.
    """

    mean: float
    low: float
    high: float
    p: float
    verdict: Direction


def contrasts(
    systems: Mapping[str, Mapping[str, float]], reference: Mapping[str, float], *, alpha: float = 0.05, seed: int = SEED
) -> dict[str, Contrast]:
    """Compare each of `systems`, name -> value a query, with `reference`.

    The two-sided p is twice the smaller of the one-sided ones, at most 1. EvidenceError if the query ids differ.
    """
    differences = {name: paired_difference(values, reference, alpha=alpha, seed=seed) for name, values in systems.items()}
    p_better = {
        name: sign_flip_p_worse(np.array([reference[query] - values[query] for query in sorted(values)]), seed=seed)
        for name, values in systems.items()
    }
    corrected = holm({name: min(1.0, 2 * min(found.p_worse, p_better[name])) for name, found in differences.items()})
    return {
        name: Contrast(found.mean, found.low, found.high, corrected[name], _verdict(found.mean, corrected[name], alpha=alpha))
        for name, found in differences.items()
    }


def _verdict(mean: float, p: float, *, alpha: float) -> Direction:
    if p > alpha or mean == 0:
        return "no difference seen"
    return "better" if mean > 0 else "worse"
