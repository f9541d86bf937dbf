"""Sources: the sample, folders, JSON Lines and BEIR collections, and what they refuse."""

import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from evals.sample.reference import services
from rag_assets.sources import Document, html_text, markdown_headings, open_source
from rag_serving.errors import SourceError


@pytest.fixture(scope="session")
def sample_documents() -> list[Document]:
    return list(open_source("sample:", root=Path()).documents())


def read(address: str, root: Path) -> dict[str, Document]:
    return {document.doc_id: document for document in open_source(address, root=root).documents()}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_sample_is_3267_operations_of_44_services(sample_documents):
    """The sample holds one document per documented operation, with an id that names it and a readable title."""
    assert len(sample_documents) == 3267
    assert len({document.metadata["service"] for document in sample_documents}) == 44
    assert len({document.doc_id for document in sample_documents}) == 3267
    by_id = {document.doc_id: document for document in sample_documents}
    assert by_id["rds.CreateDBInstance"].title == "Amazon Relational Database Service: Create DB Instance"
    assert all(len(document.text) >= 20 and not document.text[0].isspace() for document in sample_documents)
    assert not any(tag in document.text for document in sample_documents for tag in ("<p>", "</li>", "</a>", "&lt;", "&amp;"))
    assert sum("\n- " in document.text for document in sample_documents) > 300


def test_small_sample_is_the_same_documents_of_four_services(sample_documents):
    """The small tier is a subset of the full one, document for document."""
    small = list(open_source("sample:small", root=Path()).documents())
    four = {"ec2", "iam", "rds", "s3"}
    assert len(small) == 1294
    assert small == [document for document in sample_documents if document.metadata["service"] in four]


def test_sample_files_are_the_service_models_by_hash():
    """files() names each of the 44 files that are read, with the hash and size of its bytes, and never the worked examples."""
    files = list(open_source("sample:", root=Path()).files())
    assert len(files) == 44
    assert all(file.uri.startswith("botocore/data/") and "examples" not in file.uri for file in files)
    first = next(iter(services("full"))).model_file
    assert files[0].sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    assert files[0].size == first.stat().st_size


def test_no_worked_example_text_in_the_sample(sample_documents):
    """A long description of a worked example, from which queries are made, stands in no document of its operation."""
    texts = {document.doc_id: " ".join(document.text.split()).lower() for document in sample_documents}
    checked = 0
    for service in services("full"):
        for operation, examples in service.examples.items():
            for example in examples:
                description = " ".join(example["description"].split()).lower()
                doc_id = f"{service.name}.{operation}"
                if doc_id in texts and description.startswith(("the following example", "this example")):
                    checked += 1
                    assert description not in texts[doc_id]
                if example["id"] and len(example["id"]) > 20:
                    assert example["id"] not in texts.get(doc_id, "")
    assert checked > 700


def test_missing_botocore_says_what_to_install(monkeypatch):
    """Without botocore the sample is a SourceError that gives the command."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SourceError, match="botocore") as raised:
        list(open_source("sample:", root=Path()).documents())
    assert 'pip install "ragline[pipeline]"' in raised.value.fix


def test_folder_reads_each_kind_with_its_title(tmp_path):
    """Markdown, text, reStructuredText and HTML are read; ids are relative paths, titles first headings or the file stem."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.md").write_text("# hidden")
    (tmp_path / "b.md").write_text("```\n# no heading\n```\n\n## A *real* one\ntext")
    (tmp_path / "front.md").write_text("---\ntitle: 'From front matter'\nlang: en\n---\n# Later\n")
    (tmp_path / "sub" / "a.txt").write_text("\ufeffplain text", encoding="utf-8")
    (tmp_path / "r.rst").write_text("=====\nIntro\n=====\n\nwords\n\nNext\n----\n")
    (tmp_path / "p.HTML").write_text(
        "<html><title>Site</title><script>var x</script><h1>Page <b>one</b></h1><p>a &amp; b<ul><li><p>i1</p><li>i2</ul>"
    )
    (tmp_path / "skip.bin").write_bytes(b"\xff\x00")
    found = read("folder:.", tmp_path)
    assert list(found) == ["b.md", "front.md", "p.HTML", "r.rst", "sub/a.txt"]
    titles = {doc_id: document.title for doc_id, document in found.items()}
    assert titles == {"b.md": "A real one", "front.md": "From front matter", "p.HTML": "Page one", "r.rst": "Intro", "sub/a.txt": "a"}
    assert found["p.HTML"].text == "Page one\n\na & b\n- i1\n- i2"
    assert found["sub/a.txt"].text == "plain text"
    files = list(open_source("folder:.", root=tmp_path).files())
    assert [file.uri for file in files] == list(found)
    assert files[0].sha256 == hashlib.sha256((tmp_path / "b.md").read_bytes()).hexdigest()


def test_folder_refuses_links_that_leave_it(tmp_path):
    """A link to a file or a folder outside is refused by name, so that nothing is indexed that nobody put there."""
    (tmp_path / "secret.md").write_text("# secret")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# a")
    (tmp_path / "docs" / "again.md").symlink_to(tmp_path / "docs" / "a.md")
    assert list(read("folder:docs", tmp_path)) == ["a.md", "again.md"]
    (tmp_path / "docs" / "out.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(SourceError, match=r"out\.md links out"):
        read("folder:docs", tmp_path)
    (tmp_path / "docs" / "out.md").unlink()
    (tmp_path / "docs" / "up").symlink_to(tmp_path)
    with pytest.raises(SourceError, match="up links out"):
        list(open_source("folder:docs", root=tmp_path).files())


def test_folder_names_the_file_it_cannot_read(tmp_path):
    """Undecodable bytes, a dangling link, a missing and an empty folder are SourceErrors that name the place and the way out."""
    with pytest.raises(SourceError, match="no folder at"):
        read("folder:nowhere", tmp_path)
    (tmp_path / "docs").mkdir()
    with pytest.raises(SourceError, match="no readable document") as raised:
        read("folder:docs", tmp_path)
    assert ".md" in raised.value.fix
    (tmp_path / "docs" / "gone.md").symlink_to(tmp_path / "docs" / "nothing")
    with pytest.raises(SourceError, match=r"cannot read .*gone\.md"):
        read("folder:docs", tmp_path)
    (tmp_path / "docs" / "gone.md").unlink()
    (tmp_path / "docs" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(SourceError, match=r"latin\.txt is not UTF-8 at byte 3") as raised:
        read("folder:docs", tmp_path)
    assert "UTF-8" in raised.value.fix


@pytest.mark.parametrize("gzipped", [False, True])
def test_beir_corpus_plain_and_gzipped(tmp_path, gzipped):
    """A BEIR corpus is read from corpus.jsonl or corpus.jsonl.gz, by its own ids; the bare path of its folder means the same."""
    rows = [{"_id": "d1", "title": "T", "text": "x", "metadata": {"n": 1, "tags": ["a"], "none": None}}, {"_id": "d2", "text": "y"}]
    write_lines(tmp_path / "corpus.jsonl", *rows)
    if gzipped:
        (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress((tmp_path / "corpus.jsonl").read_bytes()))
        (tmp_path / "corpus.jsonl").unlink()
    found = read(f"beir:{tmp_path}", Path("/"))
    assert found["d1"].metadata == {"n": 1, "tags": '["a"]'}
    assert (found["d2"].title, found["d2"].text) == ("", "y")
    assert read(tmp_path.name, tmp_path.parent) == found
    assert [file.uri for file in open_source(f"beir:{tmp_path}", root=Path()).files()] == ["corpus.jsonl.gz" if gzipped else "corpus.jsonl"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", r"corpus\.jsonl, line 2: not valid JSON"),
        ("[1]", r"line 2: a list where an object"),
        ('{"_id": "b"}', "line 2: no usable document"),
        ('{"text": "x"}', "line 2: no usable document"),
        ('{"_id": "a", "text": "x"}', "id 'a' on lines 1 and 2"),
    ],
)
def test_beir_names_file_and_line(tmp_path, line, says):
    """A malformed line, a missing field or a repeated id is refused by file name and line number."""
    write_lines(tmp_path / "corpus.jsonl", {"_id": "a", "text": "first"}, line)
    with pytest.raises(SourceError, match=says):
        read(f"beir:{tmp_path}", Path("/"))


def test_a_truncated_archive_is_refused(tmp_path):
    """Half a gzip file is an error, not a smaller corpus."""
    rows = "".join(json.dumps({"_id": str(n), "text": hashlib.sha256(str(n).encode()).hexdigest()}) + "\n" for n in range(2000))
    packed = gzip.compress(rows.encode())
    (tmp_path / "corpus.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(SourceError, match=r"cannot read .*corpus\.jsonl\.gz"):
        read(f"beir:{tmp_path}", Path("/"))


def test_jsonl_ids_and_empty_file(tmp_path):
    """A JSON Lines source takes `id` or `_id`, numbers included; an empty file is an error."""
    write_lines(tmp_path / "docs.jsonl", {"id": 7, "title": "T", "text": "x", "url": "https://example.org/7"}, {"_id": "b", "text": "y"})
    found = read("jsonl:docs.jsonl", tmp_path)
    assert found["7"].uri == "https://example.org/7"
    assert found["b"].uri == "docs.jsonl#b"
    assert read("docs.jsonl", tmp_path) == found
    write_lines(tmp_path / "none.jsonl")
    with pytest.raises(SourceError, match="holds no documents"):
        read("jsonl:none.jsonl", tmp_path)
    with pytest.raises(SourceError, match="no file at"):
        read("jsonl:missing.jsonl", tmp_path)


@pytest.mark.parametrize("address", ["s4://bucket", "sample:big", "folders:x", "", "no/such/path"])
def test_unknown_address_names_the_valid_ones(tmp_path, address):
    """An address that means nothing is a SourceError that lists every scheme."""
    with pytest.raises(SourceError) as raised:
        open_source(address, root=tmp_path)
    assert all(scheme in raised.value.fix for scheme in ("sample:", "sample:small", "folder:PATH", "jsonl:PATH", "beir:PATH"))


def test_html_keeps_lists_and_preformatted_text():
    """Lists stay "- " lines, <pre> keeps its lines, hidden elements and unclosed tags leave nothing behind."""
    page = "<style>p{}</style><p>One\n two<ul><li>a</li><li> <p>b</p> </li></ul><pre>x = 1\n  y</pre>after"
    assert html_text(page) == ("", "One two\n- a\n- b\n\nx = 1\n  y\n\nafter")


def test_markdown_heading_offsets():
    """Offsets point at the heading's line whatever the line ends, and setext headings count."""
    text = "intro\r\n\r\n# One\r\nx\r\n\r\nTwo `c`\r\n-------\r\n"
    assert [(text[at : at + 3], level, title) for at, level, title in markdown_headings(text)] == [("# O", 1, "One"), ("Two", 2, "Two c")]


@pytest.mark.parametrize("field", ["id", "title", "text", "url"])
@pytest.mark.parametrize(("name", "address"), [("docs.jsonl", "jsonl:docs.jsonl"), ("corpus.jsonl", "beir:.")])
def test_half_a_character_is_refused_by_line(tmp_path, name, address, field):
    """A lone surrogate, which no file can store, is a SourceError with file, line and escape; a whole pair is a character."""
    whole = {"_id": "a", "text": "\U0001f600"}
    write_lines(tmp_path / name, whole)
    assert read(address, tmp_path)["a"].text == "\U0001f600"
    broken = {"_id": "b", "text": "x", field.replace("id", "_id"): "x \ud800"}
    write_lines(tmp_path / name, whole, broken)
    with pytest.raises(SourceError, match=rf"{name}, line 2: half a character, .ud800") as raised:
        read(address, tmp_path)
    str(raised.value).encode()


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 names only")
def test_file_name_that_is_not_utf8_is_refused(tmp_path):
    """A file whose name is not UTF-8, and so can be no id, is a SourceError that can itself be printed."""
    (tmp_path / os.fsdecode(b"caf\xe9.md")).write_text("# a")
    with pytest.raises(SourceError, match="is not UTF-8") as raised:
        read("folder:.", tmp_path)
    str(raised.value).encode()
