"""Fusion: properties that hold for any signals, whatever the formula's constants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_serving.fusion import DENSE, LEXICAL, TITLE, Ranked, align, effective_weights, fuse_ranks, fuse_scores

SIGNALS = (*DENSE, *LEXICAL)


def ranked(scores):
    """What a signal found, from a score by row."""
    return Ranked(np.array([*scores], dtype=np.int64), np.array([*scores.values()], dtype=np.float64))


def by_rank(signals, weights):
    """Rank fusion of signals that found every candidate, or for BM25 those with a score."""
    rows = np.arange(len(next(iter(signals.values()))))
    found = {
        name: {row: value for row, value in enumerate(values.tolist()) if name in DENSE or value > 0} for name, values in signals.items()
    }
    return fuse_ranks(rows, {name: ranked(scores) for name, scores in found.items()}, weights)


FUSIONS = pytest.mark.parametrize("fuse", [fuse_scores, by_rank])
EXAMPLES = settings(max_examples=60, deadline=None)
cosines = st.floats(-1, 1, width=32)
bm25 = st.one_of(st.just(0.0), st.floats(0.0625, 64, width=32))


@st.composite
def cases(draw):
    """Signals of one query over 1 to 12 candidates, with a weight each."""
    rows = draw(st.integers(1, 12))
    names = draw(st.lists(st.sampled_from(SIGNALS), min_size=1, unique=True))
    signals = {
        name: np.array(draw(st.lists(cosines if name in DENSE else bm25, min_size=rows, max_size=rows)), dtype=np.float64) for name in names
    }
    return signals, {name: draw(st.floats(0.125, 4, width=32)) for name in names}


@FUSIONS
@EXAMPLES
@given(case=cases())
def test_one_finite_score_a_candidate(fuse, case):
    """For any signals there is one finite score a candidate; fusing again gives the same, and the signals are not changed."""
    signals, weights = case
    copies = {name: values.copy() for name, values in signals.items()}
    fused = fuse(signals, weights)
    assert fused.shape == next(iter(signals.values())).shape
    assert np.isfinite(fused).all()
    assert np.array_equal(fused, fuse(signals, weights))
    assert all(np.array_equal(signals[name], copies[name]) for name in copies)


@FUSIONS
@EXAMPLES
@given(case=cases())
def test_dominance(fuse, case):
    """A candidate that is better in every signal is never below the other."""
    signals, weights = case
    fused = fuse(signals, weights)
    matrix = np.stack([signals[name] for name in signals])
    for one in range(matrix.shape[1]):
        for other in range(matrix.shape[1]):
            if (matrix[:, one] > matrix[:, other]).all():
                assert fused[one] >= fused[other] - 1e-12


@EXAMPLES
@given(case=cases(), seed=st.integers(0, 99))
def test_scores_follow_their_candidates(case, seed):
    """Reordering the candidates reorders the fused scores alike, and equal candidates have equal scores."""
    signals, weights = case
    order = np.random.default_rng(seed).permutation(len(next(iter(signals.values()))))
    moved = {name: values[order] for name, values in signals.items()}
    np.testing.assert_array_equal(fuse_scores(moved, weights), fuse_scores(signals, weights)[order])


@EXAMPLES
@given(case=cases())
def test_ranks_ignore_the_scale_of_a_signal(case):
    """Rank fusion sees order alone: doubling a signal changes nothing."""
    signals, weights = case
    doubled = {name: values * 2 for name, values in signals.items()}
    assert np.array_equal(by_rank(doubled, weights), by_rank(signals, weights))


@EXAMPLES
@given(case=cases())
def test_only_ratios_of_weights_order(case):
    """Score fusion with all weights doubled orders the candidates as before."""
    signals, weights = case
    doubled = {name: weight * 2 for name, weight in weights.items()}
    one, two = fuse_scores(signals, weights), fuse_scores(signals, doubled)
    assert np.array_equal(np.argsort(-one, kind="stable"), np.argsort(-two, kind="stable"))


@FUSIONS
@pytest.mark.parametrize("name", LEXICAL)
def test_a_silent_lexical_signal_adds_nothing(fuse, name):
    """When no candidate holds a word of the query, BM25 gives nobody an advantage."""
    signals = {"dense_text": np.array([0.9, 0.5, 0.1]), name: np.zeros(3)}
    assert np.argsort(-fuse(signals, {"dense_text": 1.0, name: 1.0})).tolist() == [0, 1, 2]
    assert np.allclose(fuse({name: np.zeros(3)}, {name: 1.0}), 0)


@FUSIONS
def test_no_candidates(fuse):
    """No candidates give no scores."""
    assert fuse({"bm25_text": np.empty(0)}, {"bm25_text": 1.0}).shape == (0,)


hits = st.dictionaries(st.integers(0, 20), st.floats(0.0625, 1, width=32), max_size=8)


@EXAMPLES
@given(found=st.fixed_dictionaries(dict.fromkeys(SIGNALS, hits)), depth=st.integers(8, 12))
def test_alignment_keeps_every_hit(found, depth):
    """Rows are all hits of all signals, sorted; a hit keeps its score, and one that a signal missed never gets more than its weakest hit."""
    rows, aligned = align({name: ranked(scores) for name, scores in found.items()}, depth=depth)
    assert rows.tolist() == sorted({row for scores in found.values() for row in scores})
    for name, scores in found.items():
        assert aligned[name].shape == rows.shape
        for row, score in zip(rows.tolist(), aligned[name].tolist(), strict=True):
            if row in scores:
                assert score == scores[row]
            else:
                assert 0 <= score <= min(scores.values(), default=0)


def test_alignment_of_an_exhausted_signal():
    """BM25 that found fewer than it was asked for has seen every match: the others score 0. One that was cut off gives them its floor."""
    found = {"dense_text": {1: 0.9, 2: 0.8}, "bm25_text": {1: 7.0, 3: 5.0}}
    found = {name: ranked(scores) for name, scores in found.items()}
    rows, aligned = align(found, depth=3)
    assert (rows.tolist(), aligned["bm25_text"].tolist(), aligned["dense_text"].tolist()) == ([1, 2, 3], [7, 0, 5], [0.9, 0.8, 0.8])
    assert align(found, depth=2)[1]["bm25_text"].tolist() == [7, 5, 5]


def test_weights_of_titles_shrink_with_distinctness():
    """Only title signals shrink, and a signal that counts nothing is not searched."""
    weights = dict.fromkeys(SIGNALS, 2.0)
    assert effective_weights(weights, 1.0) == weights
    assert effective_weights(weights, 0.25) == {name: 0.5 if name in TITLE else 2.0 for name in SIGNALS}
    assert effective_weights({**weights, "dense_text": 0.0}, 0.0) == {"bm25_text": 2.0}


def test_ranks_give_nothing_for_what_a_signal_did_not_find():
    """Reciprocal rank fusion of two lists by hand: 1 / (60 + rank) from each list that holds the row."""
    found = {"dense_text": ranked({5: 0.9, 3: 0.1}), "bm25_text": ranked({8: 4.0})}
    fused = fuse_ranks(np.array([3, 5, 8]), found, {"dense_text": 1.0, "bm25_text": 2.0})
    np.testing.assert_allclose(fused, [1 / 62, 1 / 61, 2 / 61])
