"""Promoting and rolling back against the least a durable change can cost: one file created and fsynced."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from evals.bench.figures import Figure, Pairs, kept, timed
from evals.bench.rig import Rig, clustered_vectors
from rag_serving.promotion import promote, rollback
from rag_serving.retrieval import Retriever
from rag_serving.snapshots import Manifest
from rag_serving.store import Store, sync_folder

_DIMS = 64
_PROMISED_SECONDS = 2.0


async def run(rig: Rig, *, rows: int = 500, rounds: int = 10) -> list[Figure]:
    """Ms of a promotion, of a rollback, and of a rollback until the earlier snapshot, opened anew, has answered a query."""
    manifests = [
        await rig.synthetic_snapshot(clustered_vectors(rows, _DIMS, centres=5, seed=seed), tag=f"release-{seed}") for seed in (0, 1)
    ]
    store = rig.scratch_store
    folder = rig.scratch / "created"
    folder.mkdir()
    names = (folder / f"{number}.json" for number in range(10**6))
    rig.reporter.note(f"{rounds} promotions and rollbacks between two snapshots of {rows} rows")

    def promotion(manifest: Manifest) -> Callable[[], object]:
        gate = rig.settings.gate
        return partial(promote, store, manifest.snapshot_id, gate=gate, actor="bench", reason="a benchmark", override=True)

    first, forward = map(promotion, manifests)
    back = partial(rollback, store, actor="bench", reason="a benchmark")
    first()
    promotions: list[float] = []
    rollbacks: list[float] = []
    creations: list[float] = []
    for _ in range(rounds):
        for side, move in ((promotions, forward), (rollbacks, back)):
            side.append(await timed(move))
            creations.append(await timed(partial(_create, next(names), _newest_entry(store))))

    forward()
    probe = clustered_vectors(1, _DIMS, centres=5, seed=2)[0]

    async def answer() -> None:
        entry = back()
        retriever = await Retriever.open(store, str(entry.snapshot_id))
        await retriever.retrieve("passage of group 3", probe, k=10)
        retriever.close()

    until_answer = await timed(answer) * 1000
    size = len(_newest_entry(store))
    note = f"{rows} rows, {manifests[0].bytes / 1e6:.1f} MB each, up to {2 * rounds + 1} entries of {size:,} bytes"
    peer_is = "one fsynced file of the same size"
    returned = Pairs(rollbacks, creations[1::2]).milliseconds("roll back", peer_is=peer_is)
    return [
        Pairs(promotions, creations[0::2]).milliseconds("promote", peer_is=peer_is, note=note),
        replace(returned, promise=kept(max(rollbacks), _PROMISED_SECONDS, "s")),
        Figure(
            "roll back, open, answer",
            until_answer,
            "ms",
            promise=kept(until_answer / 1000 + rig.settings.serving.poll_seconds, _PROMISED_SECONDS, "s"),
            note=f"the promise counts serving's {rig.settings.serving.poll_seconds:g} s poll on top",
        ),
    ]


def _newest_entry(store: Store) -> bytes:
    return store.read(f"releases/{store.names('releases')[-1]}")


def _create(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
