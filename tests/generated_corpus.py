"""A corpus made up from a seed, in the BEIR layout, that tells a strong hashed embedding model from a weak one.

Each document has rare words among common ones, and some of them are longer than full-text search indexes, so that a query for those rests
on the vectors.
"""

import json
import random
from pathlib import Path
from typing import Any

from rag_assets import steps
from rag_assets.evaluation import Evaluation
from rag_assets.workbench import Workbench
from rag_serving.promotion import promote
from rag_serving.releases import Entry
from rag_serving.settings import Corpus, EvalSetChoice, Gate, ModelSpec, Places, Retrieval, Settings, Weights

COMMON = 300
RARE_OF_A_DOCUMENT = 6
LONG = 21  # syllables: past the 40 characters of a full-text token
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def write_corpus(folder: Path, *, documents: int = 200, queries: int = 120, seed: int = 7) -> Path:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv; query i asks for document i."""
    rng = random.Random(seed)  # noqa: S311 - a corpus, not a secret

    def word(syllables: int) -> str:
        return "".join(rng.choice(SYLLABLES) for _ in range(syllables))

    common = [word(2) for _ in range(COMMON)]
    (folder / "qrels").mkdir(parents=True)
    corpus, asked, judged = [], [], ["query-id\tcorpus-id\tscore"]
    for number in range(documents):
        rare = [word(LONG) for _ in range(RARE_OF_A_DOCUMENT)]
        words = [*rng.choices(common, k=20), *rare]
        rng.shuffle(words)
        corpus.append({"_id": f"d{number}", "title": " ".join(rng.choices(common, k=3)), "text": " ".join(words) + "."})
        if number < queries:
            asked.append({"_id": f"q{number}", "text": " ".join([*rng.sample(rare, k=2), *rng.choices(common, k=3)])})
            judged.append(f"q{number}\td{number}\t1")
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n", encoding="utf-8")
    return folder


def settings_for(root: Path, **changes: Any) -> Settings:
    """Settings over a corpus in `root`/beir with a weak, a fair and a strong embedding model; their MRR is near 0.75, 0.95 and 1."""
    models = tuple(ModelSpec(name=f"hashing-{dims}", source=f"hashing:{dims}", dims=dims, max_tokens=256) for dims in (64, 128, 256))
    fields: dict[str, Any] = {
        "corpus": Corpus(source="beir:beir"),
        "eval": EvalSetChoice(source="beir:beir"),
        "gate": Gate(min_queries=50),
        "models": models,
        "retrieval": Retrieval(weights=Weights(dense_title=0, bm25_title=0)),
        "places": Places(home=root),
    }
    return Settings(root=root, **{**fields, **changes})


def evaluated(bench: Workbench, name: str) -> Evaluation:
    """The corpus embedded, built into a snapshot and measured with one model."""
    steps.ingest_corpus(bench)
    steps.embed_corpus(bench, name)
    steps.snapshot_corpus(bench, name)
    return steps.measure_current(bench, name, steps.load_eval_set(bench))


def released(bench: Workbench, name: str) -> Entry:
    """The same, made live by an override, so that a test of what follows needs no gate."""
    snapshot_id = evaluated(bench, name).snapshot_id
    entry = promote(bench.store, snapshot_id, gate=bench.settings.gate, actor="tester", reason="for a test", override=True)
    assert entry is not None
    return entry
