"""The canary gate: what real traffic says of the challenger, and where that is thin the eval queries as they would arrive, answered by both.

The per-query reciprocal ranks of the two evaluations are the replay: they were made through the code and bytes that serving uses, each bound
to its snapshot's manifest. Only a stale one is measured again. Queries arrive in the order of a hash of their ids, so a replay repeats.
Real requests come from the observation log, by way of the challenger's trial as a canary.
"""

import hashlib
from collections.abc import Mapping, Sequence

from evals.gates import GateResult, Rule, decide
from evals.sequential import any_time
from evals.significance import EvidenceError
from rag_serving.verdicts import CANARY

_SCALE = 0.05  # of losses beyond the margin that are looked for: finds one of 0.02 at 1,344 queries and one of 0.3 at 40


def canary_gate(
    challenger: Mapping[str, float],
    champion: Mapping[str, float] | None,
    *,
    margin: float,
    alpha: float,
    min_queries: int,
    requests: int = 0,
    observed: Sequence[Rule] = (),
) -> GateResult:
    """Watch the challenger's reciprocal ranks (query id to value) against the champion's, query after query.

    FAIL as soon as a loss beyond `margin` is shown (mSPRT, so that looking at every query is fair). INCONCLUSIVE with fewer than `min_queries`,
    and when such a loss was seen but not shown. PASS otherwise, and when there is no champion. `observed` are the rules of a trial on real
    traffic, whose `requests` count like replayed queries; each must hold too. Raises EvidenceError when the two answered other queries.
    """
    if champion is None:
        first = Rule("first_release", passed=True, observed=0.0, required=0.0, detail="nothing is live to compare with")
        return decide(CANARY, (first,), praise="nothing is live to compare with")
    if challenger.keys() != champion.keys():
        raise EvidenceError("challenger and champion answered different queries.", fix="Evaluate both on the same eval set.")
    arriving = sorted(champion, key=lambda query_id: hashlib.sha256(query_id.encode()).digest())
    differences = [challenger[query_id] - champion[query_id] for query_id in arriving]
    total = len(differences)
    seen = f"{total:,} queries were replayed" + (f" and {requests:,} real requests answered" if requests else "")
    enough = Rule(
        "enough_traffic",
        total + requests >= min_queries,
        float(total + requests),
        float(min_queries),
        f"{seen}; {min_queries:,} are needed",
        conclusive=False,
    )
    if total < 2:
        return decide(CANARY, (enough, *observed), praise=enough.detail)
    beyond = [difference + margin for difference in differences]
    look = any_time(beyond, planned=total, minimum=min(max(2, min_queries // 3), total), tau=_SCALE, alpha=alpha)
    loss = look.mean - margin
    shown = f"mean reciprocal rank {loss:+.4f} against the champion's over {look.n:,} of {total:,} queries in order of arrival"
    evidence = f"likelihood ratio of a loss beyond {margin:g} is {look.evidence:.2g}; {look.boundary:g} stops"
    stopped = look.outcome == "stop-bad"
    harmless = Rule("no_harm", not stopped and loss >= -margin, look.evidence, look.boundary, f"{shown}: {evidence}", conclusive=stopped)
    real = f"; {requests:,} real requests show no harm" if requests else ""
    return decide(CANARY, (enough, harmless, *observed), praise=f"{shown}; {evidence}{real}")
