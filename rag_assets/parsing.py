"""From items to documents: what can be read becomes a document, what cannot is quarantined by name and reason, and nothing is lost."""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from rag_assets.parser_process import ParserProcess
from rag_assets.sources.items import DOCUMENT, Document, Item, Refused, Scalar
from rag_serving.errors import SourceError
from rag_serving.settings import Parsing

PARSER_VERSION = f"1/kreuzberg-{version('kreuzberg')}"
"""Changes when equal bytes may give another document."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An item of which no document was made. `reason` is a short stable code (docs/sources.md lists them), `detail` a sentence.

    `passing`: it could not be had this time, so the next run asks for it again though its version is the same.
    """

    uri: str
    version: str
    reason: str
    detail: str
    passing: bool = False


def parse_items(items: Iterable[Item], *, limits: Parsing) -> Iterator[tuple[Item, Document | Quarantined]]:
    """A document or a quarantine for each item, in their order and one at a time.

    Files are parsed in a child process within `limits`; it starts with the first one and ends with the iterator.
    """
    with closing(ParserProcess(limits)) as process:
        for item in items:
            yield item, _outcome(item, process, limits)


def _outcome(item: Item, process: ParserProcess, limits: Parsing) -> Document | Quarantined:
    try:
        if item.size > limits.max_bytes:
            raise _too_large(item.size, limits)
        data = item.read()
        if len(data) > limits.max_bytes and item.media != DOCUMENT:
            raise _too_large(len(data), limits)
        return _document(item, data) if item.media == DOCUMENT else _file(item, data, process)
    except SourceError as error:
        reason, passing = (error.reason, error.passing) if isinstance(error, Refused) else ("unreadable", False)
        return Quarantined(item.uri, item.version, reason, error.what, passing)


def _too_large(size: int, limits: Parsing) -> Refused:
    return Refused("too_large", f"it has {size:,} bytes; at most {limits.max_bytes:,} are read")


def _file(item: Item, data: bytes, process: ParserProcess) -> Document:
    told = item.metadata.get("charset")
    found = process.parse(data, item.uri, item.media, charset=told if isinstance(told, str) else "")
    title = found.title or PurePosixPath(item.uri).stem or item.uri
    return Document(item.uri, item.uri, title, found.text, {**item.metadata, **found.metadata}, item.acl)


def _document(item: Item, data: bytes) -> Document:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"it is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise Refused("invalid_document", f"it is a {type(row).__name__} where an object is needed")
    doc_id, title, text = row.get("doc_id"), row.get("title", ""), row.get("text")
    uri, metadata, acl = row.get("uri") or item.uri, row.get("metadata") or {}, row.get("acl") or []
    named = isinstance(doc_id, str) and doc_id and isinstance(uri, str) and isinstance(title, str)
    if not (named and isinstance(text, str) and isinstance(metadata, dict)):
        raise Refused("invalid_document", "it needs an id and text; title and uri are text, metadata is an object")
    if not (isinstance(acl, list) and all(isinstance(each, str) for each in acl)):
        raise Refused("invalid_document", "acl is a list of names")
    if b"\\ud" in data.lower():
        _refuse_half_characters(row)
    return Document(str(doc_id), str(uri), title, text, {**item.metadata, **_scalars(metadata)}, (*item.acl, *acl))


def _scalars(metadata: dict[str, Any]) -> dict[str, Scalar]:
    return {
        key: value if isinstance(value, Scalar) else json.dumps(value, sort_keys=True)
        for key, value in metadata.items()
        if value is not None
    }


def _refuse_half_characters(row: dict[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused("invalid_text", f"it holds half a character, {error.object[error.start]!a}, which no file can store") from None
