"""One computing thread and the line before it: how the embedding service keeps queries quick while documents stream through.

Waiting queries of one model are computed together, up to a budget of tokens, and go first; documents are taken in small pieces and get
their turn between them. The thread takes its next batch from the line by itself, so that it never waits for the event loop.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rag_serving.deadline import Deadline
from rag_serving.errors import DeadlineExceeded
from rag_serving.models import EmbeddingModel

Vectors = npt.NDArray[np.float32]

CHARACTERS_A_TOKEN = 4  # of English, about: near enough to share out work
PIECE_SECONDS = 0.25  # about how long documents are encoded before waiting queries get their turn
PIECES = (1, 256)  # least and most documents of a piece
DOCUMENTS_A_QUERY = 4  # so many times more documents than queries may wait: nobody sits before them
QUERY_TURNS = 8  # query batches in a row before a waiting document piece gets its turn


class Overloaded(Exception):
    """More work waits than the service takes on."""


@dataclass(slots=True, eq=False)
class _Work:
    """The texts of one request; those from `taken` on wait, and `left` have no vector yet."""

    model: EmbeddingModel
    texts: Sequence[str]
    query: bool
    deadline: Deadline | None
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Vectors]
    rows: Vectors
    left: int
    taken: int = 0
    arrived: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether nobody waits for it, or not for long enough."""
        return self.done.done() or (self.deadline is not None and self.deadline.expired)


@dataclass(frozen=True, slots=True)
class Part:
    """Some texts of one request, computed in one batch."""

    work: _Work
    start: int
    end: int

    @property
    def texts(self) -> Sequence[str]:
        return self.work.texts[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Computed:
    """What was computed together, for those who count."""

    query: bool
    texts: int
    seconds: float


class Bench:
    """The one thread that computes, and the line before it. `start()` it in the event loop whose requests it serves, `close()` it after.

    At most `most_texts` queries wait, and four times as many documents. While several clients ask, a batch that is not full waits until its
    oldest text is `max_wait` seconds old; one client alone is never made to wait. `computed` hears of each batch, on the thread.
    """

    def __init__(
        self,
        *,
        batch_tokens: int = 256,
        max_wait: float = 0.002,
        most_texts: int = 1024,
        computed: Callable[[Computed], None] = lambda _: None,
    ) -> None:
        self._batch_tokens = batch_tokens
        self._max_wait = max_wait
        self._most_texts = most_texts
        self._computed = computed
        self._lines: dict[bool, deque[_Work]] = {True: deque(), False: deque()}
        self._changed = threading.Condition()
        self._ending = False
        self._turns = 0
        self._company = False  # whether the last batch of queries was of several requests
        self._pace: dict[str, float] = {}  # seconds a document, by fingerprint
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Finish the batch under way; what still waits is cancelled."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()
        for line in self._lines.values():
            for work in line:
                work.done.cancel()

    def waiting(self, *, query: bool) -> int:
        """Texts in the line."""
        return sum(len(work.texts) - work.taken for work in tuple(self._lines[query]))

    async def encode(self, model: EmbeddingModel, texts: Sequence[str], *, query: bool, deadline: Deadline | None = None) -> Vectors:
        """Vectors in the order of the texts. Raises Overloaded, ModelError, and DeadlineExceeded for work not begun in time."""
        return await self.submit(model, texts, query=query, deadline=deadline)

    def submit(
        self, model: EmbeddingModel, texts: Sequence[str], *, query: bool, deadline: Deadline | None = None
    ) -> asyncio.Future[Vectors]:
        """The same, begun at once; cancel the future if nobody waits for it any more."""
        loop = asyncio.get_running_loop()
        rows = np.empty((len(texts), model.dims), dtype=np.float32)
        work = _Work(model, texts, query, deadline, loop, loop.create_future(), rows, len(texts))
        with self._changed:
            if not self._has_room(len(texts), query=query):
                self._drop_over(self._lines[query])
                if not self._has_room(len(texts), query=query):
                    raise Overloaded
            self._lines[query].append(work)
            self._changed.notify()
        return work.done

    def _has_room(self, texts: int, *, query: bool) -> bool:
        most = self._most_texts if query else self._most_texts * DOCUMENTS_A_QUERY
        waiting = self.waiting(query=query)
        return waiting == 0 or waiting + texts <= most

    def _run(self) -> None:
        while batch := self._next():
            self._compute(batch)

    def _next(self) -> list[Part]:
        """The parts to compute now, waiting for some; none at the end."""
        with self._changed:
            while not self._ending:
                for line in self._lines.values():
                    self._drop_over(line)
                queries, documents = self._lines[True], self._lines[False]
                if queries and (self._turns < QUERY_TURNS or not documents):
                    pause = self._max_wait - (time.monotonic() - queries[0].arrived) if self._company else 0.0
                    if pause > 0 and sum(map(_tokens_left, queries)) < self._batch_tokens:
                        self._changed.wait(pause)
                        continue
                    self._turns += 1
                    return self._take_queries(queries)
                if documents:
                    self._turns = 0
                    return [self._take_documents(documents)]
                self._changed.wait()
        return []

    @staticmethod
    def _drop_over(line: deque[_Work]) -> None:
        for work in [work for work in line if work.over]:
            line.remove(work)
            if not work.done.done():
                _tell(work, DeadlineExceeded("the time for these texts ended before they were computed.", fix="Allow more time."))

    def _take_queries(self, line: deque[_Work]) -> list[Part]:
        """The oldest texts, and those behind them of the same model, up to the budget; at least one text."""
        parts: list[Part] = []
        room = self._batch_tokens
        for work in [work for work in line if work.model is line[0].model]:
            end = work.taken
            while end < len(work.texts) and (room >= _tokens(work.texts[end]) or not (parts or end > work.taken)):
                room -= _tokens(work.texts[end])
                end += 1
            if end > work.taken:
                parts.append(Part(work, work.taken, end))
                work.taken = end
            if end < len(work.texts):
                break
            line.remove(work)
        self._company = len(parts) > 1
        return parts

    def _take_documents(self, line: deque[_Work]) -> Part:
        """As many documents of the request whose turn it is as fit into PIECE_SECONDS at the pace of the last piece; then others have theirs."""
        work = line.popleft()
        least, most = PIECES
        pace = self._pace.get(work.model.fingerprint)
        size = least if pace is None else max(least, min(most, int(PIECE_SECONDS / pace)))
        part = Part(work, work.taken, min(work.taken + size, len(work.texts)))
        work.taken = part.end
        if work.taken < len(work.texts):
            line.append(work)
        return part

    def _compute(self, parts: list[Part]) -> None:
        model, query = parts[0].work.model, parts[0].work.query
        texts = [text for part in parts for text in part.texts]
        before = time.monotonic()
        try:
            vectors = model.encode_queries(texts) if query else model.encode_documents(texts)
        except Exception as error:  # noqa: BLE001 - the waiting requests get it; the bench must go on
            if len(parts) > 1:
                for part in parts:
                    self._compute([part])
            else:
                _tell(parts[0].work, error)
            return
        seconds = time.monotonic() - before
        self._deliver(parts, vectors)
        if not query:
            self._pace[model.fingerprint] = max(1e-6, seconds / len(texts))
        self._computed(Computed(query, len(texts), seconds))

    @staticmethod
    def _deliver(parts: list[Part], vectors: Vectors) -> None:
        at = 0
        for part in parts:
            size = part.end - part.start
            part.work.rows[part.start : part.end] = vectors[at : at + size]
            part.work.left -= size
            at += size
        finished = [part.work for part in parts if part.work.left == 0]
        if finished:
            finished[0].loop.call_soon_threadsafe(_finish, finished)


def _finish(finished: list[_Work]) -> None:
    for work in finished:
        if not work.done.done():
            work.done.set_result(work.rows)


def _tell(work: _Work, error: Exception) -> None:
    def tell() -> None:
        if not work.done.done():
            work.done.set_exception(error)

    work.loop.call_soon_threadsafe(tell)


def _tokens(text: str) -> int:
    return len(text) // CHARACTERS_A_TOKEN + 2


def _tokens_left(work: _Work) -> int:
    return sum(map(_tokens, work.texts[work.taken :]))
