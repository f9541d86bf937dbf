"""Where bytes live: one small interface, and the local folder that satisfies it.

Keys are `/`-separated names, never paths. Every write is durable when the call returns: temporary sibling, fsync, rename, fsync of the folder.
"""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from rag_serving.errors import AlreadyExists, StoreError

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_STAGING = ".staging-"
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}


class Store(Protocol):
    """Named bytes and write-once folders. An object store can satisfy it: `create` is a conditional put, `publish` an upload."""

    def read(self, key: str) -> bytes:
        """The bytes under `key`; StoreError when there are none."""

    def write(self, key: str, data: bytes) -> None:
        """Put `data` under `key`, replacing what was there; readers see the old or the new bytes, never a mix."""

    def create(self, key: str, data: bytes) -> None:
        """Put `data` under `key` only if the key is free; AlreadyExists otherwise. Of two callers at once exactly one succeeds."""

    def remove(self, key: str) -> None:
        """Take away the bytes or the folder under `key`, at once for every reader; nothing happens when there are none."""

    def exists(self, key: str) -> bool:
        """Whether bytes or a folder stand under `key`."""

    def names(self, prefix: str) -> list[str]:
        """Names directly below `prefix`, sorted; unfinished work is left out."""

    def staging(self, key: str) -> AbstractContextManager[Path]:
        """A private local folder that becomes `key` through `publish`; removed on leaving if it was not published."""

    def publish(self, folder: Path, key: str) -> None:
        """Make a staged folder durable and visible as `key` in one step; AlreadyExists when the key is taken."""

    def idle_days(self, key: str) -> float:
        """Days since anything under `key` last changed; StoreError when there is nothing."""

    def leftovers(self, *, idle_days: float) -> dict[str, int]:
        """What interrupted work left behind and nobody touched for so long: its name and its size in bytes."""

    def discard(self, leftover: str) -> None:
        """Free the bytes of a leftover."""

    def folder(self, key: str) -> Path:
        """A local folder that holds the published files of `key`; StoreError when there is none."""


class LocalStore:
    """A store in a local folder, created on first write."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def read(self, key: str) -> bytes:
        path = self._path(key)
        try:
            return path.read_bytes()
        except OSError as error:
            raise StoreError(f"cannot read {key!r} from the store at {self.root}: {error.strerror}.", fix="Run `ragline doctor`.") from None

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        temporary = self._temporary(path, data)
        try:
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise self._unwritable(key, error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def create(self, key: str, data: bytes) -> None:
        path = self._path(key)
        temporary = self._temporary(path, data)
        try:
            os.link(temporary, path)
            sync_folder(path.parent)
        except FileExistsError:
            raise AlreadyExists(f"{key!r} is already in the store.", fix="Read it and decide again.") from None
        except OSError as error:
            raise self._unwritable(key, error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, key: str) -> None:
        path = self._path(key)
        gone = path.parent / f"{_STAGING}{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            path.rename(gone)
            sync_folder(path.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unwritable(key, error) from None
        if gone.is_dir():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            gone.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return self._path(key).exists()

    def names(self, prefix: str) -> list[str]:
        path = self._path(prefix)
        if not path.is_dir():
            return []
        return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))

    @contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        folder = path.parent / f"{_STAGING}{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            self._make(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, key: str) -> None:
        path = self._path(key)
        self._make(path.parent)
        try:
            sync_tree(folder)
            if path.exists():  # rename() would replace an empty folder
                raise FileExistsError
            folder.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            if folder.exists() and path.exists():
                raise AlreadyExists(f"{key!r} is already in the store.", fix="Open what is there.") from None
            raise self._unwritable(key, error) from None

    def idle_days(self, key: str) -> float:
        path = self._path(key)
        if not path.exists():
            raise StoreError(f"{key!r} is not in the store at {self.root}.", fix="Run `ragline status` to see what is.")
        return (time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*")))) / 86400

    def leftovers(self, *, idle_days: float) -> dict[str, int]:
        found = {}
        for parent, folders, files in os.walk(self.root):
            left = [name for name in (*folders, *files) if name.startswith(_STAGING)]
            folders[:] = [name for name in folders if name not in left]
            for path in (Path(parent) / name for name in left):
                entries = [path, *path.rglob("*")]
                with suppress(FileNotFoundError):
                    states = [entry.lstat() for entry in entries]
                    if time.time() - max(state.st_mtime for state in states) >= idle_days * 86400:
                        found[path.relative_to(self.root).as_posix()] = sum(state.st_size for state in states)
        return found

    def discard(self, leftover: str) -> None:
        path = self.root / leftover
        if not path.name.startswith(_STAGING) or ".." in path.parts:
            raise StoreError(f"{leftover!r} is not unfinished work.", fix="Give a name that `leftovers` found.")
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)

    def folder(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_dir():
            raise StoreError(f"{key!r} is not in the store at {self.root}.", fix="Run `ragline status` to see what is.")
        return path

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not all(_PART.fullmatch(part) for part in parts):
            raise StoreError(f"{key!r} is not a valid store key.", fix="Use letters, digits, '.', '_' and '-', parts joined by '/'.")
        return self.root.joinpath(*parts)

    def _make(self, folder: Path) -> None:
        try:
            missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for made in missing:
                sync_folder(made.parent)
        except OSError as error:
            raise StoreError(f"cannot create {folder}: {error.strerror}.", fix="Set RAGLINE_STORE to a folder you can write.") from None

    def _unwritable(self, key: str, error: OSError) -> StoreError:
        return StoreError(f"cannot write {key!r} to the store at {self.root}: {error.strerror}.", fix="Free space or correct the rights.")

    def _temporary(self, path: Path, data: bytes) -> Path:
        self._make(path.parent)
        temporary = path.parent / f"{_STAGING}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(
                f"cannot write to the store at {self.root}: {error.strerror}.", fix="Free space or correct the rights."
            ) from None
        return temporary


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable; a file system that cannot sync folders is taken as it is, any other failure is an OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable, leaves first."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))
