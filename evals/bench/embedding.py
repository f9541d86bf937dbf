"""Embedding into a fresh store, with dedupe, checks and durable segments, against the bare model at its best batch size."""

from pathlib import Path

import numpy as np

from evals.bench.figures import Figure, alternate
from evals.bench.rig import Rig
from rag_assets.embedding import embed
from rag_serving.store import LocalStore


async def run(rig: Rig, *, texts: int = 600, rounds: int = 3) -> list[Figure]:
    """Texts a second; the same texts, weights, dtype and threads on both sides."""
    every = rig.chunk_texts()
    chosen = [every[at] for at in np.linspace(0, len(every) - 1, min(texts, len(every))).astype(int)]
    model, bare = rig.model, rig.bare_model
    size = rig.best_batch_size(chosen[:: max(1, len(chosen) // 128)])
    made = iter(range(10**6))

    def ours(_: int) -> None:
        store = LocalStore(Path(rig.scratch) / f"embedding-{next(made)}")
        embed(store, model, chosen)

    model.encode_documents(chosen[:32])
    rig.reporter.note(f"{len(chosen)} texts, {rounds} rounds, bare batch size {size}, {type(bare).__name__}, {model.dtype}")
    pairs = await alternate(ours, lambda _: rig.bare_encode(chosen, batch_size=size), rounds=rounds, warm_up=0)
    note = f"{rig.model_name}, {model.dtype}, {len(chosen)} chunks"
    return [pairs.rate("embed into a fresh store", len(chosen), "texts/s", peer_is=f"SentenceTransformer.encode, batch {size}", note=note)]
