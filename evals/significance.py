"""Is the candidate worse than the champion? Paired by query, seeded, and the same answer on every run.

The unit is one query's metric, such as its reciprocal rank. Randomisation test, bootstrap and t-test agree on such data, Wilcoxon and
sign test do not (Smucker, Allan, Carterette 2007); t-test and permutation keep their error rate (Urbano, Lima, Hanjalic 2019).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

SEED = 20_261_122
_BLOCK_CELLS = 1_000_000
_BOOTSTRAP_BATCH = 128
_NORMAL = NormalDist()


class EvidenceError(ValueError):
    """The numbers handed in cannot support a statement; says what is wrong and what to do (`fix`), as `evals.collections.EvalSetError`."""

    code = "evidence"
    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what} {fix}".strip())


@dataclass(frozen=True, slots=True)
class _Bca:
    """Bootstrap distribution of a mean with Efron's (1987) bias correction and acceleration; for a mean the jackknife is in closed form."""

    means: Floats
    bias: float
    acceleration: float

    def quantile(self, level: float) -> float:
        z = self.bias + _NORMAL.inv_cdf(level)
        return float(np.quantile(self.means, _NORMAL.cdf(self.bias + z / (1 - self.acceleration * z))))

    def level(self, value: float) -> float:
        """The level whose quantile is `value`; the inverse of `quantile`."""
        z = _NORMAL.inv_cdf(_share_below(self.means, value)) - self.bias
        return _NORMAL.cdf(z / (1 + self.acceleration * z) - self.bias)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Candidate minus champion over the same queries.

    `low` and `high` bound the mean with 95 % confidence (BCa). `lower_bound` is its one-sided bound at confidence 1 - `alpha`. `p_worse` is
    the sign-flip p-value of "the candidate is worse". `sd` is the standard deviation of the per-query differences, for power.
    """

    mean: float
    low: float
    high: float
    lower_bound: float
    alpha: float
    p_worse: float
    sd: float
    n: int
    _bca: _Bca | None = field(repr=False, compare=False)

    def noninferior(self, margin: float) -> bool:
        """True if a loss of `margin` or more is excluded with confidence 1 - `alpha`."""
        return self.lower_bound > -margin

    def p_value_noninferior(self, margin: float) -> float:
        """The smallest alpha at which `noninferior(margin)` would hold: the level of -margin among the BCa bounds.

        Draws resolve it no finer than about 1 / draws. 0 or 1 if all differences are equal.
        """
        if self._bca is None:
            return 0.0 if self.mean > -margin else 1.0
        return self._bca.level(-margin)


def bca_interval(values: Sequence[float] | Floats, *, confidence: float = 0.95, draws: int = 9999, seed: int = SEED) -> tuple[float, float]:
    """Bias-corrected and accelerated (BCa) bootstrap interval of the mean; values that are all equal give that point.

    Raises EvidenceError if there is no value or one is not finite.
    """
    sample = _sample(values)
    if _all_equal(sample):
        return float(sample[0]), float(sample[0])
    bca = _bootstrap(sample, draws=draws, seed=seed)
    return bca.quantile((1 - confidence) / 2), bca.quantile((1 + confidence) / 2)


def paired_difference(
    candidate: Mapping[str, float], champion: Mapping[str, float], *, alpha: float = 0.05, draws: int = 10_000, seed: int = SEED
) -> PairedDifference:
    """Compare two systems on the same queries, paired by query id. The order of the mappings does not matter.

    Raises EvidenceError if the query ids differ, if there are none or if a value is not finite.
    """
    differences = _differences(candidate, champion)
    mean = float(differences.mean())
    p_worse = sign_flip_p_worse(differences, draws=draws, seed=seed)
    n = len(differences)
    if _all_equal(differences):
        return PairedDifference(mean, mean, mean, mean, alpha, p_worse, 0.0, n, None)
    bca = _bootstrap(differences, draws=draws, seed=seed)
    low, high, lower_bound = (bca.quantile(level) for level in (0.025, 0.975, alpha))
    return PairedDifference(mean, low, high, lower_bound, alpha, p_worse, float(differences.std(ddof=1)), n, bca)


def paired_spread(candidate: Mapping[str, float], champion: Mapping[str, float]) -> float:
    """The standard deviation of the per-query differences, 0 for a single query: what `evals.power` needs. Raises as `paired_difference`."""
    differences = _differences(candidate, champion)
    return float(differences.std(ddof=1)) if len(differences) > 1 else 0.0


def _differences(candidate: Mapping[str, float], champion: Mapping[str, float]) -> Floats:
    if candidate.keys() != champion.keys():
        odd = sorted(candidate.keys() ^ champion.keys())
        raise EvidenceError(
            f"candidate and champion were measured on different queries: {len(candidate):,} against {len(champion):,}, "
            f"{len(odd):,} not shared, such as {odd[0]!r}.",
            fix="Evaluate both on the same eval set.",
        )
    queries = sorted(candidate)
    return _sample([candidate[query] for query in queries]) - _sample([champion[query] for query in queries])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) step-down adjusted p-values: rejecting those at or below alpha keeps the family-wise error at alpha."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if not 0 <= p <= 1:
            raise EvidenceError(f"the p-value of {name!r} is {p}.", fix="Give values between 0 and 1.")
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def sign_flip_p_worse(differences: Floats, *, draws: int = 10_000, seed: int = SEED) -> float:
    """One-sided p-value of "the mean difference is below 0": the share of random sign patterns whose sum is at most the observed one.

    With +1 correction; zeros never matter and are left out. 1.0 if nothing differs.
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    observed = float(moved.sum())
    as_low = observed + 1e-12 * float(np.abs(moved).sum())
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // len(moved))
    extreme = 0
    for start in range(0, draws, block):
        positive = rng.integers(0, 2, size=(min(block, draws - start), len(moved)), dtype=np.int8)
        extreme += int(np.count_nonzero(2 * (positive @ moved) - observed <= as_low))
    return (1 + extreme) / (1 + draws)


def _bootstrap(sample: Floats, *, draws: int, seed: int) -> _Bca:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    drawn = bootstrap((sample,), np.mean, vectorized=True, n_resamples=draws, batch=_BOOTSTRAP_BATCH, method="percentile", rng=rng)
    means: Floats = drawn.bootstrap_distribution
    mean = sample.mean()
    centred = sample - mean
    acceleration = float(np.sum(centred**3) / (6 * np.sum(centred**2) ** 1.5))
    return _Bca(means, _NORMAL.inv_cdf(_share_below(means, mean)), acceleration)


def _sample(values: ArrayLike) -> Floats:
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise EvidenceError("there is not a single query to judge by.", fix="Evaluate on an eval set with queries.")
    if not np.isfinite(sample).all():
        raise EvidenceError(f"{int((~np.isfinite(sample)).sum()):,} of {sample.size:,} values are not finite.", fix="Evaluate again.")
    return sample


def _all_equal(sample: Floats) -> bool:
    return math.isclose(float(sample.min()), float(sample.max()), rel_tol=1e-12, abs_tol=1e-15)


def _share_below(means: Floats, point: float) -> float:
    """Share of draws below `point`, ties counted half; kept half a draw away from 0 and 1, where the normal quantile is infinite."""
    share = (np.count_nonzero(means < point) + np.count_nonzero(means <= point)) / (2 * len(means))
    return float(min(max(share, 0.5 / len(means)), 1 - 0.5 / len(means)))
