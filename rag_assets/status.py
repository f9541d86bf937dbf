"""What is live, as facts: the release, its metrics, what holds, and which snapshots stand ready."""

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import httpx2
from rich.console import Console
from rich.markup import escape

from rag_assets.evaluation import Evaluation, read_evaluation
from rag_assets.trial import trial_of
from rag_serving import promotion
from rag_serving.errors import SnapshotError
from rag_serving.releases import Ledger, Release, State
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest, read_manifest, snapshot_ids
from rag_serving.store import LocalStore, Store
from rag_serving.verdicts import GATES, trusted_verdict


def describe(settings: Settings) -> dict[str, Any]:
    """The facts of `ragline status`: release number, champion with metrics and what it stands on, previous, canary, holds, pins, snapshots.

    Reads the store alone.
    """
    store = LocalStore(settings.store_dir)
    state = Ledger(store).state()
    snapshots = [_snapshot_facts(store, snapshot_id) for snapshot_id in snapshot_ids(store)]
    return {
        "release": state.champion.number if state.champion else 0,
        "champion": _release_facts(store, state.champion) if state.champion else None,
        "previous": _release_facts(store, state.previous) if state.previous else None,
        "canary": {**_release_facts(store, state.canary), **_trial_facts(store, state, settings)} if state.canary else None,
        "holds": [{"number": hold.number, "actor": hold.actor, "reason": hold.reason, "at": hold.at} for hold in state.holds],
        "pinned": sorted(state.pinned),
        "snapshots": snapshots,
        "store": str(settings.store_dir),
    }


def _trial_facts(store: Store, state: State, settings: Settings) -> dict[str, Any]:
    """What real traffic says of the canary so far: requests it answered, and the mean difference to the champion's in each quality."""
    if state.canary is None or state.champion is None:
        return {}
    trial = trial_of(store, snapshot_id=state.canary.snapshot_id, champion=state.champion.snapshot_id, settings=settings.canary)
    if trial is None:
        return {}
    differences = {signal.name: sum(signal.differences) / len(signal.differences) for signal in trial.signals}
    return {"requests": trial.requests, "differences": differences, "overlaps": dict(trial.overlaps)}


def _snapshot_facts(store: Store, snapshot_id: str) -> dict[str, Any]:
    """Facts of a snapshot, or what is wrong with it: a damaged one must not keep the others from being seen."""
    try:
        return _manifest_facts(read_manifest(store, snapshot_id))
    except SnapshotError as error:
        return {"snapshot_id": snapshot_id, "damaged": error.what}


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
        "override": asdict(override) if (override := promotion.override_of(store, release)) else None,
        "verdicts": {
            gate: {"outcome": verdict.outcome, "measured_at": verdict.measured_at, "summary": verdict.summary}
            for gate in GATES
            if (verdict := trusted_verdict(store, release.snapshot_id, gate))
        },
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
    for hold in facts["holds"]:
        console.print(f"[bold yellow]held[/] by {escape(hold['actor'])} since {hold['at']}: {escape(hold['reason'])}", highlight=False)
    if champion is None:
        console.print("Nothing is released yet. Make the first release with `ragline run`.")
        return
    shown = "  ".join(f"{name} {value:.3f}" for name, value in champion["metrics"].items() if name.startswith(("mrr_at", "ndcg", "recall")))
    console.print(
        f"[bold green]release {facts['release']}[/]  {champion['embedding_model']}  [dim]{champion['snapshot_id']}[/]", highlight=False
    )
    console.print(f"  {champion['documents']:,} documents, {champion['chunks']:,} chunks; {shown or 'not measured'}", highlight=False)
    print_grounds(console, champion)
    previous, canary = facts["previous"], facts["canary"]
    console.print(f"  previous: {previous['snapshot_id'] if previous else 'none'}", highlight=False)
    if canary:
        console.print(f"  [cyan]canary[/]: {canary['snapshot_id']} since entry {canary['number']}", highlight=False)
        means = ", ".join(f"{name.replace('_', ' ')} {mean:+.3f}" for name, mean in canary.get("differences", {}).items())
        console.print(f"    {canary.get('requests', 0):,} real requests; against the champion: {means or 'nothing yet'}", highlight=False)
    if facts["pinned"]:
        console.print(f"  pinned: {', '.join(facts['pinned'])}", highlight=False)


def print_grounds(console: Console, release: dict[str, Any]) -> None:
    """What a release stands on: its verdicts with their ages, or an override and its end."""
    override = release["override"]
    if override:
        how = f"[bold red]an override that expired at {override['expires_at']}[/]; `ragline run` lets the gates judge it, or roll back"
        until = f"[yellow]an override until {override['expires_at']}[/]"
        console.print(f"  stands on {how if override['expired'] else until}", highlight=False)
    now = datetime.now(UTC)
    for gate, verdict in release["verdicts"].items():
        age = (now - datetime.fromisoformat(verdict["measured_at"])).total_seconds() / 86400
        console.print(f"  {gate.replace('_', ' ')}: {verdict['outcome']}, {age:.1f} days old", highlight=False)


def follow(settings: Settings, number: int, *, patience_seconds: float = 5.0) -> tuple[float | None, str]:
    """Seconds until the serving process on this machine answered with release `number`, and the same in words; None when it did not."""
    host = "127.0.0.1" if settings.places.host == "0.0.0.0" else settings.places.host  # noqa: S104 - compared, not bound
    started = time.perf_counter()
    with httpx2.Client(base_url=f"http://{host}:{settings.places.serving_port}", trust_env=False, timeout=1) as client:
        while time.perf_counter() - started < patience_seconds:
            try:
                released = client.get("/readyz").json().get("release")
            except (httpx2.TransportError, ValueError, AttributeError):  # nobody, or another program
                return None, "No server answers here; those that run elsewhere follow by themselves."
            if released == number:
                seconds = round(time.perf_counter() - started, 3)
                return seconds, f"The running server followed after {seconds:.2f} s."
            time.sleep(0.02)
    return None, f"The running server did not follow within {patience_seconds:g} s: look at its /readyz."
