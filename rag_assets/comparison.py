"""An evaluation beside the champion's on the same corpus and eval set: which queries moved, and which lost most."""

from dataclasses import dataclass, replace

from evals.collections import EvalSet
from evals.regressions import Regression, worst_regressions
from rag_assets.evaluation import Evaluation, read_evaluation, read_rows
from rag_serving.releases import Ledger
from rag_serving.signals.redaction import redacted
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Comparison:
    """`differences` are reciprocal ranks of the evaluation minus the champion's, in the order of the eval set.

    The queries of `regressions` are shown in Dagster and MLflow, without secrets and personal data.
    """

    champion: Evaluation
    differences: tuple[float, ...]
    regressions: tuple[Regression, ...]

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences)


def champion_evaluation(store: Store, eval_set: EvalSet) -> Evaluation | None:
    """The live snapshot's evaluation on this eval set; None when nothing is live or it was not measured."""
    live = Ledger(store).state().champion
    return read_evaluation(store, live.manifest_sha256, eval_set.sha256) if live else None


def compare_with_champion(store: Store, evaluation: Evaluation, eval_set: EvalSet) -> Comparison | None:
    """The comparison; None for the champion itself, and unless both were measured on this eval set, one corpus and one cutoff."""
    champion = champion_evaluation(store, eval_set)
    if champion is None or champion.snapshot_id == evaluation.snapshot_id or not comparable(evaluation, champion):
        return None
    before, after = read_rows(store, champion), read_rows(store, evaluation)
    ranks = {row["query_id"]: row["reciprocal_rank"] for row in before}
    differences = tuple(row["reciprocal_rank"] - ranks[row["query_id"]] for row in after)
    worst = tuple(replace(each, query=redacted(each.query)) for each in worst_regressions(before, after, eval_set))
    return Comparison(champion, differences, worst)


def comparable(one: Evaluation, other: Evaluation) -> bool:
    """Whether both were measured on the same corpus and eval set at the same cutoff."""
    return (one.corpus_sha256, one.eval_set_sha256, one.k) == (other.corpus_sha256, other.eval_set_sha256, other.k)
