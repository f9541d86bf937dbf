"""Have embeddings moved? Paired, where the same texts were embedded twice; unpaired, where other texts came in.

A changed model shows in the paired cosine alone: a small rotation is invisible to any comparison of two clouds. New topics show in the
unpaired tests alone. Their p-values come from permutations, since fixed thresholds are wrong both ways: never reached by a shift of a fifth
of the traffic, or exceeded by chance in every run. Vectors are rows of unit length; every function is seeded and gives the same answer again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.significance import SEED, EvidenceError

Vectors = NDArray[np.float32] | NDArray[np.float64]
Floats = NDArray[np.float64]

SAME_TEXT = 0.999
_RIDGE = 1.0
_FOLDS = 5


@dataclass(frozen=True, slots=True)
class PairedCosine:
    """Cosines between two embeddings of the same texts. `share_below` is the share of them below `SAME_TEXT`."""

    mean: float
    minimum: float
    share_below: float
    n: int


@dataclass(frozen=True, slots=True)
class CloudShift:
    """A window of vectors against a reference.

    `mmd` is the unbiased squared maximum mean discrepancy and `p_mmd` its permutation p-value. `auc` is how well a linear classifier tells
    held-out vectors of one from those of the other (0.5: not at all), `p_auc` its p-value. `centroid_cosine` is an effect size to plot: it
    has no threshold.
    """

    mmd: float
    p_mmd: float
    auc: float
    p_auc: float
    centroid_cosine: float
    n_reference: int
    n_window: int


def paired_cosine(stored: Vectors, again: Vectors) -> PairedCosine:
    """Cosine of each row with its counterpart. The same model gives a mean of at least 1 - 1e-4, another one about 0.

    Raises EvidenceError when the shapes differ, or a vector is not finite or is zero.
    """
    left, right = _unit(stored), _unit(again)
    if left.shape != right.shape:
        raise EvidenceError(f"vectors of shape {left.shape} and {right.shape} are no pairs.", fix="Embed the same texts with both.")
    cosines = np.einsum("ij,ij->i", left, right)
    return PairedCosine(float(cosines.mean()), float(cosines.min()), float((cosines < SAME_TEXT).mean()), len(cosines))


def cloud_shift(reference: Vectors, window: Vectors, *, draws: int = 500, seed: int = SEED) -> CloudShift:
    """Both unpaired views at once, over the same permutations; `draws` + 1 is the finest resolution of the p-values.

    Raises EvidenceError when the dimensions differ, either side has fewer than 10 vectors, or one is not finite or is zero.
    """
    left, right = _unit(reference), _unit(window)
    if left.shape[1] != right.shape[1]:
        raise EvidenceError(
            f"the reference has {left.shape[1]} dimensions, the window {right.shape[1]}.", fix="Compare vectors of one embedding model."
        )
    if min(len(left), len(right)) < 10:
        raise EvidenceError(f"{len(left)} against {len(right)} vectors say nothing.", fix="Collect at least 10 of each.")
    pooled = np.concatenate([left, right])
    labels = _labels(len(left), len(right), draws=draws, seed=seed)
    gram = pooled @ pooled.T
    mmds = _mmds(_kernel(gram, len(left)), labels)
    aucs = _aucs(gram, labels, _folds(pooled, seed=seed))
    middle_left, middle_right = left.mean(axis=0), right.mean(axis=0)
    lengths = float(np.linalg.norm(middle_left) * np.linalg.norm(middle_right))
    return CloudShift(
        mmd=float(mmds[0]),
        p_mmd=_p_value(mmds),
        auc=float(aucs[0]),
        p_auc=_p_value(aucs),
        centroid_cosine=float(middle_left @ middle_right) / lengths if lengths else 1.0,
        n_reference=len(left),
        n_window=len(right),
    )


def _unit(vectors: Vectors) -> Floats:
    rows = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True) if rows.ndim == 2 and len(rows) else np.zeros(1)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise EvidenceError(f"the vectors, of shape {rows.shape}, are no finite, non-zero rows.", fix="Embed the texts again.")
    return rows / norms


def _labels(n_reference: int, n_window: int, *, draws: int, seed: int) -> Floats:
    """Column 0 marks the window by 1; each further column is a random relabelling with as many of each."""
    labels = np.zeros((n_reference + n_window, draws + 1))
    labels[n_reference:, 0] = 1
    labels[:, 1:] = np.random.default_rng(seed).permuted(np.repeat(labels[:, :1], draws, axis=1), axis=0)
    return labels


def _kernel(gram: Floats, n_reference: int) -> Floats:
    """The Gaussian kernel whose width is the median distance within the reference (Gretton et al. 2012), with a zero diagonal."""
    squared = np.maximum(2 - 2 * gram, 0)
    within = squared[:n_reference, :n_reference][np.triu_indices(n_reference, 1)]
    kernel: Floats = np.exp(-squared / (2 * max(float(np.median(within)), 1e-12)))
    np.fill_diagonal(kernel, 0)
    return kernel


def _mmds(kernel: Floats, labels: Floats) -> Floats:
    """Unbiased MMD^2 (Gretton et al. 2012, eq. 3) of every column of labels, from one product with the kernel."""
    m = labels[:, 0].sum()
    n = len(labels) - m
    within_window = np.einsum("ij,ij->j", labels, kernel @ labels)
    across = kernel.sum(axis=1) @ labels - within_window
    within_reference = kernel.sum() - within_window - 2 * across
    mmds: Floats = within_window / (m * (m - 1)) + within_reference / (n * (n - 1)) - 2 * across / (m * n)
    return mmds


def _folds(pooled: Floats, *, seed: int) -> NDArray[np.int64]:
    """The fold of each row at random, the same for equal rows: a text asked on both sides must not be learnt from its twin."""
    _, group = np.unique(np.round(pooled, 9), axis=0, return_inverse=True)
    folds: NDArray[np.int64] = np.random.default_rng(seed).permutation(group.max() + 1)[group] % _FOLDS
    return folds


def _aucs(gram: Floats, labels: Floats, fold_of: NDArray[np.int64]) -> Floats:
    """Cross-validated AUC of a ridge classifier for every column of labels, the mean over folds.

    Its scores are linear in the labels, so that one solved system a fold serves all relabellings: a logistic regression would be fitted anew
    for each. Ranks are compared within a fold only, where scores share a scale.
    """
    from scipy.linalg import solve
    from scipy.stats import rankdata

    total, counted = np.zeros(labels.shape[1]), np.zeros(labels.shape[1])
    for fold in range(_FOLDS):
        held, kept = fold_of == fold, fold_of != fold
        centred = labels[kept] - labels[kept].mean(axis=0)
        regular = gram[np.ix_(kept, kept)] + _RIDGE * np.eye(int(kept.sum()))
        scores = gram[np.ix_(held, kept)] @ solve(regular, centred, assume_a="pos")
        positive = labels[held].sum(axis=0)
        pairs = positive * (int(held.sum()) - positive)
        wins = np.einsum("ij,ij->j", rankdata(scores, axis=0), labels[held]) - positive * (positive + 1) / 2
        total += np.divide(wins, pairs, out=np.zeros_like(wins), where=pairs > 0)
        counted += pairs > 0
    aucs: Floats = total / np.maximum(counted, 1)
    return aucs


def _p_value(statistics: Floats) -> float:
    """Share of the statistics that reach the first one, which is among them; rounding is allowed for."""
    return float((statistics >= statistics[0] - 1e-12).mean())
