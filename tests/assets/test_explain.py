"""What a person reads about the ledger: why an entry stands, what a release stands on, and what retention did."""

import io
import json
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console
from small_line import GATE, days_ago, pass_and_promote, pass_gates, verdict_of

from rag_assets.explain import explain, print_explanation, rules_markdown
from rag_assets.retention import plan
from rag_assets.status import describe, print_status
from rag_assets.terminal import print_collection, releases_table
from rag_serving.errors import ReleaseError
from rag_serving.promotion import abort, hold, pin, promote, rollback, start_canary
from rag_serving.releases import Ledger
from rag_serving.settings import Places, Retention, Settings
from rag_serving.snapshots import snapshot_key
from rag_serving.verdicts import GATES, RETRIEVAL_QUALITY, write_verdict


def shown(print_it) -> str:
    console = Console(width=200, file=io.StringIO())
    print_it(console)
    return console.file.getvalue()


def status_of(store) -> dict:
    return describe(Settings(root=store.root, places=Places(store=store.root)))


def test_a_promotion_is_explained_with_every_gate(line):
    """Who, when, after what, and each gate's rules with their numbers, as the entry recorded them; JSON can say all of it."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    pass_and_promote(store, second, reason="MRR 0.9")
    write_verdict(store, verdict_of(store, second, outcome="FAIL", summary="FAIL: measured later"))
    facts = explain(store, 2)
    assert (facts["entry"]["actor"], facts["entry"]["reason"], facts["followed"]) == ("tester", "MRR 0.9", first.snapshot_id)
    assert [(verdict["gate"], verdict["outcome"]) for verdict in facts["verdicts"]] == [(gate, "PASS") for gate in GATES]
    assert facts["snapshot"]["rows"] == second.rows
    assert json.loads(json.dumps(facts))["evidence"] == {"override": False, "allow_shrink": False}
    text = shown(lambda console: print_explanation(console, facts))
    for said in ("Entry 2: promote", "by tester", "mrr_floor", "0.9", "0.8", f"compared with {first.snapshot_id}"):
        assert said in text


def test_a_hold_is_explained_with_its_findings(line):
    """The findings that a detector gave stand in the explanation with their numbers."""
    store, _ = line
    found = {"findings": [{"kind": "mrr_fall", "detail": "MRR fell from 0.90 to 0.85", "numbers": {"mrr": 0.85}}]}
    hold(store, actor="drift sensor", reason="MRR fell", evidence=found)
    facts = explain(store, 1)
    assert facts["evidence"] == found
    text = shown(lambda console: print_explanation(console, facts))
    assert "drift sensor" in text
    assert "MRR fell from 0.90 to 0.85" in text


def test_an_ended_canary_is_explained(line):
    """The canary's entry has the verdicts that it rested on, the abort's the snapshot and what spoke against it."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    pass_gates(store, second)
    start_canary(store, second.snapshot_id, gate=GATE, actor="tester", reason="a share first")
    abort(store, actor="tester", reason="it lost", evidence={"likelihood_ratio": 31.0})
    assert [verdict["gate"] for verdict in explain(store, 2)["verdicts"]] == list(GATES[:2])
    facts = explain(store, 3)
    assert (facts["verdicts"], facts["evidence"]) == ([], {"canary": second.snapshot_id, "likelihood_ratio": 31.0})
    assert second.snapshot_id in shown(lambda console: print_explanation(console, facts))


def test_a_rollback_and_a_lost_snapshot_are_explained(line):
    """A rollback says from where it came; a snapshot that is gone is named as such, and the rest is told."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    pass_and_promote(store, second)
    rollback(store, actor="tester", reason="bad answers")
    assert explain(store, 3)["evidence"] == {"from": second.snapshot_id}
    store.remove(snapshot_key(second.snapshot_id))
    facts = explain(store, 2)
    assert "there is no snapshot" in facts["snapshot"]["problem"]
    assert "there is no snapshot" in shown(lambda console: print_explanation(console, facts))


@pytest.mark.parametrize("number", [0, 2, -1])
def test_an_entry_that_is_not_there(line, number):
    """A number outside the ledger is an error that says which there are."""
    store, _ = line
    hold(store, actor="tester", reason="drift")
    with pytest.raises(ReleaseError, match=f"no entry {number}.* from 1 to 1"):
        explain(store, number)


def test_rules_as_markdown():
    """A rule is a row: passed, failed, or open when more evidence could still pass it."""
    rules = [
        {"name": "mrr_floor", "passed": False, "conclusive": True, "observed": 0.512, "required": 0.8, "detail": "below | the floor"},
        {"name": "enough_queries", "passed": False, "conclusive": False, "observed": 1344.0, "required": 3000.0, "detail": "few"},
        {"name": "ann_recall", "passed": True, "conclusive": True, "observed": 0.99, "required": 0.95, "detail": "finds"},
    ]
    rows = rules_markdown(rules).splitlines()[2:]
    assert rows[0] == r"| mrr_floor | failed | 0.512 | 0.8 | below \| the floor |"
    assert rows[1] == "| enough_queries | open | 1,344 | 3,000 | few |"
    assert "passed" in rows[2]


def test_status_tells_what_the_release_stands_on(line):
    """Verdicts with their ages for a release by the gates; for an override, until when, and after that that it expired."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    pass_gates(store, first, champion=None, measured_at=days_ago(2))
    facts = status_of(store)
    assert facts["champion"]["override"] is None
    assert facts["champion"]["verdicts"].keys() == set(GATES)
    assert "retrieval quality: PASS, 2.0 days old" in shown(lambda console: print_status(console, facts))
    late = datetime.now(UTC) - timedelta(hours=25)
    promote(store, second.snapshot_id, gate=GATE, actor="ana", reason="incident", override=True, now=late)
    facts = status_of(store)
    assert facts["champion"]["override"]["expired"] is True
    assert "an override that expired at" in shown(lambda console: print_status(console, facts))
    table = shown(lambda console: console.print(releases_table(store, Ledger(store).entries())))
    assert "override, expired" in table
    assert "2 *" in table
    pass_gates(store, second, champion=first.snapshot_id)
    assert status_of(store)["champion"]["override"] is None
    assert "expired" not in shown(lambda console: console.print(releases_table(store, Ledger(store).entries())))


def test_status_tells_canary_holds_and_pins(line):
    """What is tried, what is held and by whom, and what is pinned stand in the status."""
    store, (first, second, *_) = line
    pass_and_promote(store, first)
    pass_gates(store, second)
    start_canary(store, second.snapshot_id, gate=GATE, actor="ana", reason="try it")
    hold(store, actor="bo", reason="drift [kind]")
    pin(store, first.snapshot_id, actor="ana", reason="audit")
    text = shown(lambda console: print_status(console, status_of(store)))
    for said in (f"canary: {second.snapshot_id} since entry 2", "held by bo", "drift [kind]", f"pinned: {first.snapshot_id}"):
        assert said in text


def test_a_collection_says_what_and_why(line):
    """Each snapshot with the reason for which it stays or goes; a dry run speaks of what would go."""
    store, (first, *_) = line
    pass_and_promote(store, first)
    decided = plan(store, Retention(keep=1))
    text = shown(lambda console: print_collection(console, decided, dry_run=True))
    assert f"stays  {first.snapshot_id}  live" in text
    assert text.count("would go") == len(decided.garbage) == 2
    assert RETRIEVAL_QUALITY not in text
