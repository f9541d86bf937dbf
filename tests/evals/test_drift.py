"""Drift statistics: alarms at their rate when nothing moved, power when something did, and each view sees what it is for."""

import numpy as np
import pytest
from scipy.stats import binom

from evals.drift import CloudShift, cloud_shift, paired_cosine
from evals.significance import EvidenceError

ALPHA = 0.05
TOPICS = 20


def vectors(seed: int, n: int, *, rare: float = 0.0, dims: int = 384) -> np.ndarray:
    """Unit vectors around 20 topics; a share `rare` of them is about a topic of its own."""
    rng = np.random.default_rng(seed)
    topics = np.random.default_rng(7).normal(size=(TOPICS + 1, dims))
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)
    about = np.where(rng.random(n) < rare, TOPICS, rng.integers(0, TOPICS, n))
    rows = topics[about] + rng.normal(size=(n, dims)) / np.sqrt(dims)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def shifts(runs: int, n: int, *, rare: float = 0.0, draws: int = 199) -> list[CloudShift]:
    return [cloud_shift(vectors(2 * run, n), vectors(2 * run + 1, n, rare=rare), draws=draws, seed=run) for run in range(runs)]


def alarms(found: list[CloudShift], view: str) -> int:
    return sum(getattr(shift, view) <= ALPHA for shift in found)


def band(runs: int) -> tuple[float, float]:
    """How many alarms of `runs` lie within 99 % when each has probability ALPHA."""
    return float(binom.ppf(0.005, runs, ALPHA)), float(binom.ppf(0.995, runs, ALPHA))


@pytest.fixture(scope="module")
def null_shifts() -> list[CloudShift]:
    return shifts(400, 60, draws=99)


@pytest.mark.parametrize("view", ["p_mmd", "p_auc"])
def test_null_alarms_at_alpha(null_shifts, view):
    """Over 400 pairs of windows from one distribution the alarm rate lies in the 99 % binomial band of alpha."""
    low, high = band(400)
    assert low <= alarms(null_shifts, view) <= high


def test_unbiased_where_nothing_moved(null_shifts):
    """Without a shift MMD^2 is 0 and the AUC 0.5 on average: neither leans towards an alarm."""
    assert abs(np.mean([shift.mmd for shift in null_shifts])) < 1e-3
    assert np.mean([shift.auc for shift in null_shifts]) == pytest.approx(0.5, abs=0.01)


def test_a_tenth_on_a_new_topic_is_seen():
    """At 500 against 500 vectors, 10 % of them on a new topic, MMD alarms in at least 80 % of the runs."""
    found = shifts(10, 500, rare=0.1)
    assert alarms(found, "p_mmd") >= 8
    assert all(shift.centroid_cosine < 1 for shift in found)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_calibration_at_full_size():
    """400 null runs at 500 against 500 lie in the 99 % band for both views; power is at least 0.8 (MMD) at a 10 % topic shift."""
    null, low_high = shifts(400, 500), band(400)
    shifted = {rare: shifts(60, 500, rare=rare) for rare in (0.05, 0.1, 0.2)}
    for view in ("p_mmd", "p_auc"):
        power = {f"{rare:.0%}": round(alarms(found, view) / 60, 2) for rare, found in shifted.items()}
        print(
            f"{view}: null alarm rate {alarms(null, view) / 400:.4f}, band {low_high[0] / 400:.4f} to {low_high[1] / 400:.4f}; power {power}"
        )
    for view in ("p_mmd", "p_auc"):
        assert low_high[0] <= alarms(null, view) <= low_high[1]
    assert alarms(shifted[0.1], "p_mmd") >= 48


def test_mmd_is_the_formula():
    """The reported MMD^2 is the unbiased estimate written out as sums over pairs, the kernel's width the reference's median distance."""
    left, right = vectors(1, 12, dims=8), vectors(2, 15, dims=8)

    def squared(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(axis=2)

    width = np.median(squared(left, left)[np.triu_indices(12, 1)])
    within = [(np.exp(-squared(x, x) / (2 * width)).sum() - len(x)) / (len(x) * (len(x) - 1)) for x in (left, right)]
    across = np.exp(-squared(left, right) / (2 * width)).mean()
    assert cloud_shift(left, right, draws=10).mmd == pytest.approx(sum(within) - 2 * across)


def test_auc_is_one_for_two_clouds_apart():
    """Windows about different topics are told apart at every held-out vector, at the smallest p-value that the draws allow."""
    left, right = vectors(1, 50), vectors(2, 50, rare=1.0)
    shift = cloud_shift(left, right, draws=99)
    assert shift.auc > 0.97
    assert (shift.p_auc, shift.p_mmd) == (0.01, 0.01)


def test_same_seed_same_answer():
    """A comparison done again gives the same numbers; scaling vectors or their order of axes does not matter."""
    left, right = vectors(1, 40), vectors(2, 50, rare=0.2)
    first = cloud_shift(left, right, draws=50)
    assert cloud_shift(left, right, draws=50) == first
    assert cloud_shift(3 * left[:, ::-1], right[:, ::-1], draws=50).mmd == pytest.approx(first.mmd)
    assert (first.n_reference, first.n_window) == (40, 50)


def test_identical_windows_are_no_drift():
    """A window that is the reference itself, in whole or in half, raises no alarm, and the classifier learns nothing from the twins."""
    same = vectors(1, 60)
    shift = cloud_shift(same, same[::-1], draws=99)
    assert min(shift.p_mmd, shift.p_auc) > 0.3
    assert shift.auc == pytest.approx(0.5, abs=1e-6)
    assert shift.centroid_cosine == pytest.approx(1)
    half = cloud_shift(same, np.concatenate([same[:30], vectors(2, 30)]), draws=99)
    assert min(half.p_mmd, half.p_auc) > ALPHA
    assert half.auc > 0.4


def test_only_the_paired_view_sees_a_rotation():
    """A small rotation of every vector, as another pooling or prompt gives, lowers the paired cosine and leaves both clouds alike."""
    stored = vectors(1, 200)
    turn = np.linalg.qr(np.eye(384) + 0.004 * np.random.default_rng(0).normal(size=(384, 384)))[0]
    turn *= np.sign(np.diag(turn))
    rotated = stored @ turn
    pairs = paired_cosine(stored, rotated)
    assert 0.99 < pairs.mean < 0.999
    assert cloud_shift(stored, vectors(3, 200) @ turn, draws=99).p_mmd > ALPHA


def test_paired_cosine_by_hand():
    """Mean, minimum and share below 0.999 are those of the cosines; lengths do not count."""
    stored = np.eye(4, dtype=np.float32)
    again = np.array([[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 4], [0, 0, 0, 5]], dtype=np.float32)
    pairs = paired_cosine(stored, again)
    assert (pairs.mean, pairs.minimum, pairs.share_below, pairs.n) == (pytest.approx(0.9), pytest.approx(0.6), 0.25, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: paired_cosine(np.eye(3), np.eye(4)),
        lambda: paired_cosine(np.eye(3), np.full((3, 3), np.nan)),
        lambda: paired_cosine(np.zeros((3, 3)), np.eye(3)),
        lambda: paired_cosine(np.empty((0, 3)), np.empty((0, 3))),
        lambda: cloud_shift(vectors(1, 20), vectors(2, 20, dims=64)),
        lambda: cloud_shift(vectors(1, 20), vectors(2, 9)),
    ],
    ids=["rows differ", "not finite", "zero", "nothing", "dims differ", "too few"],
)
def test_unusable_vectors_are_refused(call):
    """What cannot be compared is an error that says what to do, never a number."""
    with pytest.raises(EvidenceError) as raised:
        call()
    assert raised.value.fix
