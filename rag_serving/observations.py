"""The observation log: one row a request in Parquet parts of the store, written in the background, without words unless they are asked for.

A row waits in memory for `canary.log_seconds` at most, or until `canary.log_rows` are there, so that a process killed at any moment loses no
more than the last few seconds. A store that cannot be written costs rows, which are counted, never a request.
"""

import asyncio
import hashlib
import io
import logging
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from rag_serving.errors import AlreadyExists
from rag_serving.settings import Canary
from rag_serving.store import Store

PREFIX = "observations"
MOST_WAITING = 10_000  # rows in memory while the store does not take them
STOP_SECONDS = 5.0

Kind = Literal["query", "retrieve", "compare", "feedback"]
Arm = Literal["champion", "canary", "shadow"]
Outcome = Literal["ok", "degraded", "error"]

log = logging.getLogger(__name__)


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Observation:
    """What happened to one request on one arm, or what somebody said of an answer.

    `compare` is of somebody who asked to see both answers side by side: no traffic, so no canary is judged by it.
    `release` is the number in force, `canary` the ledger entry of the canary at that time. A request that the canary failed has two rows of
    one `trace_id`, so has one that was shadowed. Shares are between 0 and 1; None is what was not to be had, such as citations of an error.
    `documents` and `wording` are the Jaccard overlap of a shadow's documents and answer words with the champion's.
    """

    kind: Kind
    trace_id: str
    arm: Arm
    release: int
    snapshot_id: str
    canary: int | None = None
    outcome: Outcome = "ok"
    code: str = ""
    abstained: bool | None = None
    top_score: float | None = None
    doc_ids: tuple[str, ...] = ()
    citations: int | None = None
    cited: float | None = None
    grounded: float | None = None
    guards: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()
    total_ms: float | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    documents: float | None = None
    wording: float | None = None
    verdict: Literal["up", "down"] | None = None
    query: str | None = None
    at: datetime = field(default_factory=_now)


def encode(rows: Sequence[Observation], *, with_text: bool) -> bytes:
    """A Parquet part. Without text it has no `query` column, and document ids are the first 16 hex digits of their sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, share, words = pa.string(), pa.float32(), pa.list_(pa.string())
    types: dict[str, Any] = {
        "at": pa.timestamp("ms", tz="UTC"),
        **dict.fromkeys(("kind", "trace_id", "arm", "snapshot_id", "outcome", "code", "verdict"), text),
        **dict.fromkeys(("release", "canary", "citations"), pa.int64()),
        "abstained": pa.bool_(),
        **dict.fromkeys(("top_score", "cited", "grounded", "documents", "wording", "total_ms"), share),
        **dict.fromkeys(("doc_ids", "guards", "degraded"), words),
        "timings_ms": pa.map_(text, share),
    }
    records = [asdict(row) for row in rows]
    for record in records:
        record["timings_ms"] = list(record["timings_ms"].items())
        if not with_text:
            record["doc_ids"] = [hashlib.sha256(doc_id.encode()).hexdigest()[:16] for doc_id in record["doc_ids"]]
    schema = pa.schema({**types, "query": text} if with_text else types)
    part = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), part)
    return part.getvalue()


class ObservationLog:
    """Takes rows at once and writes them later. `written` and `dropped` count rows; `waiting` are those not written yet."""

    def __init__(self, store: Store, settings: Canary) -> None:
        self.written = 0
        self.dropped = 0
        self._store = store
        self._settings = settings
        self._rows: list[Observation] = []
        self._part: tuple[str, list[Observation]] | None = None
        self._full = asyncio.Event()
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._rows) + (len(self._part[1]) if self._part else 0)

    def add(self, row: Observation) -> None:
        """Take a row; it is dropped and counted when `MOST_WAITING` wait already. Never raises, never waits."""
        if self.waiting >= MOST_WAITING:
            self._drop(1, f"{MOST_WAITING:,} rows wait for the store")
            return
        self._rows.append(row)
        if len(self._rows) >= self._settings.log_rows:
            self._full.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._write_on())

    async def stop(self) -> None:
        """Write what waits; what cannot be written within five seconds is dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                before = -1
                while self.waiting and self.written != before:
                    before = self.written
                    await self._write()
        if self.waiting:
            self._drop(self.waiting, "the service stopped")

    async def _write_on(self) -> None:
        while True:
            if not self._failing:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.log_seconds):
                        await self._full.wait()
            else:
                await asyncio.sleep(self._settings.log_seconds)
            await self._write()

    async def _write(self) -> None:
        """Write what waits as one part. One that failed is tried again under its key, so that no row is in the log twice."""
        if self._part is None and self._rows:
            now = _now()
            key = f"{PREFIX}/{now:%Y-%m-%d}/{now:%H%M%S.%f}-{uuid.uuid4().hex[:8]}.parquet"
            self._part, self._rows = (key, self._rows), []
        self._full.clear()
        if self._part is None:
            return
        try:
            await asyncio.to_thread(self._write_part, *self._part)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the store, requests go on
            self._drop(0, str(error))
        else:
            self.written += len(self._part[1])
            self._part = None
            if self._failing:
                log.warning("observations are written again; %s were dropped since the start", self.dropped)
            self._failing = False

    def _write_part(self, key: str, rows: Sequence[Observation]) -> None:
        with suppress(AlreadyExists):  # by an attempt that nobody waited for
            self._store.create(key, encode(rows, with_text=self._settings.log_text))

    def _drop(self, rows: int, why: str) -> None:
        self.dropped += rows
        if not self._failing:
            log.error("observations cannot be written, requests go on: %s", why)
        self._failing = True
