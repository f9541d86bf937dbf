"""Whether the embedding service, which is another process than the pipeline, gives the vectors that the champion holds."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rag_assets.workbench import Workbench
from rag_serving.embedding.vector_probe import paired
from rag_serving.errors import EncoderError
from rag_serving.snapshots import Manifest

_MOST = 32  # texts asked of it


@dataclass(frozen=True, slots=True)
class Service:
    """What it `names` as its fingerprint, the `numbers` that were compared, and what was found: kind, severity and a sentence with the numbers."""

    names: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[tuple[Literal["fingerprint", "runtime"], Literal["hold"], str], ...] = ()


def by_service(bench: Workbench, manifest: Manifest, texts: Sequence[str], stored: NDArray[np.float32], *, floor: float) -> Service:
    """The first of `texts` embedded by the service, beside their `stored` vectors; nothing is found while it gives no vectors.

    Another fingerprint is a finding, and under the same one, or none, a mean cosine below `floor`.
    """
    try:
        seen = asyncio.run(paired(bench.settings, manifest, texts[:_MOST], stored[:_MOST]))
    except EncoderError as error:
        bench.reporter.note(f"the embedding service is not compared: {error}")
        return Service("none: it gave no vectors")
    numbers = {"service_cosine": seen.cosine, "service_same_model": float(seen.same_model is not False)}
    measured = f"mean cosine {seen.cosine:.5f} of its vectors with the stored ones"
    if seen.fingerprint and not seen.same_model:
        named = f"names fingerprint {seen.fingerprint[:12]}, the champion was built with {seen.expected[:12]}"
        return Service(seen.fingerprint, numbers, (("fingerprint", "hold", f"the embedding service {named}; {measured}."),))
    if seen.cosine < floor:
        told = f"the embedding service gives other vectors than the champion holds: {measured}, {floor:g} is the floor."
        return Service(seen.fingerprint or "none", numbers, (("runtime", "hold", told),))
    return Service(seen.fingerprint or "none", numbers)
