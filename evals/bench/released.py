"""A released snapshot of the corpus in a store of its own, with an embedding service: what the query service of a bench answers from."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from evals.bench.processes import running
from evals.bench.rig import Rig
from rag_assets import steps
from rag_serving.embedder import serve as serve_embedder
from rag_serving.promotion import promote
from rag_serving.settings import Settings
from rag_serving.store import LocalStore, Store


@dataclass(frozen=True, slots=True)
class Released:
    """`settings` are those with which to start the query service; `queries` are the questions of the eval set."""

    settings: Settings
    store: Store
    snapshot_id: str
    queries: Sequence[str]


@asynccontextmanager
async def released(rig: Rig, model: str) -> AsyncIterator[Released]:
    """The ledger of the rig's own store stays as it is."""
    await asyncio.to_thread(rig.chunk_texts)
    queries = [query.text for query in steps.load_eval_set(rig.workbench).queries]
    manifest = (await asyncio.to_thread(steps.snapshot_corpus, rig.workbench, model)).manifest
    store = LocalStore(rig.scratch / "released")
    place = Path("snapshots") / manifest.snapshot_id
    await asyncio.to_thread(shutil.copytree, rig.workbench.store.folder(place.as_posix()), store.root / place)
    promote(store, manifest.snapshot_id, gate=rig.settings.gate, actor="bench", reason="to be measured", override=True)
    places = rig.settings.places.model_copy(update={"store": store.root})
    settings = rig.settings.model_copy(update={"places": places})
    async with running(serve_embedder, settings, models=[model]) as url:
        places = places.model_copy(update={"embedder_url": url})
        yield Released(settings.model_copy(update={"places": places}), store, manifest.snapshot_id, queries)
    await asyncio.to_thread(shutil.rmtree, store.root)
