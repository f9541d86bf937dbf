"""How far an answer can be trusted by what it rests on. It does not say that the answer is true.

The rule. A passage counts when the answer cites it and its relevance reaches the threshold of the snapshot (relevance.py).
- `high`: two passages that count are independent of each other, and no sentence of the answer is without a citation.
- `low`: all that it cites is known to be below the threshold, or less than half of its words stand in what they cite.
- `medium`: the rest; where nothing is known, without a threshold or of passages found by words alone, no answer is more.
Two passages are independent when they come from different documents, or from different hosts if that is asked for, and neither repeats the
other: less than half of the shorter one's runs of three words stand in the longer. So one document says a thing once, however often it was
put into the corpus. Documents that one author wrote anew each time, under several names, still count as several.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Literal
from urllib.parse import urlsplit

from rag_serving.context import Passage
from rag_serving.retrieval import Hit
from rag_serving.writing.extraction import Answer, Confidence

REPEATED = 0.5
LEAST_GROUNDED = 0.5
RUN = 3

Apart = Literal["document", "host"]


def confidence(answer: Answer, on_topic: Callable[[Hit], bool | None], *, apart: Apart) -> Confidence | None:
    """That of an answer; None when it abstained.

    `on_topic` says whether a hit reaches the threshold, None where that is not known; `apart` what two sources must differ in.
    """
    if answer.abstained:
        return None
    known = [on_topic(passage.hit) for passage in answer.cited]
    if not any(each is not False for each in known) or (answer.groundedness is not None and answer.groundedness < LEAST_GROUNDED):
        return "low"
    relevant = [passage for passage, each in zip(answer.cited, known, strict=True) if each]
    if "uncited" not in answer.flags and any(independent(one, other, apart=apart) for one, other in combinations(relevant, 2)):
        return "high"
    return "medium"


def independent(one: Passage, other: Passage, *, apart: Apart) -> bool:
    """Whether two passages are sources of their own."""
    return one.hit.doc_id != other.hit.doc_id and (apart == "document" or _host(one.hit) != _host(other.hit)) and not _repeats(one, other)


def _host(hit: Hit) -> str:
    """The host that a document was read from; what has none is the same place."""
    try:
        return (urlsplit(hit.uri).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _repeats(one: Passage, other: Passage) -> bool:
    shorter, longer = sorted((_runs(one.hit.text), _runs(other.hit.text)), key=len)
    return len(shorter & longer) >= REPEATED * len(shorter)


def _runs(text: str) -> frozenset[str]:
    words = "".join(character if character.isalnum() else " " for character in text.casefold()).split()
    return frozenset(" ".join(words[at : at + RUN]) for at in range(max(1, len(words) - RUN + 1)))
