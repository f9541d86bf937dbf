"""Word evidence: how much of a query's wording a candidate shares, by words, by adjacent pairs, and by its title.

Rarity is counted inside the pool of candidates, so it weighs what tells them apart and needs no statistics of the corpus.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rag_serving.settings import Wording

_WORD = re.compile(r"[^\W_]+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ENDINGS = ("ing", "ies", "ed", "es", "s", "e", "y")
_STOP_WORDS = frozenset(
    """
    a about above after again all also am an and any are as at be because been before being below between both but by can could did do does
    doing down during each few for from further had has have having he her here hers him his how i if in into is it its itself just may me
    might more most must my no nor not now of off on once only or other our ours out over own same she should so some such than that the
    their theirs them then there these they this those through to too under until up upon us very was we were what when where which while
    who whom whose why will with would you your yours
    """.split()  # noqa: SIM905 - prose is easier to read and to change than a list of quoted words
)
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text and its title, as they are searched."""

    title: str
    text: str


def terms(text: str) -> Iterator[str]:
    """The words of a text for comparison, in order, without English endings and function words.

    Case is folded, compounds such as DeleteBucket are cut apart, scripts without spaces give pairs of neighbouring characters.
    """
    for found in _WORD.findall(_CAMEL.sub(" ", text)):
        word = found.casefold()
        if _CJK.search(word):
            yield from (word[at : at + 2] for at in range(max(len(word) - 1, 1)))
        elif word not in _STOP_WORDS:
            yield _stem(word)


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3 and not word.endswith("ss"):
            doubled = ending in {"ing", "ed"} and stem[-1] == stem[-2] and stem[-1] not in "lsz"
            return stem[:-1] if doubled else stem
    return word


def word_evidence(query: str, pool: Sequence[Candidate], *, weights: Wording, distinctness: float) -> list[float]:
    """A bonus per candidate, 0 to the sum of the weights.

    pairs: share of the query's adjacent word pairs that the text has; words: the same of its words; title: share of the title that the
    query names, scaled by title distinctness. Each share is of idf mass, idf = ln(1 + (n - df + 0.5) / (df + 0.5)) over the n candidates.
    """
    asked = list(terms(query))
    asked_words, asked_pairs = set(asked), set(pairwise(asked))
    titles = [set(terms(candidate.title)) for candidate in pool]
    bodies = [list(terms(candidate.text)) for candidate in pool]
    words = [asked_words & set(body) for body in bodies]
    pairs = [asked_pairs & set(pairwise(body)) for body in bodies]
    seen: Counter[str | Pair] = Counter()
    for title, found_words, found_pairs in zip(titles, words, pairs, strict=True):
        seen.update(title | found_words)
        seen.update(found_pairs)

    def mass(found: Iterable[str | Pair]) -> float:
        return math.fsum(math.log(1 + (len(pool) - seen[term] + 0.5) / (seen[term] + 0.5)) for term in found)

    all_words, all_pairs = mass(asked_words) or 1.0, mass(asked_pairs) or 1.0
    return [
        weights.pairs * mass(found_pairs) / all_pairs
        + weights.words * mass(found_words) / all_words
        + weights.title * distinctness * mass(title & asked_words) / (mass(title) or 1.0)
        for title, found_words, found_pairs in zip(titles, words, pairs, strict=True)
    ]
