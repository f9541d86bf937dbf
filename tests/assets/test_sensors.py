"""Sensors ticked as the daemon ticks them: each finding holds once, silence holds, the ledger is shown and told, and errors lose nothing."""

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from pydantic import SecretStr
from test_alerts import direct, webhook  # noqa: F401 - a fixture

from rag_assets import holds, release_log
from rag_assets.defs import sensors
from rag_assets.drift import DETECTORS, DriftFinding, DriftReport, keep_report
from rag_assets.holds import due_rollback, hold_findings, hold_missed_week
from rag_assets.release_log import release_facts, tell
from rag_assets.workbench import Workbench
from rag_serving.errors import PromotionRefused, ReleaseConflict, StoreError
from rag_serving.promotion import hold, lift, promote, rollback
from rag_serving.releases import Action, Ledger
from rag_serving.settings import Drift, Gate, Places, Settings

NOW = datetime.now(UTC).replace(microsecond=0)
FELL = {"mrr": 0.712, "floor": 0.8, "below_floor": 1.0, "mrr_at_release": 0.861}


@pytest.fixture
def live(line):
    """A store with four snapshots of which the first, then the second was released, and the manifests."""
    store, manifests = line
    for manifest in manifests[:2]:
        promote(store, manifest.snapshot_id, gate=Gate(), actor="tester", reason="for a test", override=True)
    return store, manifests


def champion(store) -> str:
    return Ledger(store).state().champion.snapshot_id


def find(
    store, *, kind="mrr_fall", severity="hold", at=NOW, snapshot_id=None, numbers=None, detail="MRR@10 fell to 0.712, floor 0.800"
) -> None:
    """The detector of that kind reports this finding, and nothing else."""
    about = snapshot_id or champion(store)
    finding = DriftFinding(kind, severity, about, detail, FELL if numbers is None else numbers, at.isoformat())
    detector = "evaluation" if kind == "mrr_fall" else "embedding"
    keep_report(store, DriftReport(detector, about, at.isoformat(), "measured", findings=(finding,)))


def held(store) -> list[str]:
    return [entry.reason for entry in Ledger(store).state().holds]


def tick(sensor, store, *, cursor=None, **settings) -> dg.SensorResult:
    bench = Workbench(Settings(root=store.root, **settings), store=store)
    with dg.build_sensor_context(cursor=cursor, resources={"bench": bench}) as context:
        return sensor.evaluate_tick(context)


def test_a_finding_places_one_hold_that_names_its_numbers(live):
    """A fall of MRR is held with its numbers and the proposed rollback; two more ticks, with and without a cursor, add nothing."""
    store, (first, second, *_) = live
    find(store)
    result = tick(sensors.drift_holds, store)
    (reason,) = held(store)
    assert "0.712" in reason
    assert reason.endswith(f"Proposed: `ragline rollback` to {first.snapshot_id}.")
    assert "entry 3" in result.skip_message
    assert Ledger(store).state().holds[0].evidence["finding"]["numbers"] == FELL
    tick(sensors.drift_holds, store, cursor=result.cursor)
    tick(sensors.drift_holds, store)
    assert Ledger(store).last_number() == 3
    assert champion(store) == second.snapshot_id


def test_the_hold_refuses_promotions_with_its_numbers(live):
    """While the sensor's hold stands no promotion passes, also none by override, and the refusal has the numbers."""
    store, (*_, last) = live
    find(store)
    tick(sensors.drift_holds, store)
    with pytest.raises(PromotionRefused, match=r"drift_holds sensor.*0\.712"):
        promote(store, last.snapshot_id, gate=Gate(), actor="tester", reason="please", override=True)


@pytest.mark.parametrize("kind", ["mrr_fall", "fingerprint", "runtime"])
def test_a_warning_holds_nothing(live, kind):
    """Only findings of severity hold become holds."""
    store, _ = live
    find(store, kind=kind, severity="warn")
    tick(sensors.drift_holds, store)
    assert held(store) == []


def test_findings_of_two_kinds_are_two_holds(live):
    """A fall of MRR and a changed fingerprint are held each under its own reason."""
    store, _ = live
    find(store)
    find(store, kind="fingerprint", numbers={"cosine": 0.41}, detail="another model stands behind hashing-64: cosine 0.41")
    tick(sensors.drift_holds, store)
    assert len(held(store)) == 2
    assert any("0.41" in reason and "rollback" not in reason for reason in held(store))


def test_a_finding_about_another_snapshot_holds_nothing(live):
    """What was found about a snapshot that is live no longer does not block."""
    store, (first, *_) = live
    find(store, snapshot_id=first.snapshot_id)
    tick(sensors.drift_holds, store)
    assert held(store) == []


def test_a_lifted_finding_is_not_held_again(live):
    """After a lift the same finding stays lifted, also for a sensor that lost its cursor."""
    store, _ = live
    find(store)
    tick(sensors.drift_holds, store)
    lift(store, actor="tester", reason="the model is fixed")
    tick(sensors.drift_holds, store)
    assert held(store) == []


def test_found_again_after_the_lift_it_is_held_again(live):
    """A new measurement after the lift that finds the same is a new reason to hold."""
    store, _ = live
    find(store, at=NOW - timedelta(hours=1))
    tick(sensors.drift_holds, store)
    lift(store, actor="tester", reason="thought to be fixed")
    find(store, at=NOW + timedelta(hours=1))
    tick(sensors.drift_holds, store)
    assert len(held(store)) == 1
    assert Ledger(store).last_number() == 5


def test_found_again_while_held_it_is_not_held_twice(live):
    """A second measurement under a standing hold adds none, and a lift answers for both."""
    store, _ = live
    find(store, at=NOW - timedelta(hours=2))
    tick(sensors.drift_holds, store)
    find(store, at=NOW - timedelta(hours=1))
    tick(sensors.drift_holds, store)
    assert len(held(store)) == 1
    lift(store, actor="tester", reason="both were looked at")
    tick(sensors.drift_holds, store)
    assert held(store) == []


def test_the_lift_of_another_hold_does_not_answer_a_finding(live):
    """A finding that came while somebody lifted a hold of his own is held all the same."""
    store, _ = live
    hold(store, actor="tester", reason="a holiday")
    find(store, at=NOW - timedelta(hours=1))
    lift(store, actor="tester", reason="back at work")
    tick(sensors.drift_holds, store)
    assert len(held(store)) == 1


def test_many_sensors_at_once_place_one_hold(live):
    """Eight sensors that tick at the same moment place exactly one hold; those that lose say so or find it placed."""
    store, _ = live
    find(store)
    barrier, lost = threading.Barrier(8), []

    def one() -> None:
        barrier.wait()
        try:
            hold_findings(store, actor="drift_holds sensor")
        except ReleaseConflict as error:
            lost.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held(store)) == 1
    assert len(lost) < 8


def test_an_error_leaves_the_first_hold_and_the_next_tick_places_the_rest(live, monkeypatch):
    """A tick that dies between two findings has placed the first whole; the next tick places the second and repeats nothing."""
    store, _ = live
    find(store)
    find(store, kind="runtime", numbers={"cosine": 0.97}, detail="cosine 0.97")
    real, calls = Ledger.append, []

    def dies(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", dies)
        with pytest.raises(OSError, match="No space"):
            hold_findings(store, actor="drift_holds sensor")
    assert len(held(store)) == 1
    tick(sensors.drift_holds, store)
    assert len(held(store)) == 2


def test_a_damaged_report_fails_the_tick_by_name(live):
    """A report that was edited is no evidence: the tick fails and names it, and nothing is held on it."""
    store, _ = live
    find(store)
    key = f"drift/evaluation/{store.names('drift/evaluation')[0]}"
    store.write(key, store.read(key).replace(b"0.712", b"0.999"))
    with pytest.raises(StoreError, match=key):
        hold_findings(store, actor="drift_holds sensor")
    assert held(store) == []


def test_the_rollback_is_only_proposed_by_default(live):
    """Below the floor without automatic_rollback: no run is requested."""
    store, _ = live
    find(store)
    assert not tick(sensors.drift_holds, store).run_requests


def test_an_automatic_rollback_is_requested_under_one_key(live):
    """With automatic_rollback the sensor asks for the rollback job with the previous snapshot, and each further tick under the same key."""
    store, (first, *_) = live
    find(store)
    (request,) = tick(sensors.drift_holds, store, drift=Drift(automatic_rollback=True)).run_requests
    (again,) = tick(sensors.drift_holds, store, drift=Drift(automatic_rollback=True)).run_requests
    assert request.run_key == again.run_key
    config = request.run_config["ops"]["restore_previous"]["config"]
    assert (config["to"], config["champion"], config["actor"]) == (first.snapshot_id, champion(store), "drift_holds sensor")
    assert "0.712" in config["reason"]


def test_the_requested_run_rolls_back_once(live):
    """The rollback job, run with what the sensor asked, makes the previous snapshot live; afterwards no rollback is due."""
    from rag_assets.defs.release import rollback as job

    store, (first, *_) = live
    find(store)
    (request,) = tick(sensors.drift_holds, store, drift=Drift(automatic_rollback=True)).run_requests
    bench = Workbench(Settings(root=store.root), store=store)
    assert job.execute_in_process(run_config=request.run_config, resources={"bench": bench}).success
    assert champion(store) == first.snapshot_id
    assert due_rollback(store) is None
    assert len(held(store)) == 1


def test_what_was_made_live_again_is_not_rolled_back(live):
    """A champion that somebody rolled back and promoted again after the hold was lifted is not rolled back for the old finding."""
    store, (_, second, *_) = live
    find(store)
    hold_findings(store, actor="drift_holds sensor")
    assert due_rollback(store)
    rollback(store, actor="tester", reason="below the floor")
    lift(store, actor="tester", reason="fixed")
    promote(store, second.snapshot_id, gate=Gate(), actor="tester", reason="good again", override=True)
    hold_findings(store, actor="drift_holds sensor")
    assert due_rollback(store) is None


@pytest.mark.parametrize("numbers", [{**FELL, "below_floor": 0.0}, {}])
def test_above_the_floor_no_rollback_is_due(live, numbers):
    """A fall that leaves the champion above the floor holds and proposes nothing."""
    store, _ = live
    find(store, numbers=numbers)
    hold_findings(store, actor="drift_holds sensor")
    assert len(held(store)) == 1
    assert "rollback" not in held(store)[0]
    assert due_rollback(store) is None


def test_a_previous_snapshot_below_the_floor_is_no_way_back(live, monkeypatch):
    """When the earlier release was itself last measured below the floor, the hold says so and no rollback is due."""
    store, _ = live
    monkeypatch.setattr(holds, "released_evaluation", lambda *_: type("Measured", (), {"mrr": 0.69})())
    find(store)
    hold_findings(store, actor="drift_holds sensor")
    assert "no earlier release above the floor" in held(store)[0]
    assert due_rollback(store) is None


def test_a_damaged_measurement_of_the_previous_snapshot_keeps_no_hold_away(live, monkeypatch):
    """What cannot be read of the earlier release only leaves its MRR unknown; the champion is held all the same."""

    def damaged(*_):
        raise StoreError("it was edited.")

    store, _ = live
    monkeypatch.setattr(holds, "released_evaluation", damaged)
    find(store)
    assert len(hold_findings(store, actor="drift_holds sensor")) == 1
    assert due_rollback(store)


def weekly_run(store, at: datetime) -> None:
    for detector in DETECTORS:
        keep_report(store, DriftReport(detector, champion(store), at.isoformat(), "nothing drifted"))


def test_a_missed_week_holds_once(live):
    """Nine days after the last complete weekly run there is one hold that says how many days; further ticks add none."""
    store, _ = live
    weekly_run(store, NOW - timedelta(days=9))
    assert "entry 3" in tick(sensors.missed_week, store).skip_message
    tick(sensors.missed_week, store)
    (reason,) = held(store)
    assert "9.0 days" in reason
    assert "8 are allowed" in reason
    assert Ledger(store).state().holds[0].actor == "missed_week sensor"


@pytest.mark.parametrize("days", [-1, 0, 7, 7.99])
def test_a_recent_run_holds_nothing(live, days):
    """Up to eight days nothing is held; neither is after a clock that went back."""
    store, _ = live
    weekly_run(store, NOW - timedelta(days=days))
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW) is None


def test_weeks_before_the_first_release_do_not_count(live):
    """Reports of long ago that nothing was released are no silence about the release of today."""
    store, _ = live
    for detector in DETECTORS:
        keep_report(store, DriftReport(detector, None, (NOW - timedelta(days=20)).isoformat(), "nothing is released yet."))
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW) is None


def test_a_half_finished_weekly_run_does_not_count(live):
    """One detector that has not reported for nine days is a missed week, whatever the others did yesterday."""
    store, _ = live
    weekly_run(store, NOW - timedelta(days=9))
    keep_report(store, DriftReport("query", champion(store), NOW.isoformat(), "nothing drifted"))
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW)


def test_a_release_that_was_never_watched_is_held_after_eight_days(live):
    """Without any weekly run the first release starts the clock."""
    store, _ = live
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW + timedelta(days=7)) is None
    entry = hold_missed_week(store, actor="missed_week sensor", now=NOW + timedelta(days=9))
    assert "since the first release" in entry.reason


def test_without_a_release_silence_is_no_matter(line):
    """Nothing released: nothing to hold."""
    store, _ = line
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW + timedelta(days=100)) is None
    assert hold_findings(store, actor="drift_holds sensor") == []


def test_after_a_lift_silence_holds_again_a_week_later(live):
    """A lifted silence is left alone for the rest of that week and held again in the next."""
    store, _ = live
    weekly_run(store, NOW - timedelta(days=9))
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW)
    lift(store, actor="tester", reason="the cluster is being moved")
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW + timedelta(days=5)) is None
    assert hold_missed_week(store, actor="missed_week sensor", now=NOW + timedelta(days=7))


def test_the_ledger_is_shown_when_it_grows(live):
    """A tick after new entries materializes release_ledger with what is live and fails its check while something is held; then it is quiet."""
    store, (first, second, *_) = live
    hold(store, actor="alice", reason="rows\n* fell by half <b>")
    result = tick(sensors.releases, store)
    shown, check = result.asset_events
    assert shown.asset_key == dg.AssetKey("release_ledger")
    assert shown.metadata["champion"].value == second.snapshot_id
    assert shown.metadata["previous"].value == first.snapshot_id
    assert "alice" in shown.metadata["holds"].value
    assert "rows \\* fell by half \\<b>" in shown.metadata["holds"].value
    assert (check.check_name, check.passed) == ("no_hold", False)
    assert not tick(sensors.releases, store, cursor=result.cursor).asset_events
    lift(store, actor="bob", reason="they are back")
    shown, check = tick(sensors.releases, store, cursor=result.cursor).asset_events
    assert check.passed
    assert "they are back" in shown.metadata["history"].value


def test_an_empty_ledger_is_shown_in_words(store):
    """Before the first release the facts are words, not gaps."""
    facts = release_facts(store)
    assert (facts["release"], facts["champion"], facts["held"]) == (0, "none", 0)
    assert facts["history"] == "Nothing was released yet."


def test_a_damaged_champion_does_not_hide_the_ledger(live):
    """When the live snapshot's manifest is damaged, what is held is shown all the same, with the damage."""
    store, (_, second, *_) = live
    (store.root / "snapshots" / second.snapshot_id / "MANIFEST.json").write_text("{}")
    facts = release_facts(store)
    assert facts["champion"] == second.snapshot_id
    assert second.snapshot_id in facts["damage"]


def test_a_damaged_evaluation_neither_hides_the_ledger_nor_repeats_alerts(live, monkeypatch):
    """When the champion's evaluation cannot be read, the tick shows the ledger with the damage and moves on, so each entry is told once."""

    def damaged(*_):
        raise StoreError("summary.json was edited.")

    store, _ = live
    monkeypatch.setattr("rag_assets.release_log.released_evaluation", damaged)
    result = tick(sensors.releases, store)
    assert json.loads(result.cursor) == {"shown": 2, "told": 2}
    assert result.asset_events[0].metadata["damage"].value == "summary.json was edited."


def test_the_check_can_be_asked_in_the_ui(live):
    """The no_hold check, run by hand, says the same as the sensor."""
    store, _ = live
    hold(store, actor="alice", reason="a holiday")
    result = sensors.no_hold(Workbench(Settings(root=store.root), store=store))
    assert not result.passed
    assert result.metadata["held_by"].value == "alice (entry 3): a holiday"


def alerting(port: int) -> Places:
    return Places(alert_url=SecretStr(f"http://127.0.0.1:{port}/x"))


def test_each_new_entry_is_told_once(live):
    """The webhook hears of every entry once, in order, with who and why; a hold is critical and has the finding's numbers."""
    store, _ = live
    find(store)
    with webhook() as (port, received):
        cursor = tick(sensors.releases, store, places=alerting(port)).cursor
        hold_findings(store, actor="drift_holds sensor")
        cursor = tick(sensors.releases, store, places=alerting(port), cursor=cursor).cursor
        tick(sensors.releases, store, places=alerting(port), cursor=cursor)
    assert [(body["event"], body["facts"]["entry"]) for body in received] == [("promote", 1), ("promote", 2), ("hold", 3)]
    assert received[2]["severity"] == "critical"
    assert received[2]["facts"]["mrr"] == 0.712
    assert "drift_holds sensor" in received[2]["text"]


def test_an_alert_that_was_not_taken_is_told_at_the_next_tick(live):
    """A webhook that refuses does not fail the tick, does not hide the ledger, and hears of the entry as soon as it takes it."""
    store, _ = live
    with webhook(403) as (port, received):
        result = tick(sensors.releases, store, places=alerting(port))
        assert len(result.asset_events) == 2
        assert json.loads(result.cursor) == {"shown": 2, "told": 0}
        result = tick(sensors.releases, store, places=alerting(port), cursor=result.cursor)
        assert not result.asset_events
        assert json.loads(result.cursor) == {"shown": 2, "told": 2}
    assert [body["facts"]["entry"] for body in received] == [1, 1, 2]


def test_old_entries_are_no_news(live):
    """A sensor without a cursor on an old ledger tells nothing of what is over an hour old."""
    store, _ = live
    with webhook() as (port, received):
        told = tell(Settings(root=store.root, places=alerting(port)), Ledger(store).entries(), told=0, now=NOW + timedelta(hours=2))
    assert (told, received) == (2, [])


def test_old_entries_do_not_hold_up_the_news(live):
    """A hundred old entries are passed over in one call, and the new one behind them is told at once."""
    store, _ = live
    (first, *_) = Ledger(store).entries()
    old = [replace(first, number=number, at=(NOW - timedelta(days=3)).isoformat()) for number in range(1, 101)]
    with webhook() as (port, received):
        news = replace(first, number=101, at=NOW.isoformat())
        assert tell(Settings(root=store.root, places=alerting(port)), [*old, news], told=0, now=NOW) == 101
    assert len(received) == 1


def test_every_action_has_an_alert(live):
    """An alert can be made of each kind of entry."""
    store, _ = live
    (entry, *_) = Ledger(store).entries()
    for action in Action:
        alert = release_log.entry_alert(type(entry)(1, action, "alice", "because", NOW.isoformat()))
        assert (alert.event, alert.facts["actor"]) == (str(action), "alice")


def test_a_failed_rollback_is_told(live):
    """The run failure sensor sends the job's name and what stopped it."""
    from rag_assets.defs.release import rollback as job

    store, _ = live
    config = {"ops": {"restore_previous": {"config": {"reason": "for a test", "to": "no-such-snapshot"}}}}
    with dg.DagsterInstance.ephemeral() as instance, webhook() as (port, received):
        bench = Workbench(Settings(root=store.root, places=alerting(port)), store=store)
        done = job.execute_in_process(run_config=config, resources={"bench": bench}, instance=instance, raise_on_error=False)
        failure = next(event for event in done.all_events if event.event_type is dg.DagsterEventType.RUN_FAILURE)
        context = dg.build_run_status_sensor_context(
            sensor_name="failed_runs",
            dagster_event=failure,
            dagster_instance=instance,
            dagster_run=done.dagster_run,
            resources={"bench": bench},
        ).for_run_failure()
        sensors.failed_runs(context)
    (body,) = received
    assert (body["event"], body["facts"]["job"]) == ("run_failed", "rollback")
    assert "no-such-snapshot is not an earlier release" in body["text"]


def test_sensors_run_from_the_start():
    """All of them are on without a click."""
    watching = (sensors.drift_holds, sensors.missed_week, sensors.releases, sensors.failed_runs)
    assert {sensor.default_status for sensor in watching} == {dg.DefaultSensorStatus.RUNNING}
