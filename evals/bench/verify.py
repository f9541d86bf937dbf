"""Verifying a snapshot against hashing the same bytes plainly, and against only reading them."""

import hashlib
from pathlib import Path

from evals.bench.figures import Figure, alternate
from evals.bench.rig import Rig, clustered_vectors
from rag_serving.snapshots import snapshot_key, verify


async def run(rig: Rig, *, rows: int = 20_000, rounds: int = 9) -> list[Figure]:
    """MB (10^6 bytes) a second, with the files in the page cache."""
    rig.reporter.note(f"a snapshot of {rows:,} rows")
    vectors = clustered_vectors(rows, 384, centres=max(rows // 100, 2), seed=0)
    manifest = await rig.synthetic_snapshot(vectors, tag="clustered")
    folder = rig.scratch_store.folder(snapshot_key(manifest.snapshot_id))
    files = [folder / name for name in manifest.files]
    megabytes = manifest.bytes / 1e6

    def ours(_: int) -> None:
        verify(rig.scratch_store, manifest.snapshot_id)

    hashed = await alternate(ours, lambda _: _hash(files), rounds=rounds)
    read = await alternate(ours, lambda _: _read(files), rounds=rounds)
    note = f"{megabytes:,.1f} MB in {len(files)} files"
    return [
        hashed.rate("verify, beside hashing", megabytes, "MB/s", peer_is="sha256 of each file", note=note),
        read.rate("verify, beside reading", megabytes, "MB/s", peer_is="reading each file", note=note),
    ]


def _hash(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def _read(files: list[Path]) -> None:
    block = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
