"""What was asked lately, and what was asked when a release was new: the two sides of query drift.

Serving keeps rows under `observations/`, Parquet files whose names sort by time; those with a `query` column hold words, where that was opted
into. With fewer than 100 such queries the eval set stands in for them, so that a changed eval set shows as well.
"""

import hashlib
import io
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from evals.collections import open_eval_set
from rag_serving.errors import AlreadyExists, StoreError
from rag_serving.seals import sealed, unsealed
from rag_serving.settings import Settings
from rag_serving.store import Store

Origin = Literal["observed", "eval_set"]

_PREFIX = "observations"
_FEWEST = 100


@dataclass(frozen=True, slots=True)
class QueryWindow:
    """Queries of one origin, oldest first where they were observed; `at` is when they were collected (ISO, UTC)."""

    origin: Origin
    queries: tuple[str, ...]
    at: str


def query_window(store: Store, settings: Settings, *, most: int) -> QueryWindow:
    """The newest `most` observed queries, else as many of the eval set: those of the smallest id hashes, which few additions change."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    observed = _observed(store, most)
    if len(observed) >= _FEWEST:
        return QueryWindow("observed", tuple(observed), at)
    queries = open_eval_set(settings.eval.source, root=settings.root).queries
    chosen = sorted(queries, key=lambda query: hashlib.sha256(query.query_id.encode()).digest())[:most]
    return QueryWindow("eval_set", tuple(query.text for query in chosen), at)


def reference_window(store: Store, manifest_sha256: str, window: QueryWindow) -> QueryWindow:
    """The window that was kept for a release, of the same origin; `window` itself, kept from now on, when there is none yet."""
    key = f"drift/references/{manifest_sha256[:32]}-{window.origin}.json"
    if not store.exists(key):
        try:
            store.create(key, sealed(asdict(window)))
        except AlreadyExists:
            return reference_window(store, manifest_sha256, window)
        return window
    try:
        fields = unsealed(store.read(key))
        return QueryWindow(**{**fields, "queries": tuple(fields["queries"])})
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{key} is damaged or was edited.", fix="Delete that file; the queries of now are kept in its place.") from None


def _observed(store: Store, most: int) -> list[str]:
    queries: list[str] = []
    for name in reversed(store.names(_PREFIX)):
        if len(queries) >= most:
            break
        try:
            table = pq.read_table(io.BytesIO(store.read(f"{_PREFIX}/{name}")))
        except (pa.ArrowInvalid, OSError):
            raise StoreError(f"{_PREFIX}/{name} is no Parquet file.", fix="Delete that file; its requests are not counted.") from None
        asked = table["query"].to_pylist() if "query" in table.column_names else []
        queries = [query for query in asked if query and query.strip()] + queries
    return queries[-most:]
