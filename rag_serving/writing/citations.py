"""Whether an answer says what its citations say: each sentence of a language model is checked against the passages before it leaves.

The rule, sentence by sentence. Its words are its terms (wording.py), and a passage supports it by the share of them that the passage has,
title and heading included; by none of them when the sentence has a number that the passage has not.
- A marker [n] stands if there is a passage n that supports at least FLOOR of the sentence; else it is removed.
- A sentence left without a marker is cited to the passage that supports it most, if that is at least SURE.
- Else it stays, flagged as uncited; unless less than FLOOR of its words occur in any passage or in the question: then it is removed.
  A sentence of function words alone ("No.") is removed with them, and so is one that repeats an earlier one, as looping models do.
- Nothing leaves before the first sentence with a citation. An answer without one has no text: nothing of it is grounded.
Groundedness is the share of the answer's words that stand in the passages that their own sentences cite.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rag_serving.context import Passage
from rag_serving.wording import terms
from rag_serving.writing.extraction import Answer, Flag, Quote, sentences
from rag_serving.writing.prompting import NOT_FOUND

FLOOR = 0.5
SURE = 0.8
LONGEST = 2000  # characters without the end of a sentence

_MARKER = r"\[\s*\d{1,3}(?:\s*[,;]\s*\d{1,3})*\s*\]"
_END = re.compile(
    rf"[.!?…][\"')”’]*(?:\s*{_MARKER})*(?=\s+[^\sa-z\[])|[。！？](?:\s*{_MARKER})*(?=[^\s\[])|(?<=\S)(?=[ \t]*\n\s*[^\s\[])"  # noqa: RUF001
)
_CODE_OR_MARKER = re.compile(rf"`[^`]*`|\s*({_MARKER})")
_ENDING = re.compile(r"[.,;:!?…\"')\]”’]*(?:\s|\Z)")  # noqa: RUF001
_NUMBER = re.compile(r"\d+(?:\.\d+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_LEAD = re.compile(r"\s*(?:[-*+•]|\d{1,2}[.)])\s+")
_SPELLED = dict(enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")))


@dataclass(frozen=True, slots=True)
class _Words:
    """A text as it is compared."""

    terms: frozenset[str]
    numbers: frozenset[str]

    @classmethod
    def of(cls, text: str) -> "_Words":
        plain = _THOUSANDS.sub("", text)
        return cls(frozenset(terms(plain)), frozenset(_NUMBER.findall(plain)))

    def share_in(self, other: "_Words") -> float:
        """The share of these words that the other has; 0 when it lacks a number of these."""
        missing = {number for number in self.numbers - other.numbers if _spelled(number) not in other.terms}
        return 0.0 if missing or not self.terms else len(self.terms & other.terms) / len(self.terms)


class CitationCheck:
    """Takes an answer in pieces, as a model writes it, and gives it back a checked sentence at a time."""

    def __init__(self, query: str, passages: Sequence[Passage]) -> None:
        self._passages = {passage.number: passage for passage in passages}
        self._words = {
            number: _Words.of(f"{each.hit.title} {each.hit.heading_path} {each.text}") for number, each in self._passages.items()
        }
        everything = [_Words.of(query), *self._words.values()]
        self._known = _Words(
            frozenset().union(*(each.terms for each in everything)), frozenset().union(*(each.numbers for each in everything))
        )
        self._flags: dict[Flag, None] = {}
        self._seen: set[str] = set()
        self._quotes: dict[tuple[int, str], Quote] = {}
        self._unfinished = ""
        self._held = ""
        self._told = ""
        self._total = self._grounded = 0

    def feed(self, piece: str) -> str:
        """What may be shown now: whole, checked sentences; often nothing."""
        self._unfinished += piece
        ready = ""
        while cut := self._cut():
            sentence, self._unfinished = self._unfinished[:cut], self._unfinished[cut:]
            ready += self._checked(sentence)
        return self._release(ready)

    def finish(self, *, whole: bool = True) -> str:
        """The rest that may be shown, when the model has ended; a sentence it was stopped in is dropped if not `whole`."""
        last, self._unfinished = self._unfinished, ""
        if whole or re.search(rf"(?:[.!?…。！？]|{_MARKER})[\"')”’]*\s*\Z", last):  # noqa: RUF001
            return self._release(self._checked(last))
        self._flags["truncated"] = None
        return ""

    @property
    def answer(self) -> Answer | None:
        """What was shown, as a whole; None when nothing was, since nothing had a citation."""
        if not self._told:
            return None
        share = round(self._grounded / self._total, 3) if self._total else 0.0
        quotes = tuple(self._quotes.values())
        return Answer(self._told, quotes, generated=True, groundedness=share, flags=tuple(self._flags))

    @property
    def flags(self) -> tuple[Flag, ...]:
        return tuple(self._flags)

    def _cut(self) -> int:
        """Where the first sentence of what is unfinished ends; 0 when it may still go on."""
        if found := _END.search(self._unfinished):
            return found.end()
        return LONGEST if len(self._unfinished) > LONGEST else 0

    def _release(self, ready: str) -> str:
        """`ready` with what was held back before it, once there is a citation."""
        self._held += ready
        if not self._quotes:
            return ""
        shown, self._held = self._held, ""
        if not self._told:
            shown = shown.lstrip()
        self._told += shown
        return shown

    def _checked(self, sentence: str) -> str:
        """The sentence with the markers that it keeps or gets, and the space before it; empty when it is removed."""
        claim = _CODE_OR_MARKER.sub(lambda match: "" if match[1] else match[0], sentence)
        if claim.strip(" \n.").upper() == NOT_FOUND:
            return ""
        words = _Words.of(_LEAD.sub("", claim, count=1))
        cited = {number for match in _CODE_OR_MARKER.finditer(sentence) if match[1] for number in _cited(match[1])}
        support = {number: words.share_in(passage) for number, passage in self._words.items()}
        kept = {number for number in cited if support.get(number, 0.0) >= FLOOR}
        if kept != cited:
            self._flags["citation_removed"] = None
        shown = _CODE_OR_MARKER.sub(lambda match: _marked(match, kept), sentence).rstrip()
        if not any(character.isalnum() for character in claim):
            return self._spaced(shown) if claim.strip() else ""
        if (same := " ".join(claim.casefold().split())) in self._seen:
            return ""
        self._seen.add(same)
        if not kept and support and max(support.values()) >= SURE:
            best = max(support, key=lambda number: (support[number], -number))
            kept, shown = {best}, f"{shown} [{best}]"
            self._flags["citation_added"] = None
        if not kept and words.share_in(self._known) < FLOOR:
            self._flags["unsupported_removed"] = None
            return ""
        if not kept:
            self._flags["uncited"] = None
        self._count(words, kept)
        return self._spaced(shown)

    def _count(self, words: _Words, kept: set[int]) -> None:
        self._total += len(words.terms)
        self._grounded += len(words.terms & frozenset().union(*(self._words[number].terms for number in kept)))
        for number in sorted(kept):
            text = _nearest(words, self._passages[number])
            self._quotes.setdefault((number, text), Quote(self._passages[number], text))

    def _spaced(self, shown: str) -> str:
        space = shown[: len(shown) - len(shown.lstrip())]
        return ("\n" if "\n" in space else " ") + shown.lstrip()


def _cited(marker: str) -> Iterator[int]:
    return (int(number) for number in re.findall(r"\d+", marker))


def _marked(match: re.Match[str], kept: set[int]) -> str:
    if not match[1]:
        return match[0]
    numbers = [number for number in _cited(match[1]) if number in kept]
    if numbers:
        return f" {''.join(f'[{number}]' for number in numbers)}"
    return "" if _ENDING.match(match.string, match.end()) else " "  # else what stood apart for the filter could become an address


def _spelled(number: str) -> str | None:
    return next(terms(_SPELLED[int(number)]), None) if number.isdigit() and int(number) in _SPELLED else None


def _nearest(words: _Words, passage: Passage) -> str:
    """The stretch of the passage that has most of the words, the first of equals; word for word."""
    found = list(sentences(passage.text))
    return max(found, key=lambda each: len(words.terms & _Words.of(each).terms), default=passage.text)
