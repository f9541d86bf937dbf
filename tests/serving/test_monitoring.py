"""Rules, dashboard, collector and docs follow from the contract, and every alert fires, stays quiet and turns at its edge as it should."""

import json
import re
import runpy
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from rag_serving.signals import contract, monitoring
from rag_serving.signals.contract import METRICS
from rag_serving.signals.monitoring import ALERTS, SLOS

ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool") or ""
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="needs promtool: apt-get install prometheus")
GENERATE = runpy.run_path(str(ROOT / "deploy" / "generate.py"))

DAY = 24 * 60
OK = 'rag_requests_total{route="/v1/query",outcome="ok"}'
ABSTAINED = 'rag_requests_total{route="/v1/query",outcome="abstained"}'
THEIRS = 'rag_requests_total{route="/v1/query",outcome="client_error"}'
FAILED = 'rag_requests_total{route="/v1/retrieve",outcome="error"}'
SHED = 'rag_requests_total{route="/v1/query",outcome="shed"}'
DEGRADED = 'rag_requests_total{route="/v1/query",outcome="degraded"}'
COUNTED = 'rag_request_duration_seconds_count{route="/v1/query",outcome="ok"}'
IN_TIME = 'rag_request_duration_seconds_bucket{route="/v1/query",outcome="ok",le="3.0"}'
HEARTBEAT = "rag_sensor_heartbeat_timestamp_seconds"
FOUND, NOTHING = "rag_retrieved_chunks_count", "rag_zero_result_total"


@dataclass(frozen=True)
class Case:
    """Series in promtool's notation, one value every `step` minutes; whether the alert fires at minute `at`."""

    fires: bool
    at: int
    step: int = 1
    series: dict[str, str] = field(default_factory=dict)


def rising(a_minute: float, *, minutes: int, step: int = 1) -> str:
    return f"0+{a_minute * step:g}x{minutes // step}"


def level(value: float, *, minutes: int = 120, step: int = 1) -> str:
    return f"{value:g}+0x{minutes // step}"


def burns(bad: str, good: str, *, share: float, minutes: int, step: int, total: float = 100.0, outside: bool = True) -> dict[str, str]:
    """Requests of which `share` are bad, all along; `good` counts the good ones, or all of them where the bad are inside."""
    bad_rate = total * share
    return {
        bad: rising(bad_rate, minutes=minutes, step=step),
        good: rising(total - bad_rate if outside else total, minutes=minutes, step=step),
    }


def burn_cases(slo: str, speed: str) -> tuple[Case, Case, Case]:
    """At 1.5 to 3 times the rate that alerts; below half of it; and at a hundred times it with too few requests to say anything.

    The requests of two objectives may be counted together, which halves the shares of both.
    """
    budget, factor = next(each.budget for each in SLOS if each.name == slo), {"Fast": 14.4, "Steady": 6, "Slow": 1}[speed]
    minutes, step = {"Fast": (70, 1), "Steady": (370, 5), "Slow": (4440, 120)}[speed]
    bad, good = {"availability": (FAILED, OK), "latency": (IN_TIME, COUNTED), "full_quality": (DEGRADED, ABSTAINED)}[slo]

    def case(share: float, total: float, *, fires: bool) -> Case:
        if slo == "latency":  # the bucket counts the good ones
            series = burns(IN_TIME, COUNTED, share=1 - share, minutes=minutes, step=step, total=total, outside=False)
        else:
            series = burns(bad, good, share=share, minutes=minutes, step=step, total=total)
        return Case(fires, minutes, step, series)

    few = 40 / minutes
    return (
        case((1.5 if slo == "latency" else 3) * factor * budget, 100, fires=True),
        case(0.5 * factor * budget, 100, fires=False),
        case(min(1.0, 100 * factor * budget), few, fires=False),
    )


def around(series: str, *, fires: float, quiet: float, edge: float, minutes: int = 5, **others: float) -> tuple[Case, Case, Case]:
    """A gauge at three levels, with others that stay; `edge` is the last level that does not alert."""
    rest = {name: level(value) for name, value in others.items()}
    return (
        Case(True, minutes, series={series: level(fires), **rest}),
        Case(False, minutes, series={series: level(quiet), **rest}),
        Case(False, minutes, series={series: level(edge), **rest}),
    )


def aged(metric: str) -> tuple[Case, Case, Case]:
    """Nothing for nine days; measured just now; never measured, which alerts as well. promtool's clock begins at 0."""
    nine = 9 * DAY
    return (
        Case(True, nine, 360, {metric: level(0, minutes=nine, step=360)}),
        Case(False, nine, 360, {metric: level(nine * 60, minutes=nine, step=360)}),
        Case(True, 20, 1, {}),
    )


def varied(*, documents: float, unlikeness: float) -> dict[str, str]:
    """What an evaluation measured, of 5 documents and an unlikeness of 0.5 at the release; the release before had no less."""
    now = {'rag_result_documents{when="now"}': documents, 'rag_result_unlikeness{when="now"}': unlikeness}
    then = {'rag_result_documents{when="release"}': 5.0, 'rag_result_unlikeness{when="before"}': 0.5}
    return {name: level(value) for name, value in {**now, **then}.items()}


def results(*, documents: float) -> dict[str, str]:
    """Ten requests a minute for a day with 5 passages of 5 documents each, then with `documents`."""
    found = {"rag_retrieved_chunks_sum": rising(50, minutes=1560, step=10), "rag_retrieved_chunks_count": rising(10, minutes=1560, step=10)}
    return found | {"rag_distinct_sources_sum": f"0+500x144 {144 * 500 + documents * 100:g}+{documents * 100:g}x12"}


CASES: dict[str, tuple[Case, Case, Case]] = {
    **{
        f"Rag{''.join(word.capitalize() for word in slo.name.split('_'))}Burn{speed}": burn_cases(slo.name, speed)
        for slo in SLOS
        for speed in ("Fast", "Steady", "Slow")
    },
    "RagMrrBelowFloor": around("rag_eval_mrr", fires=0.79, quiet=0.85, edge=0.8, rag_eval_mrr_floor=0.8),
    "RagMrrFell": around("rag_eval_mrr", fires=0.8, quiet=0.85, edge=0.831, rag_eval_mrr_at_release=0.85),
    "RagEvalStale": aged("rag_eval_last_success_timestamp_seconds"),
    "RagDriftSilent": aged("rag_drift_last_success_timestamp_seconds"),
    "RagModelDrift": (
        Case(True, 5, series={"rag_paired_cosine": level(0.99), "rag_model_unchanged": level(1)}),
        Case(False, 5, series={"rag_paired_cosine": level(0.9999), "rag_model_unchanged": level(1)}),
        Case(True, 5, series={"rag_paired_cosine": level(0.9999), "rag_model_unchanged": level(0)}),
    ),
    "RagServiceModelDrift": (
        Case(True, 30, series={"rag_service_cosine": level(0.99), "rag_service_model_unchanged": level(1)}),
        Case(False, 30, series={"rag_service_cosine": level(0.9999), "rag_service_model_unchanged": level(1)}),
        Case(False, 30, series={"rag_service_cosine": "1x28 0x1 1x9", "rag_service_model_unchanged": level(1)}),  # one odd look
    ),
    "RagIndexStale": around("rag_index_age_seconds", fires=31 * 86400, quiet=86400, edge=30 * 86400, rag_index_behind_corpus=1),
    "RagUnindexedRows": (
        Case(True, 30, series={"rag_index_unindexed_rows": level(5)}),
        Case(False, 30, series={"rag_index_unindexed_rows": level(0)}),
        Case(False, 30, series={"rag_index_unindexed_rows": "0x25 5x3 0x10"}),
    ),
    "RagAnnRecallLow": around("rag_ann_recall", fires=0.94, quiet=0.99, edge=0.95),
    "RagDiversityCollapse": (
        Case(True, 5, series=varied(documents=3.9, unlikeness=0.5)),
        Case(False, 5, series=varied(documents=4.0, unlikeness=0.4)),
        Case(True, 5, series=varied(documents=5.0, unlikeness=0.39)),
    ),
    "RagResultsAlike": (
        Case(True, 1500, 10, {"rag_result_variety": "0.6x144 0.47x12"}),
        Case(False, 1500, 10, {"rag_result_variety": "0.6x144 0.49x12"} | results(documents=4.2)),
        Case(True, 1500, 10, results(documents=2)),
    ),
    "RagDrift": (
        Case(True, 8 * DAY, 360, {'rag_drift_pvalue{test="query"}': level(0.001, minutes=9 * DAY, step=360)}),
        Case(False, 8 * DAY, 360, {'rag_drift_pvalue{test="query"}': level(0.5, minutes=9 * DAY, step=360)}),
        Case(False, 8 * DAY, 360, {'rag_drift_pvalue{test="query"}': "0.5x19 0.001x16"}),  # this week alone
    ),
    "RagZeroResults": (
        Case(True, 1500, 10, {FOUND: rising(10, minutes=1560, step=10), NOTHING: f"0+1x144 {144 + 20}+20x12"}),
        Case(False, 1500, 10, {FOUND: rising(10, minutes=1560, step=10), NOTHING: "0+1x156"}),
        Case(False, 1500, 10, {FOUND: rising(1, minutes=1560, step=10), NOTHING: f"0+0.1x144 {14.4 + 2}+2x12"}),  # too few to tell
    ),
    "RagDegraded": (
        Case(True, 60, series=burns(DEGRADED, OK, share=0.1, minutes=70, step=1)),
        Case(False, 60, series=burns(DEGRADED, OK, share=0.01, minutes=70, step=1)),
        Case(False, 60, series=burns(DEGRADED, OK, share=0.5, minutes=70, step=1, total=2)),
    ),
    "RagBreakerOpen": (
        Case(True, 30, series={'rag_breaker_state{dependency="embedder"}': level(2)}),
        Case(False, 30, series={'rag_breaker_state{dependency="embedder"}': level(1)}),
        Case(False, 30, series={'rag_breaker_state{dependency="embedder"}': "0x24 2x3 0x10"}),
    ),
    "RagPoolExhausted": (
        Case(True, 30, series={"rag_pool_in_use": level(32), "rag_pool_size": level(32)}),
        Case(False, 30, series={"rag_pool_in_use": level(3), "rag_pool_size": level(32)}),
        Case(False, 30, series={"rag_pool_in_use": "0x27 32x2 0x5", "rag_pool_size": level(32)}),
    ),
    "RagSpansDropped": (
        Case(True, 40, series={'rag_spans_dropped_total{reason="refused"}': rising(1, minutes=60)}),
        Case(False, 40, series={'rag_spans_dropped_total{reason="refused"}': level(7)}),
        Case(False, 40, series={'rag_spans_dropped_total{reason="refused"}': "0x36 1x20"}),  # a few at once are no outage yet
    ),
    "RagObservationsDropped": (
        Case(True, 20, series={'rag_observations_total{result="dropped"}': rising(1, minutes=60)}),
        Case(False, 20, series={'rag_observations_total{result="written"}': rising(9, minutes=60)}),
        Case(False, 20, series={'rag_observations_total{result="dropped"}': level(5)}),
    ),
    "RagPromotionFailed": (
        Case(True, 60, series={"rag_promotion_refused_timestamp_seconds": level(60, minutes=60)}),
        Case(False, 20, series={"rag_promotions_total": level(3)}),  # nothing was refused since the last release
        Case(False, 13 * 60, 60, {"rag_promotion_refused_timestamp_seconds": level(60, minutes=13 * 60, step=60)}),  # half a day ago
    ),
    "RagPreviousSnapshotMissing": (
        Case(True, 20, series={"rag_previous_snapshot_open": level(0)}),
        Case(False, 20, series={"rag_previous_snapshot_open": level(1)}),
        Case(False, 20, series={"rag_index_generation": level(1)}),  # a first release has none before it
    ),
    "RagRollbackUntested": (
        *aged("rag_drill_last_success_timestamp_seconds")[:2],
        Case(False, 20),
    ),  # a first release has none to go back to
    "RagSensorSilent": (
        Case(True, 240, 60, {f'{HEARTBEAT}{{sensor="releases"}}': level(0, minutes=240, step=60)}),
        Case(False, 240, 60, {f'{HEARTBEAT}{{sensor="releases"}}': level(240 * 60, minutes=240, step=60)}),
        Case(  # one of two
            True,
            240,
            60,
            {
                f'{HEARTBEAT}{{sensor="{name}"}}': level(at * 60, minutes=240, step=60)
                for name, at in (("releases", 240), ("missed_week", 0))
            },
        ),
    ),
    "RagGenerationMismatch": (
        Case(True, 20, series={'rag_index_generation{instance="a"}': level(4), 'rag_index_generation{instance="b"}': level(5)}),
        Case(False, 20, series={'rag_index_generation{instance="a"}': level(5), 'rag_index_generation{instance="b"}': level(5)}),
        Case(False, 20, series={'rag_index_generation{instance="a"}': "4x19 5x9", 'rag_index_generation{instance="b"}': "4x20 5x9"}),
    ),
    "RagReleaseNotOpened": (
        Case(True, 20, series={"rag_index_generation": level(4), "rag_ledger_generation": level(5)}),
        Case(False, 20, series={"rag_index_generation": level(5), "rag_ledger_generation": level(5)}),
        Case(False, 20, series={"rag_index_generation": "4x20 5x9", "rag_ledger_generation": "4x19 5x9"}),
    ),
    "RagHeld": (
        Case(True, 100, series={"rag_holds": level(1)}),
        Case(False, 100, series={"rag_holds": level(0)}),
        Case(False, 100, series={"rag_holds": "0x60 1x60"}),
    ),
    "RagPromptCanaryLeak": (
        Case(True, 20, series={"rag_prompt_canary_leak_total": "0x15 1x20"}),
        Case(False, 20, series={"rag_prompt_canary_leak_total": level(0)}),
        Case(False, 40, series={"rag_prompt_canary_leak_total": "0x15 1x40"}),  # half an hour ago
    ),
}


def apart(step: int) -> list[list[tuple[str, Case]]]:
    """The cases of a step in groups whose alerts share no metric, so that a group is one run of Prometheus."""
    exprs = {alert.name: alert.expr for alert in ALERTS}
    groups: list[tuple[set[str], list[tuple[str, Case]]]] = []
    for name, three in CASES.items():
        for case in three:
            if case.step != step:
                continue
            words = re.findall(r"rag[_:][a-z0-9_]+", f"{exprs[name]} {' '.join(case.series)}")
            used = {name.partition("Burn")[0]} if "Burn" in name else set(words)
            used |= {"RagFullQuality", "RagAvailability"} if name == "RagDegraded" else set()
            free = next((group for group in groups if not group[0] & used), None)
            if free is None:
                groups.append(free := (set(), []))
            free[0].update(used)
            free[1].append((name, case))
    return [group for _, group in groups]


def test_generated_files_are_up_to_date():
    """Rules, dashboard, collector configuration and tables are what the contract says; `python deploy/generate.py` writes them."""
    stale = [str(path) for path, text in GENERATE["generated"]().items() if (ROOT / path).read_text(encoding="utf-8") != text]
    assert stale == []


def test_every_alert_has_its_three_cases():
    """No alert without a firing, a quiet and an edge case; no case of an alert that is gone."""
    assert set(CASES) == {alert.name for alert in ALERTS}
    assert all(cases[0].fires and not cases[1].fires for cases in CASES.values())


@needs_promtool
@pytest.mark.parametrize("step", [1, 5, 10, 120, 360])
def test_alerts_fire_stay_quiet_and_turn_at_their_edge(step, tmp_path):
    """Prometheus itself, on made-up series, agrees with every case."""
    tests = [
        {
            "name": ", ".join(name for name, _ in group),
            "interval": f"{step}m",
            "input_series": [{"series": name, "values": values} for _, case in group for name, values in case.series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
                    "eval_time": f"{case.at}m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if case.fires else [],
                }
                for name, case in group
            ],
        }
        for group in apart(step)
    ]
    assert tests
    shutil.copy(ROOT / GENERATE["RULES"], tmp_path / "rules.yml")
    groups = [group["name"] for group in yaml.safe_load((tmp_path / "rules.yml").read_text(encoding="utf-8"))["groups"]]
    described = {"rule_files": ["rules.yml"], "evaluation_interval": f"{step}m", "group_eval_order": groups, "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(described), encoding="utf-8")
    done = subprocess.run([PROMTOOL, "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_reads_its_configuration():
    """Promtool finds nothing wrong with the scrape configuration and the rules it loads."""
    done = subprocess.run(
        [PROMTOOL, "check", "config", "prometheus.yml"], cwd=ROOT / "deploy" / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole():
    """Six rows, ids of their own, a data source that is chosen, known units, nothing that overlaps, and every metric on a panel."""
    board = json.loads((ROOT / GENERATE["DASHBOARD"]).read_text(encoding="utf-8"))
    panels = board["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        *("Objectives", "Query quality", "Retrieval health", "Generation and guards", "Infrastructure", "Releases and canaries")
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    drawn = [panel for panel in panels if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in drawn} == {"${datasource}"}
    assert {panel["fieldConfig"]["defaults"]["unit"] for panel in drawn} <= {"s", "none", "short", "reqps", "percentunit", "dateTimeAsIso"}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    expressions = " ".join(target["expr"] for panel in drawn for target in panel["targets"])
    shown = {metric.name for metric in METRICS if metric.name in expressions}
    assert shown == {metric.name for metric in METRICS}


def test_rules_made_faster_differ_in_durations_alone():
    """What a test shortens is every range, offset and `for`, by the same factor; names of windows and numbers compared with stay."""
    groups = [yaml.safe_load(GENERATE["rules"](faster=each))["groups"] for each in (1, 1200)]
    slow, fast = ([rule for group in each for rule in group["rules"]] for each in groups)
    seconds = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}

    def durations(rule) -> list[float]:
        found = re.findall(r"(?:\[|offset )(\d+)(ms|s|m|h|d)\b", rule["expr"]) + re.findall(r"^(\d+)(ms|s|m|h|d)$", rule.get("for", ""))
        return [int(count) * seconds[unit] for count, unit in found]

    def without(rule) -> dict:
        return {**rule, "for": "", "expr": re.sub(r"(\[|offset )\d+(ms|s|m|h|d)\b", r"\1", rule["expr"])}

    assert [without(rule) for rule in slow] == [without(rule) for rule in fast]
    pairs = [pair for two in zip(slow, fast, strict=True) for pair in zip(*map(durations, two), strict=True)]
    assert len(pairs) > 60
    assert [long / short for long, short in pairs] == pytest.approx([1200] * len(pairs), rel=1e-3)


def test_rules_name_nothing_undeclared():
    """Every metric that a rule asks for is declared, or recorded by a rule."""
    described = yaml.safe_load((ROOT / GENERATE["RULES"]).read_text(encoding="utf-8"))
    text = " ".join(rule["expr"] for group in described["groups"] for rule in group["rules"])
    names = {metric.name for metric in METRICS}
    families = {f"{name}{suffix}" for name in names for suffix in ("", "_bucket", "_count", "_sum")}
    recorded = {slo.ratio(window) for slo in SLOS for window in monitoring.WINDOWS} | set(monitoring.RECORDED)
    asked = set(re.findall(r"\b(?:rag_[a-z0-9_]+|gen_ai_[a-z0-9_]+|rag:[a-z0-9_:]+)\b", text))
    assert asked - families - recorded == set()


def test_the_collector_keeps_what_the_process_keeps():
    """Outcomes, slowness and share of the collector's tail sampling are those of the process' own rule."""
    described = yaml.safe_load((ROOT / GENERATE["COLLECTOR"]).read_text(encoding="utf-8"))
    policies = {policy["name"]: policy for policy in described["processors"]["tail_sampling"]["policies"]}
    assert policies["told"]["string_attribute"]["key"] == contract.OUTCOME.name
    assert set(policies["told"]["string_attribute"]["values"]) == {"degraded", "blocked", "shed", "timeout", "error"}
    assert policies["sample"]["probabilistic"]["sampling_percentage"] == 10
    assert set(described["service"]["pipelines"]["traces"]["processors"]) == set(described["processors"])


def test_docs_hold_every_name():
    """docs/telemetry.md names every span, attribute, metric, objective and alert."""
    page = Path(ROOT / GENERATE["DOCS"]).read_text(encoding="utf-8")
    wanted = [
        *(span.name for span in contract.SPANS),
        *(attribute.name for attribute in contract.ATTRIBUTES),
        *(metric.name for metric in METRICS),
        *(alert.name for alert in ALERTS),
    ]
    assert [name for name in wanted if f"`{name}" not in page] == []
