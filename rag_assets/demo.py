"""What `ragline run` ends with: the leaderboard, the release and its reasons, one question answered, and what to do next."""

import asyncio
from dataclasses import replace

from rich.console import Console
from rich.markup import escape

from evals.reports import leaderboard_table
from rag_assets import steps
from rag_assets.ingestion import quarantined
from rag_assets.leaderboard import leaderboard_rows
from rag_assets.line import LineResult
from rag_assets.rounds import named_snapshot
from rag_assets.searching import live_release, open_search
from rag_assets.terminal import print_standings
from rag_assets.workbench import Workbench
from rag_serving.context import assemble
from rag_serving.retrieval import Hit
from rag_serving.writing.extraction import extract


def report_run(console: Console, bench: Workbench, result: LineResult, *, seconds: float) -> None:
    """Print the end of a run."""
    work = f"{result.computed:,} texts embedded, {result.built} snapshots built"
    nothing = "Nothing had changed: 0 texts embedded, 0 snapshots built"
    _report_quarantine(console, bench)
    if result.unmeasured:
        _report_unmeasured(console, bench, result)
        console.print(f"{work if result.computed or result.built else nothing}; {seconds:.0f} s.")
        return
    console.print()
    console.rule("leaderboard")
    found = leaderboard_rows(bench.store, result.standings, alpha=bench.settings.gate.alpha)
    rows = [replace(row, note="") for row in found]
    console.print(leaderboard_table(rows, k=bench.settings.eval.k))
    console.rule("release")
    print_standings(console, result.standings)
    if result.refusal:
        console.print(f"[bold red]   no release[/]  {escape(str(result.refusal))}")
    console.print()
    if result.state.champion:
        _answer(console, bench)
    console.print(f"{work if result.computed or result.built else nothing}; {seconds:.0f} s.")
    console.rule("next")
    console.print("make up                                                      the Dagster UI, MLflow, the serving API and its page")
    console.print(".venv/bin/ragline run --source ./docs --eval-set ./my-eval   your own documents and eval set (BEIR layout)")
    console.print(".venv/bin/ragline compare ./my-collection                    which embedding model is best for a collection")


def _report_quarantine(console: Console, bench: Workbench) -> None:
    reasons, _ = quarantined(bench, most=0)
    if reasons:
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        console.print(
            f"[bold yellow]{sum(reasons.values()):,} items quarantined[/]  {told}; `ragline quarantine` lists them", highlight=False
        )


def _report_unmeasured(console: Console, bench: Workbench, result: LineResult) -> None:
    console.print()
    console.rule("snapshots")
    for manifest in result.unmeasured:
        console.print(
            f"[bold]{manifest.embedding_model}[/]  [dim]{manifest.snapshot_id}[/]  {manifest.documents:,} documents", highlight=False
        )
    console.print(
        f"There is no eval set for {bench.settings.corpus.source}, so nothing was measured and nothing released.", highlight=False
    )
    console.rule("next")
    named = result.unmeasured[0].embedding_model
    for command, purpose in (
        (f'.venv/bin/ragline search --snapshot {named} "a question"', "ask it"),
        (
            f".venv/bin/ragline run --source {bench.settings.corpus.source} --eval-set ./eval",
            "measure and release it with an eval set (docs/evalsets.md says how to make one)",
        ),
        (f".venv/bin/ragline promote {named} --override --reason WHY", "release it unmeasured"),
    ):
        console.print(f"{command:<70} {purpose}", highlight=False)


def _answer(console: Console, bench: Workbench) -> None:
    eval_set = steps.load_eval_set(bench)
    question = min(eval_set.half("heldout").queries or eval_set.queries, key=lambda query: query.query_id).text
    snapshot_id, hits = search_snapshot(bench, question, k=bench.settings.serving.top_k)
    answer = extract(question, assemble(hits))
    console.rule("one question, from the promoted snapshot")
    console.print(f"[bold]{escape(question)}[/]  [dim]{snapshot_id}[/]", highlight=False)
    console.print(escape(answer.text), highlight=False)
    for passage in answer.cited:
        console.print(f"  [bold]\\[{passage.number}][/] {escape(passage.hit.title)}  [dim]{escape(passage.hit.uri)}[/]", highlight=False)
    console.print()


def search_snapshot(bench: Workbench, query: str, *, k: int, named: str = "") -> tuple[str, list[Hit]]:
    """The `k` best chunks of a snapshot (by id or model name, else the live one), through the code that serving uses; its id comes first."""
    snapshot_id = named_snapshot(bench, named) if named else live_release(bench).snapshot_id
    return snapshot_id, asyncio.run(_search(bench, snapshot_id, query, k=k))


async def _search(bench: Workbench, snapshot_id: str, query: str, *, k: int) -> list[Hit]:
    async with open_search(bench, snapshot_id) as search:
        return (await search.find([query], k=k))[0]
