"""Where the text of an answer stands in a document."""

import re
from collections.abc import Iterator


def occurrences(answer: str, text: str, *, start: int | None = None) -> list[tuple[int, int]]:
    """The `[start, end)` of an answer in a text, in characters, without the white space around it.

    At `start` alone where the answer stands there; else wherever it stands verbatim; else, for several words, with any white space
    between them. An occurrence that cuts a word in two is none: "yes" does not stand in "yesterday".
    """
    words = answer.strip()
    if start is not None and start >= 0 and text[start : start + len(answer)] == answer:
        first = start + len(answer) - len(answer.lstrip())
        return [(first, first + len(words))]
    spans = list(_verbatim(words, text))
    if not spans and len(words.split()) > 1:
        pattern = r"\s+".join(re.escape(word) for word in words.split())
        spans = [match.span() for match in re.finditer(pattern, text) if _whole(text, *match.span())]
    return spans


def _verbatim(words: str, text: str) -> Iterator[tuple[int, int]]:
    at = text.find(words)
    while at >= 0:
        if _whole(text, at, at + len(words)):
            yield at, at + len(words)
        at = text.find(words, at + 1)


def _whole(text: str, start: int, end: int) -> bool:
    """Whether neither end of `[start, end)` cuts a word in two."""
    return not any(0 < edge < len(text) and _in_word(text[edge - 1]) and _in_word(text[edge]) for edge in (start, end))


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
