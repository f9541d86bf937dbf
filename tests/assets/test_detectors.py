"""Drift of a release: each detector on a line that is as it was, and on one where something really changed."""

import io
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generated_corpus import evaluated, settings_for, write_corpus
from live_server import running
from pydantic import SecretStr

from rag_assets import cutting, detectors, steps
from rag_assets.drift import DETECTORS, DriftReport, keep_report, last_weekly_success, latest_findings, latest_report, read_reports
from rag_assets.evaluation import evaluation_history, query_slices
from rag_assets.workbench import Workbench
from rag_serving import embedder
from rag_serving.errors import SnapshotError, StoreError
from rag_serving.promotion import promote, rollback
from rag_serving.releases import Ledger
from rag_serving.settings import Drift, ModelSpec, Places
from rag_serving.snapshots import snapshot_key

NAME = "hashing-256"
DOCUMENTS, QUERIES = 90, 60
LOST = "distinct_documents_at_10_at_release"
ALL: tuple[Callable[[Workbench], DriftReport], ...] = (
    detectors.evaluation_drift,
    detectors.embedding_drift,
    detectors.query_drift,
    detectors.corpus_drift,
    detectors.index_health,
)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A folder with a corpus and a store where hashing-256 is live, and was measured, after hashing-64. Not to be changed."""
    root = tmp_path_factory.mktemp("drift")
    write_corpus(root / "beir", documents=DOCUMENTS, queries=QUERIES)
    bench = Workbench(settings_for(root))
    live, earlier = evaluated(bench, NAME).snapshot_id, steps.snapshot_corpus(bench, "hashing-64").manifest.snapshot_id
    for snapshot_id in (earlier, live):
        promote(bench.store, snapshot_id, gate=bench.settings.gate, actor="tester", reason="for a test", override=True)
    time.sleep(1.1)  # evaluations are told apart by the second
    return root


@pytest.fixture
def root(release, tmp_path) -> Path:
    shutil.copytree(release, tmp_path / "line")
    return tmp_path / "line"


@pytest.fixture
def bench(root) -> Workbench:
    return Workbench(settings_for(root))


def other_corpus(root: Path) -> None:
    """70 documents in other words, in place of the corpus."""
    shutil.rmtree(root / "beir")
    write_corpus(root / "beir", documents=70, queries=QUERIES, seed=8)


def champion(bench: Workbench) -> str:
    return Ledger(bench.store).state().champion.snapshot_id


def swapped(root: Path, **changes) -> Workbench:
    """The same line with another model in the row of the champion's name."""
    row = {"name": NAME, "source": "hashing:256", "dims": 256, "max_tokens": 256}
    return Workbench(settings_for(root, models=(ModelSpec(**{**row, **changes}),)))


def computing_otherwise(bench: Workbench, share: float) -> Workbench:
    """The same model by its fingerprint, on a runtime whose vectors are partly noise: a share 1 has nothing of the old ones."""
    model, rng = bench.model(NAME), np.random.default_rng(0)

    def raw(texts):
        rows = model.raw(texts)
        noise = rng.normal(size=rows.shape) * np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(rows.shape[1])
        return ((1 - share) * rows + share * noise).astype(np.float32)

    bench._models[NAME] = replace(model, raw=raw)
    return bench


def kinds(bench: Workbench) -> set[tuple[str, str]]:
    return {(finding.kind, finding.severity) for finding in latest_findings(bench.store)}


def observe(bench: Workbench, name: str, queries: list[str]) -> None:
    """What serving keeps of requests where their words may be kept."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"query": queries, "snapshot_id": ["s"] * len(queries)}), buffer)
    bench.store.write(f"observations/{name}/120000.parquet", buffer.getvalue())


def now(*, days_ago: float = 0.0) -> str:
    return (datetime.now(UTC) - timedelta(days=days_ago)).isoformat(timespec="seconds")


def backdate(bench: Workbench, report: DriftReport, days: float) -> DriftReport:
    """The report as if it had been kept that many days earlier, in place of today's."""
    (bench.store.root / "drift" / report.detector / f"{report.at[:10]}.json").unlink()
    return keep_report(bench.store, replace(report, at=now(days_ago=days)))


def test_nothing_released_is_no_drift(tmp_path):
    """Before the first release every detector says so; that counts as no week of a release."""
    bench = Workbench(settings_for(tmp_path))
    assert last_weekly_success(bench.store) is None
    assert {detect(bench).summary for detect in ALL} == {"nothing is released yet."}
    assert latest_findings(bench.store) == []
    assert last_weekly_success(bench.store) is None


def test_an_untouched_release_has_no_findings(bench):
    """Where nothing changed: the MRR of the release to the last digit, cosines of 1, an index that finds nearly all, no findings."""
    reports = {report.detector: report for report in (detect(bench) for detect in ALL)}
    assert set(reports) == set(DETECTORS)
    assert latest_findings(bench.store) == []
    assert {report.snapshot_id for report in reports.values()} == {champion(bench)}
    numbers = reports["evaluation"].numbers
    assert numbers["mrr"] == numbers["mrr_at_release"] == numbers["mrr_at_10"]
    assert (numbers["difference"], numbers["p_worse"], numbers["below_floor"]) == (0.0, 1.0, 0.0)
    assert reports["embedding"].numbers["cosine_mean"] == pytest.approx(1, abs=1e-6)
    assert reports["embedding"].numbers["probes"] == DOCUMENTS
    assert reports["query"].numbers["p_mmd"] > 0.5
    assert reports["index"].numbers["ann_recall"] >= 0.95
    assert reports["index"].numbers["unindexed_rows"] == 0
    assert reports["index"].numbers["distinct_documents_at_10"] == reports["index"].numbers["distinct_documents_at_10_at_release"]


def test_the_weekly_evaluation_is_a_new_measurement(bench):
    """The stored evaluation is seconds old, and the champion is measured again all the same; both stay readable, as a series."""
    manifest_sha256 = Ledger(bench.store).state().champion.manifest_sha256
    (eval_set,) = bench.store.names(f"evaluations/{manifest_sha256[:32]}")
    before = evaluation_history(bench.store, manifest_sha256, eval_set.ljust(64, "0"))
    report = detectors.evaluation_drift(bench)
    history = evaluation_history(bench.store, manifest_sha256, eval_set.ljust(64, "0"))
    assert (len(before), len(history)) == (1, 2)
    assert history[0].measured_at < history[1].measured_at
    assert report.facts["compared_with"] == history[0].measured_at


@pytest.mark.parametrize(
    "row", [{"source": "hashing:64", "dims": 64}, {"document_prompt": "passage: "}], ids=["weaker, other dims", "other prompt"]
)
def test_another_model_behind_the_name_is_a_hold(root, row):
    """A swapped embedder is found by its fingerprint, twice, with both fingerprints; nothing is measured with it and no detector crashes."""
    bench = swapped(root, **row)
    manifest_sha256 = Ledger(bench.store).state().champion.manifest_sha256
    stored = list((bench.store.root / "evaluations" / manifest_sha256[:32]).rglob("*"))
    reports = {report.detector: report for report in (detect(bench) for detect in ALL)}
    assert kinds(bench) == {("fingerprint", "hold")}
    current, then = (reports["embedding"].facts[name] for name in ("fingerprint_now", "fingerprint"))
    assert current == bench.model(NAME).fingerprint != then
    for finding in latest_findings(bench.store):
        assert current[:12] in finding.detail
        assert then[:12] in finding.detail
        assert finding.snapshot_id == champion(bench)
    assert list((bench.store.root / "evaluations" / manifest_sha256[:32]).rglob("*")) == stored
    assert ("cosine_mean" in reports["embedding"].numbers) is ("dims" not in row)
    assert last_weekly_success(bench.store) is not None


def test_the_same_model_that_computes_otherwise_is_a_hold(bench):
    """An unchanged fingerprint whose vectors moved a little, too little to cost rank, is runtime drift, with its mean cosine."""
    report = detectors.embedding_drift(computing_otherwise(bench, 0.06))
    assert 0.99 < report.numbers["cosine_mean"] < 0.999
    assert kinds(bench) == {("runtime", "hold")}
    assert f"{report.numbers['cosine_mean']:.5f}" in report.findings[0].detail


def test_an_embedding_service_that_gives_other_vectors_is_a_hold(bench, root):
    """A service that computes otherwise than the pipeline, or runs another model, places a hold though the pipeline's own vectors are well."""
    service = embedder.create_app(settings_for(root), preload=[NAME])
    with running(service, ready_path="/readyz") as url:
        asking = Workbench(settings_for(root, places=Places(home=root, embedder_url=url)))
        report = detectors.embedding_drift(asking)
        assert (report.numbers["service_cosine"], report.findings) == (pytest.approx(1, abs=1e-6), ())
        loaded = service.state.shelf.loaded
        loaded[NAME] = computing_otherwise(bench, 0.06).model(NAME)
        report = detectors.embedding_drift(asking)
        assert report.numbers["cosine_mean"] == pytest.approx(1, abs=1e-6)
        assert 0.99 < report.numbers["service_cosine"] < 0.999
        assert kinds(bench) == {("runtime", "hold")}
        loaded[NAME] = swapped(root, document_prompt="passage: ").model(NAME)
        assert detectors.embedding_drift(asking).numbers["service_same_model"] == 0.0
        assert kinds(bench) == {("fingerprint", "hold")}
    assert "service_cosine" not in detectors.embedding_drift(asking).numbers
    assert kinds(bench) == set()


def test_a_fallen_mrr_is_a_hold_with_its_numbers(bench):
    """Query vectors that became noise: the loss against the release is significant, the champion is below the floor, and the finding says so."""
    report = detectors.evaluation_drift(computing_otherwise(bench, 1.0))
    (finding,) = report.findings
    assert (finding.kind, finding.severity, finding.snapshot_id) == ("mrr_fall", "hold", champion(bench))
    numbers = finding.numbers
    assert numbers["mrr"] < numbers["floor"] <= numbers["mrr_at_release"]
    assert numbers["difference"] == pytest.approx(numbers["mrr"] - numbers["mrr_at_release"])
    assert numbers["low"] < numbers["high"] < 0
    assert numbers["p_worse"] <= 0.05
    assert numbers["below_floor"] == 1.0
    assert all(f"{numbers[name]:.3f}" in finding.detail for name in ("mrr", "mrr_at_release"))
    again = detectors.evaluation_drift(Workbench(bench.settings))
    assert again.findings == ()
    assert latest_findings(bench.store) == []


def test_an_equal_document_in_a_newer_corpus_is_no_fall(bench, root):
    """When an equal document comes to stand for one that is judged, the champion is measured by the one it holds, so its MRR stays."""
    corpus = root / "beir" / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    twins = [{**row, "_id": f"a{row['_id']}"} for row in rows[:30]]
    corpus.write_text("\n".join(json.dumps(row) for row in twins + rows))
    steps.ingest_corpus(bench)
    assert cutting.aliases(bench)["d0"] == "ad0"
    report = detectors.evaluation_drift(bench)
    assert (report.numbers["difference"], report.findings) == (0.0, ())


def test_slices_are_kept_when_the_corpus_moved_on(bench, root):
    """A champion that is measured while a newer corpus is there has the slices of its queries, which a later gate compares."""
    with (root / "beir" / "corpus.jsonl").open("a") as corpus:
        corpus.write("\n" + json.dumps({"_id": "new", "title": "", "text": "a document of today"}))
    steps.ingest_corpus(bench)
    detectors.evaluation_drift(bench)
    manifest_sha256 = Ledger(bench.store).state().champion.manifest_sha256
    measured = evaluation_history(bench.store, manifest_sha256, steps.load_eval_set(bench).sha256)[-1]
    assert all(query_slices(bench.store, measured).values())


def test_probes_are_the_champions_own(bench):
    """A champion whose files were altered is not measured: the detectors that read it stop at the file, and the week is not done."""
    (bench.store.folder(snapshot_key(champion(bench))) / "extra").touch()
    for detect in (detectors.evaluation_drift, detectors.embedding_drift, detectors.index_health):
        with pytest.raises(SnapshotError, match="extra"):
            detect(bench)
    assert last_weekly_success(bench.store) is None


def test_new_topics_warn_in_the_second_week(bench, root):
    """Observed queries move to another topic: seen at once in p and AUC, a warning when the next week sees it too, never a hold."""
    asked = [json.loads(line)["text"] for line in (root / "beir" / "queries.jsonl").read_text(encoding="utf-8").splitlines()] * 2
    observe(bench, "2026-11-01", asked)
    first = detectors.query_drift(bench)
    assert (first.facts["origin"], first.numbers["window"], first.findings) == ("observed", len(asked), ())
    words = asked[0].split()
    observe(bench, "2026-11-08", [f"wholly different question {number} about {words[number % 3]}" for number in range(500)])
    second = backdate(bench, detectors.query_drift(bench), 7)
    assert second.numbers["p_mmd"] <= 0.01
    assert second.numbers["auc"] > 0.9
    assert (second.numbers["in_a_row"], second.numbers["reference"], second.findings) == (1.0, len(asked), ())
    detectors.query_drift(bench)
    assert kinds(bench) == {("query", "warn")}


def test_without_observations_the_eval_set_stands_in(bench, root):
    """A changed eval set shows against the one at the release; few observed queries are no window of their own."""
    observe(bench, "2026-11-01", ["too few"] * 20)
    assert detectors.query_drift(bench).facts["origin"] == "eval_set"
    lines = (root / "beir" / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**json.loads(line), "text": f"rewritten query {number}"} for number, line in enumerate(lines)]
    (root / "beir" / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert detectors.query_drift(bench).numbers["p_mmd"] <= 0.01


@pytest.mark.parametrize("damage", [b"{}", b"not json"])
def test_damaged_references_and_observations_are_named(bench, damage):
    """A reference or an observation that cannot be read is an error with its key, never a silent new start."""
    detectors.query_drift(bench)
    (name,) = bench.store.names("drift/references")
    bench.store.write(f"drift/references/{name}", damage)
    with pytest.raises(StoreError, match=name):
        detectors.query_drift(bench)
    bench.store.write("observations/2026-11-01/x.parquet", damage)
    with pytest.raises(StoreError, match=r"x\.parquet"):
        detectors.query_drift(bench)


def test_a_newer_corpus_about_other_things_warns(bench, root):
    """The newest snapshot of the champion's model holds other texts: warned with p and AUC, and the champion stays as it is."""
    assert detectors.corpus_drift(bench).numbers == {}
    other_corpus(root)
    newest, live = evaluated(bench, NAME).snapshot_id, champion(bench)
    report = detectors.corpus_drift(bench)
    assert (report.snapshot_id, report.facts["newest"]) == (live, newest)
    assert (report.numbers["reference"], report.numbers["window"]) == (DOCUMENTS, 70)
    assert report.numbers["p_mmd"] <= 0.01
    assert kinds(bench) == {("corpus", "warn")}


def test_warnings_are_told_at_once(bench):
    """A finding that only warns goes out as an alert with its numbers; a webhook that is dead stops no detector."""
    heard = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *parts):
            pass

    keep_report(bench.store, DriftReport("evaluation", champion(bench), now(), "measured", {"distinct_documents_at_10": 1.0, LOST: 9.0}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        places = bench.settings.places.model_copy(update={"alert_url": SecretStr(f"http://127.0.0.1:{server.server_port}/")})
        told = Workbench(bench.settings.model_copy(update={"places": places}))
        detectors.index_health(told)
        server.shutdown()
    assert [(each["event"], each["facts"][LOST]) for each in heard] == [("drift_diversity", 9.0)]
    assert detectors.index_health(told).findings[0].kind == "diversity"


def test_snapshots_of_different_models_are_not_compared(root):
    """A newer snapshot by another fingerprint gives no corpus numbers: its vectors live in another space."""
    other_corpus(root)
    bench = swapped(root, document_prompt="passage: ")
    newest = evaluated(bench, NAME)
    report = detectors.corpus_drift(bench)
    assert (report.numbers, report.findings, report.facts["newest"]) == ({}, (), newest.snapshot_id)


def test_an_old_champion_warns_once_there_is_a_newer_corpus(root):
    """A champion older than drift.max_age_days is stale when a newer corpus was built, with its age; without one it is only old."""
    bench = Workbench(settings_for(root, drift=Drift(max_age_days=1e-6)))
    assert detectors.index_health(bench).findings == ()
    other_corpus(root)
    evaluated(bench, NAME)
    report = detectors.index_health(bench)
    assert kinds(bench) == {("stale", "warn")}
    assert (report.snapshot_id, report.numbers["corpus_behind"]) == (champion(bench), 1.0)
    assert 0 < report.numbers["age_days"] < 1


def test_a_source_that_changed_without_a_build_is_behind(root):
    """A document that was added, changed or taken out since the source was read shows, though nothing was built.

    So does a corpus that was read and not built. An old champion is then stale, and the finding says why.
    """
    bench = Workbench(settings_for(root, drift=Drift(max_age_days=1e-6)))
    corpus = root / "beir" / "corpus.jsonl"
    lines = corpus.read_text(encoding="utf-8").splitlines()
    changed = json.dumps({**json.loads(lines[1]), "text": "other words"})
    corpus.write_text("\n".join([changed, *lines[2:], json.dumps({"_id": "new", "title": "", "text": "a document of today"})]))
    report = detectors.index_health(bench)
    assert (report.numbers["corpus_behind"], report.numbers["source_changes"]) == (1.0, 3.0)
    assert "3 items of the source" in report.findings[0].detail
    steps.ingest_corpus(bench)
    report = detectors.index_health(bench)
    assert (report.numbers["corpus_behind"], report.numbers["source_changes"]) == (1.0, 0.0)
    assert "no snapshot was built" in report.findings[0].detail


def test_a_source_that_cannot_be_listed_counts_as_changed(root):
    """Nobody can tell then that the champion is current: the detector reports all the same, and an old champion is stale."""
    bench = Workbench(settings_for(root, drift=Drift(max_age_days=1e-6)))
    shutil.rmtree(root / "beir")
    report = detectors.index_health(bench)
    assert (report.numbers["corpus_behind"], "source_changes" in report.numbers) == (1.0, False)
    assert "cannot be listed" in report.findings[0].detail


def test_results_are_compared_with_the_release_before(bench, root):
    """The evaluation of a release shows what the results of the one before were like; one of them flooded with copies is a warning."""
    numbers = {"distinct_documents_at_10": 9.0, LOST: 9.0, "intra_list_similarity_at_10": 0.4, "intra_list_similarity_at_10_before": 0.1}
    keep_report(bench.store, DriftReport("evaluation", champion(bench), now(), "measured", numbers))
    (finding,) = detectors.index_health(bench).findings
    assert (finding.kind, "33% less than in the release before" in finding.detail) == ("diversity", True)
    earlier = Ledger(bench.store).state().previous
    steps.measure_current(bench, "hashing-64", steps.load_eval_set(bench))
    (before,) = evaluation_history(bench.store, earlier.manifest_sha256, steps.load_eval_set(bench).sha256)
    report = detectors.evaluation_drift(bench)
    name = "intra_list_similarity_at_10"
    assert report.numbers[f"{name}_before"] == before.metrics[name] != report.numbers[name]


def test_lost_diversity_warns(bench):
    """Results that name a third fewer documents than at the release are a warning; a tenth fewer are not."""
    for share, found in ((0.9, set()), (0.67, {("diversity", "warn")})):
        numbers = {"distinct_documents_at_10": 9 * share, LOST: 9.0}
        keep_report(bench.store, DriftReport("evaluation", champion(bench), now(), "measured", numbers))
        detectors.index_health(bench)
        assert kinds(bench) == found


def test_findings_are_about_what_is_live(bench):
    """A report of the same day replaces the one before; findings about a snapshot that was rolled back are past."""
    detectors.embedding_drift(bench)
    detectors.embedding_drift(computing_otherwise(bench, 0.5))
    assert len(read_reports(bench.store, "embedding")) == 1
    assert kinds(bench) == {("runtime", "hold")}
    rollback(bench.store, actor="tester", reason="it drifted")
    assert latest_findings(bench.store) == []


def test_a_run_that_stopped_half_way_is_no_success(bench):
    """The last weekly success is the oldest of the detectors' newest reports: four of five do not move it."""
    report = DriftReport("evaluation", "hashing-64-0123456789ab", now(days_ago=7), "measured")
    for detector in DETECTORS:
        keep_report(bench.store, replace(report, detector=detector))
    for detector in DETECTORS[:-1]:
        keep_report(bench.store, replace(report, detector=detector, at=now()))
    assert last_weekly_success(bench.store) == datetime.fromisoformat(report.at)
    keep_report(bench.store, replace(report, detector=DETECTORS[-1], at=now()))
    assert datetime.now(UTC) - last_weekly_success(bench.store) < timedelta(hours=1)
    assert [len(read_reports(bench.store, detector)) for detector in DETECTORS] == [2] * 5


def test_reports_are_read_as_written_and_edits_show(bench):
    """A report comes back equal; one with a finding taken out, or that is no report, is an error that names it."""
    report = detectors.embedding_drift(computing_otherwise(bench, 1.0))
    assert latest_report(bench.store, "embedding") == report
    key = f"drift/embedding/{report.at[:10]}.json"
    bench.store.write(key, json.dumps({**json.loads(bench.store.read(key)), "findings": []}).encode())
    with pytest.raises(StoreError, match=r"drift/embedding.*edited"):
        latest_findings(bench.store)
    bench.store.write(key, b"[]")
    with pytest.raises(StoreError, match=r"drift/embedding.*cannot be read"):
        latest_findings(bench.store)


def run_assets(bench: Workbench) -> tuple[dg.ExecuteInProcessResult, dict[str, dg.AssetCheckEvaluation]]:
    from rag_assets.defs import drift

    assets = [drift.embedding_drift, drift.champion_evaluation, drift.query_drift, drift.corpus_drift, drift.index_health]
    result = dg.materialize(assets, resources={"bench": bench}, raise_on_error=False)
    return result, {check.check_name: check for check in result.get_asset_check_evaluations()}


def test_the_assets_show_numbers_and_pass(bench):
    """All five materialise with plotted floats, MRR under the model's name among them, and their checks pass."""
    result, checks = run_assets(bench)
    assert result.success
    assert len(checks) == 5
    assert all(check.passed for check in checks.values())
    (shown,) = result.asset_materializations_for_node("champion_evaluation")
    assert shown.metadata["mrr"].value == shown.metadata[f"mrr {NAME}"].value > 0.9
    assert all(isinstance(shown.metadata[name].value, float) for name in ("mrr_at_release", "p_worse", "ann_recall"))


def test_a_swap_fails_its_checks_and_the_run_but_stops_no_detector(root):
    """With another model behind the name the run is red, both checks fail as errors with both fingerprints, and every detector has reported."""
    bench = swapped(root, source="hashing:64", dims=64)
    result, checks = run_assets(bench)
    assert not result.success
    assert {name for name, check in checks.items() if not check.passed} == {"mrr_held", "vectors_as_stored"}
    for name in ("mrr_held", "vectors_as_stored"):
        assert checks[name].severity is dg.AssetCheckSeverity.ERROR
        assert checks[name].metadata["fingerprint_now"].value == bench.model(NAME).fingerprint
        assert checks[name].metadata["fingerprint"].value != bench.model(NAME).fingerprint
    assert checks["vectors_as_stored"].blocking
    assert all(latest_report(bench.store, detector) for detector in DETECTORS)
    assert last_weekly_success(bench.store) is not None
