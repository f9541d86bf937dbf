"""Ingestion: only what changed is read, parsed and cut, and the tables are those of a first run whatever came before."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rag_assets import corpus, cutting, ingestion
from rag_assets.conservation import conservation
from rag_assets.corpus import current_table, read_table
from rag_assets.sources import DOCUMENT, Item, Refused
from rag_assets.workbench import Workbench
from rag_serving.errors import SourceError
from rag_serving.settings import Chunking, Corpus, ModelSpec, Settings
from rag_serving.store import LocalStore

MODEL = ModelSpec(name="h", source="hashing:8", dims=8, max_tokens=64)
STEPS = (ingestion.list_source_files, ingestion.parse_documents, cutting.split_chunks)
TABLES = ("source_files", "documents", "quarantine", "chunks", "cuts")


class Shelf:
    """A source held in memory that counts what is read from it. A body of None cannot be read."""

    def __init__(self) -> None:
        self.things: dict[str, dict[str, object] | None] = {}
        self.reads: list[str] = []

    def items(self):
        for uri, body in self.things.items():
            data = json.dumps(body).encode()
            yield Item(uri, str(hash(data)), DOCUMENT, len(data), lambda uri=uri, data=data: self._read(uri, data))

    def _read(self, uri: str, data: bytes) -> bytes:
        self.reads.append(uri)
        if data == b"null":
            raise Refused("unreadable", f"{uri} cannot be read")
        return data

    def put(self, uri: str, text: str, **more: object) -> None:
        self.things[uri] = {"doc_id": uri, "title": f"Title of {uri}", "text": text, **more}


@pytest.fixture
def shelf(monkeypatch):
    made = Shelf()
    monkeypatch.setattr(ingestion, "corpus_source", lambda _: made)
    return made


def bench_at(folder: Path, **chunking: object) -> Workbench:
    settings = Settings(
        root=folder,
        corpus=Corpus(source="jsonl:x"),
        chunking=Chunking(**{"max_tokens": 16, **chunking}),
        models=(MODEL,),
        default_models=("h",),
    )
    return Workbench(settings, store=LocalStore(folder / "store"))


def run(bench: Workbench) -> dict[str, int]:
    return {name: count for step in STEPS for name, count in {f"{step.__name__}.{k}": v for k, v in step(bench).counts.items()}.items()}


def counted(bench: Workbench) -> tuple[dict[str, int], dict[str, int]]:
    """What parse_documents and split_chunks counted."""
    ingestion.list_source_files(bench)
    return dict(ingestion.parse_documents(bench).counts), dict(cutting.split_chunks(bench).counts)


def contents(store) -> dict[str, str]:
    return {name: current_table(store, name).content_sha256 for name in TABLES}


LONG = "word " * 40
TEXTS = st.sampled_from(["", "one text", "another text", "# A\n\nwords under a\n\n## B\n\n" + LONG, LONG, None])
STATES = st.lists(
    st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(TEXTS, st.booleans()), min_size=1, max_size=8), min_size=2, max_size=4
)


@examples(deadline=None, max_examples=12)
@given(states=STATES, part=st.integers(1, 4))
def test_the_tables_do_not_depend_on_history(tmp_path_factory, states: Sequence[dict[str, tuple[str | None, bool]]], part: int):
    """After any run of changes, in any order of the source, every table equals that of a first run on the last state, and conserves it."""
    folder, shelf = tmp_path_factory.mktemp("history"), Shelf()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingestion, "corpus_source", lambda _: shelf)
        patch.setattr(corpus, "PART_ROWS", part)
        patch.setattr(ingestion, "_BLOCK_ITEMS", 3)
        patch.setattr(cutting, "_BLOCK_DOCUMENTS", 2)
        incremental = bench_at(folder / "incremental")
        for state in states:
            shelf.things = {}
            for uri, (text, titled) in state.items():
                if text is None:
                    shelf.things[uri] = None
                else:
                    shelf.put(uri, text, **({"title": "Same"} if titled else {}))
            run(incremental)
        fresh = bench_at(folder / "fresh")
        run(fresh)
    assert contents(incremental.store) == contents(fresh.store)
    assert conservation(fresh.store).holds
    documents, quarantine = (current_table(fresh.store, name).rows for name in ("documents", "quarantine"))
    assert documents + quarantine == len(states[-1])


def test_only_what_changed_is_read_and_cut(tmp_path, shelf):
    """Of many documents one changed, one came and one went: two are read, parsed and cut, and nothing is left of the one that went."""
    bench = bench_at(tmp_path)
    for number in range(30):
        shelf.put(f"d{number}", f"text of {number}")
    parsed, cut = counted(bench)
    assert (parsed["read"], parsed["parsed"], parsed["reused"], cut["chunked"], cut["reused"]) == (30, 30, 0, 30, 0)
    shelf.reads.clear()
    shelf.put("d7", "a changed text")
    shelf.put("d30", "a new text")
    del shelf.things["d3"]
    parsed, cut = counted(bench)
    assert shelf.reads == ["d7", "d30"]
    assert parsed == {"read": 2, "parsed": 2, "reused": 28, "removed": 1, "quarantined": 0}
    assert (cut["chunked"], cut["reused"]) == (2, 28)
    _, chunks = read_table(bench.store, "chunks")
    assert "d3" not in set(chunks["doc_id"].to_pylist())
    assert "a changed text" in set(chunks["text"].to_pylist())
    assert "text of 7" not in set(chunks["text"].to_pylist())


def test_nothing_changed_nothing_done(tmp_path, shelf):
    """A second run of the same source reads, parses and cuts nothing, and every table is the one that was there."""
    bench = bench_at(tmp_path)
    shelf.put("a", "some text")
    counted(bench)
    shelf.reads.clear()
    parsed, cut = counted(bench)
    assert shelf.reads == []
    assert (parsed["parsed"], parsed["reused"], cut["chunked"], cut["reused"]) == (0, 1, 0, 1)
    assert all(step(bench).table.reused for step in STEPS)


def test_changed_metadata_leaves_the_chunks(tmp_path, shelf):
    """New metadata makes another documents table, and the same chunks table without looking into it."""
    bench = bench_at(tmp_path)
    shelf.put("a", "some text", metadata={"kind": "old"})
    counted(bench)
    before = contents(bench.store)
    shelf.put("a", "some text", metadata={"kind": "new"})
    ingestion.list_source_files(bench)
    ingestion.parse_documents(bench)
    assert cutting.split_chunks(bench).table.reused
    after = contents(bench.store)
    assert after["documents"] != before["documents"]
    assert after["chunks"] == before["chunks"]


def test_a_quarantined_item_is_kept_and_tried_again_when_it_changes(tmp_path, shelf):
    """What cannot be read is in quarantine by name and reason, is not read again as it is, and is a document once it can be."""
    bench = bench_at(tmp_path)
    shelf.put("good", "some text")
    shelf.things["bad"] = None
    assert counted(bench)[0]["quarantined"] == 1
    reasons, first = ingestion.quarantined(bench)
    assert (reasons, first[0]["item"], first[0]["detail"]) == ({"unreadable": 1}, "bad", "bad cannot be read")
    shelf.put("good", "other text")
    shelf.reads.clear()
    assert counted(bench)[0]["quarantined"] == 1
    assert shelf.reads == ["good"]
    shelf.put("bad", "a text after all")
    assert counted(bench)[0] == {"read": 1, "parsed": 1, "reused": 1, "removed": 0, "quarantined": 0}


def test_what_was_away_for_a_moment_comes_back(tmp_path, shelf, monkeypatch):
    """An item that could not be had, or was gone, while the run read it is a document of the next run, though no version changed."""
    bench = bench_at(tmp_path)
    shelf.put("a", "some text")
    shelf.put("b", "other text")

    def away(uri: str, data: bytes) -> bytes:
        if uri == "b":
            raise Refused("unreadable", "the store did not answer", passing=True)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "_read", away)
        assert counted(bench)[0]["quarantined"] == 1
    assert counted(bench)[0] == {"read": 1, "parsed": 1, "reused": 1, "removed": 0, "quarantined": 0}
    shelf.put("c", "a third text")
    ingestion.list_source_files(bench)
    third = shelf.things.pop("c")
    ingestion.parse_documents(bench)
    shelf.things["c"] = third
    counted(bench)
    assert ingestion.document_ids(bench) == {"a", "b", "c"}
    assert counted(bench)[0]["read"] == 0


def test_a_uri_that_says_markdown_cuts_as_markdown(tmp_path, shelf):
    """When a uri begins or ceases to end in .md, and all else stays, the chunks are those of a first run."""
    text = f"# A\n\n{LONG}\n\n## B\n\n{LONG}"
    for uri in ("a.md", "a.txt", "a.md"):
        shelf.things = {"a": {"doc_id": "a", "title": "T", "text": text, "uri": uri}}
        run(bench := bench_at(tmp_path / "incremental"))
        run(fresh := bench_at(tmp_path / uri))
        assert contents(bench.store) == contents(fresh.store)


def test_settings_and_code_are_part_of_the_key(tmp_path, shelf, monkeypatch):
    """Another chunk size cuts every document again and parses none; another parser parses every one and cuts those that came out as before not."""
    shelf.put("a", LONG)
    shelf.put("b", "some text")
    counted(bench_at(tmp_path))
    parsed, cut = counted(bench_at(tmp_path, max_tokens=20))
    assert (parsed["parsed"], cut["chunked"]) == (0, 2)
    monkeypatch.setattr(ingestion, "PARSER_VERSION", "another")
    parsed, cut = counted(bench_at(tmp_path, max_tokens=20))
    assert (parsed["parsed"], cut["chunked"], cut["reused"]) == (2, 0, 2)


def test_equal_documents_stand_once(tmp_path, shelf):
    """A text repeated a thousand times has the chunks of one document; the others are aliases of it. Another access list is another text."""
    bench = bench_at(tmp_path)
    for number in range(1000):
        shelf.put(f"d{number}", "buy this", title="Buy")
    shelf.put("other", "some text")
    shelf.put("private", "buy this", title="Buy", acl=["boss"])
    _, cut = counted(bench)
    assert (cut["aliases"], cut["chunked"]) == (999, 3)
    _, chunks = read_table(bench.store, "chunks")
    assert chunks["doc_id"].to_pylist() == ["d0", "other", "private"]
    assert cutting.aliases(bench)["d999"] == "d0"
    assert len(ingestion.document_ids(bench)) == 1002
    del shelf.things["d0"]
    counted(bench)
    assert read_table(bench.store, "chunks")[1]["doc_id"].to_pylist() == ["d1", "other", "private"]
    assert conservation(bench.store).holds


def test_one_id_twice_is_refused(tmp_path, shelf):
    """Two items with one document id are named, both of them, and the tables stay as they were."""
    bench = bench_at(tmp_path)
    shelf.put("a", "some text")
    counted(bench)
    before = contents(bench.store)
    shelf.things["b"] = {"doc_id": "a", "title": "", "text": "other text"}
    ingestion.list_source_files(bench)
    with pytest.raises(SourceError, match="a and b both give the document 'a'"):
        ingestion.parse_documents(bench)
    assert {name: content for name, content in contents(bench.store).items() if name != "source_files"} == {
        name: content for name, content in before.items() if name != "source_files"
    }


def test_a_run_that_stops_leaves_the_tables(tmp_path, shelf, monkeypatch):
    """An error in the middle of parsing or cutting leaves every table as it was, and the next run makes what a first run would."""
    bench = bench_at(tmp_path)
    shelf.put("a", "some text")
    counted(bench)
    before = contents(bench.store)
    shelf.put("b", "other text")
    ingestion.list_source_files(bench)
    with monkeypatch.context() as patch:
        patch.setattr(ingestion, "_document_row", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ingestion.parse_documents(bench)
    assert contents(bench.store)["documents"] == before["documents"]
    ingestion.parse_documents(bench)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cutting.split_chunks(bench)
    assert contents(bench.store)["chunks"] == before["chunks"]
    cutting.split_chunks(bench)
    run(fresh := bench_at(tmp_path / "fresh"))
    assert contents(bench.store) == contents(fresh.store)


def test_a_source_of_which_nothing_can_be_read(tmp_path, shelf):
    """When every item is quarantined the tables are empty and say so; nothing fails, nothing is lost."""
    bench = bench_at(tmp_path)
    shelf.things = {"a": None, "b": None}
    parsed, cut = counted(bench)
    assert (parsed["quarantined"], parsed["parsed"], cut["chunked"]) == (2, 0, 0)
    assert conservation(bench.store).holds
    assert counted(bench)[0]["read"] == 0


def test_conservation_finds_what_is_lost(tmp_path, shelf):
    """A document whose chunks are gone, a chunk of no document and a chunk twice are counted and named."""
    bench = bench_at(tmp_path)
    shelf.put("a", "some text")
    shelf.put("b", "other text")
    shelf.put("empty", "", title="")
    counted(bench)
    sound = conservation(bench.store)
    assert (sound.holds, sound.documents, sound.chunks, sound.wordless) == (True, 3, 2, 1)
    rows = read_table(bench.store, "chunks")[1].to_pylist()
    writer = corpus.TableWriter(bench.store, "chunks", corpus.CHUNKS)
    writer.extend([rows[0], rows[0], {**rows[1], "doc_id": "stranger"}])
    writer.finish(made_from="tampered")
    found = conservation(bench.store)
    assert (found.holds, found.lost, found.orphans, found.repeated) == (False, 1, 1, 1)
    assert found.examples == ("b", rows[1]["chunk_id"])


def curve(documents: int) -> list[list[float]]:
    """RSS in MiB every tenth of parsing, cutting, and both again after one document in a hundred changed; in a process of its own."""
    script = Path(__file__).with_name("rss_curve.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, str(documents)], capture_output=True, text=True, check=False, env=environment, timeout=1700
    )
    assert done.returncode == 0, done.stderr
    return [[float(value) for value in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus():
    """Each step over 50,000 documents takes less than 40 MiB more in its second half than in its first, and all of them less than 250."""
    steps = curve(50_000)
    assert len(steps) == 4
    for step in steps:
        assert max(step) - max(step[: len(step) // 2]) < 40, steps
    assert max(map(max, steps)) - steps[0][0] < 250, steps


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_million_documents_in_flat_memory():
    """Within each step over 1,000,000 short documents RSS is flat after warm-up (40 MiB); all its indexes take less than 300 MiB."""
    steps = curve(1_000_000)
    for name, step in zip(("parse", "cut", "parse again", "cut again"), steps, strict=True):
        print(f"\n{name}: RSS in MiB", " ".join(f"{value:.0f}" for value in step))
        assert max(step[3:]) - min(step[3:]) < 40, steps
    assert max(map(max, steps)) - steps[0][0] < 300, steps
