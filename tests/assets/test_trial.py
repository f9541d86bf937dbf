"""A canary on real traffic: harm in any quality is shown and ends it, thin traffic proves nothing, and equal answers raise no alarm."""

import io
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from rich.console import Console
from small_service import PAGES, build, release, serving, settings_for, until
from test_gating import GATE, evaluated, gated, round_of  # noqa: F401 - fixtures
from test_sensors import tick

from rag_assets.defs import sensors
from rag_assets.gating import judge, judge_canary
from rag_assets.replay import canary_gate
from rag_assets.status import describe, print_status
from rag_assets.trial import FEWEST, Signal, Trial, abort_harmful, harm, signals, trial_of
from rag_serving.errors import ReleaseConflict
from rag_serving.observations import PREFIX, Observation, encode
from rag_serving.promotion import abort
from rag_serving.releases import Action, Ledger
from rag_serving.settings import Canary, Places, Settings
from rag_serving.store import LocalStore

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CANARY = Canary(min_requests=100)
HARMFUL = {  # what is wrong with every second answer, by the quality that shows it
    "answered": {"outcome": "error", "code": "internal"},
    "not_degraded": {"outcome": "degraded"},
    "not_abstained": {"abstained": True},
    "citations_valid": {"cited": 0.0},
    "grounded": {"grounded": 0.2},
    "unguarded": {"guards": ("output:strip",)},
    "in_time": {"total_ms": 9000.0},
}


def answer(number: int, arm: str, **changes) -> Observation:
    """A good answer to request `number`, of snapshot `new` or, as champion, of `old`."""
    made = Observation(
        "query",
        f"{number:032x}",
        arm,
        1,
        "old" if arm == "champion" else "new",
        canary=2,
        abstained=False,
        cited=1.0,
        grounded=1.0,
        total_ms=20.0,
        at=START + timedelta(seconds=number),
    )
    return replace(made, **changes)


def as_rows(observations: Iterable[Observation]) -> list[dict]:
    return sorted(({name: getattr(each, name) for name in Observation.__slots__} for each in observations), key=lambda row: row["at"])


def found(observations: Iterable[Observation]) -> dict[str, tuple[float, ...]]:
    made = signals(as_rows(observations), snapshot_id="new", champion="old", settings=CANARY)
    return {signal.name: signal.differences for signal in made}


def shadowed(count: int, *, every: int = 2, **wrong) -> list[Observation]:
    """So many requests answered by both; every second answer of the shadow has something `wrong`."""
    pairs = [(answer(number, "champion"), answer(number, "shadow", **(wrong if number % every == 0 else {}))) for number in range(count)]
    return [each for pair in pairs for each in pair]


@pytest.mark.parametrize("quality", HARMFUL)
def test_each_quality_shows_what_is_wrong(quality):
    """A fault in every second answer is a loss of that quality alone, by its size; an error counts as one and not as slow or uncited too."""
    seen = found(shadowed(10, **HARMFUL[quality]))
    loss = 0.8 if quality == "grounded" else 1.0
    assert seen[quality] == pytest.approx([-loss, 0.0] * 5)
    others = {name: differences for name, differences in seen.items() if name != quality}
    assert set(HARMFUL) - {quality} == others.keys()
    assert not any(map(any, others.values()))
    assert len(others["unguarded" if quality == "answered" else "answered"]) == (5 if quality == "answered" else 10)


def test_a_split_is_compared_run_by_run():
    """Answers of the canary are compared with the mean of the champion's just before them, so that the time of day cancels out."""
    arms = ["champion", "champion", "canary", "champion", "canary", "canary", "champion"]
    cited = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    seen = found(answer(number, arm, cited=value) for number, (arm, value) in enumerate(zip(arms, cited, strict=True)))
    assert seen["citations_valid"] == (-0.5, -0.5)


def test_a_request_that_fell_back_speaks_against_the_canary_once():
    """The canary's error and the champion's answer to the same request are one pair; that answer is not compared with other requests."""
    rows = [answer(0, "champion"), answer(1, "canary", outcome="error"), answer(1, "champion", cited=0.0), answer(2, "canary")]
    seen = found(rows)
    assert sorted(seen["answered"]) == [-1.0, 0.0]
    assert seen["citations_valid"] == (0.0,)


def test_where_the_champion_abstained_the_canary_is_not_compared_with_easier_requests():
    """Citations of an answer to what the champion gave up on have nothing beside them: champion answers to other requests are no measure.

    That the canary answered at all is seen, where abstaining is compared.
    """
    easy = [answer(number, "champion") for number in (0, 2, 4)]
    hard = [
        each
        for number in (1, 3, 5)
        for each in (
            answer(number, "champion", abstained=True, cited=None, grounded=None),
            answer(number, "shadow", cited=0.0, grounded=0.3),
        )
    ]
    seen = found([*easy, *hard])
    assert "citations_valid" not in seen
    assert "grounded" not in seen
    assert seen["not_abstained"] == (1.0, 1.0, 1.0)


def test_answers_that_were_asked_for_side_by_side_are_no_traffic(store):
    """Somebody who compares both answers again and again, and thumbs for them, move no verdict, however bad those answers are."""
    wrong = [each for number in range(200) for each in side_by_side(number)]
    thumbs = [answer(number, "shadow", kind="feedback", verdict="down") for number in range(200)]
    canary = Ledger(store).append(
        Action.CANARY, after=0, actor="tester", reason="try", snapshot_id="new", manifest_sha256="m", evidence={"champion": "old"}
    )
    later = datetime.fromisoformat(canary.at) + timedelta(seconds=1)
    rows = [replace(row, at=later, canary=canary.number) for row in [*wrong, *thumbs]]
    rows += [replace(row, at=later, canary=canary.number, trace_id=f"f{row.trace_id[1:]}") for row in shadowed(5)]
    store.create(f"{PREFIX}/{later:%Y-%m-%d}/{later:%H%M%S.%f}.parquet", encode(rows, with_text=False))
    trial = trial_of(store, snapshot_id="new", champion="old", settings=CANARY)
    assert trial.requests == 5
    assert {signal.name: set(signal.differences) for signal in trial.signals if any(signal.differences)} == {}


def side_by_side(number: int) -> list[Observation]:
    """A request of /v1/compare whose canary answer is wrong in every way."""
    bad = {"cited": 0.0, "grounded": 0.0, "guards": ("output:strip",)}
    return [answer(number, "champion", kind="compare"), answer(number, "shadow", kind="compare", **bad)]


def test_thumbs_are_compared_between_the_arms():
    """Feedback for the canary is compared with feedback for the champion, and says nothing of other qualities."""
    said = [("champion", "up"), ("champion", "down"), ("canary", "down"), ("champion", "up"), ("canary", "up")]
    seen = found(answer(number, arm, kind="feedback", verdict=verdict) for number, (arm, verdict) in enumerate(said))
    assert seen == {"liked": (-0.5, 0.0)}


def rules_of(observations: Iterable[Observation]):
    made = signals(as_rows(observations), snapshot_id="new", champion="old", settings=CANARY)
    return Trial(None, 0, tuple(made), {}).rules(CANARY, alpha=0.05)


def trial_rule(observations: Iterable[Observation], name: str):
    return next(rule for rule in rules_of(observations) if rule.name == f"real_{name}")


def test_harm_is_conclusive_and_thin_traffic_is_not():
    """Every second answer uncited is harm by the fewest requests already; with fewer nothing is said; a loss within the margin passes."""
    wrong = HARMFUL["citations_valid"]
    assert (trial_rule(shadowed(FEWEST - 1, **wrong), "citations_valid").passed, FEWEST) == (True, 30)
    shown = trial_rule(shadowed(FEWEST * 2, **wrong), "citations_valid")
    assert (shown.passed, shown.conclusive) == (False, True)
    assert "-0.500 against the champion over 60 real requests" in shown.detail
    assert trial_rule(shadowed(400, every=100, **wrong), "citations_valid").passed


def test_a_loss_seen_but_not_shown_is_undecided():
    """In enough requests a mean loss beyond the margin that chance may explain neither passes nor ends the canary."""
    rule = trial_rule(shadowed(120, every=30, **HARMFUL["citations_valid"]), "citations_valid")
    assert (rule.passed, rule.conclusive, round(rule.observed, 3)) == (False, False, -0.033)


@pytest.mark.parametrize("seed", range(8))
def test_no_false_alarm_at_equal_quality(seed):
    """Two arms that fail as often as each other, looked at after every request, raise no alarm in any quality."""
    rng = np.random.default_rng(seed)
    observations = []
    for number in range(600):
        for arm in ("champion", "shadow"):
            bad = {name: wrong for fault in HARMFUL.values() if rng.random() < 0.1 for name, wrong in fault.items() if name != "outcome"}
            observations.append(answer(number, arm, **bad))
    assert not [rule for rule in rules_of(observations) if not rule.passed and rule.conclusive]


def observe(store, entry, champion, candidate, *, count=200, **wrong) -> None:
    """What a service in shadow mode would have logged while that entry's canary ran."""
    at = datetime.fromisoformat(entry.at)
    rows = [
        replace(
            each, canary=entry.number, snapshot_id=champion if each.arm == "champion" else candidate, at=at + timedelta(milliseconds=number)
        )
        for number, each in enumerate(shadowed(count, **wrong))
    ]
    store.create(f"{PREFIX}/{at:%Y-%m-%d}/{at:%H%M%S.%f}-{entry.number:08x}.parquet", encode(rows, with_text=False))


def name_canary(store, evaluation, champion):
    named = {"snapshot_id": evaluation.snapshot_id, "manifest_sha256": evaluation.manifest_sha256}
    after = Ledger(store).last_number()
    evidence = {"champion": champion.snapshot_id}
    return Ledger(store).append(Action.CANARY, after=after, actor="tester", reason="to try it", evidence=evidence, **named)


def test_the_verdict_rests_on_real_requests(gated):  # noqa: F811
    """A candidate that passes on replayed queries fails when real traffic showed harm, also after its canary was ended; good traffic counts."""
    store, strong, _, larger = gated
    round_of(store, strong)
    judge(store, larger, strong, gate=GATE)
    assert judge_canary(store, larger, strong, gate=GATE, traffic=CANARY).outcome == "PASS"
    entry = name_canary(store, larger, strong)
    few = GATE.model_copy(update={"min_queries": 150})
    assert judge_canary(store, larger, strong, gate=few, traffic=CANARY).outcome == "INCONCLUSIVE"
    observe(store, entry, strong.snapshot_id, larger.snapshot_id)
    verdict = judge_canary(store, larger, strong, gate=few, traffic=CANARY)
    assert (verdict.outcome, "200 real requests show no harm" in verdict.summary) == ("PASS", True)
    abort(store, actor="tester", reason="once more")
    entry = name_canary(store, larger, strong)
    observe(store, entry, strong.snapshot_id, larger.snapshot_id, **HARMFUL["grounded"])
    abort(store, actor="tester", reason="harm")
    verdict = judge_canary(store, larger, strong, gate=GATE, traffic=CANARY)
    assert verdict.outcome == "FAIL"
    assert "grounded: -0.400" in verdict.summary


def test_a_trial_against_an_earlier_champion_says_nothing(gated):  # noqa: F811
    """What a canary did beside another champion is no evidence against the present one."""
    store, strong, weak, larger = gated
    round_of(store, strong)
    observe(store, name_canary(store, larger, weak), weak.snapshot_id, larger.snapshot_id, **HARMFUL["answered"])
    assert trial_of(store, snapshot_id=larger.snapshot_id, champion=strong.snapshot_id, settings=CANARY) is None
    assert trial_of(store, snapshot_id=weak.snapshot_id, champion=strong.snapshot_id, settings=CANARY) is None
    assert harm(store, CANARY, alpha=0.05) is None


def test_the_sensor_ends_a_harmful_canary_once(gated):  # noqa: F811
    """A tick with harm in the log appends an abort with the numbers; the next finds no canary. A harmless one is left alone."""
    store, strong, _, larger = gated
    round_of(store, strong)
    observe(store, name_canary(store, larger, strong), strong.snapshot_id, larger.snapshot_id)
    assert "no canary" in tick(sensors.canary_watch, store, canary=CANARY).skip_message
    abort(store, actor="tester", reason="once more")
    entry = name_canary(store, larger, strong)
    observe(store, entry, strong.snapshot_id, larger.snapshot_id, **HARMFUL["answered"])
    assert "answered: -0.500" in tick(sensors.canary_watch, store, canary=CANARY).skip_message
    ended = Ledger(store).entries()[-1]
    assert (ended.action, ended.evidence["trial"], ended.evidence["requests"]) == (Action.ABORT, entry.number, 200)
    assert ended.evidence["rules"][0]["name"] == "real_answered"
    assert Ledger(store).state().canary is None
    assert "no canary" in tick(sensors.canary_watch, store, canary=CANARY).skip_message
    assert Ledger(store).last_number() == ended.number


def test_people_may_keep_the_last_word(gated):  # noqa: F811
    """Without automatic abort the harm is told once a canary and the ledger is left alone."""
    store, strong, _, larger = gated
    round_of(store, strong)
    entry = name_canary(store, larger, strong)
    observe(store, entry, strong.snapshot_id, larger.snapshot_id, **HARMFUL["in_time"])
    asked = CANARY.model_copy(update={"automatic_abort": False})
    told = tick(sensors.canary_watch, store, canary=asked)
    assert "in time: -0.500" in told.skip_message
    again = tick(sensors.canary_watch, store, canary=asked, cursor=told.cursor)
    assert again.skip_message == "told already"
    assert Ledger(store).last_number() == entry.number


def test_a_decision_about_one_canary_ends_no_other(gated):  # noqa: F811
    """An abort that was decided for a canary that has ended since is refused."""
    store, strong, _, larger = gated
    round_of(store, strong)
    former = name_canary(store, larger, strong)
    abort(store, actor="tester", reason="by hand")
    name_canary(store, larger, strong)
    with pytest.raises(ReleaseConflict):
        abort(store, actor="sensor", reason="late", canary=former.number)
    assert Ledger(store).state().canary


def test_a_bad_canary_is_ended_by_the_traffic_it_saw(tmp_path):
    """A service shadows a canary that knows nothing of what is asked; the sensor reads its log and ends it, and the service closes it."""
    store, settings = LocalStore(tmp_path / "store"), settings_for(tmp_path)
    champion = build(store, settings)
    poor = build(store, settings, {"zoo.Otter": ("Otter", "Otters sleep holding paws.")})
    release(store, champion)
    named = {"snapshot_id": poor.snapshot_id, "manifest_sha256": poor.sha256}
    evidence = {"champion": champion.snapshot_id}
    Ledger(store).append(Action.CANARY, after=1, actor="tester", reason="to try it", evidence=evidence, **named)
    canary = Canary(log_seconds=0.05, shadow_concurrency=8)
    questions = [text for _, text in PAGES.values()]
    with serving(settings.model_copy(update={"canary": canary}), store) as client:
        until(client, "/v1/release", holds=lambda reply: reply.json()["number"] == 2)
        for number in range(2000):
            reply = client.post("/v1/query", json={"query": questions[number % len(questions)]})
            assert (reply.status_code, reply.json()["snapshot_id"]) == (200, champion.snapshot_id)
            if number % 20 == 0 and "entry 3" in tick(sensors.canary_watch, store, canary=canary).skip_message:
                break
        until(client, "/v1/release", holds=lambda reply: reply.json()["number"] == 3)
    ended = Ledger(store).entries()[-1]
    assert (ended.action, ended.actor) == (Action.ABORT, "canary_watch sensor")
    assert {rule["name"] for rule in ended.evidence["rules"]} == {"real_not_abstained"}


def test_real_rules_stand_beside_the_replay():
    """The gate's outcome folds both: a real rule that failed fails it, though the replayed queries were answered equally well."""
    ranks = {f"q{number}": 1.0 for number in range(400)}
    rule = trial_rule(shadowed(100, **HARMFUL["answered"]), "answered")
    result = canary_gate(ranks, ranks, margin=0.02, alpha=0.05, min_queries=300, requests=100, observed=(rule,))
    assert result.outcome == "FAIL"
    thin = canary_gate({}, {}, margin=0.02, alpha=0.05, min_queries=50, requests=100)
    assert thin.outcome == "PASS"


def test_a_canary_without_harm_is_not_aborted(gated):  # noqa: F811
    """Nothing is appended while nothing is shown, whatever the number of looks."""
    store, strong, _, larger = gated
    round_of(store, strong)
    entry = name_canary(store, larger, strong)
    observe(store, entry, strong.snapshot_id, larger.snapshot_id, every=200, **HARMFUL["answered"])
    for _ in range(3):
        assert abort_harmful(store, CANARY, alpha=0.05, actor="tester") is None
    assert Ledger(store).last_number() == entry.number


def test_status_shows_how_the_canary_does(gated):  # noqa: F811
    """The requests it answered and the mean difference of each quality, of the running canary alone."""
    store, strong, _, larger = gated
    round_of(store, strong)
    entry = name_canary(store, larger, strong)
    observe(store, entry, strong.snapshot_id, larger.snapshot_id, count=20, **HARMFUL["grounded"])
    settings = Settings(root=store.root, places=Places(store=store.root))
    shown = describe(settings)["canary"]
    assert (shown["number"], shown["requests"]) == (entry.number, 20)
    assert shown["differences"]["grounded"] == pytest.approx(-0.4)
    assert shown["differences"]["answered"] == 0.0
    console = Console(file=io.StringIO(), width=200)
    print_status(console, describe(settings))
    assert "20 real requests; against the champion: answered +0.000" in console.file.getvalue()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("worse", "better", "harmful"),
    [
        *((worse, better, False) for worse, better in ((0, 0), (0.02, 0), (0.07, 0.05), (0.22, 0.2))),
        *((worse, better, True) for worse, better in ((0.05, 0), (0.1, 0), (0.2, 0.1), (0.2, 0), (0.5, 0), (1, 0))),
    ],
)
def test_how_soon_harm_is_shown(capsys, worse, better, harmful):
    """A loss within the margin ends at most 1 in 50 canaries in 2,000 requests looked at one by one; a larger one ends 49 in 50."""
    rng, stops = np.random.default_rng(0), []
    for _ in range(300):
        drawn = rng.random(2000)
        differences = np.where(drawn < worse, -1.0, np.where(drawn < worse + better, 1.0, 0.0))
        trial = Trial(None, 0, (Signal("answered", tuple(differences)),), {})
        (rule,) = trial.rules(Canary(), alpha=0.05)
        if rule.conclusive and not rule.passed:
            stops.append(int(rule.detail.rpartition("shown after ")[2].partition(" ")[0].replace(",", "")))
    with capsys.disabled():
        print(
            f"\n{worse:.0%} worse, {better:.0%} better: {len(stops) / 300:.3f} ended, after {np.median(stops) if stops else 0:.0f}", end=""
        )
    assert len(stops) / 300 >= 0.98 if harmful else len(stops) / 300 <= 0.02
