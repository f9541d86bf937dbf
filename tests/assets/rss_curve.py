"""RSS in MiB, a line a step, while short documents are listed, parsed and cut; then again with one in a hundred changed."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from rag_assets import cutting, ingestion
from rag_assets.sources import DOCUMENT, Item
from rag_assets.workbench import Workbench
from rag_serving.settings import Chunking, Corpus, ModelSpec, Settings
from rag_serving.store import LocalStore


class Generated:
    def __init__(self, count: int) -> None:
        self.count = count
        self.round = 0

    def items(self):
        for number in range(self.count):
            edition = self.round if number % 100 == 0 else 0
            yield Item(f"d{number}", f"v{edition}", DOCUMENT, 200, lambda number=number, edition=edition: self.read(number, edition))

    def read(self, number: int, edition: int) -> bytes:
        text = f"Document {number}, edition {edition}, tells about topic {number % 97} and thing {number % 1009}."
        return json.dumps({"doc_id": f"d{number}", "title": f"Document {number}", "text": text}).encode()


class Watching:
    """A reporter that prints the RSS at every tenth of a bar."""

    def note(self, text: str) -> None: ...

    def bar(self, title: str):
        return self

    def __enter__(self) -> Callable[[int, int], None]:
        self.shown = -1
        return self.update

    def __exit__(self, *_: object) -> None:
        print(flush=True)

    def update(self, done: int, total: int) -> None:
        if done * 10 // total > self.shown:
            self.shown = done * 10 // total
            print(f"{psutil.Process().memory_info().rss / 2**20:.1f}", end=" ", flush=True)


def main(count: int) -> None:
    source = Generated(count)
    ingestion.corpus_source = lambda _: source
    model = ModelSpec(name="h", source="hashing:8", dims=8, max_tokens=256)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            root=Path(folder), corpus=Corpus(source="jsonl:generated"), chunking=Chunking(), models=(model,), default_models=("h",)
        )
        bench = Workbench(settings, store=LocalStore(Path(folder) / "store"), reporter=Watching())
        for source.round in (0, 1):
            for step in (ingestion.list_source_files, ingestion.parse_documents, cutting.split_chunks):
                made = step(bench)
                print(made.table.name, made.table.rows, dict(made.counts), file=sys.stderr, flush=True)


main(int(sys.argv[1]))
