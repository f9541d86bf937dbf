"""The leaderboard: evaluations of one corpus and eval set as rows, with what became of each snapshot, and full-text search alone as baseline."""

from collections.abc import Mapping, Sequence

from evals.reports import LeaderboardRow
from rag_assets.evaluation import Evaluation
from rag_assets.gating import Standing
from rag_assets.workbench import Workbench
from rag_serving.releases import Ledger

BASELINE = "BM25"


def leaderboard_rows(
    bench: Workbench, evaluations: Sequence[Evaluation], standings: Mapping[str, Standing] | None = None
) -> list[LeaderboardRow]:
    """A row a model and one for BM25; `standings` (by snapshot id) gives status and reason, else only the live snapshot is marked."""
    live = Ledger(bench.store).state().champion
    rows = []
    for evaluation in evaluations:
        standing = (standings or {}).get(evaluation.snapshot_id)
        status = standing.status if standing else "champion" if live and live.snapshot_id == evaluation.snapshot_id else "evaluated"
        note = standing.reason if standing else ""
        rows.append(LeaderboardRow(evaluation.embedding_model, evaluation.metrics, evaluation.snapshot_id, status, note))
    return [*rows, *baseline_rows(evaluations)]


def baseline_rows(evaluations: Sequence[Evaluation]) -> list[LeaderboardRow]:
    """One row for full-text search alone; every snapshot of a corpus gives the same one."""
    if not evaluations:
        return []
    return [LeaderboardRow(BASELINE, evaluations[0].bm25, None, "baseline", "full-text search alone")]
