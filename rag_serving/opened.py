"""An opened snapshot: verified, warmed, with the encoder of its model and its reranker, kept open while a request uses it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.encoding import Encoder
from rag_serving.errors import SnapshotError
from rag_serving.ranking.rerankers import served_reranker
from rag_serving.releases import Release
from rag_serving.reranking import Reranker
from rag_serving.retrieval import Retriever
from rag_serving.settings import Settings
from rag_serving.store import Store
from rag_serving.writing.relevance import Relevance

Arm = Literal["champion", "canary"]


class OpenSnapshot:
    """A verified, warmed snapshot, the encoder of its embedding model, and its reranker. Once retired, it closes when its last user leaves."""

    def __init__(self, retriever: Retriever, encoder: Encoder, reranker: Reranker | None, closings: set[asyncio.Task[None]]) -> None:
        self.retriever = retriever
        self.encoder = encoder
        self.reranker = reranker
        self.relevance = Relevance(retriever.manifest.sha256)
        self.recheck = False
        self.closed = False
        self._closings = closings
        self._users = 0
        self._retired = False

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
    def arm(self) -> Arm:
        return "champion" if self.canary is None else "canary"


async def open_release(store: Store, release: Release, settings: Settings, closings: set[asyncio.Task[None]]) -> OpenSnapshot:
    """The snapshot of a release; SnapshotError when its bytes are not those that were released. `closings` holds what is being closed."""
    retriever = await Retriever.open(store, release.snapshot_id)
    manifest = retriever.manifest
    if manifest.sha256 != release.manifest_sha256:
        retriever.close()
        raise SnapshotError(f"{release.snapshot_id} is not the snapshot that was released.", fix="Restore it from a backup.")
    try:
        await retriever.warm_up()
        reranker = await asyncio.to_thread(served_reranker, store, retriever, settings)
    except BaseException:
        retriever.close()
        raise
    encoder = RemoteEncoder(
        settings.embedder_url,
        manifest.embedding_model,
        manifest.fingerprint,
        dims=manifest.dims,
        timeout_seconds=settings.serving.encode_timeout_seconds,
        client=settings.encoder,
    )
    opened = OpenSnapshot(retriever, encoder, reranker, closings)
    try:
        await asyncio.to_thread(opened.relevance.refresh, store)
    except BaseException:
        opened.retire()
        raise
    return opened
