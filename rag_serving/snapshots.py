"""A snapshot: an immutable folder with a LanceDB table and a manifest of every byte. Written once, verified on every open."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rag_serving.errors import SnapshotError, StoreError
from rag_serving.settings import Rerank, Retrieval
from rag_serving.signals import contract, work
from rag_serving.store import Store, sync_folder

MANIFEST = "MANIFEST.json"
TABLE = "chunks"
FORMAT = 3
_PREFIX = "snapshots"
_ID = re.compile(r"[a-z0-9][a-z0-9-]{7,63}")
_BLOCK = 1 << 20
_VERSION_HINT = "latest_version_hint.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot is: `files` maps each path to its sha256 and size, `build_key` hashes every input of the build.

    `index` holds how vectors are searched, `retrieval` how signals are fused: what was measured is what is served. `built` is "full" or
    "incremental"; an incremental one began as its `parent`, and `delta` counts the rows that were added, changed and removed, all such rows
    since the last full build, and the builds since then. `restricted` counts the rows that not everyone may read. `rerank` holds the rule that
    orders the best passages anew, and what is stored for it: token vectors and their bytes, or the fingerprint of a cross-encoder.
    """

    build_key: str
    embedding_model: str
    fingerprint: str
    dims: int
    corpus_sha256: str
    documents: int
    rows: int
    chunking: Mapping[str, Any]
    index: Mapping[str, Any]
    retrieval: Mapping[str, Any]
    title_distinctness: float
    parent: str | None
    lancedb: str
    built_at: str
    files: Mapping[str, Mapping[str, Any]]
    built: str = "full"
    delta: Mapping[str, int] = field(default_factory=dict)
    restricted: int = 0
    rerank: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, indent=2).encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def snapshot_id(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.embedding_model.lower()).strip("-")[:40].rstrip("-")
        return f"{slug}-{self.sha256[:12]}"

    @property
    def bytes(self) -> int:
        return sum(int(entry["size"]) for entry in self.files.values())

    def fusion(self) -> Retrieval:
        return Retrieval.model_validate(self.retrieval)

    def reranking(self) -> Rerank | None:
        """How the best passages are ordered anew, with the default budget; None when they are not."""
        return Rerank.model_validate(self.rerank["rule"]) if self.rerank else None


def hash_file(path: Path) -> str:
    """sha256 of a regular file; a symbolic link is refused."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_tree(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below `folder` but its manifest, as relative path -> sha256 and size in bytes; SnapshotError for what is no plain file."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise SnapshotError(f"{name} in {folder.name} is a link or no regular file.", fix="Restore the snapshot or build it again.")
        if path.is_file() and name != MANIFEST:
            try:
                files[name] = {"sha256": hash_file(path), "size": path.stat().st_size}
            except OSError as error:
                raise SnapshotError(
                    f"{name} in {folder.name} cannot be read: {error.strerror}.", fix="Restore it or build it again."
                ) from None
    return files


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished staging folder."""
    path = folder / MANIFEST
    path.write_bytes(manifest.encode())
    sync_folder(folder)


def snapshot_ids(store: Store) -> list[str]:
    return [name for name in store.names(_PREFIX) if _ID.fullmatch(name)]


def snapshot_key(snapshot_id: str) -> str:
    """The store key of a snapshot; SnapshotError when the text is not a snapshot id."""
    if not _ID.fullmatch(snapshot_id):
        raise SnapshotError(f"{snapshot_id[:80]!r} is not a snapshot id.", fix="Run `ragline status` to see the snapshots.")
    return f"{_PREFIX}/{snapshot_id}"


def read_manifest(store: Store, snapshot_id: str) -> Manifest:
    """The manifest alone, checked against the id; cheap. Files are checked by `verify`."""
    try:
        folder = store.folder(snapshot_key(snapshot_id))
        data = (folder / MANIFEST).read_bytes()
        fields = json.loads(data)
        _check_format(snapshot_id, fields)
        manifest = Manifest(**fields)
        intact = manifest.snapshot_id == snapshot_id and manifest.encode() == data
    except SnapshotError:
        raise
    except StoreError:
        raise _absent(snapshot_id) from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        raise SnapshotError(f"the manifest of {snapshot_id} cannot be read.", fix="Restore the snapshot or build it again.") from None
    if not intact:
        raise SnapshotError(f"the manifest of {snapshot_id} was altered.", fix="Restore the snapshot or build it again.")
    return manifest


def _absent(snapshot_id: str) -> SnapshotError:
    return SnapshotError(f"there is no snapshot {snapshot_id}.", fix="Run `ragline status` to see the snapshots.")


def _check_format(snapshot_id: str, fields: Mapping[str, Any]) -> None:
    """SnapshotError for a manifest of another format: snapshots of formats 1 and 2 hold no access lists, so everyone could read them."""
    if (found := fields["format"]) != FORMAT:
        raise SnapshotError(
            f"{snapshot_id} has manifest format {found!r}; only format {FORMAT} is read.", fix="Build it again: `ragline run`."
        )


@work.worked(contract.VERIFY, lambda manifest: {contract.SNAPSHOT_ID: manifest.snapshot_id})
def verify(store: Store, snapshot_id: str) -> Manifest:
    """Hash every file of a snapshot against its manifest; SnapshotError names the first missing, extra or altered file."""
    manifest = read_manifest(store, snapshot_id)
    found = hash_tree(store.folder(snapshot_key(snapshot_id)))
    for name in sorted(set(manifest.files) | set(found)):
        if name not in found:
            problem = "is missing"
        elif name not in manifest.files:
            problem = "does not belong there"
        elif found[name] != manifest.files[name]:
            problem = "was altered"
        else:
            continue
        raise SnapshotError(f"{name} {problem} in snapshot {snapshot_id}.", fix="Restore the snapshot or build it again.")
    return manifest


Stamp = frozenset[tuple[str, int, int, int, int]]


def stamp_of(store: Store, snapshot_id: str) -> Stamp:
    """Path, inode, size and times of every file of a snapshot: while it is the same, nobody wrote, replaced or restored one.

    The time of the last change (ctime) cannot be set back. What it does not show is a disk that gives other bytes than were written.
    """
    try:
        folder = store.folder(snapshot_key(snapshot_id))
        found = [(path.relative_to(folder).as_posix(), path.lstat()) for path in folder.rglob("*")]
    except StoreError:
        raise _absent(snapshot_id) from None
    except OSError:
        raise SnapshotError(f"the files of {snapshot_id} cannot be read.", fix="Restore the snapshot or build it again.") from None
    return frozenset((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found)


def manifests(store: Store) -> Iterator[Manifest]:
    """Every manifest that can be read; a damaged one is passed over."""
    for snapshot_id in snapshot_ids(store):
        with suppress(SnapshotError):
            yield read_manifest(store, snapshot_id)


def find_by_build_key(store: Store, build_key: str) -> Manifest | None:
    """The verified snapshot that was built from the same inputs, if there is one; a damaged one does not count, so it can be built again."""
    for manifest in manifests(store):
        if manifest.build_key == build_key:
            with suppress(SnapshotError):
                return verify(store, manifest.snapshot_id)
    return None


def link_files(source: Path, target: Path) -> None:
    """Put every file of a snapshot but its manifest below `target`, as hard links; as copies where the file system has no links."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and name.as_posix() != MANIFEST:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target / name, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, target / name, follow_symlinks=False)


def check_inherited(folder: Path, files: Mapping[str, Mapping[str, Any]], parent: Path, manifest: Manifest) -> None:
    """SnapshotError when a file that `folder` has from its parent is not as the parent's manifest says; `files` are the hashes of `folder`.

    LanceDB never writes a file twice but its hint of the latest version, which it replaces by another file of that name.
    """
    for name, entry in files.items():
        if entry == manifest.files.get(name, entry):
            continue
        if not name.endswith(_VERSION_HINT) or (parent / name).samefile(folder / name):
            raise SnapshotError(f"{name} was altered in snapshot {manifest.snapshot_id}.", fix="Restore that snapshot, or remove it.")
