"""Dagster's decorators and executors with a trace: what is defined with these is a span of its run's trace, and names it in its metadata."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import dagster as dg
from opentelemetry.trace import Span

from rag_assets import tracing
from rag_serving.signals import contract, work

LATE_TAG = "ragline/traces_late"  # on a run whose sink was late once: its other steps do not wait for it

Compute = Callable[..., Any]
_Definition = TypeVar("_Definition")


class TracedExecutor(dg.Executor):
    """Another executor, with the span of the run around what it does: recorded once a run, wherever its steps run."""

    def __init__(self, inner: dg.Executor) -> None:
        self._inner = inner

    @property
    def retries(self) -> Any:
        return self._inner.retries

    @property
    def step_dependency_config(self) -> Any:
        return self._inner.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        run = plan_context.dagster_run
        with tracing.run(run.run_id, job=run.job_name, partition=run.tags.get("dagster/partition")) as made:
            for event in self._inner.execute(plan_context, execution_plan):
                if event.is_step_failure:
                    work.failed(made)
                yield event


def _executor(plain: dg.ExecutorDefinition) -> dg.ExecutorDefinition:
    create = plain.executor_creation_fn
    assert create  # noqa: S101 - every executor of Dagster's has one

    def traced(context: dg.InitExecutorContext) -> TracedExecutor:
        return TracedExecutor(create(context))

    return dg.ExecutorDefinition(
        name=f"traced_{plain.name}",
        config_schema=plain.config_schema,  # type: ignore[arg-type]  # what Dagster's own copies of executors pass on
        requirements=plain.get_requirements,
        executor_creation_fn=traced,
        description=plain.description,
    )


in_process = _executor(dg.in_process_executor)
default = _executor(dg.multi_or_in_process_executor)
_TRACED = {in_process.name, default.name}


def _traced(define: Callable[..., Any], _gives: type[_Definition]) -> Callable[..., Callable[[Compute], _Definition]]:
    """A decorator of Dagster's, called with options, whose functions run within the span of their step."""

    @wraps(define)
    def defined(**options: Any) -> Callable[[Compute], _Definition]:
        decorate: Callable[[Compute], _Definition] = define(**options)
        return lambda compute: decorate(_in_step(compute))

    return defined


def _in_step(compute: Compute) -> Compute:
    """The same function within the span of its step; what a generator gives is given out once the span has ended."""

    @wraps(compute)
    def single(*args: Any, **kwargs: Any) -> Any:
        if not _under_dagster():
            return compute(*args, **kwargs)
        with _step() as made:
            return _recorded(compute(*args, **kwargs), made)

    @wraps(compute)
    def several(*args: Any, **kwargs: Any) -> Iterator[Any]:
        if not _under_dagster():
            yield from compute(*args, **kwargs)
            return
        with _step() as made:
            results = [_recorded(result, made) for result in compute(*args, **kwargs)]
        yield from results

    return several if inspect.isgeneratorfunction(compute) else single


def _under_dagster() -> bool:
    """Whether a run calls; otherwise it is a person or a test."""
    try:
        dg.OpExecutionContext.get()
    except dg.DagsterInvariantViolationError:
        return False
    return True


@contextmanager
def _step() -> Iterator[Span]:
    context = dg.OpExecutionContext.get()
    run = context.run
    keys = {*context.selected_asset_keys, *(key.asset_key for key in context.selected_asset_check_keys)} if context.has_assets_def else ()
    here = tracing.recorded_here(run.run_id)
    try:
        with tracing.step(
            run.run_id,
            context.get_step_execution_context().step.key,
            assets=sorted(key.to_user_string() for key in keys),
            partition=context.partition_key if context.has_partition_key else None,
            joins=here or context.job_def.executor_def.name in _TRACED,
        ) as made:
            yield made
    finally:
        if not here:
            _leave(context.instance, run.run_id)


def _leave(instance: dg.DagsterInstance, run_id: str) -> None:
    """Wait for the spans of a step in a process of its own to leave it, unless another step of the run found the sink late."""
    run = instance.get_run_by_id(run_id)  # as it is now: the process was given it as it was at its beginning
    if run and LATE_TAG not in run.tags and not tracing.flush(tracing.STEP_SECONDS):
        instance.add_run_tags(run_id, {LATE_TAG: "true"})


def _recorded(result: Any, made: Span) -> Any:
    """The result with the trace id in its metadata; checks of it that failed as errors make the span one that failed."""
    materialized = isinstance(result, dg.MaterializeResult)
    checks = result.check_results if materialized else [result] if isinstance(result, dg.AssetCheckResult) else ()
    failed = [check.check_name for check in checks if not check.passed and check.severity is dg.AssetCheckSeverity.ERROR]
    if failed:
        made.set_attribute(contract.FAILED_CHECKS.name, [name or "check" for name in failed])
        work.failed(made)
    if not materialized:
        return result
    trace_id = format(made.get_span_context().trace_id, "032x")
    return result._replace(metadata={**(result.metadata or {}), "trace_id": trace_id})


asset = _traced(dg.asset, dg.AssetsDefinition)
asset_check = _traced(dg.asset_check, dg.AssetChecksDefinition)
multi_asset_check = _traced(dg.multi_asset_check, dg.AssetChecksDefinition)
op = _traced(dg.op, dg.OpDefinition)
