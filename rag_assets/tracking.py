"""MLflow: one experiment an eval set, one run a (snapshot, eval set). The store is the evidence; MLflow shows it.

Logging is idempotent and may fail: an evaluation that did not reach MLflow is logged the next time it is read.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rag_assets.evaluation import Evaluation, read_rows
from rag_assets.workbench import Workbench
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest
from rag_serving.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TAG = "ragline.evaluation"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """Where an evaluation is in MLflow."""

    run_id: str
    experiment_id: str
    url: str


def track(settings: Settings, store: Store, manifest: Manifest, evaluation: Evaluation, *, dagster_run_id: str | None) -> TrackedRun:
    """Log an evaluation, or find the run that already holds it. Raises what MLflow raises; the caller decides what that means."""
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    client = mlflow.MlflowClient(tracking_uri=tracking_uri(settings))
    experiment_id = _experiment(client, settings, evaluation)
    identity = f"{evaluation.key}@{evaluation.measured_at}"
    found = client.search_runs(
        [experiment_id], filter_string=f"tags.`{_TAG}` = '{identity}' and attributes.status = 'FINISHED'", max_results=1
    )
    if found:
        return _tracked(settings, found[0].info.run_id, experiment_id)
    run = client.create_run(experiment_id, run_name=evaluation.embedding_model)
    run_id = run.info.run_id
    at = run.info.start_time
    metrics = {
        **evaluation.metrics,
        **{f"bm25_{name}": value for name, value in evaluation.bm25.items()},
        "ann_recall": evaluation.ann_recall,
    }
    tags = {
        _TAG: identity,
        "ragline.snapshot_id": evaluation.snapshot_id,
        "ragline.manifest_sha256": evaluation.manifest_sha256,
        "ragline.eval_set_sha256": evaluation.eval_set_sha256,
        "ragline.fingerprint": manifest.fingerprint,
        "dagster.run_id": dagster_run_id or "",
    }
    parameters = {
        "embedding_model": evaluation.embedding_model,
        "dims": manifest.dims,
        "documents": manifest.documents,
        "chunks": manifest.rows,
        "chunking": dict(manifest.chunking),
        "retrieval": dict(manifest.retrieval),
        "index": dict(manifest.index),
        "k": evaluation.k,
    }
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), at, 0) for name, value in metrics.items()],
        params=[Param(name, str(value)) for name, value in parameters.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    rows = read_rows(store, evaluation)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "retrieved"}
    client.log_table(run_id, data=columns, artifact_file="queries.json")
    client.set_terminated(run_id, status="FINISHED")
    return _tracked(settings, run_id, experiment_id)


def try_track(bench: Workbench, manifest: Manifest, evaluation: Evaluation, *, dagster_run_id: str | None) -> TrackedRun | None:
    """`track`, or None with a note when there is no MLflow or it does not answer: the evaluation is in the store all the same."""
    if not tracking_uri(bench.settings):
        return None
    try:
        return track(bench.settings, bench.store, manifest, evaluation, dagster_run_id=dagster_run_id)
    except Exception as error:  # noqa: BLE001 - MLflow raises its own, requests', SQLAlchemy's; none may lose an evaluation
        bench.reporter.note(f"MLflow was not reached ({type(error).__name__}); the evaluation is kept and logged at the next run")
        return None


def tracking_uri(settings: Settings) -> str | None:
    """The server of RAGLINE_MLFLOW_URL, else MLFLOW_TRACKING_URI, which the platform sets to the Postgres database."""
    return settings.places.mlflow_url or os.environ.get("MLFLOW_TRACKING_URI")


def _experiment(client: "MlflowClient", settings: Settings, evaluation: Evaluation) -> str:
    from mlflow.exceptions import MlflowException

    name = f"retrieval/{evaluation.eval_set}/{evaluation.eval_set_sha256[:8]}"
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    remote = (tracking_uri(settings) or "").startswith("http")
    try:
        return str(client.create_experiment(name, artifact_location=None if remote else (settings.home / "mlflow").as_uri()))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _tracked(settings: Settings, run_id: str, experiment_id: str) -> TrackedRun:
    base = settings.places.mlflow_url or f"http://{settings.places.host}:{settings.places.mlflow_port}"
    return TrackedRun(run_id, experiment_id, f"{base}/#/experiments/{experiment_id}/runs/{run_id}")
