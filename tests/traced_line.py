"""The real Dagster jobs, run over a small corpus with hashed embeddings, their traces kept: for the tests of pipeline telemetry."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from generated_corpus import settings_for, write_corpus
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rag_assets import tracing
from rag_assets.steps import current_snapshot
from rag_assets.workbench import Workbench
from rag_serving.promotion import promote
from rag_serving.settings import Gate, ModelSpec
from rag_serving.signals.contract import HEARTBEAT
from rag_serving.snapshots import Manifest

STRONG, WEAK = "all-MiniLM-L6-v2", "wordllama-256"  # partitions of the code location; here they are hashed
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
SENSORS = HEARTBEAT.labels[0].values
GX = "ignore:module 'sre_:DeprecationWarning"  # great_expectations imports them


class Line:
    """A workbench over 80 made-up documents and `pages` by id, each a title and a text; and an instance that remembers its runs."""

    def __init__(self, root: Path, instance: dg.DagsterInstance, pages: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        from rag_assets.definitions import defs

        self._corpus = write_corpus(root / "beir", documents=80, queries=60) / "corpus.jsonl"
        self.add(pages)
        models = tuple(
            ModelSpec(name=name, source=f"hashing:{dims}", dims=dims, max_tokens=256) for name, dims in ((STRONG, 256), (WEAK, 32))
        )
        gate = Gate(min_queries=50, warm_up_p95_ms=1000)
        self.bench = Workbench(settings_for(root, models=models, default_models=(STRONG, WEAK), gate=gate, **settings))
        self.instance, self.definitions = instance, defs()

    def add(self, pages: Mapping[str, tuple[str, str]]) -> None:
        """Documents for the source."""
        rows = [json.dumps({"_id": name, "title": title, "text": text}) for name, (title, text) in pages.items()]
        self._corpus.write_text("\n".join([self._corpus.read_text(encoding="utf-8"), *rows]), encoding="utf-8")

    def run(self, name: str, **options: Any) -> Any:
        """Execute a job of the code location within the span of its run, as `ragline run` does."""
        job = self.definitions.resolve_job_def(name)
        shared: dict[str, Any] = {"instance": self.instance, "resources": {"bench": self.bench}, "raise_on_error": False}
        return tracing.execute(job, **{"run_config": QUIET, **shared, **options})

    def snapshot_of(self, model: str) -> Manifest:
        """The newest snapshot of a model."""
        manifest = current_snapshot(self.bench, model)
        assert manifest
        return manifest

    def override(self, model: str) -> None:
        """Release a model's snapshot, whatever the gates say."""
        gate, named = self.bench.settings.gate, self.snapshot_of(model).snapshot_id
        promote(self.bench.store, named, gate=gate, actor="tester", reason="for a test", override=True)

    def tick(self) -> None:
        """Evaluate every sensor that watches the store, as the daemon does."""
        for name in SENSORS:
            sensor = self.definitions.get_repository_def().get_sensor_def(name)
            with dg.build_sensor_context(instance=self.instance, sensor_name=name, resources={"bench": self.bench}) as context:
                sensor.evaluate_tick(context)

    def roll_back(self) -> Any:
        """The rollback job."""
        return self.run("rollback", run_config={**QUIET, "ops": {"restore_previous": {"config": {"reason": "for a test"}}}})


@contextmanager
def line(root: Path, pages: Mapping[str, tuple[str, str]], **settings: Any) -> Iterator[Line]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Line(root, instance, pages, **settings)


@contextmanager
def kept_spans() -> Iterator[InMemorySpanExporter]:
    """Where the spans of the runs of this process are kept, for the time of a `with`."""
    exporter, provider = InMemorySpanExporter(), tracing.pipeline_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with tracing.recording_to(provider):
        yield exporter
    provider.shutdown()


def trace_of(spans: Sequence[ReadableSpan], run_id: str) -> list[ReadableSpan]:
    """The spans of a run, once it was seen that they are one tree below the run's own."""
    found = [span for span in spans if format(span.context.trace_id, "032x") == run_id.replace("-", "")]
    ids = {span.context.span_id for span in found}
    assert [span.name.partition(" ")[0] for span in found if span.parent is None] == ["run"]
    assert [span.name for span in found if span.parent and span.parent.span_id not in ids] == []
    return found


def metadata_of(run: Any) -> dict[str, dict[str, Any]]:
    """What the run's materializations say, by asset."""
    events = [event.step_materialization_data.materialization for event in run.all_events if event.is_step_materialization]
    return {each.asset_key.to_user_string(): {name: value.value for name, value in each.metadata.items()} for each in events}
