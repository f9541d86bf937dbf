"""The leaderboard: evaluations of one corpus and eval set as rows, with what became of each snapshot, and full-text search alone as baseline."""

from collections.abc import Sequence

from evals.reports import LeaderboardRow
from rag_assets.evaluation import Evaluation
from rag_assets.gating import Standing

BASELINE = "BM25"


def leaderboard_rows(found: Sequence[Standing]) -> list[LeaderboardRow]:
    """A row a model with its standing, and one for full-text search alone."""
    rows = [LeaderboardRow(s.evaluation.embedding_model, s.evaluation.metrics, s.evaluation.snapshot_id, s.status, s.reason) for s in found]
    return rows + baseline_rows([standing.evaluation for standing in found])


def baseline_rows(evaluations: Sequence[Evaluation]) -> list[LeaderboardRow]:
    """One row for full-text search alone; every snapshot of a corpus gives the same one."""
    return [LeaderboardRow(BASELINE, evaluation.bm25, None, "baseline", "full-text search alone") for evaluation in evaluations[:1]]
