"""A request's phases, in order, on one snapshot: encode, retrieve, rerank, assemble, generate. Admission has made the question by then."""

import logging
from dataclasses import dataclass

from rag_serving import telemetry
from rag_serving.admission import Question
from rag_serving.context import assemble
from rag_serving.encoding import Encoder
from rag_serving.errors import EncoderError, ModelMismatch
from rag_serving.exchange import Exchange
from rag_serving.generation import Answer, extract
from rag_serving.live import Live, Serving
from rag_serving.retrieval import Hit, Vector
from rag_serving.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """What answering takes, opened once a process."""

    settings: Settings
    live: Live


@dataclass(frozen=True, slots=True)
class Found:
    """The passages for a question, and what they came from."""

    serving: Serving
    hits: list[Hit]


async def retrieve(service: Service, question: Question, exchange: Exchange) -> Found:
    """The best passages of the live snapshot."""
    with service.live.borrow() as serving:
        return await _found(service, serving, question, exchange)


async def answer(service: Service, question: Question, exchange: Exchange) -> tuple[Found, Answer]:
    """An answer out of the best passages of the live snapshot."""
    with service.live.borrow() as serving:
        found = await _found(service, serving, question, exchange)
        with exchange.phase("assemble"):
            passages = assemble(found.hits)
        with exchange.phase("generate"):
            return found, extract(question.query, passages)


async def _found(service: Service, serving: Serving, question: Question, exchange: Exchange) -> Found:
    retriever, top_k = serving.snapshot.retriever, question.top_k or service.settings.serving.top_k
    with exchange.phase("encode"):
        vector = await _encoded(serving.snapshot.encoder, question.query, exchange)
    with exchange.phase("retrieve"):
        hits = await retriever.retrieve(question.query, vector, k=top_k)
        telemetry.record({telemetry.RETRIEVED_CHUNKS: len(hits), telemetry.SCORE_TOP1: hits[0].score if hits else 0.0})
    telemetry.record(
        {
            telemetry.SNAPSHOT_ID: serving.snapshot_id,
            telemetry.GENERATION: serving.number,
            telemetry.RETRIEVED_CHUNKS: len(hits),  # on the root too, so that one query finds it
            telemetry.DEGRADED: tuple(exchange.degraded),
        }
    )
    return Found(serving, hits)


async def _encoded(encoder: Encoder, query: str, exchange: Exchange) -> Vector | None:
    """The query's vector; None when the embedding service cannot give a usable one. Another model's vector is an error: ModelMismatch."""
    try:
        vectors = await encoder.encode([query])
    except ModelMismatch:
        raise
    except EncoderError as error:
        log.warning("answering by words alone: %s", error)
        exchange.degrade("embedding")
        return None
    row: Vector = vectors[0]
    return row
