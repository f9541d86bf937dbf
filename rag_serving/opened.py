"""An opened snapshot: verified, warmed, with the encoder of its model and its reranker, kept open while a request uses it."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rag_serving.breaker import Breaker
from rag_serving.embedding.probed_encoder import ProbedEncoder, probed
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.encoding import Encoder
from rag_serving.errors import SnapshotError
from rag_serving.exchange import Exchange
from rag_serving.ranking.rerankers import served_reranker
from rag_serving.releases import Release
from rag_serving.reranking import Reranker, asks_embedder, rerank_within
from rag_serving.retrieval import Hit, Retriever
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest, Stamp, stamp_of
from rag_serving.store import Store
from rag_serving.writing.relevance import Relevance

Arm = Literal["champion", "canary"]
WARM_QUERIES = 30


class OpenSnapshot:
    """A verified, warmed snapshot, the encoder of its embedding model, and its reranker. Once retired, it closes when its last user leaves.

    `stamp` is of its files before they were verified; `recheck` says that they have to be looked at again.
    """

    def __init__(
        self, retriever: Retriever, encoder: Encoder, reranker: Reranker | None, closings: set[asyncio.Task[None]], *, stamp: Stamp
    ) -> None:
        self.retriever = retriever
        self.encoder = encoder
        self.reranker = reranker
        self.relevance = Relevance(retriever.manifest.sha256)
        self.rerank_breaker = Breaker()
        self.stamp = stamp
        self.recheck = False
        self.closed = False
        self._closings = closings
        self._users = 0
        self._retired = False

    async def rerank(
        self, query: str, hits: Sequence[Hit], *, k: int, exchange: Exchange, budget_seconds: float, encoded: bool
    ) -> list[Hit]:
        """The `k` best hits after reranking, as `rerank_within`; in fused order without one.

        They are left in fused order at once when reranking would ask an embedding service that has just failed this request (not `encoded`) or
        that is left alone for a while.
        """
        if self.reranker is None:
            return list(hits[:k])
        resting = not encoded or (isinstance(self.encoder, RemoteEncoder) and self.encoder.state == "open")
        if resting and asks_embedder(self.reranker):
            exchange.degrade("rerank")
            return list(hits[:k])
        return await rerank_within(
            self.reranker, query, hits, k=k, exchange=exchange, budget_seconds=budget_seconds, breaker=self.rerank_breaker
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_done()

    def retire(self) -> None:
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._users and not self.closed:
            self.closed = True
            self.retriever.close()
            for used in (self.encoder, self.reranker):
                if used is not None:
                    task = asyncio.get_running_loop().create_task(used.aclose())
                    self._closings.add(task)
                    task.add_done_callback(self._closings.discard)


@dataclass(frozen=True, slots=True)
class Serving:
    """A reference that a swap replaces: an opened snapshot, the number of the release in force, and since when it answers (UTC).

    The canary's has the number of the champion's release, since that is what is released, and its own ledger entry as `canary`.
    """

    number: int
    snapshot: OpenSnapshot
    since: str
    canary: int | None = None

    @property
    def snapshot_id(self) -> str:
        return self.snapshot.retriever.snapshot_id

    @property
    def fingerprint(self) -> Literal["named", "probed"]:
        """How the embedding service shows that it runs the snapshot's model."""
        return "probed" if isinstance(self.snapshot.encoder, ProbedEncoder) else "named"

    @property
    def arm(self) -> Arm:
        return "champion" if self.canary is None else "canary"


class Encoders:
    """The encoders of opened snapshots: those of one model and fingerprint share one, so that a new snapshot begins with what it knows."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[tuple[str, str], RemoteEncoder] = {}

    def of(self, manifest: Manifest) -> RemoteEncoder:
        """The encoder of a snapshot, to be closed by it."""
        key = (manifest.embedding_model, manifest.fingerprint)
        known = self._known.get(key)
        if known is not None and known.in_use:
            return known.shared()
        self._known[key] = RemoteEncoder(
            self._settings.embedder_url,
            manifest.embedding_model,
            manifest.fingerprint,
            dims=manifest.dims,
            timeout_seconds=self._settings.serving.encode_timeout_seconds,
            client=self._settings.encoder,
        )
        return self._known[key]


async def open_release(
    store: Store, release: Release, settings: Settings, encoders: Encoders, closings: set[asyncio.Task[None]]
) -> OpenSnapshot:
    """The snapshot of a release; SnapshotError when its bytes are not those that were released. `closings` holds what is being closed.

    It is warmed with the queries that its encoder knows, the ones asked last.
    """
    stamp = await asyncio.to_thread(stamp_of, store, release.snapshot_id)
    retriever = await Retriever.open(store, release.snapshot_id)
    manifest = retriever.manifest
    if manifest.sha256 != release.manifest_sha256:
        retriever.close()
        raise SnapshotError(f"{release.snapshot_id} is not the snapshot that was released.", fix="Restore it from a backup.")
    try:
        encoder = await probed(retriever, settings) if settings.encoder.unnamed == "probe" else encoders.of(manifest)
    except BaseException:
        retriever.close()
        raise
    try:
        await retriever.warm_up(encoder.recent(WARM_QUERIES))
        reranker = await asyncio.to_thread(served_reranker, store, retriever, settings)
    except BaseException:
        retriever.close()
        await encoder.aclose()
        raise
    opened = OpenSnapshot(retriever, encoder, reranker, closings, stamp=stamp)
    try:
        await asyncio.to_thread(opened.relevance.refresh, store)
    except BaseException:
        opened.retire()
        raise
    return opened
