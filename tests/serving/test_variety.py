"""How varied results are: 1 for passages without a word in common, 0 for one thing said many times, and only the newest hundred count."""

import pytest

from rag_serving.signals.variety import FEWEST, MOST, Results, variety

APART = ["apples oranges", "trains harbours", "violins drums"]


def test_passages_without_a_common_word_are_wholly_varied():
    """The measure is 1 where nothing is repeated, and 0 where every passage has the same words, in whatever order."""
    assert variety(APART) == 1.0
    assert variety(["apples oranges", "oranges apples", "Apples, oranges!"]) == 0.0


def test_half_of_the_words_in_common():
    """Two passages of four words with two in common: 6 different ones of 8, between the least possible half and the whole."""
    assert variety(["one two three four", "three four five six"]) == pytest.approx((6 / 8 - 1 / 2) / (1 - 1 / 2))


def test_a_number_more_does_not_hide_a_copy():
    """Versions of one page that differ by a number are next to no variety."""
    page = " ".join(f"word{number}" for number in range(50))
    assert variety([f"{page} version {number}" for number in range(5)]) < 0.05


@pytest.mark.parametrize("texts", [[], ["alone"], ["words here", "... !"]])
def test_fewer_than_two_passages_with_words_repeat_nothing(texts):
    """There is nothing that one passage could repeat."""
    assert variety(texts) == 1.0


def test_nothing_is_said_of_a_few_results():
    """Before 20 results there is no mean; results of one passage are none."""
    results = Results()
    for number in range(FEWEST - 1):
        results.keep([f"first{number}", f"second{number}"])
    results.keep(["alone"])
    assert results.mean_variety() is None
    results.keep(["apples", "apples"])
    assert results.mean_variety() == pytest.approx((FEWEST - 1) / FEWEST)


def test_the_newest_hundred_results_count():
    """A collapse is the whole of the mean after a hundred results, whatever was before; asked again it is the same."""
    results = Results()
    for number in range(500):
        results.keep([f"first{number}", f"second{number}"])
    assert results.mean_variety() == 1.0
    for number in range(MOST):
        results.keep(["one page", f"one page {number % 7}"])
    assert results.mean_variety() == results.mean_variety()
    assert results.mean_variety() < 0.5
