"""What serving observed: the rows of its log, and the two sides of query drift, what was asked lately and when a release was new.

Serving keeps rows in `observations/<day>/`, Parquet parts whose names sort by time (`rag_serving/observations.py` has the columns); those with a
`query` column hold words, where that was opted into. With fewer than 100 such queries the eval set stands in for them, so that a changed eval
set shows as well. The parts of an hour that is over are merged into one; a merged part names those it was made of, which count no more.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evals.collections import open_eval_set
from rag_serving.errors import AlreadyExists, StoreError
from rag_serving.observations import PREFIX
from rag_serving.seals import sealed, unsealed
from rag_serving.settings import Settings
from rag_serving.store import Store

Origin = Literal["observed", "eval_set"]
Row = Mapping[str, Any]

_FEWEST = 100
_MERGED = "merged"
_MADE_OF = b"ragline.made_of"
_LOOKS = 3  # at a log that is tidied meanwhile
_MERGED_KEPT = 1024  # merged parts whose rows of a canary are remembered
_SETTLED = timedelta(minutes=10)  # after which no process still writes into an hour

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QueryWindow:
    """Queries of one origin, oldest first where they were observed; `at` is when they were collected (ISO, UTC)."""

    origin: Origin
    queries: tuple[str, ...]
    at: str


def query_window(store: Store, settings: Settings, *, most: int) -> QueryWindow:
    """The newest `most` observed queries, else as many of the eval set: those of the smallest id hashes, which few additions change."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    observed = _observed_queries(store, most)
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


def rows_since(store: Store, since: datetime, *, columns: Sequence[str], canary: int, most: int) -> list[Row]:
    """The first `most` rows from `since` on that were seen while the canary of this ledger entry ran, oldest first, with these columns.

    A part that cannot be read is passed over and logged: one bad file must not switch off who watches. One that was merged meanwhile is read
    where it is now.
    """
    tables: list[pa.Table] | None = None
    for left in reversed(range(_LOOKS)):
        if tables is None:
            tables = _tables_since(store, since, columns=("at", "canary", *columns), canary=canary, most=most, again=left > 0)
    if not tables:
        return []
    rows: list[Row] = pa.concat_tables(tables, promote_options="default").sort_by("at").slice(0, most).to_pylist()
    return rows


def _tables_since(store: Store, since: datetime, *, columns: tuple[str, ...], canary: int, most: int, again: bool) -> list[pa.Table] | None:
    """The rows of each part, up to `most`; None when a part went away meanwhile, its rows may be in another now, and one may look `again`."""
    tables: list[pa.Table] = []
    for key in _parts(store, since=since):
        read = _of_canary_merged if key.rpartition("/")[2].startswith(_MERGED) else _of_canary
        try:
            table = read(store, key, columns=columns, canary=canary)
        except StoreError as error:
            if again and not store.exists(key):
                return None
            log.warning("not counted: %s", error)
            continue
        if table is not None:
            tables.append(table)
        if sum(each.num_rows for each in tables) >= most:
            break
    return tables


def tidy(store: Store, *, keep_days: float, now: datetime | None = None) -> int:
    """Merge the parts of each hour that is over, and take away the days that ended more than `keep_days` ago; how many parts went.

    A merger that was interrupted at any point neither loses a row nor counts one twice; an hour with a part that cannot be read stays as it is.
    """
    now = now or datetime.now(UTC)
    oldest = f"{now - timedelta(days=keep_days):%Y-%m-%d}"
    gone = 0
    for day in store.names(PREFIX):
        if day < oldest:
            gone += len(store.names(f"{PREFIX}/{day}"))
            store.remove(f"{PREFIX}/{day}")
            continue
        hours: dict[str, list[str]] = {}
        for name in store.names(f"{PREFIX}/{day}"):
            if f"{day}T{name[:2]}" < f"{now - timedelta(hours=1) - _SETTLED:%Y-%m-%dT%H}" or name.startswith(_MERGED):
                hours.setdefault(name.removeprefix(f"{_MERGED}-")[:2], []).append(name)
        for hour, names in hours.items():
            try:
                gone += _merge(store, f"{PREFIX}/{day}", hour, names)
            except StoreError as error:
                log.warning("hour %s of %s stays in parts: %s", hour, day, error)
    return gone


def _merge(store: Store, folder: str, hour: str, names: Sequence[str]) -> int:
    """Make one part of an hour's parts and take those away; after an interrupted merger, take away what it left."""
    merged = f"{_MERGED}-{hour}.parquet"
    parts = [name for name in names if name != merged]
    if merged not in names:
        if len(parts) < 2:
            return 0
        table = pa.concat_tables([_table(store, f"{folder}/{name}") for name in parts], promote_options="default")
        made_of = table.replace_schema_metadata({_MADE_OF: json.dumps(parts)})
        buffer = io.BytesIO()
        pq.write_table(made_of, buffer)
        store.create(f"{folder}/{merged}", buffer.getvalue())
        replaced = frozenset(parts)
    else:
        replaced = _made_of(store, f"{folder}/{merged}")
    spent = [name for name in parts if name in replaced]
    for name in spent:
        store.remove(f"{folder}/{name}")
    return len(spent)


def _parts(store: Store, *, since: datetime | None = None, newest_first: bool = False) -> Iterator[str]:
    """The keys of the parts that count, by time; with `since`, those that may hold rows from then on."""
    first_day, first_hour = (f"{since:%Y-%m-%d}", f"{since:%H}") if since else ("", "")
    days = [day for day in store.names(PREFIX) if day >= first_day]
    for day in reversed(days) if newest_first else days:
        folder = f"{PREFIX}/{day}"
        names = store.names(folder)
        replaced = {name for each in names if each.startswith(_MERGED) for name in _made_of(store, f"{folder}/{each}")}
        counted = [name for name in names if name not in replaced and (day > first_day or _hour(name) >= first_hour)]
        for name in sorted(counted, key=lambda name: name.removeprefix(f"{_MERGED}-"), reverse=newest_first):
            yield f"{folder}/{name}"


def _hour(name: str) -> str:
    return name.removeprefix(f"{_MERGED}-")[:2]


def _made_of(store: Store, key: str) -> frozenset[str]:
    """The names of the parts that a merged part replaced; none of one that is damaged or was taken away meanwhile."""
    try:
        return _replaced_by(store, key)
    except StoreError:
        return frozenset()


def _read_replaced(store: Store, key: str) -> frozenset[str]:
    try:
        metadata = pq.read_metadata(io.BytesIO(store.read(key))).metadata or {}
        return frozenset(json.loads(metadata.get(_MADE_OF, b"[]")))
    except (pa.ArrowInvalid, OSError, ValueError):
        raise StoreError(f"{key} is no Parquet file.", fix="Delete that file; its requests are not counted.") from None


def _of_canary(store: Store, key: str, *, columns: tuple[str, ...], canary: int) -> pa.Table | None:
    """The rows of a part that were seen while a canary ran; None for a part of before canaries were logged."""
    table = _table(store, key, columns=columns)
    return table.filter(pc.equal(table["canary"], canary)) if "canary" in table.column_names else None


# parts are written once, and who watches a canary asks every half minute
_replaced_by: Callable[..., frozenset[str]] = lru_cache(_MERGED_KEPT)(_read_replaced)
_of_canary_merged: Callable[..., pa.Table | None] = lru_cache(_MERGED_KEPT)(_of_canary)


def _table(store: Store, key: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        part = pq.ParquetFile(io.BytesIO(store.read(key)))
        return part.read(columns=None if columns is None else [name for name in columns if name in part.schema_arrow.names])
    except (pa.ArrowInvalid, OSError):
        raise StoreError(f"{key} is no Parquet file.", fix="Delete that file; its requests are not counted.") from None


def _observed_queries(store: Store, most: int) -> list[str]:
    queries: list[str] = []
    for key in _parts(store, newest_first=True):
        if len(queries) >= most:
            break
        try:
            table = _table(store, key, columns=("query", "arm"))
        except StoreError:
            if store.exists(key):
                raise
            continue  # merged or taken away meanwhile
        asked = table["query"].to_pylist() if "query" in table.column_names else []
        arms = table["arm"].to_pylist() if "arm" in table.column_names else ["champion"] * len(asked)
        queries = [query for query, arm in zip(asked, arms, strict=False) if arm != "shadow" and query and query.strip()] + queries
    return queries[-most:]
