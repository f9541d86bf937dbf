"""Word evidence: how much of a query's wording a candidate shares, by words, by adjacent pairs, and by its title.

Rarity is counted inside the pool of candidates, so it weighs what tells them apart and needs no statistics of the corpus.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise

from rag_serving.settings import Wording

_WORD = re.compile(r"[^\W_]+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ENDINGS = ("ing", "ies", "ed", "es", "s", "e", "y")
_KNOWN_WORDS = 1 << 16
_LONGEST_KNOWN = 40
_STOP_WORDS = frozenset(
    """
    a about above after again all also am an and any are as at be because been before being below between both but by can could did do does
    doing down during each few for from further had has have having he her here hers him his how i if in into is it its itself just may me
    might more most must my no nor not now of off on once only or other our ours out over own same she should so some such than that the
    their theirs them then there these they this those through to too under until up upon us very was we were what when where which while
    who whom whose why will with would you your yours
    """.split()  # noqa: SIM905 - prose is easier to read and to change than a list of quoted words
)


@dataclass(frozen=True, slots=True)
class Worded:
    """The words of a candidate as they are compared: those of its title, and those of its text in order, each between spaces."""

    title: frozenset[str]
    text: str


def worded(title: str, text: str) -> Worded:
    """What `word_evidence` needs of a candidate; the same for every query."""
    return Worded(frozenset(terms(title)), f" {' '.join(terms(text))} ")


def terms(text: str) -> Iterator[str]:
    """The words of a text for comparison, in order, without English endings and function words.

    Case is folded, compounds such as DeleteBucket are cut apart, scripts without spaces give pairs of neighbouring characters. No term holds
    a space.
    """
    return chain.from_iterable(map(_terms_of, _WORD.findall(text)))


def _terms_of(word: str) -> tuple[str, ...]:
    return _known_terms_of(word) if len(word) <= _LONGEST_KNOWN else _cut(word)


def _cut(word: str) -> tuple[str, ...]:
    found: list[str] = []
    for part in _CAMEL.sub(" ", word).split(" "):
        folded = part.casefold()
        if _CJK.search(folded):
            found += [folded[at : at + 2] for at in range(max(len(folded) - 1, 1))]
        elif folded not in _STOP_WORDS:
            found.append(_stem(folded))
    return tuple(found)


_known_terms_of = lru_cache(_KNOWN_WORDS)(_cut)


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3 and not word.endswith("ss"):
            doubled = ending in {"ing", "ed"} and stem[-1] == stem[-2] and stem[-1] not in "lsz"
            return stem[:-1] if doubled else stem
    return word


def word_evidence(query: str, pool: Sequence[Worded], *, weights: Wording, distinctness: float) -> list[float]:
    """A bonus per candidate, 0 to the sum of the weights.

    pairs: share of the query's adjacent word pairs that the text has; words: the same of its words; title: share of the title that the
    query names, scaled by title distinctness. Each share is of idf mass, idf = ln(1 + (n - df + 0.5) / (df + 0.5)) over the n candidates.
    """
    asked = list(terms(query))
    asked_words = {word: f" {word} " for word in asked}
    asked_pairs = {f" {first} {second} " for first, second in pairwise(asked)}
    words = [{word for word, spaced in asked_words.items() if spaced in candidate.text} for candidate in pool]
    pairs = [{pair for pair in asked_pairs if pair in candidate.text} for candidate in pool]
    seen = Counter(chain.from_iterable(candidate.title | found for candidate, found in zip(pool, words, strict=True)))
    seen.update(chain.from_iterable(pairs))
    rarity = [math.log(1 + (len(pool) - df + 0.5) / (df + 0.5)) for df in range(len(pool) + 1)]
    idf = {each: rarity[seen[each]] for each in (*seen, *asked_words, *asked_pairs)}

    def mass(found: Iterable[str]) -> float:
        return math.fsum(map(idf.__getitem__, found))

    all_words, all_pairs = mass(asked_words) or 1.0, mass(asked_pairs) or 1.0
    return [
        weights.pairs * mass(found_pairs) / all_pairs
        + weights.words * mass(found_words) / all_words
        + weights.title * distinctness * mass(candidate.title & asked_words.keys()) / (mass(candidate.title) or 1.0)
        for candidate, found_words, found_pairs in zip(pool, words, pairs, strict=True)
    ]
