"""Recording what happens: spans in the caller's trace, and the metrics of the request under way, by the declarations of `contract`.

The functions below are called where something happened and know what to record of it: on the span under way, on the request's first span, so
that one query finds it there, and in the metrics. Metrics count requests of users alone: without a request under way (a warm-up, a shadow
answer, an evaluation) nothing is counted. Nothing recorded is text; an exception leaves the code of its error on its span and no words.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracer, SpanContext, SpanKind, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rag_serving.signals import contract, metrics
from rag_serving.signals.contract import Attribute, Metric, Outcome, Span
from rag_serving.signals.exporting import otlp_sink
from rag_serving.signals.spans import LightProvider

Value = str | int | float | bool | Sequence[str] | Sequence[float]

_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
_PHASES = {span.name: span for span in contract.PHASES}
_GUARDS = {"input": contract.GUARD_INPUT, "context": contract.GUARD_CONTEXT, "output": contract.GUARD_OUTPUT}
_ROUTES = {tuple(span.name.split()): span for span in contract.SPANS if " " in span.name}
_TIMED: dict[str, tuple[Metric, tuple[str, ...]]] = {
    **{span.name: (contract.PHASE_SECONDS, (span.name,)) for span in contract.PHASES},
    contract.RETRIEVE_VECTOR.name: (contract.RETRIEVE_SECONDS, ("vector",)),
    contract.RETRIEVE_FTS.name: (contract.RETRIEVE_SECONDS, ("fts",)),
    contract.FUSE.name: (contract.RETRIEVE_SECONDS, ("fuse",)),
    contract.EMBEDDINGS.name: (contract.EMBED_SECONDS, ()),
}
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})  # others are a client's own words
_FINISH_REASONS = frozenset({"stop", "length", "content_filter"})
_TURNED_AWAY = frozenset({"overloaded", "rate_limited", "budget_exhausted"})


@dataclass(slots=True)
class Request:
    """The request under way: its first span, and what its outcome will be made of."""

    span: OpenSpan
    trace_id: str
    route: str
    status: int | None = None
    code: str = ""
    abstained: bool = False
    blocked: bool = False
    gone: bool = False
    degraded: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        if self.code == "overloaded":
            return Outcome.SHED
        if self.status == 504:
            return Outcome.TIMEOUT
        if self.code == "injection" or (self.blocked and not self.degraded):
            return Outcome.BLOCKED
        if self.gone or (self.status and 400 <= self.status < 500):
            return Outcome.CLIENT_ERROR
        if self.status is None or self.status >= 500:
            return Outcome.ERROR
        return Outcome.DEGRADED if self.degraded else Outcome.ABSTAINED if self.abstained else Outcome.OK


_NO_TRACER = NoOpTracer()
_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)
_request: ContextVar[Request | None] = ContextVar("request", default=None)
_inflight: set[int] = set()


def provider(*, service: str = "ragline", share: float = 1.0) -> TracerProvider:
    """A provider of this process' spans, without exporters. `share` of the traces that begin here are sampled; all are recorded."""
    named = os.environ.get("OTEL_SERVICE_NAME") or service
    return LightProvider(share=share, resource=Resource.create({"service.name": named}))


def exporting_provider(*, service: str, share: float, slow_seconds: float) -> TracerProvider:
    """The same with a sink at the OTLP endpoint of the standard variables; OTEL_SERVICE_NAME overrides `service`.

    Where they name none, spans have their ids, for replies and logs, and nothing is recorded.
    """
    sink = otlp_sink(slow_seconds=slow_seconds)
    if sink is None:
        return TracerProvider(sampler=ALWAYS_OFF)
    made = provider(service=service, share=share)
    made.add_span_processor(sink)
    return made


def tracer(tracing: TracerProvider) -> Tracer:
    return tracing.get_tracer("ragline", schema_url=f"https://opentelemetry.io/schemas/{contract.SEMCONV}")


def context_of(headers: Mapping[str, str]) -> Context:
    """The caller's trace by its traceparent; a new one when there is none or it is malformed. Baggage is never read."""
    return _PROPAGATOR.extract({"traceparent": headers.get("traceparent", "")})


def outgoing_headers() -> dict[str, str]:
    """The header that makes a called service part of the current trace."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers)
    return headers


def trace_id_of(context: SpanContext) -> str:
    """32 hex digits."""
    return format(context.trace_id, "032x")


def record(attributes: Mapping[Attribute, Value]) -> None:
    """Set attributes of the span under way."""
    get_current_span().set_attributes({attribute.name: value for attribute, value in attributes.items()})


def note(attributes: Mapping[Attribute, Value]) -> None:
    """Set attributes of the request's first span, whichever is under way."""
    request = _request.get()
    if request is not None:
        request.span.set_attributes({attribute.name: value for attribute, value in attributes.items()})


def declared(method: str, path: str) -> bool:
    """Whether requests to that address have a span of their own."""
    return (method, path) in _ROUTES


def counted() -> bool:
    """Whether a request of a user is under way here, so that what happens counts in the metrics."""
    return _request.get() is not None


def inflight() -> int:
    """Requests under way in this process."""
    return len(_inflight)


@contextmanager
def span(declared: Span, *, model: str = "", tracer: Tracer | None = None) -> Iterator[OpenSpan]:
    """A declared span inside the one under way, timed; `tracer` is used by the spans inside too."""
    token = _tracer.set(tracer) if tracer else None
    name = f"{declared.name} {model}" if model else declared.name
    started = time.perf_counter()
    try:
        made = (_tracer.get() or _NO_TRACER).start_span(name, kind=_KINDS[declared.kind])
        outer = attach(set_span_in_context(made))  # what start_as_current_span does, without its context manager
        try:
            yield made
        except BaseException as error:
            made.set_attribute(contract.ERROR_TYPE.name, getattr(error, "code", None) or type(error).__name__)
            made.set_status(StatusCode.ERROR)
            raise
        finally:
            detach(outer)
            made.end()
    finally:
        if token is not None:
            _tracer.reset(token)
        if declared.name in _TIMED and _request.get() is not None:
            metric, labels = _TIMED[declared.name]
            metrics.observe(metric, time.perf_counter() - started, *labels)


@contextmanager
def phase(name: str, *, tracer: Tracer) -> Iterator[None]:
    """The span of a phase of a request, by its name."""
    with span(_PHASES[name], tracer=tracer):
        yield


@contextmanager
def serving(tracer: Tracer, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Request]:
    """The first span of a request, in its caller's trace. Whoever replies sets `status`; the outcome is recorded and counted at the end."""
    declared = _ROUTES.get((method, path), contract.REQUEST)
    route = path if declared is not contract.REQUEST else ""
    started = time.perf_counter()
    made = tracer.start_span(declared.name, context_of(headers), kind=SpanKind.SERVER)
    outer = attach(set_span_in_context(made))
    request = Request(made, trace_id_of(made.get_span_context()), route)
    tokens = _tracer.set(tracer), _request.set(request)
    _inflight.add(id(request))
    try:
        yield request
    except asyncio.CancelledError:
        request.gone = True
        raise
    except Exception as error:
        made.set_attribute(contract.ERROR_TYPE.name, type(error).__name__)
        raise
    finally:
        _inflight.discard(id(request))
        _tracer.reset(tokens[0])
        _request.reset(tokens[1])
        _ended(request, method, time.perf_counter() - started)
        detach(outer)
        made.end()


def _ended(request: Request, method: str, seconds: float) -> None:
    outcome = request.outcome
    ended: dict[Attribute, Value] = {contract.METHOD: method if method in _METHODS else "_OTHER", contract.OUTCOME: outcome.value}
    if request.route:
        ended[contract.ROUTE] = request.route
    if request.status is not None:
        ended[contract.STATUS] = request.status
    if request.code:
        ended[contract.ERROR_TYPE] = request.code
    if request.degraded:
        ended[contract.DEGRADED] = tuple(request.degraded)
    request.span.set_attributes({attribute.name: value for attribute, value in ended.items()})
    if outcome in (Outcome.ERROR, Outcome.TIMEOUT):
        request.span.set_status(StatusCode.ERROR)
    if request.route in contract.ROUTES:
        kept = request.span.get_span_context().trace_flags.sampled or outcome in (Outcome.ERROR, Outcome.DEGRADED)
        metrics.count(contract.REQUESTS, request.route, outcome)
        metrics.observe(contract.REQUEST_SECONDS, seconds, request.route, outcome, trace_id=request.trace_id if kept else "")


def known(key_id: str) -> None:
    """The caller has a key, of which only a hash of its id is recorded."""
    note({contract.TENANT: hashlib.sha256(key_id.encode()).hexdigest()[:12]})


def refused(code: str, status: int) -> None:
    """The request ends with the error of this code, whether or not a reply has begun."""
    request = _request.get()
    if request is not None:
        request.code, request.status = code, status
        if code == "injection":
            metrics.count(contract.GUARD_EVENTS, "input", "injection", "block")
        if code in _TURNED_AWAY:
            metrics.count(contract.SHED, code)


def degraded(part: str) -> None:
    """The answer has to do without a part."""
    request = _request.get()
    if request is not None and part not in request.degraded:
        request.degraded.append(part)
        metrics.count(contract.DEGRADED_TOTAL, part)


@contextmanager
def guarding(guard: str, *, tracer: Tracer | None = None) -> Iterator[None]:
    """The span of a guard at work: input, context or output."""
    with span(_GUARDS[guard], tracer=tracer):
        yield


def guarded(events: Sequence[tuple[str, str, str, int]]) -> None:
    """Rules of guards applied: guard, rule, action, and how often."""
    request = _request.get()
    if events:
        record({contract.GUARD_RULES_APPLIED: tuple(rule for _, rule, _, _ in events)})
        record({contract.GUARD_ACTIONS: tuple(action for _, _, action, _ in events)})
    for guard, rule, action, times in events:
        if request is not None:
            request.blocked = request.blocked or (guard, action) == ("output", "block")
            metrics.count(contract.GUARD_EVENTS, guard, rule, action, by=times)
            if rule == "canary":
                metrics.count(contract.CANARY_LEAKS)


def asked(*, query_tokens: int, deadline_seconds: float) -> None:
    """A question was admitted."""
    note({contract.QUERY_TOKENS: query_tokens, contract.DEADLINE_MS: round(deadline_seconds * 1000)})
    if _request.get() is not None:
        metrics.observe(contract.QUERY_TOKENS_SEEN, query_tokens)


def connected(seconds: float) -> None:
    """A call of the embedding service has its connection, or was given up without one, after waiting so long."""
    record({contract.POOL_WAIT_MS: round(seconds * 1000, 3)})
    if _request.get() is not None:
        metrics.observe(contract.POOL_WAIT, seconds)


def searched(signal: str, *, candidates: int, index: tuple[int, int] | None, filtered: str | None) -> None:
    """One signal was searched, in the span under way: vectors with (ef, refine factor), (0, 0) without an index; rows for which `filtered` holds."""
    searching: dict[Attribute, Value] = {contract.DATABASE: "lancedb", contract.SIGNAL: signal, contract.CANDIDATES: candidates}
    if index is not None:
        searching[contract.EF], searching[contract.REFINE] = index
    if filtered is not None:
        searching[contract.FILTER_HASH] = hashlib.sha256(filtered.encode()).hexdigest()[:12]
    record(searching)


def retrieved(*, snapshot_id: str, generation: int, top_k: int, scores: Sequence[float], doc_ids: Sequence[str]) -> None:
    """A snapshot was searched: `scores` and `doc_ids` are those of the passages found, best first."""
    found, sources = len(scores), len(set(doc_ids))
    here: dict[Attribute, Value] = {
        contract.OPERATION: "retrieval",
        contract.DATA_SOURCE: snapshot_id,
        contract.TOP_K: top_k,
        contract.RETRIEVED_CHUNKS: found,
        contract.SOURCES: sources,
        contract.SCORES: tuple(round(score, 6) for score in scores),
    }
    first: dict[Attribute, Value] = {contract.SNAPSHOT_ID: snapshot_id, contract.GENERATION: generation, contract.RETRIEVED_CHUNKS: found}
    if scores:
        here[contract.SCORE_TOP1] = first[contract.RERANK_SCORE_TOP1] = scores[0]
    if len(scores) > 1:
        here[contract.SCORE_GAP] = scores[0] - scores[1]
    record(here)
    note(first)
    if _request.get() is not None:
        metrics.observe(contract.CHUNKS, found)
        metrics.observe(contract.DISTINCT_SOURCES, sources)
        if scores:
            metrics.observe(contract.RETRIEVAL_SCORE, scores[0])
        if len(scores) > 1:
            metrics.observe(contract.GAP, scores[0] - scores[1])
        if not found:
            metrics.count(contract.ZERO_RESULTS)
        if found < top_k:
            metrics.count(contract.SHORT_RESULTS)


def reranked(*, kind: str, pool: int, score: float, rank_before: int) -> None:
    """The best `pool` passages were ordered anew; `score` and the fused rank are those of the passage that is first now."""
    record({contract.RERANKER: kind, contract.RERANKED: pool, contract.RERANK_SCORE_TOP1: score, contract.RANK_BEFORE: rank_before})
    note({contract.RERANK_SCORE_TOP1: score})
    if _request.get() is not None:
        metrics.observe(contract.RERANK_SCORE, score)


def assembled(*, context_tokens: int, dropped: int, sources: int) -> None:
    """Passages were chosen that an answer may rest on."""
    record({contract.CONTEXT_TOKENS: context_tokens, contract.CHUNKS_DROPPED: dropped, contract.SOURCES: sources})
    note({contract.CONTEXT_TOKENS: context_tokens})
    if _request.get() is not None:
        metrics.observe(contract.CONTEXT_TOKENS_SEEN, context_tokens)


@dataclass(slots=True)
class Call:
    """A call to a language model under way; `began` is told of its first piece."""

    started: float
    first: float = 0.0

    def began(self) -> None:
        self.first = self.first or time.perf_counter() - self.started


@contextmanager
def chatting(model: str) -> Iterator[Call]:
    """The span of a call to a language model, and its times."""
    call, reason = Call(time.perf_counter()), "none"
    with span(contract.CHAT, model=model):
        record({contract.OPERATION: "chat", contract.PROVIDER: "openai", contract.REQUEST_MODEL: model})
        try:
            yield call
        except Exception as error:
            reason = getattr(error, "reason", "malformed")
            raise
        finally:
            if call.first:
                record({contract.FIRST_CHUNK: call.first})
            if _request.get() is not None:
                metrics.observe(contract.LLM_SECONDS, time.perf_counter() - call.started, reason)
                if call.first:
                    metrics.observe(contract.LLM_FIRST, call.first)


def ended(reason: str) -> None:
    """A language model stopped writing, for the reason it gave; "" when it gave none."""
    if reason:
        record({contract.FINISH_REASONS: (reason if reason in _FINISH_REASONS else contract.OTHER,)})


def answered(*, abstained: bool, citations: int, groundedness: float | None, confidence: str | None, flags: Sequence[str]) -> None:
    """An answer was made, or given up because nothing answers; `flags` is what checking its citations changed."""
    record({contract.ABSTAINED: abstained, contract.CITATIONS: citations})
    note({contract.ABSTAINED: abstained})
    if groundedness is not None:
        record({contract.GROUNDED: groundedness})
    if confidence is not None:
        record({contract.CONFIDENCE: confidence})
    request = _request.get()
    if request is None:
        return
    request.abstained = abstained
    if abstained:
        metrics.count(contract.ABSTAIN)
    if groundedness is not None:
        metrics.observe(contract.GROUNDEDNESS, groundedness)
    if confidence is not None:
        metrics.count(contract.CONFIDENCES, confidence)
    for flag, metric in (("citation_removed", contract.INVALID_CITATIONS), ("uncited", contract.UNCITED)):
        if flag in flags:
            metrics.count(metric)


def judged(verdict: str) -> None:
    """A person said what an answer was worth."""
    metrics.count(contract.FEEDBACK_TOTAL, verdict)


def swapped(seconds: float) -> None:
    """Another release answers from now on."""
    metrics.observe(contract.SWAP_SECONDS, seconds)
