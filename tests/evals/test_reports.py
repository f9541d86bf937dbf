"""The leaderboard as a table, Markdown and JSON."""

import io
import json

from board_rows import FULL, ROWS, row
from rich.console import Console

from evals.reports import leaderboard_json, leaderboard_markdown, leaderboard_table


def _printed(table, *, styled=False, width=100):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(table)
    return console.export_text(styles=styled)


def test_table_fits_100_columns_best_first():
    """At 100 columns no cell is cut, the best model stands first and is the only bold one, what is missing is a dash."""
    text = _printed(leaderboard_table(ROWS, k=10))
    body = [line.split() for line in text.splitlines() if any(row.embedding_model in line for row in ROWS)]
    assert [line[0] for line in body] == ["multilingual-e5-small", "BM25", "wordllama-256", "unmeasured"]
    assert body[0][1:] == ["0.860", "(0.845", "to", "0.875)", "0.950", "0.880", "3.1", "/", "14.2", "champion"]
    assert body[1][1:] == ["0.790", "-", "-", "-", "baseline"]
    assert body[3][1:] == ["-", "-", "-", "-", "failed"]
    assert "…" not in text
    bold = [line for line in _printed(leaderboard_table(ROWS, k=10), styled=True).splitlines() if "0.8" in line or "0.7" in line]
    assert ["\x1b[1m" in line for line in bold] == [True, False, False]


def test_a_long_name_wraps_and_cuts_nothing():
    """A name too long for the terminal takes a second line; numbers and status stay whole."""
    name = "a-model-with-a-name-that-is-longer-than-most-instruct-v2"
    lines = _printed(leaderboard_table([row(name, 0.9, "promoted")], k=10)).splitlines()
    first, second = (line for line in lines if line.strip() and line.split()[0] in name)
    assert first.split()[0] + second.split()[0] == name
    assert first.split()[1:] == ["0.900", "(0.885", "to", "0.915)", "0.950", "0.880", "3.1", "/", "14.2", "promoted"]


def test_table_shows_notes_and_leaves_brackets_alone():
    """Notes get a column when there are any; text in square brackets is text, not markup."""
    text = _printed(leaderboard_table([row("m[bold]", 0.9, "refused", note="[red] too slow")], k=10))
    assert "m[bold]" in text
    assert "[red] too" in text
    assert "note" not in _printed(leaderboard_table(ROWS, k=10))


def test_markdown_is_one_well_formed_table():
    """Every line has the same cells, pipes inside are escaped, the best row is bold."""
    text = leaderboard_markdown([*ROWS, row("pi|pe", 0.5, "refused", note="two\nlines")], k=10)
    lines = text.splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert lines[2].startswith("| **multilingual-e5-small** | **0.860 (0.845 to 0.875)** |")
    assert "| pi\\|pe | 0.500" in text
    assert "two lines" in text
    assert "nan" not in text


def test_json_says_model_and_metrics():
    """The JSON has one object a model, best first, and holds finite numbers only."""
    board = leaderboard_json(ROWS)
    assert json.loads(json.dumps(board, allow_nan=False)) == board
    assert board[0]["embedding_model"] == "multilingual-e5-small"
    assert board[1] == {"embedding_model": "BM25", "metrics": {"mrr_at_10": 0.79}}
    assert all(set(entry) == {"embedding_model", "metrics"} for entry in board)


def test_json_says_differences_and_costs_where_they_are_known():
    """A row with a difference or a cost carries it with its unit's name; the others carry no empty ones."""
    board = {entry["embedding_model"]: entry for entry in leaderboard_json(FULL)}
    assert board["wordllama-256"]["contrast"]["verdict"] == "worse"
    assert board["wordllama-256"]["cost"] == {"chunks_per_second": 1234.4, "cpu_seconds": 0.81, "index_mb": 104.26, "mb_per_thousand": 1.5}
    assert "contrast" not in board["multilingual-e5-small"]
    assert set(board["BM25"]) == {"embedding_model", "metrics"}


def test_differences_and_costs_fit_120_columns():
    """At 120 columns a row with everything stands in one line, whole: difference with its p, speed, size and status."""
    text = _printed(leaderboard_table(FULL, k=10), width=120)
    (line,) = [line for line in text.splitlines() if "0.742" in line]
    assert line.split() == [
        *("wordllama-256", "0.742", "(0.727", "to", "0.757)", "-0.118", "(<0.001)", "0.950", "0.880", "3.1", "/", "14.2", "1,234", "104.3"),
        "inconclusive",
    ]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "…" not in text
    (champion,) = [line.split() for line in text.splitlines() if "0.860" in line]
    assert champion[5] == "-"


def test_markdown_has_every_column():
    """In Markdown the verdict in words and what a thousand chunks cost are columns too; what is not known is a dash."""
    header, _, best, *others = leaderboard_markdown(FULL, k=10).splitlines()
    for column in ("difference (p)", "against the champion", "chunks/s", "CPU-s / 1,000 chunks", "index MB", "MB / 1,000 chunks"):
        assert f"| {column} |" in header
    assert best.startswith("| **multilingual-e5-small** |")
    (long,) = [line for line in others if "a-rather-long-model-name" in line]
    assert "| -0.002 (0.734) | no difference seen |" in long
    assert "| - | - | 80.0 | 1.25 |" in long
