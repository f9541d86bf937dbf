"""Passages of documents, cut at meaningful places with exact character spans and sized by what the embedding model reads."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from rag_assets.markup import headings
from rag_assets.sources import Document
from rag_serving.passages import embedded_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNKER_VERSION = f"chunks-3/splitter-{version('semantic-text-splitter')}/markdown-{version('markdown-it-py')}"
"""Changes when equal documents and settings may be cut differently."""
BATCH = 256
# a run of marks is looked at once, from its beginning: a million dots are no million attempts
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"')\]]*+\s+|[。\uff01\uff1f]+\s*|\n\s*\n\s*")
_WORD = re.compile(r"\s*\S+\s*")

Span = tuple[int, int]


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


@dataclass(frozen=True, slots=True)
class Sizing:
    """How long a chunk may be, in tokens: `max_tokens` of text, and with title and `prompt` no more than the `window` its model reads.

    A `tokenizers.Tokenizer` counts without truncation or padding; a callable returns a text's length in tokens. Only a title or prompt that
    leaves no room for a quarter of `max_tokens` makes a chunk longer than the window.
    """

    max_tokens: int
    tokenizer: "Tokenizer | Callable[[str], int]"
    window: int = 1 << 30
    prompt: str = ""


class _Counter:
    """Counts tokens of many texts; a short ASCII text is not looked at, since no tokenizer makes more than two tokens of a character."""

    def __init__(self, sizing: Sizing) -> None:
        self.sizing = sizing
        self.special = 0
        self.counting: Tokenizer | Callable[[str], int] = sizing.tokenizer
        if not callable(sizing.tokenizer):
            self.counting = type(sizing.tokenizer).from_str(sizing.tokenizer.to_str())
            self.counting.no_truncation()
            self.counting.no_padding()
            self.special = self.counting.num_special_tokens_to_add(is_pair=False)

    def __call__(self, texts: Sequence[str], *, enough: int = 0) -> list[int]:
        """Tokens of each text; those that cannot reach `enough` may count as 0."""
        counts = [0] * len(texts)
        open_ones = [row for row, text in enumerate(texts) if not (text.isascii() and 2 * len(text) < enough)]
        counting = self.counting
        if callable(counting):
            found = [counting(texts[row]) for row in open_ones]
        else:
            found = [len(each.ids) for each in counting.encode_batch_fast([texts[row] for row in open_ones], add_special_tokens=False)]
        for row, tokens in zip(open_ones, found, strict=True):
            counts[row] = tokens
        return counts

    def inputs(self, texts: Sequence[str]) -> list[int]:
        """Tokens of what the model is given for each text."""
        room = self.sizing.window - self.special
        return [tokens + self.special for tokens in self([self.sizing.prompt + text for text in texts], enough=room)]


class Chunker:
    """Cuts documents into chunks; nothing but whitespace at the cuts is lost.

    `strategy` "structure" cuts Markdown along its structure and other text at paragraphs, then sentences, then words; "sentence" fills
    chunks with whole sentences; "fixed" fills them with words. Chunks repeat up to `overlap` tokens of the one before. A document within
    the limit is one chunk, its whole text. One without text is one chunk of its title; one without either has none.
    """

    def __init__(self, sizing: Sizing, *, strategy: str = "structure", overlap: int = 0) -> None:
        self.sizing = sizing
        self.strategy = strategy
        self.overlap = overlap
        self.count = _Counter(sizing)
        self._splitters: dict[tuple[bool, int], Callable[[str], list[tuple[int, str]]]] = {}

    def chunks(self, documents: Iterable[Document]) -> Iterator[list[Chunk]]:
        """The chunks of each document, in order."""
        stream = iter(documents)
        while block := list(islice(stream, BATCH)):
            for document, spans in zip(block, self._spans(block), strict=True):
                yield list(_chunks(document, spans))

    def truncated(self, chunks: Sequence[Chunk]) -> list[bool]:
        """For each chunk whether its model would cut off the end of what stands for it: prompt, title and text."""
        tokens = self.count.inputs([embedded_text(chunk.title, chunk.text) for chunk in chunks])
        return [count > self.sizing.window for count in tokens]

    def _spans(self, block: Sequence[Document]) -> list[list[Span]]:
        texts = [document.text if document.text.strip() else "" for document in block]
        limits = self._limits(block)
        counts = self.count(texts, enough=min(limits))
        whole = [[(0, len(text))] if text else [] for text in texts]
        return [
            self._cut(document, limit) if count > limit else spans
            for document, limit, count, spans in zip(block, limits, counts, whole, strict=True)
        ]

    def _limits(self, block: Sequence[Document]) -> list[int]:
        most = self.sizing.max_tokens
        room = self.sizing.window - self.count.special - 1
        around = self.count([f"{self.sizing.prompt}{document.title}\n" for document in block], enough=room - most)
        # in steps of 8, because making a splitter takes 30 ms
        return [most if room - tokens >= most else max((room - tokens) // 8 * 8, most // 4, 1) for tokens in around]

    def _cut(self, document: Document, limit: int) -> list[Span]:
        if self.strategy == "structure":
            markdown = markup_of(document) == "markdown"
            return [(start, start + len(text)) for start, text in self._splitter(limit, markdown=markdown)(document.text)]
        text = document.text
        units = _sentences(text) if self.strategy == "sentence" else [match.span() for match in _WORD.finditer(text)]
        packed = _pack(units, self.count([text[start:end] for start, end in units]), limit=limit, overlap=min(self.overlap, limit // 2))
        spans = [_trimmed(text, span) for span in packed]
        counts = self.count([text[start:end] for start, end in spans], enough=limit)
        fitted: list[Span] = []
        for (start, end), tokens in zip(spans, counts, strict=True):
            if tokens > limit:
                fitted.extend((start + at, start + at + len(piece)) for at, piece in self._splitter(limit, markdown=False)(text[start:end]))
            elif end > start:
                fitted.append((start, end))
        return fitted

    def _splitter(self, limit: int, *, markdown: bool) -> Callable[[str], list[tuple[int, str]]]:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter

        key = markdown, limit
        if key not in self._splitters:
            kind: type[MarkdownSplitter | TextSplitter] = MarkdownSplitter if markdown else TextSplitter
            counting, overlap = self.count.counting, min(self.overlap, limit // 2)
            make = kind.from_callback if callable(counting) else kind.from_huggingface_tokenizer
            self._splitters[key] = make(counting, limit, overlap=overlap).chunk_indices  # type: ignore[arg-type]
        return self._splitters[key]


def _sentences(text: str) -> list[Span]:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    edges = [0, *ends, *([len(text)] if not ends or ends[-1] < len(text) else [])]
    return list(pairwise(edges))


def _pack(units: Sequence[Span], counts: Sequence[int], *, limit: int, overlap: int) -> Iterator[Span]:
    """Neighbouring units together, as many as fit into `limit` tokens; the last ones, up to `overlap` tokens, open the next pack again."""
    first, tokens = 0, 0
    for at, count in enumerate(counts):
        if at > first and tokens + count > limit:
            yield units[first][0], units[at - 1][1]
            kept = 0
            first = at
            while first and kept + counts[first - 1] <= min(overlap, limit - count):
                first -= 1
                kept += counts[first]
            tokens = kept
        tokens += count
    if units:
        yield units[first][0], units[-1][1]


def _trimmed(text: str, span: Span) -> Span:
    passage = text[slice(*span)]
    start = span[0] + len(passage) - len(passage.lstrip())
    return start, max(start, span[0] + len(passage.rstrip()))


def markup_of(document: Document) -> str:
    """How headings are written in a document: its metadata says it, or its uri ends in .md."""
    return str(document.metadata.get("markup", "")) or ("markdown" if document.uri.lower().endswith(".md") else "")


def _chunks(document: Document, spans: Sequence[Span]) -> Iterator[Chunk]:
    if not spans and document.title.strip():
        yield _chunk(document, "", document.title, (0, 0))
    marks = headings(document.text, markup_of(document)) if spans else []
    path: list[tuple[int, str]] = []
    position = 0
    for start, end in spans:
        text = document.text[start:end]
        first = start + len(text) - len(text.lstrip())
        while position < len(marks) and marks[position][0] <= first:
            _, level, title = marks[position]
            path = [*(each for each in path if each[0] < level), (level, title)]
            position += 1
        yield _chunk(document, " > ".join(title for _, title in path if title), text, (start, end))


def _chunk(document: Document, heading_path: str, text: str, span: Span) -> Chunk:
    identity = json.dumps([document.doc_id, *span, text])
    chunk_id = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Chunk(chunk_id, document.doc_id, document.uri, document.title, heading_path, text, *span)
