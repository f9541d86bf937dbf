"""The rollback drill: the previous snapshot is made live on a scratch store, by the code that rolls back, and answers probe queries there.

The scratch store is a folder beside the snapshots, with copies of the ledger's entries and hard links to the snapshot's files (copies where
links are not possible); it is removed at the end. The real ledger and the snapshots are only read.
What a drill that went well measured is kept under `drills/`.
"""

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from evals.collections import EvalSet, open_eval_set
from evals.metrics import QueryRow
from rag_assets.evaluation import read_rows
from rag_assets.local_reranking import local_reranker
from rag_assets.measurement import encode_queries, measure
from rag_assets.status import released_evaluation
from rag_assets.workbench import Workbench
from rag_serving import promotion
from rag_serving.encoding import LocalEncoder, require_fingerprint
from rag_serving.errors import DrillFailed
from rag_serving.releases import Ledger, Release
from rag_serving.reranking import Reranker
from rag_serving.retrieval import QUERY_CODE, Retriever
from rag_serving.seals import sealed
from rag_serving.settings import Settings
from rag_serving.signals import contract, work
from rag_serving.snapshots import MANIFEST, link_files, read_manifest, snapshot_key
from rag_serving.store import LocalStore, Store

PROBES = 50
AGREEMENT = 0.99  # float noise of a batch may swap near ties; another model or index would change far more


@dataclass(frozen=True, slots=True)
class Drill:
    """What a drill measured, in seconds: linking and rolling back, opening with every file verified, and answering the probes.

    `compared` probes had a stored ranking of the same eval set; `agreement` is the mean share of their k best documents that came back, 1.0
    when there was nothing to compare with.
    """

    snapshot_id: str
    megabytes: float
    restore_seconds: float
    open_seconds: float
    answer_seconds: float
    probes: int
    compared: int
    agreement: float

    @property
    def seconds(self) -> float:
        return self.restore_seconds + self.open_seconds + self.answer_seconds


def run_drill(bench: Workbench) -> Drill | None:
    """Rehearse the rollback to the previous snapshot; None while there is none.

    Raises DrillFailed when it took longer than drift.drill_budget_seconds or when fewer than 99 % of the stored best documents came back, and
    whatever stopped it: SnapshotError names a damaged file, ModelMismatch an embedding model that was changed.
    """
    previous = Ledger(bench.store).state().previous
    if previous is None:
        return None
    drill = _drill(bench, previous)
    _judge(drill, budget_seconds=bench.settings.drift.drill_budget_seconds)
    _keep(bench.store, drill)
    bench.reporter.note(f"rollback drill: {drill.snapshot_id} answered {drill.probes} probes after {drill.seconds:.2f} s")
    return drill


def _keep(store: Store, drill: Drill) -> None:
    """One sealed record a day of a drill that went well, under `drills/`; the service shows the newest."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    store.write(f"drills/{at[:10]}.json", sealed({"at": at, **asdict(drill)}))


def _judge(drill: Drill, *, budget_seconds: float) -> None:
    if drill.seconds > budget_seconds:
        raise DrillFailed(
            f"restoring {drill.snapshot_id} took {drill.seconds:.1f} s (restore {drill.restore_seconds:.1f}, open {drill.open_seconds:.1f}, "
            f"answers {drill.answer_seconds:.1f}); {budget_seconds:g} are allowed.",
            fix="Look at the disk's load, or raise drift.drill_budget_seconds.",
        )
    if drill.agreement < AGREEMENT:
        raise DrillFailed(
            f"{drill.snapshot_id} returned {drill.agreement:.1%} of the documents it had for {drill.compared} probes; "
            f"{AGREEMENT:.0%} are asked.",
            fix="Evaluate it again and compare: `ragline run`.",
        )


@work.worked(contract.REHEARSE, lambda drill: {contract.SNAPSHOT_ID: drill.snapshot_id, contract.RESTORE_SECONDS: drill.seconds})
def _drill(bench: Workbench, previous: Release) -> Drill:
    manifest = read_manifest(bench.store, previous.snapshot_id)
    eval_set = open_eval_set(bench.settings.eval.source, root=bench.settings.root)
    expected = _expectation(bench, previous, eval_set)
    encoder = LocalEncoder(bench.model(manifest.embedding_model))
    require_fingerprint(encoder, manifest.fingerprint)
    with bench.store.staging("snapshots/drill") as folder:
        started = time.perf_counter()
        scratch = _scratch(bench.store, previous.snapshot_id, folder)
        entry = promotion.rollback(scratch, actor="rollback_drill", reason="rehearsal on a scratch store", to=previous.snapshot_id)
        restored = time.perf_counter()
        opened, rows = asyncio.run(_answer(scratch, str(entry.snapshot_id), encoder, _probes(eval_set), bench.settings))
        answered = time.perf_counter()
    found = {row.query_id: row.retrieved for row in rows}
    shares = [len(set(expected[name]) & set(found[name])) / len(expected[name]) for name in found if expected.get(name)]
    return Drill(
        snapshot_id=manifest.snapshot_id,
        megabytes=manifest.bytes / 1e6,
        restore_seconds=restored - started,
        open_seconds=opened - restored,
        answer_seconds=answered - opened,
        probes=len(rows),
        compared=len(shares),
        agreement=float(np.mean(shares)) if shares else 1.0,
    )


def _probes(eval_set: EvalSet) -> EvalSet:
    """Up to 50 queries, evenly over the eval set, with their judgments."""
    chosen = np.linspace(0, len(eval_set.queries) - 1, min(PROBES, len(eval_set.queries))).astype(int)
    queries = tuple(eval_set.queries[at] for at in chosen)
    return EvalSet(f"{eval_set.name}/probes", queries, {query.query_id: eval_set.qrels[query.query_id] for query in queries})


def _expectation(bench: Workbench, release: Release, eval_set: EvalSet) -> dict[str, Sequence[str]]:
    """Query id -> the documents that the snapshot returned when it was measured; empty unless that was on these queries by this code."""
    evaluation = released_evaluation(bench.store, release)
    now = (eval_set.sha256, bench.settings.eval.k, QUERY_CODE)
    if evaluation is None or (evaluation.eval_set_sha256, evaluation.k, evaluation.query_code) != now:
        return {}
    return {row["query_id"]: row["retrieved"] for row in read_rows(bench.store, evaluation)}


def _scratch(store: Store, snapshot_id: str, folder: Path) -> LocalStore:
    scratch = LocalStore(folder)
    for name in store.names("releases"):
        scratch.create(f"releases/{name}", store.read(f"releases/{name}"))
    key = snapshot_key(snapshot_id)
    link_files(store.folder(key), folder / key)
    shutil.copy2(store.folder(key) / MANIFEST, folder / key)
    return scratch


async def _answer(
    store: Store, snapshot_id: str, encoder: LocalEncoder, probes: EvalSet, settings: Settings
) -> tuple[float, tuple[QueryRow, ...]]:
    """When the snapshot was open, as `time.perf_counter()` says it, and a row for each probe."""
    retriever = await Retriever.open(store, snapshot_id)
    opened = time.perf_counter()
    reranker: Reranker | None = None
    try:
        await retriever.warm_up()
        reranker = local_reranker(store, settings, retriever, encoder)
        return opened, await measure(retriever, await encode_queries(encoder, probes), probes, k=settings.eval.k, reranker=reranker)
    finally:
        retriever.close()
        if reranker:
            await reranker.aclose()
        await encoder.aclose()


def drill_facts(drill: Drill) -> dict[str, float | str]:
    """The drill's figures by name, with the total."""
    return {**asdict(drill), "seconds": drill.seconds}
