"""What the eval set can show: the drop of MRR that a comparison of the stored evaluations would reveal, and the queries a given drop needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from evals.collections import EvalSet, open_eval_set
from evals.power import Sensitivity, sensitivity_of
from evals.significance import paired_spread
from rag_assets import steps
from rag_assets.corpus import current_table
from rag_assets.evaluation import Evaluation, reciprocal_ranks
from rag_assets.workbench import Workbench
from rag_serving.releases import Ledger
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Reach:
    """The sensitivity of comparing each system with `reference`, by embedding model; `usual` where nothing was compared yet."""

    eval_set: str
    drop: float
    reference: str | None
    measured: dict[str, Sensitivity]
    usual: Sensitivity

    def facts(self) -> dict[str, Any]:
        return {
            "eval_set": self.eval_set,
            "queries": self.usual.queries,
            "alpha": self.usual.alpha,
            "power": self.usual.power,
            "drop": self.drop,
            "reference": self.reference,
            "measured": {name: self._facts(found) for name, found in self.measured.items()},
            "usual": self._facts(self.usual),
        }

    def _facts(self, found: Sensitivity) -> dict[str, Any]:
        return {
            "sd": [found.sd_low, found.sd_high],
            "detectable_drop": list(found.drops),
            "queries_needed": list(found.queries_for(self.drop)),
        }

    def table(self) -> Table:
        usual = self.usual
        title = f"{self.eval_set}: {usual.queries:,} queries, one-sided alpha {usual.alpha:g}, power {usual.power:.0%}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        against = f"against {self.reference}" if self.reference else "usual differences"
        for name in (against, "SD of differences", "smallest drop that shows", f"queries for a drop of {self.drop:g}"):
            table.add_column(name, justify="left" if name == against else "right")
        for name, found in {**self.measured, "usual": usual}.items():
            facts = self._facts(found)
            cells = (_range(facts["sd"], ".2f"), _range(facts["detectable_drop"], ".3f"), _range(facts["queries_needed"], ","))
            table.add_row(name, *cells)
        return table


def reach(bench: Workbench, *, drop: float) -> Reach:
    """What the configured eval set can show. The evaluations are those of the current corpus, the reference the champion among them or the best.

    Before the first run nothing was compared, and the eval set is not checked against a corpus. Raises EvidenceError unless `drop` is above 0.
    """
    alpha = bench.settings.gate.alpha
    built = current_table(bench.store, "documents") and current_table(bench.store, "chunks")
    eval_set = steps.load_eval_set(bench) if built else open_eval_set(bench.settings.eval.source, root=bench.settings.root)
    found = steps.current_evaluations(bench, eval_set) if built else []
    reference, others = _reference(bench.store, found)
    measured = {other.embedding_model: _compared(bench.store, other, reference, eval_set, alpha=alpha) for other in others if reference}
    return Reach(
        eval_set=eval_set.name,
        drop=drop,
        reference=reference.embedding_model if reference and others else None,
        measured=measured,
        usual=sensitivity_of(len(eval_set.queries), alpha=alpha),
    )


def _reference(store: Store, found: Sequence[Evaluation]) -> tuple[Evaluation | None, list[Evaluation]]:
    live = Ledger(store).state().champion
    best_first = sorted(found, key=lambda each: (not (live and each.snapshot_id == live.snapshot_id), -each.mrr, each.snapshot_id))
    return (best_first[0], best_first[1:]) if best_first else (None, [])


def _compared(store: Store, other: Evaluation, reference: Evaluation, eval_set: EvalSet, *, alpha: float) -> Sensitivity:
    spread = paired_spread(reciprocal_ranks(store, other), reciprocal_ranks(store, reference))
    return sensitivity_of(len(eval_set.queries), spread, alpha=alpha)


def _range(values: Sequence[float], form: str) -> str:
    first, last = (format(value, form) for value in values)
    return first if first == last else f"{first} to {last}"
