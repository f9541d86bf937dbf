"""Filters: what a client sends is a condition over allowed columns, or a refusal; its values are never read as anything but values."""

import asyncio
from collections.abc import Mapping
from functools import reduce

import lancedb
import pyarrow as pa
import pytest
import sqlglot
from hypothesis import given, settings
from hypothesis import strategies as st
from lancedb.index import Bitmap, BTree, LabelList
from sqlglot import Dialect, exp, tokens

from rag_serving.errors import QueryError
from rag_serving.filters import MOST_DEPTH, MOST_PREDICATES, access_marks, condition, filterable, parse_filter

COLUMNS = filterable({"Kind": "text", "size": "number", "draft": "flag"})
NASTY = [
    "it's",
    "''",
    "\\",
    "\\'",
    "a' OR '1'='1",
    "'; DROP TABLE t; --",
    "per%c_nt",
    "`",
    '"',
    "]",
    "/*",
    "é",
    "🙂",
    "\n",
    "\x00",
    "=",
    "*",
]
texts = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
numbers = st.integers(-5, 25) | st.floats(-5, 25, width=32) | st.sampled_from([0, 1e-7, 1e300, -(2**53), 2**53])
VALUES = {"text": texts, "number": numbers, "flag": st.booleans()}


class Lance(Dialect):
    """LanceDB's SQL as far as conditions go: names between backticks, and a quote within text doubled."""

    class Tokenizer(tokens.Tokenizer):
        IDENTIFIERS = ("`",)


@st.composite
def leaves(draw):
    """One field of its kind under one condition."""
    field = draw(st.sampled_from([*COLUMNS]))
    kind = COLUMNS[field].kind
    value = VALUES[kind]
    shapes = [st.fixed_dictionaries({"eq": value}), st.fixed_dictionaries({"in": st.lists(value, min_size=1, max_size=4)})]
    if kind != "flag":
        bounds = st.fixed_dictionaries({}, optional=dict.fromkeys(("gt", "gte", "lt", "lte"), value)).filter(bool)
        shapes.append(st.fixed_dictionaries({"range": bounds}))
    if kind == "text":
        shapes.append(st.fixed_dictionaries({"prefix": texts.filter(bool)}))
    return {field: draw(st.one_of(shapes))}


def fields(*parts: dict) -> dict:
    return {name: asked for part in parts for name, asked in part.items()}


def nested(inner):
    groups = st.lists(inner, min_size=1, max_size=3)
    return groups.map(lambda parts: {"and": parts}) | groups.map(lambda parts: {"or": parts}) | inner.map(lambda part: {"not": part})


level = leaves() | st.builds(fields, leaves(), leaves())
filters = level | nested(level | nested(level))
groups = st.frozensets(st.sampled_from(["sales", "*", "", "=", "it's", "a']) OR (true", "boss"]), max_size=3)


def holds(asked: Mapping, row: Mapping) -> bool:
    """What a filter means, in Python: a document without a field meets no condition on it."""
    if "and" in asked:
        return all(holds(part, row) for part in asked["and"])
    if "or" in asked:
        return any(holds(part, row) for part in asked["or"])
    if "not" in asked:
        return not holds(asked["not"], row)
    return all(row[field] is not None and _meets(row[field], each) for field, each in asked.items())


def _meets(value, asked: Mapping) -> bool:
    if "eq" in asked:
        return value == asked["eq"]
    if "in" in asked:
        return value in asked["in"]
    if "prefix" in asked:
        return value.startswith(asked["prefix"])
    compared = {"gt": lambda bound: value > bound, "gte": lambda bound: value >= bound, "lt": lambda bound: value < bound}
    return all(compared.get(sign, lambda bound: value <= bound)(bound) for sign, bound in asked["range"].items())


def _rows():
    """200 documents, each fifth without metadata; ids and values are those that make trouble."""
    for number in range(200):
        said = number % 5 != 0
        yield {
            "doc_id": f"d{number}",
            "uri": NASTY[number % len(NASTY)] + str(number % 3),
            "Kind": NASTY[number % 7] if said else None,
            "size": float(number % 30) if said else None,
            "draft": number % 2 == 0 if said else None,
            "acl": [["sales"], [], ["boss", "it's"], ["*"], [""]][number % 5 if number % 3 else 1],
        }


ROWS = list(_rows())


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    """A function that gives the numbers of the rows which LanceDB finds for a condition, by its indexes, in ROWS."""
    stored = pa.table(
        {
            **{column.name: [row[field] for row in ROWS] for field, column in COLUMNS.items()},
            "acl": [access_marks(row["acl"]) or ["*"] for row in ROWS],
        }
    )

    async def build():
        database = await lancedb.connect_async(tmp_path_factory.mktemp("filters"))
        table = await database.create_table("rows", stored)
        await table.create_index("acl", config=LabelList())
        for column in COLUMNS.values():
            await table.create_index(column.name, config=Bitmap() if column.kind == "flag" else BTree())
        return table

    with asyncio.Runner() as runner:
        table = runner.run(build())

        async def found(said: str) -> list[int]:
            rows = await table.query().where(said).select(["doc_id"]).to_arrow()
            return sorted(int(doc_id[1:]) for doc_id in rows["doc_id"].to_pylist())

        yield lambda said: runner.run(found(said))
        table.close()


@settings(max_examples=100, deadline=None)
@given(asked=filters)
def test_found_is_what_the_filter_means(count, asked):
    """LanceDB finds by index just the rows that the filter holds for, whatever its values, also where it is negated and metadata is absent."""
    said = condition(parse_filter(asked), COLUMNS)
    assert count(said) == [number for number, row in enumerate(ROWS) if holds(asked, row)]


@settings(max_examples=40, deadline=None)
@given(asked=st.none() | filters, groups=groups)
def test_access_is_never_widened(count, asked, groups):
    """With any filter and any group names, only rows that are public or of one of the groups are found; no name is taken for everyone."""
    said = condition(asked and parse_filter(asked), COLUMNS, readable_by=groups)
    readable = [number for number, row in enumerate(ROWS) if not row["acl"] or groups & {*row["acl"]}]
    assert count(said) == [number for number in readable if asked is None or holds(asked, ROWS[number])]


def tree_of(asked: Mapping, *, total: bool = False) -> exp.Expression:
    """The syntax tree that a filter should parse to."""
    if "not" in asked:
        return exp.Not(this=tree_of(asked["not"], total=True))
    if "or" in asked:
        return joined(exp.Or, [tree_of(part, total=total) for part in asked["or"]])
    if "and" in asked:
        return joined(exp.And, [tree_of(part, total=total) for part in asked["and"]])
    if total:
        return joined(exp.And, [joined(exp.And, [given_of(field), *leaf_of(field, each)]) for field, each in asked.items()])
    return joined(exp.And, [each for field, part in asked.items() for each in leaf_of(field, part)])


def joined(kind: type[exp.Connector], parts: list[exp.Expression]) -> exp.Expression:
    return reduce(lambda left, right: kind(this=left, expression=right), parts)


def given_of(field: str) -> exp.Expression:
    return exp.Not(this=exp.Is(this=exp.column(COLUMNS[field].name, quoted=True), expression=exp.Null()))


def leaf_of(field: str, asked: Mapping) -> list[exp.Expression]:
    column = exp.column(COLUMNS[field].name, quoted=True)
    ((word, value),) = asked.items()
    if word == "in":
        return [exp.In(this=column, expressions=[literal(each) for each in value])]
    if word == "range":
        signs = {"gt": exp.GT, "gte": exp.GTE, "lt": exp.LT, "lte": exp.LTE}
        return [kind(this=column, expression=literal(value[sign])) for sign, kind in signs.items() if sign in value]
    return [(exp.EQ if word == "eq" else exp.StartsWith)(this=column, expression=literal(value))]


def literal(value: str | float) -> exp.Expression:
    if isinstance(value, bool):
        return exp.Boolean(this=value)
    return exp.Literal.string(value) if isinstance(value, str) else sqlglot.parse_one(repr(float(value)), read=Lance)


def bare(parsed: exp.Expression) -> exp.Expression:
    """The tree without parentheses, whose work is done."""
    parsed = parsed.unnest()
    while paren := parsed.find(exp.Paren):
        paren.replace(paren.this)
    return parsed


@settings(max_examples=100, deadline=None)
@given(asked=st.none() | filters, groups=st.none() | groups)
def test_rendered_conditions_parse_back(asked, groups):
    """An independent parser reads what is rendered as the one condition that was meant, with the access clause last and in parentheses."""
    said = condition(asked and parse_filter(asked), COLUMNS, readable_by=groups)
    if said is None:
        assert (asked, groups) == (None, None)
        return
    (parsed,) = sqlglot.parse(said, read=Lance)
    if groups is not None:
        names = [exp.Literal.string(mark) for mark in ["*", *(f"={group}" for group in sorted(groups))]]
        access = parsed.expression if asked else parsed
        assert isinstance(access, exp.Paren)
        column, listed = access.this.expressions
        assert (access.this.name, column, listed.expressions) == ("array_has_any", exp.column("acl"), names)
        parsed = parsed.this if asked else None
    assert (parsed and bare(parsed)) == (asked and tree_of(asked))


WRONG = {
    "no object": "service = 's3'",
    "a list": [],
    "empty": {},
    "no condition": {"uri": "x"},
    "unknown condition": {"uri": {"like": "%"}},
    "two conditions in one": {"uri": {"eq": "a", "prefix": "b"}},
    "null": {"uri": {"eq": None}},
    "an object as value": {"uri": {"eq": {"eq": 1}}},
    "no values": {"uri": {"in": []}},
    "values beyond the limit": {"uri": {"in": ["x"] * 101}},
    "a long value": {"uri": {"eq": "x" * 1001}},
    "half a character": {"uri": {"eq": "\ud800"}},
    "an empty prefix": {"uri": {"prefix": ""}},
    "an empty range": {"size": {"range": {}}},
    "another bound": {"size": {"range": {"above": 1}}},
    "NaN": {"size": {"eq": float("nan")}},
    "a huge number": {"size": {"eq": 10**400}},
    "text for a number": {"size": {"eq": "3"}},
    "a number for text": {"uri": {"eq": 3}},
    "a flag for a number": {"size": {"eq": True}},
    "a number for a flag": {"draft": {"eq": 1}},
    "a prefix of a number": {"size": {"prefix": "1"}},
    "bounds of two kinds": {"size": {"range": {"gte": 1, "lt": "x"}}},
    "the vectors": {"vector": {"eq": 1}},
    "the access list": {"acl": {"in": ["=boss"]}},
    "a column by its own name": {"meta_size": {"eq": 1}},
    "another column": {"text": {"prefix": "a"}},
    "a condition as a field": {"uri = 'a' OR 1=1 --": {"eq": "x"}},
    "a backtick as a field": {"`uri`": {"eq": "x"}},
    "an empty group": {"and": []},
    "a group beside a field": {"and": [{"uri": {"eq": "x"}}], "uri": {"eq": "y"}},
    "two groups in one": {"and": [{"uri": {"eq": "x"}}], "or": [{"uri": {"eq": "y"}}]},
    "a group of text": {"or": "uri"},
    "too many conditions": {"or": [{"uri": {"eq": "x"}}] * (MOST_PREDICATES + 1)},
    "too deep": {"not": {"not": {"not": {"not": {"uri": {"eq": "x"}}}}}},
}


@pytest.mark.parametrize("asked", WRONG.values(), ids=WRONG.keys())
def test_wrong_filters_are_refused(asked):
    """What is not a filter over allowed fields with values of their kind is refused by a code of its own, and never rendered."""
    with pytest.raises(QueryError, match="the filter is wrong") as raised:
        condition(parse_filter(asked), COLUMNS, readable_by=frozenset())
    assert raised.value.code == "invalid_filter"
    assert raised.value.fix
    assert "\n" not in str(raised.value)


def test_nesting_without_end_is_refused():
    """A filter nested a thousand deep is an error of the client, not a crash."""
    asked: dict = {"uri": {"eq": "x"}}
    for _ in range(900):
        asked = {"not": asked}
    with pytest.raises(QueryError, match="the filter is wrong"):
        parse_filter(asked)


def test_the_largest_filter_is_allowed(count):
    """As many conditions as are allowed, as deep as is allowed, are parsed and answered."""
    parts = [{"doc_id": {"eq": f"d{number}"}} for number in range(MOST_PREDICATES)]
    asked = {"not": {"not": {"or": parts}}}
    assert MOST_DEPTH == 4
    assert count(condition(parse_filter(asked), COLUMNS)) == list(range(MOST_PREDICATES))


INJECTIONS = ["a' OR '1'='1", "a'; DROP TABLE t", "a' -- AND x='b'", "a') OR (true", "a\\' OR 1=1 --", "' OR acl IS NOT NULL OR '"]


@pytest.mark.parametrize("value", INJECTIONS)
@pytest.mark.parametrize("shape_of", [lambda v: {"eq": v}, lambda v: {"in": [v, v]}, lambda v: {"prefix": v}], ids=["eq", "in", "prefix"])
def test_injections_find_nothing(count, value, shape_of):
    """Text that would end a naive literal is looked for as it stands: no row has it, so none is found, whoever asks."""
    for field in ("doc_id", "uri", "Kind"):
        for readable_by in (None, frozenset({value})):
            assert count(condition(parse_filter({field: shape_of(f"{value}!")}), COLUMNS, readable_by=readable_by)) == []
    assert count(condition(None, COLUMNS, readable_by=frozenset({value}))) == count(condition(None, COLUMNS, readable_by=frozenset()))


def test_no_filter_for_whoever_may_read_all():
    """Without a filter, and with every right, there is no condition at all."""
    assert condition(None, COLUMNS) is None
