"""Fewer passages that say the same: maximal marginal relevance over the stored text vectors (Carbonell and Goldstein 1998), by pyversity."""

from collections.abc import Sequence

import numpy as np
from pyversity import Strategy, diversify

from rag_serving.deadline import Deadline
from rag_serving.reranking import Reranker
from rag_serving.retrieval import Hit, Retriever


class Diverse:
    """A reranker that chooses one passage after the other: the best by (1 - diversity) * score - diversity * closest cosine to those chosen.

    `score` is what `inner` gave, or the fused score without one, brought to 0..1 within the pool. Hits keep their scores: only order changes,
    so scores need not fall from one to the next.
    """

    def __init__(self, inner: Reranker | None, retriever: Retriever, *, pool: int, diversity: float) -> None:
        self.pool = pool
        self._inner = inner
        self._retriever = retriever
        self._diversity = diversity

    @property
    def kind(self) -> str:
        return f"{self._inner.kind}+mmr" if self._inner else "mmr"

    async def rerank(self, query: str, hits: Sequence[Hit], *, k: int, deadline: Deadline) -> list[Hit]:
        ranked = await self._inner.rerank(query, hits, k=len(hits), deadline=deadline) if self._inner else list(hits)
        pool, rest = ranked[: self.pool], ranked[self.pool :]
        if len(pool) < 2:
            return ranked[:k]
        order = diverse_order(await self._retriever.vectors(pool), [hit.score for hit in pool], diversity=self._diversity)
        return [*(pool[at] for at in order), *rest][:k]

    async def aclose(self) -> None:
        if self._inner:
            await self._inner.aclose()


def diverse_order(vectors: np.ndarray, scores: Sequence[float], *, diversity: float) -> list[int]:
    """All places, in the order in which MMR chooses them; scores of any range."""
    values = np.asarray(scores, dtype=np.float64)
    spread = float(np.ptp(values))
    scaled = (values - values.min()) / spread if spread else np.ones(len(values))
    chosen = diversify(vectors, scaled, k=len(values), strategy=Strategy.MMR, diversity=diversity)
    return [int(at) for at in chosen.indices]
