"""The `ragline` command. Each command reads the settings, calls one function, and prints a report or, with --json, facts."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rag_serving.errors import ConfigError, RaglineError
from rag_serving.settings import Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
models_app = typer.Typer(no_args_is_help=True, help="Embedding models and their weights.")
app.add_typer(models_app, name="models")
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Reason = Annotated[str, typer.Option(help="Why; it is written in the ledger.")]


def main() -> None:
    """Entry point: an error of ours is one line on stderr and its exit code."""
    try:
        app()
    except (RaglineError, ValueError) as error:
        if not hasattr(error, "exit_code"):
            raise
        errors.print(f"ragline: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        errors.print(
            f"ragline: {error.name} is not installed here. Install the pipeline: pip install 'ragline[pipeline]'.",
            style="red",
            markup=False,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def print_json(facts: Any) -> None:
    sys.stdout.write(json.dumps(facts, indent=2, default=str) + "\n")


def _names(settings: Settings, chosen: str) -> tuple[str, ...]:
    if not settings.models:
        raise ConfigError("no embedding models are configured.", fix="Run in the folder of ragline.toml, or set RAGLINE_CONFIG.")
    if chosen == "all":
        return tuple(spec.name for spec in settings.models)
    names = tuple(name.strip() for name in chosen.split(",") if name.strip()) or settings.default_models
    return tuple(settings.model(name).name for name in names)


@app.command()
def run(
    models: Annotated[str, typer.Option(help="Comma-separated model names, or all; default: default_models.")] = "",
    source: Annotated[str, typer.Option(help="Corpus instead of corpus.source, such as folder:./docs.")] = "",
    eval_set: Annotated[str, typer.Option(help="Eval set instead of eval.source, such as beir:./my-eval.")] = "",
    as_json: Json = False,
) -> None:
    """Run the whole line: corpus, embeddings, snapshots, evaluation, gate, release."""
    for variable, value in (("RAGLINE_CORPUS", source), ("RAGLINE_EVAL_SET", eval_set)):
        if value:
            os.environ[variable] = value
    from rag_assets.demo import report_run
    from rag_assets.line import run_line
    from rag_assets.terminal import TerminalReporter
    from rag_assets.workbench import Workbench

    settings = load_settings()
    bench = Workbench(settings, reporter=TerminalReporter(errors if as_json else console))
    started = time.perf_counter()
    result = run_line(bench, _names(settings, models))
    if as_json:
        print_json(
            {
                "seconds": round(time.perf_counter() - started, 1),
                "embedded": result.computed,
                "snapshots_built": result.built,
                "promoted": result.promoted,
                "refusal": str(result.refusal) if result.refusal else None,
                "standings": [{**asdict(s.evaluation), "status": s.status, "reason": s.reason} for s in result.standings],
            }
        )
    else:
        report_run(console, bench, result, seconds=time.perf_counter() - started)
    if result.refusal:
        raise typer.Exit(1)


@app.command()
def up() -> None:
    """Start the platform: Dagster, MLflow, the embedding service and the serving API. Ctrl-C stops all of it."""
    from rag_assets.platform import up as start

    raise typer.Exit(start(load_settings(), console=console))


@app.command()
def serve(host: Annotated[str, typer.Option()] = "", port: Annotated[int, typer.Option()] = -1) -> None:
    """Serve the release that the ledger names."""
    from rag_serving.app import serve as start

    settings = load_settings()
    start(settings, host=host or settings.places.host, port=port if port >= 0 else settings.places.serving_port)


@app.command()
def embedder(
    models: Annotated[str, typer.Option(help="Models to load at once; default: those of the live and the previous release.")] = "",
    host: Annotated[str, typer.Option()] = "",
    port: Annotated[int, typer.Option()] = -1,
) -> None:
    """Run the embedding service (OpenAI /v1/embeddings)."""
    from rag_assets.status import released_models
    from rag_serving.embedder import serve as start

    settings = load_settings()
    names = _names(settings, models) if models else released_models(settings) or _names(settings, "")[:1]
    start(settings, models=names, host=host or settings.places.host, port=port if port >= 0 else settings.places.embedder_port)


@app.command()
def status(as_json: Json = False) -> None:
    """What is live, with its metrics, and what holds."""
    from rag_assets.status import describe, print_status

    facts = describe(load_settings())
    print_json(facts) if as_json else print_status(console, facts)


@app.command()
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


@app.command()
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
    rows = run_comparison(settings, folder, models=_names(settings, models), reporter=TerminalReporter(errors))
    if plot:
        mrr_plot(rows, plot, k=k)
    if as_json:
        print_json({"rows": leaderboard_json(rows, k=k)})
    else:
        console.print(leaderboard_table(rows, k=k))


@app.command()
def promote(
    snapshot: Annotated[str, typer.Argument(help="Snapshot id or model name; default: the best that passes the gate.")] = "",
    override: Annotated[bool, typer.Option(help="Promote without a PASS verdict; needs --reason.")] = False,
    allow_shrink: Annotated[bool, typer.Option(help="Allow a corpus that lost more rows than gate.max_shrink.")] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Promote a snapshot; its evidence is verified again at this moment."""
    from rag_assets.status import promote_named

    _changed(
        lambda settings: promote_named(settings, snapshot, override=override, allow_shrink=allow_shrink, reason=reason), as_json=as_json
    )


@app.command()
def rollback(
    to: Annotated[str, typer.Option(help="An earlier snapshot; default: the previous one.")] = "",
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make the previous snapshot live again."""
    from rag_serving import promotion

    _changed(
        lambda settings: promotion.rollback(
            _store(settings), actor=_actor(settings), reason=reason or "rolled back by hand", to=to or None
        ),
        as_json=as_json,
    )


@app.command()
def hold(reason: Reason, as_json: Json = False) -> None:
    """Block every promotion until lifted."""
    from rag_serving import promotion

    _changed(lambda settings: promotion.hold(_store(settings), actor=_actor(settings), reason=reason), as_json=as_json, moves_release=False)


@app.command()
def lift(reason: Reason, as_json: Json = False) -> None:
    """End all holds."""
    from rag_serving import promotion

    _changed(lambda settings: promotion.lift(_store(settings), actor=_actor(settings), reason=reason), as_json=as_json, moves_release=False)


@app.command()
def releases(as_json: Json = False) -> None:
    """The ledger, newest first."""
    from rag_assets.terminal import releases_table
    from rag_serving.releases import Ledger

    entries = Ledger(_store(load_settings())).entries()
    if as_json:
        print_json({"entries": [asdict(entry) for entry in entries]})
    elif entries:
        console.print(releases_table(entries))
    else:
        console.print("The ledger is empty. Make the first release with `ragline run`.")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine, and say what to fix."""
    from rag_assets.doctor import examine

    findings = examine(load_settings())
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = "[green]ok[/]  " if finding.ok else "[red]fix[/] "
            console.print(
                mark, f"[bold]{finding.name}[/]", finding.detail, *([f"\n     {finding.fix}"] if finding.fix else []), highlight=False
            )
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@models_app.command("pull")
def models_pull(names: Annotated[str, typer.Argument(help="Comma-separated model names, or all.")] = "") -> None:
    """Fetch weights, checked against their pinned hashes."""
    from rag_serving.weights import pull

    settings = load_settings()
    for name in _names(settings, names):
        folder = pull(settings.model(name).source, settings.models_dir, progress=lambda text: console.print(f"[dim]  {text}[/]"))
        console.print(f"{name}: {folder.relative_to(settings.root) if folder.is_relative_to(settings.root) else folder}")


def _store(settings: Settings) -> Any:
    from rag_serving.store import LocalStore

    return LocalStore(settings.store_dir)


def _actor(settings: Settings) -> str:
    from rag_serving.releases import current_actor

    return current_actor(settings.places.actor)


def _changed(change: Callable[[Settings], Any], *, as_json: bool, moves_release: bool = True) -> None:
    """Make a change to the ledger, say how long it took and, when it moves the release, how soon a running server followed."""
    from rag_assets.status import follow

    settings = load_settings()
    started = time.perf_counter()
    entry = change(settings)
    seconds = time.perf_counter() - started
    followed, word = follow(settings, entry.number) if entry and moves_release else (None, "")
    if as_json:
        print_json({"entry": asdict(entry) if entry else None, "seconds": round(seconds, 3), "server_followed_seconds": followed})
    elif entry is None:
        console.print("Nothing to do: the best snapshot is live already.")
    else:
        console.print(f"[bold]Entry {entry.number}: {entry.action}[/] {entry.snapshot_id or ''} in {seconds:.2f} s", highlight=False)
        if word:
            console.print(word, highlight=False)
