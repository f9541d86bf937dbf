"""What a source yields, before parsing, and what parsing makes of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rag_serving.errors import SourceError

Scalar = str | int | float | bool
DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing a source holds. Listing is cheap; `read()` loads the content now and raises SourceError (Refused) when it cannot.

    `uri` is relative to the source and stable: `doc_id` derives from it, so equal corpora have equal ids on any machine. Equal `version`
    means equal bytes. `media` is a suffix (".md", ".pdf") that picks the parser, or "document": the content is already a document, a JSON
    object with doc_id, title, text and, where known, uri, metadata and acl. `size` is in bytes. `acl` names the principals that may read
    it; empty means everyone.
    """

    uri: str
    version: str
    media: str
    size: int
    read: Callable[[], bytes] = field(compare=False, repr=False)
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    acl: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed text. `doc_id` comes from the source (its own id, or the item's uri), never from a position.

    `metadata["markup"]` says how headings are written in `text`: "markdown" or "rst"; absent where there are none.
    """

    doc_id: str
    uri: str
    title: str
    text: str
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    acl: tuple[str, ...] = ()


class Source(Protocol):
    """`items()` streams in a stable order and raises SourceError; a source that holds nothing is an error, not empty."""

    @property
    def uri(self) -> str: ...

    def items(self) -> Iterator[Item]: ...


class Refused(SourceError):
    """One item cannot be had; the others can. `reason` is a short stable code, as in a quarantine.

    `passing`: the same version may be had another time, so the next run asks for it again.
    """

    def __init__(self, reason: str, detail: str, *, passing: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.passing = passing


def refused_item(uri: str, reason: str, detail: str) -> Item:
    """An item that is listed so that it is counted, and whose content is never loaded."""

    def refuse() -> bytes:
        raise Refused(reason, detail)

    return Item(uri, f"{reason}: {detail}", "", 0, refuse)
