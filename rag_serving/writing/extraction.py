"""An answer made of sentences of the passages, quoted word for word, each with its citation: what there is without a language model.

The rule. A query word (stop words aside, endings cut off) weighs ln(1 + N / n) when n of the N sentences have it, so that a rare word
counts for more. A sentence scores the share of the query's weight that it covers; words that only its passage's title or heading has count
half. The score is divided by 1 + 0.15 (rank - 1) of its passage and by 1 + (characters past 160) / 400, and halved for a sentence that only
points elsewhere ("For more information, see ..."). The best sentence is quoted, and up to two more that score at least 0.7 of it, in the
order of the passages. When no sentence reaches 0.25, there is no answer.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rag_serving.context import Passage
from rag_serving.wording import terms

Flag = Literal["citation_removed", "citation_added", "uncited", "unsupported_removed", "truncated"]
Confidence = Literal["high", "medium", "low"]

MOST_SENTENCES = 3
SCORE_FLOOR = 0.25
NEAR_BEST = 0.7
RANK_DISCOUNT = 0.15
CONTEXT_SHARE = 0.5
POINTER_SHARE = 0.5
COMFORTABLE = 160  # characters of a sentence that costs nothing
LONGEST = 600  # characters of a quote
NOTHING_FOUND = "The passages found do not answer this question."
NO_PASSAGES = "Nothing was found for this question."

_KNOWN_TEXTS = 2048  # the passages of an index come again and again

_BREAK = re.compile(r"(?<=[.!?…])[\"')\]]*\s+(?=[^\sa-z])|(?<=[。！？])|\s*\n\s*\n\s*|\s*\n\s*(?=(?:[-*+•#>|]|\d+[.)])\s)")  # noqa: RUF001
_LEAD = re.compile(r"^(?:[-*+•>|]|#{1,6}|\d+[.)])\s+")
_POINTER = re.compile(r"(?:for (?:more )?(?:information|details|examples?)|see|refer to)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Quote:
    """A stretch of a passage's text, word for word."""

    passage: Passage
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered: sentences with their markers, or one plain sentence when `abstained`.

    `quotes` are the stretches of the passages that it rests on: those it consists of, or, when it was `generated` by a language model, those
    nearest to its sentences. `groundedness` is the share of its words that stand in what its sentences cite, None when abstained.
    `flags` says what checking its citations changed; `problem` why the language model's own answer is not, or not all, here.
    The tokens are those that the language model counted, 0 without one. `confidence` is that of confidence.py, None until it is judged.
    """

    text: str
    quotes: tuple[Quote, ...] = ()
    abstained: bool = False
    generated: bool = False
    groundedness: float | None = None
    flags: tuple[Flag, ...] = ()
    problem: str | None = None
    tokens_read: int = 0
    tokens_written: int = 0
    confidence: Confidence | None = None

    @property
    def cited(self) -> tuple[Passage, ...]:
        """The passages quoted, each once, by number."""
        return tuple(sorted({quote.passage.number: quote.passage for quote in self.quotes}.values(), key=lambda passage: passage.number))


@dataclass(frozen=True, slots=True)
class _Sentence:
    passage: Passage
    text: str
    words: frozenset[str]
    score: float = 0.0


def extract(query: str, passages: Sequence[Passage]) -> Answer:
    """An answer by quotation, following the rule above. It abstains when the passages do not speak of what was asked."""
    if not passages:
        return Answer(NO_PASSAGES, abstained=True)
    asked = frozenset(terms(query))
    scored = [_Sentence(passage, text, words) for passage in passages for text, words in _worded(passage.text)]
    weights = _weights(asked, [each.words for each in scored])
    contexts = {passage.number: frozenset(terms(f"{passage.hit.title} {passage.hit.heading_path}")) for passage in passages}
    scored = [_score(each, contexts[each.passage.number], weights) for each in scored]
    best = max((each.score for each in scored), default=0.0)
    if best < SCORE_FLOOR:
        return Answer(NOTHING_FOUND, abstained=True)
    near = sorted((each for each in scored if each.score >= NEAR_BEST * best), key=lambda each: -each.score)
    distinct = list({" ".join(each.text.casefold().split()): each for each in reversed(near)}.values())[::-1][:MOST_SENTENCES]
    chosen = [each for each in scored if any(each is kept for kept in distinct)]
    quotes = tuple(Quote(each.passage, each.text) for each in chosen)
    return Answer(" ".join(f"{quote.text} [{quote.passage.number}]" for quote in quotes), quotes, groundedness=1.0)


@lru_cache(_KNOWN_TEXTS)
def _worded(text: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """Each sentence with its words."""
    return tuple((sentence, frozenset(terms(sentence))) for sentence in sentences(text))


def _weights(asked: frozenset[str], sentences_words: Sequence[frozenset[str]]) -> dict[str, float]:
    """Each query word's share of the query's weight; the shares add up to 1."""
    counts = Counter(word for words in sentences_words for word in words & asked)
    raw = {word: math.log(1 + len(sentences_words) / max(counts[word], 1)) for word in asked}
    total = sum(raw.values())
    return {word: weight / total for word, weight in raw.items()} if total else {}


def _score(sentence: _Sentence, context: frozenset[str], weights: dict[str, float]) -> _Sentence:
    own = sum(weight for word, weight in weights.items() if word in sentence.words)
    lent = sum(weight for word, weight in weights.items() if word in context - sentence.words)
    share = own + CONTEXT_SHARE * lent if own else 0.0
    rank = 1 + RANK_DISCOUNT * (sentence.passage.number - 1)
    length = 1 + max(0, len(sentence.text) - COMFORTABLE) / 400
    score = share / rank / length * (POINTER_SHARE if _POINTER.match(sentence.text) else 1.0)
    return _Sentence(sentence.passage, sentence.text, sentence.words, score)


def sentences(text: str) -> Iterator[str]:
    """Sentences and list items of a passage, each a stretch of it without the list mark; longer ones are cut at a space."""
    for piece in _BREAK.split(text):
        sentence = _LEAD.sub("", piece.strip())
        if len(sentence) > LONGEST:
            sentence = sentence[:LONGEST].rpartition(" ")[0] or sentence[:LONGEST]
        if any(character.isalpha() for character in sentence):
            yield sentence
