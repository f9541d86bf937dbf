"""Questions about quality: search, compare, track, power."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rag_assets.commands import Json, chosen_models, console, errors, print_json
from rag_serving.errors import ConfigError, PlatformError
from rag_serving.settings import load_settings

commands = typer.Typer()
_PICTURES = (".png", ".svg", ".pdf")


@commands.command()
def search(
    query: str,
    top_k: Annotated[int, typer.Option(min=1, max=50)] = 5,
    snapshot: Annotated[str, typer.Option(help="Snapshot id or model name; default: the live snapshot.")] = "",
    as_json: Json = False,
) -> None:
    """Search a snapshot, as serving does."""
    from rag_assets.demo import search_snapshot
    from rag_assets.terminal import TerminalReporter, print_hits
    from rag_assets.workbench import Workbench

    bench = Workbench(load_settings(), reporter=TerminalReporter(errors))
    snapshot_id, hits = search_snapshot(bench, query, k=top_k, named=snapshot)
    if as_json:
        print_json({"snapshot_id": snapshot_id, "hits": [asdict(hit) for hit in hits]})
    else:
        console.print(f"[dim]{snapshot_id}[/]")
        print_hits(console, hits)


@commands.command()
def compare(
    folder: Path,
    models: Annotated[str, typer.Option(help="Comma-separated model names, or all.")] = "all",
    chunkings: Annotated[str, typer.Option(help="Comma-separated STRATEGY[:MAX_TOKENS[:OVERLAP]]; default: as configured.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Also draw quality against latency into this file (.png, .svg).")] = None,
    as_json: Json = False,
) -> None:
    """Which embedding model and chunking are best for a BEIR-layout folder? The release is not touched."""
    from evals.plots import quality_latency_plot
    from evals.reports import leaderboard_json, leaderboard_table, sensitivity_line
    from rag_assets.compare import compare as run_comparison
    from rag_assets.terminal import TerminalReporter

    settings = load_settings()
    k = settings.eval.k
    if plot and (plot.suffix not in _PICTURES or not plot.parent.is_dir()):
        raise ConfigError(f"no picture can be drawn into {plot}.", fix=f"Name a {', '.join(_PICTURES)} file in a folder that exists.")
    chosen, cuts = chosen_models(settings, models), [each.strip() for each in chunkings.split(",") if each.strip()]
    rows = run_comparison(settings, folder, models=chosen, chunkings=cuts, reporter=TerminalReporter(errors))
    if plot:
        quality_latency_plot(rows, k=k).savefig(plot)
    if as_json:
        print_json({"rows": leaderboard_json(rows, k=k), "sensitivity": sensitivity_line(rows)})
    else:
        console.print(leaderboard_table(rows, k=k))


@commands.command()
def track(as_json: Json = False) -> None:
    """Bring MLflow up to the store and the ledger: evaluations it lacks, comparisons with the champion, aliases."""
    from rag_assets.mirror import mirror
    from rag_assets.postgres import export, postgres
    from rag_assets.steps import load_eval_set
    from rag_assets.terminal import TerminalReporter
    from rag_assets.workbench import Workbench

    settings = load_settings()
    with postgres(settings) as databases:
        os.environ.update(export(databases))
        bench = Workbench(settings, reporter=TerminalReporter(errors))
        shown = mirror(bench, load_eval_set(bench))
    if shown is None:
        raise PlatformError("MLflow was not brought up to date; the store has everything.", fix="Correct RAGLINE_MLFLOW_URL, or `make up`.")
    aliases = {alias: f"{shown.name} version {version}" for alias, version in shown.aliases.items()}
    if as_json:
        print_json({"logged": shown.logged, "runs": len(shown.runs), "versions": len(shown.versions), "aliases": aliases})
    else:
        console.print(f"{shown.logged} evaluations logged, {len(shown.runs)} in MLflow.", highlight=False)
        for alias, version in aliases.items():
            console.print(f"  {alias}: {version}", highlight=False)


@commands.command()
def power(
    drop: Annotated[float, typer.Option(min=0.0001, max=1.0, help="The drop of MRR that should show.")] = 0.02,
    as_json: Json = False,
) -> None:
    """Which drop of MRR does the eval set show, and how many queries would show a given one? From the stored evaluations."""
    from rag_assets.sensitivity import reach
    from rag_assets.terminal import TerminalReporter
    from rag_assets.workbench import Workbench

    found = reach(Workbench(load_settings(), reporter=TerminalReporter(errors)), drop=drop)
    if as_json:
        print_json(found.facts())
    else:
        console.print(found.table())


@commands.command()
def fit(
    model: Annotated[str, typer.Option(help="Embedding model; default: the first default model.")] = "",
    as_json: Json = False,
) -> None:
    """Fit the weights of reranking to the eval set, and say whether the half that had no part in it agrees. Changes nothing."""
    from rag_assets.fitting import fit_snapshot
    from rag_assets.terminal import TerminalReporter, print_fit
    from rag_assets.workbench import Workbench

    settings = load_settings()
    name = chosen_models(settings, model)[0]
    found = fit_snapshot(Workbench(settings, reporter=TerminalReporter(errors)), name)
    if as_json:
        gain = found.heldout_gain
        bounds = {"mean": gain.mean, "lower_bound": gain.lower_bound, "low": gain.low, "high": gain.high}
        halves = {"tune": asdict(found.tune), "heldout": asdict(found.heldout)}
        print_json({"weights": found.weights.model_dump(), **halves, "heldout_gain": bounds, "kept": found.kept})
    else:
        print_fit(console, found)
