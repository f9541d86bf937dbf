"""The leaderboard: differences to the champion, speed and size as they were measured, and rows that are never compared."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from generated_corpus import evaluated, settings_for, write_corpus

from evals.significance import EvidenceError, holm, paired_difference
from rag_assets import steps
from rag_assets.evaluation import reciprocal_ranks
from rag_assets.gating import Standing
from rag_assets.leaderboard import BASELINE, compared_rows, leaderboard_rows
from rag_assets.throughput import Throughput, TimedEncoder, add_throughput, read_throughput
from rag_assets.workbench import Workbench
from rag_serving.snapshots import read_manifest
from rag_serving.store import LocalStore

WEAK, STRONG = "hashing-64", "hashing-256"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A bench whose corpus was measured with a weak and a strong model, and both evaluations. Not to be changed."""
    root = tmp_path_factory.mktemp("board")
    write_corpus(root / "beir", documents=60, queries=50)
    bench = Workbench(settings_for(root))
    return bench, evaluated(bench, WEAK), evaluated(bench, STRONG)


def standing(evaluation, status: str = "refused") -> Standing:
    return Standing(evaluation, status, "because")


def board(bench, *found):
    return {row.embedding_model: row for row in leaderboard_rows(bench.store, found, alpha=0.05)}


def test_the_difference_to_the_champion_is_that_of_the_same_queries(measured):
    """A model's difference is the paired one of its rows and the champion's, with a two-sided p; the champion and BM25 have none."""
    bench, weak, strong = measured
    rows = board(bench, standing(weak), standing(strong, "champion"))
    ranks = {evaluation.embedding_model: reciprocal_ranks(bench.store, evaluation) for evaluation in (weak, strong)}
    expected = paired_difference(ranks[WEAK], ranks[STRONG])
    contrast = rows[WEAK].contrast
    assert (contrast.mean, contrast.low, contrast.high) == (expected.mean, expected.low, expected.high)
    assert contrast.mean == pytest.approx(weak.mrr - strong.mrr)
    assert contrast.p == pytest.approx(holm({WEAK: 2 * expected.p_worse})[WEAK])
    assert contrast.verdict == "worse"
    assert rows[STRONG].contrast is None
    assert (rows[BASELINE].contrast, rows[BASELINE].cost, rows[BASELINE].metrics) == (None, None, weak.bm25)


def test_without_a_champion_among_them_nothing_is_compared(measured):
    """Where nothing is live, or what is live was measured on something else, there are rows and no differences."""
    bench, weak, strong = measured
    assert {row.contrast for row in board(bench, standing(weak), standing(strong, "passed")).values()} == {None}
    assert leaderboard_rows(bench.store, [], alpha=0.05) == []


def test_where_nothing_is_released_the_best_is_the_measure(measured):
    """`ragline compare` shows each model's difference to the best."""
    bench, weak, strong = measured
    rows = {row.embedding_model: row for row in compared_rows(bench.store, [weak, strong], alpha=0.05)}
    assert (rows[STRONG].status, rows[STRONG].contrast) == ("best", None)
    assert rows[WEAK].contrast.mean == pytest.approx(weak.mrr - strong.mrr)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"corpus_sha256": "0" * 64}, "corpora"), ({"eval_set_sha256": "0" * 64}, "eval sets"), ({"k": 5}, "cutoffs")],
)
def test_rows_of_another_corpus_eval_set_or_cutoff_are_never_compared(measured, change, what):
    """One odd evaluation among them is refused by name, with what differs."""
    bench, weak, strong = measured
    with pytest.raises(EvidenceError, match=f"{weak.snapshot_id} were measured on different {what}"):
        board(bench, standing(strong, "champion"), standing(replace(weak, **change)))


def test_costs_are_the_manifests_bytes_and_the_measured_time(measured):
    """Size is that of the snapshot on disk, a thousand chunks cost their share of it, and speed is what embedding the chunks took."""
    bench, weak, _ = measured
    cost, manifest = board(bench, standing(weak))[WEAK].cost, read_manifest(bench.store, weak.snapshot_id)
    folder = bench.store.folder(f"snapshots/{weak.snapshot_id}")
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "MANIFEST.json")
    assert cost.index_mb == pytest.approx(on_disk / 1e6)
    assert cost.mb_per_thousand == pytest.approx(on_disk / 1e6 / manifest.rows * 1000)
    speed = read_throughput(bench.store, manifest.fingerprint)
    assert speed.texts == manifest.rows
    assert cost.chunks_per_second == pytest.approx(speed.texts / speed.seconds)
    assert cost.cpu_seconds == pytest.approx(speed.cpu_seconds / speed.texts * 1000)


def test_a_collected_snapshot_costs_nothing_that_is_known(measured, tmp_path):
    """Where the snapshot is not in the store any more its row has no cost."""
    bench, weak, _ = measured
    shutil.copytree(bench.store.root, tmp_path / "store")
    store = LocalStore(tmp_path / "store")
    shutil.rmtree(store.folder(f"snapshots/{weak.snapshot_id}"))
    (row, _) = leaderboard_rows(store, [standing(weak)], alpha=0.05)
    assert row.cost is None


def test_only_what_was_really_embedded_counts(measured, tmp_path):
    """Embedding the same corpus again adds nothing to the record; new texts add themselves."""
    bench, *_ = measured
    shutil.copytree(bench.settings.root, tmp_path / "line")
    again = Workbench(settings_for(tmp_path / "line"))
    fingerprint = again.model(WEAK).fingerprint
    before = read_throughput(again.store, fingerprint)
    steps.embed_corpus(again, WEAK)
    assert read_throughput(again.store, fingerprint) == before
    add_throughput(again.store, fingerprint, Throughput(10, 2.0, 3.0))
    after = read_throughput(again.store, fingerprint)
    assert (after.texts, after.seconds) == (before.texts + 10, pytest.approx(before.seconds + 2))


def test_an_encoder_is_timed_without_being_changed():
    """The timed encoder gives the same vectors under the same fingerprint, and counts texts and seconds."""

    class Slow:
        fingerprint, dims = "f" * 64, 2

        def encode_documents(self, texts):
            sum(range(2_000_000))
            return np.ones((len(texts), 2), np.float32)

    timed = TimedEncoder(Slow())
    assert timed.encode_documents(["a", "b"]).tolist() == [[1, 1], [1, 1]]
    assert timed.encode_documents(["c"]).tolist() == [[1, 1]]
    assert (timed.fingerprint, timed.dims, timed.throughput.texts) == ("f" * 64, 2, 3)
    assert timed.throughput.seconds > 0
    assert timed.throughput.cpu_seconds > 0
    assert timed.throughput.per_second == pytest.approx(3 / timed.throughput.seconds)


def test_a_damaged_record_of_speed_is_begun_anew(store):
    """It is for show: a record that cannot be read is no speed, stops nothing, and the next run writes a new one."""
    store.write(f"embeddings/{'f' * 32}.json", b"damaged")
    assert read_throughput(store, "f" * 64) is None
    add_throughput(store, "f" * 64, Throughput(5, 1.0, 1.0))
    assert read_throughput(store, "f" * 64) == Throughput(5, 1.0, 1.0)
    add_throughput(store, "e" * 64, Throughput())
    assert read_throughput(store, "e" * 64) is None
