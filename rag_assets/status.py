"""What is live, as facts: the release, its metrics, what holds, and which snapshots stand ready."""

import json
import time
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console
from rich.markup import escape

from rag_assets.evaluation import Evaluation, read_evaluation
from rag_serving import promotion
from rag_serving.errors import SnapshotError
from rag_serving.releases import Entry, Ledger, Release, current_actor
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest, read_manifest, snapshot_ids
from rag_serving.store import LocalStore, Store


def describe(settings: Settings) -> dict[str, Any]:
    """The facts of `ragline status`: release number, champion with metrics, previous, holds, snapshots. Reads the store alone."""
    store = LocalStore(settings.store_dir)
    state = Ledger(store).state()
    snapshots = [_manifest_facts(read_manifest(store, snapshot_id)) for snapshot_id in snapshot_ids(store)]
    return {
        "release": state.number,
        "champion": _release_facts(store, state.champion) if state.champion else None,
        "previous": _release_facts(store, state.previous) if state.previous else None,
        "holds": [{"number": hold.number, "actor": hold.actor, "reason": hold.reason, "at": hold.at} for hold in state.holds],
        "snapshots": snapshots,
        "store": str(settings.store_dir),
    }


def _manifest_facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "snapshot_id": manifest.snapshot_id,
        "embedding_model": manifest.embedding_model,
        "documents": manifest.documents,
        "chunks": manifest.rows,
        "bytes": manifest.bytes,
        "built_at": manifest.built_at,
    }


def _release_facts(store: Store, release: Release) -> dict[str, Any]:
    evaluation = released_evaluation(store, release)
    return {
        **_manifest_facts(read_manifest(store, release.snapshot_id)),
        "number": release.number,
        "metrics": dict(evaluation.metrics) if evaluation else {},
        "eval_set": evaluation.eval_set if evaluation else None,
        "measured_at": evaluation.measured_at if evaluation else None,
    }


def released_evaluation(store: Store, release: Release) -> Evaluation | None:
    """The evaluation that the promotion rested on, else the newest of that snapshot, else None."""
    verdict = release.evidence.get("verdict") or {}
    found = read_evaluation(store, release.manifest_sha256, verdict["eval_set_sha256"]) if verdict else None
    if found:
        return found
    stored = [read_evaluation(store, release.manifest_sha256, name) for name in store.names(f"evaluations/{release.manifest_sha256[:32]}")]
    return max((evaluation for evaluation in stored if evaluation), key=lambda evaluation: evaluation.measured_at, default=None)


def released_models(settings: Settings) -> tuple[str, ...]:
    """Embedding models of the live and the previous release that are configured here, in that order."""
    store = LocalStore(settings.store_dir)
    state = Ledger(store).state()
    configured = {spec.name for spec in settings.models}
    named = [read_manifest(store, release.snapshot_id).embedding_model for release in (state.champion, state.previous) if release]
    return tuple(dict.fromkeys(name for name in named if name in configured))


def print_status(console: Console, facts: dict[str, Any]) -> None:
    champion = facts["champion"]
    if champion is None:
        console.print("Nothing is released yet. Make the first release with `ragline run`.")
        return
    shown = "  ".join(f"{name} {value:.3f}" for name, value in champion["metrics"].items() if name.startswith(("mrr_at", "ndcg", "recall")))
    console.print(
        f"[bold green]release {facts['release']}[/]  {champion['embedding_model']}  [dim]{champion['snapshot_id']}[/]", highlight=False
    )
    console.print(f"  {champion['documents']:,} documents, {champion['chunks']:,} chunks; {shown}", highlight=False)
    previous = facts["previous"]
    console.print(f"  previous: {previous['snapshot_id'] if previous else 'none'}", highlight=False)
    for hold in facts["holds"]:
        console.print(f"[bold yellow]held[/] by {escape(hold['actor'])} since {hold['at']}: {escape(hold['reason'])}", highlight=False)


def promote_named(settings: Settings, named: str, *, override: bool, allow_shrink: bool, reason: str) -> Entry | None:
    """Promote a snapshot by id or by model name; with no name, hold the release round over the current evaluations."""
    from rag_assets import steps
    from rag_assets.workbench import Workbench

    bench = Workbench(settings)
    if not named:
        return steps.release_current(bench)
    snapshot_id = named
    if any(spec.name == named for spec in settings.models):
        current = steps.current_snapshot(bench, named)
        if current is None:
            raise SnapshotError(f"there is no snapshot of {named} yet.", fix=f"Build one: `ragline run --models {named}`.")
        snapshot_id = current.snapshot_id
    return promotion.promote(
        bench.store,
        snapshot_id,
        gate=settings.gate,
        actor=current_actor(settings.places.actor),
        reason=reason or "promoted by hand",
        override=override,
        allow_shrink=allow_shrink,
    )


def follow(settings: Settings, number: int, *, patience_seconds: float = 5.0) -> float | None:
    """Seconds until the serving process on this machine answered with release `number`; None when none is running or it did not follow."""
    url = f"http://{settings.places.host}:{settings.places.serving_port}/v1/release"
    started = time.perf_counter()
    while time.perf_counter() - started < patience_seconds:
        try:
            with urlopen(url, timeout=1) as reply:
                if (json.loads(reply.read()).get("open") or {}).get("release") == number:
                    return round(time.perf_counter() - started, 3)
        except (URLError, OSError, ValueError):
            return None
        time.sleep(0.02)
    return None
