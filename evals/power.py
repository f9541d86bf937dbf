"""How many queries does a comparison need, and what could the ones at hand show?

Normal approximation for a one-sided paired test (Sakai, Laboratory Experiments in Information Retrieval, 2018, ch. 6):

    n = ((z[1 - alpha] + z[power]) * sd / drop) ** 2

`sd` is the standard deviation of the per-query differences between the two systems; USUAL_SD is usual for reciprocal ranks, where 10 to
35 % of the queries change their rank.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from evals.significance import EvidenceError

USUAL_SD = (0.13, 0.22)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What comparisons over `queries` paired queries can show, for standard deviations of the differences from `sd_low` to `sd_high`."""

    queries: int
    sd_low: float
    sd_high: float
    alpha: float = 0.05
    power: float = 0.8

    @property
    def drops(self) -> tuple[float, float]:
        """The smallest drop that shows with probability `power`, at either end of the standard deviations."""
        low, high = (minimum_detectable_drop(sd, self.queries, alpha=self.alpha, power=self.power) for sd in (self.sd_low, self.sd_high))
        return low, high

    def queries_for(self, drop: float) -> tuple[int, int]:
        """The number of queries that show `drop` with probability `power`, at either end of the standard deviations."""
        low, high = (queries_needed(sd, drop, alpha=self.alpha, power=self.power) for sd in (self.sd_low, self.sd_high))
        return low, high

    def sentence(self) -> str:
        """For the foot of a result."""
        low, high = self.drops
        return (
            f"{self.queries:,} queries show a drop of MRR from {_range(low, high)} up with {self.power:.0%} power "
            f"(alpha {self.alpha:g}, paired differences of SD {_range(self.sd_low, self.sd_high, digits=2)})"
        )


def sensitivity_of(queries: int, sd_difference: float = 0.0, *, alpha: float = 0.05) -> Sensitivity:
    """At the measured standard deviation of the paired differences; over the usual ones where nothing was compared or nothing differed."""
    sds = (sd_difference, sd_difference) if sd_difference > 0 else USUAL_SD
    return Sensitivity(queries, *sds, alpha=alpha)


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


def _range(low: float, high: float, *, digits: int = 3) -> str:
    first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if first == last else f"{first} to {last}"
