"""Looking for the prompt's canary in what a language model writes: the random bits by which its rules and passages are fenced."""

import base64
import codecs
import re
from collections.abc import Sequence

_NUMBERED = re.compile(r"[\[({【][\s\d,;]*(?:[\])}】]|\Z)")  # numbers in brackets, the last perhaps still open


class CanaryWatch:
    """Looks for the canary in a text that comes in pieces, and holds back what may be its beginning.

    Halves of it count, in either case, backwards, as rot13, as hexadecimal and as base64, whatever stands between their letters and digits:
    the text is read with the numbers of citations among them, such as [1], and without, since those may be taken out of it later.
    """

    def __init__(self, canary: str) -> None:
        halves = (canary[: len(canary) // 2], canary[len(canary) // 2 :]) if canary else ()
        self._needles = tuple({form for half in halves for form in _forms(half)})
        self._starts = {needle[:size] for needle in self._needles for size in range(1, len(needle) + 1)}
        self._longest = max(map(len, self._needles), default=0)
        self._held = ""
        self.seen = False

    def feed(self, piece: str) -> str:
        if not self._needles:
            return piece
        text = self._held + piece
        marks = [found.span() for found in _NUMBERED.finditer(text)]
        end = min(self._begun(text, ()), self._begun(text, marks)) if marks else self._begun(text, ())
        self._held = text[end:]
        return text[:end]

    def close(self) -> str:
        rest, self._held = self._held, ""
        return rest

    def _begun(self, text: str, left_out: Sequence[tuple[int, int]]) -> int:
        """Where the canary may have begun at the end of the text, when the parts `left_out` are not read; its length if nowhere."""
        read = bytearray(b"\1") * len(text)
        for start, end in left_out:
            read[start:end] = bytes(end - start)
        places = [at for at, character in enumerate(text) if read[at] and character.isascii() and character.isalnum()]
        letters = "".join(text[at] for at in places).lower()
        self.seen = self.seen or any(needle in letters for needle in self._needles)
        sizes = range(min(self._longest, len(letters)), 0, -1)
        return next((places[-size] for size in sizes if letters[-size:] in self._starts), len(text))


def _forms(half: str) -> set[str]:
    data = half.encode()
    encoded = set()
    for offset in range(3):
        bits = base64.b64encode(b"\0" * offset + data).decode()
        encoded.add(bits[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6])
    forms = {half, half[::-1], codecs.encode(half, "rot13"), data.hex(), *encoded}
    return {"".join(character for character in form if character.isalnum()).lower() for form in forms}
