"""Does a text give orders to a language model? A linear classifier over words and word pairs, beside plain patterns.

The weights in `injection.json` are fitted by `python -m rag_assets.injection_training`, which says on what and how well they do. A text's
features are its words and adjacent pairs; a feature counts (1 + ln tf) idf, the vector has unit norm (Salton and Buckley 1988), and the
logistic function of the weighted sum is the score. Disguises that a model reads through are undone first, and the higher score counts:
letters of other scripts that look Latin, digits for letters, letters set apart, base64. Scoring a sentence takes about 0.05 ms.
"""

import base64
import binascii
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

WEIGHTS = Path(__file__).with_name("injection.json")
MOST_WORDS = 60  # of a window: in a longer one, an order would be lost among other words
_KNOWN_TEXTS = 4096
LEAST_WORDS = 4  # of a window: fewer say too little

_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?:(?<=[.!?…])[\"')\]]*\s+|(?<=[。！？])|\s*\n\s*\n\s*|\s*\n(?=\s*(?:[-*+•#>|]|\d+[.)])))")  # noqa: RUF001
_APART = re.compile(r"(?<!\w)(?:\w[ .*_-]){4,}\w(?!\w)")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{24,}={0,2}")
_MIXED = re.compile(r"\b(?=[01345@$]*[A-Za-z])[A-Za-z]*[01345@$][\w@$]*")
_LOOKALIKES = str.maketrans("аеорсухіѕјԁɡһԛԝАВЕКМНОРСТХΑΒΕΖΗΙΚΜΝΟΡΤΥΧανορ", "aeopcyxisjdghqwABEKMHOPCTXABEZHIKMNOPTYXavop")  # noqa: RUF001
_DIGITS = str.maketrans("01345@$", "oieasas")

_TALK = r"(?:instructions?|prompts?|rules?|guidelines?|directives?|context|orders|anweisungen|instrucciones|istruzioni|instruç(?:ões|oes))"
_DROP = r"(?:ignore|disregard|forget|override|bypass|ignoriere|vergiss|ignorez|oubliez|ignora|olvida|dimentica|ignorar|esqueça)"
_ON = r"(?:[^.!?,\n]|[.!?,](?=\S))"  # a clause goes on, also past the dots of an address
_MODEL = r"(?:ai|llm|assistants?|chat ?bots?|language models?|gpt|copilot|agents?)"
_PATTERNS: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (needs, re.compile(pattern, re.IGNORECASE | re.MULTILINE))
    for needs, pattern in (
        (
            ("ignor", "disregard", "forget", "overrid", "bypass", "vergiss", "oubliez", "olvida", "dimentica", "esqueça"),
            (
                rf"\b{_DROP}\b[^.!?]{{0,40}}\b(?:previous|prior|above|earlier|preceding|system|all|vorherigen|précédentes|anteriores|precedenti)\b"
                rf"[^.!?]{{0,40}}\b{_TALK}\b"
                rf"|\b{_DROP}\b[^.!?]{{0,20}}\b{_TALK}\b[^.!?]{{0,20}}\b(?:vorherigen|précédentes|anteriores|precedenti|above|before)\b"
            ),
        ),
        (
            ("prompt", "instruction", "message"),
            (
                r"\b(?:reveal|print|show|repeat|output|display|leak|recite|tell me|encode)\b[^.!?]{0,40}"
                r"(?:\b(?:system|hidden|secret|initial|original|your)\b[^.!?]{0,20}\b(?:prompts?|instructions|message)\b"
                r"|\b(?:prompts?|instructions)\b[^.!?]{0,12}\byou (?:were|are|have been|got|follow))"
            ),
        ),
        (
            ("ai", "llm", "assistant", "chatbot", "chat bot", "language model", "gpt", "copilot", "agent"),
            (
                rf"\b(?:note|message|notice|instructions?|attention)\b[^.!?\n]{{0,20}}\b(?:to|for)\b[^.!?\n]{{0,12}}\b{_MODEL}\b"
                rf"|\b{_MODEL}\b[^.!?\n]{{0,30}}\b(?:reading|processing|summari[sz]ing|that reads?|who reads?)\b"
            ),
        ),
        (
            ("answer", "reply", "respon", "summari"),
            (
                r"\b(?:when(?:ever)? (?:you )?(?:answer|summari[sz]|respond|reply)\w*|in (?:every|your|each) (?:answer|reply|response)|"
                r"(?:answer|reply|respond)(?: only)? with(?: exactly| only)?)\b[^.!?\n]{0,60}"
                r"(?:\b(?:include|append|add|insert|embed|say|link|image)\b|['\"“]|https?:)"
                rf"|\b(?:include|append|add|insert|embed|open)\b{_ON}{{0,75}}"
                r"\b(?:to|in|at the end of) (?:every|your|each|the) (?:answer|reply|response)"
                r"|\byour (?:answer|reply|response)s? (?:must|should|has to|have to) (?:contain|include|carry|start|begin|end)\b[^.!?\n]{0,40}"
                r"(?:['\"“]|https?:|\b(?:link|image|phrase|sentence)\b)"
                r"|\b(?:answer|reply|respond) with (?:the|your) (?:secret|hidden|system)\b"
            ),
        ),
        (
            ("http", "](", "][", "//"),
            (
                rf"\balways (?:show|include|add|append|display|insert|mention)\b{_ON}{{0,60}}(?:!\[|(?<!:)//)"
                rf"|\btell (?:the|your) (?:user|reader|customer|visitor)s? to\b{_ON}{{0,60}}\]\("
            ),
        ),
        (
            ("do not ",),
            r"\bdo not (?:mention|disclose|reveal|tell)\b[^.!?\n]{0,40}\b(?:this|these|the) (?:paragraph|note|instruction|message|passage)",
        ),
        (
            ("<|", "inst]", "sys>>", "_of_turn>", "</data", "system", "assistant", "developer mode", "dan mode"),
            (
                r"<\|\w{2,20}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</data(?: [0-9a-f]+)?>"
                r"|^\s*#{0,3}\s*(?:system|assistant)\s*:\s*\S|\bsystem override\b|\bdeveloper mode\b|\bDAN mode\b"
            ),
        ),
    )
)
"""Orders in plain words, each with the letters of which a text must have some to be looked at."""

Rule = Literal["pattern", "classifier"]


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Characters [start, end) of a text that give orders to a model, and which rule says so."""

    start: int
    end: int
    rule: Rule
    score: float


class Classifier:
    """The fitted classifier. Immutable; scoring is pure Python."""

    def __init__(self, intercept: float, features: Mapping[str, tuple[float, float]]) -> None:
        """`features` maps a word or a pair of words to its idf and its weight."""
        self._intercept = intercept
        self._features = features

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "Classifier":
        table = json.loads(path.read_text(encoding="utf-8"))
        return cls(float(table["intercept"]), {name: (float(idf), float(weight)) for name, (idf, weight) in table["features"].items()})

    def score(self, text: str) -> float:
        """From 0 to 1: how sure it is that `text` gives orders to a model. 0 for a text with none of its words."""
        norm = total = 0.0
        for feature, count in Counter(features(text)).items():
            known = self._features.get(feature)
            if known is not None:
                value = (1.0 + math.log(count)) * known[0]
                norm += value * value
                total += value * known[1]
        if not norm:
            return 0.0
        return 1.0 / (1.0 + math.exp(-self._intercept - total / math.sqrt(norm)))


@cache
def classifier() -> Classifier:
    """The shipped one, read once."""
    return Classifier.load()


def features(text: str) -> Iterator[str]:
    """Words without case and accents, and pairs of adjacent words joined by a space."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    if not folded.isascii():
        folded = "".join(character for character in folded if not unicodedata.combining(character))
    before = ""
    for word in _WORD.findall(folded):
        yield word
        if before:
            yield f"{before} {word}"
        before = word


def score(text: str) -> float:
    """The higher of the scores of the text as it is and of what it says once disguises are undone; 1 when a pattern is in it."""
    readings = {text, *_undisguised(text)}
    if any(_ordered(reading) for reading in readings):
        return 1.0
    return max(classifier().score(reading) for reading in readings)


@lru_cache(_KNOWN_TEXTS)
def suspicions(text: str, *, threshold: float) -> tuple[Suspicion, ...]:
    """The sentences of a text that give orders to a model, in order; all of it when only the whole does.

    Long sentences are looked at in windows of 60 words. Windows of fewer than four words count only when a pattern is in them. The passages
    of an index come again and again: what was found in the last few thousand texts is known.
    """
    found, highest = [], 0.0
    for start, end in windows(text):
        window = text[start:end]
        readings = {window, *_undisguised(window)}
        if any(_ordered(reading) for reading in readings):
            found.append(Suspicion(start, end, "pattern", 1.0))
            continue
        sure = max((classifier().score(each) for each in readings if len(_WORD.findall(each)) >= LEAST_WORDS), default=0.0)
        highest = max(highest, sure)
        if sure >= threshold:
            found.append(Suspicion(start, end, "classifier", sure))
    for match in _ordered(text):  # a line break may part an order
        if not any(each.start <= match.start() and match.end() <= each.end for each in found):
            found.append(Suspicion(match.start(), match.end(), "pattern", 1.0))
    if not found and highest >= threshold / 2 and (whole := score(text)) >= threshold:
        found.append(Suspicion(0, len(text), "classifier", whole))
    return tuple(sorted(found, key=lambda each: each.start))


def _ordered(text: str) -> list[re.Match[str]]:
    folded = text.casefold()
    return [found for needs, pattern in _PATTERNS if any(need in folded for need in needs) for found in pattern.finditer(text)]


def windows(text: str) -> Iterator[tuple[int, int]]:
    """Spans of sentences and list items; those over 60 words as overlapping windows of 60."""
    start = 0
    for at, then in [*((match.start(), match.end()) for match in _SENTENCE.finditer(text)), (len(text), len(text))]:
        words = [(match.start(), match.end()) for match in _WORD.finditer(text, start, at)]
        if len(words) <= MOST_WORDS:
            if words:
                yield start, at
        else:
            for first in range(0, len(words) - MOST_WORDS // 2, MOST_WORDS // 2):
                last = min(first + MOST_WORDS, len(words)) - 1
                yield (start if first == 0 else words[first][0]), (at if last == len(words) - 1 else words[last][1])
        start = then


def _undisguised(text: str) -> Iterator[str]:
    plain = unicodedata.normalize("NFKC", text)
    if not plain.isascii():
        plain = "".join(each for each in plain.translate(_LOOKALIKES) if unicodedata.category(each) != "Cf")
    plain = _APART.sub(lambda match: re.sub(r"[ .*_-]", "", match[0]), plain)
    if plain != text:
        yield plain
    spelled = _MIXED.sub(lambda match: match[0].translate(_DIGITS), plain)
    if spelled != plain:
        yield spelled
    for token in _BASE64.findall(text):
        try:
            said = base64.b64decode(token + "=" * (-len(token) % 4), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            continue
        if said.isprintable():
            yield said
