"""The corpus: plan."""

import os
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from rag_assets.commands import Json, chosen_models, console, errors, print_json
from rag_serving.settings import load_settings

commands = typer.Typer()


@commands.command()
def plan(
    models: Annotated[str, typer.Option(help="Comma-separated model names, or all; default: default_models.")] = "",
    source: Annotated[str, typer.Option(help="Corpus instead of corpus.source, such as folder:./docs.")] = "",
    as_json: Json = False,
) -> None:
    """What `ragline run` would do now, and what it would cost. Changes nothing."""
    if source:
        os.environ["RAGLINE_CORPUS"] = source
    from rag_assets.plan import plan as planned
    from rag_assets.terminal import TerminalReporter
    from rag_assets.workbench import Workbench

    settings = load_settings()
    found = planned(Workbench(settings, reporter=TerminalReporter(errors)), chosen_models(settings, models))
    if as_json:
        print_json({**asdict(found), "exact": found.exact, "minutes": found.minutes})
        return
    corpus, about = found.corpus, "" if found.exact else "about "
    console.print(
        f"{corpus.items:,} documents in the source; parse {corpus.parse:,}, cut {corpus.cut:,}, drop {corpus.gone:,}.", highlight=False
    )
    for reason in corpus.because:
        console.print(f"  {reason}", highlight=False)
    table = Table("model", f"{about}texts to embed", "snapshot", f"{about}minutes", "because")
    for model in found.models:
        minutes = "unknown" if model.minutes is None else f"{model.minutes:.1f}"
        table.add_row(model.model, f"{model.texts:,}", model.snapshot, minutes, "; ".join(model.because) or "nothing changed")
    console.print(table)
