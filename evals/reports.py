"""What a person reads after an evaluation: the leaderboard as a table, Markdown, JSON and a picture. Best MRR first everywhere."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class LeaderboardRow:
    """One embedding model's metrics, as named by `evals.metrics.summarise`; `status` is such as promoted, refused or baseline."""

    embedding_model: str
    metrics: Mapping[str, float]
    snapshot_id: str | None
    status: str
    note: str = ""


def leaderboard_table(rows: Iterable[LeaderboardRow], *, k: int) -> Table:
    """The leaderboard for a terminal of 100 columns or more; the best row is bold, long names wrap, notes come last if there are any."""
    ranked = _best_first(rows, k=k)
    with_notes = any(row.note for row in ranked)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, (name, numeric) in enumerate(_columns(k)):
        table.add_column(name, justify="right" if numeric else "left", no_wrap=position > 0, overflow="fold")
    if with_notes:
        table.add_column("note", overflow="fold")
    for position, row in enumerate(ranked):
        cells = [*_cells(row, k=k), *([row.note] if with_notes else [])]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if position == 0 else None)
    return table


def leaderboard_markdown(rows: Iterable[LeaderboardRow], *, k: int) -> str:
    """The leaderboard as a Markdown table, with the snapshot and the note of each row; the best row is bold."""
    columns = [*_columns(k), ("snapshot", False), ("note", False)]
    lines = [
        _markdown_row([name for name, _ in columns]),
        _markdown_row(["---:" if right else ":---" for _, right in columns]),
    ]
    for position, row in enumerate(_best_first(rows, k=k)):
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in (*_cells(row, k=k), row.snapshot_id or _ABSENT, row.note)]
        lines.append(_markdown_row([f"**{cell}**" if cell and position == 0 else cell for cell in cells]))
    return "\n".join(lines) + "\n"


def leaderboard_json(rows: Iterable[LeaderboardRow], *, k: int = 10) -> list[dict[str, object]]:
    """`[{"embedding_model": ..., "metrics": {...}}]`; a metric that is not finite is left out, as JSON cannot say it."""
    return [
        {
            "embedding_model": row.embedding_model,
            "metrics": {name: float(value) for name, value in row.metrics.items() if math.isfinite(value)},
        }
        for row in _best_first(rows, k=k)
    ]


def mrr_plot(rows: Iterable[LeaderboardRow], path: Path, *, k: int = 10, floor: float | None = None) -> None:
    """Write a picture to `path` (its suffix says the format): a dot and a 95 % interval per model, and the gate's floor as a line.

    Rows without MRR are left out. The same rows give the same pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranked = [row for row in _best_first(rows, k=k) if _value(row, f"mrr_at_{k}") is not None]
    figure = Figure(figsize=(8, 1.3 + 0.45 * max(len(ranked), 1)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spans = [_interval(row, k=k) or (row.metrics[f"mrr_at_{k}"],) * 2 for row in ranked]
    for position, (row, (low, high)) in enumerate(zip(ranked, spans, strict=True)):
        mrr = row.metrics[f"mrr_at_{k}"]
        colour = "#1f5fa8" if floor is None or mrr >= floor else "#8a8f98"
        axes.plot([low, high], [position, position], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(mrr, position, "o", color=colour, markersize=7)
        axes.annotate(
            f"{mrr:.3f}", (1, position), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center",
            color=colour,
        )  # fmt: skip
    if floor is not None:
        axes.axvline(floor, color="#c0392b", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"floor {floor:.2f}", (floor, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
            ha="center", fontsize=9, color="#c0392b",
        )  # fmt: skip
    axes.set_yticks(range(len(ranked)), [f"{row.embedding_model} ({row.status})" for row in ranked])
    axes.set_ylim(max(len(ranked), 1) - 0.4, -0.7)
    lowest = min([left for left, _ in spans] + ([] if floor is None else [floor]), default=0.0)
    axes.set_xlim(max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1)
    axes.set_xlabel(f"MRR@{k}, 95 % interval")
    axes.grid(visible=True, axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)


def _columns(k: int) -> tuple[tuple[str, bool], ...]:
    """Column names, and whether the column is one of numbers."""
    return (
        ("embedding model", False),
        (f"MRR@{k} (95 % interval)", True),
        (f"recall@{k}", True),
        (f"nDCG@{k}", True),
        ("p95 ms", True),
        ("status", False),
    )


def _cells(row: LeaderboardRow, *, k: int) -> tuple[str, ...]:
    mrr = _number(_value(row, f"mrr_at_{k}"), 3)
    interval = _interval(row, k=k)
    if interval is not None:
        mrr += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return (
        row.embedding_model,
        mrr,
        _number(_value(row, f"recall_at_{k}"), 3),
        _number(_value(row, f"ndcg_at_{k}"), 3),
        _number(_value(row, "latency_p95_ms"), 1),
        row.status,
    )


def _best_first(rows: Iterable[LeaderboardRow], *, k: int) -> list[LeaderboardRow]:
    def order(row: LeaderboardRow) -> tuple[float, str]:
        mrr = _value(row, f"mrr_at_{k}")
        return (math.inf if mrr is None else -mrr, row.embedding_model)

    return sorted(rows, key=order)


def _interval(row: LeaderboardRow, *, k: int) -> tuple[float, float] | None:
    low, high = _value(row, f"mrr_at_{k}_low"), _value(row, f"mrr_at_{k}_high")
    return None if low is None or high is None else (low, high)


def _value(row: LeaderboardRow, name: str) -> float | None:
    value = row.metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None, digits: int) -> str:
    return _ABSENT if value is None else f"{value:.{digits}f}"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
