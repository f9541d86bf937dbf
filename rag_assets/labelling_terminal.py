"""Judging in the terminal: the question, its passages by number, and one line of input."""

import asyncio
import re
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rag_assets.labelling import Task, open_desk
from rag_assets.workbench import Workbench

_HELP = "numbers of the relevant ones (2 3!: 3 answers it), 0 for no answer in the corpus, s to skip, q to stop"


async def label_here(bench: Workbench, folder: Path, *, actor: str, console: Console) -> None:
    """Ask for a judgment of each waiting question until none is left, the person stops, or input ends."""
    async with open_desk(bench, folder, actor=actor) as desk:
        while task := await desk.next():
            _show(console, task)
            while (grades := _parsed(line := (await asyncio.to_thread(_read, console)), task)) is None and line not in ("s", "q"):
                console.print(f"[dim]{_HELP}[/]")
            if line == "q":
                return
            await (desk.skip(task.waiting.review_id) if grades is None else desk.judge(task.waiting.review_id, grades))
    console.print("Nothing waits for a judgment.")


def _read(console: Console) -> str:
    try:
        return console.input("> ").strip().lower()
    except EOFError:
        return "q"


def _show(console: Console, task: Task) -> None:
    console.rule(f"{task.left} waiting, from {task.waiting.origin}")
    console.print(f"[bold]{escape(task.waiting.query)}[/]", highlight=False)
    for number, candidate in enumerate(task.candidates, start=1):
        text = " ".join(candidate.text.split())[:240]
        console.print(
            f"{number:>3} [bold]{escape(candidate.title or candidate.doc_id)}[/] [dim]{candidate.score:.3f}[/] {escape(text)}",
            highlight=False,
        )
    console.print(f"[dim]{_HELP}[/]")


def _parsed(line: str, task: Task) -> dict[str, int] | None:
    """Grades of every candidate by document id; None for what is no judgment."""
    words = line.split()
    if not words or not all(re.fullmatch(r"[0-9]{1,3}!?", word) and int(word.rstrip("!")) <= len(task.candidates) for word in words):
        return None
    numbers = {int(word.rstrip("!")): 2 if word.endswith("!") else 1 for word in words}
    return {candidate.doc_id: numbers.get(number, 0) for number, candidate in enumerate(task.candidates, start=1)}
