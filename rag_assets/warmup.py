"""The warm-up gate: a snapshot, opened as serving opens it, answers vector searches fast enough before anyone depends on it.

A busy machine slows searches and never speeds them up. So windows of searches are timed, and the fastest two that agree on their p95 within a
fifth count; a single lucky window does not. While no two agree, nothing is shown, and the outcome is INCONCLUSIVE.
"""

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from evals.gates import GateResult, Rule, decide
from rag_serving.encoding import Vectors
from rag_serving.retrieval import Retriever
from rag_serving.store import Store
from rag_serving.verdicts import WARM_UP

P95 = "vector_search_p95"
WINDOW = 40  # searches
_FEWEST, _MOST = 3, 40  # windows
_AGREEMENT = 1.2


@dataclass(frozen=True, slots=True)
class WarmUp:
    """`opened_seconds`: verifying, opening and prewarming. `windows`: the p95 of each window of searches in milliseconds, in order."""

    opened_seconds: float
    windows: tuple[float, ...]

    @property
    def pair(self) -> tuple[float, float]:
        """The fastest two windows that agree, else the two that differ least in proportion."""
        pairs = list(pairwise(sorted(self.windows)))
        return next((pair for pair in pairs if pair[1] <= pair[0] * _AGREEMENT), min(pairs, key=lambda pair: pair[1] / pair[0]))

    @property
    def spread(self) -> float:
        fast, slow = self.pair
        return slow / fast

    @property
    def steady(self) -> bool:
        return self.spread <= _AGREEMENT

    @property
    def p95_ms(self) -> float:
        """The slower of the pair."""
        return self.pair[1]


async def warm_up(store: Store, snapshot_id: str, vectors: Vectors, *, limit_ms: float) -> WarmUp:
    """Open a snapshot and search for the nearest chunks of `vectors` (queries, dims) in turn, in windows of 40.

    Ends when two windows agree on a p95 below `limit_ms`, after 3 windows at least and 40 at most. Searches have the depth that serving asks
    of a signal. Raises SnapshotError for a damaged snapshot.
    """
    started = time.perf_counter()
    retriever = await Retriever.open(store, snapshot_id)
    try:
        await retriever.warm_up()
        opened = time.perf_counter() - started
        depth = retriever.manifest.fusion().candidates
        windows: list[float] = []
        while len(windows) < _MOST:
            windows.append(await _window(retriever, vectors, first=len(windows) * WINDOW, depth=depth))
            measured = WarmUp(opened, tuple(windows))
            if len(windows) >= _FEWEST and measured.steady and measured.p95_ms < limit_ms:
                break
        return measured
    finally:
        retriever.close()


async def _window(retriever: Retriever, vectors: Vectors, *, first: int, depth: int) -> float:
    times = []
    for number in range(first, first + WINDOW):
        started = time.perf_counter()
        await retriever.neighbours(vectors[number % len(vectors)], k=depth, exact=False)
        times.append((time.perf_counter() - started) * 1000)
    return float(np.percentile(times, 95))


def warm_up_gate(measured: WarmUp, *, limit_ms: float) -> GateResult:
    """PASS when the steady p95 is below `limit_ms`, FAIL when it is not, INCONCLUSIVE while no two windows agree."""
    shown = f"p95 of vector search {measured.p95_ms:.2f} ms in the fastest two that agree of {len(measured.windows)} windows"
    rules = (
        Rule(
            "steady",
            measured.steady,
            measured.spread,
            _AGREEMENT,
            f"the two windows nearest to each other differ by {measured.spread - 1:.0%}; at most {_AGREEMENT - 1:.0%} is steady",
            conclusive=False,
        ),
        Rule(
            P95,
            measured.p95_ms < limit_ms,
            measured.p95_ms,
            limit_ms,
            f"{shown}, not below {limit_ms:g} ms" if measured.p95_ms >= limit_ms else f"{shown}; below {limit_ms:g} ms is required",
            conclusive=measured.steady,
        ),
    )
    return decide(WARM_UP, rules, praise=f"{shown}, below {limit_ms:g} ms; opened and prewarmed in {measured.opened_seconds:.2f} s")
