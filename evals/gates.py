"""Gates: pure numbers in, an outcome with its reasons out. Nothing here reads a store or decides what is released.

A gate is a tuple of small rules. FAIL if the evidence speaks against any of them, else INCONCLUSIVE if it leaves any open, else PASS; only
PASS promotes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from evals.power import minimum_detectable_drop, queries_needed, sensitivity_of
from evals.significance import SEED, EvidenceError, PairedDifference, bca_interval, paired_difference
from evals.slices import SliceDifference, slice_differences

_ROUNDING = 1e-9


class Outcome(StrEnum):
    PASS = "PASS"  # noqa: S105 - an outcome, not a password
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True, slots=True)
class Rule:
    """One requirement: `observed` against `required`, and a sentence with the numbers.

    A rule that is not passed and not `conclusive` is undecided: more evidence could still pass it.
    """

    name: str
    passed: bool
    observed: float
    required: float
    detail: str
    conclusive: bool = True


@dataclass(frozen=True, slots=True)
class GateResult:
    """A gate's outcome, every rule behind it, and one line for the person on call."""

    gate: str
    outcome: Outcome
    rules: tuple[Rule, ...]
    summary: str


@dataclass(frozen=True, slots=True)
class QualityEvidence:
    """Everything the quality rules look at; MRR is over document ranks within `k`, metrics are between 0 and 1.

    `slices` are the comparisons with the champion on each slice of `slice_min_queries` queries or more, the largest loss first.
    """

    k: int
    queries: int
    mrr: float
    difference: PairedDifference | None
    bm25_mrr: float
    ann_recall: float
    mrr_floor: float
    margin: float
    alpha: float
    min_queries: int
    ann_recall_floor: float
    slices: tuple[SliceDifference, ...] = ()
    slice_margin: float = 0.05
    slice_min_queries: int = 50


def enough_queries(evidence: QualityEvidence) -> Rule:
    """Fewer than `min_queries` can refuse a snapshot on an absolute rule, never pass one."""
    passed = evidence.queries >= evidence.min_queries
    detail = f"{evidence.queries:,} queries were judged; this gate needs {evidence.min_queries:,}"
    return Rule("enough_queries", passed, float(evidence.queries), float(evidence.min_queries), detail, conclusive=False)


def non_inferiority(evidence: QualityEvidence) -> Rule | None:
    """The loss against the champion is below `margin`; no rule when there is no champion.

    - Passed if the one-sided 1 - alpha BCa bound of the mean difference is above -margin. A loss that is significant yet surely
      smaller than the margin passes: the margin says which losses do not matter.
    - Failed if that is not shown and either the loss itself is shown (sign-flip p <= alpha) or the best estimate is a loss of the margin
      or more. More queries would be a bet against the evidence at hand.
    - Undecided otherwise: neither a loss nor its absence is shown, and more queries would tell.

    So a candidate as good as its champion fails in at most about alpha of all evaluations, and one that lost the margin passes in at most
    about alpha. Below `min_queries` the rule never fails by itself.
    """
    difference = evidence.difference
    if difference is None:
        return None
    passed = difference.noninferior(evidence.margin)
    against = difference.p_worse <= evidence.alpha or difference.mean <= -evidence.margin
    detail = (
        f"MRR@{evidence.k} {evidence.mrr:.3f} is {_against_champion(evidence.mrr, difference)} "
        f"(95 % CI {difference.low:+.3f} to {difference.high:+.3f}; at most {evidence.margin:.3f} is allowed)"
    )
    if not passed and not against:
        needed = queries_needed(difference.sd, evidence.margin + min(difference.mean, 0.0), alpha=evidence.alpha)
        visible = minimum_detectable_drop(difference.sd, difference.n, alpha=evidence.alpha)
        detail += f"; {difference.n:,} queries show drops from {visible:.3f} up, about {needed:,} would settle it"
    return Rule(
        "non_inferiority",
        passed,
        difference.lower_bound,
        -evidence.margin,
        detail,
        conclusive=passed or (against and evidence.queries >= evidence.min_queries),
    )


def no_slice_worse(evidence: QualityEvidence) -> Rule | None:
    """No slice lost more than `slice_margin` significantly: sign-flip p, adjusted by Holm over the slices, at most alpha.

    So a candidate that is as good as its champion everywhere fails this rule in at most alpha of all evaluations, however many slices there
    are. No rule when there is no champion.
    """
    if evidence.difference is None:
        return None
    worse = [each for each in evidence.slices if each.mean < -evidence.slice_margin - _ROUNDING and each.p_worse <= evidence.alpha]
    if worse:
        first, *others = worse
        also = f", and so are {', '.join(each.name for each in others)}" if others else ""
        detail = (
            f"the slice {first.name} ({first.queries:,} queries) is {-first.mean:.3f} below the champion "
            f"(p = {first.p_worse:.4f} after Holm over {len(evidence.slices)} slices; at most {evidence.slice_margin:.3f} is allowed){also}"
        )
    elif evidence.slices:
        first = evidence.slices[0]
        detail = (
            f"none of {len(evidence.slices)} slices lost more than {evidence.slice_margin:.3f} significantly; "
            f"the lowest is {first.name} ({first.queries:,} queries) at {first.mean:+.3f} (p = {first.p_worse:.4f} after Holm)"
        )
    else:
        detail = f"no slice has {evidence.slice_min_queries:,} queries or more"
    return Rule("no_slice_worse", not worse, (worse or evidence.slices)[0].mean if evidence.slices else 0.0, -evidence.slice_margin, detail)


def mrr_floor(evidence: QualityEvidence) -> Rule:
    """The point estimate of MRR reaches the floor."""
    passed = _at_least(evidence.mrr, evidence.mrr_floor)
    detail = f"MRR@{evidence.k} {evidence.mrr:.3f} is {_side(passed=passed)} the floor of {evidence.mrr_floor:.3f}"
    return Rule("mrr_floor", passed, evidence.mrr, evidence.mrr_floor, detail)


def beats_bm25(evidence: QualityEvidence) -> Rule:
    """Embeddings earn their cost: MRR is not below that of full-text search alone."""
    passed = _at_least(evidence.mrr, evidence.bm25_mrr)
    detail = f"MRR@{evidence.k} {evidence.mrr:.3f} is {_side(passed=passed)} the {evidence.bm25_mrr:.3f} of full-text search alone"
    return Rule("beats_bm25", passed, evidence.mrr, evidence.bm25_mrr, detail)


def ann_recall(evidence: QualityEvidence) -> Rule:
    """The vector index finds what exact search finds."""
    passed = _at_least(evidence.ann_recall, evidence.ann_recall_floor)
    detail = f"the vector index finds {evidence.ann_recall:.1%} of what exact search finds; {evidence.ann_recall_floor:.1%} is required"
    return Rule("ann_recall", passed, evidence.ann_recall, evidence.ann_recall_floor, detail)


QUALITY_RULES: tuple[Callable[[QualityEvidence], Rule | None], ...] = (
    enough_queries,
    non_inferiority,
    no_slice_worse,
    mrr_floor,
    beats_bm25,
    ann_recall,
)


def quality_gate(
    *,
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
    bm25_mrr: float,
    ann_recall: float,
    mrr_floor: float,
    margin: float,
    alpha: float,
    min_queries: int,
    ann_recall_floor: float,
    slices: Mapping[str, Sequence[str]] | None = None,
    slice_margin: float = 0.05,
    slice_min_queries: int = 50,
    draws: int = 10_000,
    seed: int = SEED,
    k: int = 10,
) -> GateResult:
    """Judge the per-query reciprocal ranks (query id to value) of a candidate, against its champion if there is one.

    `slices` names the groups of each query, by query id; they must not depend on how a system did. `draws` are those of each permutation
    test and bootstrap. The summary of a PASS says which drops so many queries would have shown.

    Raises EvidenceError if a metric is NaN, below 0 or above 1, if there are no queries, or if the champion was measured on other queries.
    """
    for name, values in (("candidate", candidate), ("champion", champion or {})):
        for query_id, value in values.items():
            _require_share(value, f"the {name}'s reciprocal rank of query {query_id!r}")
    _require_share(bm25_mrr, "the MRR of full-text search")
    _require_share(ann_recall, "the recall of the vector index")
    low, high = bca_interval(list(candidate.values()), draws=draws, seed=seed)
    difference = None if champion is None else paired_difference(candidate, champion, alpha=alpha, draws=draws, seed=seed)
    evidence = QualityEvidence(
        k=k,
        queries=len(candidate),
        mrr=math.fsum(candidate.values()) / len(candidate),
        difference=difference,
        bm25_mrr=bm25_mrr,
        ann_recall=ann_recall,
        mrr_floor=mrr_floor,
        margin=margin,
        alpha=alpha,
        min_queries=min_queries,
        ann_recall_floor=ann_recall_floor,
        slices=()
        if champion is None
        else slice_differences(candidate, champion, slices or {}, min_queries=slice_min_queries, draws=draws, seed=seed),
        slice_margin=slice_margin,
        slice_min_queries=slice_min_queries,
    )
    rules = [rule for check in QUALITY_RULES if (rule := check(evidence)) is not None]
    compared = "no champion to compare with" if difference is None else _against_champion(evidence.mrr, difference)
    sensitivity = sensitivity_of(evidence.queries, difference.sd if difference else 0.0, alpha=alpha)
    praise = (
        f"MRR@{k} {evidence.mrr:.3f} over {evidence.queries:,} queries (95 % CI {low:.3f} to {high:.3f}), {compared}; "
        f"a drop from {sensitivity.drops[1]:.3f} up would have shown"
    )
    return decide("retrieval_quality", rules, praise=praise)


def decide(gate: str, rules: Sequence[Rule], *, praise: str) -> GateResult:
    """Fold rules to one outcome. The summary is `praise` on PASS; else the first rule that stands in the way, and the names of the others.

    Raises EvidenceError without rules: nothing checked is not a PASS.
    """
    if not rules:
        raise EvidenceError(f"the gate {gate!r} has no rules.", fix="Give it at least one.")
    failed = [rule for rule in rules if not rule.passed and rule.conclusive]
    undecided = [rule for rule in rules if not rule.passed and not rule.conclusive]
    if not failed and not undecided:
        return GateResult(gate, Outcome.PASS, tuple(rules), f"{Outcome.PASS}: {praise}")
    outcome = Outcome.FAIL if failed else Outcome.INCONCLUSIVE
    first, *others = failed or undecided
    also = f" (also: {', '.join(rule.name for rule in others)})" if others else ""
    return GateResult(gate, outcome, tuple(rules), f"{outcome}: {first.detail}{also}")


def _require_share(value: float, what: str) -> None:
    if not -_ROUNDING <= value <= 1 + _ROUNDING:
        raise EvidenceError(f"{what} is {value}, which is not between 0 and 1.", fix="Evaluate again; no verdict rests on such a number.")


def _at_least(observed: float, required: float) -> bool:
    return observed >= required - _ROUNDING


def _side(*, passed: bool) -> str:
    return "not below" if passed else "below"


def _against_champion(mrr: float, difference: PairedDifference) -> str:
    champion = mrr - difference.mean
    if abs(difference.mean) < 0.0005:
        return f"equal to the champion's {champion:.3f}"
    return f"{abs(difference.mean):.3f} {'above' if difference.mean > 0 else 'below'} the champion's {champion:.3f}"
