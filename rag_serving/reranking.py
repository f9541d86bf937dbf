"""Phase four of a request: the best passages are ordered anew by something that looks at query and passage together.

Whatever gives the scores, they are weighed with the fused score by one rule, kept in the snapshot's manifest, and stand under one budget: over
it, or on any error, the fused order stands and the reply says so. One that keeps failing is left alone for a while, so that not every
request waits for it. Nothing here imports torch.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rag_serving import telemetry
from rag_serving.breaker import Breaker
from rag_serving.deadline import Deadline
from rag_serving.errors import RerankError, in_log
from rag_serving.exchange import Exchange
from rag_serving.fusion import BM25_SCALE, TITLE
from rag_serving.passages import embedded_text
from rag_serving.ranking.maxsim import TokenVectors
from rag_serving.retrieval import Hit
from rag_serving.settings import RerankWeights

Vectors = npt.NDArray[np.float32]
SIGNALS = ("dense_text", "dense_title", "bm25_text", "bm25_title", "wording")

log = logging.getLogger(__name__)


class Reranker(Protocol):
    """Orders hits anew. Only the first `pool` hits are looked at; the others stay below them."""

    @property
    def kind(self) -> str: ...
    @property
    def pool(self) -> int: ...
    async def rerank(self, query: str, hits: Sequence[Hit], *, k: int, deadline: Deadline) -> list[Hit]:
        """The `k` best, best first, with their new scores; the signals of those looked at gain `relevance` and `rank_before`."""

    async def aclose(self) -> None: ...


class Judge(Protocol):
    """Scores passages for a query: higher is better, about 0 to 1. Raises RaglineError."""

    @property
    def kind(self) -> str: ...
    async def relevance(self, query: str, texts: Sequence[str], *, deadline: Deadline) -> npt.NDArray[np.float64]: ...
    async def aclose(self) -> None: ...


class TokenEncoder(Protocol):
    """Token vectors of queries, float32 (tokens, dims) of unit norm each. Raises EncoderError."""

    async def encode_tokens(self, queries: Sequence[str], *, deadline: Deadline) -> list[Vectors]: ...
    async def aclose(self) -> None: ...


class Judged:
    """A reranker: a judge's scores, weighed with what retrieval found."""

    def __init__(self, judge: Judge, *, pool: int, weights: RerankWeights, distinctness: float) -> None:
        self.pool = pool
        self._judge = judge
        self._weights = weights
        self._distinctness = distinctness

    @property
    def kind(self) -> str:
        return self._judge.kind

    async def rerank(self, query: str, hits: Sequence[Hit], *, k: int, deadline: Deadline) -> list[Hit]:
        pool = hits[: self.pool]
        if not pool:
            return []
        texts = [embedded_text(hit.title, hit.text) for hit in pool]
        relevance = await self._judge.relevance(query, texts, deadline=deadline)
        if relevance.shape != (len(pool),) or not np.isfinite(relevance).all():
            raise RerankError(f"{self.kind} gave no finite score for each of {len(pool)} passages.", fix="Check the reranker.")
        scored = reordered(pool, relevance.tolist(), weights=self._weights, distinctness=self._distinctness)
        return [*scored, *hits[self.pool :]][:k]

    async def aclose(self) -> None:
        await self._judge.aclose()


class LateInteraction:
    """MaxSim of the query's token vectors with those stored in the snapshot."""

    kind = "maxsim"

    def __init__(self, tokens: TokenVectors, encoder: TokenEncoder) -> None:
        self._tokens = tokens
        self._encoder = encoder

    async def relevance(self, query: str, texts: Sequence[str], *, deadline: Deadline) -> npt.NDArray[np.float64]:
        vectors = await self._encoder.encode_tokens([query], deadline=deadline)
        return await asyncio.to_thread(self._tokens.scores, vectors[0], texts)

    async def aclose(self) -> None:
        await self._encoder.aclose()


def evidence(hit: Hit, *, distinctness: float) -> dict[str, float]:
    """The single signals of a hit as fusion counts them, without their weights; 0 for one that it does not have."""
    return {
        name: hit.signals.get(name, 0.0) / (BM25_SCALE if name.startswith("bm25") else 1.0) * (distinctness if name in TITLE else 1.0)
        for name in SIGNALS
    }


def reordered(hits: Sequence[Hit], relevance: Sequence[float], *, weights: RerankWeights, distinctness: float) -> list[Hit]:
    """All hits by the weighted sum of fused score, relevance and signals; equal ones stay in the order they had."""
    extra: Mapping[str, float] = {name: weight for name, weight in weights.model_dump().items() if name in SIGNALS and weight}
    scored = []
    for rank, (hit, judged) in enumerate(zip(hits, relevance, strict=True), start=1):
        single = evidence(hit, distinctness=distinctness) if extra else {}
        score = weights.fused * hit.score + weights.relevance * judged + sum(weight * single[name] for name, weight in extra.items())
        scored.append(replace(hit, score=score, signals={**hit.signals, "relevance": round(judged, 6), "rank_before": float(rank)}))
    return sorted(scored, key=lambda hit: -hit.score)


def asks_embedder(reranker: Reranker) -> bool:
    """Whether it takes what only the embedding service gives."""
    return reranker.kind.partition("+")[0] in {"maxsim", "cross_encoder"}


async def rerank_within(
    reranker: Reranker, query: str, hits: Sequence[Hit], *, k: int, exchange: Exchange, budget_seconds: float, breaker: Breaker
) -> list[Hit]:
    """The `k` best hits after reranking; in fused order, and the exchange degraded by `rerank`, when that fails or takes too long.

    So they are at once while `breaker` is open; it hears how it went, unless the request left less than the budget.
    """
    given = breaker.enter()
    if given is None:
        exchange.degrade("rerank")
        return list(hits[:k])
    seconds = exchange.deadline.within(budget_seconds)
    deadline = Deadline.after(seconds)
    try:
        async with asyncio.timeout(deadline.remaining):
            found = await reranker.rerank(query, hits, k=k, deadline=deadline)
    except Exception as error:  # noqa: BLE001 - an answer in fused order is better than none
        log.warning("answering in fused order: %s failed: %s", reranker.kind, in_log(error))
        breaker.abandoned(given) if seconds < budget_seconds else breaker.failed(given)
        exchange.degrade("rerank")
        return list(hits[:k])
    except BaseException:
        breaker.abandoned(given)
        raise
    breaker.succeeded(given)
    if found:
        first = found[0]
        before = next(rank for rank, hit in enumerate(hits, start=1) if hit.chunk_id == first.chunk_id)
        telemetry.reranked(kind=reranker.kind, pool=min(reranker.pool, len(hits)), score=first.score, rank_before=before)
    return found
