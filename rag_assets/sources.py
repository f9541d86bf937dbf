"""Where documents come from: the sample, a folder of files, a JSON Lines file or a BEIR collection."""

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, Protocol

from evals.collections import EvalSetError, json_lines, plain_or_gz
from rag_serving.errors import SourceError

Scalar = str | int | float | bool
SOURCE_SCHEMES = ("sample:", "sample:small", "folder:PATH", "jsonl:PATH", "beir:PATH")
SUFFIXES = (".md", ".txt", ".rst", ".html", ".htm")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file a corpus is read from; `size` in bytes. `uri` is relative to the source, so equal corpora hash equal on any machine."""

    uri: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed text. `doc_id` comes from the source (its own id, or the file's relative path), never from a position."""

    doc_id: str
    uri: str
    title: str
    text: str
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


class Source(Protocol):
    """`files()` and `documents()` come in a stable order and raise SourceError; a source that holds nothing is an error, not empty."""

    @property
    def uri(self) -> str: ...

    def files(self) -> Iterator[SourceFile]: ...

    def documents(self) -> Iterator[Document]: ...


def hash_file(path: Path, uri: str) -> SourceFile:
    """Size and sha256 of a file's bytes. SourceError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return SourceFile(uri, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(
        f"cannot read {path}: {error.strerror or error}.", fix="Make it readable for this user, or move it out of the source."
    )


class _HtmlText(HTMLParser):
    """Collects visible text: a blank line between blocks, "- " before list items, <pre> as it stands."""

    HIDDEN = frozenset({"script", "style", "template", "noscript", "svg"})
    BLOCK = re.compile(
        r"address|article|aside|blockquote|body|d[dlt]|div|fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|li|main|nav|note|ol|p|pre"
        r"|section|table|tbody|tfoot|thead|title|tr|ul"
    )
    HEADING = re.compile(r"h[1-6]")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = [""]
        self.page_title = ""
        self.heading = ""
        self._hidden = 0
        self._pre = 0
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - the parser's own signature
        self._hidden += tag in self.HIDDEN
        self._pre += tag == "pre"
        if self.BLOCK.fullmatch(tag):
            # <li><p>text</p></li> stays one item: the paragraph continues the open "- ".
            if self.blocks[-1].strip() != "-":
                self.blocks.append("- " if tag == "li" else "")
            if tag == "title" or (self.HEADING.fullmatch(tag) and not self.heading.strip()):
                self._within = tag
        elif tag == "br":
            self.blocks[-1] += "\n" if self._pre else " "
        elif tag in ("td", "th"):
            self.blocks[-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self.HIDDEN))
        self._pre = max(0, self._pre - (tag == "pre"))
        if tag == self._within:
            self._within = ""
        if self.BLOCK.fullmatch(tag):
            self.blocks.append("")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._within == "title":
            self.page_title += data
            return
        if self._within:
            self.heading += data
        self.blocks[-1] += data if self._pre else re.sub(r"\s+", " ", data)

    def text(self) -> str:
        blocks = [re.sub(r"(?<=\S)  +", " ", block).strip() if "\n" not in block else block.strip("\n").rstrip() for block in self.blocks]
        joined = ""
        for block in (block for block in blocks if block not in ("", "-")):
            joined += ("\n" if block.startswith("- ") else "\n\n") + block
        return joined.strip()


def html_text(page: str) -> tuple[str, str]:
    """Title and visible text of an HTML page or fragment. The title is the first heading, else <title>, else empty."""
    parser = _HtmlText()
    parser.feed(page)
    parser.close()
    return " ".join((parser.heading or parser.page_title).split()), parser.text()


_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*$", re.DOTALL | re.MULTILINE)
_RST_HEADING = re.compile(r"^(?P<title>(?=.*\w)\S.*?)[ \t]*\n(?P<line>(?P<mark>[=\-`:.'\"~^_*+#<>])(?P=mark)*)[ \t]*$", re.MULTILINE)


def markdown_headings(text: str) -> list[tuple[int, int, str]]:
    """(character offset, level 1-6, title) of each heading of a Markdown text, in order. Code blocks and front matter hold none."""
    from markdown_it import MarkdownIt

    masked = _FRONT_MATTER.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]
    tokens = MarkdownIt("commonmark").parse(masked)
    headings = []
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open" and token.map:
            words = "".join(child.content or " " for child in inline.children or ())
            headings.append((starts[token.map[0]], int(token.tag[1]), " ".join(words.split())))
    return headings


def _markdown_title(text: str) -> str:
    front = _FRONT_MATTER.match(text)
    named = re.search(r"^title:[ \t]*(.+?)[ \t]*$", front[1], re.MULTILINE) if front else None
    return named[1].strip("'\"") if named else next((title for _, _, title in markdown_headings(text) if title), "")


def parse_text(text: str, suffix: str) -> tuple[str, str]:
    """Title ("" if it has none) and text of a file's content, by its suffix (one of SUFFIXES)."""
    if suffix in (".html", ".htm"):
        return html_text(text)
    if suffix == ".md":
        return _markdown_title(text), text
    underlined = _RST_HEADING.finditer(text) if suffix == ".rst" else ()
    return next((match["title"] for match in underlined if len(match["line"]) >= len(match["title"])), ""), text


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Every .md, .txt, .rst and .html file under a folder, by relative path. Hidden files are skipped, links out of the folder refused.

    A link to a file within the folder is read as a file; a link to a folder within it is not followed: its files are read in place.
    """

    uri: str
    folder: Path

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            raise SourceError(f"no folder at {self.folder}.", fix="Create it, or correct corpus.source in ragline.toml.")
        home = self.folder.resolve()
        found: list[Path] = []

        def refuse(error: OSError) -> None:
            raise _unreadable(Path(error.filename), error)

        for where, folders, files in os.walk(self.folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            read = [name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
            for path in (Path(where, name) for name in [*folders, *read]):
                if path.is_symlink() and not path.resolve().is_relative_to(home):
                    raise SourceError(f"{path} links out of the folder, to {path.resolve()}.", fix="Copy the files in, or remove the link.")
            found.extend(Path(where, name) for name in read)
        if not found:
            raise SourceError(f"{self.folder} holds no readable document.", fix=f"Put files ending in {', '.join(SUFFIXES)} there.")
        for path in found:
            if self._id_of(path).encode(errors="ignore").decode() != self._id_of(path):
                raise SourceError(f"the file name {os.fsencode(path)!r} is not UTF-8.", fix="Rename it, or move it out of the source.")
        return sorted(found, key=self._id_of)

    def _id_of(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def files(self) -> Iterator[SourceFile]:
        return (hash_file(path, self._id_of(path)) for path in self._paths())

    def documents(self) -> Iterator[Document]:
        for path in self._paths():
            try:
                content = path.read_text(encoding="utf-8-sig")
            except OSError as error:
                raise _unreadable(path, error) from None
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path} is not UTF-8 at byte {error.start}.", fix="Save it as UTF-8, or move it out of the source."
                ) from None
            title, text = parse_text(content, path.suffix.lower())
            yield Document(self._id_of(path), self._id_of(path), title or path.stem, text, {"suffix": path.suffix.lower()})


@dataclass(frozen=True, slots=True)
class LinesSource:
    """A JSON Lines file, gzipped or not: an id, `text`, and where present `title`, `uri` or `url`, `metadata`.

    A document with neither text nor title is read, but gets no chunk. Metadata that is a list or an object is kept as JSON text.
    """

    uri: str
    path: Path
    id_fields: tuple[str, ...]

    def files(self) -> Iterator[SourceFile]:
        return iter([hash_file(self.path, self.path.name)])

    def documents(self) -> Iterator[Document]:
        seen: dict[str, int] = {}
        try:
            for number, row in json_lines(self.path):
                document = self._document(row, number)
                if document.doc_id in seen:
                    raise SourceError(
                        f"{self.path}: id {document.doc_id!r} on lines {seen[document.doc_id]} and {number}.",
                        fix="Give each document its own id.",
                    )
                seen[document.doc_id] = number
                yield document
        except EvalSetError as error:
            raise SourceError(error.what, fix=error.fix) from None
        if not seen:
            raise SourceError(f"{self.path} holds no documents.", fix="Put one JSON object on each line.")

    def _document(self, row: dict[str, Any], number: int) -> Document:
        doc_id = next((row[name] for name in self.id_fields if name in row), None)
        doc_id = str(doc_id) if isinstance(doc_id, int) and not isinstance(doc_id, bool) else doc_id
        title, text, metadata = row.get("title") or "", row.get("text"), row.get("metadata") or {}
        if not (isinstance(doc_id, str) and doc_id and isinstance(text, str) and isinstance(title, str) and isinstance(metadata, dict)):
            raise SourceError(
                f"{self.path}, line {number}: no usable document.",
                fix=f"Each needs {' or '.join(self.id_fields)} and text; title is text, metadata an object.",
            )
        uri = next((each for each in (row.get("uri"), row.get("url"), metadata.get("url")) if isinstance(each, str) and each), None)
        scalars = {
            key: value if isinstance(value, Scalar) else json.dumps(value, sort_keys=True)
            for key, value in metadata.items()
            if value is not None
        }
        return Document(doc_id, uri or f"{self.path.name}#{doc_id}", title, text, scalars)


def _beir(address: str, folder: Path) -> LinesSource:
    corpus = plain_or_gz(folder / "corpus.jsonl")
    if corpus is None:
        raise SourceError(f"no corpus.jsonl or corpus.jsonl.gz in {folder}.", fix="Give the folder of a BEIR collection.")
    return LinesSource(address, corpus, ("_id",))


def open_source(address: str, *, root: Path) -> Source:
    """The source at an address (SOURCE_SCHEMES); paths are relative to `root`. Raises SourceError.

    A bare path is a BEIR collection if it holds corpus.jsonl[.gz], else a folder or a JSON Lines file.
    """
    scheme, colon, rest = address.partition(":")
    tiers: dict[str, Literal["full", "small"]] = {"": "full", "full": "full", "small": "small"}
    if colon and scheme == "sample" and rest in tiers:
        from rag_assets.sample import SampleSource

        return SampleSource(address, tiers[rest])
    bare = root / address
    if not colon or scheme not in ("folder", "jsonl", "beir"):
        if address and bare.is_dir():
            scheme, rest = ("beir" if plain_or_gz(bare / "corpus.jsonl") else "folder"), address
        elif address and bare.is_file() and bare.name.endswith((".jsonl", ".jsonl.gz")):
            scheme, rest = "jsonl", address
        else:
            close = difflib.get_close_matches(address, ["sample:", "sample:small"], n=1)
            valid = f"Valid: {', '.join(SOURCE_SCHEMES)}, or the path of a folder."
            raise SourceError(f"no source at {address!r}.", fix=f"Did you mean {close[0]!r}? {valid}" if close else valid)
    if not rest:
        raise SourceError(f"{address!r} names no path.", fix=f"Write {scheme}:PATH, relative to the folder of ragline.toml.")
    if scheme == "folder":
        return FolderSource(address, root / rest)
    if scheme == "beir":
        return _beir(address, root / rest)
    if not (root / rest).is_file():
        raise SourceError(f"no file at {root / rest}.", fix="Correct corpus.source in ragline.toml.")
    return LinesSource(address, root / rest, ("id", "_id"))
