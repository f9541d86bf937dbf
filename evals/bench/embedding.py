"""Embedding into a fresh store, with dedupe, checks and durable segments, against the bare model at its best batch size."""

import numpy as np

from evals.bench.figures import Figure, alternate
from evals.bench.rig import Rig
from rag_assets.embedding import embed
from rag_serving.store import LocalStore


async def run(rig: Rig, *, texts: int = 600, rounds: int = 5) -> list[Figure]:
    """Texts a second; the same texts, weights, dtype and threads on both sides. Each round is another share of the texts."""
    every = rig.chunk_texts()
    share = min(texts, len(every)) // rounds
    chosen = [every[at] for at in np.linspace(0, len(every) - 1, share * rounds).astype(int)]
    model = rig.model
    prompted = [model.spec.document_prompt + text for text in chosen]
    size = rig.best_batch_size(prompted)
    rig.check_same(model.encode_documents(chosen[:32]), rig.bare_encode(prompted[:32], batch_size=size))

    def ours(number: int) -> None:
        embed(LocalStore(rig.scratch / f"embedding-{number}"), model, chosen[number::rounds])

    rig.reporter.note(f"{len(chosen)} texts in {rounds} rounds")
    pairs = await alternate(ours, lambda number: rig.bare_encode(prompted[number::rounds], batch_size=size), rounds=rounds, warm_up=0)
    note = f"{rig.model_name}, {model.dtype}, {len(chosen)} chunks"
    return [pairs.rate("embed into fresh stores", share, "texts/s", peer_is=f"SentenceTransformer.encode, batch {size}", note=note)]
