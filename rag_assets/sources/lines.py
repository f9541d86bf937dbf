"""A JSON Lines file as a source: one document a line, read as a stream."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rag_assets.sources.items import DOCUMENT, Item, refused_item
from rag_serving.errors import SourceError

LONGEST_LINE = 64 * 1024 * 1024
"""Bytes of one line; a longer one is refused without being held in memory."""


LineFile = tuple[str, Callable[[], BinaryIO]]
"""Name of a file, by which its documents are called, and how to open it."""


@dataclass(frozen=True, slots=True)
class LinesSource:
    """JSON Lines files, gzipped or not: an id, `text`, and where present `title`, `uri` or `url`, `metadata`, `acl`.

    Only one line is in memory at a time. A line that is no document is listed as an item that refuses, by its number; a file that breaks
    off is a SourceError, because a smaller corpus is not what was asked for. Metadata that is a list or an object is kept as JSON text.
    `version` is the sha256 of the line.
    """

    uri: str
    parts: Callable[[], Iterable[LineFile]]
    id_fields: tuple[str, ...] = ("id", "_id")

    def items(self) -> Iterator[Item]:
        empty = True
        for name, opened in self.parts():
            try:
                with opened() as raw, _unpacked(raw) as file:
                    for number, line in _lines(file):
                        empty = False
                        yield self._item(name, number, line)
            except (OSError, EOFError, zlib.error) as error:
                raise SourceError(
                    f"cannot read {name} of {self.uri}: {error}.", fix="Give the whole file again, readable for all."
                ) from None
        if empty:
            raise SourceError(f"{self.uri} holds no documents.", fix="Put one JSON object on each line.")

    def _item(self, name: str, number: int, line: bytes | None) -> Item:
        where = f"{name}:{number}"
        if line is None:
            return refused_item(where, "too_large", f"line {number} is longer than {LONGEST_LINE:,} bytes")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return refused_item(where, "invalid_json", f"line {number} is not valid JSON: {error}")
        if not isinstance(row, dict):
            return refused_item(where, "invalid_document", f"line {number} holds a {type(row).__name__} where an object is needed")
        doc_id = next((row[field] for field in self.id_fields if field in row), None)
        doc_id = str(doc_id) if isinstance(doc_id, int) and not isinstance(doc_id, bool) else doc_id
        if not isinstance(doc_id, str) or not doc_id:
            return refused_item(where, "invalid_document", f"line {number} has no {' or '.join(self.id_fields)}")
        if doc_id.encode(errors="replace").decode() != doc_id:
            return refused_item(where, "invalid_text", f"line {number} has half a character in its id: {doc_id!a}")
        uri = f"{name}#{doc_id}"
        content = _document(row, doc_id, uri)
        return Item(uri, hashlib.sha256(line).hexdigest(), DOCUMENT, len(line), lambda: json.dumps(content).encode())


def _document(row: Mapping[str, Any], doc_id: str, uri: str) -> dict[str, Any]:
    metadata = row.get("metadata") or {}
    within = metadata.get("url") if isinstance(metadata, dict) else None
    named = next((each for each in (row.get("uri"), row.get("url"), within) if isinstance(each, str) and each), uri)
    return {
        "doc_id": doc_id,
        "uri": named,
        "title": row.get("title") or "",
        "text": row.get("text"),
        "metadata": metadata,
        "acl": row.get("acl") or [],
    }


def local_files(path: Path) -> list[LineFile]:
    """The file at `path`, or every .jsonl and .jsonl.gz file under a folder, in the order of their paths."""
    if path.is_file():
        return [(path.name, lambda: path.open("rb"))]
    found = sorted(each for each in path.rglob("*.jsonl*") if each.is_file() and each.name.endswith((".jsonl", ".jsonl.gz")))
    return [(each.relative_to(path).as_posix(), lambda each=each: each.open("rb")) for each in found]  # type: ignore[misc]


def _unpacked(raw: BinaryIO) -> "BinaryIO | gzip.GzipFile":
    """The content of a file that may be gzipped, whatever it is called: some loaders pack without saying so in the name."""
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if packed else raw


def _lines(file: "BinaryIO | gzip.GzipFile") -> Iterator[tuple[int, bytes | None]]:
    """Number (from 1) and content of each line that is not blank; None for one over LONGEST_LINE."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            yield number, None
        elif line := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
            yield number, line
