"""Is the eval set part of the corpus? A query that stands word for word in a document finds it by copying, not by retrieval.

Texts are compared as words, so that case, punctuation and white space do not matter. One pass over the documents looks up each window of
five words in a set: the cost grows with the corpus alone, whatever the number of queries.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from evals.collections import EvalSet, EvalSetError, Query

MIN_WORDS = 5
COPIED_SHARE = 0.01
_PROSE = ("text", "title")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Leak:
    """A query that a document holds; `place` is the field it stands in: text, title, or another such as metadata.question."""

    query_id: str
    query: str
    doc_id: str
    place: str


def words_of(text: str) -> list[str]:
    """The words of a text, in compatibility form (NFKC) and without case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def find_leaks(queries: Iterable[Query], documents: Iterable[tuple[str, Mapping[str, str]]]) -> tuple[Leak, ...]:
    """The queries of MIN_WORDS words or more that stand in `documents`, each (doc_id, content by field).

    One leak a query: the first field outside text and title that holds it, else the first that does.
    """
    asked: dict[tuple[str, ...], list[tuple[str, Query]]] = {}
    for query in queries:
        words = words_of(query.text)
        if len(words) >= MIN_WORDS:
            asked.setdefault(tuple(words[:MIN_WORDS]), []).append((" ".join(words), query))
    openings = frozenset(asked)
    leaks: dict[str, Leak] = {}
    for doc_id, fields in documents:
        for place, content in fields.items():
            words = words_of(content)
            found = openings.intersection(zip(*(words[at:] for at in range(MIN_WORDS)), strict=False))
            line = f" {' '.join(words)} " if found else ""
            for wording, query in chain.from_iterable(asked[opening] for opening in found):
                known = leaks.get(query.query_id)
                if f" {wording} " in line and (known is None or (known.place in _PROSE and place not in _PROSE)):
                    leaks[query.query_id] = Leak(query.query_id, query.text, doc_id, place)
    return tuple(leaks.values())


def refuse_contaminated(eval_set: EvalSet, documents: Iterable[tuple[str, Mapping[str, str]]]) -> tuple[Leak, ...]:
    """The leaks that may stay, or EvalSetError (`code` "contaminated") when what was found forbids a verdict.

    A query in a document's metadata always does: nothing but the eval set puts it there. Queries in texts and titles do when they are more
    than COPIED_SHARE of the set. Fewer are sentences that people write twice and pages that people ask for by title, and cannot move MRR by
    more than half the default margin: 9 of the sample's 1,344 queries are such, 1 of SciFact's 300, none of SQuAD's 10,570.
    """
    leaks = find_leaks(eval_set.queries, documents)
    planted = [leak for leak in leaks if leak.place not in _PROSE]
    if planted:
        raise _contaminated(eval_set, planted, "stand word for word in the metadata of the corpus", "Remove them from the documents.")
    if len(leaks) > COPIED_SHARE * len(eval_set.queries):
        what = f"stand word for word in the corpus (more than {COPIED_SHARE:.0%} of all)"
        raise _contaminated(eval_set, leaks, what, "Ask in words of your own, or remove them from the documents.")
    return leaks


def _contaminated(eval_set: EvalSet, leaks: Sequence[Leak], what: str, fix: str) -> EvalSetError:
    first = leaks[0]
    return EvalSetError(
        f"eval set {eval_set.name!r} is contaminated: {len(leaks):,} of its {len(eval_set.queries):,} queries {what}, "
        f"such as {first.query_id!r} ({first.query[:80]!r}) in the {first.place} of {first.doc_id!r}.",
        fix=fix,
        code="contaminated",
    )
