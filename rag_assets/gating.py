"""From evaluations to verdicts to a release: who is compared with whom, and which snapshot goes live."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from evals.gates import quality_gate
from rag_assets.evaluation import Evaluation, reciprocal_ranks
from rag_serving.promotion import promote
from rag_serving.releases import Entry, Ledger
from rag_serving.settings import Gate
from rag_serving.store import Store
from rag_serving.verdicts import RETRIEVAL_QUALITY, Verdict, read_verdict, write_verdict


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of one evaluated snapshot, with the reason in one line."""

    evaluation: Evaluation
    status: Literal["promoted", "champion", "refused", "inconclusive", "passed"]
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of one release round; `entry` is the ledger entry it appended, if any."""

    standings: tuple[Standing, ...]
    entry: Entry | None


def judge(store: Store, candidate: Evaluation, champion: Evaluation | None, *, gate: Gate) -> Verdict:
    """Run the retrieval quality gate and keep its verdict as evidence; both must have been measured on the same eval set."""
    result = quality_gate(
        candidate=reciprocal_ranks(store, candidate),
        champion=reciprocal_ranks(store, champion) if champion else None,
        bm25_mrr=candidate.bm25[f"mrr_at_{candidate.k}"],
        ann_recall=candidate.ann_recall,
        mrr_floor=gate.mrr_floor,
        margin=gate.margin,
        alpha=gate.alpha,
        min_queries=gate.min_queries,
        ann_recall_floor=gate.ann_recall_floor,
        k=candidate.k,
    )
    verdict = Verdict(
        gate=RETRIEVAL_QUALITY,
        snapshot_id=candidate.snapshot_id,
        manifest_sha256=candidate.manifest_sha256,
        eval_set_sha256=candidate.eval_set_sha256,
        champion=champion.snapshot_id if champion else None,
        outcome=result.outcome.value,
        summary=result.summary,
        rules=tuple(asdict(rule) for rule in result.rules),
        measured_at=candidate.measured_at,
    )
    if read_verdict(store, candidate.snapshot_id, RETRIEVAL_QUALITY) != verdict:
        write_verdict(store, verdict)
    return verdict


def release(
    store: Store,
    evaluations: Sequence[Evaluation],
    *,
    gate: Gate,
    actor: str,
    champion_evaluation: Callable[[str], Evaluation],
) -> Decision:
    """Judge every evaluated snapshot against the champion, best MRR first, and promote the first that passes and brings something.

    It brings something when nothing is live, when its corpus is another one than the champion's, or when its MRR is higher. Those after
    it are judged against the new champion. `champion_evaluation` measures a live snapshot that is not among `evaluations`.
    """
    entry: Entry | None = None
    standings: list[Standing] = []
    known = {evaluation.snapshot_id: evaluation for evaluation in evaluations}
    for candidate in sorted(evaluations, key=lambda evaluation: (-evaluation.mrr, evaluation.snapshot_id)):
        live = Ledger(store).state().champion
        champion = known.get(live.snapshot_id) or champion_evaluation(live.snapshot_id) if live else None
        if champion and champion.snapshot_id == candidate.snapshot_id:
            standings.append(Standing(candidate, "champion", f"live as release {live.number}" if live else "live"))
            continue
        verdict = judge(store, candidate, champion, gate=gate)
        brings = champion is None or champion.corpus_sha256 != candidate.corpus_sha256 or candidate.mrr > champion.mrr
        if verdict.outcome == "PASS" and brings and entry is None:
            entry = promote(store, candidate.snapshot_id, gate=gate, actor=actor, reason=verdict.summary)
            standings.append(Standing(candidate, "promoted", verdict.summary))
        elif verdict.outcome == "PASS":
            standings.append(Standing(candidate, "passed", f"{verdict.summary}; not better than the champion, so it stays a candidate"))
        else:
            status: Literal["refused", "inconclusive"] = "refused" if verdict.outcome == "FAIL" else "inconclusive"
            standings.append(Standing(candidate, status, verdict.summary))
    return Decision(tuple(standings), entry)
