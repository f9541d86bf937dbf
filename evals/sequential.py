"""Watching paired differences as they come in, without being fooled by looking often: stop a bad candidate early.

A difference is candidate minus champion on one query; below 0 the candidate is worse. A plain p-value looked at 30 times cries wolf in 23 %
of the cases where nothing is wrong. Two rules keep that below alpha:

- `any_time`: the mixture sequential probability ratio test (Robbins 1970; Johari, Pekelis, Walsh 2017), valid however often one looks;
- `planned_looks`: O'Brien and Fleming's (1979) boundary for a number of looks fixed beforehand.

Both are functions of the differences in their order, so the outcome does not depend on when somebody looked, and a stop is never forgotten.
Neither can say that a candidate is good: "done" only means that the planned number was reached without a stop.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evals.significance import EvidenceError

Floats = NDArray[np.float64]
Outcome = Literal["stop-bad", "continue", "done"]

_NODES = 240
_MOST_LOOKS = 200
_SMALLEST_VARIANCE = 1e-12
_LARGEST_LOG = 700.0


@dataclass(frozen=True, slots=True)
class Look:
    """Where a watched comparison stands.

    `n` differences were used: up to the stop, else all so far, at most the planned ones; `mean` is theirs. `evidence` against the candidate
    stops it on reaching `boundary`: a likelihood ratio for `any_time`, a z-value for `planned_looks`; both 0 before the first look.
    """

    outcome: Outcome
    n: int
    mean: float
    evidence: float
    boundary: float


def any_time(differences: Sequence[float] | Floats, *, planned: int, minimum: int = 100, tau: float = 0.02, alpha: float = 0.05) -> Look:
    """Watch after every difference from the `minimum`-th on; "stop-bad" in at most a share `alpha` of comparisons that are no worse.

    The likelihood ratio of "worse by about `tau`" (a half-normal mixture of that scale) against "no worse" is a supermartingale under the
    latter, so it reaches 1 / alpha with probability alpha at most (Ville 1939). The variance is that of the differences so far, which is
    why a minimum is needed. Raises EvidenceError for a value that is not finite and for numbers that make no plan.
    """
    sample = _sample(differences, planned=planned, alpha=alpha)
    if not (tau > 0 and 2 <= minimum <= planned):
        raise EvidenceError(f"tau is {tau}, the minimum {minimum} of {planned}.", fix="Give tau above 0 and a minimum from 2 to planned.")
    n, mean, variance = _running(sample)
    looked = slice(minimum - 1, None)
    ratio = _ratio(mean[looked], variance[looked] / n[looked], tau)
    return _look(n[looked], ratio, np.full(len(ratio), 1 / alpha), mean=mean, planned=planned)


def planned_looks(differences: Sequence[float] | Floats, *, planned: int, looks: int, alpha: float = 0.05) -> Look:
    """Look `looks` times, evenly spread over `planned` differences; "stop-bad" in about a share `alpha` of comparisons with no difference.

    At a share t of the plan the boundary is z = c / sqrt(t): strict early, close to the plain one-sided test at the end. Raises
    EvidenceError for a value that is not finite and for numbers that make no plan.
    """
    sample = _sample(differences, planned=planned, alpha=alpha)
    if not 1 <= looks <= min(planned // 2, _MOST_LOOKS):
        raise EvidenceError(
            f"{looks} looks over {planned} differences.", fix=f"Plan 1 to {_MOST_LOOKS} looks, with 2 differences for each."
        )
    n, mean, variance = _running(sample)
    at = np.array([planned * number // looks for number in range(1, looks + 1)])
    reached = at[at <= len(sample)] - 1
    z = -mean[reached] / np.sqrt(variance[reached] / n[reached])
    boundaries = constant_boundary(looks, alpha) / np.sqrt(at[: len(reached)] / planned)
    return _look(n[reached], z, boundaries, mean=mean, planned=planned)


@lru_cache
def constant_boundary(looks: int, alpha: float) -> float:
    """The c that a Brownian motion seen at k / looks, k = 1..looks, reaches with probability `alpha`: 1.645 for one look at 0.05.

    By recursive numerical integration (Armitage, McPherson, Rowe 1969), exact to about 1e-4.
    """
    from scipy.optimize import brentq

    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    step = 1 / math.sqrt(looks)

    def crossing(c: float) -> float:
        half = (c + 6) / 2
        x, w = nodes * half + c - half, weights * half
        alive = _density(x / step) / step
        onward = _density((x[:, None] - x[None, :]) / step) / step * w
        for _ in range(looks - 1):
            alive = onward @ alive
        return float(1 - alive @ w - alpha)

    return float(brentq(crossing, 0.0, 6.0, xtol=1e-6))


def _density(z: Floats) -> Floats:
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _ratio(mean: Floats, variance: Floats, tau: float) -> Floats:
    """Likelihood ratio of a mean observed with `variance`: half-normal of scale tau below 0, against 0."""
    from scipy.special import log_ndtr

    total = variance + tau**2
    two_sided = 0.5 * np.log(variance / total) + tau**2 * mean**2 / (2 * variance * total)
    one_sided = two_sided + math.log(2) + log_ndtr(-mean * tau / np.sqrt(variance * total))
    ratio: Floats = np.exp(np.minimum(one_sided, _LARGEST_LOG))
    return ratio


def _running(sample: Floats) -> tuple[Floats, Floats, Floats]:
    """1..n with the mean and the variance of the first so many values; the variance is positive also where nothing varied."""
    n = np.arange(1.0, len(sample) + 1)
    mean = np.cumsum(sample) / n
    variance = (np.cumsum(sample**2) - n * mean**2) / np.maximum(n - 1, 1)
    return n, mean, np.maximum(variance, _SMALLEST_VARIANCE)


def _look(n: Floats, evidence: Floats, boundaries: Floats, *, mean: Floats, planned: int) -> Look:
    """The first crossing among the looks at `n`, else where the last look stands."""
    crossed = np.flatnonzero(evidence >= boundaries)
    outcome: Outcome = "stop-bad" if len(crossed) else "done" if len(mean) == planned else "continue"
    used = int(n[crossed[0]]) if len(crossed) else len(mean)
    shown = int(crossed[0]) if len(crossed) else len(n) - 1
    against, boundary = (float(evidence[shown]), float(boundaries[shown])) if len(n) else (0.0, 0.0)
    return Look(outcome, used, float(mean[used - 1]) if used else 0.0, against, boundary)


def _sample(differences: Sequence[float] | Floats, *, planned: int, alpha: float) -> Floats:
    sample = np.asarray(differences, dtype=np.float64)[:planned]
    if not (planned >= 2 and 0 < alpha < 0.5):
        raise EvidenceError(f"{planned} differences are planned, alpha is {alpha}.", fix="Plan at least 2, with alpha between 0 and 0.5.")
    if not np.isfinite(sample).all():
        raise EvidenceError("a difference is not finite.", fix="Leave queries without a score out of both sides, or score them 0.")
    return sample
