"""Filters on what a snapshot knows of its documents, and who may read them: typed at the edge, rendered as a LanceDB condition.

A client sends JSON: `{"service": {"eq": "s3"}}`, with the conditions eq, in, range and prefix, several fields for all of them, and and, or, not
around them. It is parsed into frozen dataclasses; fields are those that the snapshot allows, and values become escaped literals, so no
text of a client is ever read as a condition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from rag_serving.errors import QueryError
from rag_serving.settings import FilterKind

MOST_PREDICATES = 32
MOST_DEPTH = 4
MOST_VALUES = 100
ACL_COLUMN = "acl"
PUBLIC = "*"
_MOST_CHARACTERS = 1000
_EXACT = 2**53  # beyond it a float64 does not tell neighbouring integers apart

Text = Annotated[StrictStr, Field(max_length=_MOST_CHARACTERS)]
Number = Annotated[StrictInt, Field(ge=-_EXACT, le=_EXACT)] | Annotated[StrictFloat, Field(allow_inf_nan=False)]
Scalar = StrictBool | Number | Text
_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Equal:
    __pydantic_config__ = _CLOSED
    eq: Scalar


@dataclass(frozen=True, slots=True)
class OneOf:
    __pydantic_config__ = _CLOSED
    values: Annotated[tuple[Scalar, ...], Field(alias="in", min_length=1, max_length=MOST_VALUES)]


@dataclass(frozen=True, slots=True)
class Prefix:
    __pydantic_config__ = _CLOSED
    prefix: Annotated[Text, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Bounds:
    __pydantic_config__ = _CLOSED
    gt: Number | Text | None = None
    gte: Number | Text | None = None
    lt: Number | Text | None = None
    lte: Number | Text | None = None

    def given(self) -> list[tuple[str, float | str]]:
        """The bounds there are, as comparison and value."""
        every = ((">", self.gt), (">=", self.gte), ("<", self.lt), ("<=", self.lte))
        return [(sign, value) for sign, value in every if value is not None]


@dataclass(frozen=True, slots=True)
class Range:
    __pydantic_config__ = _CLOSED
    range: Bounds


@dataclass(frozen=True, slots=True)
class All:
    __pydantic_config__ = _CLOSED
    parts: Annotated[tuple["Filter", ...], Field(alias="and", min_length=1)]


@dataclass(frozen=True, slots=True)
class Either:
    __pydantic_config__ = _CLOSED
    parts: Annotated[tuple["Filter", ...], Field(alias="or", min_length=1)]


@dataclass(frozen=True, slots=True)
class Not:
    __pydantic_config__ = _CLOSED
    part: Annotated["Filter", Field(alias="not")]


def _tag_of(names: Sequence[str], otherwise: str | None = None) -> Any:
    def tag(value: Any) -> str | None:
        return next((name for name in names if name in value), otherwise) if isinstance(value, Mapping) else None

    return tag


Condition = Annotated[
    Annotated[Equal, Tag("eq")] | Annotated[OneOf, Tag("in")] | Annotated[Range, Tag("range")] | Annotated[Prefix, Tag("prefix")],
    Discriminator(
        _tag_of(["eq", "in", "range", "prefix"]),
        custom_error_type="condition",
        custom_error_message="a condition is an object with eq, in, range or prefix",
    ),
]
Filter = Annotated[
    Annotated[All, Tag("and")]
    | Annotated[Either, Tag("or")]
    | Annotated[Not, Tag("not")]
    | Annotated[Mapping[Annotated[StrictStr, Field(max_length=64)], Condition], Field(min_length=1), Tag("fields")],
    Discriminator(
        _tag_of(["and", "or", "not"], "fields"),
        custom_error_type="filter",
        custom_error_message="a filter is an object of fields, or one with and, or, not",
    ),
]
_FILTERS: TypeAdapter[Any] = TypeAdapter(Filter)


@dataclass(frozen=True, slots=True)
class Column:
    """A column that may be filtered by. One of metadata is empty for documents that do not say; `uri` and `doc_id` never are."""

    name: str
    kind: FilterKind


def filterable(metadata: Mapping[str, FilterKind]) -> dict[str, Column]:
    """The fields that filters may name: the document's id and uri, and the metadata that the index declares."""
    declared = {key: Column(metadata_column(key), kind) for key, kind in metadata.items()}
    return {"doc_id": Column("doc_id", "text"), "uri": Column("uri", "text"), **declared}


def metadata_column(key: str) -> str:
    return f"meta_{key}"


def parse_filter(value: Any) -> Filter:
    """The filter in JSON data; QueryError with the code `invalid_filter` says where it is wrong, or that it is too large."""
    try:
        found: Filter = _FILTERS.validate_python(value)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_input=False, include_context=False)
        what = f"it is no text of at most {_MOST_CHARACTERS} characters, number or boolean" if others else first["msg"]
        raise _invalid(what, at=first["loc"][: -1 if others else None]) from None
    predicates, depth = _size(found)
    if predicates > MOST_PREDICATES or depth > MOST_DEPTH:
        raise _invalid(f"it has {predicates} conditions, {depth} deep; {MOST_PREDICATES} and {MOST_DEPTH} are allowed")
    return found


def _requested(value: Any) -> Filter | None:
    return None if value is None else parse_filter(value)


_VALUE = {"type": ["string", "number", "boolean"]}
_CONDITIONS = {
    "eq": _VALUE,
    "in": {"type": "array", "minItems": 1, "maxItems": MOST_VALUES, "items": _VALUE},
    "range": {
        "type": "object",
        "additionalProperties": {"type": ["string", "number"]},
        "propertyNames": {"enum": ["gt", "gte", "lt", "lte"]},
    },
    "prefix": {"type": "string", "minLength": 1},
}
_PARTS = {"type": "array", "minItems": 1, "items": {"type": "object"}}
_SCHEMA = {
    "type": ["object", "null"],
    "minProperties": 1,
    "properties": {"and": _PARTS, "or": _PARTS, "not": {"type": "object"}},
    "additionalProperties": {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "properties": _CONDITIONS,
        "additionalProperties": False,
    },
    "examples": [{"uri": {"prefix": "s3/"}}, {"or": [{"doc_id": {"eq": "a"}}, {"not": {"doc_id": {"in": ["b", "c"]}}}]}],
}
RequestFilter = Annotated[Filter | None, PlainValidator(_requested), WithJsonSchema(_SCHEMA)]
"""A filter as a field of a request, or null. Its JSON schema stands alone: it refers to no definitions, and leaves nested filters open."""


def _size(found: Filter) -> tuple[int, int]:
    """Conditions, and levels of nesting."""
    if isinstance(found, Mapping):
        return len(found), 1
    sizes = [_size(part) for part in ((found.part,) if isinstance(found, Not) else found.parts)]
    return sum(predicates for predicates, _ in sizes), 1 + max(depth for _, depth in sizes)


def _invalid(what: str, *, at: Sequence[str | int] = ()) -> QueryError:
    steps = [str(step) for step, before in zip(at, (None, *at), strict=False) if step not in (before, "fields")]
    path = f" at {ascii('.'.join(steps)[:100])[1:-1]}" if steps else ""
    return QueryError(f"the filter is wrong{path}: {what[:1].lower()}{what[1:]}.", code="invalid_filter", fix="See docs/retrieval.md.")


def condition(where: Filter | None, columns: Mapping[str, Column], *, readable_by: frozenset[str] | None = None) -> str | None:
    """The LanceDB condition for a filter and for the documents that some groups may read; None when everything qualifies.

    `readable_by` None is for whoever may read all. The access clause stands last and in parentheses of its own. Raises QueryError, code
    `invalid_filter`, for a field that is not in `columns`, or a value that is not of its kind.
    """
    clauses = [] if where is None else [f"({_rendered(where, columns, total=False)})"]
    if readable_by is not None:
        marks = ", ".join(_literal(mark) for mark in (PUBLIC, *access_marks(sorted(readable_by))) if mark)
        clauses.append(f"(array_has_any({ACL_COLUMN}, [{marks}]))")
    return " AND ".join(clauses) or None


def access_marks(groups: Sequence[str]) -> list[str]:
    """How groups stand in the access column, where no group can be taken for the mark of public documents."""
    return [f"={group}" for group in groups]


def _rendered(found: Filter, columns: Mapping[str, Column], *, total: bool) -> str:
    """`total`: true or false for each row, never unknown, so that its negation holds for documents that do not have the field."""
    if isinstance(found, Not):
        return f"NOT ({_rendered(found.part, columns, total=True)})"
    if isinstance(found, Mapping):
        return " AND ".join(_predicate(field, each, columns, total=total) for field, each in found.items())
    word = " AND " if isinstance(found, All) else " OR "
    return word.join(f"({_rendered(part, columns, total=total)})" for part in found.parts)


def _predicate(field: str, asked: Condition, columns: Mapping[str, Column], *, total: bool) -> str:
    column = columns.get(field)
    if column is None:
        raise _invalid(f"there is no such field; there are {', '.join(columns)}", at=[field])
    name = f"`{column.name}`"

    def literal(value: Scalar) -> str:
        if _kind_of(value) != column.kind:
            raise _invalid(f"its values are of the kind {column.kind}", at=[field])
        return _literal(value)

    if isinstance(asked, Equal):
        said = f"{name} = {literal(asked.eq)}"
    elif isinstance(asked, OneOf):
        said = f"{name} IN ({', '.join(literal(value) for value in asked.values)})"
    elif isinstance(asked, Prefix):
        said = f"starts_with({name}, {literal(asked.prefix)})"
    else:
        given = asked.range.given()
        if not given:
            raise _invalid("a range has gt, gte, lt or lte", at=[field])
        said = " AND ".join(f"{name} {sign} {literal(value)}" for sign, value in given)
    return f"({name} IS NOT NULL AND {said})" if total else said


def _kind_of(value: Scalar) -> FilterKind:
    return "flag" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def _literal(value: Scalar) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower() if isinstance(value, bool) else repr(float(value))
