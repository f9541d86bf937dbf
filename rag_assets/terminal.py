"""What a person sees in a terminal: progress bars while the line runs, and the reports at its end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rag_assets.gating import Standing
from rag_assets.retention import Plan
from rag_assets.workbench import Bar
from rag_serving.promotion import override_of
from rag_serving.releases import Action, Entry, Release, fold
from rag_serving.retrieval import Hit
from rag_serving.store import Store

if TYPE_CHECKING:
    from rag_assets.fitting import Fit

_STYLES = {Action.PROMOTE: "green", Action.CANARY: "cyan", Action.HOLD: "yellow", Action.ROLLBACK: "yellow", Action.ABORT: "yellow"}
_COLOURS = {"champion": "green", "passed": "cyan", "refused": "red", "inconclusive": "yellow", "withdrawn": "yellow", "unjudged": "dim"}


class TerminalReporter:
    """Notes as lines, work as rich progress bars; on a console that is no terminal, a line when a bar ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        self._console.print(f"[dim]  {escape(text)}[/]")

    @contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as progress:
            task = progress.add_task(escape(title), total=None)

            reached = 0

            def update(done: int, total: int) -> None:
                nonlocal reached
                reached = done
                progress.update(task, completed=done, total=total)

            started = time.perf_counter()
            yield update
        if reached:
            self._console.print(f"[dim]  {escape(title)}: {reached:,} in {time.perf_counter() - started:.1f} s[/]")


def print_standings(console: Console, found: Sequence[Standing]) -> None:
    """One line a snapshot: what became of it, and why."""
    for standing in found:
        colour = _COLOURS[standing.status]
        evaluation = standing.evaluation
        console.print(f"[bold {colour}]{standing.status:>12}[/]  {evaluation.embedding_model}  [dim]{evaluation.snapshot_id}[/]")
        console.print(f"              {escape(standing.reason)}")


def print_hits(console: Console, hits: Sequence[Hit], *, width: int = 240) -> None:
    for number, hit in enumerate(hits, start=1):
        signals = "  ".join(f"{name} {value:.2f}" for name, value in hit.signals.items())
        console.print(f"[bold]{number}. {escape(hit.title or hit.doc_id)}[/]  [cyan]{hit.score:.3f}[/]  [dim]{signals}[/]")
        text = " ".join(hit.text.split())
        console.print(f"   {escape(text[:width])}{'…' if len(text) > width else ''}\n   [dim]{escape(hit.uri)}[/]")


def releases_table(store: Store, entries: Sequence[Entry]) -> Table:
    """The ledger, newest first; `*` marks what is live, and a promotion by override says how long it stands or stood."""
    state = fold(entries)
    live = state.champion.number if state.champion else 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("no.", "at", "action", "snapshot", "actor", "stands on", "reason"):
        table.add_column(name, overflow="fold")
    for entry in reversed(entries):
        style = _STYLES.get(entry.action, "")
        number = f"{entry.number}{' *' * (entry.number == live)}"
        row = (number, entry.at, entry.action.value, entry.snapshot_id or "", entry.actor, _grounds(store, entry), entry.reason)
        table.add_row(*(escape(cell) for cell in row), style=style)
    return table


def _grounds(store: Store, entry: Entry) -> str:
    if entry.action is not Action.PROMOTE or not entry.snapshot_id or not entry.manifest_sha256:
        return ""
    override = override_of(store, Release(entry.snapshot_id, entry.manifest_sha256, entry.number, entry.evidence))
    if override is None:
        return "verdicts"
    return f"override, expired {override.expires_at}" if override.expired else f"override until {override.expires_at}"


def print_collection(console: Console, decided: Plan, *, dry_run: bool) -> None:
    """What `ragline gc` keeps and takes, and why."""
    for snapshot_id, reason in decided.kept.items():
        console.print(f"[green]{'stays':>12}[/]  {snapshot_id}  [dim]{escape(reason)}[/]", highlight=False)
    for each in decided.garbage:
        console.print(
            f"[yellow]{'would go' if dry_run else 'gone':>12}[/]  {each.kind} {each.name}  [dim]{escape(each.reason)}[/]", highlight=False
        )
    if not decided.garbage:
        console.print("Nothing to collect.")


def print_fit(console: Console, found: "Fit") -> None:
    """What fitted weights do to both halves of the eval set, and the lines for ragline.toml when they are worth it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("half", "queries", "fused order", "present weights", "fitted weights"):
        table.add_column(name, justify="left" if name == "half" else "right")
    for name, half in (("tune", found.tune), ("held-out", found.heldout)):
        table.add_row(name, f"{half.queries:,}", *(f"{value:.4f}" for value in (half.fused, half.present, half.fitted)))
    console.print(table)
    gain = found.heldout_gain
    change = f"{gain.mean:+.4f} MRR on the held-out half, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
    if not found.kept:
        console.print(f"The present weights stay: {change}.", highlight=False)
        return
    console.print(f"Fitted weights are better: {change}. For ragline.toml, and then `ragline run`:", highlight=False)
    console.print("\n\\[rerank.weights]", highlight=False)
    for name, value in found.weights.model_dump().items():
        console.print(f"{name} = {value}", highlight=False)
