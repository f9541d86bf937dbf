"""From evaluations to verdicts to a release: who is compared with whom, and which snapshot goes live."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal

from evals.gates import quality_gate
from evals.significance import EvidenceError
from rag_assets.evaluation import Evaluation, reciprocal_ranks
from rag_serving.errors import PromotionRefused
from rag_serving.promotion import promote
from rag_serving.releases import Entry, Ledger, Release
from rag_serving.settings import Gate
from rag_serving.store import Store
from rag_serving.verdicts import RETRIEVAL_QUALITY, Verdict, read_verdict, write_verdict

Status = Literal["champion", "passed", "refused", "inconclusive", "withdrawn", "unjudged"]
_STATUS: Mapping[str, Status] = {"PASS": "passed", "FAIL": "refused", "INCONCLUSIVE": "inconclusive"}


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an evaluated snapshot stands, with the reason in one line."""

    evaluation: Evaluation
    status: Status
    reason: str


def standings(store: Store, evaluations: Sequence[Evaluation]) -> list[Standing]:
    """Each evaluated snapshot by what the ledger and its verdict say of it, best MRR first."""
    state = Ledger(store).state()
    live = state.champion
    found = []
    for evaluation in sorted(evaluations, key=best_first):
        if live and live.snapshot_id == evaluation.snapshot_id:
            found.append(Standing(evaluation, "champion", f"release {live.number}; {_grounds(live)}"))
        elif evaluation.snapshot_id in state.withdrawn:
            found.append(Standing(evaluation, "withdrawn", "rolled back; promote it by name to try it again"))
        elif (verdict := _given_verdict(store, evaluation)) is None:
            found.append(Standing(evaluation, "unjudged", "no verdict on this eval set yet"))
        else:
            found.append(Standing(evaluation, _STATUS[verdict.outcome], verdict.summary))
    return found


def _grounds(live: Release) -> str:
    """What the promotion of the live snapshot rested on, by its ledger entry."""
    verdict = live.evidence.get("verdict")
    return "promoted by override" if live.evidence.get("override") or not verdict else str(verdict["summary"])


def _given_verdict(store: Store, evaluation: Evaluation) -> Verdict | None:
    """The verdict on this eval set; None when there is none or it cannot be trusted, as the next round gives it anew."""
    try:
        verdict = read_verdict(store, evaluation.snapshot_id, RETRIEVAL_QUALITY)
    except PromotionRefused:
        return None
    return verdict if verdict and verdict.eval_set_sha256 == evaluation.eval_set_sha256 else None


def best_first(evaluation: Evaluation) -> tuple[float, str]:
    return -evaluation.mrr, evaluation.snapshot_id


def judge(store: Store, candidate: Evaluation, champion: Evaluation | None, *, gate: Gate) -> Verdict:
    """Run the retrieval quality gate and keep its verdict as evidence; EvidenceError unless both were measured on the same eval set and k."""
    if champion and (champion.eval_set_sha256, champion.k) != (candidate.eval_set_sha256, candidate.k):
        raise EvidenceError(
            f"{candidate.snapshot_id} was measured on {candidate.eval_set} at k = {candidate.k}, {champion.snapshot_id} on another eval set or k.",
            fix="Evaluate both again: `ragline run`.",
        )
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
    stored: Verdict | None = None
    with suppress(PromotionRefused):  # an edited one is given anew
        stored = read_verdict(store, candidate.snapshot_id, RETRIEVAL_QUALITY)
    if stored != verdict:
        write_verdict(store, verdict)
    return verdict


def release(
    store: Store,
    evaluations: Sequence[Evaluation],
    *,
    gate: Gate,
    actor: str,
    champion_evaluation: Callable[[str], Evaluation],
) -> Entry | None:
    """Judge every evaluated snapshot against the champion, best MRR first, and promote the first that passes and brings something.

    It brings something when nothing is live, when its corpus is another one than the champion's, or when its MRR is higher. Those after
    it are judged against the new champion. A snapshot that was rolled back is judged, but only promoted by name. `champion_evaluation`
    measures a live snapshot that is not among `evaluations`.

    Returns the ledger entry of the promotion, None when nothing was worth one. When a promotion was refused at the last moment (a hold, a
    shrunk corpus, a damaged snapshot) and nothing else was promoted, raises PromotionRefused after everything has its verdict.
    """
    entry: Entry | None = None
    refusal: PromotionRefused | None = None
    withdrawn = Ledger(store).state().withdrawn
    known = {evaluation.snapshot_id: evaluation for evaluation in evaluations}
    for candidate in sorted(evaluations, key=best_first):
        live = Ledger(store).state().champion
        champion = (known.get(live.snapshot_id) or champion_evaluation(live.snapshot_id)) if live else None
        if champion and champion.snapshot_id == candidate.snapshot_id:
            continue
        verdict = judge(store, candidate, champion, gate=gate)
        brings = champion is None or champion.corpus_sha256 != candidate.corpus_sha256 or candidate.mrr > champion.mrr
        if verdict.outcome != "PASS" or not brings or entry or candidate.snapshot_id in withdrawn:
            continue
        try:
            entry = promote(store, candidate.snapshot_id, gate=gate, actor=actor, reason=verdict.summary)
        except PromotionRefused as error:
            refusal = refusal or error
    if refusal and entry is None:
        raise refusal
    return entry
