"""Pictures of evaluations, as matplotlib figures: `figure.savefig(path)` keeps one. The same rows give the same pixels."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from evals.metrics import Aggregate
from evals.reports import LeaderboardRow, best_first, interval_of, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _GREY, _RED, _GREEN = "#1f5fa8", "#8a8f98", "#c0392b", "#2a7d4f"


def mrr_plot(rows: Iterable[LeaderboardRow], *, k: int = 10, floor: float | None = None) -> "Figure":
    """A dot and a 95 % interval per model, and the gate's floor as a line. Rows without MRR are left out."""
    ranked = [row for row in best_first(rows, k=k) if value_of(row, f"mrr_at_{k}") is not None]
    figure, axes = _figure(height=1.3 + 0.45 * max(len(ranked), 1))
    spans = [interval_of(row, k=k) or (row.metrics[f"mrr_at_{k}"],) * 2 for row in ranked]
    for position, (row, (low, high)) in enumerate(zip(ranked, spans, strict=True)):
        mrr = row.metrics[f"mrr_at_{k}"]
        colour = _BLUE if floor is None or mrr >= floor else _GREY
        axes.plot([low, high], [position, position], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(mrr, position, "o", color=colour, markersize=7)
        axes.annotate(
            f"{mrr:.3f}", (1, position), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center",
            color=colour,
        )  # fmt: skip
    if floor is not None:
        axes.axvline(floor, color=_RED, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"floor {floor:.2f}", (floor, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
            ha="center", fontsize=9, color=_RED,
        )  # fmt: skip
    axes.set_yticks(range(len(ranked)), [f"{row.embedding_model} ({row.status})" for row in ranked])
    axes.set_ylim(max(len(ranked), 1) - 0.4, -0.7)
    lowest = min([left for left, _ in spans] + ([] if floor is None else [floor]), default=0.0)
    axes.set_xlim(max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1)
    axes.set_xlabel(f"MRR@{k}, 95 % interval")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x", color="#e3e6ea", linewidth=0.8)
    return figure


def quality_latency_plot(
    rows: Iterable[LeaderboardRow], *, k: int = 10, champion: str | None = None, floor: float | None = None
) -> "Figure":
    """Quality against latency: MRR with its 95 % interval over the time of a retrieval, from p50 (the mark) to p95, on a log axis.

    `champion` is the snapshot id that gets a star. Rows without MRR or without timed queries are left out.
    """
    shown = [
        row
        for row in best_first(rows, k=k)
        if value_of(row, f"mrr_at_{k}") is not None and (value_of(row, "latency_p50_ms") or 0) > 0 and value_of(row, "latency_p95_ms")
    ]
    figure, axes = _figure(height=4.6)
    for row in shown:
        mrr, p50, p95 = (row.metrics[name] for name in (f"mrr_at_{k}", "latency_p50_ms", "latency_p95_ms"))
        low, high = interval_of(row, k=k) or (mrr, mrr)
        live = champion is not None and row.snapshot_id == champion
        colour = _GREEN if live else _GREY if row.snapshot_id is None else _BLUE
        axes.plot([p50, p95], [mrr, mrr], color=colour, linewidth=1.4)
        axes.plot([p50, p50], [low, high], color=colour, linewidth=1.4)
        axes.plot(p95, mrr, "|", color=colour, markersize=9)
        axes.plot(p50, mrr, "*" if live else "o", color=colour, markersize=15 if live else 8)
        axes.annotate(
            f"{row.embedding_model} (champion)" if live else row.embedding_model,
            (p50, mrr), xytext=(8, 7), textcoords="offset points", fontsize=9, color=colour,
        )  # fmt: skip
    if floor is not None:
        axes.axhline(floor, color=_RED, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"floor {floor:.2f}", (1, floor), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
            ha="right", fontsize=9, color=_RED,
        )  # fmt: skip
    if shown:
        _latency_axis(axes, [row.metrics[name] for row in shown for name in ("latency_p50_ms", "latency_p95_ms")])
    axes.set_xlabel("time of a retrieval in ms, p50 to p95 (log scale)")
    axes.set_ylabel(f"MRR@{k}, 95 % interval")
    axes.grid(visible=True, color="#e3e6ea", linewidth=0.8)
    return figure


def difference_plot(differences: Sequence[float], *, k: int = 10, candidate: str, champion: str) -> "Figure":
    """How far each query moved: reciprocal rank of the candidate minus that of the champion. Queries that did not move are counted in words."""
    moved = [difference for difference in differences if difference]
    figure, axes = _figure(height=3.6)
    edges = [edge / 10 - 1 for edge in range(21)]
    losses = [difference for difference in moved if difference < 0]
    gains = [difference for difference in moved if difference > 0]
    axes.hist([losses, gains], bins=edges, stacked=True, color=[_RED, _GREEN], label=[f"{len(losses):,} worse", f"{len(gains):,} better"])
    axes.axvline(0, color=_GREY, linewidth=1)
    axes.set_xlim(-1, 1)
    axes.set_xlabel(f"reciprocal rank@{k}: {candidate} minus {champion}")
    axes.set_ylabel("queries")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2)
    mean = math.fsum(differences) / len(differences) if differences else 0.0
    axes.set_title(
        f"mean {mean:+.4f}; {len(differences) - len(moved):,} of {len(differences):,} queries did not move", fontsize=10, loc="right"
    )
    axes.grid(visible=True, axis="y", color="#e3e6ea", linewidth=0.8)
    return figure


def slice_plot(slices: Mapping[str, Aggregate], *, k: int = 10) -> "Figure":
    """MRR with its 95 % interval by slice of the eval set, in the order given."""
    figure, axes = _figure(height=1.2 + 0.34 * max(len(slices), 1))
    for position, found in enumerate(slices.values()):
        axes.plot([found.low, found.high], [position, position], color=_BLUE, linewidth=2, solid_capstyle="round")
        axes.plot(found.mean, position, "o", color=_BLUE, markersize=6)
    axes.set_yticks(range(len(slices)), [f"{name} ({found.n:,})" for name, found in slices.items()])
    axes.set_ylim(max(len(slices), 1) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"MRR@{k} by slice, 95 % interval (queries)")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x", color="#e3e6ea", linewidth=0.8)
    return figure


def png(figure: "Figure", *, dpi: int = 90) -> bytes:
    """The picture as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _figure(*, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _latency_axis(axes: "Axes", times: Sequence[float]) -> None:
    """A log axis with plain numbers at 1, 2 and 5 times the powers of ten, wide enough for the names beside the marks."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.3, max(times) * 2)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
