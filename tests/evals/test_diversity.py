"""Diversity of result lists, against hand-made lists and the textbook formula."""

import numpy as np
import pytest
from scipy.stats import skew

from evals.diversity import distinct_documents, hubness, intra_list_similarity


def test_distinct_documents():
    """The mean over lists of the number of documents in each."""
    assert distinct_documents([["a", "a", "b"], ["c"], []]) == pytest.approx(1.0)
    assert distinct_documents([]) == 0.0


def test_similarity_by_hand():
    """Equal passages give 1, orthogonal ones 0; a list of one has no pair and does not count."""
    vectors = {"a": np.array([1.0, 0.0], np.float32), "b": np.array([0.0, 1.0], np.float32), "c": np.array([1.0, 0.0], np.float32)}
    assert intra_list_similarity([["a", "c"]], vectors) == 1.0
    assert intra_list_similarity([["a", "b"], ["a"]], vectors) == 0.0
    assert intra_list_similarity([["a", "b", "c"], ["a", "c"]], vectors) == pytest.approx((1 / 3 + 1) / 2)
    assert intra_list_similarity([["a"], []], vectors) is None


@pytest.mark.parametrize("seed", range(5))
def test_hubness_is_the_skewness_of_occurrences(seed):
    """It equals scipy's skewness of the counts, with the passages that nobody found as zeros."""
    rng = np.random.default_rng(seed)
    lists = [[f"p{each}" for each in rng.choice(60, size=10, replace=False, p=np.arange(1, 61) / 1830)] for _ in range(80)]
    counts = [sum(f"p{number}" in found for found in lists) for number in range(100)]
    assert hubness(lists, passages=100) == pytest.approx(float(skew(counts)))


def test_a_hub_shows():
    """One passage in every list makes the skewness large; passages found equally often have none."""
    fair = [[f"p{number}"] for number in range(100)]
    assert hubness(fair, passages=100) == 0.0
    assert hubness([[*found, "hub"] for found in fair], passages=101) > 5
    assert hubness([], passages=0) == 0.0
    assert hubness([], passages=10) == 0.0
