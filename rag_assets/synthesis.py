"""Synthetic queries for the parts of the corpus that the eval set covers least, through a configured language model."""

import asyncio
import hashlib
from collections import Counter
from typing import Any

from evals.coverage import part_of
from evals.synthesis import SourcePassage, Synthetic, synthesize
from rag_assets.chat import ChatModel
from rag_assets.corpus import read_table
from rag_assets.coverage import measure_coverage
from rag_assets.searching import live_release, open_search
from rag_assets.workbench import Workbench
from rag_serving.feedback import propose

_SHORTEST_PASSAGE = 200  # characters


def synthesize_queries(bench: Workbench, *, count: int) -> dict[str, Any]:
    """Write up to `count` questions and queue those that pass: asked, kept, and rejected by reason.

    ConfigError without a language model, PlatformError when it does not answer, NotReady without a release.
    """
    chosen = _uncovered(bench, count)
    made = asyncio.run(_write(bench, chosen))
    kept = [each for each in made if each.query]
    for each in kept:
        if each.query:
            propose(
                bench.store, each.query.text, "synthetic", doc_ids=[each.doc_id], comment=f"written by {each.query.metadata['written_by']}"
            )
    rejected = Counter(each.rejected for each in made if each.rejected)
    return {"asked": len(made), "kept": len(kept), "rejected": dict(rejected), "queries": [each.query.text for each in kept if each.query]}


async def _write(bench: Workbench, passages: list[SourcePassage]) -> list[Synthetic]:
    async with ChatModel.configured(bench.settings) as model, open_search(bench, live_release(bench).snapshot_id) as search:

        async def retrieve(query: str) -> list[str]:
            (hits,) = await search.find([query], k=bench.settings.eval.k)
            return [hit.doc_id for hit in hits]

        made: list[Synthetic] = []
        with bench.reporter.bar("writing questions") as bar:
            for passage in passages:
                made += await synthesize([passage], ask=model.ask, retrieve=retrieve, model=model.model)
                bar(len(made), len(passages))
        return made


def _uncovered(bench: Workbench, count: int) -> list[SourcePassage]:
    """Passages long enough to ask about, one a document: of untouched parts first, then of the least touched, in an order by hash within a part."""
    order = {part.name: place for place, part in enumerate(measure_coverage(bench).parts)}
    _, chunks = read_table(bench.store, "chunks")
    rows = chunks.select(["doc_id", "title", "text"]).to_pylist()
    first = {row["doc_id"]: SourcePassage(**row) for row in reversed(rows) if len(row["text"]) >= _SHORTEST_PASSAGE}
    chosen = sorted(first.values(), key=lambda each: (order[part_of(each.doc_id)], hashlib.sha256(each.doc_id.encode()).digest()))
    return chosen[:count]
