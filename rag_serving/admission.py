"""Phase one of a request: bytes from a client become a question that every later phase may trust."""

import json
import unicodedata
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from rag_serving.errors import QueryError

MOST_CHARACTERS = 4000
MOST_TOP_K = 50
_NON_STARTERS = 30  # in a row: the Stream-Safe Text Format of UAX #15; more makes normalisation quadratic
_EXAMPLE: JsonDict = {"query": "How do I delete a bucket that still has objects in it?", "top_k": 5}


class Question(BaseModel):
    """What may be asked. `query` is NFC text with something to read in it; clients name no model, snapshot or path."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra={"examples": [_EXAMPLE]})

    query: str = Field(description=f"The question, 1 to {MOST_CHARACTERS} characters.")
    top_k: int | None = Field(None, ge=1, le=MOST_TOP_K, description="Passages wanted; the service's `serving.top_k` when left out.")


Body = TypeVar("Body", bound=BaseModel)


def admit(content_type: str, body: bytes) -> Question:
    """The question in a request body. QueryError, with a `code` of its own for each way in which a body can be wrong."""
    question = admit_body(content_type, body, Question)
    return question.model_copy(update={"query": clean_text(question.query)})


def admit_body(content_type: str, body: bytes, model: type[Body]) -> Body:
    """The `model` in a JSON body; QueryError as of `admit`. Its texts are still as they came: see `clean_text`."""
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


def clean_text(query: str) -> str:
    """The query as NFC text with something to read in it, or a QueryError."""
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
    if len(query) > MOST_CHARACTERS:
        raise QueryError(
            f"the query has {len(query)} characters; {MOST_CHARACTERS} are allowed.", code="query_too_long", fix="Shorten the question."
        )
    return query


def _not_text(what: str, *, where: str = "the query") -> QueryError:
    return QueryError(f"{where} holds {what}.", code="invalid_characters", fix="Send plain text.")
