"""The one settings object: `ragline.toml` says what, `RAGLINE_*` variables say where and hold secrets.

Read once with `load_settings()` and passed down. Every part is frozen; an unknown key is an error that names the nearest valid one.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from rag_serving.errors import ConfigError

CONFIG_NAME = "ragline.toml"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(_Frozen):
    """One row of `[[models]]`: an embedding model and how it is used. What it *is* is its fingerprint, taken from what was loaded."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    source: str = Field(pattern=r"^(wheel|hub|path|hashing):.+")
    query_prompt: str = ""
    document_prompt: str = ""
    dims: int = Field(gt=0, description="Vector length; checked against what is loaded.")
    max_tokens: int = Field(gt=0, description="Longest input in tokens; longer text is cut, so chunks are sized to it.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the CPU computes it (amx_bf16, avx512_bf16), else float32."
    )
    dense_scale: float = Field(
        1.0, gt=0, description="What its cosines count for in fusion: more if they spread little, less if they say little."
    )


class Corpus(_Frozen):
    source: str = Field(
        "sample:", description="sample:, sample:small, folder:PATH, jsonl:PATH, beir:PATH, urls:FILE, s3://... or fsspec:URL"
    )
    private_hosts: tuple[str, ...] = Field((), description="Hosts that urls: may read although their address is not public, as host:port.")


class Parsing(_Frozen):
    """What one item of a source may cost; over it, the item is quarantined and the run goes on."""

    timeout_seconds: float = Field(30.0, gt=0)
    memory_mb: int = Field(1024, ge=64, description="Memory that parsing one item may take, in MiB.")
    max_bytes: int = Field(50_000_000, gt=0, description="Largest item.")
    max_pages: int = Field(5000, gt=0, description="Most pages, slides or sheets.")


class EvalSetChoice(_Frozen):
    source: str = Field("sample:", description="sample:, sample:small or beir:PATH")
    k: int = Field(10, ge=1, le=100)


class Chunking(_Frozen):
    strategy: Literal["structure", "sentence", "fixed"] = Field(
        "structure", description="structure: at headings, paragraphs, sentences; sentence: whole sentences; fixed: words."
    )
    max_tokens: int = Field(240, ge=16, le=8192, description="Longest chunk, in tokens of the default embedding model.")
    overlap: int = Field(0, ge=0, le=4096, description="Tokens that a chunk may repeat of the one before.")

    @model_validator(mode="after")
    def _moves_on(self) -> "Chunking":
        if self.overlap > self.max_tokens // 2:
            raise ValueError(f"overlap {self.overlap} is more than half of max_tokens {self.max_tokens}")
        return self


FilterKind = Literal["text", "number", "flag"]
_FilterKey = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,62}$")]


class Index(_Frozen):
    hnsw_from_rows: int = Field(2000, ge=0, description="Below this many rows vectors are searched exactly, without an index.")
    m: int = Field(20, ge=4, le=128)
    ef_construction: int = Field(300, ge=16, le=2000)
    ef: int = Field(256, ge=16, le=4000)
    rebuild_share: float = Field(0.2, ge=0, le=1, description="Changed rows since the last full build, as a share, from which one is due.")
    rebuild_after: int = Field(8, ge=0, le=100, description="Incremental builds that may follow a full one.")
    filters: Mapping[_FilterKey, FilterKind] = Field({}, description="Metadata that requests may filter by: key = text, number or flag.")

    @field_validator("filters")
    @classmethod
    def _distinct(cls, filters: Mapping[str, FilterKind]) -> Mapping[str, FilterKind]:
        reserved = {"and", "or", "not", "doc_id", "uri"} & {key.lower() for key in filters}
        if reserved or len({key.lower() for key in filters}) < len(filters):
            raise ValueError(f"{sorted(reserved)} are taken" if reserved else "two keys differ only in case")
        return filters


class Weights(_Frozen):
    """How much each signal counts in the fused score; 0 switches a signal off. Title signals also weigh by title distinctness."""

    dense_text: float = Field(1.0, ge=0)
    dense_title: float = Field(1.0, ge=0)
    bm25_text: float = Field(0.5, ge=0)
    bm25_title: float = Field(0.3, ge=0)


class Wording(_Frozen):
    """How much shared wording adds to the best `pool` candidates; pool = 0 switches it off."""

    pool: int = Field(30, ge=0, le=200)
    pairs: float = Field(0.3, ge=0, description="For the query's adjacent word pairs.")
    words: float = Field(0.3, ge=0, description="For the query's words.")
    title: float = Field(0.3, ge=0, description="For a title that the query names.")


class Retrieval(_Frozen):
    candidates: int = Field(100, ge=10, le=1000, description="Hits asked of each signal before fusion.")
    fusion: Literal["score", "rank"] = Field("score", description="score: weighted sum, then wording; rank: reciprocal rank fusion alone.")
    weights: Weights = Weights()
    wording: Wording = Wording()

    def scaled(self, dense_scale: float) -> "Retrieval":
        """The same with the dense weights of a model whose cosines count `dense_scale` times."""
        dense = {name: weight * dense_scale for name, weight in self.weights.model_dump().items() if name.startswith("dense_")}
        return self.model_copy(update={"weights": self.weights.model_copy(update=dense)})

    @model_validator(mode="after")
    def _some_signal(self) -> "Retrieval":
        if not any(self.weights.model_dump().values()):
            raise ValueError("at least one weight must be above 0")
        return self


class RerankWeights(_Frozen):
    """The score after reranking is the weighted sum of the fused score, of the reranker's own, and of single signals that count more or less.

    Cosines count as they are and BM25 scores divided by 20, as in fusion; title signals also weigh by title distinctness. `ragline fit` finds
    weights on the tune half of an eval set.
    """

    fused: float = Field(1.0, ge=0)
    relevance: float = Field(1.0, ge=0)
    dense_text: float = 0.0
    dense_title: float = 0.0
    bm25_text: float = 0.0
    bm25_title: float = 0.0
    wording: float = 0.0


class Rerank(_Frozen):
    """What orders the best `pool` passages anew; copied into the manifest of each snapshot but for the budget."""

    method: Literal["none", "maxsim", "cross_encoder", "endpoint"] = Field(
        "none", description="maxsim: token vectors stored in the snapshot; cross_encoder: a model; endpoint: RAGLINE_RERANK_URL."
    )
    model: str = Field("", description="cross_encoder: path:DIR or hub:owner/name@revision; endpoint: the model to name there.")
    pool: int = Field(50, ge=2, le=200, description="Passages that are ordered anew; they stay above the rest.")
    budget_ms: float = Field(150.0, gt=0, le=10_000, description="Over it, and on any error, the fused order stands.")
    diversity: float = Field(0.0, ge=0, lt=1, description="MMR: 0 chooses by score alone, near 1 by difference from what is chosen.")
    weights: RerankWeights = RerankWeights()

    @property
    def active(self) -> bool:
        return self.method != "none" or self.diversity > 0

    @model_validator(mode="after")
    def _with_a_model(self) -> "Rerank":
        if self.method == "cross_encoder" and not self.model.startswith(("path:", "hub:")):
            raise ValueError(f"method cross_encoder needs a model, path:DIR or hub:owner/name@revision, not {self.model!r}")
        return self


class Gate(_Frozen):
    mrr_floor: float = Field(0.80, ge=0, le=1)
    margin: float = Field(0.02, gt=0, lt=1, description="Largest MRR loss against the champion that still passes.")
    alpha: float = Field(0.05, gt=0, lt=0.5)
    min_queries: int = Field(300, ge=1)
    ann_recall_floor: float = Field(0.95, ge=0, le=1)
    slice_margin: float = Field(0.05, gt=0, lt=1, description="Largest MRR loss of a slice of queries that may be significant.")
    slice_min_queries: int = Field(50, ge=2, description="Slices of fewer queries are not compared.")
    max_age_days: float = Field(7.0, gt=0)
    max_shrink: float = Field(0.2, ge=0, le=1, description="Largest share of rows a promotion may lose.")
    warm_up_p95_ms: float = Field(10.0, gt=0, description="The vector search of a warmed snapshot stays below this.")
    override_hours: float = Field(24.0, gt=0, description="How long a release may stand on an override.")


class Retention(_Frozen):
    keep: int = Field(3, ge=1, description="Newest snapshots of each embedding model that are kept in any case.")
    unused_days: float = Field(30.0, ge=1, description="Embeddings that no snapshot uses are kept this long.")


class Drift(_Frozen):
    alpha: float = Field(0.01, gt=0, lt=0.5, description="Error rate of the query and corpus drift tests.")
    cosine_floor: float = Field(0.999, gt=0, le=1, description="Lowest mean cosine of stored vectors with those of the same texts now.")
    probes: int = Field(200, ge=10, le=10_000, description="Texts of the champion that are embedded again.")
    window: int = Field(500, ge=50, le=5000, description="Queries or passages on each side of a drift test.")
    max_age_days: float = Field(30.0, gt=0, description="A champion built longer ago, when a newer corpus is there, is stale.")
    max_diversity_loss: float = Field(0.2, gt=0, lt=1, description="Largest share of distinct documents in results that may be lost.")
    automatic_rollback: bool = Field(False, description="Roll back by itself when the champion falls below the floor; else it is proposed.")
    drill_budget_seconds: float = Field(30.0, gt=0, description="Longest time a rollback drill may take.")


class Alerts(_Frozen):
    format: Literal["auto", "generic", "slack"] = Field("auto", description="auto: Slack's body for a Slack host, else plain JSON.")


class Serving(_Frozen):
    top_k: int = Field(5, ge=1, le=50)
    poll_seconds: float = Field(0.5, gt=0, le=1)
    deadline_seconds: float = Field(2.8, gt=0, le=600, description="A request is answered or refused within this.")
    encode_timeout_seconds: float = Field(1.0, gt=0, description="At most this much of it may pass before words alone are searched.")


class Canary(_Frozen):
    """What traffic a canary gets, what is logged of every request, and when the log speaks against a canary."""

    mode: Literal["shadow", "split", "staged", "off"] = Field(
        "shadow", description="shadow: it answers too, unseen; split: it answers a share of the callers; staged: one, then the other."
    )
    share: float = Field(0.05, ge=0, le=1, description="Of callers or conversations, that the canary answers in split mode.")
    shadow_share: float = Field(1.0, ge=0, le=1, description="Of requests, that the canary answers too in shadow mode.")
    shadow_concurrency: int = Field(1, ge=1, le=64, description="Shadow answers at a time; more are dropped.")
    shadow_deadline_seconds: float = Field(10.0, gt=0)
    log_text: bool = Field(False, description="Keep the words of queries in the observation log, and document ids as they are.")
    log_rows: int = Field(500, ge=1, le=100_000, description="Rows after which the log is written.")
    log_seconds: float = Field(2.0, gt=0, le=60, description="Longest time a row waits to be written.")
    keep_days: float = Field(30.0, ge=1, description="How long the observation log is kept.")
    min_requests: int = Field(300, ge=20, description="Compared requests from which real traffic alone is enough for a verdict.")
    margin: float = Field(0.02, gt=0, lt=1, description="Largest loss in a share of requests (answered, cited, grounded, ...) that passes.")
    slow_ms: float = Field(3000.0, gt=0, description="A request that takes longer counts as slow.")
    automatic_abort: bool = Field(True, description="End a canary by itself once harm is shown; else it is only told.")


class Access(_Frozen):
    """What an API key may use, and which names the service answers to. Without keys it serves this machine alone, unmetered."""

    requests_per_minute: int = Field(600, ge=0, description="Of each key; 0: unlimited.")
    burst_seconds: int = Field(2, ge=0, le=60, description="A key may send in so many seconds what its rate gives in them; 0: all at once.")
    tokens_per_day: int = Field(5_000_000, ge=0, description="Of each key: tokens of its questions and of their answers; 0: unlimited.")
    poll_seconds: float = Field(1.0, gt=0, le=5, description="How soon a new or revoked key counts.")
    allowed_hosts: tuple[str, ...] = Field((), description="Names it is reached under, beside localhost, its own host and plain addresses.")


class Admission(_Frozen):
    """How much is worked on at once. Waiting is bounded by number, and by time: half of what a request has left."""

    concurrency: int = Field(16, ge=1, le=1000, description="Most requests worked on at once; fewer while the event loop runs late.")
    queue: int = Field(64, ge=0, le=10_000, description="Requests that may wait for that.")


class EncoderClient(_Frozen):
    """How the embedding service is asked for a query's vector, and when it is left alone."""

    cache_entries: int = Field(2048, ge=0, description="Vectors of queries that are kept; 0: none.")
    retry_share: float = Field(0.1, ge=0, le=0.1, description="Second tries, as a share of requests.")
    hedge_share: float = Field(0.0, ge=0, le=0.05, description="Requests sent twice because the first takes unusually long; 0: none.")
    unnamed: Literal["refuse", "probe"] = Field(
        "refuse", description="A service without fingerprints. probe: it is believed while stored passages get their stored vectors there."
    )
    probe_seconds: float = Field(
        60.0, ge=0, le=86_400, description="How often it embeds stored passages again, to be compared with their vectors; 0: never."
    )
    breaker_failures: int = Field(5, ge=1, le=100, description="Failures within the window after which it is not asked any more.")
    breaker_window_seconds: float = Field(10.0, gt=0)
    breaker_open_seconds: float = Field(5.0, gt=0, le=8, description="Then one request tries whether it works again.")

    @model_validator(mode="after")
    def _probed_if_unnamed(self) -> "EncoderClient":
        if self.unnamed == "probe" and not self.probe_seconds:
            raise ValueError('unnamed = "probe" needs probe_seconds above 0')
        return self


class Embedder(_Frozen):
    """How the embedding service works."""

    batch_tokens: int = Field(128, ge=16, le=16_384, description="Tokens that are computed together; a longer text is alone.")
    max_wait_ms: float = Field(2.0, ge=0, le=50, description="How long a query may wait for others to be computed with.")
    queue_texts: int = Field(
        1024, ge=1, le=100_000, description="Queries that may wait, and four times as many documents; more are refused."
    )
    drain_seconds: float = Field(0.5, ge=0, le=60, description="After SIGTERM: how long it is not ready but still takes requests.")


GuardAction = Literal["allow", "flag", "strip", "block"]


class Guards(_Frozen):
    """What happens where a guard's rule applies. allow: nothing is looked for; flag: noted; strip: taken out; block: refused or left out."""

    query_characters: GuardAction = Field("strip", description="Invisible and bidirectional characters in a question.")
    query_injection: Literal["allow", "flag", "block"] = Field("flag", description="A question that gives orders to a model.")
    query_threshold: float = Field(0.5, gt=0, le=1, description="Score from which a question is one.")
    passage_characters: GuardAction = Field("strip", description="Invisible and bidirectional characters in a passage.")
    passage_injection: GuardAction = Field("strip", description="Sentences of a passage that give orders to a model; block: the passage.")
    passage_threshold: float = Field(0.9, gt=0, le=1, description="Score from which a sentence is one.")
    source_share: float = Field(0.4, gt=0, le=1, description="Largest share of the passages that one document may have.")
    answer_images: GuardAction = Field("strip", description="Images in an answer, wherever they are.")
    answer_links: GuardAction = Field("strip", description="Addresses in an answer that its passages do not vouch for.")
    answer_markup: GuardAction = Field("strip", description="HTML in an answer: a space makes it text.")
    answer_characters: GuardAction = Field("strip", description="Control, ANSI, invisible and bidirectional characters in an answer.")
    answer_hosts: tuple[str, ...] = Field((), description="Hosts that answers may link to in any case, as host or host:port.")
    answer_length: int = Field(8000, ge=100, le=1_000_000, description="Most characters of an answer.")


class Telemetry(_Frozen):
    """Which traces are sent to the OTLP endpoint; metrics always count everything."""

    share: float = Field(0.1, ge=0, le=1, description="Of traces, that are kept however they end.")
    slow_seconds: float = Field(1.0, gt=0, description="Requests that take longer are kept, as failed, degraded and blocked ones are.")


class Generation(_Frozen):
    context_tokens: int = Field(3000, ge=100, le=200_000, description="Most tokens of passages that an answer may rest on, estimated.")
    answer_tokens: int = Field(300, ge=16, le=8192, description="Most tokens that a language model may write.")
    llm_timeout_seconds: float = Field(
        2.4, gt=0, le=600, description="At most this much of a request's time goes to the language model; then passages are quoted."
    )
    abstain: Literal["tuned", "never"] = Field(
        "tuned", description="tuned: below the threshold that `ragline evalset negatives` stored for the snapshot; never: not by a score."
    )
    sources_apart: Literal["document", "host"] = Field(
        "document", description="What the two sources of an answer of high confidence must differ in."
    )


class LocalLlm(_Frozen):
    model: str = Field("qwen2.5-coder-1.5b-instruct", description="A model of rag_serving/writing/llm_weights.toml.")
    threads: int = Field(2, ge=1, le=256, description="Fewer than there are free cores: threads wait for the slowest.")
    context_tokens: int = Field(500, ge=100, le=200_000, description="Instead of generation.context_tokens under `ragline up --llm local`.")


class Places(_Frozen):
    """Where things are, from the environment: `RAGLINE_<FIELD>` in capitals."""

    home: Path = Field(Path(".ragline"), description="State of this machine: store, models, database.")
    store: Path | None = Field(None, description="The store; default <home>/store.")
    models_dir: Path | None = Field(None, description="Loaded weights; default <home>/models.")
    corpus: str | None = Field(None, description="Overrides corpus.source.")
    eval_set: str | None = Field(None, description="Overrides eval.source.")
    postgres_url: SecretStr | None = Field(None, description="A Postgres to use instead of the embedded one.")
    mlflow_url: str | None = Field(None, description="An MLflow tracking server; default: the same Postgres.")
    host: str = "127.0.0.1"
    serving_port: int = Field(8321, ge=0, le=65535)
    embedder_port: int = Field(8322, ge=0, le=65535)
    dagster_port: int = Field(3000, ge=0, le=65535)
    mlflow_port: int = Field(5000, ge=0, le=65535)
    embedder_url: str | None = Field(None, description="The embedding service; default http://<host>:<embedder_port>.")
    alert_url: SecretStr | None = Field(None, description="A webhook that hears of holds, rollbacks and failed drills.")
    rerank_url: str | None = Field(None, description="A rerank endpoint: its whole address, ending in /rerank.")
    rerank_key: SecretStr | None = Field(None, description="Its key, if it wants one.")
    llm_url: str | None = Field(
        None, description="An OpenAI-compatible endpoint, ending in /v1, that writes answers and synthetic queries."
    )
    llm_model: str | None = Field(None, description="The model to ask there.")
    llm_key: SecretStr | None = Field(None, description="Its key, if it wants one.")
    llm_port: int = Field(8323, ge=0, le=65535, description="Where the local language model listens.")
    context_tokens: int | None = Field(None, ge=100, le=200_000, description="Overrides generation.context_tokens.")
    deadline_seconds: float | None = Field(
        None, gt=0, le=600, description="Overrides serving.deadline_seconds and generation.llm_timeout_seconds."
    )
    allowed_hosts: str | None = Field(None, description="Overrides access.allowed_hosts: names with commas between them.")
    log_format: Literal["plain", "json"] = Field("plain", description="How the services write their logs.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that they write.")
    actor: str | None = Field(None, description="Who acts, for the ledger; default: the login name.")


class Settings(_Frozen):
    root: Path = Field(description="Folder of ragline.toml; relative paths start here.")
    corpus: Corpus = Corpus()
    eval: EvalSetChoice = EvalSetChoice()
    parsing: Parsing = Parsing()
    chunking: Chunking = Chunking()
    index: Index = Index()
    retrieval: Retrieval = Retrieval()
    rerank: Rerank = Rerank()
    gate: Gate = Gate()
    retention: Retention = Retention()
    drift: Drift = Drift()
    alerts: Alerts = Alerts()
    serving: Serving = Serving()
    generation: Generation = Generation()
    local_llm: LocalLlm = LocalLlm()
    access: Access = Access()
    admission: Admission = Admission()
    canary: Canary = Canary()
    encoder: EncoderClient = EncoderClient()
    embedder: Embedder = Embedder()
    guards: Guards = Guards()
    telemetry: Telemetry = Telemetry()
    models: tuple[ModelSpec, ...] = ()
    default_models: tuple[str, ...] = Field((), description="Models that `ragline run` uses when none are named; the first is the default.")
    places: Places = Places()

    @property
    def home(self) -> Path:
        return self.root / self.places.home

    @property
    def store_dir(self) -> Path:
        return self.root / self.places.store if self.places.store else self.home / "store"

    @property
    def models_dir(self) -> Path:
        return self.root / self.places.models_dir if self.places.models_dir else self.home / "models"

    @property
    def embedder_url(self) -> str:
        return self.places.embedder_url or f"http://{self.places.host}:{self.places.embedder_port}"

    def model(self, name: str) -> ModelSpec:
        """The configured model of that name; ConfigError names the nearest one."""
        for spec in self.models:
            if spec.name == name:
                return spec
        names = [spec.name for spec in self.models]
        raise ConfigError(f"no embedding model {name!r} in {CONFIG_NAME}.", fix=_nearest(name, names))


def _nearest(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Valid: {', '.join(valid) or 'none'}."


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Settings
    for part in location:
        if isinstance(part, int):
            continue
        model = model.model_fields[part].annotation
        if getattr(model, "__args__", None):
            model = model.__args__[0]
    return [key for key in model.model_fields if key not in ("root", "places")]


def _explain(error: ValidationError, where: str) -> ConfigError:
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key {key!r} in {where}.", fix=_nearest(str(location[-1]), _keys_at(location[:-1])))
    return ConfigError(f"{key!r} in {where} is {first['input']!r}: {first['msg']}.", fix="Correct the value.")


def read_places(environ: Mapping[str, str]) -> Places:
    """`RAGLINE_*` variables as one object; an unknown one is an error, so that a typo never silently means the default."""
    prefix = "RAGLINE_"
    values = {name.removeprefix(prefix).lower(): value for name, value in environ.items() if name.startswith(prefix) and value}
    values.pop("config", None)
    unknown = sorted(set(values) - set(Places.model_fields))
    if unknown:
        valid = [prefix + name.upper() for name in Places.model_fields]
        raise ConfigError(f"unknown variable {prefix + unknown[0].upper()}.", fix=_nearest(prefix + unknown[0].upper(), valid))
    try:
        return Places.model_validate(values)
    except ValidationError as error:
        raise _explain(error, "the RAGLINE_* variables") from None


def load_settings(config: Path | None = None, *, environ: Mapping[str, str] | None = None) -> Settings:
    """Read `ragline.toml` (given, or RAGLINE_CONFIG, or in the current folder) and the environment.

    A missing file means defaults without models, as on a serving machine. Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    named = str(config or environ.get("RAGLINE_CONFIG") or "")
    path = Path(named or CONFIG_NAME)
    table = _read_table(path, required=bool(named))
    places = read_places(environ)
    for section, source in (("corpus", places.corpus), ("eval", places.eval_set)):
        if source and isinstance(table.setdefault(section, {}), dict):
            table[section]["source"] = source
    for section, key, value in (
        ("serving", "deadline_seconds", places.deadline_seconds),
        ("generation", "llm_timeout_seconds", places.deadline_seconds),
        ("generation", "context_tokens", places.context_tokens),
    ):
        if value and isinstance(table.setdefault(section, {}), dict):
            table[section][key] = value
    if places.allowed_hosts and isinstance(table.setdefault("access", {}), dict):
        table["access"]["allowed_hosts"] = [name for each in places.allowed_hosts.split(",") if (name := each.strip())]
    try:
        settings = Settings.model_validate({**table, "root": path.resolve().parent, "places": places})
    except ValidationError as error:
        raise _explain(error, str(path)) from None
    names = [spec.name for spec in settings.models]
    if len(names) != len(set(names)):
        raise ConfigError(f"two models share a name in {path}: {sorted(names)}.", fix="Give each model its own name.")
    for name in settings.default_models:
        settings.model(name)
    return settings.model_copy(update={"models": tuple(_placed(spec, settings.root) for spec in settings.models)})


def _placed(spec: ModelSpec, root: Path) -> ModelSpec:
    """The same with the folder of a `path:` source absolute."""
    scheme, _, rest = spec.source.partition(":")
    if scheme != "path":
        return spec
    try:
        folder = root / Path(rest).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"model {spec.name!r} has source {spec.source!r}: {error}", fix="Write the folder without ~.") from None
    return spec.model_copy(update={"source": f"path:{folder}"})


def _read_table(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise ConfigError(f"no configuration file at {path}.", fix=f"Give the path of a {CONFIG_NAME}.")
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", fix="Correct the file.") from None
    for key in ("root", "places"):
        if key in table:
            raise ConfigError(f"unknown key {key!r} in {path}.", fix=_nearest(key, _keys_at(())))
    return table
