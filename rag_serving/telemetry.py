"""Recording what happens: functions called where something happened, which know what to record of it, by the declarations of `contract`.

On the span under way, on the request's first span, so that one query finds it there, and in the metrics, which count requests of users alone.
Nothing recorded is text. Spans themselves are in signals/trace.py.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rag_serving.signals import contract, metrics, trace
from rag_serving.signals.contract import Attribute
from rag_serving.signals.trace import Value, note, record

_FINISH_REASONS = frozenset({"stop", "length", "content_filter"})
_TURNED_AWAY = frozenset({"overloaded", "rate_limited", "budget_exhausted"})


def known(key_id: str) -> None:
    """The caller has a key, of which only a hash of its id is recorded."""
    note({contract.TENANT: hashlib.sha256(key_id.encode()).hexdigest()[:12]})


def refused(code: str, status: int) -> None:
    """The request ends with the error of this code, whether or not a reply has begun."""
    request = trace.current()
    if request is not None:
        request.code, request.status = code, status
        if code == "injection":
            metrics.count(contract.GUARD_EVENTS, "input", "injection", "block")
        if code in _TURNED_AWAY:
            metrics.count(contract.SHED, code)


def degraded(part: str) -> None:
    """The answer has to do without a part."""
    request = trace.current()
    if request is not None and part not in request.degraded:
        request.degraded.append(part)
        metrics.count(contract.DEGRADED_TOTAL, part)


def guarded(events: Sequence[tuple[str, str, str, int]]) -> None:
    """Rules of guards applied: guard, rule, action, and how often."""
    request = trace.current()
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
    if trace.current() is not None:
        metrics.observe(contract.QUERY_TOKENS_SEEN, query_tokens)


def connected(seconds: float) -> None:
    """A call of the embedding service has its connection, or was given up without one, after waiting so long."""
    record({contract.POOL_WAIT_MS: round(seconds * 1000, 3)})
    if trace.current() is not None:
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
    if trace.current() is not None:
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
    if trace.current() is not None:
        metrics.observe(contract.RERANK_SCORE, score)


def assembled(*, context_tokens: int, dropped: int, sources: int) -> None:
    """Passages were chosen that an answer may rest on."""
    record({contract.CONTEXT_TOKENS: context_tokens, contract.CHUNKS_DROPPED: dropped, contract.SOURCES: sources})
    note({contract.CONTEXT_TOKENS: context_tokens})
    if trace.current() is not None:
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
    with trace.span(contract.CHAT, model=model):
        record({contract.OPERATION: "chat", contract.PROVIDER: "openai", contract.REQUEST_MODEL: model})
        try:
            yield call
        except Exception as error:
            reason = getattr(error, "reason", "malformed")
            raise
        finally:
            if call.first:
                record({contract.FIRST_CHUNK: call.first})
            if trace.current() is not None:
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
    request = trace.current()
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
