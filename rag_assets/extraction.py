"""From the bytes of one file to its text, by format. Runs in a process of its own (rag_assets.parser_process)."""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from rag_assets.encodings import decode
from rag_assets.hypertext import HIDING_STYLE, read_page
from rag_assets.markup import Markup, title_of
from rag_assets.office import examine, with_stand_ins, without_stand_ins
from rag_assets.sources.items import Refused, Scalar
from rag_assets.sources.media import FORMATS

_MIME = {
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".pdf": "application/pdf",
}
_STYLED = re.compile(r"<[a-zA-Z][^<>]{0,500}?style\s*=\s*[\"']([^\"'<>]{0,500})[\"']|<[a-zA-Z][^<>]{0,500}?\shidden[\s>]")
_UNSEEN_LETTERS = re.compile("[\U000e0020-\U000e007f]")
_ESCAPED = re.compile(r"\\([&<>*_~`()\[\]!.])")
"""Escapes of Markdown that would stand between a word and the search for it; those of # and | keep lines what they are."""
_HTML_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_-]{1,40})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Extracted:
    """Title ("" when it has none), text, and what is worth knowing: markup, encoding when not UTF-8, pages, suspicious."""

    title: str
    text: str
    metadata: dict[str, Scalar] = field(default_factory=dict)


def extract(data: bytes, name: str, suffix: str, *, charset: str = "", max_pages: int) -> Extracted:
    """The text of a file of one of FORMATS. Refused says why there is none."""
    if not data:
        raise Refused("empty", "it holds no bytes")
    kind = FORMATS.get(suffix)
    if kind is None:
        raise Refused("unsupported", f"no text is made of {suffix or 'a file without suffix'}")
    found = _by_library(data, suffix, max_pages) if kind in ("office", "pdf") else _from_text(data, name, suffix, charset)
    if not found.text.strip():
        raise Refused("no_text", "no text was found in it")
    if _UNSEEN_LETTERS.search(found.text):
        found.metadata["suspicious"] = "hidden_text"
    try:
        f"{found.title}{found.text}".encode()
    except UnicodeEncodeError as error:
        raise Refused("invalid_text", f"it holds half a character, {error.object[error.start]!a}, which no file can store") from None
    return found


def _from_text(data: bytes, name: str, suffix: str, charset: str) -> Extracted:
    kind = FORMATS[suffix]
    declared = _HTML_CHARSET.search(data[:4096]) if kind == "html" else None
    text, encoding = decode(data, told=declared[1].decode() if declared else charset)
    facts: dict[str, Scalar] = {} if encoding == "utf-8" else {"encoding": encoding}
    title = ""
    markup: Markup = ""
    if kind == "html":
        page = read_page(text)
        title, text, markup = page.title, page.text, "markdown"
        facts |= {"suspicious": "hidden_text"} if page.hidden else {}
    elif kind in ("markdown", "rst"):
        markup = "markdown" if kind == "markdown" else "rst"
        title = title_of(text, markup)
        facts |= {"suspicious": "hidden_text"} if kind == "markdown" and _hides_text(text) else {}
    elif kind == "table":
        text = _rows(text)
    elif kind == "json":
        title, text = _json(text)
    elif kind == "code":
        title = PurePosixPath(name).name
    return Extracted(title, text, {**facts, **({"markup": markup} if markup else {})})


def _hides_text(text: str) -> bool:
    styled = (match[1] for match in _STYLED.finditer(text))
    return any(style is None or HIDING_STYLE.search(style) for style in styled)


def _rows(text: str) -> str:
    """Each row with the names of its columns, so that a passage of a long table says what its numbers are."""
    csv.field_size_limit(len(text) + 1)
    try:
        dialect: type[csv.Dialect] = csv.Sniffer().sniff(text[:8192], delimiters=",;\t|")
    except csv.Error:
        dialect = csv.excel
    try:
        rows = csv.reader(io.StringIO(text, newline=""), dialect)
        names = [name.strip() for name in next(rows, [])]
        lines = [" | ".join(names)]
        for row in rows:
            named = [f"{names[at]}: {cell}" if at < len(names) and names[at] else cell for at, cell in enumerate(row) if cell.strip()]
            lines += [" | ".join(named)] if named else []
    except csv.Error as error:
        raise Refused("damaged", f"it is no table: {error}") from None
    return "\n".join(lines)


def _json(text: str) -> tuple[str, str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"it is not valid JSON: {error}") from None
    title = content.get("title") or content.get("name") if isinstance(content, dict) else ""
    return title if isinstance(title, str) else "", text if "\n" in text.strip() else json.dumps(content, indent=1, ensure_ascii=False)


def _by_library(data: bytes, suffix: str, max_pages: int) -> Extracted:
    from kreuzberg import ConcurrencyConfig, ExtractionConfig, extract_bytes_sync
    from kreuzberg.exceptions import KreuzbergError

    facts: dict[str, Scalar] = {}
    if suffix != ".pdf" and examine(data, suffix):
        facts["suspicious"] = "hidden_text"
    config = ExtractionConfig(
        use_cache=False, enable_quality_processing=False, output_format="markdown", concurrency=ConcurrencyConfig(max_threads=1)
    )
    try:
        result = extract_bytes_sync(with_stand_ins(data) if suffix == ".docx" else data, _MIME[suffix], config=config)
    except KreuzbergError as error:
        locked = re.search(r"password|encrypt", str(error), re.IGNORECASE)
        # its message may quote the document, and details are shown in runs
        raise Refused("encrypted" if locked else "damaged", f"it cannot be read: the parser raised {type(error).__name__}") from None
    about: dict[str, Any] = dict(result.metadata)
    pages = next((count for key in ("page_count", "slide_count", "sheet_count") if isinstance(count := about.get(key), int)), 0)
    if pages > max_pages:
        raise Refused("too_many_pages", f"it has {pages:,} pages; at most {max_pages:,} are read")
    facts |= {"pages": pages} if pages else {}
    named = about.get("title") or (about.get("core_properties") or {}).get("title") or ""
    text = without_stand_ins(_ESCAPED.sub(r"\1", result.content))
    title = named.strip() if isinstance(named, str) else ""
    if not title and suffix != ".xlsx":  # whose headings are the names of its sheets
        title = title_of(text, "markdown")
    return Extracted(without_stand_ins(title), text, {**facts, "markup": "markdown"})
