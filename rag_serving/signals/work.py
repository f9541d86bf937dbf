"""Spans of work that no request waits for: the steps of a pipeline, and what the functions within them do.

`worked` gives a function its span. Outside a step nothing is recorded, so the same function costs a query service nothing. What serving records
of a search is not recorded within a step: an evaluation asks thousands of queries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace import SpanKind, StatusCode, Tracer, use_span

from rag_serving.signals import contract
from rag_serving.signals.contract import Attribute, Span

Value = str | int | float | bool | Sequence[str]
Facts = Mapping[Attribute, Value]
_P = ParamSpec("_P")
_R = TypeVar("_R")

_SUBJECTS = (contract.INDEX, contract.MEASURE, contract.PROMOTE, contract.ROLL_BACK, contract.DETECT, contract.REHEARSE)

_step: ContextVar[tuple[Tracer, OpenSpan] | None] = ContextVar("step", default=None)


@contextmanager
def step(tracer: Tracer, name: str, facts: Facts, *, parent: Context) -> Iterator[OpenSpan]:
    """The span of a step, current within; `worked` functions add theirs below it. An error leaves its code and none of its words."""
    made = tracer.start_span(f"{contract.STEP.name} {name}", parent, SpanKind.INTERNAL, attributes=_named(facts))
    token = _step.set((tracer, made))
    try:
        with _recorded(made):
            yield made
    finally:
        _step.reset(token)


def worked(declared: Span, facts: Callable[[Any], Facts]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A function that is this span of the step it is called in; `facts` says what to record of its result. Not for coroutines.

    The snapshot that was made, measured or released is recorded on the step too, so that the steps of a snapshot are found by its id.
    """

    def within(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def working(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            under_way = _step.get()
            if under_way is None:
                return function(*args, **kwargs)
            tracer, of_step = under_way
            made = tracer.start_span(declared.name, kind=SpanKind.INTERNAL)
            with _recorded(made):
                result = function(*args, **kwargs)
                found = facts(result)
                made.set_attributes(_named(found))
                if declared in _SUBJECTS and contract.SNAPSHOT_ID in found:
                    of_step.set_attribute(contract.SNAPSHOT_ID.name, found[contract.SNAPSHOT_ID])
                return result

        return working

    return within


def failed(span: OpenSpan, error: BaseException | None = None) -> None:
    """Mark a span as failed, with the code of the error if there is one."""
    if error is not None:
        span.set_attribute(contract.ERROR_TYPE.name, getattr(error, "code", None) or type(error).__name__)
    span.set_status(StatusCode.ERROR)


@contextmanager
def _recorded(span: OpenSpan) -> Iterator[None]:
    with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except BaseException as error:
            failed(span, error)
            raise


def _named(facts: Facts) -> dict[str, Value]:
    return {attribute.name: value for attribute, value in facts.items()}
