"""Verdicts: what was given is what is read, and an edit shows."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from rag_serving.errors import PromotionRefused
from rag_serving.verdicts import GATES, RETRIEVAL_QUALITY, Verdict, passed, read_verdict, trusted_verdict, write_verdict

VERDICT = Verdict(
    gate=RETRIEVAL_QUALITY,
    snapshot_id="hashing-64-0123456789ab",
    manifest_sha256="a" * 64,
    eval_set_sha256="e" * 64,
    champion=None,
    outcome="FAIL",
    summary="FAIL: 0.512 is below the floor of 0.800",
    rules=({"name": "mrr_floor", "passed": False, "observed": 0.512, "required": 0.8}, {"name": "odd", "observed": -math.inf}),
    measured_at="2026-01-01T00:00:00+00:00",
)
KEY = f"verdicts/{VERDICT.snapshot_id}/{RETRIEVAL_QUALITY}.json"


def read(store):
    return read_verdict(store, VERDICT.snapshot_id, RETRIEVAL_QUALITY)


def test_reads_what_was_written(store):
    """Every field comes back, infinite bounds too; before the gate ran there is no verdict."""
    assert read(store) is None
    write_verdict(store, VERDICT)
    assert read(store) == VERDICT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("outcome", "PASS"),
        ("champion", "another-0123456789ab"),
        ("measured_at", "2027-01-01T00:00:00+00:00"),
        ("rules", []),
        ("seal", "0" * 64),
    ],
)
def test_an_edit_is_refused(store, field, value):
    """A verdict of which one field was changed by hand, such as FAIL to PASS, is refused."""
    write_verdict(store, VERDICT)
    store.write(KEY, json.dumps({**json.loads(store.read(KEY)), field: value}).encode())
    with pytest.raises(PromotionRefused, match="was edited") as refusal:
        read(store)
    assert refusal.value.code == "verdict_edited"
    assert trusted_verdict(store, VERDICT.snapshot_id, RETRIEVAL_QUALITY) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b"\xff", b'{"seal": 1, "rules": []}', b'{"seal": 1, "rules": 1}'])
def test_damage_is_refused(store, data):
    """A verdict that is not one is refused, whatever is in the file."""
    store.write(KEY, data)
    with pytest.raises(PromotionRefused, match="cannot be read"):
        read(store)


def test_age(store):
    """Age counts in days and is negative for a verdict from the future."""
    measured = datetime.fromisoformat(VERDICT.measured_at)
    assert VERDICT.age_days(measured + timedelta(hours=36)) == 1.5
    assert VERDICT.age_days(measured - timedelta(days=2)) == -2
    assert VERDICT.age_days(datetime(2026, 1, 2, tzinfo=UTC)) == 1


def test_passed_takes_every_gate_of_this_manifest(store):
    """A snapshot has passed when each gate gave PASS for this very manifest and champion; one missing, failed or edited is enough against it."""
    assert not passed(store, VERDICT.snapshot_id, VERDICT.manifest_sha256, champion=VERDICT.champion)
    for gate in GATES:
        write_verdict(store, replace(VERDICT, gate=gate, outcome="PASS"))
    assert passed(store, VERDICT.snapshot_id, VERDICT.manifest_sha256, champion=VERDICT.champion)
    assert not passed(store, VERDICT.snapshot_id, "b" * 64, champion=VERDICT.champion)
    assert not passed(store, VERDICT.snapshot_id, VERDICT.manifest_sha256, champion="another-0123456789ab")
    for gate in GATES:
        write_verdict(store, replace(VERDICT, gate=gate, outcome="INCONCLUSIVE"))
        assert not passed(store, VERDICT.snapshot_id, VERDICT.manifest_sha256, champion=VERDICT.champion)
        store.write(f"verdicts/{VERDICT.snapshot_id}/{gate}.json", b"broken")
        assert not passed(store, VERDICT.snapshot_id, VERDICT.manifest_sha256, champion=VERDICT.champion)
        write_verdict(store, replace(VERDICT, gate=gate, outcome="PASS"))
