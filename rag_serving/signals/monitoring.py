"""What is promised of the service and what wakes whom, in the words of the telemetry contract.

`deploy/generate.py` writes the Prometheus rules, the dashboard and the tables of docs/telemetry.md from here. Burn rates follow the SRE Workbook's
multi-window, multi-burn-rate alerts: a long window says that it matters, a short one that it still goes on, and a hundred requests that it is
no accident.
"""

from dataclasses import dataclass
from typing import Literal

from rag_serving.signals import contract
from rag_serving.signals.contract import Metric

Severity = Literal["page", "ticket"]

WINDOWS = ("5m", "30m", "1h", "6h", "3d")
FEWEST_REQUESTS = 100
_REQUESTS, _SECONDS = contract.REQUESTS.name, contract.REQUEST_SECONDS.name
_THEIRS = 'outcome!~"client_error|blocked"'
_FAILED = 'outcome=~"shed|timeout|error"'


@dataclass(frozen=True, slots=True)
class Slo:
    """`bad` over `all`, both with $w for the window, may be at most `budget` over 30 days."""

    name: str
    says: str
    bad: str
    all: str
    budget: float

    def ratio(self, window: str) -> str:
        """The rule that records the share of bad requests over a window."""
        return f"rag:{self.name}:bad_ratio_{window}"


@dataclass(frozen=True, slots=True)
class Alert:
    """`expr` holds for `lasting` before somebody is told. `todo` is what to look at first."""

    name: str
    expr: str
    severity: Severity
    says: str
    todo: str
    lasting: str = "0m"


def _increase(name: str, selector: str) -> str:
    return f"sum(increase({name}{{{selector}}}[$w]))"


_COUNTED = _increase(f"{_SECONDS}_count", _THEIRS)
_IN_TIME = _increase(f"{_SECONDS}_bucket", f'{_THEIRS},le="3.0"')

SLOS = (
    Slo(
        "availability",
        "99.5 % of requests are answered",
        _increase(_REQUESTS, _FAILED),
        _increase(_REQUESTS, _THEIRS),
        0.005,
    ),
    Slo(
        "latency",
        "99 % of answers take less than 3 s",
        f"({_COUNTED} - {_IN_TIME})",
        _COUNTED,
        0.01,
    ),
    Slo(
        "full_quality",
        "98 % of answers have every part",
        _increase(_REQUESTS, 'outcome="degraded"'),
        _increase(_REQUESTS, 'outcome=~"ok|abstained|degraded"'),
        0.02,
    ),
)
_BURNS: tuple[tuple[str, float, str, str, Severity], ...] = (
    ("Fast", 14.4, "1h", "5m", "page"),
    ("Steady", 6, "6h", "30m", "page"),
    ("Slow", 1, "3d", "6h", "ticket"),
)
ZERO_RESULTS = "rag:zero_result:ratio_30m"
DOCUMENT_SHARE = "rag:distinct_documents:ratio_30m"
RECORDED = {
    DOCUMENT_SHARE: f"sum(increase({contract.DISTINCT_SOURCES.name}_sum[30m])) / (sum(increase({contract.CHUNKS.name}_sum[30m])) > 0)",
    ZERO_RESULTS: f"sum(increase({contract.ZERO_RESULTS.name}[30m])) / (sum(increase({contract.CHUNKS.name}_count[30m])) > 0)",
}


def _burn_alerts() -> tuple[Alert, ...]:
    found = []
    for slo in SLOS:
        title = "".join(word.capitalize() for word in slo.name.split("_"))
        for speed, factor, long, short, severity in _BURNS:
            worst = f"{factor * slo.budget:g}"
            enough = slo.all.replace("$w", long)
            expr = f"{slo.ratio(long)} > {worst} and {slo.ratio(short)} > {worst} and {enough} > {FEWEST_REQUESTS}"
            says = f"{slo.says}: the budget of 30 days burns {factor:g} times too fast over {long}"
            found.append(Alert(f"Rag{title}Burn{speed}", expr, severity, says, "the outcomes by route, then traces of those outcomes"))
    return tuple(found)


def _fell(metric: Metric) -> str:
    """What an evaluation measured is a fifth below what it was at the release, or in the release before."""
    now, then = (f'min({metric.name}{{when="{when}"}})' for when in ("now", "$then"))
    return " or ".join(f"{now} < 0.8 * {then}".replace("$then", when) for when in ("release", "before"))


def _below_its_week(series: str) -> str:
    """A fifth below the median of its last seven days."""
    return f"{series} < 0.8 * quantile_over_time(0.5, {series}[7d])"


def _old(metric: Metric, seconds: int) -> str:
    return f"time() - max({metric.name}) > {seconds} or absent({metric.name})"


_DAY = 86400
ALERTS = (
    *_burn_alerts(),
    Alert(
        "RagMrrBelowFloor",
        f"min({contract.EVAL_MRR.name}) < min({contract.EVAL_FLOOR.name})",
        "page",
        "the champion's MRR is below the floor",
        "ragline status; the hold's reason; ragline rollback if the release before was better",
    ),
    Alert(
        "RagMrrFell",
        f"min({contract.EVAL_MRR_AT_RELEASE.name}) - min({contract.EVAL_MRR.name}) > 0.02",
        "ticket",
        "the champion's MRR is 0.02 below what it was when it was released",
        "the newest evaluation record under drift/, slice by slice",
    ),
    Alert(
        "RagEvalStale",
        _old(contract.EVAL_AT, 8 * _DAY),
        "ticket",
        "the champion was not measured for 8 days, or never",
        "the weekly_drift schedule and its last run in Dagster",
        "10m",
    ),
    Alert(
        "RagDriftSilent",
        _old(contract.DRIFT_AT, 8 * _DAY),
        "ticket",
        "not every drift detector reported within 8 days",
        "the weekly_drift schedule and its last run in Dagster",
        "10m",
    ),
    Alert(
        "RagModelDrift",
        f"min({contract.PAIRED_COSINE.name}) < 0.999 or min({contract.SAME_MODEL.name}) < 1",
        "page",
        "the same texts get other vectors than at the release",
        "the model's row in ragline.toml, its weights, and what the embedding service runs",
    ),
    Alert(
        "RagServiceModelDrift",
        f"min({contract.SERVICE_COSINE.name}) < 0.999 or min({contract.SERVICE_SAME_MODEL.name}) < 1",
        "page",
        "the embedding service gives other vectors than the live snapshot holds",
        "what runs at the embedding service's address: its model, prompts and dtype; then its restart with those of the snapshot",
        "2m",
    ),
    Alert(
        "RagIndexStale",
        f"max({contract.INDEX_AGE.name}) > {30 * _DAY} and max({contract.INDEX_BEHIND.name}) == 1",
        "ticket",
        "the snapshot is older than 30 days and the source has changed since",
        "the weekly_build schedule and its last run; why a newer snapshot was refused: ragline status",
    ),
    Alert(
        "RagUnindexedRows",
        f"max({contract.INDEX_UNINDEXED.name}) > 0",
        "ticket",
        "rows of the champion are in no index",
        "the build of that snapshot; build it anew",
        "10m",
    ),
    Alert(
        "RagAnnRecallLow",
        f"min({contract.ANN_RECALL.name}) < 0.95",
        "ticket",
        "the vector index finds less than 95 % of the nearest",
        "index.ef in ragline.toml, then a full build",
    ),
    Alert(
        "RagDiversityCollapse",
        f"{_fell(contract.DIVERSITY)} or {_fell(contract.UNLIKENESS)}",
        "ticket",
        "results of the eval set name a fifth fewer documents, or differ a fifth less, than at the release or in the release before",
        "near-duplicates and one-sided sources in the corpus: the asset `documents` names pairs; ragline rollback",
    ),
    Alert(
        "RagResultsAlike",
        f"{_below_its_week(contract.VARIETY.name)} or ({_below_its_week(DOCUMENT_SHARE)} "
        f"and sum(increase({contract.CHUNKS.name}_count[30m])) > {FEWEST_REQUESTS})",
        "ticket",
        "what is found says one thing many times, or comes from a fifth fewer documents, than in the past week",
        "what was released lately, and near-duplicates in it; a caller that asks one thing again and again",
        "10m",
    ),
    Alert(
        "RagDrift",
        f"{contract.DRIFT_P.name} < 0.01 and {contract.DRIFT_P.name} offset 7d < 0.01",
        "ticket",
        "queries or passages are not those of the release, for the second week",
        "the drift record's numbers; whether the eval set still speaks of what is asked",
    ),
    Alert(
        "RagZeroResults",
        f"{ZERO_RESULTS} > 3 * quantile_over_time(0.5, {ZERO_RESULTS}[7d]) and {ZERO_RESULTS} > 0.02 "
        f"and sum(increase({contract.CHUNKS.name}_count[30m])) > {FEWEST_REQUESTS}",
        "ticket",
        "three times as many questions find nothing as in the past week",
        "degraded parts; filters and access lists of who asks",
        "10m",
    ),
    Alert(
        "RagDegraded",
        f"{SLOS[2].ratio('30m')} > 0.05 and {_increase(_REQUESTS, _THEIRS).replace('$w', '30m')} > {FEWEST_REQUESTS}",
        "ticket",
        "more than 5 % of answers do without a part",
        "rag_degraded_total by part, then that part",
        "10m",
    ),
    Alert(
        "RagBreakerOpen",
        f"max by (dependency) ({contract.BREAKER.name}) == 2",
        "ticket",
        "a dependency is left alone because it keeps failing",
        "whether it runs, and its log",
        "5m",
    ),
    Alert(
        "RagPoolExhausted",
        f"max({contract.POOL_IN_USE.name}) >= max({contract.POOL_SIZE.name})",
        "ticket",
        "every connection to the embedding service is taken",
        "latency of the embedding service",
        "5m",
    ),
    Alert(
        "RagSpansDropped",
        f"sum(increase({contract.SPANS_DROPPED.name}[10m])) > 0",
        "ticket",
        "traces that were to be kept are lost",
        "the endpoint of OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "10m",
    ),
    Alert(
        "RagObservationsDropped",
        f'sum(increase({contract.OBSERVATIONS.name}{{result="dropped"}}[10m])) > 0',
        "ticket",
        "rows of the observation log are lost, so canaries are judged on less",
        "space and rights of the store",
    ),
    Alert(
        "RagPromotionFailed",
        f"time() - max({contract.REFUSED_AT.name}) < {12 * 3600}",
        "ticket",
        "a promotion was refused, and nothing was released since",
        "the run of the promote job, or ragline promote: they say the numbers; ragline status",
    ),
    Alert(
        "RagPreviousSnapshotMissing",
        f"min({contract.PREVIOUS_OPEN.name}) == 0",
        "ticket",
        "the release before the live one is not open: a rollback would take longer",
        "ragline status; the files of that snapshot",
        "5m",
    ),
    Alert(
        "RagRollbackUntested",
        f"time() - max({contract.DRILL_AT.name}) > {8 * _DAY}",
        "ticket",
        "no rollback was rehearsed with success for 8 days",
        "the last run of the drill job in Dagster",
        "10m",
    ),
    Alert(
        "RagSensorSilent",
        " or ".join(
            [
                f"time() - max by (sensor) ({contract.HEARTBEAT.name}) > {3 * 3600}",
                *(f'absent({contract.HEARTBEAT.name}{{sensor="{each}"}})' for each in contract.HEARTBEAT.labels[0].values),
            ]
        ),
        "ticket",
        "a sensor of the pipeline did nothing for 3 hours: holds, aborts and alerts wait for it",
        "the Dagster daemon, and the last tick of that sensor",
        "10m",
    ),
    Alert(
        "RagGenerationMismatch",
        f"max({contract.INDEX_GENERATION.name}) != min({contract.INDEX_GENERATION.name})",
        "page",
        "replicas answer from different releases",
        "/v1/release of each replica: its problem says why it stays behind",
        "1m",
    ),
    Alert(
        "RagReleaseNotOpened",
        f"max({contract.LEDGER_GENERATION.name}) != max({contract.INDEX_GENERATION.name})",
        "page",
        "the newest release is not what answers",
        "/v1/release: its problem says why",
        "1m",
    ),
    Alert(
        "RagHeld",
        f"max({contract.HOLDS.name}) > 0",
        "ticket",
        "promotions are on hold",
        "ragline status says why; ragline lift once it is understood",
        "1h",
    ),
    Alert(
        "RagPromptCanaryLeak",
        f"sum(increase({contract.CANARY_LEAKS.name}[10m])) > 0",
        "page",
        "a language model quoted its prompt; the answer was withheld",
        "traces with rag.outcome=blocked; the passages they name",
    ),
)
