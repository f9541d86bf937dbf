"""What a person reads after an evaluation: the leaderboard as a table, Markdown and JSON. Best MRR first everywhere."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from evals.contrasts import Contrast
from evals.power import Sensitivity, sensitivity_of

_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Cost:
    """What an embedding model costs, on the machine that embedded. Seconds are None where nothing was timed.

    `chunks_per_second` is wall time of embedding chunk texts, `cpu_seconds` is CPU time of all threads for a thousand of them. `index_mb` is
    the snapshot on disk in 10^6 bytes, `mb_per_thousand` the same for a thousand chunks: vectors, texts and every index.
    """

    chunks_per_second: float | None
    cpu_seconds: float | None
    index_mb: float
    mb_per_thousand: float


@dataclass(frozen=True, slots=True)
class LeaderboardRow:
    """One embedding model's metrics, as named by `evals.metrics.summarise`; `status` is such as promoted, refused or baseline.

    `contrast` is its difference to the champion, None for the champion itself and where there is nothing to compare with.
    """

    embedding_model: str
    metrics: Mapping[str, float]
    snapshot_id: str | None
    status: str
    note: str = ""
    contrast: Contrast | None = None
    cost: Cost | None = None


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the leaderboard: its heading in one line, the same broken for a terminal, and whether it holds numbers."""

    heading: str
    broken: str
    numeric: bool = True


def leaderboard_table(rows: Iterable[LeaderboardRow], *, k: int) -> Table:
    """The leaderboard for a terminal: 100 columns, 120 with differences and costs.

    The best row is bold, long names wrap, notes come last if there are any. What only Markdown has room for is left out. The caption says
    which drop of MRR so many queries show.
    """
    ranked = best_first(rows, k=k)
    with_notes = any(row.note for row in ranked)
    shown = {heading: cells for heading, cells in _columns(ranked, k=k).items() if heading.heading not in _MARKDOWN_ONLY}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for position, column in enumerate(shown):
        table.add_column(column.broken, justify="right" if column.numeric else "left", no_wrap=position > 0, overflow="fold")
    if with_notes:
        table.add_column("note", overflow="fold")
    for position, row in enumerate(ranked):
        cells = [*(values[position] for values in shown.values()), *([row.note] if with_notes else [])]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if position == 0 else None)
    table.caption, table.caption_justify = sensitivity_line(ranked), "left"
    return table


def leaderboard_markdown(rows: Iterable[LeaderboardRow], *, k: int) -> str:
    """The leaderboard as a Markdown table with every column, the snapshot and the note of each row; the best row is bold."""
    ranked = best_first(rows, k=k)
    columns = _columns(ranked, k=k)
    lines = [
        _markdown_row([*(column.heading for column in columns), "snapshot", "note"]),
        _markdown_row([*("---:" if column.numeric else ":---" for column in columns), ":---", ":---"]),
    ]
    for position, row in enumerate(ranked):
        written = (*(values[position] for values in columns.values()), row.snapshot_id or _ABSENT, row.note)
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in written]
        lines.append(_markdown_row([f"**{cell}**" if cell and position == 0 else cell for cell in cells]))
    caption = sensitivity_line(ranked)
    return "\n".join([*lines, *(["", caption] if caption else []), ""])


def leaderboard_json(rows: Iterable[LeaderboardRow], *, k: int = 10) -> list[dict[str, object]]:
    """`[{"embedding_model": ..., "metrics": {...}}]`, with `contrast` and `cost` where a row has them.

    A metric that is not finite is left out, as JSON cannot say it.
    """
    return [
        {
            "embedding_model": row.embedding_model,
            "metrics": {name: float(value) for name, value in row.metrics.items() if math.isfinite(value)},
            **{name: asdict(value) for name, value in (("contrast", row.contrast), ("cost", row.cost)) if value},
        }
        for row in best_first(rows, k=k)
    ]


_MARKDOWN_ONLY = {"against the champion", "CPU-s / 1,000 chunks", "MB / 1,000 chunks"}


def _columns(ranked: list[LeaderboardRow], *, k: int) -> dict[_Column, list[str]]:
    """Each column with its cells, in the order of `ranked`; those that no row fills are left out if they are optional."""
    columns = {
        _Column("embedding model", "embedding model", numeric=False): [row.embedding_model for row in ranked],
        _Column(f"MRR@{k} (95 % interval)", f"MRR@{k}\n(95 % interval)"): [_mrr(row, k=k) for row in ranked],
    }
    if any(row.contrast for row in ranked):
        columns[_Column("difference (p)", "difference\n(p, Holm)")] = [_difference(row.contrast) for row in ranked]
        columns[_Column("against the champion", "", numeric=False)] = [row.contrast.verdict if row.contrast else _ABSENT for row in ranked]
    columns[_Column(f"recall@{k}", f"recall\n@{k}")] = [_number(value_of(row, f"recall_at_{k}"), 3) for row in ranked]
    columns[_Column(f"nDCG@{k}", f"nDCG\n@{k}")] = [_number(value_of(row, f"ndcg_at_{k}"), 3) for row in ranked]
    columns[_Column("p50 / p95 ms", "p50 / p95\nms")] = [_latency(row) for row in ranked]
    costs = [row.cost for row in ranked]
    if any(costs):
        columns[_Column("chunks/s", "chunks\n/s")] = [_number(cost.chunks_per_second if cost else None, 0) for cost in costs]
        columns[_Column("CPU-s / 1,000 chunks", "")] = [_number(cost.cpu_seconds if cost else None, 1) for cost in costs]
        columns[_Column("index MB", "index\nMB")] = [_number(cost.index_mb if cost else None, 1) for cost in costs]
        columns[_Column("MB / 1,000 chunks", "")] = [_number(cost.mb_per_thousand if cost else None, 2) for cost in costs]
    columns[_Column("status", "status", numeric=False)] = [row.status for row in ranked]
    return columns


def _mrr(row: LeaderboardRow, *, k: int) -> str:
    interval = interval_of(row, k=k)
    mrr = _number(value_of(row, f"mrr_at_{k}"), 3)
    return mrr if interval is None else f"{mrr} ({interval[0]:.3f} to {interval[1]:.3f})"


def _difference(contrast: Contrast | None) -> str:
    if contrast is None:
        return _ABSENT
    return f"{contrast.mean:+.3f} ({'<0.001' if contrast.p < 0.001 else f'{contrast.p:.3f}'})"


def _latency(row: LeaderboardRow) -> str:
    p50, p95 = (value_of(row, f"latency_{level}_ms") for level in ("p50", "p95"))
    return _ABSENT if p95 is None else f"{_number(p50, 1)} / {p95:.1f}"


def best_first(rows: Iterable[LeaderboardRow], *, k: int) -> list[LeaderboardRow]:
    """The rows by falling MRR, those without one last."""

    def order(row: LeaderboardRow) -> tuple[float, str]:
        mrr = value_of(row, f"mrr_at_{k}")
        return (math.inf if mrr is None else -mrr, row.embedding_model)

    return sorted(rows, key=order)


def interval_of(row: LeaderboardRow, *, k: int) -> tuple[float, float] | None:
    """The 95 % interval of a row's MRR, None where it has none."""
    low, high = value_of(row, f"mrr_at_{k}_low"), value_of(row, f"mrr_at_{k}_high")
    return None if low is None or high is None else (low, high)


def value_of(row: LeaderboardRow, name: str) -> float | None:
    """A finite metric of a row, else None."""
    value = row.metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None, digits: int) -> str:
    return _ABSENT if value is None else f"{value:,.{digits}f}"


def sensitivity_line(ranked: Iterable[LeaderboardRow]) -> str:
    """What comparisons over these queries show: at the standard deviations behind the differences of the rows, else at the usual ones.

    Empty if no row says how many queries it is over.
    """
    rows = list(ranked)
    queries = int(max((value_of(row, "queries") or 0 for row in rows), default=0))
    if not queries:
        return ""
    widths = [row.contrast.high - row.contrast.low for row in rows if row.contrast and row.contrast.high > row.contrast.low]
    sds = [width / 3.92 * math.sqrt(queries) for width in widths]  # a 95 % interval is 3.92 standard errors wide
    found = Sensitivity(queries, min(sds), max(sds)) if sds else sensitivity_of(queries)
    return f"{found.sentence()}."


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
