"""Questions without an answer: reading them, and the threshold tuned with them."""

import numpy as np
import pytest

from evals.collections import EvalSetError, split_of
from evals.negatives import Grade, Negative, auc, encode_negatives, load_negatives, negative_id, tune_threshold
from evals.significance import EvidenceError


def scores(prefix: str, mean: float, *, count: int = 400, seed: int = 1) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {f"{prefix}{number}": float(value) for number, value in enumerate(rng.normal(mean, 0.1, count))}


def graded(grade: Grade, mean: float, **options) -> dict[str, tuple[Grade, float]]:
    return {query_id: (grade, score) for query_id, score in scores(grade.value, mean, **options).items()}


def test_what_is_written_is_read_back(tmp_path):
    """Negatives survive a round trip with text, grade and id; a folder without the file has none."""
    assert load_negatives(tmp_path) == ()
    negatives = (Negative("a", "Wo ist das Café?", Grade.OFF_DOMAIN), Negative(negative_id("x y"), "x y", Grade.NEAR_MISS))
    (tmp_path / "negatives.jsonl").write_bytes(encode_negatives(negatives))
    assert load_negatives(tmp_path) == negatives


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"_id": "a"}', "line 1"),
        ('{"_id": "a", "text": " "}', "line 1"),
        ('{"_id": "a", "text": "x", "metadata": {"grade": "odd"}}', "near_miss"),
        ('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}', "'a' stands twice"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, named):
    """A row without text or with an unknown grade, or an id used twice, is an EvalSetError that says where and what is valid."""
    (tmp_path / "negatives.jsonl").write_text(line)
    with pytest.raises(EvalSetError, match=named):
        load_negatives(tmp_path)


def test_auc_is_the_share_of_pairs_in_order():
    """AUC equals the share of (answerable, negative) pairs in the right order, ties counted half, by counting them one by one."""
    rng = np.random.default_rng(5)
    answerable, negative = rng.integers(0, 9, 40).tolist(), rng.integers(0, 9, 30).tolist()
    pairs = [(a > n) + (a == n) / 2 for a in answerable for n in negative]
    assert auc(answerable, negative) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    with pytest.raises(EvidenceError):
        auc([], [1.0])


def test_the_threshold_separates_topics_and_is_reported_on_the_other_half():
    """The threshold lies between answerable queries at 0.6 and left-out ones at 0.3, and its rates are those of the held-out halves."""
    answerable, negatives = scores("q", 0.6), graded(Grade.LEFT_OUT, 0.3)
    found = tune_threshold(answerable, negatives)
    assert 0.40 < found.threshold < 0.50
    heldout = [score < found.threshold for query_id, score in answerable.items() if split_of(query_id) == "heldout"]
    assert found.false_refusals == pytest.approx(sum(heldout) / len(heldout))
    assert found.auc["left_out"] > 0.97
    assert found.caught["left_out"] > 0.85
    assert found.queries == {"answerable": 400, "left_out": 400}


def test_near_misses_do_not_move_the_threshold():
    """A threshold is tuned with left-out queries where there are any; near misses are reported, with their low AUC, and change nothing."""
    answerable, left_out = scores("q", 0.6), graded(Grade.LEFT_OUT, 0.3)
    near = graded(Grade.NEAR_MISS, 0.58, seed=3)
    alone, together = tune_threshold(answerable, left_out), tune_threshold(answerable, left_out | near)
    assert together.threshold == alone.threshold
    assert together.auc["near_miss"] < 0.7 < together.auc["left_out"]
    assert tune_threshold(answerable, near).threshold != alone.threshold


@pytest.mark.parametrize("negatives", [{}, {"n": (Grade.LEFT_OUT, 0.1)}, {f"n{i}": (Grade.LEFT_OUT, float("nan")) for i in range(9)}])
def test_too_little_evidence_is_an_error(negatives):
    """No negatives, none in one half, or a score that is not finite: an EvidenceError, never a threshold."""
    with pytest.raises(EvidenceError):
        tune_threshold(scores("q", 0.6), negatives)
