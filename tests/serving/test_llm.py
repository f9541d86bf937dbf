"""The language model's client: whatever the endpoint does costs bounded time and bytes and gives one kind of error."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import httpx2
import pytest
from scripted_model import scripted

from rag_serving.deadline import Deadline
from rag_serving.edge.ports import port_is_free
from rag_serving.errors import ConfigError, LanguageModelError
from rag_serving.settings import Places, Settings
from rag_serving.writing.llm import LanguageModel, Usage
from rag_serving.writing.scripted_llm import MODES

NONCE = "0123456789abcdef" * 2
PROMPT = f"<data {NONCE}>\n[1] Users\nThe name must be unique.\n</data {NONCE}>\n\nQuestion: name?"
ASKED = [{"role": "user", "content": PROMPT}]
ANSWER = "The name must be unique. [1]"


@pytest.fixture(scope="module")
def endpoint():
    with scripted() as found:
        yield found


async def written(model: LanguageModel, *, seconds: float = 10, usage: Usage | None = None) -> str:
    async with aclosing(model.write(ASKED, deadline=Deadline.after(seconds), usage=usage)) as pieces:
        return "".join([piece async for piece in pieces])


@asynccontextmanager
async def closing(model: LanguageModel) -> AsyncIterator[LanguageModel]:
    try:
        yield model
    finally:
        await model.aclose()


def ask(url: str, **options: object) -> str:
    async def run() -> str:
        async with closing(LanguageModel(url, "scripted")) as model:
            return await written(model, **options)

    return asyncio.run(run())


def test_it_is_read_as_it_writes(endpoint):
    """The answer comes whole, and so do the tokens that the endpoint counted; it was asked for a stream, at temperature 0, with a limit."""
    url, script = endpoint
    script.mode, usage = "quote", Usage()
    assert ask(url, usage=usage) == ANSWER
    assert (usage.prompt_tokens, usage.completion_tokens) == (1, 6)
    body = script.requests[-1]
    assert (body["stream"], body["temperature"], body["max_tokens"], body["messages"]) == (True, 0, 300, ASKED)


WAYS = {
    "html": "malformed",
    "garbage": "malformed",
    "empty-choices": "malformed",
    "empty": "malformed",
    "wrong-types": "malformed",
    "length": "length",
    "content-filter": "content_filter",
    "hang": "timeout",
    "stall": "timeout",
    "slow": "timeout",
    "endless": "too_long",
    "long-line": "too_long",
    "overloaded": "overloaded",
    "error": "unavailable",
    "unauthorized": "refused",
    "cut": "cut",
    "cut-early": "cut",
}


@pytest.mark.parametrize(("mode", "reason"), WAYS.items())
def test_every_way_to_fail_has_a_reason(endpoint, mode, reason):
    """An endpoint that fails in whatever way gives a LanguageModelError that says how and what to do, and never anything else."""
    url, script = endpoint
    script.mode = mode
    with pytest.raises(LanguageModelError) as caught:
        ask(url, seconds=0.5 if reason == "timeout" else 20)
    assert caught.value.reason == reason
    assert caught.value.fix


def test_nothing_listens():
    """An address where nobody listens is an error like the others."""
    with pytest.raises(LanguageModelError) as caught:
        ask("http://127.0.0.1:9/v1")
    assert caught.value.reason == "unavailable"


@pytest.mark.parametrize(
    ("mode", "requests"),
    [("busy-once", 2), ("error", 2), ("cut-early", 2), ("cut", 1), ("overloaded", 1), ("garbage", 1), ("unauthorized", 1)],
)
def test_only_what_may_pass_is_tried_again_and_once(endpoint, mode, requests):
    """One more try before the first word where that can help and the wait fits into the deadline; none after the first word."""
    url, script = endpoint
    script.mode = mode
    script.requests.clear()
    try:
        answer = ask(url, seconds=0.9)
    except LanguageModelError:
        answer = ""
    assert (len(script.requests), answer == ANSWER) == (requests, mode == "busy-once")


def test_second_tries_are_a_tenth(endpoint):
    """However many requests fail, at most one in ten and one more are sent again."""
    url, script = endpoint
    script.mode = "quote"
    script.requests.clear()

    async def run() -> None:
        async with closing(LanguageModel(url, "scripted")) as model:
            for count in range(12):
                script.mode = "error" if count % 3 == 0 else "quote"
                try:
                    await written(model)
                except LanguageModelError:
                    assert script.mode == "error"

    asyncio.run(run())
    assert 12 < len(script.requests) <= 12 + 12 * 0.1 + 1


def test_a_failing_endpoint_is_left_alone(endpoint):
    """After five failures it is not asked any more for a while, and that costs nothing; wrong answers by our own haste do not count."""
    url, script = endpoint

    async def run() -> None:
        async with closing(LanguageModel(url, "scripted")) as model:
            script.mode = "hang"
            for _ in range(8):
                with pytest.raises(LanguageModelError):
                    await written(model, seconds=0.01)
            assert model.state == "closed"
            script.mode = "unauthorized"
            for _ in range(5):
                with pytest.raises(LanguageModelError):
                    await written(model)
            assert model.state == "open"
            asked = len(script.requests)
            with pytest.raises(LanguageModelError, match="repeatedly"):
                await written(model)
            assert len(script.requests) == asked

    asyncio.run(run())


def test_newer_models_refuse_parameters(endpoint):
    """A parameter that a model refuses by name is renamed or left out, and the next request knows."""
    url, script = endpoint
    script.mode = "newer"
    script.requests.clear()

    async def run() -> list[str]:
        async with closing(LanguageModel(url, "scripted")) as model:
            return [await written(model), await written(model)]

    assert asyncio.run(run()) == [ANSWER, ANSWER]
    assert len(script.requests) == 4
    assert script.requests[-1]["max_completion_tokens"] == 300
    assert "temperature" not in script.requests[-1]


def test_requests_at_once_learn_of_a_refused_parameter(endpoint):
    """All are answered when several meet the first refusal together."""
    url, script = endpoint
    script.mode = "newer"

    async def run() -> list[str]:
        async with closing(LanguageModel(url, "scripted")) as model:
            return await asyncio.gather(*(written(model) for _ in range(4)))

    assert asyncio.run(run()) == [ANSWER] * 4


@pytest.mark.parametrize("wait", ["\xb2", "soon", "."])
def test_a_pause_that_is_no_number_is_an_error_like_others(wait):
    """Whatever stands in Retry-After."""

    async def run() -> None:
        async with closing(LanguageModel("http://127.0.0.1:9/v1", "m")) as model:
            model._http._transport._inner = Replying({"Retry-After": wait})
            await written(model)

    with pytest.raises(LanguageModelError):
        asyncio.run(run())


def test_a_compressed_reply_gives_its_connection_back():
    """It is refused, and its connection is not lost to the pool."""
    replying = Replying({"Content-Encoding": "gzip"}, status=200)

    async def run() -> None:
        async with closing(LanguageModel("http://127.0.0.1:9/v1", "m")) as model:
            model._http._transport._inner = replying
            await written(model)

    with pytest.raises(LanguageModelError):
        asyncio.run(run())
    assert replying.asked
    assert replying.closed == replying.asked


class Replying(httpx2.AsyncBaseTransport):
    """Every request gets an empty reply with these headers; counts replies that were closed."""

    def __init__(self, headers: dict[str, str], *, status: int = 503) -> None:
        self.asked = self.closed = 0
        self._headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        self._status = status

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked += 1
        return httpx2.Response(self._status, headers=self._headers, stream=Body(self), request=request)


class Body(httpx2.AsyncByteStream):
    def __init__(self, of: Replying) -> None:
        self._of = of

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b""

    async def aclose(self) -> None:
        self._of.closed += 1


def test_who_stops_listening_stops_the_model(endpoint):
    """When its caller gives up, the connection ends at once: the model sees its client leave, and the breaker holds nothing against it."""
    url, script = endpoint
    script.mode, before = "stall", script.abandoned

    async def run() -> None:
        async with closing(LanguageModel(url, "scripted")) as model:
            for _ in range(6):
                async with aclosing(model.write(ASKED, deadline=Deadline.after(30))) as pieces:
                    assert await anext(pieces)
            assert model.state == "closed"
            for _ in range(500):
                if script.abandoned == before + 6:
                    break
                await asyncio.sleep(0.02)

    asyncio.run(run())
    assert script.abandoned == before + 6


def test_places_name_the_model(tmp_path):
    """Without RAGLINE_LLM_URL there is no model; with it, RAGLINE_LLM_MODEL must be there too."""
    assert LanguageModel.configured(Settings(root=tmp_path)) is None
    with pytest.raises(ConfigError, match="RAGLINE_LLM_MODEL"):
        LanguageModel.configured(Settings(root=tmp_path, places=Places(llm_url="http://127.0.0.1:9/v1")))
    assert (
        LanguageModel.configured(Settings(root=tmp_path, places=Places(llm_url="http://127.0.0.1:9/v1", llm_model="some"))).model == "some"
    )


def test_the_scripted_model_is_a_program():
    """`python -m rag_serving.writing.scripted_llm` answers on a socket in the mode it was given, and takes another while it runs."""
    port = next(port for port in range(18399, 18499) if port_is_free("127.0.0.1", port))
    command = [sys.executable, "-m", "rag_serving.writing.scripted_llm", "--port", str(port), "--mode", "not-found"]
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, transport=httpx2.HTTPTransport(retries=0)) as client,
    ):
        try:
            for _ in range(600):
                try:
                    client.get("/v1/models")
                    break
                except httpx2.TransportError:
                    assert process.poll() is None
                    time.sleep(0.1)
            said = [client.post("/v1/chat/completions", json={"messages": ASKED}).json()["choices"][0]["message"]["content"]]
            assert client.post("/script", json={"mode": "quote"}).json() == {"mode": "quote"}
            assert client.post("/script", json={"mode": "quite"}).status_code == 422
            said.append(client.post("/v1/chat/completions", json={"messages": ASKED}).json()["choices"][0]["message"]["content"])
        finally:
            process.terminate()
    assert said == ["NOT FOUND", ANSWER]


def test_every_failing_mode_is_tried():
    """The modes of the scripted model that are failures are all among those tried here."""
    answering = {"quote", "not-found", "obey", "uncited", "wrong-citations", "nonsense", "markup", "busy-once", "newer"}
    assert set(WAYS) == set(MODES) - answering
