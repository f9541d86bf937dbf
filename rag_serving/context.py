"""Phase five of a request: which of the hits an answer may rest on, numbered as it will cite them."""

from collections.abc import Iterable
from dataclasses import dataclass

from rag_serving.retrieval import Hit

BUDGET = 12_000


@dataclass(frozen=True, slots=True)
class Passage:
    """A hit an answer may cite as [number]; `text` is the beginning of the hit's text, all of it unless the budget cut it."""

    number: int
    hit: Hit
    text: str


def assemble(hits: Iterable[Hit], *, budget: int = BUDGET) -> tuple[Passage, ...]:
    """Number the hits in rank order from 1, within `budget` characters of text together.

    A hit that repeats an earlier one is left out: the same words up to case and spacing, or more than half of the shorter one's span
    in the same document. One that does not fit is left out too, and later, shorter ones may still come; the first is cut instead.
    """
    passages: list[Passage] = []
    texts: set[str] = set()
    left = budget
    for hit in hits:
        words = " ".join(hit.text.casefold().split())
        if not words or words in texts or any(_overlap(hit, passage.hit) for passage in passages):
            continue
        if passages and len(hit.text) > left:
            continue
        text = hit.text[: max(left, 0)]
        passages.append(Passage(len(passages) + 1, hit, text))
        texts.add(words)
        left -= len(text)
    return tuple(passages)


def _overlap(one: Hit, other: Hit) -> bool:
    shared = min(one.end, other.end) - max(one.start, other.start)
    return one.doc_id == other.doc_id and shared * 2 > min(one.end - one.start, other.end - other.start)
