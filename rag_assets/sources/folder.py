"""A folder of files as a source."""

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rag_assets.sources.items import Item, Refused, refused_item
from rag_assets.sources.media import FORMATS
from rag_serving.errors import SourceError


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Every file under a folder whose suffix is in FORMATS, by relative path, in the order of the paths. Hidden files are skipped.

    A link to a file within the folder is read as a file; a link to a folder within it is not followed: its files are read in place. What
    cannot be read (a link out of the folder, in a loop or to nothing, a device, a file without permission, a name that is not UTF-8) is
    listed as an item that refuses, so that it is counted. `version` is the sha256 of the bytes.
    """

    uri: str
    folder: Path

    def items(self) -> Iterator[Item]:
        if not self.folder.is_dir():
            raise SourceError(f"no folder at {self.folder}.", fix="Create it, or correct corpus.source in ragline.toml.")
        home = self.folder.resolve()
        empty = True
        try:
            for item in self._walk(home):
                empty = False
                yield item
        except OSError as error:
            raise SourceError(f"cannot read {self.folder}: {error.strerror}.", fix="Make it readable for this user.") from None
        if empty:
            raise SourceError(
                f"{self.folder} holds no readable document.",
                fix=f"Put files ending in {', '.join(FORMATS)} there; hidden files are skipped.",
            )

    def _walk(self, home: Path) -> Iterator[Item]:
        # A stack, because a generator a folder level would end at Python's recursion limit.
        levels = [_entries(home)]
        while levels:
            entry = next(levels[-1], None)
            if entry is None:
                levels.pop()
            elif entry.is_dir(follow_symlinks=False):
                try:
                    levels.append(_entries(Path(entry.path)))
                except OSError as error:
                    relative = Path(entry.path).relative_to(home).as_posix()
                    yield refused_item(_printable(relative) + "/", "unreadable", f"the folder cannot be read: {error.strerror}")
            elif (item := _item(home, entry)) is not None:
                yield item


def _entries(folder: Path) -> "Iterator[os.DirEntry[str]]":
    """What a folder holds, in the order of whole paths ("a.md" before "a/b.md"), without what is hidden."""
    with os.scandir(folder) as found:
        seen = [entry for entry in found if not entry.name.startswith(".")]
    return iter(sorted(seen, key=lambda entry: os.fsencode(entry.name + "/" * entry.is_dir(follow_symlinks=False))))


def _item(home: Path, entry: "os.DirEntry[str]") -> Item | None:
    path = Path(entry.path)
    uri, suffix = path.relative_to(home).as_posix(), path.suffix.lower()
    leads_to_folder = entry.is_symlink() and os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises on a link it cannot follow
    if suffix not in FORMATS and not leads_to_folder:
        return None
    try:
        target = _target(home, path)
        if leads_to_folder:
            return None
        with _open(target) as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except Refused as refusal:
        return refused_item(_printable(uri), refusal.reason, refusal.what)
    return Item(uri, digest, suffix, size, partial(_read, target, size, digest), {"suffix": suffix})


def _target(home: Path, path: Path) -> Path:
    """The file itself behind whatever links lead to it. Refused when it is not in the folder, or is not there."""
    if _printable(str(path)) != str(path):
        raise Refused("name_not_utf8", "its name is not UTF-8")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) or error.errno == errno.ELOOP:
            raise Refused("link_loop", "its links lead in a circle") from None
        raise Refused("unreadable", f"it cannot be read: {error.strerror}") from None
    if not target.is_relative_to(home):
        raise Refused("outside", f"it links out of the folder, to {target}")
    return target


def _printable(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


def _open(path: Path) -> io.BufferedReader:
    """A regular file, opened without following a link and without waiting for the other end of a pipe. Raises Refused."""
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: PTH123, SIM115 - a descriptor, closed by the caller
    except OSError as error:
        raise Refused("unreadable", f"it cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Refused("not_a_file", "it is not a regular file")
    return file


def _read(path: Path, size: int, version: str) -> bytes:
    try:
        with _open(path) as file:
            data = file.read(size + 1)
    except Refused as refusal:
        raise Refused(refusal.reason, refusal.what, passing=True) from None
    except OSError as error:
        raise Refused("unreadable", f"it cannot be read: {error.strerror}", passing=True) from None
    if hashlib.sha256(data).hexdigest() != version:
        raise Refused("changed_meanwhile", "it changed between listing and reading; the next run takes the new one", passing=True)
    return data
