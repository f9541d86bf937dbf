"""Coverage of the corpus by the eval set: judged documents, and those that evaluations of the current snapshots retrieved."""

from evals.coverage import Coverage, coverage, part_of
from rag_assets import ingestion, steps
from rag_assets.evaluation import read_rows
from rag_assets.workbench import Workbench


def measure_coverage(bench: Workbench) -> Coverage:
    """Coverage by part of the corpus (evals.coverage.part_of). Retrieved: within the first k of any stored current evaluation."""
    eval_set = steps.load_eval_set(bench)
    judged = {doc_id for row in eval_set.qrels.values() for doc_id, grade in row.items() if grade > 0}
    rows = [row for evaluation in steps.current_evaluations(bench, eval_set) for row in read_rows(bench.store, evaluation)]
    parts = {doc_id: part_of(doc_id) for doc_id in ingestion.document_ids(bench)}
    return coverage(parts, judged=judged, retrieved={doc_id for row in rows for doc_id in row["retrieved"]})
