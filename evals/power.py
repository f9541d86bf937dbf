"""How many queries does a comparison need, and what could the ones at hand show?

Normal approximation for a one-sided paired test (Sakai, Laboratory Experiments in Information Retrieval, 2018, ch. 6):

    n = ((z[1 - alpha] + z[power]) * sd / drop) ** 2

`sd` is the standard deviation of the per-query differences between the two systems; 0.13 to 0.22 is usual for reciprocal ranks.
"""

import math
from statistics import NormalDist

from evals.significance import EvidenceError


def minimum_detectable_drop(sd_difference: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true drop of the mean that `n` paired queries reveal with probability `power`; in units of the metric."""
    if n < 1:
        raise EvidenceError(f"the number of queries is {n}.", fix="Give at least one query.")
    return _reach(sd_difference, alpha=alpha, power=power) / math.sqrt(n)


def queries_needed(sd_difference: float, drop: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """The number of paired queries that reveal a true drop of `drop` (> 0) with probability `power`; at least 1."""
    if not drop > 0:
        raise EvidenceError(f"the drop to detect is {drop}.", fix="Give a drop above 0.")
    return max(1, math.ceil((_reach(sd_difference, alpha=alpha, power=power) / drop) ** 2))


def _reach(sd_difference: float, *, alpha: float, power: float) -> float:
    if not (0 < alpha < 1 and 0 < power < 1):
        raise EvidenceError(f"alpha is {alpha} and power is {power}.", fix="Give both strictly between 0 and 1.")
    if not (math.isfinite(sd_difference) and sd_difference >= 0):
        raise EvidenceError(f"the standard deviation is {sd_difference}.", fix="Give a finite value of 0 or more.")
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha) + normal.inv_cdf(power)) * sd_difference
