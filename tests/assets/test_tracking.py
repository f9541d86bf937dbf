"""MLflow as a mirror of the store and the ledger, on a real MLflow database: once, twice, late, after a break; and that it decides nothing."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from generated_corpus import evaluated, settings_for, write_corpus
from mlflow_server import NOISE, database, migrated

from rag_assets import steps
from rag_assets.evaluation import read_rows
from rag_assets.mirror import mirror
from rag_assets.tracking import identity, remember_dagster_run, stored_evaluations
from rag_assets.workbench import Workbench
from rag_serving import promotion
from rag_serving.errors import PromotionRefused
from rag_serving.releases import Action, Ledger
from rag_serving.snapshots import read_manifest

pytestmark = [pytest.mark.timeout(300), *(pytest.mark.filterwarnings(each) for each in NOISE)]
WEAK, FAIR, STRONG = "hashing-64", "hashing-128", "hashing-256"
DAGSTER_RUN = "7d1f7f0e-0000-4000-8000-000000000000"


class Notes:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def bar(self, title: str):
        from rag_assets.workbench import LogReporter

        return LogReporter().bar(title)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    return migrated(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with a corpus and a store where three models were measured, the strong one by a Dagster run. Not to be changed."""
    root = tmp_path_factory.mktemp("tracked")
    queries = write_corpus(root / "beir", documents=80, queries=60) / "queries.jsonl"
    rows = [json.loads(line) for line in queries.read_text(encoding="utf-8").splitlines()]
    grouped = [{**row, "metadata": {"kind": ("plain", "odd")[place % 2]}} for place, row in enumerate(rows)]
    queries.write_text("\n".join(map(json.dumps, grouped)), encoding="utf-8")
    bench = Workbench(settings_for(root))
    found = {name: evaluated(bench, name) for name in (WEAK, FAIR, STRONG)}
    remember_dagster_run(bench.store, found[STRONG], DAGSTER_RUN)
    return root


@pytest.fixture
def bench(measured, tmp_path) -> Workbench:
    shutil.copytree(measured, tmp_path / "line")
    return Workbench(settings_for(tmp_path / "line"), reporter=Notes())


@pytest.fixture
def client(template, tmp_path, monkeypatch):
    """A client of a private MLflow database, which is the one that `bench` mirrors to."""
    import mlflow

    return mlflow.MlflowClient(tracking_uri=database(template, tmp_path, monkeypatch))


@pytest.fixture(scope="module")
def mirrored(measured, template, tmp_path_factory):
    """A line whose strong model is live, mirrored once: (bench, client, what the mirror returned). Only to be looked at."""
    import mlflow

    folder = tmp_path_factory.mktemp("mirrored")
    shutil.copytree(measured, folder / "line")
    bench = Workbench(settings_for(folder / "line"), reporter=Notes())
    promote(bench, STRONG)
    with pytest.MonkeyPatch.context() as patch:
        client = mlflow.MlflowClient(tracking_uri=database(template, folder, patch))
        yield bench, client, mirror(bench)


def snapshot_of(bench: Workbench, name: str) -> str:
    return steps.current_snapshot(bench, name).snapshot_id


def evaluation_of(bench: Workbench, name: str):
    (found,) = [each for each in stored_evaluations(bench.store, note=pytest.fail) if each.embedding_model == name]
    return found


def promote(bench: Workbench, name: str) -> None:
    promotion.promote(bench.store, snapshot_of(bench, name), gate=bench.settings.gate, actor="tester", reason="for a test", override=True)


def run_of(client, shown, evaluation):
    return client.get_run(shown.runs[identity(evaluation)].run_id)


def artifacts(client, run_id: str, folder: str | None = None) -> set[str]:
    """Every file of a run."""
    found = set()
    for each in client.list_artifacts(run_id, folder):
        found |= artifacts(client, run_id, each.path) if each.is_dir else {each.path}
    return found


def table(client, run_id: str, path: str, folder) -> list[dict]:
    """The rows of a logged table."""
    folder.mkdir(exist_ok=True)
    with open(client.download_artifacts(run_id, path, str(folder)), encoding="utf-8") as file:  # noqa: PTH123 - MLflow gives a string
        loaded = json.load(file)
    return [dict(zip(loaded["columns"], row, strict=True)) for row in loaded["data"]]


def everything(client) -> dict[str, object]:
    """What MLflow holds, for comparing before and after."""
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = {
        run.info.run_id: (run.data.metrics, run.data.tags, artifacts(client, run.info.run_id)) for run in client.search_runs(experiments)
    }
    versions = sorted((each.name, each.version, each.source) for each in client.search_model_versions())
    return {"runs": runs, "versions": versions, "models": len(client.search_logged_models(experiments))}


def test_an_evaluation_is_one_run_with_all_that_was_measured(mirrored, tmp_path):
    """The run has identity, choices, every metric with its interval and latency, links to Dagster, and a row a query with its words."""
    bench, client, shown = mirrored
    evaluation = evaluation_of(bench, STRONG)
    run, manifest = run_of(client, shown, evaluation), read_manifest(bench.store, evaluation.snapshot_id)
    assert client.get_experiment(run.info.experiment_id).name == f"retrieval/beir/{evaluation.eval_set_sha256[:8]}"
    assert run.info.status == "FINISHED"
    assert run.info.start_time == run.info.end_time == datetime.fromisoformat(evaluation.measured_at).timestamp() * 1000
    wanted = {
        "ragline.snapshot_id": evaluation.snapshot_id,
        "ragline.manifest_sha256": manifest.sha256,
        "ragline.fingerprint": manifest.fingerprint,
        "ragline.eval_set_sha256": evaluation.eval_set_sha256,
        "dagster.run_id": DAGSTER_RUN,
        "dagster.run_url": f"http://127.0.0.1:3000/runs/{DAGSTER_RUN}",
    }
    assert wanted.items() <= run.data.tags.items()
    assert wanted["dagster.run_url"] in run.data.tags["mlflow.note.content"]
    assert run.data.metrics.items() >= {name: value for name, value in evaluation.metrics.items() if math.isfinite(value)}.items()
    assert {
        "mrr_at_10_low",
        "mrr_at_10_high",
        "latency_p50_ms",
        "latency_p95_ms",
        "bm25_mrr_at_10",
        "ann_recall",
    } <= run.data.metrics.keys()
    assert {"embedding_model": STRONG, "dims": "256", "k": "10", "chunks": str(manifest.rows)}.items() <= run.data.params.items()
    assert run.data.params["retrieval.candidates"] == "100"
    rows = {row["query_id"]: row for row in table(client, run.info.run_id, "queries.json", tmp_path / "down")}
    queries = steps.load_eval_set(bench)
    assert {row["query_id"]: row["rank"] for row in read_rows(bench.store, evaluation)} == {each: row["rank"] for each, row in rows.items()}
    assert rows["q7"]["query"] == next(query.text for query in queries.queries if query.query_id == "q7")
    assert rows["q7"]["expected"] == list(queries.qrels["q7"])
    assert len(rows["q7"]["got"]) == 3
    assert {"queries.json", "mrr.png", "slices.png"} <= artifacts(client, run.info.run_id)


def test_the_eval_set_is_the_runs_dataset_and_the_snapshot_its_model(mirrored):
    """Metrics are found by logged model and dataset; each snapshot is a registered version of the corpus' model that leads to its run."""
    bench, client, shown = mirrored
    evaluation = evaluation_of(bench, STRONG)
    run = run_of(client, shown, evaluation)
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("beir", evaluation.eval_set_sha256[:32])
    assert {tag.key: tag.value for tag in dataset.tags} == {"mlflow.data.context": "eval"}
    (model_input,) = run.inputs.model_inputs
    model = client.get_logged_model(model_input.model_id)
    assert (model.name, model.model_type, model.status) == (evaluation.snapshot_id, "retriever", "READY")
    linked = {metric.key: metric for metric in model.metrics}["mrr_at_10"]
    assert (linked.value, linked.dataset_digest, linked.run_id) == (evaluation.mrr, evaluation.eval_set_sha256[:32], run.info.run_id)
    best = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"metrics.mrr_at_10 >= {evaluation.mrr}", datasets=[{"dataset_name": "beir"}]
    )
    assert model.model_id in {each.model_id for each in best}
    version = client.get_model_version("retriever-beir-beir", shown.versions[evaluation.manifest_sha256])
    assert (version.run_id, version.tags["ragline.snapshot_id"]) == (run.info.run_id, evaluation.snapshot_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "retriever-beir-beir", "version": str(version.version)}]
    assert len(client.search_model_versions("name = 'retriever-beir-beir'")) == 3
    links = shown.links(bench.settings, evaluation)
    assert links["mlflow_run"].endswith(f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
    assert links["mlflow_model_version"].endswith(f"/#/models/retriever-beir-beir/versions/{version.version}")


def test_mirroring_again_changes_nothing(mirrored):
    """A second and a third time nothing is logged, compared or registered anew, and no alias moves."""
    bench, client, shown = mirrored
    assert (shown.logged, len(shown.runs), len(shown.versions)) == (3, 3, 3)
    before = everything(client)
    for _ in range(2):
        again = mirror(bench)
        assert (again.logged, again.runs, again.aliases) == (0, shown.runs, shown.aliases)
    assert everything(client) == before


def test_two_processes_at_once_log_each_evaluation_once(bench, client):
    """Of two that mirror at the same moment one logs everything and the other nothing."""
    queries = steps.load_eval_set(bench)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: mirror(bench, queries), range(2)))
    assert sorted(each.logged for each in found) == [0, 3]
    assert bench.reporter.said == []


def test_a_weaker_model_is_compared_with_the_champion(mirrored, tmp_path):
    """Its run holds the queries that lost most, with what was asked, expected and got and the rank before and after, and two pictures."""
    bench, client, shown = mirrored
    weak, champion = evaluation_of(bench, WEAK), evaluation_of(bench, STRONG)
    run = run_of(client, shown, weak)
    (folder,) = {path.rpartition("/")[0] for path in artifacts(client, run.info.run_id) if path.startswith("against/")}
    assert champion.snapshot_id in folder
    assert artifacts(client, run.info.run_id, folder) == {f"{folder}/{name}" for name in ("regressions.json", "differences.png", "mrr.png")}
    before = {row["query_id"]: row for row in read_rows(bench.store, champion)}
    after = {row["query_id"]: row for row in read_rows(bench.store, weak)}
    lost = {each: after[each]["reciprocal_rank"] - before[each]["reciprocal_rank"] for each in before}
    rows = table(client, run.info.run_id, f"{folder}/regressions.json", tmp_path / "down")
    assert {row["query_id"]: row["difference"] for row in rows} == pytest.approx({each: by for each, by in lost.items() if by < 0})
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in rows)
    worst = rows[0]
    assert (worst["rank_before"], worst["rank_after"]) == (before[worst["query_id"]]["rank"], after[worst["query_id"]]["rank"])
    assert worst["expected"] == [f"d{worst['query_id'][1:]}"]
    assert run.data.metrics["mrr_difference_to_champion"] == pytest.approx(weak.mrr - champion.mrr)
    assert not any(path.startswith("against/") for path in artifacts(client, shown.runs[identity(champion)].run_id))


def test_the_next_champion_is_compared_with_beside_the_last(bench, client):
    """After another promotion a run has a comparison with each champion, and the newest difference is its metric."""
    promote(bench, FAIR)
    mirror(bench)
    promote(bench, STRONG)
    run = run_of(client, mirror(bench), evaluation_of(bench, WEAK))
    compared = {path.split("/")[1] for path in artifacts(client, run.info.run_id) if path.startswith("against/")}
    assert compared == {snapshot_of(bench, FAIR), snapshot_of(bench, STRONG)}
    difference = evaluation_of(bench, WEAK).mrr - evaluation_of(bench, STRONG).mrr
    assert run.data.metrics["mrr_difference_to_champion"] == pytest.approx(difference)


def test_the_champions_run_shows_the_leaderboard(mirrored, tmp_path):
    """Table and picture of all models are on the run of the champion, and only there."""
    bench, client, shown = mirrored
    champion = shown.runs[identity(evaluation_of(bench, STRONG))]
    assert {"leaderboard/leaderboard.md", "leaderboard/quality_latency.png"} <= artifacts(client, champion.run_id)
    text = client.download_artifacts(champion.run_id, "leaderboard/leaderboard.md", str(tmp_path))
    with open(text, encoding="utf-8") as file:  # noqa: PTH123 - MLflow gives a string
        board = file.read()
    assert all(name in board for name in (WEAK, FAIR, STRONG, "BM25"))
    assert not any("leaderboard" in path for path in artifacts(client, shown.runs[identity(evaluation_of(bench, WEAK))].run_id))


def test_aliases_follow_the_ledger(bench, client):
    """The champion is the live snapshot through promotion and rollback, challenger the one in a canary until that ends."""

    def aliased() -> dict[str, str]:
        aliases = mirror(bench).aliases
        assert {alias: str(version) for alias, version in client.get_registered_model("retriever-beir-beir").aliases.items()} == aliases
        return {alias: client.get_model_version_by_alias("retriever-beir-beir", alias).tags["ragline.snapshot_id"] for alias in aliases}

    assert aliased() == {}
    promote(bench, FAIR)
    assert aliased() == {"champion": snapshot_of(bench, FAIR)}
    promote(bench, STRONG)
    assert aliased() == {"champion": snapshot_of(bench, STRONG)}
    ledger, weak = Ledger(bench.store), read_manifest(bench.store, snapshot_of(bench, WEAK))
    ledger.append(
        Action.CANARY,
        after=ledger.last_number(),
        actor="tester",
        reason="try it",
        snapshot_id=weak.snapshot_id,
        manifest_sha256=weak.sha256,
    )
    assert aliased() == {"champion": snapshot_of(bench, STRONG), "challenger": weak.snapshot_id}
    ledger.append(Action.ABORT, after=ledger.last_number(), actor="tester", reason="it was worse")
    promotion.rollback(bench.store, actor="tester", reason="for a test")
    assert aliased() == {"champion": snapshot_of(bench, FAIR)}


def test_an_alias_set_by_hand_decides_nothing(bench, client):
    """Somebody moves the champion alias in MLflow: the release stays, a promotion still needs its evidence, and the alias is put right."""
    promote(bench, STRONG)
    shown = mirror(bench)
    weak = shown.versions[evaluation_of(bench, WEAK).manifest_sha256]
    client.set_registered_model_alias("retriever-beir-beir", "champion", weak)
    client.set_registered_model_alias("retriever-beir-beir", "challenger", weak)
    assert Ledger(bench.store).state().champion.snapshot_id == snapshot_of(bench, STRONG)
    with pytest.raises(PromotionRefused):
        promotion.promote(bench.store, snapshot_of(bench, WEAK), gate=bench.settings.gate, actor="tester", reason="MLflow says so")
    mirror(bench)
    aliases = client.get_registered_model("retriever-beir-beir").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"champion": shown.aliases["champion"]}


def test_a_broken_attempt_is_made_good(bench, client):
    """A run that was begun and never finished, as after a kill, is deleted, and the evaluation has one finished run."""
    evaluation = evaluation_of(bench, WEAK)
    name, place = f"retrieval/beir/{evaluation.eval_set_sha256[:8]}", (bench.settings.root / "kept").as_uri()
    experiment = client.create_experiment(name, artifact_location=place)
    left = client.create_run(experiment, tags={"ragline.evaluation": identity(evaluation)}).info.run_id
    client.create_logged_model(
        experiment, name=evaluation.snapshot_id, tags={"ragline.manifest_sha256": evaluation.manifest_sha256}, model_type="retriever"
    )
    shown = mirror(bench)
    assert client.get_run(left).info.lifecycle_stage == "deleted"
    found = client.search_runs([experiment], filter_string=f"tags.`ragline.evaluation` = '{identity(evaluation)}'")
    assert [(run.info.run_id, run.info.status) for run in found] == [(shown.runs[identity(evaluation)].run_id, "FINISHED")]
    assert evaluation.manifest_sha256 in shown.versions


def test_without_mlflow_everything_else_goes_on_and_is_made_up_for(bench, client, monkeypatch):
    """While MLflow is away a measurement and a promotion stand; afterwards runs and alias are there, dated as measured. Its login is never said."""
    url = client.tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ana:S3CRET@127.0.0.1:9")
    assert mirror(bench) is None
    assert "MLflow was not brought up to date" in bench.reporter.said[-1]
    assert "S3CRET" not in str(bench.reporter.said)
    promote(bench, STRONG)
    assert mirror(bench) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    shown = mirror(bench)
    assert shown.logged == 3
    assert shown.aliases["champion"] == shown.versions[evaluation_of(bench, STRONG).manifest_sha256]
    run = run_of(client, shown, evaluation_of(bench, STRONG))
    assert run.data.tags["dagster.run_id"] == DAGSTER_RUN
    assert run.info.start_time == datetime.fromisoformat(evaluation_of(bench, STRONG).measured_at).timestamp() * 1000


def test_no_mlflow_is_no_complaint(bench, monkeypatch):
    """Where none is configured nothing is said."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mirror(bench) is None
    assert bench.reporter.said == []


@pytest.mark.parametrize("damaged", ["queries-", "at-"], ids=["rows", "figures"])
def test_a_damaged_evaluation_is_named_and_keeps_no_other_away(bench, client, damaged):
    """Its file is named in a note, and the others are logged."""
    evaluation = evaluation_of(bench, WEAK)
    name = next(name for name in bench.store.names(evaluation.key) if name.startswith(damaged))
    bench.store.write(f"{evaluation.key}/{name}", b"damaged")
    shown = mirror(bench)
    assert identity(evaluation) not in shown.runs
    assert len(shown.runs) == 2
    assert any(name in said for said in bench.reporter.said)


def test_a_collected_snapshot_still_has_its_run(bench, client):
    """An evaluation whose snapshot is no longer in the store is logged without a model, by what the evaluation says."""
    evaluation = evaluation_of(bench, WEAK)
    shutil.rmtree(bench.store.folder(f"snapshots/{evaluation.snapshot_id}"))
    (bench.store.root / "corpus" / f"snapshot-{WEAK}.json").unlink()
    shown = mirror(bench)
    run = run_of(client, shown, evaluation)
    assert run.inputs.model_inputs == []
    assert run.data.metrics["mrr_at_10"] == evaluation.mrr
    assert evaluation.manifest_sha256 not in shown.versions


def test_an_evaluation_on_another_eval_set_has_its_own_experiment(bench, client, tmp_path):
    """It is logged under its own eval set, without the words it cannot know, and is compared with nobody's champion."""
    promote(bench, STRONG)
    queries = bench.settings.root / "beir" / "queries.jsonl"
    lines = queries.read_text(encoding="utf-8").splitlines()
    old = steps.load_eval_set(bench)
    queries.write_text("\n".join(lines[:-1]), encoding="utf-8")
    judged = bench.settings.root / "beir" / "qrels" / "test.tsv"
    judged.write_text("\n".join(judged.read_text(encoding="utf-8").splitlines()[:-1]) + "\n", encoding="utf-8")
    new = steps.load_eval_set(bench)
    assert new.sha256 != old.sha256
    again = steps.measure_current(bench, WEAK, new)
    shown = mirror(bench)
    assert shown.logged == 4
    first = run_of(
        client, shown, next(each for each in stored_evaluations(bench.store, note=pytest.fail) if each.eval_set_sha256 == old.sha256)
    )
    other = run_of(client, shown, again)
    assert first.info.experiment_id != other.info.experiment_id
    assert "query" not in table(client, first.info.run_id, "queries.json", tmp_path / "down")[0]
    assert not any(path.startswith("against/") for path in artifacts(client, first.info.run_id) | artifacts(client, other.info.run_id))
