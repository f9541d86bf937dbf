"""Reciprocal ranks drawn from a simple rank model, for calibration: rank 1, a geometric tail over ranks 2 to 10, misses."""

import numpy as np

_TAIL = 0.55 ** np.arange(9)
_TAIL = _TAIL / _TAIL.sum()
_TAIL_MRR = float(0.7 * (_TAIL / np.arange(2, 11)).sum())


def reciprocal_ranks(rng, n, mrr):
    """`n` reciprocal ranks whose expectation is `mrr`; 30 % of what is not at rank 1 is missed."""
    first = (mrr - _TAIL_MRR) / (1 - _TAIL_MRR)
    shares = np.concatenate([[first], (1 - first) * 0.7 * _TAIL, [(1 - first) * 0.3]])
    return rng.choice(np.append(1 / np.arange(1, 11), 0.0), size=n, p=shares)


def pair(seed, n, *, mrr=0.8, changed=0.07, drop=0.0):
    """Champion and candidate by query id; a share of `changed` queries is drawn anew, so that the expected loss is `drop`.

    At MRR 0.8 without a loss the per-query differences have a standard deviation of about 0.49 * sqrt(changed): 0.13 as given.
    """
    rng = np.random.default_rng(seed)
    champion = reciprocal_ranks(rng, n, mrr)
    redrawn = reciprocal_ranks(rng, n, mrr - drop / changed)
    candidate = np.where(rng.random(n) < changed, redrawn, champion)
    names = [f"q{number}" for number in range(n)]
    return dict(zip(names, candidate.tolist(), strict=True)), dict(zip(names, champion.tolist(), strict=True))
