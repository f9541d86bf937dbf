"""The whole line in one process: `ragline run` executes the Dagster jobs, so that the UI shows the same runs afterwards."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rag_assets import steps, tracing
from rag_assets.gating import Standing, standings
from rag_assets.postgres import export, postgres
from rag_assets.sources import corpus_source
from rag_assets.workbench import Workbench
from rag_serving.errors import PlatformError, PromotionRefused
from rag_serving.releases import Ledger, State
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass(frozen=True, slots=True)
class LineResult:
    """What a run of the line did: texts embedded, snapshots built (0 and 0 when nothing had changed), and where every snapshot stands.

    `promoted` is the number of the release this run made, None when it left the release as it was; `refusal` says what stopped a promotion
    that the gate would have allowed, such as a hold. `unmeasured` are the snapshots of a corpus for which there is no eval set.
    """

    standings: tuple[Standing, ...]
    state: State
    computed: int
    built: int
    promoted: int | None
    refusal: PromotionRefused | None
    unmeasured: tuple[Manifest, ...] = ()


def has_eval_set(settings: Settings) -> bool:
    """Whether the configured eval set is meant for the configured corpus: the sample's is for the sample alone."""
    return not settings.eval.source.startswith("sample:") or settings.corpus.source.startswith("sample:")


def run_line(bench: Workbench, models: Sequence[str]) -> LineResult:
    """Build and evaluate a snapshot per model, then hold the release round, as Dagster runs recorded in Postgres.

    A model whose evaluation misses the floor is refused, and so is a corpus of which no snapshot passes a gate: results, not errors.
    Everything else that fails is raised. A corpus for which there is no eval set gets its snapshots, and no release round.
    """
    for name in models:
        bench.settings.model(name)
    next(iter(corpus_source(bench.settings).items()), None)
    before = Ledger(bench.store).state().champion
    with postgres(bench.settings) as databases:
        os.environ.update(export(databases))
        refusal = _execute_jobs(bench, models)
    if not has_eval_set(bench.settings):
        built = tuple(manifest for name in models if (manifest := steps.current_snapshot(bench, name)))
        return LineResult((), Ledger(bench.store).state(), bench.tally["embedded"], bench.tally["built"], None, None, built)
    found = standings(bench.store, steps.current_evaluations(bench, steps.load_eval_set(bench)))
    state = Ledger(bench.store).state()
    promoted = state.champion.number if state.champion and state.champion != before else None
    return LineResult(tuple(found), state, bench.tally["embedded"], bench.tally["built"], promoted, refusal)


def _execute_jobs(bench: Workbench, models: Sequence[str]) -> PromotionRefused | None:
    import dagster as dg
    from dagster._core.errors import DagsterAssetCheckFailedError

    from rag_assets.abandoned import end_abandoned_runs, process_tags
    from rag_assets.definitions import defs

    definitions = defs()
    measured = has_eval_set(bench.settings)
    build, promote = (definitions.resolve_job_def(name) for name in ("build_and_evaluate" if measured else "build", "promote"))
    try:
        with dg.DagsterInstance.get() as instance:
            _tell_abandoned(bench, instance, end_abandoned_runs(instance))
            shared: dict[str, Any] = {
                "run_config": _QUIET,
                "instance": instance,
                "resources": {"bench": bench},
                "tags": process_tags(),
            }
            for name in models:
                bench.reporter.note(f"── {name}")
                try:
                    tracing.execute(build, partition_key=name, **shared)
                except DagsterAssetCheckFailedError as error:
                    if "mrr_floor" not in str(error):
                        raise
            if not measured:
                return None
            bench.reporter.note("── release")
            try:
                tracing.execute(promote, **shared)
            except PromotionRefused as refusal:
                return refusal
            except DagsterAssetCheckFailedError as error:
                if "something_passes" not in str(error):
                    raise
    except dg.DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None
    except dg.DagsterError as error:
        raise PlatformError(f"a Dagster run failed: {error}", fix="Look at it in the Dagster UI: `make up`.") from error
    return None


def _tell_abandoned(bench: Workbench, instance: Any, run_ids: Sequence[str]) -> None:
    for run_id in run_ids:
        record = instance.get_run_record_by_id(run_id)
        run, started = record.dagster_run, record.start_time or record.create_timestamp.timestamp()
        tracing.lost(run_id, job=run.job_name, partition=run.tags.get("dagster/partition"), started=started)
        bench.reporter.note(f"run {run_id[:8]} had lost its process and is now marked as failed")
