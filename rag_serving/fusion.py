"""Fusing retrieval signals into one score per candidate. Pure numbers; nothing here reads a table."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

DENSE = ("dense_text", "dense_title")
LEXICAL = ("bm25_text", "bm25_title")
TITLE = ("dense_title", "bm25_title")
_BM25_SCALE = 20.0
_RRF_K = 60.0

Scores = Mapping[str, NDArray[np.float64]]


def effective_weights(weights: Mapping[str, float], distinctness: float) -> dict[str, float]:
    """`weights` with those of the title signals scaled by the corpus' title distinctness; signals of weight 0 are left out."""
    scaled = {name: weight * (distinctness if name in TITLE else 1.0) for name, weight in weights.items()}
    return {name: weight for name, weight in scaled.items() if weight > 0}


def align(found: Mapping[str, Mapping[int, float]], *, depth: int) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Candidates of all signals as sorted rows, and each signal's score of every candidate.

    A candidate that is missing from a signal's hits scored no more than its last hit, so it gets that score; a BM25 signal that found fewer
    than `depth` has seen every match, so the missing get 0.
    """
    rows = np.array(sorted(set().union(*found.values())), dtype=np.int64)
    aligned = {}
    for name, scores in found.items():
        exhausted = not scores or (name in LEXICAL and len(scores) < depth)
        floor = 0.0 if exhausted else min(scores.values())
        aligned[name] = np.array([scores.get(row, floor) for row in rows.tolist()])
    return rows, aligned


def fuse_scores(signals: Scores, weights: Mapping[str, float]) -> NDArray[np.float64]:
    """Weighted sum of cosines and of BM25 scores divided by 20, which brings a strong match to about 1. No per-query normalisation."""
    fused: NDArray[np.float64] = np.zeros(len(next(iter(signals.values()))))
    for name, values in signals.items():
        fused += weights[name] * (values if name in DENSE else values / _BM25_SCALE)
    return fused


def fuse_ranks(rows: NDArray[np.int64], found: Mapping[str, Mapping[int, float]], weights: Mapping[str, float]) -> NDArray[np.float64]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009), k = 60, weighted: a signal adds nothing for a row it did not find."""
    place = {row: at for at, row in enumerate(rows.tolist())}
    fused: NDArray[np.float64] = np.zeros(len(rows))
    for name, scores in found.items():
        for rank, row in enumerate(sorted(scores, key=lambda row: (-scores[row], row)), start=1):
            fused[place[row]] += weights[name] / (_RRF_K + rank)
    return fused
