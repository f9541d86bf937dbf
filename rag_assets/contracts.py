"""Contracts of the corpus tables, as Great Expectations suites: what must hold of documents and chunks before anything is embedded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Expectation:
    """One expectation of Great Expectations: `kind` is its class, `arguments` go to it. A critical one blocks what follows."""

    name: str
    promise: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    critical: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    expectation: Expectation
    passed: bool
    observed: Mapping[str, Any]


CONTRACTS: Mapping[str, tuple[Expectation, ...]] = {
    "documents": (
        Expectation("documents_not_empty", "There is at least one document.", "ExpectTableRowCountToBeBetween", {"min_value": 1}),
        Expectation("doc_ids_present", "Every document has an id.", "ExpectColumnValuesToNotBeNull", {"column": "doc_id"}),
        Expectation("doc_ids_unique", "No two documents share an id.", "ExpectColumnValuesToBeUnique", {"column": "doc_id"}),
        Expectation(
            "texts_not_tiny", "Nearly every text has 20 characters or more.", "ExpectColumnValueLengthsToBeBetween",
            {"column": "text", "min_value": 20, "mostly": 0.95}, critical=False,
        ),
    ),
    "chunks": (
        Expectation("chunks_not_empty", "There is at least one chunk.", "ExpectTableRowCountToBeBetween", {"min_value": 1}),
        Expectation("chunk_ids_unique", "No two chunks share an id.", "ExpectColumnValuesToBeUnique", {"column": "chunk_id"}),
        Expectation("chunk_doc_ids_present", "Every chunk belongs to a document.", "ExpectColumnValuesToNotBeNull", {"column": "doc_id"}),
        Expectation(
            "spans_ordered", "A span does not end before it starts.", "ExpectColumnPairValuesAToBeGreaterThanB",
            {"column_A": "end", "column_B": "start", "or_equal": True},
        ),
    ),
}  # fmt: skip


def check_contract(expectations: Sequence[Expectation], table: pa.Table) -> Iterator[Finding]:
    """Validate `table` against `expectations`, one finding each, in order."""
    import great_expectations as gx  # measured: the import takes 7 s

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]  # as its own documentation does
    source = context.data_sources.add_pandas("table")
    batch = source.add_dataframe_asset("rows").add_batch_definition_whole_dataframe("all").get_batch({"dataframe": table.to_pandas()})
    suite = gx.ExpectationSuite(name="contract")
    for expectation in expectations:
        suite.add_expectation(getattr(gx.expectations, expectation.kind)(**expectation.arguments))
    results: Iterable[Any] = batch.validate(suite, result_format="SUMMARY").results
    by_kind = {(result.expectation_config.type, _column(result.expectation_config.kwargs)): result for result in results}
    for expectation in expectations:
        result = by_kind[(_snake(expectation.kind), _column(expectation.arguments))]
        shown = {
            name: result.result[name] for name in ("observed_value", "unexpected_count", "unexpected_percent") if name in result.result
        }
        yield Finding(expectation, bool(result.success), {name: value for name, value in shown.items() if value is not None})


def _column(arguments: Mapping[str, Any]) -> str:
    return str(arguments.get("column") or arguments.get("column_A") or "")


def _snake(kind: str) -> str:
    import re

    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=A)(?=To)|(?<=Than)(?=B)", "_", kind).lower()
