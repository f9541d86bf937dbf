"""Phase one of a request: bytes from a client become a question that every later phase may trust."""

import json
import unicodedata
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from rag_serving.errors import QueryError
from rag_serving.filters import RequestFilter

MOST_CHARACTERS = 4000
MOST_TOP_K = 50
_NON_STARTERS = 30  # in a row: the Stream-Safe Text Format of UAX #15; more makes normalisation quadratic
_EXAMPLE: JsonDict = {"query": "How do I delete a bucket that still has objects in it?", "top_k": 5}


def clean_text(query: str) -> str:
    """The query as NFC text with something to read in it, or a QueryError."""
    _require_length(query, most=4 * MOST_CHARACTERS)  # before its characters are looked at one by one
    run = 0
    for character in query:
        category = unicodedata.category(character)
        if category == "Cs":
            raise _not_text("half of a surrogate pair")
        if category == "Cc" and character not in "\t\n\r":
            raise _not_text(f"the control character U+{ord(character):04X}")
        run = run + 1 if unicodedata.combining(character) else 0
        if run > _NON_STARTERS:
            raise _not_text(f"more than {_NON_STARTERS} combining marks in a row")
    query = unicodedata.normalize("NFC", query)
    if all(unicodedata.category(character)[0] in "ZC" for character in query):
        raise QueryError("the query is empty.", code="empty_query", fix="Ask something.")
    _require_length(query, most=MOST_CHARACTERS)
    return query


def _require_length(query: str, *, most: int) -> None:
    if len(query) > most:
        raise QueryError(
            f"the query has {len(query)} characters; {MOST_CHARACTERS} are allowed.", code="query_too_long", fix="Shorten the question."
        )


def _not_text(what: str, *, where: str = "the query") -> QueryError:
    return QueryError(f"{where} holds {what}.", code="invalid_characters", fix="Send plain text.")


Text = Annotated[
    str,
    AfterValidator(clean_text),
    Field(description=f"1 to {MOST_CHARACTERS} characters of plain text.", json_schema_extra={"minLength": 1}),
]
"""A field that holds a question: NFC text with something to read in it. QueryError, with a `code` for each way in which it can be wrong."""


class Question(BaseModel):
    """What may be asked. Clients name no model, snapshot or path."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra={"examples": [_EXAMPLE]})

    query: Text
    top_k: int | None = Field(None, ge=1, le=MOST_TOP_K, description="Passages wanted; the service's `serving.top_k` when left out.")
    filter: RequestFilter = Field(
        None, description="Which documents may be found: by doc_id, uri and the metadata that the index declares."
    )
    deadline_ms: int | None = Field(
        None, ge=100, le=60_000, description="Answer or refuse within this; never later than the service's own `serving.deadline_seconds`."
    )


class Ask(Question):
    """A question to answer, at once or as events."""

    stream: bool = Field(False, description="Reply with Server-Sent Events, as for `Accept: text/event-stream`.")


Body = TypeVar("Body", bound=BaseModel)


def admit_body(content_type: str, body: bytes, model: type[Body]) -> Body:
    """The `model` in a JSON body. QueryError, with a `code` of its own for each way in which a body can be wrong."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise QueryError(
            "the body is not declared as JSON.", code="unsupported_media_type", fix="Send it with Content-Type: application/json."
        )
    try:
        return model.model_validate(_parsed(body))
    except ValidationError as error:
        raise _explained(error, fields=[*model.model_fields]) from None


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise QueryError(
            "the body is not valid JSON.", code="invalid_json", fix='Send an object such as {"query": "..."}, in UTF-8.'
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _explained(error: ValidationError, *, fields: list[str]) -> QueryError:
    first = error.errors(include_url=False, include_input=False)[0]
    name = ascii(str(first["loc"][0])[:64])[1:-1] if first["loc"] else "the body"
    if first["type"] == "extra_forbidden":
        return QueryError(
            f"unknown field '{name}'.", code="unknown_field", fix=f"The fields are {', '.join(fields[:-1])} and {fields[-1]}."
        )
    if first["type"] == "string_unicode":
        return _not_text("half of a surrogate pair", where=name)
    return QueryError(f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}.", code="invalid_field", fix="Correct the value.")
