"""Which snapshot a new one can go on from, and what to merge into it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rag_assets.recipe import Recipe
from rag_assets.snapshot_table import schema_of
from rag_assets.survey import Delta, Survey, difference
from rag_serving.retrieval import open_table
from rag_serving.snapshots import Manifest, manifests, snapshot_key, verify
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Increment:
    """What turns a parent's rows into the new ones."""

    parent: Manifest
    delta: Delta

    @property
    def counts(self) -> dict[str, int]:
        before = self.parent.delta
        return {
            "added": self.delta.added,
            "changed": self.delta.changed,
            "removed": self.delta.removed,
            "since_full": before.get("since_full", 0) + self.delta.rows,
            "generation": before.get("generation", 0) + bool(self.delta.rows),
        }


def find_parent(store: Store, recipe: Recipe) -> Manifest | None:
    """The newest snapshot that this recipe can go on from: equal fingerprint, chunking, index structure and LanceDB version.

    Both have token vectors, or neither has. How it is searched (`ef`, the fusion) may differ, because only the manifest holds that.
    """

    def structure(fingerprint: str, chunking: Mapping[str, Any], index: Mapping[str, Any], tokens: bool, lancedb: str) -> tuple[Any, ...]:  # noqa: FBT001
        return fingerprint, dict(chunking), index["m"], index["ef_construction"], tokens, lancedb

    wanted = structure(recipe.fingerprint, recipe.chunking, recipe.searched_with, recipe.late_interaction, version("lancedb"))
    alike = (
        each
        for each in manifests(store)
        if structure(each.fingerprint, each.chunking, each.index, "tokens" in each.rerank, each.lancedb) == wanted
    )
    return max(alike, key=lambda manifest: manifest.built_at, default=None)


def affordable(recipe: Recipe, parent: Manifest, *, delta: int, rows: int) -> bool:
    """Whether `delta` changed rows are merged into the parent, to make `rows`, rather than built anew.

    Counted with all changes since the last full build they may be `index.rebuild_share` of the rows, and `index.rebuild_after` builds may
    follow a full one: each leaves dead rows, and one more part of every index to search.
    """
    if recipe.index_of(rows)["vector_index"] != parent.index["vector_index"]:
        return False
    since_full, generation = (parent.delta.get(name, 0) for name in ("since_full", "generation"))
    return delta == 0 or (since_full + delta <= recipe.index.rebuild_share * rows and generation < recipe.index.rebuild_after)


async def increment_from(store: Store, recipe: Recipe, found: Survey, parent: Manifest) -> Increment | None:
    """What to merge into the parent, which is verified and read for it; None when a full build is due."""
    if not affordable(recipe, parent, delta=abs(found.rows - parent.rows), rows=found.rows):
        return None
    verify(store, parent.snapshot_id)
    table = await open_table(store.folder(snapshot_key(parent.snapshot_id)))
    if not (await table.schema()).equals(schema_of(found, recipe.model.dims)):
        return None
    columns = found.schema.names
    delta = await difference(found, await table.query().select(columns).to_batches())
    table.close()
    return Increment(parent, delta) if affordable(recipe, parent, delta=delta.rows, rows=found.rows) else None
