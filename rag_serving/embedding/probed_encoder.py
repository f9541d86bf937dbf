"""An embedding service that names no fingerprint (TEI, Infinity, vLLM, a hosted API), believed by what it does.

It must give stored passages of the snapshot the vectors that the snapshot holds of them: each pair of vectors with a cosine of at least the
floor. That is looked at when the snapshot is opened, whenever the service has just failed or been silent, and every so often in between. No
vector of it is used before it agreed. It cannot tell a model that embeds passages alike and queries otherwise; a fingerprint can.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag_serving.deadline import Deadline
from rag_serving.embedding.remote_encoder import RemoteEncoder
from rag_serving.encoding import Vectors
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelMismatch
from rag_serving.retrieval import Retriever
from rag_serving.settings import EncoderClient, ModelSpec, Settings

PASSAGES = 8  # embedded again each time
PATIENCE_SECONDS = 10.0
PAUSE_SECONDS = 2.0  # how long a service that disagreed is not asked again
QUIET_SECONDS = 25.0  # connections end after 30 s without use, and a new one may lead elsewhere

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """Passages of a snapshot as they were embedded, without the model's prompt, and their vectors, float32 (n, dims)."""

    texts: Sequence[str]
    vectors: Vectors


class ProbedEncoder(RemoteEncoder):
    """A `RemoteEncoder` whose service may send no fingerprint, but never another one. It puts the prompts of `spec` before the texts itself.

    The answer to whether the service agrees with `held` counts for `seconds`; then it is looked at again beside the queries, and after
    twice that long before the next one. `ModelMismatch` while it disagrees; what it gave before is forgotten then.
    """

    def __init__(
        self,
        base_url: str,
        spec: ModelSpec,
        fingerprint: str,
        held: Held,
        *,
        timeout_seconds: float,
        client: EncoderClient,
        floor: float,
    ) -> None:
        super().__init__(base_url, spec.name, fingerprint, dims=spec.dims, timeout_seconds=timeout_seconds, client=client, unnamed=True)
        plain = client.model_copy(update={"cache_entries": 0, "hedge_share": 0.0})
        self._again = RemoteEncoder(
            base_url, spec.name, fingerprint, dims=spec.dims, timeout_seconds=PATIENCE_SECONDS, client=plain, unnamed=True
        )
        self._spec = spec
        self._held = held
        self._floor = floor
        self._seconds = client.probe_seconds
        self._agreed_at = self._used_at = self._refused_at = -math.inf
        self._refusal = ""
        self._beside: asyncio.Task[None] | None = None

    async def encode(self, queries: Sequence[str], *, deadline: Deadline | None = None) -> Vectors:
        """As `RemoteEncoder.encode`; ModelMismatch too while the service does not give the vectors that the snapshot holds."""
        await self._believe(deadline)
        before = self._second_tries()
        try:
            rows = await super().encode([self._spec.query_prompt + query for query in queries], deadline=deadline)
        except EncoderError:
            self._agreed_at = -math.inf
            raise
        if self._second_tries() != before:  # the second may have gone elsewhere
            self._agreed_at = -math.inf
            if self._beside is not None:
                self._beside.cancel()  # it may have asked the one before
                self._beside = None
            try:
                await self._believe(deadline)
            except BaseException:
                self.forget()
                raise
        self._used_at = time.monotonic()
        return rows

    async def agree(self, deadline: Deadline | None = None) -> None:
        """Look whether it agrees. ModelMismatch when its vectors are others than the snapshot holds, EncoderUnavailable when it gives none."""
        passages = [self._spec.document_prompt + text for text in self._held.texts]
        try:
            vectors = await self._again.encode(passages, deadline=deadline)
        except ModelMismatch as error:
            raise self._refused(error.what) from None
        except EncoderError:
            self._agreed_at = -math.inf
            raise
        lowest = float(np.sum(vectors * self._held.vectors, axis=1).min())
        if not lowest >= self._floor:
            raise self._refused(
                f"the embedding service at {self.base_url} gives {self.model!r} other vectors than the snapshot holds: of {len(passages)} "
                f"passages one has cosine {lowest:.5f} with the vector it has there, {self._floor} is asked for."
            )
        self._agreed_at = self._used_at = time.monotonic()

    async def aclose(self) -> None:
        if self._beside is not None:
            self._beside.cancel()
        await self._again.aclose()
        await super().aclose()

    async def _believe(self, deadline: Deadline | None) -> None:
        """Return once the service agrees. All callers wait for one look, each as long as it can; the look has `PATIENCE_SECONDS`."""
        due = self._due()
        if due and self._refused_lately():
            raise self._mismatch()
        if not due and time.monotonic() - self._agreed_at <= self._seconds:
            return
        if self._beside is None or self._beside.done():
            self._beside = asyncio.create_task(self._agree_beside())
        if due:
            await asyncio.wait({self._beside}, timeout=deadline.within(self._timeout_seconds) if deadline else self._timeout_seconds)
            if self._refused_lately():
                raise self._mismatch()
            if self._due():
                what = f"the embedding service at {self.base_url} has not shown yet that it gives the vectors of the snapshot."
                raise EncoderUnavailable(what, fix="Look at its log.")

    def _refused(self, what: str) -> ModelMismatch:
        """The service disagrees: what it gave before is forgotten, and it is not asked again for a while."""
        self._agreed_at, self._refused_at, self._refusal = -math.inf, time.monotonic(), what
        self.forget()
        return self._mismatch()

    def _refused_lately(self) -> bool:
        return time.monotonic() - self._refused_at < PAUSE_SECONDS

    def _due(self) -> bool:
        now = time.monotonic()
        return now - self._agreed_at > 2 * self._seconds or now - self._used_at > QUIET_SECONDS

    async def _agree_beside(self) -> None:
        try:
            await self.agree()
        except EncoderError as error:
            log.warning("stored passages, embedded again: %s", error)

    def _mismatch(self) -> ModelMismatch:
        return ModelMismatch(
            self._refusal,
            fix="Run it with the weights, pooling and normalisation that the snapshot was built with, or run `ragline embedder`.",
        )

    def _second_tries(self) -> int:
        return self.traffic.retries + self.traffic.hedges


async def probed(retriever: Retriever, settings: Settings) -> ProbedEncoder:
    """The encoder of an opened snapshot for a service that need not name a fingerprint.

    ModelMismatch when the service is there and gives other vectors; while it is not there, nothing of it is believed. ConfigError when
    ragline.toml does not name the snapshot's model, since its prompts must be known.
    """
    manifest = retriever.manifest
    texts, vectors = await retriever.samples(PASSAGES)
    encoder = ProbedEncoder(
        settings.embedder_url,
        settings.model(manifest.embedding_model),
        manifest.fingerprint,
        Held(texts, vectors),
        timeout_seconds=settings.serving.encode_timeout_seconds,
        client=settings.encoder,
        floor=settings.drift.cosine_floor,
    )
    try:
        await encoder.agree()
    except ModelMismatch:
        await encoder.aclose()
        raise
    except EncoderError as error:
        log.warning("the embedding service could not be compared with %s yet: %s", manifest.snapshot_id, error)
    return encoder
