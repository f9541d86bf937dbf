"""The bar of incremental runs: a hundredth of the documents changed costs a twentieth of the time or less."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from test_increment import searched

from rag_assets import steps
from rag_assets.corpus import read_table
from rag_assets.plan import plan
from rag_assets.workbench import Workbench
from rag_serving.settings import Corpus, load_settings
from rag_serving.snapshots import verify

ROOT = Path(__file__).parents[2]
DOCUMENTS, CHANGED, GONE = 10_000, 90, 10


def text(number: int, seed: int = 0) -> str:
    """About 120 words of a vocabulary of 20,000, as often as words are in a language; the first names the document."""
    rng = np.random.default_rng([seed, number])
    return f"entry{seed}x{number} " + " ".join(f"word{rank}" for rank in np.minimum(rng.zipf(1.3, 120), 20_000))


class Line:
    """Runs of the line up to the snapshot, over a JSON Lines file, with what they did and how long it took."""

    def __init__(self, folder: Path, model: str) -> None:
        settings = load_settings(ROOT / "ragline.toml", environ={})
        models_dir = settings.models_dir
        places = settings.places.model_copy(update={"home": folder / "home", "models_dir": models_dir})
        changes = {"root": folder, "corpus": Corpus(source="jsonl:docs.jsonl"), "default_models": (model,), "places": places}
        self.file = folder / "docs.jsonl"
        self.settings = settings.model_copy(update=changes)
        self.model = model
        self.bench = Workbench(self.settings)
        self.bench.model(model)

    def write(self, texts: dict[int, str], *, kind: str = "a") -> None:
        rows = [
            json.dumps({"id": f"d{number}", "title": f"Title of {number}", "text": body, "metadata": {"kind": kind}})
            for number, body in texts.items()
        ]
        self.file.write_text("\n".join(rows), encoding="utf-8")

    def run(self) -> tuple[dict[str, int], steps.BuiltSnapshot, float]:
        self.bench.tally.clear()
        started = time.perf_counter()
        _, parsed, cut = steps.ingest_corpus(self.bench)
        laps = [time.perf_counter() - started]
        built = steps.snapshot_corpus(self.bench, self.model)
        seconds = time.perf_counter() - started
        print(f"  corpus {laps[0]:.2f} s, embedding and index {seconds - laps[0]:.2f} s")
        return {"parsed": parsed.counts["parsed"], "cut": cut.counts["chunked"], "embedded": self.bench.tally["embedded"]}, built, seconds


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_hundredth_changed(tmp_path):
    """1 % of 10,000 documents: only those are parsed, cut and embedded, in at most 5 % of the time; deleted ones are not found any more.

    Changed metadata embeds nothing and builds nothing.
    """
    model = "all-MiniLM-L6-v2"
    line = Line(tmp_path, model)
    texts = {number: text(number) for number in range(DOCUMENTS)}
    line.write(texts)
    did, first, whole = line.run()
    rows = first.manifest.rows
    print(f"{model}: first run {whole:.1f} s, {did}, {rows} rows, {first.manifest.bytes / 1e6:.1f} MB, {first.manifest.built}")
    assert did["parsed"] == did["cut"] == DOCUMENTS

    for number in range(GONE):
        del texts[number]
    texts |= {number: text(number, seed=1) for number in range(GONE, GONE + CHANGED)}
    line.write(texts)
    foretold = plan(line.bench, [model])
    assert (foretold.corpus.parse, foretold.corpus.gone, foretold.models[0].snapshot) == (CHANGED, GONE, "incremental")
    did, second, again = line.run()
    print(f"{model}: second run {again:.2f} s = {again / whole:.1%} of the first, {did}, {second.manifest.delta}, {second.health}")
    assert did["parsed"] == did["cut"] == CHANGED
    assert did["embedded"] <= 3 * CHANGED
    assert second.manifest.built == "incremental"
    assert second.health.ann_recall >= 0.95
    store = line.bench.store
    assert verify(store, first.manifest.snapshot_id) == first.manifest
    inodes = {path.stat().st_ino: path.stat().st_size for path in store.folder(f"snapshots/{second.manifest.snapshot_id}").rglob("*.*")}
    for path in store.folder(f"snapshots/{first.manifest.snapshot_id}").rglob("*.*"):
        inodes.pop(path.stat().st_ino, None)
    print(f"{model}: {sum(inodes.values()) / 1e6:.1f} MB more on disk")

    gone = [text(number).split()[0] for number in range(GONE)]
    results = searched(store, second.manifest, gone, model=line.bench.model(model))
    by_id = {f"d{number}" for number in range(GONE)}
    _, chunks = read_table(store, "chunks")
    documents = dict(zip(chunks["chunk_id"].to_pylist(), chunks["doc_id"].to_pylist(), strict=True))
    assert all(documents[chunk] not in by_id for found in results for each in found for chunk in each)

    line.write(texts, kind="b")
    did, third, seconds = line.run()
    print(f"{model}: metadata alone {seconds:.2f} s, {did}, reused: {third.reused}")
    assert (did["cut"], did["embedded"], third.reused) == (0, 0, True)
    assert again <= 0.05 * whole
