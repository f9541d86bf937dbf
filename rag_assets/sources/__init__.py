"""Where documents come from: the sample, folders, JSON Lines, BEIR collections, object stores and lists of web addresses."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evals.collections import plain_or_gz
from rag_assets.sources.items import DOCUMENT, Document, Item, Refused, Scalar, Source
from rag_serving.errors import SourceError
from rag_serving.settings import Parsing, Settings

__all__ = [
    "DOCUMENT",
    "SOURCE_SCHEMES",
    "Document",
    "Item",
    "Refused",
    "Scalar",
    "Source",
    "corpus_source",
    "markdown_headings",
    "open_source",
]


@dataclass(frozen=True, slots=True)
class _Asked:
    """An address taken apart, with what its source may need."""

    address: str
    rest: str
    root: Path
    limits: Parsing
    private_hosts: tuple[str, ...]


def _sample(asked: _Asked) -> Source:
    from rag_assets.sample import SampleSource

    return SampleSource(asked.address, "small" if asked.rest == "small" else "full")


def _folder(asked: _Asked) -> Source:
    from rag_assets.sources.folder import FolderSource

    return FolderSource(asked.address, asked.root / asked.rest)


def _jsonl(asked: _Asked) -> Source:
    from rag_assets.sources.lines import LinesSource, local_files

    if "://" in asked.rest:
        from rag_assets.sources.objects import ObjectsSource

        return LinesSource(asked.address, ObjectsSource(asked.address, asked.rest).line_files)
    path = asked.root / asked.rest
    if not path.exists():
        raise SourceError(f"no file at {path}.", fix="Correct corpus.source in ragline.toml.")
    return LinesSource(asked.address, lambda: local_files(path))


def _beir(asked: _Asked) -> Source:
    from rag_assets.sources.lines import LinesSource, local_files

    folder = asked.root / asked.rest
    corpus = plain_or_gz(folder / "corpus.jsonl")
    if corpus is None:
        raise SourceError(f"no corpus.jsonl or corpus.jsonl.gz in {folder}.", fix="Give the folder of a BEIR collection.")
    return LinesSource(asked.address, lambda: local_files(corpus), ("_id",))


def _urls(asked: _Asked) -> Source:
    from rag_assets.sources.urls import UrlsSource

    return UrlsSource(asked.address, asked.root / asked.rest, asked.limits, asked.private_hosts)


def _objects(asked: _Asked) -> Source:
    from rag_assets.sources.objects import ObjectsSource

    return ObjectsSource(asked.address, asked.rest)


_SCHEMES: Mapping[str, tuple[str, Callable[[_Asked], Source]]] = {
    "sample": ("sample:", _sample),
    "folder": ("folder:PATH", _folder),
    "jsonl": ("jsonl:PATH", _jsonl),
    "beir": ("beir:PATH", _beir),
    "urls": ("urls:FILE", _urls),
    "fsspec": ("fsspec:URL", _objects),
}
SOURCE_SCHEMES = ("sample:small", *(form for form, _ in _SCHEMES.values()), "s3://BUCKET/PREFIX")


def corpus_source(settings: Settings) -> Source:
    """The source that corpus.source names. Raises SourceError."""
    corpus = settings.corpus
    return open_source(corpus.source, root=settings.root, limits=settings.parsing, private_hosts=corpus.private_hosts)


def open_source(address: str, *, root: Path, limits: Parsing | None = None, private_hosts: tuple[str, ...] = ()) -> Source:
    """The source at an address (SOURCE_SCHEMES); paths are relative to `root`. Raises SourceError.

    A bare path is a BEIR collection if it holds corpus.jsonl[.gz], else a folder or a JSON Lines file. An address with "://" is read through
    fsspec. `limits` and `private_hosts` bound what `urls:` fetches.
    """
    scheme, colon, rest = address.partition(":")
    if rest.startswith("//") and scheme != "fsspec":
        scheme, rest = _remote(address), address
    elif not colon or scheme not in _SCHEMES or (scheme == "sample" and rest not in ("", "full", "small")):
        scheme, rest = _bare(address, root), address
    if not rest and scheme != "sample":
        raise SourceError(f"{address!r} names no path.", fix=f"Write {scheme}:PATH, relative to the folder of ragline.toml.")
    return _SCHEMES[scheme][1](_Asked(address, rest, root, limits or Parsing(), private_hosts))


def _remote(address: str) -> str:
    import fsspec

    scheme = address.partition(":")[0]
    if scheme in ("http", "https"):
        raise SourceError(f"{address!r} is one web address.", fix="Write it in a file, one address a line, and give urls:FILE.")
    if scheme not in fsspec.available_protocols():
        raise SourceError(f"no source at {address!r}.", fix=_valid(address))
    return "fsspec"


def _bare(address: str, root: Path) -> str:
    bare = root / address
    if address and bare.is_dir():
        return "beir" if plain_or_gz(bare / "corpus.jsonl") else "folder"
    if address and bare.is_file() and bare.name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    raise SourceError(f"no source at {address!r}.", fix=_valid(address))


def _valid(address: str) -> str:
    close = difflib.get_close_matches(address, ["sample:", "sample:small", "s3://"], n=1)
    valid = f"Valid: {', '.join(SOURCE_SCHEMES)}, or the path of a folder."
    return f"Did you mean {close[0]!r}? {valid}" if close else valid
