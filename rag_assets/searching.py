"""Searching a snapshot from the pipeline: opened and verified as serving opens it, with its own embedding model in this process."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rag_assets.local_reranking import local_reranker
from rag_assets.workbench import Workbench
from rag_serving.deadline import Deadline
from rag_serving.encoding import Encoder, LocalEncoder, require_fingerprint
from rag_serving.errors import NotReady
from rag_serving.releases import Ledger, Release
from rag_serving.reranking import Reranker
from rag_serving.retrieval import Hit, Retriever, Vector

_AT_ONCE = 8
_RERANK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Search:
    """An open snapshot and the encoder of its queries."""

    retriever: Retriever
    encoder: Encoder
    reranker: Reranker | None = None

    async def find(self, queries: Sequence[str], *, k: int) -> list[list[Hit]]:
        """The `k` best chunks of each query, best first, in the order of the queries."""
        found: list[list[Hit]] = []
        for start in range(0, len(queries), _AT_ONCE):
            batch = queries[start : start + _AT_ONCE]
            vectors = await self.encoder.encode(batch)
            found += await asyncio.gather(*(self._one(text, row, k=k) for text, row in zip(batch, vectors, strict=True)))
        return found

    async def _one(self, query: str, vector: Vector, *, k: int) -> list[Hit]:
        if self.reranker is None:
            return await self.retriever.retrieve(query, vector, k=k, groups=None)
        hits = await self.retriever.retrieve(query, vector, k=max(k, self.reranker.pool), groups=None)
        return await self.reranker.rerank(query, hits, k=k, deadline=Deadline.after(_RERANK_SECONDS))


def live_release(bench: Workbench) -> Release:
    """The champion; NotReady when nothing is released."""
    live = Ledger(bench.store).state().champion
    if live is None:
        raise NotReady("nothing is released yet.", fix="Make the first release with `ragline run`.")
    return live


@asynccontextmanager
async def open_search(bench: Workbench, snapshot_id: str) -> AsyncIterator[Search]:
    """A search over a snapshot, open within the context; ModelMismatch unless its model is configured as it was when it was built."""
    retriever = await Retriever.open(bench.store, snapshot_id)
    encoder = LocalEncoder(bench.model(retriever.manifest.embedding_model))
    reranker: Reranker | None = None
    try:
        require_fingerprint(encoder, retriever.manifest.fingerprint)
        reranker = await asyncio.to_thread(local_reranker, bench.store, bench.settings, retriever, encoder)
        yield Search(retriever, encoder, reranker)
    finally:
        retriever.close()
        if reranker:
            await reranker.aclose()
        await encoder.aclose()
