"""The pictures: that they are drawn from any rows, say what they show, and are the same for the same rows."""

import io

import pytest
from board_rows import ROWS, row

from evals.metrics import Aggregate
from evals.plots import difference_plot, mrr_plot, png, quality_latency_plot, slice_plot
from evals.reports import LeaderboardRow


def drawn(figure) -> str:
    """The SVG, in which every label stands as a comment."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


@pytest.mark.parametrize("rows", [ROWS, [], ROWS[3:]], ids=["rows", "none", "unmeasured"])
@pytest.mark.parametrize("plot", [mrr_plot, quality_latency_plot])
def test_plot_is_a_picture(plot, rows):
    """A PNG is drawn for any leaderboard, also an empty one, and is the same for the same rows."""
    first, second = (png(plot(rows, floor=0.8)) for _ in range(2))
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_plot_says_what_it_shows():
    """The picture names each measured model with its status and value, and the floor; without a floor there is none."""
    with_floor, plain = drawn(mrr_plot(ROWS, floor=0.8)), drawn(mrr_plot(ROWS))
    for text in ("wordllama-256 (refused)", "0.742", "BM25 (baseline)", "floor 0.80", "MRR@10"):
        assert f"<!-- {text}" in with_floor
    assert "unmeasured" not in with_floor
    assert "floor" not in plain


def test_quality_is_drawn_against_latency_on_a_log_axis():
    """Time is on a log axis with plain numbers; the champion is marked; a model without times or without MRR is not there."""
    untimed = LeaderboardRow("untimed", {"mrr_at_10": 0.5}, "s", "refused")
    figure = quality_latency_plot([*ROWS, untimed], champion="snapshot-of-multilingual-e5-small", floor=0.8)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 3.1
    assert high > 14.23
    text = drawn(figure)
    assert "<!-- multilingual-e5-small (champion)" in text
    assert "<!-- 5 " in text
    for absent in ("untimed", "unmeasured", "10^"):
        assert absent not in text
    middle = next(line for line in axes.lines if line.get_marker() == "*")
    assert (middle.get_xdata()[0], middle.get_ydata()[0]) == (3.1, 0.86)


def test_differences_are_counted_by_side():
    """The picture says how many queries lost, won and did not move, and the mean; without a single query it is still a picture."""
    text = drawn(difference_plot([-1.0, -0.5, 0.0, 0.0, 0.5], candidate="new", champion="old"))
    for said in ("2 worse", "1 better", "mean -0.2000; 2 of 5 queries did not move", "reciprocal rank@10: new minus old"):
        assert f"<!-- {said}" in text
    assert png(difference_plot([], candidate="new", champion="old")).startswith(b"\x89PNG")


def test_slices_are_named_with_their_size():
    """Each slice stands in the order given, with how many queries it has."""
    text = drawn(slice_plot({"kind=error": Aggregate(0.4, 0.3, 0.5, 1200), "words=1-5": Aggregate(0.9, 0.8, 1.0, 30)}))
    assert text.index("<!-- kind=error (1,200)") < text.index("<!-- words=1-5 (30)")


def test_a_row_needs_no_interval():
    """A model whose interval is not known is drawn as a dot."""
    assert png(quality_latency_plot([row("m", 0.9, "best")])).startswith(b"\x89PNG")
