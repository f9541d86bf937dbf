"""The warm-up gate: what a snapshot's vector search takes once it is open, told from the noise of the machine."""

import asyncio

import pytest
from small_line import MODEL, passages

from rag_assets.warmup import WINDOW, WarmUp, warm_up, warm_up_gate
from rag_serving.errors import SnapshotError
from rag_serving.snapshots import snapshot_key


def measured(store, manifest, *, limit_ms):
    vectors = MODEL.encode_queries(passages(20))
    return asyncio.run(warm_up(store, manifest.snapshot_id, vectors, limit_ms=limit_ms))


def test_a_warm_snapshot_passes_with_its_numbers(line):
    """An indexed snapshot is opened and searched in windows until two agree; the verdict's rules hold the p95 and its limit."""
    store, (*_, indexed) = line
    found = measured(store, indexed, limit_ms=10_000)
    result = warm_up_gate(found, limit_ms=10_000)
    print(f"opened in {found.opened_seconds:.2f} s; p95 of {WINDOW} searches by window: {[round(each, 2) for each in found.windows]} ms")
    assert 3 <= len(found.windows) <= 40
    assert found.opened_seconds > 0
    assert result.outcome == "PASS"
    assert {rule.name: rule.observed for rule in result.rules}["vector_search_p95"] == found.p95_ms


def test_a_slow_snapshot_fails_after_every_chance(line):
    """One that never gets below the limit is measured in all 40 windows before it fails, and the reason names its milliseconds."""
    store, (first, *_) = line
    found = measured(store, first, limit_ms=1e-9)
    result = warm_up_gate(found, limit_ms=1e-9)
    assert len(found.windows) == 40
    assert result.outcome == "FAIL"
    assert f"{found.p95_ms:.2f} ms" in result.summary


@pytest.mark.parametrize(
    ("windows", "outcome", "p95"),
    [
        ((3.0, 3.1, 3.2), "PASS", 3.1),
        ((80.0, 3.0, 40.0, 3.4), "PASS", 3.4),
        ((1.0, 4.0, 4.1, 90.0), "PASS", 4.1),
        ((12.0, 12.5, 30.0), "FAIL", 12.5),
        ((1.0, 12.0, 12.5), "FAIL", 12.5),
        ((2.0, 4.0, 8.0), "INCONCLUSIVE", 4.0),
        ((8.0, 16.0, 32.0), "INCONCLUSIVE", 16.0),
    ],
)
def test_the_fastest_windows_that_agree_count(windows, outcome, p95):
    """Slow windows of a busy machine and one lucky window are left out; without two that agree nothing is shown."""
    found = WarmUp(0.1, windows)
    assert found.p95_ms == p95
    assert warm_up_gate(found, limit_ms=10.0).outcome == outcome


def test_a_damaged_snapshot_is_not_warmed(line):
    """Opening as serving does means that every byte is verified first."""
    store, (first, *_) = line
    largest = max(store.folder(snapshot_key(first.snapshot_id)).rglob("data/*.lance"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.raises(SnapshotError, match="was altered"):
        measured(store, first, limit_ms=10)
