"""A request's phases, in order, on one snapshot: encode, retrieve, rerank, assemble, generate. Admission has made the question by then."""

import asyncio
import logging
from dataclasses import dataclass, field, replace
from functools import partial

from rag_serving import telemetry
from rag_serving.admission import Question
from rag_serving.canary import Traffic, Work, account_of
from rag_serving.context import assemble, count_tokens
from rag_serving.encoding import Encoder
from rag_serving.errors import DeadlineExceeded, EncoderError, ModelMismatch
from rag_serving.exchange import Exchange
from rag_serving.generation import Writer
from rag_serving.guards import SPARE, guard_hits, guard_query, spread
from rag_serving.live import Live
from rag_serving.loop_rounds import Rounds
from rag_serving.opened import Serving
from rag_serving.retrieval import Hit, Vector
from rag_serving.settings import Settings
from rag_serving.signals import trace
from rag_serving.signals.variety import Results
from rag_serving.writing.confidence import confidence
from rag_serving.writing.extraction import Answer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """What answering takes, opened once a process."""

    settings: Settings
    live: Live
    traffic: Traffic
    writer: Writer
    results: Results = field(default_factory=Results)
    rounds: Rounds = field(default_factory=Rounds)


@dataclass(frozen=True, slots=True)
class Found:
    """The passages for a question, `top_k` at most once those to spare are gone, and what they came from."""

    serving: Serving
    hits: list[Hit]
    top_k: int


Answered = tuple[Found, Answer]


async def retrieve(service: Service, question: Question, exchange: Exchange) -> Found:
    """The best passages of the snapshot that the caller's requests go to."""
    question = _taken(service, question, exchange)
    run = partial(_found, service, question)
    return await service.traffic.answered(Work("retrieve", question.query, run, lambda found: account_of(found.hits)), exchange)


async def answer(service: Service, question: Question, exchange: Exchange) -> tuple[Found, Answer]:
    """An answer out of the best passages of the snapshot that the caller's requests go to."""
    return await service.traffic.answered(_answering(service, question, exchange), exchange)


async def compare(service: Service, question: Question, exchange: Exchange) -> tuple[Answered, tuple[Answered, Exchange] | None]:
    """The champion's answer and, if one is open, that of the canary with an exchange of its own."""
    return await service.traffic.compared(_answering(service, question, exchange), exchange)


def _answering(service: Service, question: Question, exchange: Exchange) -> Work[Answered]:
    question = _taken(service, question, exchange)
    return Work("query", question.query, partial(_answer, service, question), lambda made: account_of(made[0].hits, made[1]))


def _taken(service: Service, question: Question, exchange: Exchange) -> Question:
    """The question past the guard on what is asked."""
    with trace.guarding("input", tracer=exchange.tracer):
        query, events = guard_query(question.query, service.settings.guards)
        exchange.guarded(events)
    telemetry.asked(query_tokens=count_tokens(query), deadline_seconds=exchange.deadline.remaining)
    return question.model_copy(update={"query": query})


async def _answer(service: Service, question: Question, serving: Serving, exchange: Exchange) -> tuple[Found, Answer]:
    found = await _found(service, question, serving, exchange, spare=SPARE)
    settings, rules = service.settings.generation, service.settings.guards
    await service.rounds.turn()
    with exchange.phase("assemble"):
        off_topic = settings.abstain == "tuned" and serving.snapshot.relevance.refuses(found.hits)
        with trace.guarding("context"):
            hits, events = spread(found.hits, k=found.top_k, share=rules.source_share)
            found = replace(found, hits=hits)
            exchange.guarded(events)
            hits, events = guard_hits(hits, rules)
            exchange.guarded(events)
        passages = () if off_topic else assemble(hits, budget=settings.context_tokens)
        telemetry.assembled(
            context_tokens=sum(count_tokens(passage.text) for passage in passages),
            dropped=len(found.hits) - len(passages),
            sources=len({passage.hit.doc_id for passage in passages}),
        )
    await exchange.found(found)
    await service.rounds.turn()
    with exchange.phase("generate"):
        made = await service.writer.answer(question.query, passages, exchange)
        made = replace(made, confidence=confidence(made, serving.snapshot.relevance.reached_by, apart=settings.sources_apart))
        telemetry.answered(
            abstained=made.abstained,
            citations=len(made.cited),
            groundedness=made.groundedness if made.generated else None,
            confidence=made.confidence,
            flags=made.flags,
        )
    return found, made


async def _found(service: Service, question: Question, serving: Serving, exchange: Exchange, *, spare: int = 1) -> Found:
    """The `top_k` best hits, and `spare` times as many for a guard to choose from."""
    retriever, top_k = serving.snapshot.retriever, question.top_k or service.settings.serving.top_k
    reranker = serving.snapshot.reranker
    with exchange.phase("encode"):
        vector = await _encoded(serving.snapshot.encoder, question.query, exchange)
    with exchange.phase("retrieve"):
        try:
            async with asyncio.timeout(exchange.deadline.remaining):
                hits = await retriever.retrieve(
                    question.query,
                    vector,
                    k=max(top_k * spare, reranker.pool if reranker else 0),
                    where=question.filter,
                    groups=exchange.caller.groups,
                    degrade=exchange.degrade,
                )
        except TimeoutError:
            raise DeadlineExceeded("the time for this request ended in retrieve.", fix="Allow more time, or ask again.") from None
        telemetry.retrieved(
            snapshot_id=serving.snapshot_id,
            generation=serving.number,
            top_k=top_k,
            scores=[hit.score for hit in hits[:top_k]],
            doc_ids=[hit.doc_id for hit in hits[:top_k]],
        )
    if reranker is not None:
        with exchange.phase("rerank"):
            budget = service.settings.rerank.budget_ms / 1000
            hits = await serving.snapshot.rerank(
                question.query, hits, k=top_k * spare, exchange=exchange, budget_seconds=budget, encoded=vector is not None
            )
    if trace.current() is not None:
        service.results.keep([hit.text for hit in hits[:top_k]])
    return Found(serving, hits, top_k)


async def _encoded(encoder: Encoder, query: str, exchange: Exchange) -> Vector | None:
    """The query's vector; None when the embedding service cannot give a usable one. Another model's vector is an error: ModelMismatch."""
    try:
        vectors = await encoder.encode([query], deadline=exchange.deadline)
    except ModelMismatch:
        raise
    except EncoderError as error:
        log.warning("answering by words alone: %s", error)
        exchange.degrade("embedding")
        return None
    row: Vector = vectors[0]
    return row
