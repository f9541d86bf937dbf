"""`ragline compare`: which embedding model, and which chunking, is best for this data? All of them on a BEIR folder, in a scratch store."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from evals.reports import LeaderboardRow
from rag_assets import steps
from rag_assets.corpus import fingerprint_of
from rag_assets.leaderboard import compared_rows
from rag_assets.workbench import Reporter, Workbench
from rag_serving.errors import ConfigError, SourceError
from rag_serving.settings import Chunking, Settings
from rag_serving.store import LocalStore


def compare(
    settings: Settings, folder: Path, *, models: Sequence[str], reporter: Reporter, chunkings: Sequence[str] = ()
) -> list[LeaderboardRow]:
    """A leaderboard row a model and chunking and one for full-text search alone, on the corpus, queries and qrels of a BEIR folder.

    `chunkings` are such as `chunking_of` reads; none means the configured one. Vectors and snapshots stay in a scratch store under the state
    folder, so that asking again is quick. The release is never touched.
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
    benches = {
        name: Workbench(chosen.model_copy(update={"chunking": chunking_of(name, settings.chunking)}), store=scratch, reporter=reporter)
        for name in chunkings or ("",)
    }
    evaluations, names = [], {}
    for chunking, bench in benches.items():
        _, documents, _ = steps.ingest_corpus(bench)
        eval_set = steps.load_eval_set(bench)
        for model in models:
            name = f"{model} {chunking}".strip()
            reporter.note(f"── {name}")
            built = steps.snapshot_corpus(bench, model)
            evaluation = steps.evaluate_snapshot(bench, built.manifest, eval_set)
            names[evaluation.snapshot_id] = name
            evaluations.append(replace(evaluation, corpus_sha256=documents.table.content_sha256))
            bench.release_models()
    rows = compared_rows(scratch, evaluations, alpha=settings.gate.alpha)
    return [replace(row, embedding_model=names.get(row.snapshot_id or "", row.embedding_model)) for row in rows]


def chunking_of(text: str, configured: Chunking) -> Chunking:
    """STRATEGY[:MAX_TOKENS[:OVERLAP]] as settings; what it leaves out is as configured. ConfigError names what is wrong with it."""
    given = {name: value for name, value in zip(("strategy", "max_tokens", "overlap"), text.split(":"), strict=False) if value}
    if text.count(":") > 2:
        raise ConfigError(f"chunking {text!r} has too many parts.", fix="Write STRATEGY[:MAX_TOKENS[:OVERLAP]], such as sentence:200:40.")
    try:
        return Chunking.model_validate(configured.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"chunking {text!r} cannot be used: {first['msg']}.", fix="Write STRATEGY[:MAX_TOKENS[:OVERLAP]], such as sentence:200:40."
        ) from None
