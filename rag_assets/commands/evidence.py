"""Questions about quality: search, compare."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rag_assets.commands import Json, chosen_models, console, errors, print_json
from rag_serving.settings import load_settings

commands = typer.Typer()


@commands.command()
def search(query: str, top_k: Annotated[int, typer.Option(min=1, max=50)] = 5, as_json: Json = False) -> None:
    """Search the live snapshot, as serving does."""
    from rag_assets.demo import search_release
    from rag_assets.terminal import TerminalReporter, print_hits
    from rag_assets.workbench import Workbench

    bench = Workbench(load_settings(), reporter=TerminalReporter(errors))
    snapshot_id, hits = search_release(bench, query, k=top_k)
    if as_json:
        print_json({"snapshot_id": snapshot_id, "hits": [asdict(hit) for hit in hits]})
    else:
        console.print(f"[dim]{snapshot_id}[/]")
        print_hits(console, hits)


@commands.command()
def compare(
    folder: Path,
    models: Annotated[str, typer.Option(help="Comma-separated model names, or all.")] = "all",
    plot: Annotated[Path | None, typer.Option(help="Also draw MRR with its intervals into this file (.png, .svg).")] = None,
    as_json: Json = False,
) -> None:
    """Which embedding model is best for a BEIR-layout folder? The release is not touched."""
    from evals.reports import leaderboard_json, leaderboard_table, mrr_plot
    from rag_assets.compare import compare as run_comparison
    from rag_assets.terminal import TerminalReporter

    settings = load_settings()
    k = settings.eval.k
    rows = run_comparison(settings, folder, models=chosen_models(settings, models), reporter=TerminalReporter(errors))
    if plot:
        mrr_plot(rows, plot, k=k)
    if as_json:
        print_json({"rows": leaderboard_json(rows, k=k)})
    else:
        console.print(leaderboard_table(rows, k=k))
