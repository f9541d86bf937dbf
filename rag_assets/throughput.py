"""How fast an embedding model embeds, kept beside its vectors: every text that was really embedded counts, none that was read from the store.

`embeddings/<fingerprint>.json` sums over all runs on this store. Of two processes that embed with one model at once, one may not be counted.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rag_assets.embedding import DocumentEncoder
from rag_serving.encoding import Vectors
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Throughput:
    """Texts embedded, the wall seconds that took, and the CPU seconds of all threads of the process."""

    texts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def per_second(self) -> float | None:
        return self.texts / self.seconds if self.seconds > 0 else None

    @property
    def cpu_seconds_per_thousand(self) -> float | None:
        return 1000 * self.cpu_seconds / self.texts if self.texts else None

    def __add__(self, other: "Throughput") -> "Throughput":
        return Throughput(self.texts + other.texts, self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


class TimedEncoder:
    """An encoder that counts the texts given to it and the time they take."""

    def __init__(self, encoder: DocumentEncoder) -> None:
        self._encoder = encoder
        self.throughput = Throughput()

    @property
    def fingerprint(self) -> str:
        return self._encoder.fingerprint

    @property
    def dims(self) -> int:
        return self._encoder.dims

    def encode_documents(self, texts: Sequence[str], /) -> Vectors:
        wall, cpu = time.perf_counter(), time.process_time()
        vectors = self._encoder.encode_documents(texts)
        self.throughput += Throughput(len(texts), time.perf_counter() - wall, time.process_time() - cpu)
        return vectors


def add_throughput(store: Store, fingerprint: str, measured: Throughput) -> None:
    """Add to what is known of a model's speed; nothing is written when nothing was embedded."""
    if measured.texts:
        known = read_throughput(store, fingerprint) or Throughput()
        store.write(_key(fingerprint), json.dumps(asdict(known + measured), indent=2).encode())


def read_throughput(store: Store, fingerprint: str) -> Throughput | None:
    """The model's speed so far, None where none was measured or the record cannot be read: it is for show, and the next run begins it anew."""
    if not store.exists(_key(fingerprint)):
        return None
    try:
        return Throughput(**json.loads(store.read(_key(fingerprint))))
    except (ValueError, TypeError):
        return None


def _key(fingerprint: str) -> str:
    return f"embeddings/{fingerprint[:32]}.json"
