"""Passages of documents, cut at meaningful places with exact character spans."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from rag_assets.sources import Document, markdown_headings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH = 256


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage: `document.text[start:end] == text`, offsets in characters.

    `heading_path` ("A > B") ends in the heading that the chunk stands under or opens with. A document without text has
    its title as chunk, at span (0, 0). `chunk_id` is 32 hex digits of sha256 over doc_id, span and text.
    """

    chunk_id: str
    doc_id: str
    uri: str
    title: str
    heading_path: str
    text: str
    start: int
    end: int


def chunk_documents(documents: Iterable[Document], *, max_tokens: int, tokenizer: "Tokenizer | Callable[[str], int]") -> Iterator[Chunk]:
    """Cut documents into chunks of at most `max_tokens` tokens of text, in order; nothing but whitespace at the cuts is lost.

    A `tokenizers.Tokenizer` counts without special tokens, truncation or padding; a callable returns a text's length in tokens. What an
    encoder adds (its special tokens, a prompt, the title) is not counted, so leave room for it. A document within the limit is one chunk,
    its whole text. One without text is one chunk of its title; one without either has none. Markdown (a uri ending in .md) is cut along
    its structure.
    """
    measure = _Measure(max_tokens, tokenizer)
    stream = iter(documents)
    while block := list(islice(stream, BATCH)):
        for document, pieces in zip(block, measure.pieces(block), strict=True):
            yield from _chunks(document, pieces)


class _Measure:
    """Counts tokens and cuts what is over the limit, a batch at a time."""

    def __init__(self, max_tokens: int, tokenizer: "Tokenizer | Callable[[str], int]") -> None:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter

        self.max_tokens = max_tokens
        self.plain: TextSplitter
        self.markdown: MarkdownSplitter
        self.count: Callable[[list[str]], list[int]]
        if callable(tokenizer):
            size = tokenizer
            self.count = lambda texts: [size(text) for text in texts]
            self.plain = TextSplitter.from_callback(size, max_tokens)
            self.markdown = MarkdownSplitter.from_callback(size, max_tokens)
        else:
            counting = type(tokenizer).from_str(tokenizer.to_str())
            counting.no_truncation()
            counting.no_padding()
            self.count = lambda texts: [len(each.ids) for each in counting.encode_batch_fast(texts, add_special_tokens=False)]
            self.plain = TextSplitter.from_huggingface_tokenizer(counting, max_tokens)
            self.markdown = MarkdownSplitter.from_huggingface_tokenizer(counting, max_tokens)

    def pieces(self, block: list[Document]) -> list[list[tuple[int, str]]]:
        """(offset, text) of the passages of each document; none for one without text."""
        texts = [document.text if document.text.strip() else "" for document in block]
        cut = [[(0, text)] if text else [] for text in texts]
        over = [row for row, count in enumerate(self.count(texts)) if count > self.max_tokens]
        for splitter, rows in (
            (self.markdown, [row for row in over if _is_markdown(block[row])]),
            (self.plain, [row for row in over if not _is_markdown(block[row])]),
        ):
            for row, found in zip(rows, splitter.chunk_all_indices([texts[row] for row in rows]), strict=True):
                cut[row] = found
        return cut


def _is_markdown(document: Document) -> bool:
    return document.uri.lower().endswith(".md")


def _chunks(document: Document, pieces: list[tuple[int, str]]) -> Iterator[Chunk]:
    if not pieces and document.title.strip():
        yield _chunk(document, "", document.title, (0, 0))
    headings = markdown_headings(document.text) if pieces and _is_markdown(document) else []
    path: list[tuple[int, str]] = []
    position = 0
    for start, text in pieces:
        first = start + len(text) - len(text.lstrip())
        while position < len(headings) and headings[position][0] <= first:
            _, level, title = headings[position]
            path = [*(each for each in path if each[0] < level), (level, title)]
            position += 1
        yield _chunk(document, " > ".join(title for _, title in path if title), text, (start, start + len(text)))


def _chunk(document: Document, heading_path: str, text: str, span: tuple[int, int]) -> Chunk:
    identity = json.dumps([document.doc_id, *span, text])
    chunk_id = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Chunk(chunk_id, document.doc_id, document.uri, document.title, heading_path, text, *span)
