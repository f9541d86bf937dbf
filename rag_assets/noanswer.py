"""The score below which nothing relevant was found: tuned for the live snapshot with questions that its corpus does not answer."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evals.collections import EvalSet
from evals.coverage import part_of
from evals.negatives import Grade, Negative, NoAnswer, load_negatives, tune_threshold
from rag_assets import steps
from rag_assets.searching import live_release, open_search
from rag_assets.workbench import Workbench
from rag_serving.retrieval import Hit
from rag_serving.writing.relevance import SIGNAL, threshold_key

_DEPTH = 100


def tune_live(bench: Workbench, folder: Path | None = None) -> NoAnswer:
    """Tune on the live snapshot and keep the result in the store. Negatives come from `negatives.jsonl` of `folder`, and from the eval set.

    Each query of the eval set also serves as a left-out question: with every document of its topic's part of the corpus taken away, what is
    found is off topic. NotReady when nothing is released.
    """
    live = live_release(bench)
    eval_set = steps.load_eval_set(bench)
    given = load_negatives(folder) if folder else ()
    found = asyncio.run(_tune(bench, live.snapshot_id, eval_set, given))
    bench.store.write(threshold_key(live.manifest_sha256), json.dumps({"signal": SIGNAL, **asdict(found)}, indent=2).encode())
    return found


async def _tune(bench: Workbench, snapshot_id: str, eval_set: EvalSet, given: Sequence[Negative]) -> NoAnswer:
    async with open_search(bench, snapshot_id) as search:
        asked = await search.find([query.text for query in eval_set.queries], k=_DEPTH)
        refused = await search.find([negative.text for negative in given], k=_DEPTH)
    answerable = {query.query_id: _top(hits) for query, hits in zip(eval_set.queries, asked, strict=True)}
    negatives = {each.query_id: (each.grade, _top(hits)) for each, hits in zip(given, refused, strict=True)}
    for query, hits in zip(eval_set.queries, asked, strict=True):
        topic = {part_of(doc_id) for doc_id, grade in eval_set.qrels[query.query_id].items() if grade > 0}
        if elsewhere := [hit for hit in hits if part_of(hit.doc_id) not in topic]:
            negatives[f"left-out/{query.query_id}"] = (Grade.LEFT_OUT, _top(elsewhere))
    return tune_threshold(answerable, negatives)


def _top(hits: Sequence[Hit]) -> float:
    return max((hit.signals.get(SIGNAL, 0.0) for hit in hits), default=0.0)
