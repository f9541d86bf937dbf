"""The telemetry contract: every span, attribute and metric that this product emits, with its unit, its buckets and its category.

Names stand here and nowhere else. Recording goes through `telemetry`, `trace` and `metrics`, which take these declarations and no strings, so nothing
undeclared can be emitted; the page of docs/telemetry.md, the alert rules and the dashboards are generated from them.

Attributes hold numbers, ids and words of closed lists: never a text, a vector or a key. The values of a label are listed with it, so no
request can add a series. `rag.*` is ours and stable. `gen_ai.*` mirrors the OpenTelemetry GenAI conventions (open-telemetry/
semantic-conventions-genai, all in development), the attributes with no rename pending.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, TypeVar

OTHER = "other"  # what a label value is that was not declared
SEMCONV = "1.43.0"  # of the gen_ai, http and db names

_Kind = TypeVar("_Kind")


class Category(StrEnum):
    """What a signal speaks of; each is a row of the dashboard."""

    QUERY = "query quality"
    RETRIEVAL = "retrieval health"
    GENERATION = "generation safety"
    INFRASTRUCTURE = "infrastructure"


class Outcome(StrEnum):
    """How a request ended. `abstained` is an answer: nothing in the corpus speaks of the question."""

    OK = "ok"
    DEGRADED = "degraded"
    ABSTAINED = "abstained"
    BLOCKED = "blocked"
    SHED = "shed"
    TIMEOUT = "timeout"
    CLIENT_ERROR = "client_error"
    ERROR = "error"


@dataclass(frozen=True, slots=True, eq=False)
class Attribute:
    """Each is itself alone: comparing and hashing by identity costs a request nothing."""

    name: str
    kind: Literal["string", "strings", "int", "float", "floats", "bool"]
    says: str


@dataclass(frozen=True, slots=True)
class Span:
    """`name` is followed by the name of what `named_after` says. `required` attributes are on every such span that ended well."""

    name: str
    kind: Literal["server", "client", "internal"]
    says: str
    required: tuple[Attribute, ...] = ()
    optional: tuple[Attribute, ...] = ()
    named_after: str = ""

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        return (*self.required, *self.optional, ERROR_TYPE)


@dataclass(frozen=True, slots=True)
class Label:
    """A label and every value that it can have."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is the Prometheus name, with its unit at the end; a histogram's `buckets` are upper bounds in that unit.

    A gauge, and a counter that is `read`, is kept by the module it belongs to and read when somebody collects. `where` is the process.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    category: Category
    says: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    read: bool = False
    where: Literal["serving", "embedder"] = "serving"

    @property
    def most_series(self) -> int:
        """Time series when every combination of label values was seen, `other` included."""
        combinations = math.prod(len({*label.values, OTHER}) for label in self.labels)
        return combinations * (len(self.buckets) + 3 if self.kind == "histogram" else 1)


LLM_REASONS = (
    *("none", "timeout", "unavailable", "overloaded", "refused", "cut", "length", "content_filter", "too_long", "malformed", "withheld"),
)
GUARD_RULES = ("bidi", "invisible", "injection", "source_share", "image", "link", "markup", "control", "length", "canary", "nonce")

# attributes

ERROR_TYPE = Attribute("error.type", "string", "code of the error that ended it")
METHOD = Attribute("http.request.method", "string", "GET or POST")
ROUTE = Attribute("http.route", "string", "the route, never the address that was asked")
STATUS = Attribute("http.response.status_code", "int", "status of the reply")
OPERATION = Attribute("gen_ai.operation.name", "string", "retrieval, embeddings or chat")
PROVIDER = Attribute("gen_ai.provider.name", "string", "who computes: ragline, or openai for any OpenAI-compatible endpoint")
REQUEST_MODEL = Attribute("gen_ai.request.model", "string", "model asked, as configured")
DATA_SOURCE = Attribute("gen_ai.data_source.id", "string", "the snapshot searched")
TOP_K = Attribute("gen_ai.request.top_k", "int", "passages wanted")
DIMENSIONS = Attribute("gen_ai.embeddings.dimension.count", "int", "length of the vectors")
INPUT_TOKENS = Attribute("gen_ai.usage.input_tokens", "int", "tokens in")
FINISH_REASONS = Attribute(
    "gen_ai.response.finish_reasons", "strings", "why the model stopped writing: stop, length, content_filter or other"
)
FIRST_CHUNK = Attribute("gen_ai.response.time_to_first_chunk", "float", "seconds to the first piece of its answer")
OUTPUT_TOKENS = Attribute("gen_ai.usage.output_tokens", "int", "tokens out")
DATABASE = Attribute("db.system.name", "string", "lancedb")

OUTCOME = Attribute("rag.outcome", "string", "how the request ended: " + ", ".join(Outcome))
DEGRADED = Attribute("rag.degraded", "strings", "parts done without: embedding, text_index, vector_index, rerank, llm")
SNAPSHOT_ID = Attribute("rag.snapshot_id", "string", "the snapshot that answered, or was worked on")
GENERATION = Attribute("rag.generation", "int", "number of the release that answered, or was made")
DEADLINE_MS = Attribute("rag.deadline_ms", "int", "milliseconds the request was given")
QUERY_TOKENS = Attribute("rag.query_tokens", "int", "tokens of the question, estimated from its words and characters")
RETRIEVED_CHUNKS = Attribute("rag.retrieved_chunks", "int", "passages found")
RERANK_SCORE_TOP1 = Attribute("rag.rerank_score_top1", "float", "score of the best passage as it was ranked last")
CONTEXT_TOKENS = Attribute("rag.context_tokens", "int", "tokens of the passages an answer may rest on, estimated as the question's")
SCORE_TOP1 = Attribute("rag.score_top1", "float", "fused score of the best passage")
SCORE_GAP = Attribute("rag.score_gap", "float", "fused score of the best passage less that of the second")
SCORES = Attribute("rag.scores", "floats", "fused scores of the passages found, best first")
SIGNAL = Attribute("rag.signal", "string", "the column searched: dense_text, dense_title, bm25_text, bm25_title")
CANDIDATES = Attribute("rag.candidates", "int", "rows that came back")
EF = Attribute("rag.ef", "int", "rows of the HNSW index looked at; 0: exact search")
REFINE = Attribute("rag.refine_factor", "int", "times as many rows were compared exactly as came back; 0: exact search")
FILTER_HASH = Attribute("rag.filter_hash", "string", "12 hex digits of a hash of the filter and the access lists that were applied")
RERANKER = Attribute("rag.reranker", "string", "kind of the reranker")
RERANKED = Attribute("rag.reranked_chunks", "int", "passages given to the reranker")
RANK_BEFORE = Attribute("rag.rank_of_top1_before", "int", "fused rank of the passage that is first now")
SOURCES = Attribute("rag.sources", "int", "distinct documents among the passages")
CHUNKS_DROPPED = Attribute("rag.chunks_dropped", "int", "hits left out of the context: repeated or over the budget")
ABSTAINED = Attribute("rag.abstained", "bool", "nothing was found that answers")
CITATIONS = Attribute("rag.citations", "int", "passages cited")
GUARD_RULES_APPLIED = Attribute("rag.guard.rules", "strings", "rules that applied")
GUARD_ACTIONS = Attribute("rag.guard.actions", "strings", "what was done for each of them: flag, strip or block")
GROUNDED = Attribute("rag.groundedness", "float", "share of the answer's words that stand in the passages its sentences cite")
CONFIDENCE = Attribute("rag.confidence", "string", "how far the answer can be trusted by what it rests on: high, medium or low")
TENANT = Attribute("rag.tenant_hash", "string", "whose key asked: 12 digits of a hash of the key's id")
ATTEMPT = Attribute("rag.attempt", "int", "tries it took, 1 or 2")
POOL_WAIT_MS = Attribute("rag.pool.wait_ms", "float", "the last try waited so long for a connection")
HEDGED = Attribute("rag.hedged", "bool", "asked a second time because the first took long")
CACHE_HIT = Attribute("rag.embed.cache_hit", "bool", "the vector was known and nothing was asked")
BATCH = Attribute("rag.embed.batch", "int", "texts of the call")

RUN_ID = Attribute("dagster.run_id", "string", "the Dagster run; its trace id is this id without dashes")
JOB = Attribute("dagster.job_name", "string", "the job that ran")
STEP_KEY = Attribute("dagster.step_key", "string", "the step of the run")
ASSETS = Attribute("dagster.asset_keys", "strings", "assets that the step makes or checks")
PARTITION = Attribute("dagster.partition_key", "string", "partition: an embedding model, as configured")
FAILED_CHECKS = Attribute("rag.failed_checks", "strings", "checks of the step that failed as errors")
ROWS = Attribute("rag.rows", "int", "rows in all: items, documents, chunks")
REUSED = Attribute("rag.reused", "int", "rows taken over from the run before")
COMPUTED = Attribute("rag.computed", "int", "texts that had no vector yet and were embedded")
AS_BEFORE = Attribute("rag.as_before", "bool", "found as it was: nothing was built or measured")
QUERIES = Attribute("rag.queries", "int", "queries asked")
MRR = Attribute("rag.mrr", "float", "mean reciprocal rank")
GATE = Attribute("rag.gate", "string", "the gate: retrieval_quality, warm_up or canary")
VERDICT = Attribute("rag.verdict", "string", "PASS, FAIL or INCONCLUSIVE")
DETECTOR = Attribute("rag.detector", "string", "the drift detector: evaluation, embedding, query, corpus or index")
FINDINGS = Attribute("rag.findings", "strings", "kinds of what is not as it was at the release")
RESTORE_SECONDS = Attribute("rag.restore_seconds", "float", "seconds from the beginning of a rollback to its first answers")

# spans

_SERVED = (METHOD, ROUTE, STATUS, OUTCOME)
_ANSWERED = (TENANT, SNAPSHOT_ID, GENERATION, QUERY_TOKENS, RETRIEVED_CHUNKS, RERANK_SCORE_TOP1, DEGRADED, DEADLINE_MS)
ROUTES = ("/v1/query", "/v1/retrieve", "/v1/chat/completions", "/v1/feedback", "/v1/release")
REQUEST = Span("request", "server", "an address without a span of its own", (METHOD, STATUS, OUTCOME), (TENANT,))
QUERY = Span("POST /v1/query", "server", "a question answered", _SERVED, (*_ANSWERED, CONTEXT_TOKENS, ABSTAINED))
CHAT_COMPLETIONS = Span(
    "POST /v1/chat/completions", "server", "the same for OpenAI clients", _SERVED, (*_ANSWERED, CONTEXT_TOKENS, ABSTAINED)
)
RETRIEVE_ROUTE = Span("POST /v1/retrieve", "server", "passages found", _SERVED, _ANSWERED)
FEEDBACK = Span("POST /v1/feedback", "server", "a thumb taken", _SERVED, (TENANT,))
RELEASE = Span("GET /v1/release", "server", "what is live", _SERVED, (TENANT,))
EMBED_ROUTE = Span("POST /v1/embeddings", "server", "texts embedded, in the embedding service", _SERVED, (REQUEST_MODEL, BATCH))
TOKENS_ROUTE = Span("POST /v1/token_embeddings", "server", "token vectors of texts, in the embedding service", _SERVED)
RERANK_ROUTE = Span("POST /v1/rerank", "server", "texts judged by the cross-encoder, in the embedding service", _SERVED)
ADMIT = Span("admit", "internal", "the body becomes a question")
ENCODE = Span("encode", "internal", "the question becomes a vector", (CACHE_HIT,))
EMBEDDINGS = Span(
    "embeddings",
    "client",
    "the embedding service is asked",
    (OPERATION, PROVIDER, REQUEST_MODEL, BATCH, DIMENSIONS, ATTEMPT, HEDGED, POOL_WAIT_MS),
    named_after="model",
)
RETRIEVE = Span(
    "retrieve",
    "internal",
    "the snapshot is searched",
    (OPERATION, DATA_SOURCE, TOP_K, RETRIEVED_CHUNKS, SOURCES, SCORES),
    (SCORE_TOP1, SCORE_GAP),
)
RETRIEVE_VECTOR = Span("retrieve.vector", "internal", "one vector search", (DATABASE, SIGNAL, CANDIDATES, EF, REFINE), (FILTER_HASH,))
RETRIEVE_FTS = Span("retrieve.fts", "internal", "one full-text search", (DATABASE, SIGNAL, CANDIDATES), (FILTER_HASH,))
FUSE = Span("fuse", "internal", "the signals become one order", (CANDIDATES,))
RERANK = Span("rerank", "internal", "the best passages are ranked again", (), (RERANKER, RERANKED, RERANK_SCORE_TOP1, RANK_BEFORE))
ASSEMBLE = Span("assemble", "internal", "passages an answer may rest on", (CONTEXT_TOKENS, CHUNKS_DROPPED, SOURCES))
GENERATE = Span("generate", "internal", "the answer is made", (ABSTAINED, CITATIONS), (GROUNDED, CONFIDENCE))
CHAT = Span(
    "chat",
    "client",
    "a language model is asked",
    (OPERATION, PROVIDER, REQUEST_MODEL),
    (INPUT_TOKENS, OUTPUT_TOKENS, FINISH_REASONS, FIRST_CHUNK),
    named_after="model",
)
GUARD_INPUT = Span("guard.input", "internal", "the guard on what is asked", (), (GUARD_RULES_APPLIED, GUARD_ACTIONS))
GUARD_CONTEXT = Span("guard.context", "internal", "the guard on what was retrieved", (), (GUARD_RULES_APPLIED, GUARD_ACTIONS))
GUARD_OUTPUT = Span("guard.output", "internal", "the guard on what is answered", (), (GUARD_RULES_APPLIED, GUARD_ACTIONS))
RUN = Span("run", "internal", "a run of a Dagster job", (RUN_ID, JOB), (PARTITION,), named_after="job")
STEP = Span(
    "step",
    "internal",
    "a step of it: an asset, a check or an op",
    (RUN_ID, STEP_KEY),
    (ASSETS, PARTITION, SNAPSHOT_ID, FAILED_CHECKS),
    named_after="step",
)
LIST = Span("list", "internal", "the source is asked what it holds", (ROWS,))
PARSE = Span("parse", "internal", "items of the source become documents", (ROWS, REUSED))
CUT = Span("cut", "internal", "documents become chunks", (ROWS, REUSED))
EMBED = Span("embed", "internal", "texts of chunks become vectors", (COMPUTED,))
INDEX = Span("index", "internal", "chunks and vectors become a snapshot", (SNAPSHOT_ID, ROWS, AS_BEFORE))
VERIFY = Span("verify", "internal", "every file of a snapshot is read and hashed", (SNAPSHOT_ID,))
MEASURE = Span("measure", "internal", "a snapshot is measured on the eval set", (SNAPSHOT_ID, QUERIES, MRR, AS_BEFORE))
JUDGE = Span("gate", "internal", "a gate judges a snapshot", (GATE, SNAPSHOT_ID, VERDICT))
PROMOTE = Span("promote", "internal", "a snapshot becomes the release", (), (SNAPSHOT_ID, GENERATION))
ROLL_BACK = Span("rollback", "internal", "an earlier snapshot becomes the release again", (), (SNAPSHOT_ID, GENERATION))
DETECT = Span("detect", "internal", "a drift detector looks at the release", (DETECTOR, FINDINGS), (SNAPSHOT_ID,))
REHEARSE = Span("rehearse", "internal", "a rollback is rehearsed on a scratch store", (SNAPSHOT_ID, RESTORE_SECONDS))

PHASES = (ADMIT, ENCODE, RETRIEVE, RERANK, ASSEMBLE, GENERATE)
# metrics

_ROUTE_LABEL = Label("route", (*ROUTES[:3], "other"))
_OUTCOME_LABEL = Label("outcome", tuple(Outcome))
_PHASE = Label("phase", tuple(span.name for span in PHASES))
_PART = Label("part", ("embedding", "text_index", "vector_index", "rerank", "llm"))
_STAGE = Label("stage", ("vector", "fts", "fuse"))
_TEST = Label("test", ("query", "corpus"))
_DROPPED = Label("reason", ("queue_full", "refused", "shutdown"))
_VERDICT = Label("verdict", ("up", "down"))
_SHED = Label("reason", ("overloaded", "rate_limited", "budget_exhausted"))
_DEPENDENCY = Label("dependency", ("embedder", "llm", "reranker"))
_CALL = Label("kind", ("first", "retry", "hedge", "failure", "refused"))
_CACHE = Label("result", ("hit", "miss"))
_EMBEDDER_OUTCOME = Label("outcome", ("ok", "rejected", "unavailable", "late", "client_error", "error"))
_INPUT_TYPE = Label("input_type", ("query", "document"))
_EMBEDDER_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = Label("result", ("written", "dropped"))
_CANARY = Label("result", ("fell_back", "shadowed", "dropped", "failed"))
_GUARD = Label("guard", ("input", "context", "output"))
_RULE = Label("rule", GUARD_RULES)
_ACTION = Label("action", ("flag", "strip", "block"))
_CONFIDENCE = Label("confidence", ("high", "medium", "low"))
_LLM_ERROR = Label("error_type", LLM_REASONS)
_LLM_SECONDS = tuple(0.01 * 2**power for power in range(14))
_CHANGE = Label("result", ("promoted", "overridden", "rolled_back"))
_RESTORED = Label("part", ("restore", "open", "answer"))
_SENSOR = Label("sensor", ("drift_holds", "missed_week", "canary_watch", "observation_log", "releases"))
_WHEN = Label("when", ("now", "release", "before"))
_SCORE_BOUNDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_COUNTS = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 10.0, 20.0, 50.0)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 10.0)
_SWAP_SECONDS = (0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_I, _Q, _R, _G = Category.INFRASTRUCTURE, Category.QUERY, Category.RETRIEVAL, Category.GENERATION


def _counter(category: Category, name: str, unit: str, says: str, *labels: Label, read: bool = False) -> Metric:
    return Metric(f"{name}_total", "counter", unit, category, says, labels, read=read)


def _gauge(category: Category, name: str, unit: str, says: str, *labels: Label) -> Metric:
    return Metric(name, "gauge", unit, category, says, labels, read=True)


def _histogram(category: Category, name: str, unit: str, says: str, buckets: tuple[float, ...], *labels: Label) -> Metric:
    return Metric(name, "histogram", unit, category, says, labels, buckets)


REQUESTS = _counter(_I, "rag_requests", "requests", "requests by how they ended", _ROUTE_LABEL, _OUTCOME_LABEL)
REQUEST_SECONDS = _histogram(
    _I, "rag_request_duration_seconds", "seconds", "first byte in to last byte out", _REQUEST_SECONDS, _ROUTE_LABEL, _OUTCOME_LABEL
)
PHASE_SECONDS = _histogram(_I, "rag_phase_duration_seconds", "seconds", "time of each phase", _SECONDS, _PHASE)
INFLIGHT = _gauge(_I, "rag_inflight_requests", "requests", "requests under way")
DEGRADED_TOTAL = _counter(_I, "rag_degraded", "requests", "answers that had to do without a part", _PART)
SPANS_DROPPED = _counter(_I, "rag_spans_dropped", "spans", "spans that were to be kept and reached no sink", _DROPPED)
SWAP_SECONDS = _histogram(_I, "rag_swap_duration_seconds", "seconds", "from reading a new release to its first answer", _SWAP_SECONDS)

SHED = _counter(_I, "rag_shed", "requests", "requests turned away, by why", _SHED)
WAITING = _gauge(_I, "rag_waiting_requests", "requests", "requests that wait for a slot")
RUNNING = _gauge(_I, "rag_running_requests", "requests", "requests that hold a slot")
SLOTS = _gauge(_I, "rag_slots", "requests", "requests that may hold a slot at once")
BREAKER = _gauge(_I, "rag_breaker_state", "1", "0 closed, 1 half open, 2 open", _DEPENDENCY)
POOL_IN_USE = _gauge(_I, "rag_pool_in_use", "calls", "calls to the embedding service under way")
POOL_SIZE = _gauge(_I, "rag_pool_size", "calls", "calls to the embedding service that may be under way at once")
POOL_WAIT = _histogram(
    _I,
    "rag_pool_wait_seconds",
    "seconds",
    "time that calls to the embedding service waited for a connection",
    (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5),
)
POOL_WAITERS = _gauge(_I, "rag_pool_waiters", "calls", "calls to the embedding service that wait for a connection")
CALLS = _counter(
    _I, "rag_embedding_calls", "calls", "first tries, second tries, hedges, failures and refusals of the breaker", _CALL, read=True
)
EMBED_SECONDS = _histogram(
    _I, "rag_embed_duration_seconds", "seconds", "time of calls to the embedding service, second tries and all", _SECONDS
)
CACHED = _counter(_I, "rag_embedding_cache", "texts", "question vectors that were known or had to be asked for", _CACHE, read=True)
OBSERVATIONS = _counter(_I, "rag_observations", "rows", "rows of the observation log", _ROWS, read=True)
CANARY_ANSWERS = _counter(_I, "rag_canary_answers", "answers", "what became of answers of the canary", _CANARY, read=True)

QUERY_TOKENS_SEEN = _histogram(_Q, "rag_query_tokens", "tokens", "length of questions", (4, 8, 16, 32, 64, 128, 256, 512))
RETRIEVAL_SCORE = _histogram(_Q, "rag_retrieval_score_top1", "1", SCORE_TOP1.says, _SCORE_BOUNDS)
RERANK_SCORE = _histogram(_Q, "rag_rerank_score_top1", "1", RERANK_SCORE_TOP1.says, _SCORE_BOUNDS)
GAP = _histogram(_Q, "rag_score_gap", "1", SCORE_GAP.says, (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5))
ABSTAIN = _counter(_Q, "rag_abstain", "answers", "questions that the corpus does not answer")
FEEDBACK_TOTAL = _counter(_Q, "rag_feedback", "thumbs", "what people say of answers", _VERDICT)
EVAL_MRR = _gauge(_Q, "rag_eval_mrr", "1", "MRR of the champion as measured last")
EVAL_MRR_AT_RELEASE = _gauge(_Q, "rag_eval_mrr_at_release", "1", "MRR of the champion when it was released")
EVAL_MRR_LOW = _gauge(_Q, "rag_eval_mrr_ci_low", "1", "lower end of the 95 % interval of the champion's MRR")
EVAL_QUERIES = _gauge(_Q, "rag_eval_queries", "queries", "queries that the champion was measured on last")
EVAL_FLOOR = _gauge(_Q, "rag_eval_mrr_floor", "1", "MRR below which nothing is released")
EVAL_NDCG = _gauge(_Q, "rag_eval_ndcg", "1", "nDCG of the champion as measured last")
EVAL_RECALL = _gauge(_Q, "rag_eval_recall", "1", "recall of the champion as measured last")
EVAL_AT = _gauge(_Q, "rag_eval_last_success_timestamp_seconds", "seconds", "Unix time of the champion's last measurement")

RETRIEVE_SECONDS = _histogram(_R, "rag_retrieve_duration_seconds", "seconds", "time of each search and of fusion", _SECONDS[:-1], _STAGE)
CHUNKS = _histogram(_R, "rag_retrieved_chunks", "passages", RETRIEVED_CHUNKS.says, _COUNTS)
DISTINCT_SOURCES = _histogram(_R, "rag_distinct_sources", "documents", SOURCES.says, _COUNTS)
ZERO_RESULTS = _counter(_R, "rag_zero_result", "requests", "questions for which nothing was found")
SHORT_RESULTS = _counter(_R, "rag_short_result", "requests", "requests that found fewer passages than they asked for")
INDEX_AGE = _gauge(_R, "rag_index_age_seconds", "seconds", "age of the snapshot that answers")
INDEX_BEHIND = _gauge(_R, "rag_index_behind_corpus", "1", "1 while the source or the corpus is not what the champion was built from")
SOURCE_CHANGES = _gauge(_R, "rag_source_changes", "items", "items of the source that are new, changed or gone since it was last read")
INDEX_ROWS = _gauge(_R, "rag_index_rows", "rows", "rows of the snapshot that answers")
INDEX_UNINDEXED = _gauge(_R, "rag_index_unindexed_rows", "rows", "rows of the champion that no index covers")
INDEX_GENERATION = _gauge(_R, "rag_index_generation", "1", "number of the release that answers")
LEDGER_GENERATION = _gauge(_R, "rag_ledger_generation", "1", "number of the release that should answer")
PREVIOUS_OPEN = _gauge(
    _R, "rag_previous_snapshot_open", "1", "1 while a rollback would only swap a reference; absent before a second release"
)
HOLDS = _gauge(_R, "rag_holds", "1", "holds that stop promotions")
RELEASES = _counter(_R, "rag_promotions", "releases", "releases that the ledger names, by how they came to be", _CHANGE, read=True)
REFUSED_AT = _gauge(
    _R, "rag_promotion_refused_timestamp_seconds", "seconds", "Unix time of the last refused promotion; absent once a release came after it"
)
RESTORE_SECONDS_LAST = _gauge(_R, "rag_restore_duration_seconds", "seconds", "time of each part of the last rehearsed rollback", _RESTORED)
DRILL_AT = _gauge(_R, "rag_drill_last_success_timestamp_seconds", "seconds", "Unix time of the last rehearsed rollback that went well")
HEARTBEAT = _gauge(
    _I, "rag_sensor_heartbeat_timestamp_seconds", "seconds", "Unix time at which each sensor of the pipeline last did its work", _SENSOR
)
ANN_RECALL = _gauge(_R, "rag_ann_recall", "1", "share of the nearest vectors that the champion's index finds")
DRIFT_STATISTIC = _gauge(_R, "rag_drift_statistic", "1", "squared MMD of queries or passages against those of the release", _TEST)
DRIFT_P = _gauge(_R, "rag_drift_pvalue", "1", "its permutation p-value", _TEST)
DRIFT_AT = _gauge(_R, "rag_drift_last_success_timestamp_seconds", "seconds", "Unix time up to which every drift detector has reported")
PAIRED_COSINE = _gauge(_R, "rag_paired_cosine", "1", "mean cosine of stored vectors with those of the same texts embedded again")
SAME_MODEL = _gauge(_R, "rag_model_unchanged", "1", "1 while the configured model is the one the champion was built with")
SERVICE_COSINE = _gauge(_R, "rag_service_cosine", "1", "mean cosine of stored vectors with those that the embedding service gives now")
SERVICE_SAME_MODEL = _gauge(_R, "rag_service_model_unchanged", "1", "1 while the embedding service names the model of the live snapshot")
DIVERSITY = _gauge(_R, "rag_result_documents", "documents", "distinct documents among an evaluation's results", _WHEN)
UNLIKENESS = _gauge(_R, "rag_result_unlikeness", "1", "1 less the mean cosine between passages of an evaluation's results", _WHEN)
VARIETY = _gauge(_R, "rag_result_variety", "1", "how little passages repeat each other in the last 100 results: 1 not at all, 0 wholly")

GUARD_EVENTS = _counter(_G, "rag_guard_events", "events", "rules of guards that applied", _GUARD, _RULE, _ACTION)
CANARY_LEAKS = _counter(_G, "rag_prompt_canary_leak", "answers", "answers that quoted their prompt; they are withheld")
INVALID_CITATIONS = _counter(_G, "rag_citations_invalid", "citations", "citations of passages that were not given; they are taken out")
UNCITED = _counter(_G, "rag_answers_uncited", "answers", "answers with a sentence that cites nothing")
GROUNDEDNESS = _histogram(_G, "rag_groundedness", "1", "share of an answer's words that its cited passages hold", _SHARES)
CONFIDENCES = _counter(_G, "rag_answers", "answers", "answers by how far they can be trusted", _CONFIDENCE)
LLM_SECONDS = _histogram(
    _G, "gen_ai_client_operation_duration_seconds", "seconds", "time of calls to the language model", _LLM_SECONDS, _LLM_ERROR
)
LLM_FIRST = _histogram(
    _G, "gen_ai_client_operation_time_to_first_chunk_seconds", "seconds", "time to the first piece of its answer", _LLM_SECONDS
)
CONTEXT_TOKENS_SEEN = _histogram(_G, "rag_context_tokens", "tokens", "length of contexts", (128, 256, 512, 1024, 2048, 4096, 8192, 16384))


def _of_embedder(metric: Metric) -> Metric:
    return replace(metric, read=False, where="embedder")


EMBEDDER_REQUESTS = _of_embedder(
    _counter(_I, "rag_embedder_requests", "requests", "requests to the embedding service by how they ended", _EMBEDDER_OUTCOME)
)
EMBEDDER_REJECTED = _of_embedder(_counter(_I, "rag_embedder_rejected", "requests", "requests refused because too much work waits"))
EMBEDDER_LATE = _of_embedder(_counter(_I, "rag_embedder_late", "requests", "requests whose deadline passed before they were computed"))
EMBEDDER_SECONDS = _of_embedder(
    _histogram(_I, "rag_embedder_request_duration_seconds", "seconds", "time of requests to the embedding service", _EMBEDDER_SECONDS)
)
EMBEDDER_BATCH = _of_embedder(
    _histogram(_I, "rag_embedder_batch_size", "texts", "texts computed together", (1, 2, 4, 8, 16, 32, 64, 128, 256), _INPUT_TYPE)
)
EMBEDDER_BATCH_SECONDS = _of_embedder(
    _histogram(_I, "rag_embedder_batch_duration_seconds", "seconds", "time of computing a batch", _EMBEDDER_SECONDS, _INPUT_TYPE)
)
EMBEDDER_DEPTH = _of_embedder(_gauge(_I, "rag_embedder_queue_depth", "texts", "texts that wait to be computed", _INPUT_TYPE))


def _declared(kind: type[_Kind]) -> tuple[_Kind, ...]:
    return tuple({id(value): value for value in globals().values() if isinstance(value, kind)}.values())


ATTRIBUTES, SPANS, METRICS = _declared(Attribute), _declared(Span), _declared(Metric)
