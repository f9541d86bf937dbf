"""What fails no request and answers worse all the same: each kind is provoked, moves a metric, fires its alert and shows on the dashboard.

Real are the line that builds and measures, both services on sockets, the detectors of the weekly run, and Prometheus with the generated rules
and the generated dashboard's expressions. Made shorter are the ranges and `for` of the rules (`rules(faster=...)` of deploy/generate.py),
since nobody waits ten minutes for a test; ages are real ages of a manifest that was dated back.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import numpy as np
import pytest
from generated_corpus import evaluated, settings_for, write_corpus
from live_server import running
from real_prometheus import PROMETHEUS, Watch, watching

from rag_assets import detectors, steps
from rag_assets.drift import last_weekly_success
from rag_assets.workbench import Workbench
from rag_serving import app, embedder
from rag_serving.models import EmbeddingModel
from rag_serving.promotion import promote
from rag_serving.settings import EncoderClient, ModelSpec, Places, Serving, Settings
from rag_serving.signals import contract
from rag_serving.signals.contract import Metric
from rag_serving.signals.monitoring import DOCUMENT_SHARE
from rag_serving.snapshots import MANIFEST, Manifest, seal, snapshot_key

pytestmark = pytest.mark.skipif(not PROMETHEUS, reason="needs Prometheus: apt-get install prometheus")

NAME = "hashing-256"
DOCUMENTS, QUERIES = 90, 60
FASTER = 1200  # 30 minutes are 1.5 s, 7 days 504 s


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a corpus and a store where it was built with one model; nothing is measured or released. Not to be changed."""
    root = tmp_path_factory.mktemp("silent")
    write_corpus(root / "beir", documents=DOCUMENTS, queries=QUERIES)
    bench = Workbench(settings_for(root))
    steps.ingest_corpus(bench)
    steps.snapshot_corpus(bench, NAME)
    return root


@pytest.fixture
def root(built, tmp_path) -> Path:
    shutil.copytree(built, tmp_path / "line")
    return tmp_path / "line"


@pytest.fixture
def bench(root) -> Workbench:
    return Workbench(settings_for(root))


def live(bench: Workbench, snapshot_id: str | None = None) -> str:
    """Release a snapshot, by default the newest; its id."""
    newest = snapshot_id or json.loads(bench.store.read(f"corpus/snapshot-{NAME}.json"))["snapshot_id"]
    assert promote(bench.store, newest, gate=bench.settings.gate, actor="tester", reason="for a test", override=True)
    return newest


def weekly(bench: Workbench) -> None:
    """The assets of the weekly run, by Dagster; a finding that holds fails its check and no more."""
    import dagster as dg

    from rag_assets.defs import drift

    assets = [drift.embedding_drift, drift.champion_evaluation, drift.query_drift, drift.corpus_drift, drift.index_health]
    dg.materialize(assets, resources={"bench": bench}, raise_on_error=False)
    assert last_weekly_success(bench.store) is not None


def asked(root: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (root / "beir" / "queries.jsonl").read_text(encoding="utf-8").splitlines()]


def served(root: Path, vectors: str = "http://127.0.0.1:9") -> Settings:
    places = Places(home=root, embedder_url=vectors)
    return settings_for(root, places=places, serving=Serving(poll_seconds=0.1), encoder=EncoderClient(probe_seconds=0.3))


@contextmanager
def watched(root: Path, vectors: str = "http://127.0.0.1:9") -> Iterator[tuple[httpx2.Client, Watch]]:
    """The query service over the store in `root`, and a Prometheus that watches it."""
    with (
        running(app.create_app(served(root, vectors)), ready_path="/readyz") as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=30) as client,
        watching(root / "prometheus", [url], faster=FASTER) as watch,
    ):
        yield client, watch


def shown(watch: Watch, metric: Metric, **labels: str) -> list[float]:
    """The values of a metric on the dashboard: each panel's own expression, evaluated."""
    panels = watch.on_panels(metric.name)
    assert panels, f"no panel shows {metric.name}"
    return [each["value"] for found in panels.values() for each in found if labels.items() <= each["metric"].items()]


def running_otherwise(model: EmbeddingModel, share: float) -> EmbeddingModel:
    """The same model by its fingerprint, on a runtime whose vectors are partly noise."""
    rng = np.random.default_rng(0)

    def raw(texts):
        rows = model.raw(texts)
        noise = rng.normal(size=rows.shape) * np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(rows.shape[1])
        return ((1 - share) * rows + share * noise).astype(np.float32)

    return replace(model, raw=raw)


def restarted(vectors: str, settings: Settings):
    """An embedding service at the address of one that has stopped."""
    return running(embedder.create_app(settings, preload=[NAME]), ready_path="/readyz", port=int(vectors.rpartition(":")[2]))


def with_row(root: Path, **changes) -> Settings:
    """The same line with another model in the row of the released one's name."""
    row = {"name": NAME, "source": "hashing:256", "dims": 256, "max_tokens": 256}
    return settings_for(root, models=(ModelSpec(**{**row, **changes}),))


def test_model_drift_in_the_embedding_service(bench, root):
    """A service whose vectors moved under an unchanged fingerprint fails no request; their paired cosine falls, pages and is on a panel.

    Restarted with another prompt it names another fingerprint, which is a metric of the same alert. Restarted as it was, the alert ends.
    """
    live(bench)
    with ExitStack() as first:
        service = embedder.create_app(settings_for(root), preload=[NAME])
        vectors = first.enter_context(running(service, ready_path="/readyz"))
        with watched(root, vectors) as (client, watch):
            watch.until(lambda: watch.values("rag_service_cosine"))
            assert shown(watch, contract.SERVICE_COSINE) == [pytest.approx(1, abs=1e-5)]
            assert shown(watch, contract.SERVICE_SAME_MODEL) == [1.0]
            assert "RagServiceModelDrift" not in watch.firing()

            model = service.state.shelf.loaded[NAME]
            service.state.shelf.loaded[NAME] = running_otherwise(model, 0.06)
            watch.until(lambda: "RagServiceModelDrift" in watch.firing())
            assert 0.99 < shown(watch, contract.SERVICE_COSINE)[0] < 0.999
            assert shown(watch, contract.SERVICE_SAME_MODEL) == [1.0]
            reply = client.post("/v1/retrieve", json={"query": asked(root)[0]}).json()
            assert (len(reply["hits"]), reply["degraded"]) == (5, [])  # nobody who asks can tell

            first.close()
            with restarted(vectors, with_row(root, document_prompt="passage: ", query_prompt="query: ")):
                watch.until(lambda: shown(watch, contract.SERVICE_SAME_MODEL) == [0.0])
                watch.until(lambda: "RagServiceModelDrift" in watch.firing())
                assert client.post("/v1/retrieve", json={"query": asked(root)[1]}).status_code == 503
            with restarted(vectors, settings_for(root)):
                watch.until(lambda: "RagServiceModelDrift" not in watch.firing() and shown(watch, contract.SERVICE_SAME_MODEL) == [1.0])


@pytest.mark.heavy
def test_model_drift_in_the_weekly_run(bench, root):
    """The weekly run embeds stored texts again: a runtime that computes otherwise, and another model behind the name, each page and show."""
    live(bench)
    with watched(root) as (_, watch):
        weekly(bench)
        watch.until(lambda: shown(watch, contract.PAIRED_COSINE) == [pytest.approx(1, abs=1e-5)])
        assert "RagModelDrift" not in watch.firing()
        bench._models[NAME] = running_otherwise(bench.model(NAME), 0.06)
        weekly(bench)
        watch.until(lambda: "RagModelDrift" in watch.firing())
        assert 0.99 < shown(watch, contract.PAIRED_COSINE)[0] < 0.999
        assert shown(watch, contract.SAME_MODEL) == [1.0]
        weekly(Workbench(with_row(root, document_prompt="passage: ")))
        watch.until(lambda: shown(watch, contract.SAME_MODEL) == [0.0])
        watch.until(lambda: "RagModelDrift" in watch.firing())


def test_an_index_that_nobody_renews(bench, root):
    """A champion of 31 days is only old while the source holds what it was built from; once a file changed and nothing was built, it is stale.

    Neither a build nor a look at the corpus by hand is needed: the weekly run lists the source. The finding says what changed.
    """
    old = aged(bench, days=31)
    live(bench, old.snapshot_id)
    with watched(root) as (_, watch):
        detectors.index_health(bench)
        watch.until(lambda: shown(watch, contract.INDEX_BEHIND) == [0.0])
        assert 31 * 86400 <= shown(watch, contract.INDEX_AGE)[0] < 31.1 * 86400
        assert "RagIndexStale" not in watch.firing()
        with (root / "beir" / "corpus.jsonl").open("a", encoding="utf-8") as corpus:
            corpus.write("\n" + json.dumps({"_id": "new", "title": "", "text": "a document of today"}))
        report = detectors.index_health(bench)
        watch.until(lambda: "RagIndexStale" in watch.firing())
        assert shown(watch, contract.INDEX_BEHIND) == [1.0]
        assert shown(watch, contract.SOURCE_CHANGES) == [1.0]
    (finding,) = report.findings
    assert (finding.kind, finding.severity) == ("stale", "warn")
    assert "1 items of the source are new, changed or gone" in finding.detail


@pytest.mark.heavy
def test_results_that_became_one_thing_said_many_times(bench, root):
    """A source that repeats one page in a thousand versions floods the results of the next release; its MRR is as good as ever.

    In traffic the passages of a result repeat each other; the weekly run measures less difference than in the release before. Both alert.
    """
    live(bench, evaluated(bench, NAME).snapshot_id)
    service = embedder.create_app(settings_for(root), preload=[NAME])
    with running(service, ready_path="/readyz") as vectors, watched(root, vectors) as (client, watch):

        def traffic(*queries: str) -> None:
            for query in queries:
                client.post("/v1/retrieve", json={"query": query}).raise_for_status()

        traffic(*asked(root)[:25])
        watch.until(lambda: watch.values("count_over_time(rag_result_variety[1m])") >= [5.0])  # the days before
        varied = shown(watch, contract.VARIETY)[0]
        flood(root)
        flooded = evaluated(bench, NAME)
        assert flooded.mrr > bench.settings.gate.mrr_floor
        live(bench, flooded.snapshot_id)
        detectors.evaluation_drift(bench)
        watch.until(lambda: "RagDiversityCollapse" in watch.firing())
        now, then = (shown(watch, contract.UNLIKENESS, when=when)[0] for when in ("now", "before"))
        assert now < 0.8 * then
        traffic(*asked(root), *asked(root)[:40])
        watch.until(lambda: "RagResultsAlike" in watch.firing())
        assert shown(watch, contract.VARIETY)[0] < 0.8 * varied


def aged(bench: Workbench, *, days: float) -> Manifest:
    """The newest snapshot as it would be had it been built so many days ago: its files under a manifest of that date, and its pointer."""
    pointer = json.loads(bench.store.read(f"corpus/snapshot-{NAME}.json"))
    folder = bench.store.folder(snapshot_key(pointer["snapshot_id"]))
    manifest = Manifest(**json.loads((folder / MANIFEST).read_bytes()))
    old = replace(manifest, built_at=(datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="microseconds"))
    seal(folder, old)
    folder.rename(folder.parent / old.snapshot_id)
    bench.store.write(f"corpus/snapshot-{NAME}.json", json.dumps(pointer | {"snapshot_id": old.snapshot_id}).encode())
    return old


def flood(root: Path, *, copies: int = 1000) -> None:
    """So many versions of one page, which names the common words of what is asked, beside the corpus as it was."""
    common = sorted({word for query in asked(root) for word in query.split() if len(word) < 10})
    page = " ".join(common[:120])
    rows = [{"_id": f"copy{number}", "title": "release notes", "text": f"{page} version {number}."} for number in range(copies)]
    with (root / "beir" / "corpus.jsonl").open("a", encoding="utf-8") as corpus:
        corpus.write("\n" + "\n".join(map(json.dumps, rows)))


@pytest.mark.heavy
def test_one_document_that_crowds_out_the_others(bench, root):
    """A document of a thousand passages takes most places of each result: fewer distinct documents in traffic and by the eval set, both alert."""
    live(bench, evaluated(bench, NAME).snapshot_id)
    service = embedder.create_app(settings_for(root), preload=[NAME])
    with running(service, ready_path="/readyz") as vectors, watched(root, vectors) as (client, watch):

        def traffic() -> None:
            for query in asked(root) * 2:
                client.post("/v1/retrieve", json={"query": query}).raise_for_status()

        while len(watch.series(f"{DOCUMENT_SHARE}")) == 0 or watch.values(f"count_over_time({DOCUMENT_SHARE}[1m])") < [4.0]:
            traffic()
        assert watch.values(DOCUMENT_SHARE) == [pytest.approx(1, abs=0.01)]
        crowd(root)
        live(bench, evaluated(bench, NAME).snapshot_id)
        weekly(bench)
        watch.until(lambda: "RagDiversityCollapse" in watch.firing())
        now, then = (shown(watch, contract.DIVERSITY, when=when)[0] for when in ("now", "before"))
        assert now < 0.8 * then
        deadline = time.monotonic() + 60
        while "RagResultsAlike" not in watch.firing():
            assert time.monotonic() < deadline
            traffic()
        (share,) = (each["value"] for found in watch.on_panels(DOCUMENT_SHARE).values() for each in found)
        assert share < 0.8


def crowd(root: Path, *, passages: int = 1000) -> None:
    """One document of so many paragraphs, each with other common words of what is asked, beside the corpus as it was."""
    common = sorted({word for query in asked(root) for word in query.split() if len(word) < 10})
    rng = np.random.default_rng(0)
    paragraphs = [" ".join(rng.choice(common, 110, replace=False)) + "." for _ in range(passages)]
    row = {"_id": "manual", "title": "the whole manual", "text": "\n\n".join(paragraphs)}
    with (root / "beir" / "corpus.jsonl").open("a", encoding="utf-8") as corpus:
        corpus.write("\n" + json.dumps(row))
