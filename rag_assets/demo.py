"""What `ragline run` ends with: the leaderboard, the release and its reasons, one question answered, and what to do next."""

import asyncio
from dataclasses import replace

from rich.console import Console
from rich.markup import escape

from evals.reports import leaderboard_table
from rag_assets import steps
from rag_assets.leaderboard import leaderboard_rows
from rag_assets.line import LineResult
from rag_assets.terminal import print_standings
from rag_assets.workbench import Workbench
from rag_serving.context import assemble
from rag_serving.encoding import LocalEncoder, require_fingerprint
from rag_serving.errors import NotReady
from rag_serving.generation import extract
from rag_serving.releases import Ledger
from rag_serving.retrieval import Hit, Retriever


def report_run(console: Console, bench: Workbench, result: LineResult, *, seconds: float) -> None:
    """Print the end of a run."""
    work = f"{result.computed:,} texts embedded, {result.built} snapshots built"
    nothing = "Nothing had changed: 0 texts embedded, 0 snapshots built"
    console.print()
    console.rule("leaderboard")
    rows = [replace(row, note="") for row in leaderboard_rows(result.standings)]
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


def _answer(console: Console, bench: Workbench) -> None:
    eval_set = steps.load_eval_set(bench)
    question = min(eval_set.half("heldout").queries or eval_set.queries, key=lambda query: query.query_id).text
    snapshot_id, hits = search_release(bench, question, k=bench.settings.serving.top_k)
    answer = extract(question, assemble(hits))
    console.rule("one question, from the promoted snapshot")
    console.print(f"[bold]{escape(question)}[/]  [dim]{snapshot_id}[/]", highlight=False)
    console.print(escape(answer.text), highlight=False)
    for passage in answer.cited:
        console.print(f"  [bold]\\[{passage.number}][/] {escape(passage.hit.title)}  [dim]{escape(passage.hit.uri)}[/]", highlight=False)
    console.print()


def search_release(bench: Workbench, query: str, *, k: int) -> tuple[str, list[Hit]]:
    """The `k` best chunks of the live snapshot for a query, through the code that serving uses; its id comes first."""
    live = Ledger(bench.store).state().champion
    if live is None:
        raise NotReady("nothing is released yet.", fix="Make the first release with `ragline run`.")
    return live.snapshot_id, asyncio.run(_search(bench, live.snapshot_id, query, k=k))


async def _search(bench: Workbench, snapshot_id: str, query: str, *, k: int) -> list[Hit]:
    retriever = await Retriever.open(bench.store, snapshot_id)
    encoder = LocalEncoder(bench.model(retriever.manifest.embedding_model))
    try:
        require_fingerprint(encoder, retriever.manifest.fingerprint)
        (vector,) = await encoder.encode([query])
        return await retriever.retrieve(query, vector, k=k)
    finally:
        retriever.close()
        await encoder.aclose()
