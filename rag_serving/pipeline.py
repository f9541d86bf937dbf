"""A request's phases, in order, on one snapshot: encode, retrieve, assemble, generate. Admission has made the question by then."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry.trace import Tracer

from rag_serving import telemetry
from rag_serving.admission import Question
from rag_serving.context import assemble
from rag_serving.encoding import Encoder
from rag_serving.errors import EncoderError, ModelMismatch
from rag_serving.generation import Answer, extract
from rag_serving.live import Live, Serving
from rag_serving.retrieval import Hit, Vector

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Trace:
    """What one request is known by and how long its phases took, in milliseconds, in order; each phase is also a span."""

    trace_id: str
    tracer: Tracer
    timings_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.tracer.start_as_current_span(name):
                yield
        finally:
            self.timings_ms[name] = round((time.perf_counter() - started) * 1000, 3)


@dataclass(frozen=True, slots=True)
class Found:
    """The passages for a question; `degraded` names what had to be done without."""

    serving: Serving
    hits: list[Hit]
    degraded: list[str]


async def retrieve(live: Live, question: Question, *, top_k: int, trace: Trace) -> Found:
    """The `top_k` best passages of the live snapshot."""
    with live.borrow() as serving:
        return await _found(serving, question, top_k=question.top_k or top_k, trace=trace)


async def answer(live: Live, question: Question, *, top_k: int, trace: Trace) -> tuple[Found, Answer]:
    """An answer out of the `top_k` best passages of the live snapshot."""
    with live.borrow() as serving:
        found = await _found(serving, question, top_k=question.top_k or top_k, trace=trace)
        with trace.phase("assemble"):
            passages = assemble(found.hits)
        with trace.phase("generate"):
            return found, extract(question.query, passages)


async def _found(serving: Serving, question: Question, *, top_k: int, trace: Trace) -> Found:
    retriever = serving.snapshot.retriever
    with trace.phase("encode"):
        vector = await _encoded(serving.snapshot.encoder, question.query)
    with trace.phase("retrieve"):
        hits = await retriever.retrieve(question.query, vector, k=top_k)
        telemetry.record({telemetry.RETRIEVED_CHUNKS: len(hits), telemetry.SCORE_TOP1: hits[0].score if hits else 0.0})
    degraded = [] if vector is not None else ["embedding"]
    telemetry.record(
        {
            telemetry.SNAPSHOT_ID: serving.snapshot_id,
            telemetry.GENERATION: serving.number,
            telemetry.RETRIEVED_CHUNKS: len(hits),  # on the root too, so that one query finds it
            telemetry.DEGRADED: tuple(degraded),
        }
    )
    return Found(serving, hits, degraded)


async def _encoded(encoder: Encoder, query: str) -> Vector | None:
    """The query's vector; None when the embedding service cannot give a usable one. Another model's vector is an error: ModelMismatch."""
    try:
        vectors = await encoder.encode([query])
    except ModelMismatch:
        raise
    except EncoderError as error:
        log.warning("answering by words alone: %s", error)
        return None
    row: Vector = vectors[0]
    return row
