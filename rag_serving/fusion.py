"""Fusing retrieval signals into one score per candidate. Pure numbers; nothing here reads a table."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DENSE = ("dense_text", "dense_title")
LEXICAL = ("bm25_text", "bm25_title")
TITLE = ("dense_title", "bm25_title")
BM25_SCALE = 20.0
_RRF_K = 60.0

Rows = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ranked:
    """What one signal found: distinct rows and their scores, in any order."""

    rows: Rows
    scores: Values


def effective_weights(weights: Mapping[str, float], distinctness: float) -> dict[str, float]:
    """`weights` with those of the title signals scaled by the corpus' title distinctness; signals of weight 0 are left out."""
    scaled = {name: weight * (distinctness if name in TITLE else 1.0) for name, weight in weights.items()}
    return {name: weight for name, weight in scaled.items() if weight > 0}


def align(found: Mapping[str, Ranked], *, depth: int) -> tuple[Rows, dict[str, Values]]:
    """Candidates of all signals as sorted rows, and each signal's score of every candidate.

    A candidate that is missing from a signal's hits scored no more than its last hit, so it gets that score; a BM25 signal that found fewer
    than `depth` has seen every match, so the missing get 0.
    """
    merged = np.sort(np.concatenate([ranked.rows for ranked in found.values()]))
    rows = merged[np.diff(merged, prepend=-1) != 0]
    aligned = {}
    for name, ranked in found.items():
        count = len(ranked.rows)
        exhausted = not count or (name in LEXICAL and count < depth)
        scores = np.full(len(rows), 0.0 if exhausted else ranked.scores.min())
        scores[np.searchsorted(rows, ranked.rows)] = ranked.scores
        aligned[name] = scores
    return rows, aligned


def fuse_scores(signals: Mapping[str, Values], weights: Mapping[str, float]) -> Values:
    """Weighted sum of cosines and of BM25 scores divided by 20, which brings a strong match to about 1. No per-query normalisation."""
    fused: Values = np.zeros(len(next(iter(signals.values()))))
    for name, values in signals.items():
        fused += weights[name] * (values if name in DENSE else values / BM25_SCALE)
    return fused


def fuse_ranks(rows: Rows, found: Mapping[str, Ranked], weights: Mapping[str, float]) -> Values:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009), k = 60, weighted: a signal adds nothing for a row it did not find.

    `rows` are sorted; equal scores rank by row.
    """
    fused: Values = np.zeros(len(rows))
    for name, ranked in found.items():
        order = np.lexsort((ranked.rows, -ranked.scores))
        fused[np.searchsorted(rows, ranked.rows[order])] += weights[name] / (_RRF_K + np.arange(1, len(order) + 1))
    return fused
