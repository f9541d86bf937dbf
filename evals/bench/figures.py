"""Timing two sides in turn, and the table of what came out."""

import inspect
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

Side = Callable[[int], Any]
DOUBT = "NOT VALID: passes its limit, the run was disturbed"
_NOISE = 0.1


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured number, with the peer's beside it where there is one.

    `ratio` is ours / peer in `unit`; `spread` the 10th and 90th percentile of that ratio over rounds. `promise` is a bar with its outcome.
    """

    what: str
    ours: float
    unit: str
    peer: float | None = None
    peer_is: str = ""
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    promise: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Seconds of both sides, one of each a round."""

    ours: Sequence[float]
    peer: Sequence[float]

    def rate(self, what: str, amount: float, unit: str, *, peer_is: str, limit: bool = True, note: str = "") -> Figure:
        """`amount` a second: medians of the rounds, and the median of the rounds' ratios. `limit`: ours cannot be quicker than the peer."""
        ours, peer = ([amount / seconds for seconds in side] for side in (self.ours, self.peer))
        figure = paired(what, ours, peer, unit, peer_is=peer_is, note=note)
        return _doubted(figure) if limit and (figure.ratio or 0) > 1 + _NOISE else figure

    def milliseconds(self, what: str, *, peer_is: str, limit: bool = True, note: str = "") -> Figure:
        """Medians in ms, and the median of the rounds' ratios. `limit`: the peer does a part of our work, so ours cannot be quicker."""
        ours, peer = ([1000 * seconds for seconds in side] for side in (self.ours, self.peer))
        figure = paired(what, ours, peer, "ms", peer_is=peer_is, note=note)
        return _doubted(figure) if limit and (figure.ratio or 0) < 1 - _NOISE else figure

    def tail_milliseconds(self, what: str, *, peer_is: str, promise_ms: float | None = None, note: str = "") -> Figure:
        """The 95th percentiles in ms, and their ratio."""
        ours, peer = (float(np.percentile(side, 95)) * 1000 for side in (self.ours, self.peer))
        promise = "" if promise_ms is None else kept(ours, promise_ms, "ms")
        return Figure(what, ours, "ms", peer, peer_is, ours / peer, promise=promise, note=note)


def paired(what: str, ours: Sequence[float], peer: Sequence[float], unit: str, *, peer_is: str, note: str = "") -> Figure:
    """Medians over rounds, of which `ours` and `peer` have one number each, and the median of the rounds' ratios."""
    ratios = np.asarray(ours) / np.asarray(peer)
    low, high = (float(value) for value in np.percentile(ratios, [10, 90]))
    return Figure(
        what, float(np.median(ours)), unit, float(np.median(peer)), peer_is, float(np.median(ratios)), spread=(low, high), note=note
    )


def _doubted(figure: Figure) -> Figure:
    """A figure that passes its own limit says that the run was disturbed, never that ours is quicker."""
    return replace(figure, note="; ".join(part for part in (DOUBT, figure.note) if part))


def reached(measured: float, least: float, unit: str = "") -> str:
    """The promise of at least so much, with its outcome."""
    return f"{f'>= {least:g} {unit}'.rstrip()}: {'kept' if measured >= least else 'missed'}"


def kept(measured: float, limit: float, unit: str) -> str:
    """The promise of less than the limit, with its outcome."""
    return f"< {limit:g} {unit}: {'kept' if measured < limit else 'missed'}"


async def timed(side: Callable[[], Any]) -> float:
    """Seconds of one call; an awaitable result is awaited."""
    started = time.perf_counter()
    result = side()
    if inspect.isawaitable(result):
        await result
    return time.perf_counter() - started


async def alternate(ours: Side, peer: Side, *, rounds: int, warm_up: int = 1) -> Pairs:
    """Run both sides in turn on the same round number; the side that goes first changes each round. Rounds of `warm_up` do not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in [*range(warm_up), *range(rounds)]:
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            seconds[which].append(await timed(partial((ours, peer)[which], number)))
    return Pairs(seconds[0][warm_up:], seconds[1][warm_up:])


def figures_table(results: Iterable[tuple[str, Sequence[Figure]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="ratio: ours / peer, median over rounds (10th to 90th percentile)")
    for name in ("bench", "what", "ours", "peer", "unit", "ratio", "promise", "peer is; notes"):
        numeric = name in {"ours", "peer", "ratio"}
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for name, figures in results:
        for number, figure in enumerate(figures):
            table.add_row(*_cells(name if number == 0 else "", figure), end_section=number == len(figures) - 1)
    return table


def _cells(name: str, figure: Figure) -> tuple[str, ...]:
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    if figure.spread:
        ratio += f" ({figure.spread[0]:.2f}-{figure.spread[1]:.2f})"
    remarks = "; ".join(part for part in (figure.peer_is, figure.note) if part)
    return name, figure.what, _number(figure.ours), _number(figure.peer), figure.unit, ratio, figure.promise, remarks


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}"


def machine(*, threads: int, bf16: bool) -> str:
    """One line on what the figures were measured on; the load says how far absolute numbers can be trusted."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{cpu}, {os.cpu_count()} cores, {threads} torch threads, bf16 {'yes' if bf16 else 'no'}{load}, Python {platform.python_version()}"
    )
