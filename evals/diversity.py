"""Is a result list one thing said many times, and does the index send everybody to the same few passages?"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def distinct_documents(lists: Iterable[Sequence[str]]) -> float:
    """Mean number of distinct documents in result lists, each given as the document ids of its passages; 0 without lists."""
    counts = [len(set(documents)) for documents in lists]
    return float(np.mean(counts)) if counts else 0.0


def intra_list_similarity(lists: Iterable[Sequence[str]], vectors: Mapping[str, NDArray[np.float32]]) -> float | None:
    """Mean cosine of the pairs within each list of passage ids, averaged over the lists (Ziegler et al. 2005); None if no list has a pair.

    `vectors` holds passages of unit norm by id; 1.0 means that every passage of a list says the same.
    """
    means = []
    for ids in lists:
        rows = np.stack([vectors[each] for each in ids]) if len(ids) > 1 else None
        if rows is not None:
            cosines = rows @ rows.T
            means.append(float(cosines[np.triu_indices(len(ids), 1)].mean()))
    return float(np.mean(means)) if means else None


def hubness(lists: Iterable[Sequence[str]], *, passages: int) -> float:
    """Skewness of the k-occurrence: how often each of `passages` passages stands in a result list (Radovanovic et al. 2010, S_Nk).

    About 0 where every passage is found equally often; large where hubs crowd out the rest. 0 if all are found equally often.
    """
    found = Counter(each for ids in lists for each in set(ids))
    values, repeats = np.unique(np.fromiter(found.values(), dtype=np.float64), return_counts=True)
    values, repeats = np.append(values, 0.0), np.append(repeats, max(0, passages - len(found)))
    mean = np.average(values, weights=repeats) if repeats.sum() else 0.0
    deviations = values - mean
    variance = np.average(deviations**2, weights=repeats) if repeats.sum() else 0.0
    return float(np.average(deviations**3, weights=repeats) / variance**1.5) if variance > 1e-18 else 0.0
