"""A language model behind any OpenAI-compatible endpoint, read as it writes, under the request's deadline.

Whatever the endpoint does costs a bounded time, a bounded number of bytes and one kind of error. A request that fails before its first word
is sent once more at most, if the budget of repeated requests and the deadline allow; after the first word never. A circuit breaker keeps an
endpoint that fails from being asked again and again.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from rag_serving.breaker import Breaker, Budget, State
from rag_serving.deadline import Deadline
from rag_serving.errors import ConfigError, LanguageModelError
from rag_serving.settings import Settings
from rag_serving.signals.trace import outgoing_headers
from rag_serving.writing.prompting import Message

RETRY_SHARE = 0.1
LEAST_SECONDS = 0.3  # what a second try must have left
HURRY_SECONDS = 0.25  # given less than this, an endpoint that is late has not failed
_ROOM = 64 << 10  # bytes of a reply beside its text
_BYTES_A_TOKEN = 1 << 10  # of a streamed reply: each token comes in an envelope of its own
_CHARACTERS_A_TOKEN = 8
_CONNECTIONS = 64


@dataclass(slots=True)
class Usage:
    """Tokens as the endpoint counted them, None when it did not say; and why it ended, "" when it did not."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ended: str = ""


class LanguageModel:
    """One model at one endpoint. Safe for concurrent use within one event loop; connections are kept until `aclose`."""

    def __init__(self, url: str, model: str, *, key: str = "", answer_tokens: int = 300) -> None:
        import openai

        self.model = model
        self._answer_tokens = answer_tokens
        self._parameters: dict[str, Any] = {"temperature": 0, "max_tokens": answer_tokens, "stream_options": {"include_usage": True}}
        self._breaker = Breaker(window_seconds=30.0)
        self._budget = Budget(RETRY_SHARE)
        self._http = httpx2.AsyncClient(
            transport=_Capped(_ROOM + _BYTES_A_TOKEN * answer_tokens),
            trust_env=False,
            headers={"Accept-Encoding": "identity"},  # so that the bytes counted are the bytes read
            timeout=httpx2.Timeout(None, connect=1.0, pool=1.0),
        )
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, http_client=self._http, timeout=None)

    @classmethod
    def configured(cls, settings: Settings) -> Self | None:
        """The model that RAGLINE_LLM_URL, RAGLINE_LLM_MODEL and RAGLINE_LLM_KEY name; None without a URL."""
        places = settings.places
        if not places.llm_url:
            return None
        if not places.llm_model:
            raise ConfigError("RAGLINE_LLM_URL is set without RAGLINE_LLM_MODEL.", fix="Name the model to ask there.")
        key = places.llm_key.get_secret_value() if places.llm_key else ""
        return cls(places.llm_url, places.llm_model, key=key, answer_tokens=settings.generation.answer_tokens)

    @property
    def state(self) -> State:
        """The circuit breaker's: closed, open or half_open."""
        return self._breaker.state

    async def aclose(self) -> None:
        await self._http.aclose()

    async def write(self, messages: list[Message], *, deadline: Deadline, usage: Usage | None = None) -> AsyncGenerator[str, None]:
        """The answer piece by piece, as it is written. LanguageModelError whenever it does not come to its own end before the deadline.

        Close it (`contextlib.aclosing`) to stop the model: the connection ends at once.
        """
        given = self._breaker.enter()
        if given is None:
            seconds = f"{self._breaker.retry_seconds:.0f} s"
            raise self._error("has failed repeatedly", "unavailable", fix=f"It is asked again in {seconds}.")
        self._budget.earn()
        granted, begun = deadline.remaining, False
        try:
            for attempt in (1, 2):
                try:
                    async with aclosing(self._once(messages, deadline, usage or Usage())) as pieces:
                        async for piece in pieces:
                            begun = True
                            yield piece
                    break
                except _Passing as passing:
                    again = not begun and attempt == 1 and deadline.remaining - passing.wait >= LEAST_SECONDS and self._budget.spend()
                    if not again:
                        raise passing.error from None
                    await asyncio.sleep(passing.wait)
        except LanguageModelError as error:
            if error.reason == "timeout" and granted < HURRY_SECONDS:
                self._breaker.abandoned(given)
            elif error.reason in {"length", "content_filter"}:
                self._breaker.succeeded(given)
            else:
                self._breaker.failed(given)
            raise
        except BaseException:
            self._breaker.abandoned(given)
            raise
        self._breaker.succeeded(given)

    async def _once(self, messages: list[Message], deadline: Deadline, usage: Usage) -> AsyncGenerator[str, None]:
        """One request and its reply."""
        reply = _Reply(usage)
        with self._translated(reply):
            async with asyncio.timeout(deadline.remaining):
                stream = await self._asked(messages)
            async with aclosing(stream):
                while True:
                    async with asyncio.timeout(deadline.remaining):
                        chunk = await stream.next()
                    if chunk is None:
                        break
                    if text := reply.read(chunk):
                        yield text
                    if reply.written > _CHARACTERS_A_TOKEN * self._answer_tokens:
                        raise self._error("did not stop writing", "too_long")
        if reply.ended in {"length", "content_filter"}:
            raise self._error(f"ended its answer with {reply.ended}", reply.ended)
        if not reply.written:
            raise self._error("gave no text", "malformed")
        if not reply.ended:
            raise self._error("broke off", "cut")

    async def _asked(self, messages: list[Message]) -> "_Chunks":
        """The reply to one request. A parameter that the model refuses by name is left out from then on, or given its newer name."""
        import openai

        while True:
            body: dict[str, Any] = {"model": self.model, "messages": messages, "stream": True, **self._parameters}
            try:
                return _Chunks(await self._client.chat.completions.create(**body, extra_headers=outgoing_headers()))
            except openai.BadRequestError as error:
                if error.param not in body or error.param in {"model", "messages", "stream"}:
                    raise
                refused = self._parameters.pop(error.param, None)  # another request may have done so meanwhile
                if error.param == "max_tokens" and refused is not None:
                    self._parameters["max_completion_tokens"] = refused

    @contextmanager
    def _translated(self, reply: "_Reply") -> Iterator[None]:
        """What can go wrong while a reply is read, as LanguageModelError; as _Passing what another try may not meet."""
        import openai

        try:
            yield
        except TimeoutError:
            raise self._error("gave no answer in time", "timeout", fix="Allow more time, or ask a faster model.") from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except (openai.APIError, httpx2.HTTPError) as error:
            what = f"broke off ({type(error).__name__})" if reply.begun else f"could not be reached ({type(error).__name__})"
            raise _Passing(self._error(what, "cut" if reply.begun else "unavailable")) from None
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise self._error(f"gave what is no completion ({type(error).__name__})", "malformed") from None

    def _status_error(self, error: Any) -> Exception:
        """What a status of 400 and more means, and whether trying again can help."""
        status, headers = int(error.status_code), error.response.headers
        if status < 500 and status != 429:
            return self._error(f"answered with status {status}", "refused", fix="Check RAGLINE_LLM_URL, _MODEL and _KEY.")
        found = self._error(f"answered with status {status}", "overloaded" if status in {429, 503} else "unavailable")
        wait = headers.get("retry-after", "0")
        return _Passing(found, wait=float(wait) if wait.replace(".", "", 1).isdecimal() else 3600.0)

    def _error(self, what: str, reason: str, *, fix: str = "Check the language model's endpoint, RAGLINE_LLM_URL.") -> LanguageModelError:
        return LanguageModelError(f"the language model {self.model!r} {what}.", fix=fix, reason=reason)


class _Passing(Exception):
    """An error that a second try may not meet, after `wait` seconds."""

    def __init__(self, error: LanguageModelError, *, wait: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait = wait


class _Chunks:
    """The client's stream of chunks."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def next(self) -> Any:
        """The next chunk; None at the end."""
        return await anext(self._stream, None)

    async def aclose(self) -> None:
        await self._stream.close()


@dataclass(slots=True)
class _Reply:
    """What was read of a reply so far: its characters, and the reason it gave for its end."""

    usage: Usage
    begun: bool = False
    written: int = 0
    ended: str = ""

    def read(self, chunk: Any) -> str:
        """The text of a chunk. TypeError or the like when it has not the API's shape: the client does not check."""
        self.begun = True
        if (counted := getattr(chunk, "usage", None)) is not None:
            self.usage.prompt_tokens, self.usage.completion_tokens = int(counted.prompt_tokens), int(counted.completion_tokens)
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        text, finish = choice.delta.content or "", choice.finish_reason or ""
        if not isinstance(text, str) or not isinstance(finish, str):
            raise TypeError("content is no text")
        self.ended = self.usage.ended = finish or self.ended
        self.written += len(text)
        return text


class _Capped(httpx2.AsyncBaseTransport):
    """Connections whose replies end with an error after `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        limits = httpx2.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS, keepalive_expiry=30.0)
        self._inner = httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise LanguageModelError("the language model's reply is compressed.", reason="malformed", fix="Have it send plain bytes.")
        assert isinstance(response.stream, httpx2.AsyncByteStream)  # noqa: S101 - what an async transport gives
        response.stream = _CappedStream(response.stream, self._most)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _CappedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, most: int) -> None:
        self._inner = inner
        self._left = most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._inner:
            self._left -= len(piece)
            if self._left < 0:
                raise LanguageModelError("the language model's reply is too long.", reason="too_long", fix="Check RAGLINE_LLM_URL.")
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()
