"""`ragline compare`: which embedding model is best for this data? Every configured model on a BEIR folder, in a scratch store of its own."""

from collections.abc import Sequence
from pathlib import Path

from evals.reports import LeaderboardRow
from rag_assets import ingestion, steps
from rag_assets.corpus import fingerprint_of
from rag_assets.leaderboard import baseline_rows
from rag_assets.workbench import Reporter, Workbench
from rag_serving.errors import SourceError
from rag_serving.settings import Settings
from rag_serving.store import LocalStore


def compare(settings: Settings, folder: Path, *, models: Sequence[str], reporter: Reporter) -> list[LeaderboardRow]:
    """A leaderboard row a model and one for full-text search alone, on the corpus, queries and qrels of a BEIR folder.

    Vectors and snapshots stay in a scratch store under the state folder, so that asking again is quick. The release is never touched.
    """
    if not folder.is_dir():
        raise SourceError(
            f"there is no folder {folder}.", fix="Give a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv (BEIR layout)."
        )
    address = f"beir:{folder.resolve()}"
    chosen = settings.model_copy(
        update={
            "corpus": settings.corpus.model_copy(update={"source": address}),
            "eval": settings.eval.model_copy(update={"source": address}),
        }
    )
    scratch = LocalStore(settings.home / "compare" / fingerprint_of(address)[:16])
    bench = Workbench(chosen, store=scratch, reporter=reporter)
    ingestion.list_source_files(bench)
    ingestion.parse_documents(bench)
    eval_set = steps.load_eval_set(bench)
    ingestion.split_chunks(bench)
    rows: list[LeaderboardRow] = []
    evaluations = []
    for name in models:
        reporter.note(f"── {name}")
        built = steps.snapshot_corpus(bench, name)
        evaluation = steps.evaluate_snapshot(bench, built.manifest, eval_set)
        evaluations.append(evaluation)
        rows.append(LeaderboardRow(name, evaluation.metrics, built.manifest.snapshot_id, "compared"))
        bench.release_models()
    return rows + baseline_rows(evaluations)
