"""The leaderboard: every embedding model on one corpus and eval set, with its difference to the champion, speed, size and cost."""

from collections.abc import Mapping, Sequence

from evals.contrasts import contrasts
from evals.reports import Cost, LeaderboardRow
from evals.significance import EvidenceError
from rag_assets.evaluation import Evaluation, reciprocal_ranks
from rag_assets.gating import Standing, best_first
from rag_assets.throughput import read_throughput
from rag_serving.errors import SnapshotError
from rag_serving.snapshots import read_manifest
from rag_serving.store import Store

BASELINE = "BM25"


def leaderboard_rows(store: Store, found: Sequence[Standing], *, alpha: float) -> list[LeaderboardRow]:
    """A row a model with its standing and its difference to the champion, where that is among them, and one for full-text search alone.

    EvidenceError when they were measured on several corpora, eval sets or cutoffs: such rows are never compared.
    """
    champion = next((standing.evaluation for standing in found if standing.status == "champion"), None)
    words = {standing.evaluation.snapshot_id: (standing.status, standing.reason) for standing in found}
    return _rows(store, [standing.evaluation for standing in found], words, reference=champion, alpha=alpha)


def compared_rows(store: Store, evaluations: Sequence[Evaluation], *, alpha: float) -> list[LeaderboardRow]:
    """The same where nothing is released: differences are to the best."""
    best = min(evaluations, key=best_first, default=None)
    words = {evaluation.snapshot_id: ("best" if evaluation is best else "compared", "") for evaluation in evaluations}
    return _rows(store, evaluations, words, reference=best, alpha=alpha)


def _rows(
    store: Store, evaluations: Sequence[Evaluation], words: Mapping[str, tuple[str, str]], *, reference: Evaluation | None, alpha: float
) -> list[LeaderboardRow]:
    _require_comparable(evaluations)
    others = {each.snapshot_id: reciprocal_ranks(store, each) for each in evaluations if reference and each is not reference}
    differences = contrasts(others, reciprocal_ranks(store, reference), alpha=alpha) if reference and others else {}
    rows = [
        LeaderboardRow(
            evaluation.embedding_model,
            evaluation.metrics,
            evaluation.snapshot_id,
            *words[evaluation.snapshot_id],
            contrast=differences.get(evaluation.snapshot_id),
            cost=_cost(store, evaluation.snapshot_id),
        )
        for evaluation in evaluations
    ]
    baseline = [LeaderboardRow(BASELINE, evaluation.bm25, None, "baseline", "full-text search alone") for evaluation in evaluations[:1]]
    return rows + baseline


def _require_comparable(evaluations: Sequence[Evaluation]) -> None:
    for odd in evaluations[1:]:
        first = evaluations[0]
        for what, here, there in (
            ("corpora", first.corpus_sha256[:12], odd.corpus_sha256[:12]),
            ("eval sets", first.eval_set_sha256[:12], odd.eval_set_sha256[:12]),
            ("cutoffs", first.k, odd.k),
        ):
            if here != there:
                raise EvidenceError(
                    f"{first.snapshot_id} and {odd.snapshot_id} were measured on different {what} ({here} and {there}).",
                    fix="Evaluate both on the same corpus, eval set and k.",
                )


def _cost(store: Store, snapshot_id: str) -> Cost | None:
    """What the snapshot costs; None when it is not in the store any more."""
    try:
        manifest = read_manifest(store, snapshot_id)
    except SnapshotError:
        return None
    speed = read_throughput(store, manifest.fingerprint)
    return Cost(
        chunks_per_second=speed.per_second if speed else None,
        cpu_seconds=speed.cpu_seconds_per_thousand if speed else None,
        index_mb=manifest.bytes / 1e6,
        mb_per_thousand=manifest.bytes / 1e3 / max(manifest.rows, 1),
    )
