"""How a service fails: on its connection, by what a TCP proxy does to it, and in its replies, by what the embedding service says."""

import base64
import json

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rag_serving.tcp_faults import Fault

FAULTS = {
    "down": Fault("refuse"),
    "slow": Fault("latency", seconds=5),
    "resetting": Fault("reset"),
    "reset in the middle": Fault("reset", after_bytes=200),
    "cut in the middle": Fault("truncate", after_bytes=200),
    "silent": Fault("blackhole"),
    "dripping": Fault("drip", seconds=0.05),
}


class Lies:
    """The real service with its replies spoiled on their way out: `spoil(body)` changes the parsed reply, None leaves it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.spoil = None
        self.status = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/embeddings" or (self.spoil is None and self.status is None):
            await self._app(scope, receive, send)
            return
        start: Message = {}
        parts = []

        async def spoiled(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = json.loads(b"".join(parts))
            if self.spoil is not None:
                self.spoil(body)
            data = json.dumps(body).encode()
            headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
            headers.append((b"content-length", str(len(data)).encode()))
            await send({**start, "status": self.status or start["status"], "headers": headers})
            await send({"type": "http.response.body", "body": data})

        await self._app(scope, receive, spoiled)


def vector(body: dict, change) -> None:
    for row in body["data"]:
        numbers = np.frombuffer(base64.b64decode(row["embedding"]), "<f4").copy()
        row["embedding"] = base64.b64encode(change(numbers).astype("<f4").tobytes()).decode()


LIES = {
    "NaN": lambda body: vector(body, lambda row: row * np.nan),
    "wrong dim": lambda body: vector(body, lambda row: row[:-1]),
    "zero": lambda body: vector(body, lambda row: row * 0),
    "no vectors": lambda body: body["data"].clear(),
}
