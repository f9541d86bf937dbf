"""A canary on real traffic: what the observation log says of it against the champion, and its end once harm is shown.

Each quality of answers is watched by a sequential test (mSPRT) on the differences as they come in, so that looking often is fair; the error
rate is shared out among the qualities. A loss of `canary.margin` of the requests is allowed in each. Thin traffic passes nothing and fails
only what does gross harm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import groupby, pairwise
from typing import Any

from evals.gates import Rule
from evals.sequential import any_time
from rag_assets.alerts import Alert, Severity
from rag_assets.observations import Row, rows_since
from rag_serving import promotion
from rag_serving.releases import Action, Entry, Ledger
from rag_serving.settings import Canary
from rag_serving.store import Store

MOST_ROWS = 50_000  # of a canary, the first ones: after so many it has been watched long enough
FEWEST = 30  # differences, before which nothing is concluded
_SCALE = 0.05  # of losses beyond the margin that are looked for
_COLUMNS = ("kind", "trace_id", "arm", "snapshot_id", "outcome", "verdict", "abstained", "cited", "grounded", "guards", "total_ms")
_OVERLAPS = ("documents", "wording")


@dataclass(frozen=True, slots=True)
class Signal:
    """One quality of answers, compared: the canary's value minus the champion's, in the order of time, from -1 to 1.

    A request that both were asked is compared with itself; where one of the two has nothing to judge, such as citations when it abstained, it
    says nothing, since other requests are easier. Of a split, the mean over canary answers that follow one another is compared with
    the mean over the champion answers just before them.
    """

    name: str
    differences: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """What was observed of a canary: its ledger entry, its signals, and how alike the shadow's answers were, which is told and not judged."""

    entry: Entry
    requests: int
    signals: tuple[Signal, ...]
    overlaps: Mapping[str, float]

    def rules(self, settings: Canary, *, alpha: float) -> list[Rule]:
        """One rule a signal; a loss is conclusive once it is shown, and stands in the way undecided when it was seen in enough requests."""
        return [_rule(signal, settings, alpha=alpha / len(_qualities(settings.slow_ms))) for signal in self.signals]


def trial_of(store: Store, *, snapshot_id: str, champion: str, settings: Canary) -> Trial | None:
    """The newest trial of a snapshot against this champion, whether it runs or has ended; None when there was none."""
    named = [entry for entry in Ledger(store).entries() if entry.action is Action.CANARY and entry.snapshot_id == snapshot_id]
    if not named or named[-1].evidence.get("champion") != champion:
        return None
    since = datetime.fromisoformat(named[-1].at)
    rows = _traffic(rows_since(store, since, columns=(*_COLUMNS, *_OVERLAPS), canary=named[-1].number, most=MOST_ROWS))
    answers = [row for row in rows if row["snapshot_id"] == snapshot_id and row["kind"] != "feedback"]
    return Trial(
        named[-1], len(answers), tuple(signals(rows, snapshot_id=snapshot_id, champion=champion, settings=settings)), _alike(answers)
    )


@dataclass(frozen=True, slots=True)
class Harm:
    """A running canary's trial and the rules that it is shown to break, one at least."""

    trial: Trial
    rules: tuple[Rule, ...]

    @property
    def reason(self) -> str:
        return "; ".join(rule.detail for rule in self.rules)


def harm(store: Store, settings: Canary, *, alpha: float) -> Harm | None:
    """What real traffic shows against the running canary; None when none runs or nothing is shown."""
    state = Ledger(store).state()
    if state.canary is None or state.champion is None:
        return None
    trial = trial_of(store, snapshot_id=state.canary.snapshot_id, champion=state.champion.snapshot_id, settings=settings)
    broken = tuple(rule for rule in trial.rules(settings, alpha=alpha) if not rule.passed and rule.conclusive) if trial else ()
    return Harm(trial, broken) if trial and broken else None


def abort_harmful(store: Store, settings: Canary, *, alpha: float, actor: str) -> Entry | None:
    """End the running canary when its trial shows harm; the entry has the numbers. None when none runs or nothing is shown.

    Raises ReleaseConflict when somebody else appends at the same moment; asking again then decides again.
    """
    shown = harm(store, settings, alpha=alpha)
    if shown is None:
        return None
    evidence = {"trial": shown.trial.entry.number, "requests": shown.trial.requests, "rules": [asdict(rule) for rule in shown.rules]}
    reason = f"automatic: {shown.reason}"
    return promotion.abort(store, actor=actor, reason=reason, evidence=evidence, canary=shown.trial.entry.number)


def harm_alert(shown: Harm) -> Alert:
    """What a webhook hears of a canary that does harm, where it is not ended by itself."""
    named = shown.trial.entry
    facts = {"entry": named.number, "snapshot_id": named.snapshot_id, **{rule.name: rule.observed for rule in shown.rules}}
    return Alert("canary_harm", Severity.CRITICAL, f"The canary does harm. {shown.reason}. End it with `ragline abort`.", facts)


def _traffic(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of requests that asked to see both answers, and without thumbs for these."""
    side_by_side = {row["trace_id"] for row in rows if row["kind"] == "compare"}
    return [row for row in rows if row["trace_id"] not in side_by_side]


def signals(rows: Sequence[Row], *, snapshot_id: str, champion: str, settings: Canary) -> list[Signal]:
    """What the rows of a canary say of `snapshot_id` against `champion`, one signal for each quality that both were seen with."""
    found = [Signal(name, _differences(rows, snapshot_id, champion, value)) for name, value in _qualities(settings.slow_ms).items()]
    return [signal for signal in found if signal.differences]


def _qualities(slow_ms: float) -> dict[str, Callable[[Row], float | None]]:
    """What is compared, each from 0, the worst, to 1; None where a row says nothing of it. An error speaks as one alone, and is not slow too."""

    def of_answer(value: Callable[[Row], Any]) -> Callable[[Row], float | None]:
        def judged(row: Row) -> float | None:
            found = None if row["kind"] == "feedback" or row["outcome"] == "error" else value(row)
            return None if found is None else float(found)

        return judged

    return {
        "answered": lambda row: None if row["kind"] == "feedback" else float(row["outcome"] != "error"),
        "not_degraded": of_answer(lambda row: row["outcome"] == "ok"),
        "not_abstained": of_answer(lambda row: None if row["abstained"] is None else not row["abstained"]),
        "citations_valid": of_answer(lambda row: row["cited"]),
        "grounded": of_answer(lambda row: row["grounded"]),
        "unguarded": of_answer(lambda row: not row["guards"]),
        "in_time": of_answer(lambda row: None if row["total_ms"] is None else row["total_ms"] <= slow_ms),
        "liked": lambda row: None if row["verdict"] is None else float(row["verdict"] == "up"),
    }


def _differences(rows: Sequence[Row], snapshot_id: str, champion: str, value: Callable[[Row], float | None]) -> tuple[float, ...]:
    tried, answered = (
        {row["trace_id"] for row in rows if row["snapshot_id"] == arm and row["kind"] != "feedback"} for arm in (snapshot_id, champion)
    )
    champions = {row["trace_id"]: its for row in rows if row["snapshot_id"] == champion and (its := value(row)) is not None}
    paired, alone = [], []
    for row in rows:
        its = value(row)
        ours = row["snapshot_id"] == snapshot_id
        if its is None or not (ours or row["snapshot_id"] == champion):
            continue
        if row["kind"] == "feedback" or row["trace_id"] not in (answered if ours else tried):
            alone.append((row["at"], ours, its))
        elif ours and row["trace_id"] in champions:
            paired.append((row["at"], its - champions[row["trace_id"]]))
    runs = [(ours, list(run)) for ours, run in groupby(alone, key=lambda each: each[1])]
    means = [(ours, run[-1][0], sum(its for *_, its in run) / len(run)) for ours, run in runs]
    split = [(at, mine - its) for (_, _, its), (ours, at, mine) in pairwise(means) if ours]
    return tuple(difference for _, difference in sorted([*paired, *split], key=lambda each: each[0]))


def _alike(answers: Sequence[Row]) -> dict[str, float]:
    means: dict[str, float] = {}
    for name in _OVERLAPS:
        values = [row[name] for row in answers if row[name] is not None]
        means |= {name: sum(values) / len(values)} if values else {}
    return means


def _rule(signal: Signal, settings: Canary, *, alpha: float) -> Rule:
    total = len(signal.differences)
    mean = sum(signal.differences) / total
    shown = f"{signal.name.replace('_', ' ')}: {mean:+.3f} against the champion over {total:,} real requests"
    name, allowed = f"real_{signal.name}", f"at most {settings.margin:g} may be lost"
    if total < FEWEST:
        return Rule(name, passed=True, observed=mean, required=-settings.margin, detail=f"{shown}, too few to judge; {allowed}")
    beyond = [difference + settings.margin for difference in signal.differences]
    look = any_time(beyond, planned=total, minimum=FEWEST, tau=_SCALE, alpha=alpha)
    stopped = look.outcome == "stop-bad"
    undecided = total >= settings.min_requests and mean < -settings.margin
    loss = f"{shown}; {allowed}" + (f"; shown after {look.n:,} (likelihood ratio {look.evidence:.3g})" if stopped else "")
    return Rule(
        name, passed=not (stopped or undecided), observed=mean, required=-settings.margin, detail=loss, conclusive=stopped or not undecided
    )
