"""What goes over the wire. Every reply names the snapshot and the release that gave it; vectors are in none of them."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rag_serving.exchange import Exchange
from rag_serving.live import Live
from rag_serving.pipeline import Found
from rag_serving.releases import Entry, Release
from rag_serving.writing.extraction import Answer, Confidence, Flag

HISTORY = 20


class Reply(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)


class HitReply(Reply):
    chunk_id: str
    doc_id: str
    uri: str
    title: str
    heading_path: str
    text: str
    start: int = Field(description="Where the passage starts in its document, in characters.")
    end: int
    score: float
    signals: dict[str, float] = Field(
        description="What the score is made of: cosines, BM25 scores, shared wording; absent when not searched."
    )


class GuardReply(Reply):
    guard: Literal["input", "context", "output"]
    rule: str = Field(description="bidi, control, image, injection, invisible, length, link, markup, source_share or canary.")
    action: Literal["flag", "strip", "block"]
    count: int


class RetrieveReply(Reply):
    snapshot_id: str
    release: int
    embedding_model: str
    hits: list[HitReply]
    degraded: list[Literal["embedding", "text_index", "vector_index", "rerank", "llm"]] = Field(
        description="What had to be done without; `embedding`: full-text search alone, `llm`: passages are quoted."
    )
    guards: list[GuardReply] = Field(description="What guards noted, took out or held back.")
    trace_id: str
    timings_ms: dict[str, float] = Field(description="Milliseconds of each phase, in order.")


class Citation(Reply):
    number: int = Field(description="The n of the markers [n] in the answer.")
    chunk_id: str
    doc_id: str
    title: str
    uri: str
    start: int
    end: int


class QuoteReply(Reply):
    number: int = Field(description="The citation it belongs to.")
    text: str = Field(description="Word for word in the cited passage.")


class UsageReply(Reply):
    prompt_tokens: int = Field(description="As the language model counted them.")
    completion_tokens: int


class QueryReply(RetrieveReply):
    answer: str
    quotes: list[QuoteReply] = Field(description="What it rests on: its pieces without markers, or, if generated, what is nearest to them.")
    citations: list[Citation]
    abstained: bool
    generated: bool = Field(description="A language model wrote it; else it is quoted.")
    groundedness: float | None = Field(description="The share of its words that stand in what their own sentences cite; null if abstained.")
    confidence: Confidence | None = Field(
        description="high: at least two independent sources on topic are cited; low: none is, or little of it stands there; null if abstained."
    )
    flags: list[Flag] = Field(description="What checking its citations changed.")
    llm_problem: str | None = Field(description="Why the language model's own answer is not, or not all, here.")
    usage: UsageReply | None = Field(description="Null when no language model was asked.")


class CompareReply(Reply):
    champion: QueryReply
    canary: QueryReply | None = Field(description="Null when no canary is open, or when it failed to answer.")


class FeedbackReply(Reply):
    queued: bool
    trace_id: str


class ReleasedSnapshot(Reply):
    number: int
    snapshot_id: str
    manifest_sha256: str
    embedding_model: str | None = Field(None, description="This and the counts are known while the snapshot is open here.")
    documents: int | None = None
    rows: int | None = None
    summary: str | None = Field(None, description="The verdict that promoted it, in one line.")
    metrics: dict[str, float] = Field(default_factory=dict, description="What that verdict's rules observed.")


class LedgerEntry(Reply):
    number: int
    action: str
    snapshot_id: str | None
    actor: str
    reason: str
    at: str
    mrr: float | None = Field(None, description="Of a promotion or canary: the MRR that its verdict saw.")


class OpenReply(Reply):
    snapshot_id: str
    release: int
    since: str
    fingerprint: Literal["named", "probed"] = Field(
        description="How the embedding service shows that it runs the snapshot's model: by name in each reply, or by the vectors it gives."
    )


class ProblemReply(Reply):
    code: str
    detail: str
    fix: str
    at: str


class ReleaseReply(Reply):
    number: int = Field(description="The newest ledger entry that was read.")
    champion: ReleasedSnapshot | None
    previous: ReleasedSnapshot | None
    holds: list[LedgerEntry]
    open: OpenReply | None = Field(description="What answers now; differs from the champion while that is opened or cannot be.")
    problem: ProblemReply | None
    canary: ReleasedSnapshot | None = Field(
        description="What is tried beside the champion, by its own entry; its counts are known once it is open."
    )
    canary_problem: ProblemReply | None = Field(description="Why the canary is not open; the champion answers everybody then.")
    history: list[LedgerEntry] = Field(description=f"The last {HISTORY} entries, newest first.")


def retrieve_reply(found: Found, exchange: Exchange) -> RetrieveReply:
    return RetrieveReply(**_common(found, exchange))


def query_reply(found: Found, answer: Answer, exchange: Exchange) -> QueryReply:
    return QueryReply(
        **_common(found, exchange),
        answer=answer.text,
        quotes=[QuoteReply(number=quote.passage.number, text=quote.text) for quote in answer.quotes],
        citations=[
            Citation(
                number=passage.number,
                chunk_id=passage.hit.chunk_id,
                doc_id=passage.hit.doc_id,
                title=passage.hit.title,
                uri=passage.hit.uri,
                start=passage.hit.start,
                end=passage.hit.end,
            )
            for passage in answer.cited
        ],
        abstained=answer.abstained,
        generated=answer.generated,
        groundedness=answer.groundedness,
        confidence=answer.confidence,
        flags=list(answer.flags),
        llm_problem=answer.problem,
        usage=UsageReply(prompt_tokens=answer.tokens_read, completion_tokens=answer.tokens_written) if answer.tokens_read else None,
    )


def _common(found: Found, exchange: Exchange) -> dict[str, Any]:
    return {
        "snapshot_id": found.serving.snapshot_id,
        "release": found.serving.number,
        "embedding_model": found.serving.snapshot.retriever.manifest.embedding_model,
        "hits": [HitReply.model_validate(hit) for hit in found.hits],
        "degraded": exchange.degraded,
        "guards": [GuardReply.model_validate(event) for event in exchange.guards],
        "trace_id": exchange.trace_id,
        "timings_ms": exchange.timings_ms,
    }


def release_reply(live: Live) -> ReleaseReply:
    state, serving = live.state, live.serving
    return ReleaseReply(
        number=state.number,
        champion=_released(live, state.champion),
        previous=_released(live, state.previous),
        holds=[_entry(entry) for entry in state.holds],
        open=OpenReply(snapshot_id=serving.snapshot_id, release=serving.number, since=serving.since, fingerprint=serving.fingerprint)
        if serving
        else None,
        problem=ProblemReply.model_validate(live.problem) if live.problem else None,
        canary=_released(live, state.canary),
        canary_problem=ProblemReply.model_validate(live.canary_problem) if live.canary_problem else None,
        history=[_entry(entry) for entry in reversed(live.entries[-HISTORY:])],
    )


def _entry(entry: Entry) -> LedgerEntry:
    return LedgerEntry.model_validate(entry).model_copy(update={"mrr": _observed(entry.evidence).get("mrr_floor")})


def _released(live: Live, release: Release | None) -> ReleasedSnapshot | None:
    if release is None:
        return None
    manifest = live.manifest(release.snapshot_id)
    verdict = release.evidence.get("verdict")
    verdict = verdict if isinstance(verdict, dict) else {}
    return ReleasedSnapshot(
        number=release.number,
        snapshot_id=release.snapshot_id,
        manifest_sha256=release.manifest_sha256,
        embedding_model=manifest.embedding_model if manifest else None,
        documents=manifest.documents if manifest else None,
        rows=manifest.rows if manifest else None,
        summary=str(verdict["summary"]) if "summary" in verdict else None,
        metrics=_observed(release.evidence),
    )


def _observed(evidence: Mapping[str, Any]) -> dict[str, float]:
    """What the rules of the verdict in an entry's evidence saw, by rule."""
    verdict = evidence.get("verdict")
    rules = verdict.get("rules") if isinstance(verdict, dict) else None
    found = [rule for rule in rules or () if isinstance(rule, dict)]
    return {str(rule["name"]): float(rule["observed"]) for rule in found if isinstance(rule.get("observed"), int | float)}
