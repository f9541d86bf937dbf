"""OpenAI's chat completions over the corpus, so that any chat client works: the last user message is the question.

What a client sends to steer a model (temperature, tools, stop, ...) is accepted and has no effect, since the answer is bound to the passages.
What the answer rests on comes along in `citations`, and where it comes from in `ragline`: of the reply, or of the last chunk with a choice.
"""

import json
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Literal

from fastapi.sse import format_sse_event
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from rag_serving.admission import Question, clean_text
from rag_serving.context import count_tokens
from rag_serving.edge.problems import openai_error
from rag_serving.edge.replies import Citation, QueryReply, Reply, query_reply
from rag_serving.edge.streaming import AnswerStream
from rag_serving.errors import QueryError
from rag_serving.exchange import Exchange
from rag_serving.pipeline import Found
from rag_serving.writing.extraction import Answer, Confidence

MODEL = "ragline"
_EXAMPLE: JsonDict = {"model": MODEL, "messages": [{"role": "user", "content": "How do I delete a bucket that still has objects in it?"}]}


class Part(BaseModel):
    """A part of a message; parts other than text are not read."""

    model_config = ConfigDict(strict=True)

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: str = Field(max_length=64)
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is read of a request for a chat completion."""

    model_config = ConfigDict(frozen=True, strict=True, json_schema_extra={"examples": [_EXAMPLE]})

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000, description="The last one of role user is the question.")
    model: str = Field(MODEL, max_length=200, description="Any name; `ragline` answers.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=1, description="There is one answer.")
    max_tokens: int | None = Field(None, ge=1, le=200_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=200_000)
    temperature: float | None = Field(None, ge=0, le=2)

    def question(self) -> Question:
        """The question asked. QueryError when no message of a user is there, or its text is none."""
        asked = next((message for message in reversed(self.messages) if message.role == "user"), None)
        if asked is None:
            raise QueryError("messages: none has role user.", code="invalid_field", fix="Ask in a message of role user.")
        content = asked.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content if part.type == "text")
        return Question(query=clean_text(text))


class ChatUsage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Reply):
    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Provenance(Reply):
    """Where an answer comes from: the fields of the reply of /v1/query by the same names."""

    snapshot_id: str
    release: int
    abstained: bool
    generated: bool
    groundedness: float | None
    confidence: Confidence | None
    flags: list[str]
    llm_problem: str | None
    degraded: list[str]
    trace_id: str
    timings_ms: dict[str, float]


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str = MODEL
    choices: list[Choice]
    usage: ChatUsage
    citations: list[Citation]
    ragline: Provenance


class ModelReply(Reply):
    id: str = MODEL
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = MODEL


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelReply] = Field(default_factory=lambda: [ModelReply()])


def chat_reply(question: Question, found: Found, answer: Answer, exchange: Exchange) -> ChatReply:
    """The whole completion."""
    reply = query_reply(found, answer, exchange)
    return ChatReply(
        id=_id(exchange),
        created=int(time.time()),
        choices=[Choice(message=AssistantMessage(content=answer.text), finish_reason=_finish(answer))],
        usage=_usage(question, answer),
        citations=reply.citations,
        ragline=_provenance(reply),
    )


class ChatStream(AnswerStream):
    """The completion in chunks. An answer that starts anew continues on a new line, since chunks cannot be taken back."""

    def __init__(
        self,
        exchange: Exchange,
        work: Callable[[], Coroutine[Any, Any, tuple[Found, Answer]]],
        *,
        question: Question,
        include_usage: bool,
    ) -> None:
        super().__init__(exchange, work)
        self._question = question
        self._include_usage = include_usage
        self._created = int(time.time())
        self._told = False

    def on_found(self, found: Found) -> Iterator[bytes]:
        del found
        yield from self.on_dropped()

    def on_dropped(self) -> Iterator[bytes]:
        if self._told:
            yield self._chunk({"content": "\n\n"})

    def on_wrote(self, text: str) -> Iterator[bytes]:
        if not self._told:
            self._told = True
            yield self._chunk({"role": "assistant", "content": ""})
        yield self._chunk({"content": text})

    def on_done(self, found: Found, answer: Answer) -> Iterator[bytes]:
        reply = query_reply(found, answer, self.exchange)
        citations = [citation.model_dump() for citation in reply.citations]
        yield self._chunk({}, finish=_finish(answer), citations=citations, ragline=_provenance(reply).model_dump())
        if self._include_usage:
            yield _data({**self._envelope(), "choices": [], "usage": _usage(self._question, answer).model_dump()})
        yield format_sse_event(data_str="[DONE]")

    def on_problem(self, body: dict[str, Any]) -> Iterator[bytes]:
        yield _data({"error": openai_error(body)})
        yield format_sse_event(data_str="[DONE]")

    def _chunk(self, delta: dict[str, str], *, finish: str | None = None, **more: Any) -> bytes:
        return _data({**self._envelope(), "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}], **more})

    def _envelope(self) -> dict[str, Any]:
        return {"id": _id(self.exchange), "object": "chat.completion.chunk", "created": self._created, "model": MODEL}


def _data(chunk: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(chunk))


def _id(exchange: Exchange) -> str:
    return f"chatcmpl-{exchange.trace_id}"


def _finish(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.problem == "length" else "stop"


def _usage(question: Question, answer: Answer) -> ChatUsage:
    """As the language model counted; without one, an estimate of what was asked and answered."""
    read = answer.tokens_read or count_tokens(question.query)
    written = answer.tokens_written or count_tokens(answer.text)
    return ChatUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _provenance(reply: QueryReply) -> Provenance:
    return Provenance.model_validate(reply.model_dump(include=set(Provenance.model_fields)))
