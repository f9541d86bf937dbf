"""Whether a snapshot holds what the source does: newer snapshots, a newer corpus, and the source itself, listed anew."""

from rag_assets.corpus import current_table
from rag_assets.plan import plan_corpus
from rag_assets.steps import current_snapshot
from rag_assets.workbench import Workbench
from rag_serving.errors import SourceError
from rag_serving.snapshots import Manifest


def behind_source(bench: Workbench, manifest: Manifest) -> tuple[str, float]:
    """Why the champion does not hold what the source does, empty when it does, and how many items changed since the source was last read.

    That number is not finite where the source cannot be listed.
    """
    newest, chunks = current_snapshot(bench, manifest.embedding_model), current_table(bench.store, "chunks")
    reasons = []
    if newest and newest.corpus_sha256 != manifest.corpus_sha256:
        reasons.append(f"{newest.snapshot_id} has a newer corpus")
    elif chunks and chunks.content_sha256 != manifest.corpus_sha256:
        reasons.append("no snapshot was built of the corpus that was read since")
    try:
        corpus = plan_corpus(bench)
    except SourceError as error:
        return "; ".join([*reasons, f"the source cannot be listed: {error}"]).rstrip("."), float("nan")
    changes = corpus.changed + corpus.gone
    if changes:
        reasons.append(f"{changes:,} items of the source are new, changed or gone since it was read")
    elif corpus.parse:
        reasons.append("documents are parsed in another way now than when the source was read")
    return "; ".join(reasons), float(changes)
