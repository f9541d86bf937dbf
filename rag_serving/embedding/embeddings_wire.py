"""The wire format of `/v1/embeddings`: OpenAI's, with `input_type` in the request and `fingerprint` in the reply.

Replies are written by hand and read in one pass: checking 384 numbers a text one by one, on either side, would cost more than HTTP.
"""

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Vectors = npt.NDArray[np.float32]

MOST_TEXTS = 256  # of one request
CODES = frozenset({  # of errors
    "model_not_found", "invalid_dimensions", "unusable_text", "invalid_deadline", "unsupported_media_type", "overloaded", "deadline_exceeded",
    "model", "internal",
})  # fmt: skip
DEADLINE_HEADER = "X-Ragline-Deadline-Ms"  # how many milliseconds the caller still waits

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Must be the model's own: vectors are never cut here.")
    input_type: Literal["query", "document"] = Field("document", description="Which prompt the model puts before the text.")
    user: str | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    fingerprint: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "ragline"
    dims: int
    max_tokens: int
    loaded: bool
    fingerprint: str | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ReceivedRow(BaseModel):
    index: int
    embedding: str | list[float]

    @property
    def numbers(self) -> Any:
        """Those of either encoding; None for base64 that holds none."""
        if not isinstance(self.embedding, str):
            return self.embedding
        try:
            return np.frombuffer(base64.b64decode(self.embedding, validate=True), "<f4")
        except ValueError:
            return None


class ReceivedReply(BaseModel):
    """A reply as a client reads it: of any service of this shape, so all but the vectors may be absent."""

    data: list[ReceivedRow]
    fingerprint: str | None = None


def request_body(model: str, texts: Sequence[str], *, plain: bool = False) -> bytes:
    """A request for the vectors of queries; `plain`: of texts as they are, in the fields that every service of this shape knows."""
    asked = {"model": model, "input": list(texts), "encoding_format": "base64"}
    return json.dumps(asked if plain else {**asked, "input_type": "query"}).encode()


def reply_body(request: EmbeddingsRequest, vectors: Vectors, *, tokens: int, fingerprint: str) -> bytes:
    """An EmbeddingsReply with the rows of `vectors`, in order."""
    rows = ",".join(
        f'{{"object":"embedding","index":{at},"embedding":{_numbers(row, request.encoding_format)}}}' for at, row in enumerate(vectors)
    )
    usage = f'"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}},"fingerprint":"{fingerprint}"'
    return f'{{"object":"list","data":[{rows}],"model":{json.dumps(request.model)},{usage}}}'.encode()


def _numbers(row: Vectors, encoding_format: str) -> str:
    return f'"{base64.b64encode(row.astype("<f4").tobytes()).decode()}"' if encoding_format == "base64" else json.dumps(row.tolist())


def code_of(data: bytes) -> str:
    """The code in the body of an error, when it is one of ours: for a log line, which must not repeat what a service quotes of a request."""
    try:
        code = json.loads(data)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return "no code"
    return code if isinstance(code, str) and code in CODES else "no code of ragline's"
