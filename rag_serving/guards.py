"""Guards on what is asked, on what is retrieved and on what is answered. Retrieved text is data: it may be quoted, never obeyed.

A guard gives back the text and what happened as events (guard, rule, action). `[guards]` in ragline.toml chooses the action of each rule:
allow (not looked for), flag (noted), strip (taken out) or block (query refused, passage left out, answer withheld). What a language model
writes goes through `answer_filter.AnswerFilter`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from rag_serving.errors import QueryError
from rag_serving.retrieval import Hit
from rag_serving.settings import GuardAction, Guards
from rag_serving.writing import injection

SPARE = 8  # hits to choose from for each passage wanted

Guard = Literal["input", "context", "output"]

_JOINERS, _SELECTORS = "\u200c\u200d", "\ufe00-\ufe0f"
_SHAPELESS = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
HIDDEN = (
    "(?P<bidi>[\u202a-\u202e\u2066-\u2069])"
    f"|(?P<invisible>[{_SHAPELESS}]|(?<![^\x00-\x7f{_JOINERS}])[{_JOINERS}]|[{_JOINERS}](?![^\x00-\x7f{_JOINERS}])"
    f"|(?<![^\\s{_SELECTORS}])[{_SELECTORS}])"
)
"""Characters in which text can hide, as a pattern with a group a rule: those that reorder text, and those without a shape, such as tags,
variation selectors in runs, and joiners that join no letters or emoji."""
JOINER_LAST = f"[{_JOINERS}]\\Z"
"""At the end of a piece of text: whether it hides depends on what comes next."""
_HIDDEN = re.compile(HIDDEN)

_ROLES = re.compile(r"<(?=\|)|\[(?=/?INST\])|<(?=</?SYS>>)|<(?=/?(?:s|start_of_turn|end_of_turn|data)\b)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Event:
    """A rule of a guard that applied `count` times."""

    guard: Guard
    rule: str
    action: GuardAction
    count: int = 1

    def __str__(self) -> str:
        return f"{self.guard}.{self.rule}.{self.action}"


def guard_query(text: str, rules: Guards) -> tuple[str, tuple[Event, ...]]:
    """The question as it may go on. QueryError, code `invalid_characters` or `injection`, when a rule blocks it."""
    events = []
    if rules.query_characters != "allow":
        plain, counts = visible(text)
        if counts and rules.query_characters == "block":
            raise QueryError("the query holds invisible characters.", code="invalid_characters", fix="Send plain text.")
        if rules.query_characters == "strip":
            if counts and not plain.strip():
                raise QueryError("the query is empty.", code="empty_query", fix="Ask something.")
            text = plain
        events = _events("input", rules.query_characters, counts)
    if rules.query_injection != "allow" and injection.score(text) >= rules.query_threshold:
        if rules.query_injection == "block":
            raise QueryError("the query gives orders to a language model.", code="injection", fix="Ask about the documents.")
        events.append(Event("input", "injection", rules.query_injection))
    return text, tuple(events)


def guard_hits(hits: Iterable[Hit], rules: Guards) -> tuple[list[Hit], tuple[Event, ...]]:
    """The hits with what a model may read of them.

    Sentences that give orders to a model are taken out of text, heading and title (strip), or such hits are left out (block). A hit of
    which nothing is left is left out too. What remains stands in the hit's original text word for word.
    """
    kept, counts = [], Counter[tuple[str, GuardAction]]()
    for hit in hits:
        found = _inspected(hit.title, hit.heading_path, hit.text, rules.passage_threshold)
        texts = found.given
        if rules.passage_characters != "allow" and found.hidden:
            counts += Counter({(rule, rules.passage_characters): count for rule, count in found.hidden})
            if rules.passage_characters == "block":
                continue
            texts = found.shown if rules.passage_characters == "strip" else texts
        if rules.passage_injection != "allow" and found.orders:
            counts["injection", rules.passage_injection] += 1
            if rules.passage_injection == "block":
                continue
            texts = found.harmless if rules.passage_injection == "strip" else texts
        if texts == found.given:
            kept.append(hit)
        elif any(character.isalnum() for character in texts[2]):
            kept.append(replace(hit, title=texts[0], heading_path=texts[1], text=texts[2]))
    return kept, tuple(Event("context", rule, action, count) for (rule, action), count in sorted(counts.items()))


@dataclass(frozen=True, slots=True)
class _Inspection:
    """Title, heading and text of a hit: as given, with invisible characters gone, and with orders gone besides."""

    given: tuple[str, str, str]
    shown: tuple[str, str, str]
    harmless: tuple[str, str, str]
    hidden: tuple[tuple[str, int], ...]
    orders: bool


@lru_cache(maxsize=8192)
def _inspected(title: str, heading: str, text: str, threshold: float) -> _Inspection:
    given, hidden = (title, heading, text), Counter[str]()
    shown = []
    for each in given:
        plain, counts = visible(each)
        shown.append(plain)
        hidden += counts
    harmless = tuple(_without_orders(each, threshold) for each in shown)
    return _Inspection(
        given, (shown[0], shown[1], shown[2]), (harmless[0], harmless[1], harmless[2]), tuple(hidden.items()), harmless != tuple(shown)
    )


def _without_orders(text: str, threshold: float) -> str:
    """`text` without its suspicious spans; where one was, a paragraph ends."""
    kept, end = [], 0
    for each in injection.suspicions(text, threshold=threshold):
        kept.append(text[end : max(each.start, end)].rstrip())
        end = max(each.end, end)
    return "\n\n".join(piece for piece in (*kept, text[end:].lstrip() if end else text) if piece)


def spread(hits: Sequence[Hit], *, k: int, share: float) -> tuple[list[Hit], tuple[Event, ...]]:
    """The `k` best hits with at most `share` of them, and at least one, from the same document.

    A document gets more than its share only where the others have no more hits to give. Rank order is kept.
    """
    most = max(1, math.floor(share * k + 1e-9))
    taken: list[int] = []
    over: list[int] = []
    seen = Counter[str]()
    for rank, hit in enumerate(hits):
        seen[hit.doc_id] += 1
        (taken if seen[hit.doc_id] <= most else over).append(rank)
    chosen = sorted([*taken[:k], *over[: max(0, k - len(taken))]])
    passed_over = len(set(range(min(k, len(hits)))) - set(chosen))
    return [hits[rank] for rank in chosen], (Event("context", "source_share", "strip", passed_over),) if passed_over else ()


def visible(text: str) -> tuple[str, Counter[str]]:
    """The text without characters that hide or reorder text, and how many of each rule (`bidi`, `invisible`) there were."""
    if text.isascii():
        return text, Counter()
    return _HIDDEN.sub("", text), Counter(str(found.lastgroup) for found in _HIDDEN.finditer(text))


def fenced(text: str, nonce: str) -> str:
    """The text as a block of data between two lines that hold `nonce`, random bits drawn for the request.

    Nothing in the text can end the block: where it holds the nonce in any case, that is taken out, and marks by which models know turns
    and blocks (`<|im_start|>`, `[INST]`, `</s>`, `<data`) are parted by a space.
    """
    inner = re.sub(re.escape(nonce), "-", text, flags=re.IGNORECASE)
    return f"<data {nonce}>\n{_ROLES.sub(lambda match: f'{match[0]} ', inner)}\n</data {nonce}>"


def _events(guard: Guard, action: GuardAction, counts: Counter[str]) -> list[Event]:
    return [Event(guard, rule, action, count) for rule, count in sorted(counts.items())]
