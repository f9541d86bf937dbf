"""Eval sets: the sample's, BEIR folders, hashes, halves and validation."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.collections import EvalSet, EvalSetError, Query, load_beir, open_eval_set, split_of
from evals.living import write_beir
from evals.sample import load_sample
from evals.sample.reference import services


@pytest.fixture(scope="session")
def sample() -> EvalSet:
    return load_sample("full")


@pytest.fixture
def tiny() -> EvalSet:
    return EvalSet("tiny", (Query("q1", "first", {"slice": "a"}), Query("q2", "second")), {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2}})


def test_sample_has_1344_queries_over_44_services(sample):
    """The sample's eval set comes to its documented size, every query judged, no two alike."""
    assert len(sample.queries) == 1344
    assert {query.metadata["service"] for query in sample.queries} == {service.name for service in services("full")}
    assert sample.duplicate_texts == 0
    assert all(len(query.text.split()) >= 4 for query in sample.queries)
    sample.validate({f"{service.name}.{operation}" for service in services("full") for operation in service.operations})


def test_small_sample_is_391_queries_of_the_full_one(sample):
    """The small tier asks the same queries under the same ids, with the same judgments."""
    small = open_eval_set("sample:small", root=Path())
    assert len(small.queries) == 391
    assert set(small.qrels) <= set(sample.qrels)
    assert all(sample.qrels[query_id] == row for query_id, row in small.qrels.items())


def test_two_loads_are_one_hash(sample):
    """Reading the sample again gives the same ids and the same hash."""
    again = open_eval_set("sample:", root=Path())
    assert again.queries == sample.queries
    assert again.sha256 == sample.sha256


def test_queries_name_their_service(sample):
    """Each query says which service it is about, so that its relevant operation can be told from a namesake elsewhere."""
    short_names = {service.name: service.model["metadata"]["serviceId"].lower() for service in services("small")}
    four = [query for query in sample.queries if query.metadata["service"] in short_names]
    assert all(short_names[query.metadata["service"]] in query.text.lower() for query in four)


def test_hash_ignores_order_and_name_only(tiny):
    """Order and name leave the hash alone; a word, a slice, a judgment or a query less changes it."""
    turned = EvalSet("other", tiny.queries[::-1], {"q2": {"d2": 2}, "q1": {"d2": 0, "d1": 1}})
    assert turned.sha256 == tiny.sha256
    others = [
        replace(tiny, queries=(Query("q1", "first!", {"slice": "a"}), tiny.queries[1])),
        replace(tiny, queries=(Query("q1", "first", {"slice": "b"}), tiny.queries[1])),
        replace(tiny, qrels={**tiny.qrels, "q2": {"d2": 1}}),
        replace(tiny, queries=tiny.queries[:1]),
    ]
    assert len({tiny.sha256, *(other.sha256 for other in others)}) == 5


def test_halves_part_the_set(sample):
    """Tune and held-out halves share no query, lose none, and are near equal."""
    tune, heldout = sample.half("tune"), sample.half("heldout")
    assert len(tune.queries) + len(heldout.queries) == len(sample.queries)
    assert not tune.qrels.keys() & heldout.qrels.keys()
    assert 0.45 < len(tune.queries) / len(sample.queries) < 0.55
    assert tune.sha256 != heldout.sha256


def test_split_is_fixed_by_the_id():
    """The half of an id is the parity of the first byte of its sha256 and stays so between releases."""
    assert [split_of(query_id) for query_id in ("q1", "q2", "q3", "q4", "q5")] == ["heldout", "tune", "tune", "heldout", "tune"]


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), st.text(min_size=1).filter(str.strip), min_size=1, max_size=8))
def test_beir_round_trip(tmp_path_factory, texts):
    """What is written reads back with the same hash, whatever the words."""
    written = EvalSet("any", tuple(Query(query_id, text) for query_id, text in texts.items()), {query_id: {"d 1": 2} for query_id in texts})
    folder = tmp_path_factory.mktemp("beir")
    write_beir(written, folder)
    assert load_beir(folder).sha256 == written.sha256


def test_beir_keeps_judged_queries_and_counts_the_rest(tmp_path, tiny):
    """Queries without judgments are left out and counted; a gzipped queries file reads alike, also by a bare path."""
    write_beir(tiny, tmp_path)
    plain = tmp_path / "queries.jsonl"
    (tmp_path / "queries.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes() + b'{"_id": 9, "text": "unjudged"}\n'))
    plain.unlink()
    loaded = open_eval_set(f"beir:{tmp_path}", root=Path("/"))
    assert (loaded.sha256, loaded.unjudged) == (tiny.sha256, 1)
    assert open_eval_set(tmp_path.name, root=tmp_path.parent).sha256 == tiny.sha256


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("queries.jsonl", '{"_id": "q1", "text": "x"}\n{oops\n', r"queries\.jsonl, line 2: not valid JSON"),
        ("queries.jsonl", '{"_id": "q1", "text": "x"}\n{"_id": "q1", "text": "y"}\n', "'q1' on lines 1 and 2"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}\n', "line 1: no usable query"),
        ("queries.jsonl", '{"_id": "q1", "text": "x"}\n{"_id": "q2", "text": "\\ud800"}\n', r"line 2: half a character, .ud800"),
        ("queries.jsonl", '{"_id": "q1", "text": "x"}\n', "judges 1 queries that"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", r"test\.tsv, line 2"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t0\n", "judged otherwise above"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "holds no judgments"),
    ],
)
def test_malformed_beir_names_file_and_line(tmp_path, tiny, name, content, says):
    """A file that cannot be used is refused by name, line and cause, with what to do."""
    write_beir(tiny, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(EvalSetError, match=says) as raised:
        load_beir(tmp_path)
    assert raised.value.fix


def test_missing_split_lists_those_there(tmp_path, tiny):
    """Asking for a split that is not there names the ones that are."""
    write_beir(tiny, tmp_path)
    with pytest.raises(EvalSetError, match="Splits found: test"):
        load_beir(tmp_path, "dev")


def test_qrels_without_header_lose_no_judgment(tmp_path, tiny):
    """A qrels file without the header line keeps its first judgment."""
    write_beir(tiny, tmp_path)
    qrels = tmp_path / "qrels" / "test.tsv"
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[1:]))
    assert load_beir(tmp_path).sha256 == tiny.sha256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"queries": ()}, "has no queries"),
        ({"queries": (Query("q1", "a"), Query("q1", "b"), Query("q2", "c"))}, r"duplicate query ids: q1 \(1 in all\)"),
        ({"qrels": {"q1": {"x1": 1, "x2": 1}, "q2": {"x3": 1, "x4": 1}}}, r"does not hold: x1, x2, x3, \.\.\. \(4 in all\)"),
        ({"qrels": {"q1": {"d1": 0}, "q2": {"d2": 1}}}, r"without a relevant document: q1 \(1 in all\)"),
        ({"qrels": {"q1": {"d1": 1}}}, r"without a relevant document: q2 \(1 in all\)"),
        ({"qrels": {"q1": {"d1": 1}, "q2": {"d1": 1}, "q9": {"d1": 1}}}, "judges unknown queries: q9"),
    ],
)
def test_validation_names_the_culprits(tiny, change, says):
    """Every fault of an eval set is refused with up to three culprits, how many there are, and what to do."""
    tiny.validate(["d1", "d2"])
    with pytest.raises(EvalSetError, match=says) as raised:
        replace(tiny, **change).validate(["d1", "d2"])
    assert raised.value.fix
    assert (raised.value.code, raised.value.exit_code) == ("eval_set", 1)


def test_unknown_address_names_the_valid_ones(tmp_path):
    """An address that means nothing lists what would."""
    with pytest.raises(EvalSetError, match=r"Did you mean 'sample:small'\? Valid: sample:, sample:small, beir:PATH"):
        open_eval_set("sample:smal", root=tmp_path)


def test_ids_that_break_a_qrels_file_are_refused(tmp_path):
    """An id with a tab is refused on writing instead of being read back as something else."""
    with pytest.raises(EvalSetError, match="hold a tab"):
        write_beir(EvalSet("bad", (Query("q", "x"),), {"q": {"a\tb": 1}}), tmp_path)


def test_hash_of_many_orders(sample):
    """Reordering the sample's queries and judgments never changes its hash."""
    by_text = tuple(sorted(sample.queries, key=lambda query: query.text[::-1]))
    by_id = dict(sorted(sample.qrels.items()))
    assert by_text != sample.queries
    assert EvalSet("reordered", by_text, by_id).sha256 == sample.sha256
