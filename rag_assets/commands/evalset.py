"""Eval sets that live: export, coverage, negatives, synthesize, ask; and `ragline label`, which turns waiting questions into judgments."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from rag_assets.commands import Json, acting, console, errors, opened_store, print_json
from rag_assets.workbench import Workbench
from rag_serving.settings import Settings, load_settings

commands = typer.Typer()
themed = typer.Typer(no_args_is_help=True, help="The eval set: what it covers, and how it grows.")
commands.add_typer(themed, name="evalset")


def _bench(settings: Settings) -> Workbench:
    from rag_assets.terminal import TerminalReporter

    return Workbench(settings, reporter=TerminalReporter(errors))


@themed.command()
def export(folder: Path) -> None:
    """Write the configured eval set as a BEIR folder, to be grown and versioned from there."""
    from evals.collections import open_eval_set
    from evals.living import write_beir

    settings = load_settings()
    eval_set = open_eval_set(settings.eval.source, root=settings.root)
    write_beir(eval_set, folder)
    console.print(
        f"{len(eval_set.queries):,} queries, hash {eval_set.sha256[:12]}, in {folder}. Use it with --eval-set {folder}.", highlight=False
    )


@themed.command()
def coverage(as_json: Json = False) -> None:
    """Which parts of the corpus no query touches."""
    from rag_assets.coverage import measure_coverage

    found = measure_coverage(_bench(load_settings()))
    if as_json:
        print_json({"whole": asdict(found.whole), "parts": [asdict(part) for part in found.parts]})
        return
    table = Table("part", *(("documents", "judged", "retrieved", "touched")), box=None, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for part in (*found.parts[:20], found.whole):
        table.add_row(escape(part.name), f"{part.documents:,}", f"{part.judged:,}", f"{part.retrieved:,}", f"{part.touched:.0%}")
    console.print(table)
    console.print(f"{len(found.untouched):,} of {len(found.parts):,} parts are touched by no query.", highlight=False)


@themed.command()
def negatives(
    folder: Annotated[
        Path | None, typer.Argument(help="A folder with negatives.jsonl; default: left-out topics of the eval set alone.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tune the score below which the live snapshot has no answer."""
    from rag_assets.noanswer import tune_live
    from rag_serving.writing.relevance import SIGNAL

    found = tune_live(_bench(load_settings()), folder)
    if as_json:
        print_json({"signal": SIGNAL, **asdict(found)})
        return
    console.print(
        f"No answer below {SIGNAL} {found.threshold:.3f}; {found.false_refusals:.1%} of answerable held-out queries fall below it."
    )
    for grade, value in found.auc.items():
        caught = f", {found.caught[grade]:.1%} caught" if grade in found.caught else ""
        console.print(f"  {grade}: {found.queries[grade]:,} queries, AUC {value:.3f}{caught}", highlight=False)


@themed.command()
def synthesize(
    count: Annotated[int, typer.Option(min=1, max=5000, help="Passages to write a question for, from the least covered parts first.")] = 50,
    as_json: Json = False,
) -> None:
    """Let a language model ask what uncovered passages answer; what leads back to its passage waits for a judgment."""
    from rag_assets.synthesis import synthesize_queries

    facts = synthesize_queries(_bench(load_settings()), count=count)
    if as_json:
        print_json(facts)
        return
    console.print(f"{facts['kept']} of {facts['asked']} questions kept; they wait for `ragline label`.", highlight=False)
    for reason, number in facts["rejected"].items():
        console.print(f"  {number} left out: {reason}", highlight=False)


@themed.command()
def ask(log: Annotated[Path, typer.Argument(help="A text file with a logged question on each line.")]) -> None:
    """Queue logged questions for judgment."""
    from rag_assets.labelling import queue_log

    queued, known = queue_log(opened_store(load_settings()), log)
    console.print(f"{queued} questions wait for `ragline label`; {known} were known already.", highlight=False)


@commands.command()
def label(
    folder: Annotated[Path, typer.Argument(help="The BEIR folder that grows; made if absent.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the page is served, on loopback.")] = 8323,
    terminal: Annotated[bool, typer.Option(help="Judge here instead of on a page.")] = False,
) -> None:
    """Judge the questions that wait: from thumbs, from logs, from synthesis."""
    settings = load_settings()
    bench = _bench(settings)
    if terminal:
        from rag_assets.labelling_terminal import label_here

        asyncio.run(label_here(bench, folder, actor=acting(settings), console=console))
    else:
        from rag_assets.labelling_app import serve

        serve(bench, folder, actor=acting(settings), port=port)
