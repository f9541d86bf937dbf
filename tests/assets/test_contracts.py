"""Contracts: sound tables pass, each fault is found by the expectation that names it, and the Data Docs show the outcome."""

import json

import pyarrow as pa
import pytest
from small_line import chunk_table, passages

from evals.collections import EvalSet, Query
from rag_assets import contracts, corpus
from rag_assets.contracts import CONTRACTS, ContractRows, check_contract, eval_set_rows, stored_rows
from rag_assets.corpus import CHUNKS, DOCUMENTS, TableWriter

TEXT = "a text of more than twenty characters"


def documents(*changes: dict):
    rows = [{"doc_id": f"d{number}", "uri": "u", "title": "t", "text": TEXT, "metadata": "{}"} for number in range(40)]
    return [*rows, *({**rows[0], **change} for change in changes)]


def chunks(**changes):
    rows = chunk_table(passages(5)).to_pylist()
    return [{**rows[0], **changes}, *rows[1:]]


def queries(*changes: dict):
    rows = [{"query_id": f"q{number}", "text": f"what is {number}?", "relevant": {"d1": 1}} for number in range(30)]
    rows = [*rows, *({"query_id": "more", "text": "how is more?", "relevant": {"d1": 1}, **change} for change in changes)]
    made = tuple(Query(row["query_id"], row["text"]) for row in rows)
    return EvalSet("set", made, {row["query_id"]: row["relevant"] for row in rows})


pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")  # great_expectations imports them

FAULTS = {
    "sound documents": ("documents", documents(), set()),
    "no documents": ("documents", [], {"documents_not_empty"}),
    "an id twice": ("documents", documents({"doc_id": "d7"}), {"doc_ids_unique"}),
    "no id": ("documents", documents({"doc_id": None}), {"doc_ids_present"}),
    "no uri": ("documents", documents({"doc_id": "x", "uri": None}), {"doc_uris_present"}),
    "some tiny texts": ("documents", documents({"doc_id": "x", "text": "tiny"}), set()),
    "many tiny texts": ("documents", documents(*({"doc_id": f"x{n}", "text": ""} for n in range(10))), {"texts_not_tiny"}),
    "sound chunks": ("chunks", chunks(), set()),
    "no chunks": ("chunks", [], {"chunks_not_empty"}),
    "a chunk twice": ("chunks", [*chunks(), chunks()[2]], {"chunk_ids_unique"}),
    "a chunk of no document": ("chunks", chunks(doc_id=None), {"chunk_doc_ids_present"}),
    "a chunk without text": ("chunks", chunks(text=""), {"chunk_texts_present"}),
    "a span backwards": ("chunks", chunks(start=9, end=3), {"spans_ordered"}),
    "a sound eval set": ("eval_set", queries(), set()),
    "no queries": ("eval_set", EvalSet("set", (), {}), {"queries_not_empty"}),
    "a query twice": ("eval_set", queries({"query_id": "q1"}), {"query_ids_unique"}),
    "a query without words": ("eval_set", queries({"text": " "}), {"query_texts_present"}),
    "a query without judgments": ("eval_set", queries({"relevant": {"d1": 0}}), {"queries_judged"}),
    "many queries alike": ("eval_set", queries(*({"query_id": f"m{n}"} for n in range(9))), {"query_texts_distinct"}),
}
SCHEMAS = {"documents": DOCUMENTS, "chunks": CHUNKS}


def rows_of(store, table: str, given) -> ContractRows:
    if isinstance(given, EvalSet):
        return eval_set_rows(given)
    writer = TableWriter(store, table, SCHEMAS[table])
    writer.extend(given)
    writer.finish(made_from="test")
    return stored_rows(store, table)


@pytest.mark.parametrize(("table", "given", "failing"), FAULTS.values(), ids=FAULTS.keys())
def test_each_fault_is_found_by_its_expectation(store, tmp_path, table, given, failing):
    """A contract gives one finding an expectation, in order, and exactly the expectation that speaks of the fault fails."""
    checked = check_contract(table, rows_of(store, table, given), docs=tmp_path / "docs")
    assert [finding.expectation for finding in checked.findings] == list(CONTRACTS[table])
    assert {finding.expectation.name for finding in checked.findings if not finding.passed} == failing
    json.dumps([dict(finding.observed) for finding in checked.findings])


def test_data_docs_show_the_outcome(store, tmp_path):
    """The page exists, a second check adds to it, each run has its own, and the suite is shown with its promises."""
    rows = rows_of(store, "documents", documents({"doc_id": "d7"}))
    pages = {check_contract("documents", rows, docs=tmp_path / "docs").page for _ in range(2)}
    (page,) = pages
    assert "documents" in page.read_text(encoding="utf-8")
    runs = list((page.parent / "validations").rglob("*.html"))
    assert len(runs) == 2
    assert all("must be unique" in run.read_text(encoding="utf-8") for run in runs)
    assert "No two documents share an id." in (page.parent / "expectations" / "documents.html").read_text(encoding="utf-8")


def test_large_tables_are_sampled(store, monkeypatch):
    """Of a table above the limit every n-th row is looked at, over all its parts, and the rows say of how many."""
    monkeypatch.setattr(contracts, "CHECKED_ROWS", 15)
    monkeypatch.setattr(corpus, "PART_ROWS", 7)
    rows = rows_of(store, "documents", documents())
    assert (rows.of, rows.rows["doc_id"].to_pylist()) == (40, [f"d{number}" for number in range(0, 40, 3)])
    assert rows.rows["characters"].to_pylist() == [len(TEXT)] * 14
    assert "text" not in rows.rows.column_names
    assert isinstance(rows.rows, pa.Table)


def test_what_is_advice():
    """Every expectation blocks what follows but those about tiny texts and queries alike, and names are unique."""
    expectations = [each for contract in CONTRACTS.values() for each in contract]
    assert [each.name for each in expectations if not each.critical] == ["texts_not_tiny", "query_texts_distinct"]
    assert len({each.name for each in expectations}) == len(expectations)
    assert all(each.promise.endswith(".") for each in expectations)
