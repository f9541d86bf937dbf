"""Contracts: sound tables pass, and each fault is found by the expectation that names it."""

import json

import pyarrow as pa
import pytest
from small_line import chunk_table, passages

from rag_assets.contracts import CONTRACTS, check_contract
from rag_assets.corpus import DOCUMENTS

TEXT = "a text of more than twenty characters"


def documents(*changes: dict):
    rows = [{"doc_id": f"d{number}", "uri": "u", "title": "t", "text": TEXT, "metadata": "{}"} for number in range(40)]
    return pa.Table.from_pylist([*rows, *({**rows[0], **change} for change in changes)], schema=DOCUMENTS)


def changed(table: pa.Table, **columns):
    rows = table.to_pylist()
    for name, value in columns.items():
        rows[0][name] = value
    return pa.Table.from_pylist(rows, schema=table.schema)


pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")  # great_expectations imports them

CHUNK_ROWS = chunk_table(passages(5))
FAULTS = {
    "sound documents": ("documents", documents(), set()),
    "no documents": ("documents", documents().slice(0, 0), {"documents_not_empty"}),
    "an id twice": ("documents", documents({"doc_id": "d7"}), {"doc_ids_unique"}),
    "no id": ("documents", documents({"doc_id": None}), {"doc_ids_present"}),
    "some tiny texts": ("documents", documents({"doc_id": "x", "text": "tiny"}), set()),
    "many tiny texts": ("documents", documents(*({"doc_id": f"x{n}", "text": ""} for n in range(10))), {"texts_not_tiny"}),
    "sound chunks": ("chunks", CHUNK_ROWS, set()),
    "no chunks": ("chunks", CHUNK_ROWS.slice(0, 0), {"chunks_not_empty"}),
    "a chunk twice": ("chunks", pa.concat_tables([CHUNK_ROWS, CHUNK_ROWS.slice(2, 1)]), {"chunk_ids_unique"}),
    "a chunk of no document": ("chunks", changed(CHUNK_ROWS, doc_id=None), {"chunk_doc_ids_present"}),
    "a span backwards": ("chunks", changed(CHUNK_ROWS, start=9, end=3), {"spans_ordered"}),
}


@pytest.mark.parametrize(("table", "rows", "failing"), FAULTS.values(), ids=FAULTS.keys())
def test_each_fault_is_found_by_its_expectation(table, rows, failing):
    """A contract gives one finding an expectation, in order, and exactly the expectation that speaks of the fault fails."""
    findings = list(check_contract(CONTRACTS[table], rows))
    assert [finding.expectation for finding in findings] == list(CONTRACTS[table])
    assert {finding.expectation.name for finding in findings if not finding.passed} == failing
    json.dumps([dict(finding.observed) for finding in findings])


def test_only_length_is_advice():
    """Every expectation blocks what follows but the one about tiny texts, and names are unique."""
    expectations = [each for contract in CONTRACTS.values() for each in contract]
    assert [each.name for each in expectations if not each.critical] == ["texts_not_tiny"]
    assert len({each.name for each in expectations}) == len(expectations)
    assert all(each.promise.endswith(".") for each in expectations)
