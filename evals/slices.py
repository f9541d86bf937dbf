"""Slices: named groups of queries, so that a loss which the mean hides is seen.

A slice is named "facet=value". The facets are each metadata value that groups queries, the length of the query, and how rare its rarest
word is in the corpus.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.collections import Query
from evals.contamination import words_of
from evals.significance import SEED, holm, sign_flip_p_worse

MOST_VALUES = 64
_LENGTHS = ((5, "1-5"), (10, "6-10"), (20, "11-20"))
_RARE_SHARE = 0.001
_LONGEST_VALUE = 40


@dataclass(frozen=True, slots=True)
class WordCounts:
    """In how many of `documents` documents each word stands; a word that is not in `counts` was not looked for."""

    documents: int
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SliceDifference:
    """Mean difference, candidate minus champion, over the queries of a slice; `p_worse` is adjusted over all slices compared (Holm)."""

    name: str
    queries: int
    mean: float
    p_worse: float


def count_words(queries: Iterable[Query], texts: Iterable[str]) -> WordCounts:
    """Document frequency of the queries' words, in one pass over the texts of the documents."""
    wanted = frozenset(word for query in queries for word in words_of(query.text))
    counts: Counter[str] = Counter()
    documents = 0
    for text in texts:
        documents += 1
        counts.update(wanted.intersection(words_of(text)))
    return WordCounts(documents, counts)


def slice_queries(queries: Sequence[Query], words: WordCounts | None = None) -> dict[str, tuple[str, ...]]:
    """The slices of each query, by query id.

    - `<key>=<value>` for each metadata string or boolean whose key has at most MOST_VALUES values over the set; more name no group.
    - `words=1-5`, `6-10`, `11-20` or `21+`.
    - `rarest_word=unseen` (a word that no document has), `rare` (at most one document in a thousand has it) or `common`, with `words` given.
    """
    facets = _metadata_facets(queries)
    return {
        query.query_id: (
            *(f"{key}={_shown(query.metadata[key])}" for key in facets if _groups(query.metadata.get(key))),
            f"words={_length_band(len(words_of(query.text)))}",
            *([f"rarest_word={_rarity(query, words)}"] if words else []),
        )
        for query in queries
    }


def slice_differences(
    candidate: Mapping[str, float],
    champion: Mapping[str, float],
    slices: Mapping[str, Sequence[str]],
    *,
    min_queries: int,
    draws: int = 10_000,
    seed: int = SEED,
) -> tuple[SliceDifference, ...]:
    """Both systems compared on each slice of `min_queries` queries or more, the largest loss first.

    The p-value is that of the paired sign-flip test of "worse", adjusted by Holm's method over the slices. A slice that holds every query is
    no slice.
    """
    members: dict[str, list[str]] = {}
    for query_id in sorted(candidate):
        for name in slices.get(query_id, ()):
            members.setdefault(name, []).append(query_id)
    differences = {
        name: np.array([candidate[query_id] - champion[query_id] for query_id in ids])
        for name, ids in members.items()
        if min_queries <= len(ids) < len(candidate)
    }
    adjusted = holm({name: sign_flip_p_worse(values, draws=draws, seed=seed) for name, values in differences.items()})
    compared = [SliceDifference(name, len(values), float(values.mean()), adjusted[name]) for name, values in differences.items()]
    return tuple(sorted(compared, key=lambda each: (each.mean, each.name)))


def _metadata_facets(queries: Sequence[Query]) -> list[str]:
    values: dict[str, set[object]] = {}
    for query in queries:
        for key, value in query.metadata.items():
            if _groups(value):
                values.setdefault(key, set()).add(value)
    return sorted(key for key, found in values.items() if len(found) <= MOST_VALUES)


def _groups(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and 0 < len(value.strip()) <= _LONGEST_VALUE)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())


def _length_band(count: int) -> str:
    return next((band for longest, band in _LENGTHS if count <= longest), "21+")


def _rarity(query: Query, words: WordCounts) -> str:
    rarest = min((words.counts.get(word, 0) for word in words_of(query.text)), default=0)
    if rarest == 0:
        return "unseen"
    return "rare" if rarest <= max(1, _RARE_SHARE * words.documents) else "common"
