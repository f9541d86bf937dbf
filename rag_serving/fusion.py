"""Fusing retrieval signals into one score per candidate. Pure numbers: rows are candidates, columns are signals."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

DENSE = ("dense_text", "dense_title")
LEXICAL = ("bm25_text", "bm25_title")
SIGNALS = (*DENSE, *LEXICAL)
_RRF_K = 60.0

Scores = Mapping[str, NDArray[np.float64]]


def fuse_scores(signals: Scores, weights: Mapping[str, float]) -> NDArray[np.float64]:
    """Weighted mean of normalised signals, in [0, 1] up to the sign of a cosine.

    A cosine is used as it is; a BM25 score (0 for a candidate the query's words do not reach) is divided by the query's best.
    """
    total = sum(weights[name] for name in signals)
    fused: NDArray[np.float64] = np.zeros(len(next(iter(signals.values()))))
    for name, values in signals.items():
        best = float(values.max(initial=0.0))
        normalised = values if name in DENSE else values / best if best > 0 else values
        fused += weights[name] / total * normalised
    return fused


def fuse_ranks(signals: Scores, weights: Mapping[str, float]) -> NDArray[np.float64]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009), k = 60, weighted; a candidate with score 0 in a lexical signal gets none of it."""
    fused: NDArray[np.float64] = np.zeros(len(next(iter(signals.values()))))
    for name, values in signals.items():
        ranks = np.empty(len(values))
        ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
        share = weights[name] / (_RRF_K + ranks)
        fused += np.where(values > 0, share, 0.0) if name in LEXICAL else share
    return fused
