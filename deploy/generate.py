"""Writes what follows from the telemetry contract: Prometheus rules, the Grafana dashboard, the collector's configuration, tables of the docs.

`python deploy/generate.py` writes them; a test fails while one of them is not what this would write.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rag_serving.settings import Telemetry
from rag_serving.signals import contract, monitoring
from rag_serving.signals.contract import Category, Metric, Outcome
from rag_serving.signals.exporting import TELLING

ROOT = Path(__file__).resolve().parents[1]
RULES, DASHBOARD, COLLECTOR, DOCS = (
    Path("deploy/prometheus/rules.yml"),
    Path("deploy/grafana/ragline.json"),
    Path("deploy/otel/collector.yaml"),
    Path("docs/telemetry.md"),
)
_HEAD = "# Written by deploy/generate.py from rag_serving/signals/contract.py and rag_serving/signals/monitoring.py: change those.\n"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_UNITS = {"seconds": "s", "1": "none"}
_RELEASES = (
    *(contract.INDEX_GENERATION, contract.LEDGER_GENERATION, contract.PREVIOUS_OPEN, contract.HOLDS, contract.SWAP_SECONDS),
    *(contract.RELEASES, contract.RESTORE_SECONDS_LAST, contract.DRILL_AT, contract.HEARTBEAT),
)
_CANARY = (contract.CANARY_ANSWERS, contract.OBSERVATIONS)
_ROWS: tuple[tuple[str, Category], ...] = (
    ("Query quality", Category.QUERY),
    ("Retrieval health", Category.RETRIEVAL),
    ("Generation and guards", Category.GENERATION),
    ("Infrastructure", Category.INFRASTRUCTURE),
)
_RATIOS: dict[Category, list[tuple[str, list[tuple[str, str]], str]]] = {
    Category.RETRIEVAL: [
        ("Distinct documents a passage found", [(monitoring.DOCUMENT_SHARE, "30m")], "percentunit"),
        ("Share of questions for which nothing was found", [(monitoring.ZERO_RESULTS, "30m")], "percentunit"),
    ],
}
_WIDTH, _HEIGHT = 6, 7


def generated() -> dict[Path, str]:
    """The text of every generated file, by its path in the repository."""
    docs = (ROOT / DOCS).read_text(encoding="utf-8")
    return {RULES: rules(), DASHBOARD: dashboard(), COLLECTOR: collector(), DOCS: documented(docs)}


def rules(*, faster: float = 1) -> str:
    """Recording rules of each SLO and window, and the alerts.

    With `faster`, every range, offset and `for` is that many times shorter, so that a test sees in seconds what takes hours; names, and numbers
    that metrics are compared with, ages among them, stay.
    """
    recorded = [
        {"record": slo.ratio(window), "expr": f"{slo.bad} / {slo.all}".replace("$w", window)}
        for slo in monitoring.SLOS
        for window in monitoring.WINDOWS
    ]
    recorded += [{"record": name, "expr": expr} for name, expr in monitoring.RECORDED.items()]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            **({} if alert.lasting == "0m" else {"for": alert.lasting}),
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.says, "description": f"Look first at {alert.todo}."},
        }
        for alert in monitoring.ALERTS
    ]
    for rule in (*recorded, *alerts) if faster != 1 else ():
        rule["expr"] = re.sub(r"(?<=[\[ ])\d+[smhd](?=[\] ])", lambda found: _shorter(found[0], faster), f"{rule['expr']} ").rstrip()
        if "for" in rule:
            rule["for"] = _shorter(rule["for"], faster)
    return _yaml({"groups": [{"name": "ragline-slo", "rules": recorded}, {"name": "ragline-alerts", "rules": alerts}]})


def _shorter(duration: str, faster: float) -> str:
    seconds = int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[duration[-1]]
    return f"{max(1, round(1000 * seconds / faster))}ms" if seconds else duration


def dashboard() -> str:
    """Six rows of panels: the objectives, one row a category with a panel for each of its metrics, and the releases."""
    panels: list[dict[str, Any]] = []
    objectives = [
        (f"{slo.says} (share that failed)", [(slo.ratio(window), window) for window in ("1h", "6h", "3d")], "percentunit")
        for slo in monitoring.SLOS
    ]
    objectives.append(("Requests by outcome", _queries(contract.REQUESTS), "reqps"))
    _add_row(panels, "Objectives", objectives)
    apart = (*_RELEASES, *_CANARY, contract.REQUESTS)
    for title, category in _ROWS:
        made = [_panel_of(metric) for metric in contract.METRICS if metric.category is category and metric not in apart]
        _add_row(panels, title, [*made, *_RATIOS.get(category, ())])
    _add_row(panels, "Releases and canaries", [_panel_of(metric) for metric in (*_RELEASES, *_CANARY)])
    board = {
        "uid": "ragline",
        "title": "ragline",
        "tags": ["ragline"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0},
            ]
        },
        "panels": panels,
    }
    return json.dumps(board, indent=2) + "\n"


def collector() -> str:
    """An OpenTelemetry Collector that chooses traces as the process itself does; for it the processes send all: telemetry.share = 1."""
    settings = Telemetry()
    policies = [
        {"name": "failed", "type": "status_code", "status_code": {"status_codes": ["ERROR"]}},
        {"name": "told", "type": "string_attribute", "string_attribute": {"key": contract.OUTCOME.name, "values": _words(TELLING)}},
        {"name": "slow", "type": "latency", "latency": {"threshold_ms": round(settings.slow_seconds * 1000)}},
        {"name": "sample", "type": "probabilistic", "probabilistic": {"sampling_percentage": round(settings.share * 100)}},
    ]
    return _yaml(
        {
            "receivers": {"otlp": {"protocols": {"http": {"endpoint": "127.0.0.1:4318"}}}},
            "processors": {
                "memory_limiter": {"check_interval": "1s", "limit_mib": 512},
                "tail_sampling": {"decision_wait": "10s", "num_traces": 20000, "policies": policies},
                "batch": {},
            },
            "exporters": {
                "otlphttp": {
                    "traces_endpoint": "${env:RAGLINE_MLFLOW_URL}/v1/traces",
                    "headers": {"x-mlflow-experiment-id": "${env:RAGLINE_TRACES_EXPERIMENT:-0}"},
                    "compression": "none",
                }
            },
            "service": {
                "pipelines": {
                    "traces": {"receivers": ["otlp"], "processors": ["memory_limiter", "tail_sampling", "batch"], "exporters": ["otlphttp"]}
                }
            },
        }
    )


def documented(page: str) -> str:
    """The page with each part between `<!-- NAME -->` and `<!-- end -->` written anew."""
    parts = {
        "spans": _table(("span", "kind", "says", "attributes"), (_span_row(span) for span in contract.SPANS)),
        "attributes": _table(("attribute", "type", "says"), ((f"`{each.name}`", each.kind, each.says) for each in contract.ATTRIBUTES)),
        "metrics": "\n\n".join(f"### {category.capitalize()}\n\n{_metric_table(category)}" for category in Category),
        "objectives": _table(
            ("objective", "promise over 30 days", "bad requests", "of"),
            ((slo.name.replace("_", " "), slo.says, _code(slo.bad), _code(slo.all)) for slo in monitoring.SLOS),
        ),
        "alerts": _table(
            ("alert", "severity", "says", "look first at"),
            ((f"`{alert.name}`", alert.severity, alert.says, alert.todo) for alert in monitoring.ALERTS),
        ),
    }
    for name, part in parts.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found, part=part: f"{found[1]}{part}\n{found[2]}", page, flags=re.DOTALL
        )
    return page


def _add_row(panels: list[dict[str, Any]], title: str, made: Sequence[tuple[str, list[tuple[str, str]], str]]) -> None:
    top = max((panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels), default=0)
    panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": _place(top, 0, 1, 24)})
    for index, (name, queries, unit) in enumerate(made):
        line, column = divmod(index, 24 // _WIDTH)
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "timeseries",
                "title": name,
                "datasource": _SOURCE,
                "gridPos": _place(top + 1 + line * _HEIGHT, column * _WIDTH, _HEIGHT, _WIDTH),
                "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8, "lineWidth": 1}}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + at), "datasource": _SOURCE, "expr": expr, "legendFormat": legend, "exemplar": True}
                    for at, (expr, legend) in enumerate(queries)
                ],
            }
        )


def _place(y: int, x: int, height: int, width: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel_of(metric: Metric) -> tuple[str, list[tuple[str, str]], str]:
    timed = metric.name.endswith("_timestamp_seconds")
    unit = "dateTimeAsIso" if timed else "short" if metric.kind == "counter" else _UNITS.get(metric.unit, "short")
    scale = " * 1000" if timed else ""
    return f"{metric.says[0].upper()}{metric.says[1:]}", [(f"{expr}{scale}", legend) for expr, legend in _queries(metric)], unit


def _queries(metric: Metric) -> list[tuple[str, str]]:
    """Expressions and their legends: percentiles of a histogram, the rate of a counter, a gauge as it is, each by its labels."""
    by = ", ".join(label.name for label in metric.labels)
    legend = " ".join(f"{{{{{label.name}}}}}" for label in metric.labels)
    if metric.kind == "histogram":
        groups = ", ".join(filter(None, (metric.labels[0].name if len(metric.labels) == 1 else "", "le")))
        lines = f" {legend}" if len(metric.labels) == 1 else ""
        return [
            (f"histogram_quantile({share}, sum by ({groups}) (rate({metric.name}_bucket[5m])))", f"p{round(share * 100)}{lines}")
            for share in (0.5, 0.95)
        ]
    if metric.kind == "counter":
        return [(f"sum by ({by}) (rate({metric.name}[5m]))" if by else f"sum(rate({metric.name}[5m]))", legend or "a second")]
    return [(f"max by ({', '.join(filter(None, ('instance', by)))}) ({metric.name})", legend or "{{instance}}")]


def _metric_table(category: Category) -> str:
    return _table(
        ("metric", "type", "unit", "says", "labels", "buckets"),
        (
            (
                f"`{metric.name}`",
                metric.kind,
                metric.unit,
                metric.says,
                "; ".join(f"{label.name}: {', '.join(label.values)}" for label in metric.labels) or "-",
                " ".join(f"{bound:g}" for bound in metric.buckets) or "-",
            )
            for metric in contract.METRICS
            if metric.category is category
        ),
    )


def _span_row(span: contract.Span) -> tuple[str, str, str, str]:
    name = f"`{span.name} {{{span.named_after}}}`" if span.named_after else f"`{span.name}`"
    return name, span.kind, span.says, ", ".join(f"`{attribute.name}`" for attribute in span.attributes)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(_lines(head, rows))


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _code(expr: str) -> str:
    return f"`{expr.replace('$w', 'window')}`"


def _words(outcomes: Iterable[Outcome]) -> list[str]:
    return sorted(outcome.value for outcome in outcomes)


def _yaml(content: dict[str, Any]) -> str:
    return _HEAD + yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    for path, text in generated().items():
        (ROOT / path).write_text(text, encoding="utf-8")
