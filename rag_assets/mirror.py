"""MLflow brought up to what the store and the ledger say. It may be away: then nothing is lost, and the next call makes up for it."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from evals.collections import EvalSet
from rag_assets import steps
from rag_assets.comparison import champion_evaluation, comparable, compare_with_champion
from rag_assets.evaluation import Evaluation, read_evaluation
from rag_assets.gating import standings
from rag_assets.leaderboard import leaderboard_rows
from rag_assets.links import mlflow_version_url, without_login
from rag_assets.registry import Registry, registered_name
from rag_assets.tracking import Runs, TrackedRun, identity, parameters, stored_evaluations, tracking_uri
from rag_assets.workbench import Workbench
from rag_serving.errors import RaglineError, SnapshotError
from rag_serving.releases import Ledger
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest, read_manifest
from rag_serving.store import Store


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What MLflow holds now: runs by evaluation, versions by manifest hash, aliases with their versions, and how many runs are new."""

    runs: Mapping[str, TrackedRun]
    name: str
    versions: Mapping[str, str]
    aliases: Mapping[str, str]
    logged: int

    def links(self, settings: Settings, evaluation: Evaluation) -> dict[str, str]:
        """Addresses of an evaluation's run and of its snapshot's registered version, where MLflow has them."""
        run, version = self.runs.get(identity(evaluation)), self.versions.get(evaluation.manifest_sha256)
        links = {"mlflow_run": run.url} if run else {}
        return links | ({"mlflow_model_version": mlflow_version_url(settings, self.name, version)} if version else {})


def mirror(bench: Workbench, eval_set: EvalSet | None = None) -> Mirrored | None:
    """Log every evaluation that MLflow lacks, compare those like the champion's with it, and set the aliases to what the ledger says.

    `eval_set` is the one in use, where it is loaded already; evaluations on another are logged without the words of their queries. Idempotent;
    one process of a machine does it at a time. None, with a note, when there is no MLflow or it does not answer.
    """
    if not tracking_uri(bench.settings):
        return None
    try:
        with _alone(bench.settings):
            return _mirror(bench, eval_set or steps.load_eval_set(bench))
    except Exception as error:  # noqa: BLE001 - MLflow raises its own, requests', SQLAlchemy's; none may stop a measurement or a release
        first = without_login((str(error).splitlines() or [""])[0])[:200]
        bench.reporter.note(
            f"MLflow was not brought up to date ({type(error).__name__}: {first}); the store has it all, the next run tries again"
        )
        return None


def _mirror(bench: Workbench, eval_set: EvalSet) -> Mirrored:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking_uri(bench.settings), registry_uri=tracking_uri(bench.settings))
    runs = Runs(client, bench.settings, bench.store)
    registry = Registry(client, registered_name(bench.settings))
    evaluations = stored_evaluations(bench.store, note=bench.reporter.note)
    missing = [evaluation for evaluation in evaluations if identity(evaluation) not in runs.tracked]
    logged = sum(_log(bench, runs, registry, evaluation, eval_set) for evaluation in missing)
    state = Ledger(bench.store).state()
    for release in (state.champion, state.canary):
        measured = read_evaluation(bench.store, release.manifest_sha256, eval_set.sha256) if release else None
        if measured and identity(measured) in runs.tracked:
            _register(bench.store, runs, registry, measured)
    aliases = registry.mirror(state)
    champion = champion_evaluation(bench.store, eval_set)
    if champion and identity(champion) in runs.tracked:
        _compare(bench, runs, evaluations, champion, eval_set)
    return Mirrored(runs.tracked, registry.name, registry.versions, aliases, logged)


def _log(bench: Workbench, runs: Runs, registry: Registry, evaluation: Evaluation, eval_set: EvalSet) -> bool:
    """Log one evaluation; one whose rows are damaged is named and left out, so that it does not keep the others away."""
    manifest = _manifest(bench.store, evaluation)
    try:
        model_id = registry.logged_model(manifest, runs.experiment(evaluation), parameters(evaluation, manifest)) if manifest else None
        tracked = runs.log(evaluation, manifest, model_id, eval_set=eval_set)
        if manifest and model_id:
            registry.register(manifest, model_id, tracked.run_id)
    except RaglineError as error:
        bench.reporter.note(f"an evaluation of {evaluation.snapshot_id} is not in MLflow: {error}")
        return False
    return True


def _register(store: Store, runs: Runs, registry: Registry, evaluation: Evaluation) -> None:
    """See to the version of a released snapshot: its run may be from when the corpus had another name, or an attempt may have broken off."""
    manifest = _manifest(store, evaluation)
    if manifest and manifest.sha256 not in registry.versions:
        tracked = runs.tracked[identity(evaluation)]
        model_id = registry.logged_model(manifest, tracked.experiment_id, parameters(evaluation, manifest))
        registry.register(manifest, model_id, tracked.run_id)


def _compare(bench: Workbench, runs: Runs, evaluations: list[Evaluation], champion: Evaluation, eval_set: EvalSet) -> None:
    newest = {evaluation.manifest_sha256: evaluation for evaluation in evaluations if comparable(evaluation, champion)}
    for evaluation in newest.values():
        tracked = runs.tracked.get(identity(evaluation))
        if tracked and tracked.against != identity(champion):
            comparison = compare_with_champion(bench.store, evaluation, eval_set)
            if comparison:
                runs.compare(evaluation, comparison)
    found = standings(bench.store, steps.current_evaluations(bench, eval_set))
    if any(standing.status == "champion" for standing in found):
        runs.show_leaderboard(champion, leaderboard_rows(bench.store, found, alpha=bench.settings.gate.alpha))


def _manifest(store: Store, evaluation: Evaluation) -> Manifest | None:
    """The manifest of the snapshot, None when it was collected."""
    try:
        return read_manifest(store, evaluation.snapshot_id)
    except SnapshotError:
        return None


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Held by one process of this machine at a time, so that two runs do not log the same evaluation twice."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "mlflow.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
