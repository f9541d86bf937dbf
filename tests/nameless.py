"""An OpenAI-shaped embedding service without fingerprints on a real socket: ours, seen through what such services know of requests and replies."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from live_server import running
from starlette.requests import Request

from rag_serving import embedder
from rag_serving.settings import ModelSpec, Settings

KNOWN = {"input", "model", "encoding_format", "dimensions", "user"}  # what OpenAI's API takes; anything else it refuses


@dataclass(slots=True)
class Nameless:
    """Which service answers now, and the texts it was asked for.

    `down`: all requests are refused with 503; `cuts`: so many break off first; `strict`: a field that OpenAI's API has not is refused.
    """

    urls: dict[str, str]
    serves: str
    down: bool = False
    cuts: int = 0
    strict: bool = True
    asked: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = await Request(scope, receive).body()
        if self.cuts:
            self.cuts -= 1
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9999")]})
            return  # fewer bytes than promised, so the connection breaks
        asked = json.loads(body)
        unknown = sorted(set(asked) - KNOWN) if self.strict else []
        status, reply = 503 if self.down else 400, {"error": {"message": f"unknown: {unknown}"}}
        if not (self.down or unknown):
            self.asked += [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
            async with httpx2.AsyncClient(trust_env=False) as client:
                given = await client.post(
                    f"{self.urls[self.serves]}/v1/embeddings", content=body, headers={"Content-Type": "application/json"}
                )
            status, reply = given.status_code, given.json()
            reply.pop("fingerprint", None)
        data = json.dumps(reply).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


@contextmanager
def nameless(root: Path, **specs: ModelSpec) -> Iterator[tuple[str, Nameless]]:
    """Its base URL and its state; it begins by serving the first of these models, each in an embedding service of its own."""
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(
                running(embedder.create_app(Settings(root=root, models=(spec,)), preload=[spec.name]), ready_path="/readyz")
            )
            for name, spec in specs.items()
        }
        state = Nameless(urls, next(iter(urls)))
        yield stack.enter_context(running(state)), state
