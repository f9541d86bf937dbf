"""Contracts of documents, chunks and eval sets, as Great Expectations suites: what must hold before anything is built on them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from evals.collections import EvalSet
from rag_assets.corpus import CHUNKS, DOCUMENTS, require_table, table_batches
from rag_serving.signals.redaction import redacted
from rag_serving.store import Store

CHECKED_ROWS = 200_000


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


@dataclass(frozen=True, slots=True)
class ContractRows:
    """The rows a contract is checked on, `of` so many in all. Texts are there by their length alone, in the column `characters`."""

    rows: pa.Table
    of: int


@dataclass(frozen=True, slots=True)
class Checked:
    """One finding an expectation, in order, and the page of the Data Docs that shows them."""

    findings: tuple[Finding, ...]
    page: Path


CONTRACTS: Mapping[str, tuple[Expectation, ...]] = {
    "documents": (
        Expectation("documents_not_empty", "There is at least one document.", "ExpectTableRowCountToBeBetween", {"min_value": 1}),
        Expectation("doc_ids_present", "Every document has an id.", "ExpectColumnValuesToNotBeNull", {"column": "doc_id"}),
        Expectation("doc_ids_unique", "No two documents share an id.", "ExpectColumnValuesToBeUnique", {"column": "doc_id"}),
        Expectation("doc_uris_present", "Every document says where it comes from.", "ExpectColumnValuesToNotBeNull", {"column": "uri"}),
        Expectation(
            "texts_not_tiny", "Nearly every text has 20 characters or more.", "ExpectColumnValuesToBeBetween",
            {"column": "characters", "min_value": 20, "mostly": 0.95}, critical=False,
        ),
    ),
    "chunks": (
        Expectation("chunks_not_empty", "There is at least one chunk.", "ExpectTableRowCountToBeBetween", {"min_value": 1}),
        Expectation("chunk_ids_unique", "No two chunks share an id.", "ExpectColumnValuesToBeUnique", {"column": "chunk_id"}),
        Expectation("chunk_doc_ids_present", "Every chunk belongs to a document.", "ExpectColumnValuesToNotBeNull", {"column": "doc_id"}),
        Expectation("chunk_texts_present", "Every chunk has text.", "ExpectColumnValuesToBeBetween", {"column": "characters", "min_value": 1}),
        Expectation(
            "spans_ordered", "A span does not end before it starts.", "ExpectColumnPairValuesAToBeGreaterThanB",
            {"column_A": "end", "column_B": "start", "or_equal": True},
        ),
    ),
    "eval_set": (
        Expectation("queries_not_empty", "There are two queries or more.", "ExpectTableRowCountToBeBetween", {"min_value": 2}),
        Expectation("query_ids_unique", "No two queries share an id.", "ExpectColumnValuesToBeUnique", {"column": "query_id"}),
        Expectation(
            "query_texts_present", "Every query has words.", "ExpectColumnValuesToBeBetween", {"column": "characters", "min_value": 1},
        ),
        Expectation(
            "queries_judged", "Every query has a relevant document.", "ExpectColumnValuesToBeBetween", {"column": "relevant", "min_value": 1},
        ),
        Expectation(
            "query_texts_distinct", "Nearly every query has words of its own.", "ExpectColumnValuesToBeUnique",
            {"column": "words", "mostly": 0.95}, critical=False,
        ),
    ),
}  # fmt: skip

_SCHEMAS = {"documents": DOCUMENTS, "chunks": CHUNKS}
_COLUMNS = {"documents": ("doc_id", "uri", "text"), "chunks": ("chunk_id", "doc_id", "start", "end", "text")}


def stored_rows(store: Store, table: str) -> ContractRows:
    """All rows of a corpus table, or of one with more than 200,000 rows every n-th."""
    total = require_table(store, table).rows
    step = max(1, -(-total // CHECKED_ROWS))
    empty = pa.RecordBatch.from_pylist([], schema=pa.schema([_SCHEMAS[table].field(column) for column in _COLUMNS[table]]))
    kept, passed = [], 0
    for batch in chain([empty], table_batches(store, table, columns=_COLUMNS[table])):
        picked = batch.take(pa.array(range(-passed % step, batch.num_rows, step), pa.int64()))
        passed += batch.num_rows
        text = picked.schema.get_field_index("text")
        kept.append(picked.set_column(text, "characters", pc.utf8_length(picked["text"])))
    return ContractRows(pa.Table.from_batches(kept), total)


def eval_set_rows(eval_set: EvalSet) -> ContractRows:
    """A row a query: query_id, text without secrets, a digest of its words, characters, and relevant, the number of its relevant documents."""
    rows = [
        {
            "query_id": query.query_id,
            "text": redacted(query.text),  # the page of the contract shows some
            "words": hashlib.sha256(query.text.encode(errors="surrogatepass")).hexdigest(),
            "characters": len(query.text.strip()),
            "relevant": sum(score > 0 for score in eval_set.qrels.get(query.query_id, {}).values()),
        }
        for query in eval_set.queries
    ]
    strings = [(name, pa.string()) for name in ("query_id", "text", "words")]
    schema = pa.schema([*strings, ("characters", pa.int64()), ("relevant", pa.int64())])
    return ContractRows(pa.Table.from_pylist(rows, schema=schema), len(rows))


def check_contract(name: str, rows: ContractRows, *, docs: Path, expectations: Sequence[Expectation] | None = None) -> Checked:
    """Validate rows against the contract `name`, and show the outcome in the Data Docs under `docs`/`name`.

    The first call of a process takes some 7 s, for the import of Great Expectations.
    """
    import great_expectations as gx
    from great_expectations.checkpoint.actions import UpdateDataDocsAction

    promised = CONTRACTS[name] if expectations is None else expectations
    folder = docs / name
    folder.mkdir(parents=True, exist_ok=True)
    context = gx.get_context(mode="file", project_root_dir=folder)
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]  # as its own documentation does
    source = context.data_sources.add_or_update_pandas("ragline")
    batches = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("rows")
    suite = gx.ExpectationSuite(name=name)
    for expectation in promised:
        suite.add_expectation(
            getattr(gx.expectations, expectation.kind)(
                **expectation.arguments,
                severity="critical" if expectation.critical else "warning",
                notes=expectation.promise,
                meta={"check": expectation.name},
            )
        )
    validation = gx.ValidationDefinition(name=name, data=batches, suite=context.suites.add_or_update(suite))
    checkpoint = gx.Checkpoint(
        name=name,
        validation_definitions=[context.validation_definitions.add_or_update(validation)],
        actions=[UpdateDataDocsAction(name="data_docs")],
        result_format="SUMMARY",
    )
    run = context.checkpoints.add_or_update(checkpoint).run(batch_parameters={"dataframe": rows.rows.to_pandas()})
    (outcome,) = run.run_results.values()
    results: Sequence[Any] = outcome.results
    by_name = {result.expectation_config.meta["check"]: result for result in results}
    findings = tuple(_finding(expectation, by_name[expectation.name], rows) for expectation in promised)
    return Checked(findings, folder / "gx" / "uncommitted" / "data_docs" / "local_site" / "index.html")


def _finding(expectation: Expectation, result: Any, rows: ContractRows) -> Finding:
    shown = {name: result.result.get(name) for name in ("observed_value", "unexpected_count", "unexpected_percent")}
    observed = {name: value for name, value in shown.items() if value is not None}
    return Finding(expectation, bool(result.success), {**observed, "rows_checked": rows.rows.num_rows, "rows": rows.of})
