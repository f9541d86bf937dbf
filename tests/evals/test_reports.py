"""The leaderboard in its four forms."""

import io
import json
import math

import pytest
from rich.console import Console

from evals.reports import LeaderboardRow, leaderboard_json, leaderboard_markdown, leaderboard_table, mrr_plot


def _row(model, mrr, status, **more):
    metrics = {"mrr_at_10": mrr, "mrr_at_10_low": mrr - 0.015, "mrr_at_10_high": mrr + 0.015, "recall_at_10": 0.95, "ndcg_at_10": 0.88}
    return LeaderboardRow(model, metrics | {"latency_p95_ms": 14.23}, "snapshot-0123456789ab", status, **more)


_ROWS = [
    _row("wordllama-256", 0.742, "refused"),
    LeaderboardRow("bm25-only", {"mrr_at_10": 0.79, "recall_at_10": math.nan}, None, "baseline"),
    _row("multilingual-e5-small", 0.860, "promoted"),
    LeaderboardRow("unmeasured", {}, None, "failed"),
]


def _printed(table, *, styled=False):
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    console.print(table)
    return console.export_text(styles=styled)


def test_table_fits_100_columns_best_first():
    """At 100 columns no cell is cut, the best model stands first and is the only bold one, what is missing is a dash."""
    text = _printed(leaderboard_table(_ROWS, k=10))
    body = [line.split() for line in text.splitlines() if any(row.embedding_model in line for row in _ROWS)]
    assert [line[0] for line in body] == ["multilingual-e5-small", "bm25-only", "wordllama-256", "unmeasured"]
    assert body[0][1:] == ["0.860", "(0.845", "to", "0.875)", "0.950", "0.880", "14.2", "promoted"]
    assert body[1][1:] == ["0.790", "-", "-", "-", "baseline"]
    assert body[3][1:] == ["-", "-", "-", "-", "failed"]
    assert "…" not in text
    bold = [line for line in _printed(leaderboard_table(_ROWS, k=10), styled=True).splitlines() if "0.8" in line or "0.7" in line]
    assert ["\x1b[1m" in line for line in bold] == [True, False, False]


def test_a_long_name_wraps_and_cuts_nothing():
    """A name too long for the terminal takes a second line; numbers and status stay whole."""
    name = "a-model-with-a-name-that-is-longer-than-most-instruct-v2"
    lines = _printed(leaderboard_table([_row(name, 0.9, "promoted")], k=10)).splitlines()
    first, second = (line for line in lines if line.strip() and line.split()[0] in name)
    assert first.split()[0] + second.split()[0] == name
    assert first.split()[1:] == ["0.900", "(0.885", "to", "0.915)", "0.950", "0.880", "14.2", "promoted"]


def test_table_shows_notes_and_leaves_brackets_alone():
    """Notes get a column when there are any; text in square brackets is text, not markup."""
    text = _printed(leaderboard_table([_row("m[bold]", 0.9, "refused", note="[red] too slow")], k=10))
    assert "m[bold]" in text
    assert "[red] too" in text
    assert "note" not in _printed(leaderboard_table(_ROWS, k=10))


def test_markdown_is_one_well_formed_table():
    """Every line has the same cells, pipes inside are escaped, the best row is bold."""
    text = leaderboard_markdown([*_ROWS, _row("pi|pe", 0.5, "refused", note="two\nlines")], k=10)
    lines = text.splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert lines[2].startswith("| **multilingual-e5-small** | **0.860 (0.845 to 0.875)** |")
    assert "| pi\\|pe | 0.500" in text
    assert "two lines" in text
    assert "nan" not in text


def test_json_says_model_and_metrics():
    """The JSON has one object a model, best first, and holds finite numbers only."""
    board = leaderboard_json(_ROWS)
    assert json.loads(json.dumps(board, allow_nan=False)) == board
    assert board[0]["embedding_model"] == "multilingual-e5-small"
    assert board[1] == {"embedding_model": "bm25-only", "metrics": {"mrr_at_10": 0.79}}
    assert all(set(entry) == {"embedding_model", "metrics"} for entry in board)


@pytest.mark.parametrize("rows", [_ROWS, [], _ROWS[3:]])
def test_plot_is_a_picture(tmp_path, rows):
    """A PNG is written for any leaderboard, also an empty one, and is the same for the same rows."""
    for name in ("one.png", "two.png"):
        mrr_plot(rows, tmp_path / name, floor=0.8)
    first, second = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert first.startswith(b"\x89PNG")
    assert first == second


def test_plot_says_what_it_shows(tmp_path):
    """The picture names each measured model with its status and value, and the floor; without a floor there is none."""
    mrr_plot(_ROWS, tmp_path / "with.svg", floor=0.8)
    mrr_plot(_ROWS, tmp_path / "without.svg")
    drawn, plain = ((tmp_path / name).read_text(encoding="utf-8") for name in ("with.svg", "without.svg"))
    for text in ("wordllama-256 (refused)", "0.742", "bm25-only (baseline)", "floor 0.80", "MRR@10"):
        assert f"<!-- {text}" in drawn
    assert "unmeasured" not in drawn
    assert "floor" not in plain
