"""A plan says what the next run does, before it runs, and changes nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rag_assets import steps
from rag_assets.cli import app
from rag_assets.plan import plan
from rag_assets.workbench import Workbench
from rag_serving.settings import Chunking, Corpus, Index, ModelSpec, Settings
from rag_serving.snapshots import hash_tree

MODEL = ModelSpec(name="h", source="hashing:32", dims=32, max_tokens=64)
OTHER = ModelSpec(name="other", source="hashing:16", dims=16, max_tokens=64)


class Corpora:
    """A JSON Lines corpus of two-chunk documents that a test changes between runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts = {f"d{number}": self.text(number) for number in range(60)}
        self.settings = Settings(
            root=folder,
            corpus=Corpus(source="jsonl:docs.jsonl"),
            chunking=Chunking(max_tokens=16),
            models=(MODEL, OTHER),
            default_models=("h",),
        )

    @staticmethod
    def text(number: int, word: str = "word") -> str:
        return " ".join(f"{word}{number}x{place}" for place in range(20))

    def bench(self, **settings: object) -> Workbench:
        rows = [json.dumps({"id": name, "title": f"title {name}", "text": text}) for name, text in self.texts.items()]
        (self.folder / "docs.jsonl").write_text("\n".join(rows), encoding="utf-8")
        return Workbench(
            self.settings.model_copy(update={"places": self.settings.places.model_copy(update={"home": Path("home")}), **settings})
        )

    def run(self, *models: str, **settings: object) -> dict[str, int]:
        bench = self.bench(**settings)
        _, parsed, cut = steps.ingest_corpus(bench)
        built = [steps.snapshot_corpus(bench, name) for name in models]
        kinds = {name: each.manifest.built if not each.reused else "none" for name, each in zip(models, built, strict=True)}
        return {"parse": parsed.counts["parsed"], "cut": cut.counts["chunked"], "embed": bench.tally["embedded"], **kinds}

    def plan(self, *models: str, **settings: object):
        bench = self.bench(**settings)
        before = hash_tree(self.folder)
        found = plan(bench, models)
        assert hash_tree(self.folder) == before, "a plan wrote something"
        return found


@pytest.fixture
def corpora(tmp_path):
    return Corpora(tmp_path)


def test_before_the_first_run(corpora):
    """Everything is to be done, how long it takes is not known, and nothing is claimed to be exact."""
    found = corpora.plan("h", "other")
    assert (found.corpus.items, found.corpus.parse, found.corpus.cut, found.corpus.gone) == (60, 60, 60, 0)
    assert [(model.model, model.snapshot, model.minutes, model.because) for model in found.models] == [
        ("h", "full", None, ("its first snapshot",)),
        ("other", "full", None, ("its first snapshot",)),
    ]
    assert found.models[0].texts > 60
    assert (found.exact, found.minutes) == (False, None)


def test_after_a_run_nothing_is_left(corpora):
    """When nothing changed the plan is empty and takes no time; a second model has all its texts to embed, counted exactly."""
    corpora.run("h")
    found = corpora.plan("h", "other")
    assert found.corpus.unchanged
    assert found.corpus.because == ()
    same, new = found.models
    assert (same.texts, same.snapshot, same.minutes, same.exact) == (0, "none", 0.0, True)
    assert (new.snapshot, new.minutes) == ("full", None)
    assert corpora.run("h", "other") == {"parse": 0, "cut": 0, "embed": new.texts, "h": "none", "other": "full"}


def test_a_few_changes(corpora):
    """Two new documents, one changed and one gone: what is parsed and cut is foretold exactly, what is embedded nearly, and how it is built."""
    corpora.run("h")
    del corpora.texts["d3"]
    corpora.texts |= {"d4": corpora.text(4, "other"), "n1": corpora.text(1, "new"), "n2": corpora.text(2, "new")}
    found = corpora.plan("h")
    assert (found.corpus.parse, found.corpus.cut, found.corpus.gone) == (3, 3, 1)
    assert found.corpus.because == ("2 new", "1 changed", "1 gone")
    (model,) = found.models
    assert (model.snapshot, model.exact) == ("incremental", False)
    assert model.minutes is None, "no incremental build was timed yet"
    done = corpora.run("h")
    assert (done["parse"], done["cut"], done["h"]) == (3, 3, "incremental")
    assert abs(done["embed"] - model.texts) <= 4
    corpora.texts["n3"] = corpora.text(3, "new")
    assert corpora.plan("h").minutes is not None


def test_a_few_rows_say_nothing_of_many(corpora):
    """Minutes are not foretold from a run of less than a hundredth of the size, where starting took most of the time."""
    corpora.texts = {"d0": corpora.text(0)}
    corpora.run("h")
    corpora.texts |= {f"n{number}": corpora.text(number, "new") for number in range(50)}
    assert corpora.plan("h").minutes is not None
    corpora.texts |= {f"m{number}": corpora.text(number, "more") for number in range(100)}
    assert corpora.plan("h").minutes is None


def test_ingested_but_not_indexed(corpora):
    """Chunks that are newer than the snapshot are compared with it row by row: the plan is exact."""
    corpora.run("h")
    corpora.texts["d4"] = corpora.text(4, "other")
    corpora.run()
    (model,) = corpora.plan("h").models
    assert model.exact
    assert model.because[0].endswith(f"of {steps.require_table(corpora.bench().store, 'chunks').rows} rows differ")
    assert corpora.run("h") == {"parse": 0, "cut": 0, "embed": model.texts, "h": "incremental"}


def test_reasons(corpora):
    """What makes a full build, or everything to be cut again, is named."""
    corpora.run("h")
    recut = corpora.plan("h", chunking=Chunking(max_tokens=24))
    assert (recut.corpus.parse, recut.corpus.cut) == (0, 60)
    assert recut.corpus.because == ("chunking or the tokenizer that sizes chunks changed: everything is cut again",)
    assert recut.models[0].because == ("the chunking changed",)
    (remodelled,) = corpora.plan("h", models=(MODEL.model_copy(update={"query_prompt": "query: "}), OTHER)).models
    assert (remodelled.snapshot, remodelled.because) == ("full", ("the model changed",))
    (reindexed,) = corpora.plan("h", index=Index(m=32)).models
    assert (reindexed.texts, reindexed.snapshot, reindexed.because) == (0, "full", ("the index settings changed",))
    (weighed,) = corpora.plan("h", index=Index(ef=64)).models
    assert (weighed.texts, weighed.snapshot) == (0, "incremental")
    corpora.texts = {name: corpora.text(number, "all") for number, name in enumerate(corpora.texts)}
    (rewritten,) = corpora.plan("h").models
    assert (rewritten.snapshot, rewritten.because) == (
        "full",
        ("too many rows changed since the last full build (index.rebuild_share 0.2)",),
    )
    (crossed,) = corpora.plan("h", index=Index(hnsw_from_rows=10)).models
    assert crossed.because == ("the rows cross index.hnsw_from_rows (10)",)


def test_the_command(corpora, monkeypatch):
    """`ragline plan` prints the same facts for people and as JSON."""
    corpora.run("h")
    config = corpora.folder / "ragline.toml"
    config.write_text(
        'default_models = ["h"]\n[corpus]\nsource = "jsonl:docs.jsonl"\n[chunking]\nmax_tokens = 16\n'
        '[[models]]\nname = "h"\nsource = "hashing:32"\ndims = 32\nmax_tokens = 64\n',
        encoding="utf-8",
    )
    monkeypatch.setenv("RAGLINE_CONFIG", str(config))
    monkeypatch.setenv("RAGLINE_HOME", "home")
    shown = CliRunner().invoke(app, ["plan"], catch_exceptions=False).stdout
    assert "60 documents in the source; parse 0, cut 0, drop 0." in shown
    assert "nothing changed" in shown
    facts = json.loads(CliRunner().invoke(app, ["plan", "--json"], catch_exceptions=False).stdout)
    assert facts["corpus"]["items"] == 60
    assert (facts["exact"], facts["minutes"]) == (True, 0.0)
    assert facts["models"][0] == {"model": "h", "texts": 0, "snapshot": "none", "minutes": 0.0, "because": [], "exact": True}
