"""The passages of an opened snapshot, by row: read from the table once, and kept in memory up to a bound, since a snapshot never changes."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_serving.wording import Worded, worded

MOST_BYTES = 32 << 20
_SHOWN = ("chunk_id", "doc_id", "uri", "title", "heading_path", "text", "start", "end")
_OVERHEAD = 1500  # bytes of a passage in memory, beside its texts


@dataclass(frozen=True, slots=True)
class Passage:
    """A row as it is shown, and its words as they are compared."""

    shown: Mapping[str, Any]
    words: Worded

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        return sys.getsizeof(self.shown["text"]) + sys.getsizeof(self.words.text) + _OVERHEAD


class Passages:
    """Reads from a LanceDB table. What was read first goes first when `most_bytes` are reached. For one event loop."""

    def __init__(self, table: Any, *, most_bytes: int = MOST_BYTES) -> None:
        self._table = table
        self._most_bytes = most_bytes
        self._kept: dict[int, Passage] = {}
        self.size = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def read(self, rows: Sequence[int]) -> list[Passage]:
        """The passages of these rows, in order. Raises what LanceDB raises when it cannot read them."""
        known = {row: passage for row in rows if (passage := self._kept.get(row))}
        absent = [row for row in rows if row not in known]
        if absent:
            table = await self._table.take_row_ids(absent).select(list(_SHOWN)).with_row_id().to_arrow()
            for shown in table.to_pylist():
                row = shown.pop("_rowid")
                known[row] = Passage(shown, worded(shown["title"], embedded_text(shown["title"], shown["text"])))
                self._keep(row, known[row])
        return [known[row] for row in rows]

    def _keep(self, row: int, passage: Passage) -> None:
        if row not in self._kept:  # two requests may have read it at once
            self._kept[row] = passage
            self.size += passage.size
        while self.size > self._most_bytes:
            self.size -= self._kept.pop(next(iter(self._kept))).size


def embedded_text(title: str, text: str) -> str:
    """The text that stands for a chunk in the vector index, in the full-text index and in word evidence alike."""
    return f"{title}\n{text}" if title and not text.startswith(title) else text
