"""How varied the results of late are: whether the passages of an answer say different things, or one thing many times.

Results are kept when they are given and judged when somebody collects, so that no request waits for it.
"""

from collections import deque
from collections.abc import Sequence

from rag_serving.wording import terms

MOST = 100  # results that count, the newest
FEWEST = 20  # of them, before which nothing is said
_PASSAGES = 10  # of a result, its first


def variety(texts: Sequence[str]) -> float:
    """How little the passages repeat each other's words: 1 when none has a word of another, 0 when all have the same ones.

    With k passages of n_i different words, n together: (n / sum(n_i) - 1/k) / (1 - 1/k). 1 for fewer than two passages with words.
    """
    words = [found for found in (frozenset(terms(text)) for text in texts) if found]
    if len(words) < 2:
        return 1.0
    least = 1 / len(words)
    return (len(frozenset().union(*words)) / sum(map(len, words)) - least) / (1 - least)


class Results:
    """The results of the last requests. One event loop keeps them; any thread may ask for their mean variety."""

    def __init__(self) -> None:
        self._kept: deque[tuple[str, ...]] = deque(maxlen=MOST)
        self._judged: dict[tuple[str, ...], float] = {}

    def keep(self, texts: Sequence[str]) -> None:
        """Take the passages of a result, best first; one of fewer than two has nothing to compare."""
        if len(texts) > 1:
            self._kept.append(tuple(texts[:_PASSAGES]))

    def mean_variety(self) -> float | None:
        """Of the results kept; None while they are fewer than 20."""
        kept = tuple(self._kept)
        if len(kept) < FEWEST:
            return None
        judged = {texts: known if (known := self._judged.get(texts)) is not None else variety(texts) for texts in set(kept)}
        self._judged = judged
        return sum(judged[texts] for texts in kept) / len(kept)
