"""The declared metrics of this process in the form that Prometheus collects: counted and observed by declaration, never by a name.

A label takes the values it is declared with, and `other` for anything else, so no request adds a series. What another module keeps is read
there when somebody collects, and what is not known is absent.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from rag_serving.signals.contract import METRICS, OTHER, Metric

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a series a series, and nothing asks for it


def counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.says, [label.name for label in metric.labels], registry=registry)


def gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.says, [label.name for label in metric.labels], registry=registry)


def histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.says, [label.name for label in metric.labels], buckets=metric.buckets, registry=registry)


_Kind = TypeVar("_Kind", Counter, Histogram)
_registry = CollectorRegistry()
_children: dict[tuple[str, tuple[str, ...]], Any] = {}
_counted = [metric for metric in METRICS if metric.where == "serving" and not metric.read]
_counters = {metric.name: counter(metric, _registry) for metric in _counted if metric.kind == "counter"}
_histograms = {metric.name: histogram(metric, _registry) for metric in _counted if metric.kind == "histogram"}


@dataclass(frozen=True, slots=True)
class Level:
    """What a gauge, or a counter that is read, shows now; `labels` are values in the order of its declaration."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


def count(metric: Metric, *labels: str, by: float = 1) -> None:
    """Add to a counter; `labels` are values in the order of its declaration."""
    _child(_counters[metric.name], metric, labels).inc(by)


def observe(metric: Metric, value: float, *labels: str, trace_id: str = "") -> None:
    """Add a value to a histogram; `trace_id` makes it the exemplar of its bucket."""
    _child(_histograms[metric.name], metric, labels).observe(value, {"trace_id": trace_id} if trace_id else None)


def exposition(levels: Iterable[Level], *, accept: str = "") -> tuple[bytes, str]:
    """Every metric as text, and its media type: OpenMetrics with exemplars for who accepts it, else Prometheus' own format."""
    encode, media_type = choose_encoder(accept)
    return encode(_Collected(tuple(levels))), media_type


def samples(levels: Iterable[Level] = ()) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every series by name and labels, with its value: what a test or a bench compares."""
    found = (sample for family in _Collected(tuple(levels)).collect() for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


def _child(made: _Kind, metric: Metric, labels: tuple[str, ...]) -> _Kind:
    """What counts for these label values. Those of declared values are kept: finding them costs more than counting."""
    if not metric.labels:
        return made
    known: _Kind | None = _children.get((metric.name, labels))
    if known is None:
        values = _known(metric, labels)
        known = made.labels(*values)
        if values == list(labels):
            _children[metric.name, labels] = known
    return known


def _known(metric: Metric, labels: tuple[str, ...]) -> list[str]:
    return [value if value in label.values else OTHER for label, value in zip(metric.labels, labels, strict=True)]


class _Collected(Collector):
    def __init__(self, levels: tuple[Level, ...]) -> None:
        self._levels = levels

    def collect(self) -> Iterator[Family]:
        yield from _registry.collect()
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for level in self._levels:
            metric = level.metric
            if metric.name not in families:
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[metric.name] = family(metric.name, metric.says, labels=[label.name for label in metric.labels])
            families[metric.name].add_metric(_known(metric, level.labels), level.value)
        yield from families.values()
