"""Whether the embedding service still gives the vectors that a snapshot holds: stored passages, embedded there again and compared.

A service that was restarted with other weights says so by its fingerprint, and no query of it is searched. One whose vectors moved under an
unchanged fingerprint (another runtime, a prompt that is no longer applied, a stand-in that claims to be the same) fails no request: only
the cosine of each passage's stored vector with its new one shows it. The probe neither waits for the breaker nor fills the cache.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from rag_serving.connections import Pool, TooLong, Unreachable
from rag_serving.embedding.embeddings_wire import DEADLINE_HEADER, ReceivedReply
from rag_serving.encoding import checked_vectors
from rag_serving.errors import EncoderError, EncoderUnavailable, in_log
from rag_serving.live import Live
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest

Vectors = npt.NDArray[np.float32]

PROBES = 8  # passages embedded again each time
PATIENCE_SECONDS = 10.0
_MOST_BYTES_A_VECTOR = 256 << 10  # of a reply

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pairing:
    """What the service gave for passages of a snapshot: the fingerprint it names, None for none, and their mean cosine with the stored vectors."""

    snapshot_id: str
    expected: str
    fingerprint: str | None
    cosine: float

    @property
    def same_model(self) -> bool | None:
        """Whether the fingerprint is the snapshot's; None where the service names none."""
        return None if self.fingerprint is None else self.fingerprint == self.expected


async def embedded_again(base_url: str, model: str, texts: Sequence[str], *, prompted: bool = False) -> tuple[Vectors, str | None]:
    """Vectors of passages by the embedding service at `base_url`, float32 (n, its dims) of unit norm, and the fingerprint it names.

    The service puts the model's prompt for documents before each text, unless they are `prompted` already. Raises EncoderError: it is down,
    refuses, or gives no usable numbers. What it says then is not quoted, since it may hold a passage.
    """
    origin = f"the embedding service at {base_url}"
    kind = {} if prompted else {"input_type": "document"}
    body = json.dumps({"model": model, "input": list(texts), "encoding_format": "base64", **kind})
    headers, pool = {DEADLINE_HEADER: str(int(PATIENCE_SECONDS * 1000))}, Pool()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            reply = await pool.post(f"{base_url}/v1/embeddings", body.encode(), headers, most=len(texts) * _MOST_BYTES_A_VECTOR)
    except TimeoutError:
        raise EncoderUnavailable(f"{origin} gave no answer within {PATIENCE_SECONDS:g} s.", fix="Look at its log.") from None
    except Unreachable as error:
        raise EncoderUnavailable(f"{origin} cannot be reached: {error}.", fix="Start it with `ragline embedder`.") from None
    except TooLong:
        raise EncoderError(f"{origin} gave more than {len(texts)} vectors.", fix="Check what runs at that address.") from None
    finally:
        await pool.aclose()
    if reply.status != 200:
        raise EncoderError(f"{origin} answered {reply.status}.", fix="Look at its log.")
    try:
        received = ReceivedReply.model_validate_json(reply.data)
    except ValidationError:
        raise EncoderError(f"{origin} gave no usable reply.", fix="Check what runs at that address.") from None
    numbers = [row.numbers for row in received.data]
    dims = next((len(row) for row in numbers if row is not None), 0)
    return checked_vectors(numbers, count=len(texts), dims=dims, origin=origin), received.fingerprint


def mean_cosine(stored: Vectors, again: Vectors) -> float:
    """Of each stored vector with the one beside it in `again`; 0 for vectors of another length, which have no part alike."""
    return float(np.mean(np.sum(stored * again, axis=1))) if again.shape == stored.shape else 0.0


async def paired(settings: Settings, manifest: Manifest, texts: Sequence[str], stored: Vectors) -> Pairing:
    """What the embedding service gives for passages of a snapshot, as they were embedded, beside their stored vectors. Raises EncoderError."""
    prompted = settings.encoder.unnamed == "probe"  # a service that knows nothing of prompts
    if prompted:
        prompt = settings.model(manifest.embedding_model).document_prompt
        texts = [prompt + text for text in texts]
    again, fingerprint = await embedded_again(settings.embedder_url.rstrip("/"), manifest.embedding_model, texts, prompted=prompted)
    return Pairing(manifest.snapshot_id, manifest.fingerprint, fingerprint, mean_cosine(stored, again))


class VectorProbe:
    """Compares every `encoder.probe_seconds`, the first time that long after the start. `seen` is what it saw last.

    It is None while nothing could be compared: no release is open, or the service does not answer, which other signals tell.
    """

    def __init__(self, live: Live, settings: Settings) -> None:
        self.seen: Pairing | None = None
        self._live = live
        self._settings = settings
        self._seconds = settings.encoder.probe_seconds
        self._floor = settings.drift.cosine_floor
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to compare, in the background; never when `encoder.probe_seconds` is 0."""
        if self._seconds:
            self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def compare(self) -> Pairing | None:
        """Passages of the snapshot that serves, embedded again; None when none is open. Raises EncoderError, SnapshotError."""
        if self._live.serving is None:
            return None
        with self._live.borrow() as serving:
            retriever = serving.snapshot.retriever
            return await paired(self._settings, retriever.manifest, *await retriever.samples(PROBES))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            was_well = self._well(self.seen)
            try:
                self.seen = await self.compare()
            except Exception as error:  # noqa: BLE001 - whatever is wrong, the next look may succeed, and requests go on
                self.seen = None
                log.info("stored passages were not compared: %s", in_log(error))
            if was_well and self.seen is not None and not self._well(self.seen):
                log.error("%s", _told(self.seen))

    def _well(self, seen: Pairing | None) -> bool:
        return seen is None or (seen.same_model is not False and seen.cosine >= self._floor)


def _told(seen: Pairing) -> str:
    named = {True: "the same", False: "another", None: "no"}[seen.same_model]
    return (
        f"the embedding service gives other vectors than {seen.snapshot_id} holds: mean cosine {seen.cosine:.5f} of {PROBES} passages, "
        f"{named} fingerprint. Run it with the model, prompts and dtype that the snapshot was built with."
    )
