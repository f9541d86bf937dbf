"""From evaluations to verdicts to a release: who is compared with whom, and which snapshot goes live."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from evals.gates import GateResult, quality_gate
from evals.significance import EvidenceError
from rag_assets.evaluation import Evaluation, query_slices, reciprocal_ranks
from rag_assets.replay import canary_gate
from rag_assets.trial import trial_of
from rag_serving.errors import PromotionRefused, SnapshotError, StoreError
from rag_serving.promotion import override_of, promote
from rag_serving.releases import Entry, Ledger, Release
from rag_serving.settings import Canary, Gate
from rag_serving.signals import contract, work
from rag_serving.store import Store
from rag_serving.verdicts import GATES, RETRIEVAL_QUALITY, Verdict, read_verdict, trusted_verdict, write_verdict

Status = Literal["champion", "passed", "refused", "inconclusive", "withdrawn", "unjudged"]
_AS_DEFAULT = Canary()
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
        elif not (verdicts := given_verdicts(store, evaluation)):
            found.append(Standing(evaluation, "unjudged", "no verdict on this eval set yet"))
        else:
            decisive = next((verdict for verdict in verdicts if verdict.outcome != "PASS"), verdicts[0])
            found.append(Standing(evaluation, _STATUS[decisive.outcome], decisive.summary))
    return found


def _grounds(live: Release) -> str:
    """What the promotion of the live snapshot rested on, by its ledger entry."""
    verdict = live.evidence.get("verdict")
    return "promoted by override" if live.evidence.get("override") or not verdict else str(verdict["summary"])


def given_verdicts(store: Store, evaluation: Evaluation) -> list[Verdict]:
    """The verdicts of this snapshot on this eval set in the order of the gates, without those that cannot be trusted.

    They end where the first gate was not asked: what a later gate said then belongs to an earlier comparison.
    """
    verdicts: list[Verdict] = []
    for gate in GATES:
        verdict = trusted_verdict(store, evaluation.snapshot_id, gate)
        if verdict is None or verdict.eval_set_sha256 != evaluation.eval_set_sha256:
            break
        verdicts.append(verdict)
        if verdict.outcome != "PASS":
            break
    return verdicts


def best_first(evaluation: Evaluation) -> tuple[float, str]:
    return -evaluation.mrr, evaluation.snapshot_id


def judged(verdict: Verdict) -> work.Facts:
    """What is recorded of a verdict."""
    return {contract.GATE: verdict.gate, contract.SNAPSHOT_ID: verdict.snapshot_id, contract.VERDICT: verdict.outcome}


@work.worked(contract.JUDGE, judged)
def judge(store: Store, candidate: Evaluation, champion: Evaluation | None, *, gate: Gate) -> Verdict:
    """Run the retrieval quality gate and keep its verdict as evidence; EvidenceError unless both were measured on the same eval set and k."""
    _require_comparable(candidate, champion)
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
        slices=query_slices(store, candidate),
        slice_margin=gate.slice_margin,
        slice_min_queries=gate.slice_min_queries,
        k=candidate.k,
    )
    compared = champion.snapshot_id if champion else None
    return keep_verdict(store, result, candidate, champion=compared, measured_at=candidate.measured_at)


def _require_comparable(candidate: Evaluation, champion: Evaluation | None) -> None:
    if champion and (champion.eval_set_sha256, champion.k) != (candidate.eval_set_sha256, candidate.k):
        raise EvidenceError(
            f"{candidate.snapshot_id} was measured on {candidate.eval_set} at k = {candidate.k}, {champion.snapshot_id} on another eval set or k.",
            fix="Evaluate both again: `ragline run`.",
        )


def keep_verdict(store: Store, result: GateResult, candidate: Evaluation, *, champion: str | None, measured_at: str) -> Verdict:
    """Bind a gate's result to the snapshot and the eval set of `candidate`, and store it unless the same one is there."""
    verdict = Verdict(
        gate=result.gate,
        snapshot_id=candidate.snapshot_id,
        manifest_sha256=candidate.manifest_sha256,
        eval_set_sha256=candidate.eval_set_sha256,
        champion=champion,
        outcome=result.outcome.value,
        summary=result.summary,
        rules=tuple(asdict(rule) for rule in result.rules),
        measured_at=measured_at,
    )
    if trusted_verdict(store, candidate.snapshot_id, result.gate) != verdict:
        write_verdict(store, verdict)
    return verdict


@work.worked(contract.JUDGE, judged)
def judge_canary(store: Store, candidate: Evaluation, champion: Evaluation | None, *, gate: Gate, traffic: Canary = _AS_DEFAULT) -> Verdict:
    """What real traffic said of the candidate against the champion, if it was its canary, and the eval queries replayed through both.

    The verdict is as old as the older of the two evaluations. EvidenceError as of `judge`.
    """
    _require_comparable(candidate, champion)
    trial = trial_of(store, snapshot_id=candidate.snapshot_id, champion=champion.snapshot_id, settings=traffic) if champion else None
    result = canary_gate(
        reciprocal_ranks(store, candidate),
        reciprocal_ranks(store, champion) if champion else None,
        margin=gate.margin,
        alpha=gate.alpha,
        min_queries=gate.min_queries,
        requests=trial.requests if trial else 0,
        observed=trial.rules(traffic, alpha=gate.alpha) if trial else (),
    )
    measured = [evaluation.measured_at for evaluation in (candidate, champion) if evaluation]
    return keep_verdict(
        store, result, candidate, champion=champion.snapshot_id if champion else None, measured_at=min(measured, key=datetime.fromisoformat)
    )


@dataclass(frozen=True, slots=True)
class Round:
    """One release round over evaluated snapshots of one corpus and eval set: each is a candidate unless it is live.

    `measured` gives the fresh evaluation of any snapshot by id, `warm_up` the warm-up verdict of a candidate, measured when there is none, and
    `traffic` says how the real requests of a canary are judged. `damaged` says what could not be judged, and why, by snapshot id. What was
    judged is in the store, so a round may be held gate by gate, in several processes, or all at once by `promote_best`.
    """

    store: Store
    evaluations: Sequence[Evaluation]
    gate: Gate
    measured: Callable[[str], Evaluation]
    warm_up: Callable[[Evaluation], Verdict]
    traffic: Canary = _AS_DEFAULT
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def champion_is_current(self) -> bool:
        """Whether the live snapshot is among the evaluated ones, so that the current corpus is served already."""
        live = Ledger(self.store).state().champion
        return live is not None and any(each.snapshot_id == live.snapshot_id for each in self.evaluations)

    def judge_all(self) -> dict[str, Verdict]:
        """Retrieval quality of every candidate, best MRR first, by snapshot id.

        The first that passes and brings something is the one to go live, so those after it are compared with it.
        """
        reference, challenger = self._champion(), None
        verdicts = {}
        for candidate in self._candidates():
            verdict = verdicts[candidate.snapshot_id] = judge(self.store, candidate, reference, gate=self.gate)
            if challenger is None and self._contends(candidate, verdict, reference):
                reference = challenger = candidate
        return verdicts

    def warm_ups(self) -> dict[str, Verdict]:
        """Warm-up verdicts of the contenders, best first, up to the first that passes; by snapshot id.

        One whose files are damaged is passed over and noted in `damaged`; when none passes, its StoreError is raised in the end.
        """
        return self._until_passed(self.warm_up)

    def canaries(self) -> dict[str, Verdict]:
        """Canary verdicts of the contenders that pass warm-up, best first, up to the first that passes; as `warm_ups`."""
        return self._until_passed(self._canary, after=self.warm_up)

    def promote_best(self, *, actor: str) -> Entry | None:
        """Judge every candidate against the champion, best MRR first, and promote the first that passes every gate and brings something.

        It brings something when nothing is live, when its corpus is another one than the champion's, or when its MRR is higher. Those after
        it are judged against the new champion. A snapshot that was rolled back is judged, but only promoted by name. A champion that stands
        on an override is judged against the release before it, so that its own verdicts can take the override's place.

        Returns the ledger entry of the promotion, None when nothing was worth one. When a promotion was refused at the last moment (a hold, a
        shrunk corpus, a damaged snapshot) and nothing else was promoted, raises that PromotionRefused or SnapshotError after everything has its
        verdict.
        """
        entry: Entry | None = None
        refusal: PromotionRefused | SnapshotError | None = None
        for candidate in self._candidates():
            champion = self._champion()
            verdict = judge(self.store, candidate, champion, gate=self.gate)
            if entry or not self._contends(candidate, verdict, champion):
                continue
            try:
                if any(given(candidate).outcome != "PASS" for given in (self.warm_up, self._canary)):
                    continue
                entry = promote(
                    self.store, candidate.snapshot_id, gate=self.gate, traffic=self.traffic, actor=actor, reason=verdict.summary
                )
            except (PromotionRefused, SnapshotError) as error:
                refusal = refusal or error
        self._cover_override()
        if refusal and entry is None:
            raise refusal
        return entry

    def complete(self, candidate: Evaluation) -> None:
        """Give a candidate that passed retrieval quality against the champion its later verdicts, for a promotion by name."""
        champion = self._champion()
        verdict = read_verdict(self.store, candidate.snapshot_id, RETRIEVAL_QUALITY)
        compared = champion.snapshot_id if champion else None
        if verdict and (verdict.outcome, verdict.champion) == ("PASS", compared) and self.warm_up(candidate).outcome == "PASS":
            self._canary(candidate)

    def _candidates(self) -> list[Evaluation]:
        live = Ledger(self.store).state().champion
        return sorted((each for each in self.evaluations if not live or each.snapshot_id != live.snapshot_id), key=best_first)

    def _champion(self) -> Evaluation | None:
        live = Ledger(self.store).state().champion
        return self._evaluation(live.snapshot_id) if live else None

    def _evaluation(self, snapshot_id: str) -> Evaluation:
        oldest = datetime.now(UTC) - timedelta(days=self.gate.max_age_days)
        fresh = (each for each in self.evaluations if datetime.fromisoformat(each.measured_at) >= oldest)
        return next((each for each in fresh if each.snapshot_id == snapshot_id), None) or self.measured(snapshot_id)

    def _contends(self, candidate: Evaluation, verdict: Verdict, champion: Evaluation | None) -> bool:
        brings = champion is None or champion.corpus_sha256 != candidate.corpus_sha256 or candidate.mrr > champion.mrr
        return verdict.outcome == "PASS" and brings and candidate.snapshot_id not in Ledger(self.store).state().withdrawn

    def _contenders(self) -> Iterator[Evaluation]:
        champion = self._champion()
        for candidate in self._candidates():
            if self._contends(candidate, judge(self.store, candidate, champion, gate=self.gate), champion):
                yield candidate

    def _canary(self, candidate: Evaluation) -> Verdict:
        return judge_canary(self.store, candidate, self._champion(), gate=self.gate, traffic=self.traffic)

    def _until_passed(
        self, given: Callable[[Evaluation], Verdict], *, after: Callable[[Evaluation], Verdict] | None = None
    ) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        damage: StoreError | None = None
        for candidate in self._contenders():
            try:
                if after is not None and after(candidate).outcome != "PASS":
                    continue
                verdict = verdicts[candidate.snapshot_id] = given(candidate)
            except StoreError as error:
                self.damaged[candidate.snapshot_id] = str(error)
                damage = damage or error
                continue
            if verdict.outcome == "PASS":
                return verdicts
        if damage is not None:
            raise damage
        return verdicts

    def _cover_override(self) -> None:
        state = Ledger(self.store).state()
        if state.champion is None or override_of(self.store, state.champion) is None:
            return
        live = self._evaluation(state.champion.snapshot_id)
        before = self._evaluation(state.previous.snapshot_id) if state.previous else None
        judge(self.store, live, before, gate=self.gate)
        self.warm_up(live)
        judge_canary(self.store, live, before, gate=self.gate, traffic=self.traffic)
