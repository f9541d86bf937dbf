"""What the corpus says about the queries of an eval set: whether it holds them, which of their words are rare, where their answers stand."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from evals.collections import AnswerSpan, EvalSet
from evals.contamination import Leak, refuse_contaminated
from evals.slices import count_words, slice_queries
from rag_assets.corpus import table_batches
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Background:
    """By query id: the slices it belongs to, and where its answers stand (queries without a marked answer are left out)."""

    slices: Mapping[str, tuple[str, ...]]
    spans: Mapping[str, tuple[AnswerSpan, ...]]


def background_of(store: Store, eval_set: EvalSet) -> Background:
    """Read the documents of the corpus once, holding the texts of relevant ones only."""
    relevant = {doc_id for row in eval_set.qrels.values() for doc_id, score in row.items() if score > 0}
    answered = any("answers" in query.metadata or "answer" in query.metadata for query in eval_set.queries)
    texts: dict[str, str] = {}

    def contents() -> Iterator[str]:
        for batch in table_batches(store, "documents", columns=["doc_id", "title", "text"]):
            for row in batch.to_pylist():
                if answered and row["doc_id"] in relevant:
                    texts[row["doc_id"]] = row["text"]
                yield f"{row['title']}\n{row['text']}"

    words = count_words(eval_set.queries, contents())
    return Background(slice_queries(eval_set.queries, words), eval_set.answer_spans(texts))


def require_uncontaminated(store: Store, eval_set: EvalSet) -> tuple[Leak, ...]:
    """Look for the queries in titles, texts and metadata of the corpus; EvalSetError as `evals.contamination.refuse_contaminated`."""
    return refuse_contaminated(eval_set, _fields(store))


def _fields(store: Store) -> Iterator[tuple[str, Mapping[str, str]]]:
    for batch in table_batches(store, "documents", columns=["doc_id", "title", "text", "metadata"]):
        for row in batch.to_pylist():
            metadata = dict(_leaves(json.loads(row["metadata"] or "{}"), "metadata"))
            yield row["doc_id"], {"title": row["title"], "text": row["text"], **metadata}


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    """The strings within a JSON value, by their path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{position}")
