"""Sources: the sample, folders, JSON Lines and BEIR collections, and what they refuse."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mixed_files import hostile_links

from evals.sample.reference import services
from rag_assets.parsing import Quarantined, parse_items
from rag_assets.sources import Document, Item, Refused, open_source
from rag_serving.errors import SourceError
from rag_serving.settings import Parsing


@pytest.fixture(scope="session")
def sample_documents() -> list[Document]:
    return list(read("sample:", Path()).values())


def items_of(address: str, root: Path) -> list[Item]:
    return list(open_source(address, root=root).items())


def outcomes(address: str, root: Path) -> list[Document | Quarantined]:
    return [found for _, found in parse_items(open_source(address, root=root).items(), limits=Parsing())]


def read(address: str, root: Path) -> dict[str, Document]:
    found = outcomes(address, root)
    assert not [each for each in found if isinstance(each, Quarantined)]
    return {document.doc_id: document for document in found if isinstance(document, Document)}


def refused(address: str, root: Path) -> dict[str, str]:
    return {each.uri: each.reason for each in outcomes(address, root) if isinstance(each, Quarantined)}


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
    small = list(read("sample:small", Path()).values())
    four = {"ec2", "iam", "rds", "s3"}
    assert len(small) == 1294
    assert small == [document for document in sample_documents if document.metadata["service"] in four]


def test_sample_items_are_cheap_to_list_and_versioned_by_content(sample_documents):
    """Listing gives an item per document, in its order, whose version is the same at each listing and its own."""
    listed = items_of("sample:small", Path())
    assert [item.uri for item in listed] == [document.doc_id for document in sample_documents if document.doc_id in {i.uri for i in listed}]
    assert listed == items_of("sample:small", Path())
    assert len({item.version for item in listed}) == len(listed)


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
        items_of("sample:", Path())
    assert 'pip install "ragline[pipeline]"' in raised.value.fix


def test_folder_reads_each_kind_with_its_title(tmp_path):
    """Markdown, text, reStructuredText and HTML are read; ids are relative paths in their order, titles first headings or the file stem."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.md").write_text("# hidden")
    (tmp_path / "b.md").write_text("```\n# no heading\n```\n\n## A *real* one\ntext")
    (tmp_path / "front.md").write_text("---\ntitle: 'From front matter'\nlang: en\n---\n# Later\n")
    (tmp_path / "sub" / "a.txt").write_text("\ufeffplain text", encoding="utf-8")
    (tmp_path / "sub.md").write_text("# before the folder sub")
    (tmp_path / "r.rst").write_text("=====\nIntro\n=====\n\nwords\n\nNext\n----\n")
    (tmp_path / "p.HTML").write_text(
        "<html><title>Site</title><script>var x</script><h1>Page <b>one</b></h1><p>a &amp; b<ul><li><p>i1</p><li>i2</ul>"
    )
    (tmp_path / "skip.bin").write_bytes(b"\xff\x00")
    found = read("folder:.", tmp_path)
    assert list(found) == ["b.md", "front.md", "p.HTML", "r.rst", "sub.md", "sub/a.txt"]
    assert list(found) == sorted(found)
    titles = {doc_id: document.title for doc_id, document in found.items()}
    assert titles["p.HTML"] == "Page one"
    assert (titles["b.md"], titles["front.md"], titles["r.rst"], titles["sub/a.txt"]) == ("A real one", "From front matter", "Intro", "a")
    assert found["p.HTML"].text == "# Page one\n\na & b\n- i1\n- i2"
    assert found["sub/a.txt"].text == "plain text"
    assert {doc_id: document.metadata.get("markup") for doc_id, document in found.items()} == {
        "b.md": "markdown",
        "front.md": "markdown",
        "p.HTML": "markdown",
        "r.rst": "rst",
        "sub.md": "markdown",
        "sub/a.txt": None,
    }


def test_folder_items_are_versioned_by_their_bytes(tmp_path):
    """Equal version means equal bytes: touching a file changes nothing, another byte does, and the old bytes bring the old version back."""
    file = tmp_path / "a.md"
    file.write_text("# a")
    (first,) = items_of("folder:.", tmp_path)
    assert (first.uri, first.media, first.size, first.read()) == ("a.md", ".md", 3, b"# a")
    assert first.version == hashlib.sha256(b"# a").hexdigest()
    os.utime(file, (1, 1))
    assert items_of("folder:.", tmp_path) == [first]
    file.write_text("# b")
    assert items_of("folder:.", tmp_path)[0].version != first.version
    file.write_text("# a")
    assert items_of("folder:.", tmp_path) == [first]


def test_folder_refuses_what_leads_out_of_it_and_reads_the_rest(tmp_path):
    """Links out, in circles and to nothing, a pipe and a bad name are each refused by reason; good files beside them are read."""
    folder = tmp_path / "docs"
    (folder / "within").mkdir(parents=True)
    (folder / "a.md").write_text("# a")
    (folder / "again.md").symlink_to(folder / "a.md")
    (folder / "same").symlink_to(folder / "within")
    (folder / "within" / "up").symlink_to(folder)
    expected = hostile_links(folder, tmp_path / "secret.md")
    if sys.platform != "darwin":
        (folder / os.fsdecode(b"caf\xe9.md")).write_text("# a")
        expected["caf\\xe9.md"] = "name_not_utf8"
    found = outcomes("folder:docs", tmp_path)
    assert {each.uri: each.reason for each in found if isinstance(each, Quarantined)} == expected
    assert [document.doc_id for document in found if isinstance(document, Document)] == ["a.md", "again.md"]
    assert "secret" not in "".join(document.text for document in found if isinstance(document, Document))


def test_a_link_that_leads_nowhere_at_all_ends_no_run(tmp_path):
    """A link to a name longer than any file's is refused if it would be a document, else passed over."""
    (tmp_path / "a.md").write_text("# a")
    (tmp_path / "long.md").symlink_to("x" * 300)
    (tmp_path / "long.bin").symlink_to("x" * 300)
    found = outcomes("folder:.", tmp_path)
    assert [each.reason if isinstance(each, Quarantined) else each.doc_id for each in found] == ["a.md", "unreadable"]


def test_a_file_that_changes_after_listing_is_left_to_the_next_run(tmp_path):
    """What is read is what was listed: a file of other bytes, or a file that is gone, is refused for now."""
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("as listed")
    changed, gone = items_of("folder:.", tmp_path)
    (tmp_path / "a.md").write_text("otherwise")
    (tmp_path / "b.md").unlink()
    for item, reason in ((changed, "changed_meanwhile"), (gone, "unreadable")):
        with pytest.raises(Refused) as raised:
            item.read()
        assert (raised.value.reason, raised.value.passing) == (reason, True)


def test_folder_that_is_missing_or_empty_is_an_error(tmp_path):
    """No folder, or none with a document in it, is a SourceError that says what to do."""
    with pytest.raises(SourceError, match="no folder at"):
        items_of("folder:nowhere", tmp_path)
    (tmp_path / "docs").mkdir()
    with pytest.raises(SourceError, match="no readable document") as raised:
        items_of("folder:docs", tmp_path)
    assert ".md" in raised.value.fix


def test_a_deep_folder_is_read(tmp_path):
    """A chain of folders deeper than Python's recursion limit is walked to its end."""
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1100):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(os.open("end.md", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        assert [item.uri for item in items_of("folder:.", tmp_path)] == ["d/" * 1100 + "end.md"]
    finally:
        os.close(here)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil.rmtree, which pytest would use, recurses


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
    name = "corpus.jsonl.gz" if gzipped else "corpus.jsonl"
    assert [item.uri for item in items_of(f"beir:{tmp_path}", Path())] == [f"{name}#d1", f"{name}#d2"]


@pytest.mark.parametrize(
    ("line", "reason", "says"),
    [
        ("{not json", "invalid_json", "line 2 is not valid JSON"),
        ("[" * 100_000, "invalid_json", "line 2 is not valid JSON"),
        ("[1]", "invalid_document", "line 2 holds a list"),
        ('{"text": "x"}', "invalid_document", "line 2 has no _id"),
        ('{"_id": "", "text": "x"}', "invalid_document", "line 2 has no _id"),
        ('{"_id": "b"}', "invalid_document", "it needs an id and text"),
        ('{"_id": "b", "text": 7}', "invalid_document", "it needs an id and text"),
        ('{"_id": "b", "text": "x", "acl": "all"}', "invalid_document", "acl is a list"),
        ('{"_id": "b", "text": "x", "title": ["t"]}', "invalid_document", "title"),
    ],
)
def test_a_bad_line_is_refused_by_its_number_and_the_rest_is_read(tmp_path, line, reason, says):
    """A malformed line or a missing field is quarantined by file name, and by line number or id; the documents around it are read."""
    write_lines(tmp_path / "corpus.jsonl", {"_id": "a", "text": "first"}, line, {"_id": "z", "text": "last"})
    first, bad, last = outcomes(f"beir:{tmp_path}", Path("/"))
    assert [first.doc_id, last.doc_id] == ["a", "z"]
    assert bad.reason == reason
    assert says in bad.detail
    assert bad.uri in ("corpus.jsonl:2", "corpus.jsonl#b")


def test_a_line_over_the_limit_is_not_held_in_memory(tmp_path, monkeypatch):
    """A line longer than LONGEST_LINE is refused by number; the next line is read as itself."""
    monkeypatch.setattr("rag_assets.sources.lines.LONGEST_LINE", 1000)
    write_lines(tmp_path / "d.jsonl", {"id": "a", "text": "x"}, {"id": "b", "text": "y" * 5000}, {"id": "c", "text": "z"})
    assert refused("jsonl:d.jsonl", tmp_path) == {"d.jsonl:2": "too_large"}
    assert [item.uri for item in items_of("jsonl:d.jsonl", tmp_path)] == ["d.jsonl#a", "d.jsonl:2", "d.jsonl#c"]


def test_a_folder_of_json_lines_is_one_source(tmp_path):
    """Every .jsonl and .jsonl.gz under a folder is read in the order of the paths, as loaders write them; other files are not."""
    (tmp_path / "lake" / "b").mkdir(parents=True)
    write_lines(tmp_path / "lake" / "b" / "2.jsonl", {"id": "two", "text": "x"})
    write_lines(tmp_path / "lake" / "a.jsonl", {"id": "one", "text": "x", "acl": ["sales"]})
    (tmp_path / "lake" / "b" / "3.jsonl.gz").write_bytes(gzip.compress(b'{"id": "three", "text": "x"}'))
    (tmp_path / "lake" / "b" / "4.jsonl").write_bytes(gzip.compress(b'{"id": "four", "text": "packed without saying so"}'))
    (tmp_path / "lake" / "state.json").write_text("{}")
    found = read("jsonl:lake", tmp_path)
    assert list(found) == ["one", "two", "three", "four"]
    assert found["one"].acl == ("sales",)
    assert found["two"].uri == "b/2.jsonl#two"


def test_a_truncated_archive_is_refused(tmp_path):
    """Half a gzip file is an error, not a smaller corpus."""
    rows = "".join(json.dumps({"_id": str(n), "text": hashlib.sha256(str(n).encode()).hexdigest()}) + "\n" for n in range(2000))
    packed = gzip.compress(rows.encode())
    (tmp_path / "corpus.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(SourceError, match=r"cannot read corpus\.jsonl\.gz"):
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
    assert all(
        scheme in raised.value.fix
        for scheme in ("sample:", "sample:small", "folder:PATH", "jsonl:PATH", "beir:PATH", "urls:FILE", "fsspec:URL")
    )


@pytest.mark.parametrize("field", ["_id", "title", "text", "url"])
@pytest.mark.parametrize(("name", "address"), [("docs.jsonl", "jsonl:docs.jsonl"), ("corpus.jsonl", "beir:.")])
def test_half_a_character_is_refused(tmp_path, name, address, field):
    """A lone surrogate, which no file can store, is quarantined with a detail that can be printed; a whole pair is a character."""
    write_lines(tmp_path / name, {"_id": "a", "text": "\U0001f600"}, {"_id": "b", "text": "x", field: "x \ud800"})
    whole, half = outcomes(address, tmp_path)
    assert whole.text == "\U0001f600"
    assert half.reason == "invalid_text"
    assert "half a character" in half.detail
    f"{half.uri} {half.detail}".encode()


@pytest.fixture
def bucket():
    """An empty bucket of fsspec's in-memory object store."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.rm("/bucket", recursive=True) if system.exists("/bucket") else None
    yield system
    system.rm("/bucket", recursive=True)


def test_objects_under_a_prefix(bucket, tmp_path):
    """memory:// and file:// prefixes are read through fsspec alike: keys below the prefix in their order, hidden and other ones left out."""
    names = {"docs/b.md": "# b", "docs/a/c.txt": "c", "docs/a.md": "# a", "docs/.x.md": "no", "docs/p.png": "no", "other.md": "no"}
    for name, text in names.items():
        bucket.pipe_file(f"/bucket/{name}", text.encode())
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for address in ("memory://bucket/docs", "fsspec:memory://bucket/docs", f"file://{tmp_path}/docs"):
        found = read(address, Path("/"))
        assert {doc_id: document.text for doc_id, document in found.items()} == {"a.md": "# a", "a/c.txt": "c", "b.md": "# b"}
        assert list(found) == ["a.md", "a/c.txt", "b.md"]


def test_an_object_has_a_new_version_when_it_changes(bucket):
    """The version follows the store's mark of change and is the same while nothing changes."""
    bucket.pipe_file("/bucket/a.md", b"# a")
    before = items_of("memory://bucket", Path())
    assert items_of("memory://bucket", Path()) == before
    bucket.pipe_file("/bucket/a.md", b"# b")
    assert items_of("memory://bucket", Path())[0].version != before[0].version


def test_json_lines_in_an_object_store(bucket):
    """jsonl:URL reads the JSON Lines files under a prefix, gzipped or not."""
    bucket.pipe_file("/bucket/t/1.jsonl", b'{"id": "a", "text": "x"}\n')
    bucket.pipe_file("/bucket/t/2.jsonl.gz", gzip.compress(b'{"id": "b", "text": "y"}\n'))
    assert list(read("jsonl:memory://bucket/t", Path())) == ["a", "b"]


@pytest.mark.parametrize(
    ("address", "says"),
    [("memory://nobody/home", "cannot list"), ("memory://bucket", "holds no readable"), ("https://example.org/a", "urls:")],
)
def test_objects_that_are_not_there(bucket, address, says):
    """A prefix that does not exist or holds no document is a SourceError; a web address is sent to urls:."""
    bucket.mkdir("/bucket")
    with pytest.raises(SourceError) as raised:
        items_of(address, Path())
    assert says in str(raised.value)


def test_errors_of_a_stores_own_package_are_ours(bucket, monkeypatch):
    """Whatever a store's package raises: a listing that fails is a SourceError, an object that fails is refused for now."""
    bucket.pipe_file("/bucket/a.md", b"# a")
    (item,) = items_of("memory://bucket", Path())

    class NoCredentialsError(Exception):
        """As botocore's, which is no OSError."""

    def fails(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(type(bucket), "open", fails)
    with pytest.raises(Refused, match="credentials") as raised:
        item.read()
    assert raised.value.passing
    monkeypatch.setattr(type(bucket), "isfile", fails)
    with pytest.raises(SourceError, match="cannot list"):
        items_of("memory://bucket", Path())


def test_a_missing_file_system_package_is_named(monkeypatch):
    """An address whose fsspec package is not installed says which one is needed."""
    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda _: (_ for _ in ()).throw(ImportError("Install s3fs to access S3")))
    with pytest.raises(SourceError, match="s3fs"):
        items_of("s3://bucket/docs", Path())
