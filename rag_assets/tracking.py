"""Evaluations in MLflow: one experiment an eval set, one run an evaluation. The store is the evidence; MLflow shows it.

Logging is idempotent: a run counts once it is FINISHED, and what a broken attempt left is deleted by the next one.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from evals.collections import EvalSet
from evals.metrics import Aggregate, aggregate
from evals.plots import difference_plot, mrr_plot, quality_latency_plot, slice_plot
from evals.regressions import Regression, relevant_documents
from evals.reports import LeaderboardRow, leaderboard_markdown
from rag_assets.comparison import Comparison
from rag_assets.evaluation import Evaluation, evaluation_history, read_evaluation, read_rows
from rag_assets.links import dagster_run_url, mlflow_run_url
from rag_assets.tracing import trace_id_of_run
from rag_serving.errors import StoreError
from rag_serving.settings import Settings
from rag_serving.signals.redaction import redacted
from rag_serving.snapshots import Manifest
from rag_serving.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENTS = "retrieval"
_EVALUATION, _AGAINST, _LEADERBOARD = "ragline.evaluation", "ragline.against", "ragline.leaderboard"
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")
_GOT = 3
_SLICES, _SLICE_QUERIES = 24, 10


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """Where an evaluation is in MLflow. `against` names the champion's evaluation that it is compared with there, "" for none."""

    run_id: str
    experiment_id: str
    url: str
    against: str = ""
    leaderboard: str = ""


def tracking_uri(settings: Settings) -> str | None:
    """The server of RAGLINE_MLFLOW_URL, else MLFLOW_TRACKING_URI, which the platform sets to the Postgres database."""
    return settings.places.mlflow_url or os.environ.get("MLFLOW_TRACKING_URI")


def identity(evaluation: Evaluation) -> str:
    """What tells one measurement from every other: snapshot, eval set and moment."""
    return f"{evaluation.key}@{evaluation.measured_at}"


def stored_evaluations(store: Store, *, note: Callable[[str], None]) -> list[Evaluation]:
    """Every evaluation in the store, of every snapshot, eval set and moment, oldest first; `note` hears of those that cannot be read."""
    found: dict[str, Evaluation] = {}
    for manifest in store.names("evaluations"):
        for eval_set in store.names(f"evaluations/{manifest}"):
            try:
                newest = read_evaluation(store, manifest, eval_set)
                measured = [*evaluation_history(store, manifest, eval_set), *([newest] if newest else [])]
            except StoreError as error:
                note(str(error))
                continue
            found |= {identity(evaluation): evaluation for evaluation in measured}
    return sorted(found.values(), key=lambda evaluation: (evaluation.measured_at, evaluation.key))


def remember_dagster_run(store: Store, evaluation: Evaluation, run_id: str) -> None:
    """Keep which Dagster run measured an evaluation, so that MLflow can name it however late it hears of it. A reused one has its run."""
    if not evaluation.reused:
        known = _dagster_runs(store, evaluation)
        store.write(f"{evaluation.key}/dagster.json", json.dumps({**known, evaluation.measured_at: run_id}, indent=2).encode())


def dagster_run_of(store: Store, evaluation: Evaluation) -> str | None:
    """The Dagster run that measured an evaluation, None when it was measured without one."""
    return _dagster_runs(store, evaluation).get(evaluation.measured_at)


def _dagster_runs(store: Store, evaluation: Evaluation) -> dict[str, str]:
    key = f"{evaluation.key}/dagster.json"
    try:
        known = json.loads(store.read(key)) if store.exists(key) else {}
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


class Runs:
    """The runs of one MLflow that are ours. Every method raises what MLflow raises; the caller decides what that means."""

    def __init__(self, client: "MlflowClient", settings: Settings, store: Store) -> None:
        self._client = client
        self._settings = settings
        self._store = store
        self.tracked: dict[str, TrackedRun] = {}
        self._broken: dict[str, list[str]] = {}
        for run in _our_runs(client):
            name = run.data.tags[_EVALUATION]
            if run.info.status == "FINISHED":
                self.tracked[name] = self._tracked(run)
            else:
                self._broken.setdefault(name, []).append(run.info.run_id)

    def log(self, evaluation: Evaluation, manifest: Manifest | None, model_id: str | None, *, eval_set: EvalSet | None) -> TrackedRun:
        """Log an evaluation as a finished run; `eval_set` adds the words of each query where it is the one that was measured."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param

        measured = read_rows(self._store, evaluation)
        for left in self._broken.pop(identity(evaluation), ()):
            self._client.delete_run(left)
        at = _milliseconds(evaluation)
        dataset = Dataset(
            name=evaluation.eval_set,
            digest=evaluation.eval_set_sha256[:32],
            source_type="ragline",
            source=json.dumps({"eval_set": evaluation.eval_set, "sha256": evaluation.eval_set_sha256}),
            profile=json.dumps({"queries": int(evaluation.metrics.get("queries", 0))}),
        )
        run = self._client.create_run(
            self.experiment(evaluation), start_time=at, run_name=evaluation.embedding_model, tags=self._tags(evaluation, manifest)
        )
        run_id = run.info.run_id
        models = [LoggedModelInput(model_id)] if model_id else []
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "eval")])], models=models)
        self._client.log_batch(
            run_id,
            metrics=[
                Metric(name, value, at, 0, model_id=model_id, dataset_name=dataset.name, dataset_digest=dataset.digest)
                for name, value in _metrics(evaluation).items()
            ],
            params=[Param(name, value) for name, value in parameters(evaluation, manifest).items()],
        )
        known = eval_set if eval_set and eval_set.sha256 == evaluation.eval_set_sha256 else None
        self._client.log_table(run_id, data=_table(measured, known), artifact_file="queries.json")
        rows = [_row(evaluation, "this run"), LeaderboardRow("BM25", evaluation.bm25, None, "baseline")]
        self._client.log_figure(run_id, mrr_plot(rows, k=evaluation.k, floor=self._settings.gate.mrr_floor), "mrr.png")
        if slices := _slices(measured):
            self._client.log_figure(run_id, slice_plot(slices, k=evaluation.k), "slices.png")
        self._client.set_terminated(run_id, status="FINISHED", end_time=at)
        return self._remember(evaluation, self._client.get_run(run_id))

    def compare(self, evaluation: Evaluation, comparison: Comparison) -> None:
        """Add to the run of an evaluation how it stands against the champion: figures, the queries that lost most, and two pictures.

        Each champion has a folder of its own, so that a comparison with the next one takes nothing away. Done once a champion's evaluation.
        """
        from mlflow.entities import Metric, RunTag

        tracked = self.tracked[identity(evaluation)]
        champion = comparison.champion
        if tracked.against == identity(champion):
            return
        run_id, folder = tracked.run_id, f"against/{champion.snapshot_id}/{champion.measured_at.replace(':', '')}"
        there = {artifact.path for artifact in self._client.list_artifacts(run_id, folder)}
        if comparison.regressions and f"{folder}/regressions.json" not in there:  # log_table appends to what is there
            columns = {name: [getattr(each, name) for each in comparison.regressions] for name in Regression.__slots__}
            self._client.log_table(run_id, data=columns, artifact_file=f"{folder}/regressions.json")
        names = {"candidate": evaluation.embedding_model, "champion": champion.embedding_model}
        self._client.log_figure(run_id, difference_plot(comparison.differences, k=evaluation.k, **names), f"{folder}/differences.png")
        rows = [_row(evaluation, "this run"), _row(champion, "champion")]
        self._client.log_figure(run_id, mrr_plot(rows, k=evaluation.k, floor=self._settings.gate.mrr_floor), f"{folder}/mrr.png")
        metric = Metric("mrr_difference_to_champion", comparison.mean, int(time.time() * 1000), 0)  # the newest counts
        self._client.log_batch(run_id, metrics=[metric], tags=[RunTag(_AGAINST, identity(champion))])
        self._remember(evaluation, self._client.get_run(run_id))

    def show_leaderboard(self, champion: Evaluation, rows: Sequence[LeaderboardRow]) -> None:
        """Put the leaderboard and its picture on the champion's run; nothing is done when they are there already."""
        tracked = self.tracked[identity(champion)]
        text = leaderboard_markdown(rows, k=champion.k)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if tracked.leaderboard == digest:
            return
        figure = quality_latency_plot(rows, k=champion.k, champion=champion.snapshot_id, floor=self._settings.gate.mrr_floor)
        self._client.log_text(tracked.run_id, text, "leaderboard/leaderboard.md")
        self._client.log_figure(tracked.run_id, figure, "leaderboard/quality_latency.png")
        self._client.set_tag(tracked.run_id, _LEADERBOARD, digest)
        self._remember(champion, self._client.get_run(tracked.run_id))

    def experiment(self, evaluation: Evaluation) -> str:
        """Id of the experiment of an evaluation's eval set, made when it is absent."""
        from mlflow.exceptions import MlflowException

        name = f"{EXPERIMENTS}/{evaluation.eval_set}/{evaluation.eval_set_sha256[:8]}"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            remote = (tracking_uri(self._settings) or "").startswith("http")
            place = None if remote else (self._settings.home / "mlflow").absolute().as_uri()
            try:
                return str(self._client.create_experiment(name, artifact_location=place))
            except MlflowException:  # made by another process a moment ago
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _remember(self, evaluation: Evaluation, run: "Run") -> TrackedRun:
        self.tracked[identity(evaluation)] = self._tracked(run)
        return self.tracked[identity(evaluation)]

    def _tracked(self, run: "Run") -> TrackedRun:
        run_id, experiment_id = run.info.run_id, run.info.experiment_id
        url = mlflow_run_url(self._settings, experiment_id, run_id)
        return TrackedRun(run_id, experiment_id, url, run.data.tags.get(_AGAINST, ""), run.data.tags.get(_LEADERBOARD, ""))

    def _tags(self, evaluation: Evaluation, manifest: Manifest | None) -> dict[str, str]:
        dagster_run = dagster_run_of(self._store, evaluation)
        link = f"\n\n[Dagster run {dagster_run[:8]}]({dagster_run_url(self._settings, dagster_run)})" if dagster_run else ""
        tags = {
            _EVALUATION: identity(evaluation),
            "ragline.snapshot_id": evaluation.snapshot_id,
            "ragline.manifest_sha256": evaluation.manifest_sha256,
            "ragline.eval_set_sha256": evaluation.eval_set_sha256,
            "ragline.corpus_sha256": evaluation.corpus_sha256,
            "ragline.query_code": evaluation.query_code,
            "mlflow.note.content": f"Snapshot `{evaluation.snapshot_id}` measured on `{evaluation.eval_set}`.{link}",
        }
        if manifest:
            tags["ragline.fingerprint"] = manifest.fingerprint
        if dagster_run:
            tags |= {"dagster.run_id": dagster_run, "dagster.run_url": dagster_run_url(self._settings, dagster_run)}
            tags["ragline.trace_id"] = trace_id_of_run(dagster_run)
        return tags


def _our_runs(client: "MlflowClient") -> Iterator["Run"]:
    """Every run of ours in any experiment of ours."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments(filter_string=f"name LIKE '{EXPERIMENTS}/%'")]
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, filter_string=f"tags.`{_EVALUATION}` LIKE 'evaluations/%'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _milliseconds(evaluation: Evaluation) -> int:
    """When it was measured, in milliseconds since 1970: an evaluation that is logged late stands where it belongs in time."""
    return int(datetime.fromisoformat(evaluation.measured_at).timestamp() * 1000)


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    """Every finite number of an evaluation, under names that MLflow accepts."""
    words = {f"bm25_{name}": value for name, value in evaluation.bm25.items()}
    found = {**evaluation.metrics, **words, "ann_recall": evaluation.ann_recall}
    return {_NOT_ALLOWED.sub("_", name): float(value) for name, value in found.items() if math.isfinite(value)}


def parameters(evaluation: Evaluation, manifest: Manifest | None) -> dict[str, str]:
    """What was chosen for a snapshot and its measurement, as text; less where the snapshot is not in the store any more."""
    chosen: dict[str, Any] = {"embedding_model": evaluation.embedding_model, "k": evaluation.k, "eval_set": evaluation.eval_set}
    if manifest:
        chosen |= {"dims": manifest.dims, "documents": manifest.documents, "chunks": manifest.rows}
        chosen |= {
            f"{part}.{name}": value for part in ("chunking", "index", "retrieval") for name, value in getattr(manifest, part).items()
        }
    return {name: str(value) for name, value in chosen.items()}


def _table(rows: Sequence[Mapping[str, Any]], eval_set: EvalSet | None) -> dict[str, list[Any]]:
    """The rows by column, with the first documents that came and, from the eval set, what was asked and expected."""
    texts = {query.query_id: redacted(query.text) for query in eval_set.queries} if eval_set else {}
    table: dict[str, list[Any]] = {"query_id": [row["query_id"] for row in rows]}
    if eval_set:
        table["query"] = [texts.get(row["query_id"], "") for row in rows]
        table["expected"] = [relevant_documents(eval_set.qrels[row["query_id"]]) for row in rows]
    table["got"] = [list(row["retrieved"][:_GOT]) for row in rows]
    return table | {name: [row[name] for row in rows] for name in rows[0] if name not in {"query_id", "retrieved"}}


def _slices(rows: Sequence[Mapping[str, Any]]) -> dict[str, Aggregate]:
    """MRR of each slice that has enough queries to be looked at, the worst first; a slice that holds every query is none."""
    members: dict[str, list[float]] = {}
    for row in rows:
        for name in row["slices"]:
            members.setdefault(name, []).append(row["reciprocal_rank"])
    found = {name: aggregate(ranks) for name, ranks in members.items() if _SLICE_QUERIES <= len(ranks) < len(rows)}
    return dict(sorted(found.items(), key=lambda item: (item[1].mean, item[0]))[:_SLICES])


def _row(evaluation: Evaluation, status: str) -> LeaderboardRow:
    return LeaderboardRow(evaluation.embedding_model, evaluation.metrics, evaluation.snapshot_id, status)
