"""Running the line and its processes: run, quarantine, up, serve, embedder, doctor."""

import os
import sys
import time
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape

from rag_assets.commands import Json, chosen_models, console, errors, print_json
from rag_serving.settings import load_settings

commands = typer.Typer()


class Llm(StrEnum):
    LOCAL = "local"


@commands.command()
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
    result = run_line(bench, chosen_models(settings, models))
    if as_json:
        print_json(
            {
                "seconds": round(time.perf_counter() - started, 1),
                "embedded": result.computed,
                "snapshots_built": result.built,
                "promoted": result.promoted,
                "unmeasured": [manifest.snapshot_id for manifest in result.unmeasured],
                "refusal": str(result.refusal) if result.refusal else None,
                "standings": [{**asdict(s.evaluation), "status": s.status, "reason": s.reason} for s in result.standings],
            }
        )
    else:
        report_run(console, bench, result, seconds=time.perf_counter() - started)
    if result.refusal:
        raise typer.Exit(1)


@commands.command()
def quarantine(as_json: Json = False) -> None:
    """Items of the source that could not become documents, with the reason of each."""
    from rag_assets.ingestion import quarantined
    from rag_assets.workbench import Workbench

    reasons, items = quarantined(Workbench(load_settings()), most=sys.maxsize)
    if as_json:
        print_json({"reasons": reasons, "items": items})
    for item in () if as_json else items:
        console.print(f"[bold]{item['reason']}[/]  {escape(item['item'])}  [dim]{escape(item['detail'])}[/]", highlight=False)
    if not (items or as_json):
        console.print("Nothing is quarantined.")


@commands.command()
def up(llm: Annotated[Llm | None, typer.Option(help="local: run local_llm.model too, and have it write the answers.")] = None) -> None:
    """Start the platform: Dagster, MLflow, the embedding service and the serving API. Ctrl-C stops all of it."""
    from rag_assets.platform import up as start

    raise typer.Exit(start(load_settings(), console=console, local_llm=llm is Llm.LOCAL))


@commands.command()
def llm(host: Annotated[str, typer.Option()] = "", port: Annotated[int, typer.Option()] = -1) -> None:
    """Run the local language model (OpenAI /v1/chat/completions)."""
    from rag_serving.writing.local_llm import serve as start

    settings = load_settings()
    start(settings, host=host or settings.places.host, port=port if port >= 0 else settings.places.llm_port)


@commands.command()
def serve(host: Annotated[str, typer.Option()] = "", port: Annotated[int, typer.Option()] = -1) -> None:
    """Serve the release that the ledger names."""
    from rag_serving.app import serve as start

    settings = load_settings()
    start(settings, host=host or settings.places.host, port=port if port >= 0 else settings.places.serving_port)


@commands.command()
def embedder(
    models: Annotated[str, typer.Option(help="Models to load at once; default: those of the live and the previous release.")] = "",
    host: Annotated[str, typer.Option()] = "",
    port: Annotated[int, typer.Option()] = -1,
) -> None:
    """Run the embedding service (OpenAI /v1/embeddings)."""
    from rag_assets.status import released_models
    from rag_serving.embedder import serve as start

    settings = load_settings()
    names = chosen_models(settings, models) if models else released_models(settings) or chosen_models(settings, "")[:1]
    start(settings, models=names, host=host or settings.places.host, port=port if port >= 0 else settings.places.embedder_port)


@commands.command()
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
