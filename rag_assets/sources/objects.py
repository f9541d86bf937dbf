"""A prefix of an object store, or any other file system that fsspec knows, as a source."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from rag_assets.sources.items import Item, Refused
from rag_assets.sources.lines import LineFile
from rag_assets.sources.media import FORMATS
from rag_serving.errors import SourceError

_CONTENT_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "sha256")
_CHANGE_MARKS = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class ObjectsSource:
    """Every object under a prefix whose suffix is in FORMATS, in the order of their keys, listed a folder at a time.

    `version` is the store's content tag (ETag, MD5), else size and time of change. Credentials are what fsspec's file system reads from the
    environment.
    """

    uri: str
    url: str

    def items(self) -> Iterator[Item]:
        empty = True
        for key, name, info in self._walk():
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in FORMATS:
                empty = False
                yield Item(name, _version(info), suffix, int(info.get("size") or 0), _reader(self._open, key), {"suffix": suffix})
        if empty:
            raise SourceError(f"{self.uri} holds no readable document.", fix=f"Put objects ending in {', '.join(FORMATS)} there.")

    def line_files(self) -> list[LineFile]:
        """The JSON Lines files under the prefix, or the one it names."""
        found = [(key, name) for key, name, _ in self._walk() if name.endswith((".jsonl", ".jsonl.gz"))]
        return [(name, lambda key=key: self._open(key)) for key, name in found]  # type: ignore[misc]

    def _system(self) -> tuple[Any, str]:
        import fsspec

        try:
            system, prefix = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise SourceError(f"{self.uri} needs a package that is not installed: {error}.", fix="Install it beside ragline.") from None
        except ValueError as error:
            raise SourceError(f"{self.uri} is no address that fsspec knows: {error}.", fix="Write s3://bucket/prefix or alike.") from None
        return system, prefix.rstrip("/")

    def _open(self, key: str) -> BinaryIO:
        opened: BinaryIO = self._system()[0].open(key, "rb")
        return opened

    def _walk(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Key, name below the prefix, and what the store says of each object; hidden ones are left out."""
        system, prefix = self._system()
        try:
            system.invalidate_cache()
            if system.isfile(prefix):
                yield prefix, PurePosixPath(prefix).name, system.info(prefix)
                return
            levels = [iter(_listing(system, prefix))]
            while levels:
                info = next(levels[-1], None)
                if info is None:
                    levels.pop()
                elif info["type"] == "directory":
                    levels.append(iter(_listing(system, info["name"])))
                else:
                    yield info["name"], info["name"].removeprefix(prefix).lstrip("/"), info
        except SourceError:
            raise
        except Exception as error:  # noqa: BLE001 - each store's package has errors of its own
            raise SourceError(f"cannot list {self.uri}: {error}.", fix="Correct the address or the credentials.") from None


def _listing(system: Any, folder: str) -> list[Mapping[str, Any]]:
    entries = [info for info in system.ls(folder, detail=True) if info["name"].rstrip("/") != folder.rstrip("/")]
    shown = [info for info in entries if not PurePosixPath(info["name"]).name.startswith(".")]
    return sorted(shown, key=lambda info: info["name"].rstrip("/") + "/" * (info["type"] == "directory"))


def _version(info: Mapping[str, Any]) -> str:
    tag = next((f"{name}:{info[name]}" for name in _CONTENT_TAGS if info.get(name)), None)
    marks = {name: str(info[name]) for name in ("size", *_CHANGE_MARKS) if info.get(name) is not None}
    return tag or hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()


def _reader(opened: Callable[[str], BinaryIO], key: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with opened(key) as file:
                return file.read()
        except Exception as error:  # noqa: BLE001 - each store's package has errors of its own
            raise Refused("unreadable", f"it cannot be read: {error}", passing=True) from None

    return read
