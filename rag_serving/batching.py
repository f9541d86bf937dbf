"""One computing thread and the line before it: how the embedding service keeps queries quick while documents stream through.

Waiting queries of one model are encoded together and go first; documents are cut into small pieces and get their turn between them.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rag_serving.models import EmbeddingModel

Vectors = npt.NDArray[np.float32]

MOST_WAITING = 128  # pieces of each kind; more is refused
PIECE_SECONDS = 0.25  # about how long documents are encoded before waiting queries get their turn
PIECES = (1, 256)  # least and most documents of a piece
TOGETHER = 32  # queries encoded as one batch
QUERY_TURNS = 8  # query batches in a row before a waiting document piece gets its turn


@dataclass(frozen=True)
class _Piece:
    model: EmbeddingModel
    texts: Sequence[str]
    query: bool
    done: asyncio.Future[tuple[Vectors, int]]


class Overloaded(Exception):
    """More work waits than the service takes on."""


class Bench:
    """The one thread that computes, and the line before it: queries first, together; documents in pieces between them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._queries: deque[_Piece] = deque()
        self._documents: deque[_Piece] = deque()
        self._work = asyncio.Event()
        self._pace: dict[str, float] = {}  # seconds a document, by fingerprint

    async def encode(self, model: EmbeddingModel, texts: Sequence[str], *, query: bool) -> tuple[Vectors, int]:
        """Vectors in the order of the texts, and the number of tokens. Raises Overloaded, ModelError."""
        parts: list[tuple[Vectors, int]] = []
        start = 0
        while start < len(texts):
            end = start + (TOGETHER if query else self._piece_size(model))
            parts.append(await self._wait_for(model, texts[start:end], query=query))
            start = end
        return np.concatenate([vectors for vectors, _ in parts]), sum(tokens for _, tokens in parts)

    def _piece_size(self, model: EmbeddingModel) -> int:
        """As many documents as fit into PIECE_SECONDS at the pace of the last piece; one, when none was timed yet."""
        least, most = PIECES
        return max(least, min(most, int(PIECE_SECONDS / self._pace[model.fingerprint]))) if model.fingerprint in self._pace else least

    async def _wait_for(self, model: EmbeddingModel, texts: Sequence[str], *, query: bool) -> tuple[Vectors, int]:
        line = self._queries if query else self._documents
        if len(line) >= MOST_WAITING:
            raise Overloaded
        piece = _Piece(model, texts, query, asyncio.get_running_loop().create_future())
        line.append(piece)
        self._work.set()
        return await piece.done

    async def run(self) -> None:
        """Compute what waits, for ever."""
        loop = asyncio.get_running_loop()
        turns = 0
        try:
            while True:
                await self._work.wait()
                if not self._queries and not self._documents:
                    self._work.clear()
                    continue
                take_query = bool(self._queries) and (turns < QUERY_TURNS or not self._documents)
                turns = turns + 1 if take_query else 0
                pieces = self._next_queries() if take_query else [self._documents.popleft()]
                pieces = [piece for piece in pieces if not piece.done.done()]
                if pieces:
                    await self._compute(loop, pieces)
        finally:
            for piece in (*self._queries, *self._documents):
                piece.done.cancel()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _next_queries(self) -> list[_Piece]:
        """The oldest waiting query, and those directly behind it that fit into one batch of the same model."""
        pieces = [self._queries.popleft()]
        room = TOGETHER - len(pieces[0].texts)
        while self._queries and self._queries[0].model is pieces[0].model and len(self._queries[0].texts) <= room:
            pieces.append(self._queries.popleft())
            room -= len(pieces[-1].texts)
        return pieces

    async def _compute(self, loop: asyncio.AbstractEventLoop, pieces: list[_Piece]) -> None:
        before = loop.time()
        try:
            results = await loop.run_in_executor(self._thread, _encode_pieces, pieces)
        except Exception as error:  # noqa: BLE001 - the waiting requests get it; the bench must go on
            if len(pieces) > 1:
                for piece in pieces:
                    await self._compute(loop, [piece])
            elif not pieces[0].done.done():
                pieces[0].done.set_exception(error)
            return
        if not pieces[0].query:
            self._pace[pieces[0].model.fingerprint] = max(1e-6, (loop.time() - before) / len(pieces[0].texts))
        for piece, result in zip(pieces, results, strict=True):
            if not piece.done.done():
                piece.done.set_result(result)


def _encode_pieces(pieces: list[_Piece]) -> list[tuple[Vectors, int]]:
    model = pieces[0].model
    texts = [text for piece in pieces for text in piece.texts]
    vectors = model.encode_queries(texts) if pieces[0].query else model.encode_documents(texts)
    tokens = model.count_tokens(texts)
    results, start = [], 0
    for piece in pieces:
        end = start + len(piece.texts)
        results.append((vectors[start:end], sum(tokens[start:end])))
        start = end
    return results
