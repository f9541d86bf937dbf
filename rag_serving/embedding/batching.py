"""The computing threads and the lines before them: how the embedding service keeps queries quick while documents stream through.

Waiting queries of one model are computed together, up to a budget of tokens, by a few threads that share the cores: threads that wait for
one another at every layer lose half of their work as soon as the event loop wants a core. Documents are taken in small pieces by a thread
of their own, to which the kernel gives what the queries leave. Threads take their next batch by themselves and never wait for the loop.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rag_serving.deadline import Deadline
from rag_serving.embedding.cpu import compute_on, stand_back, thread_count
from rag_serving.embedding.turns import Overloaded, Turn, Turns
from rag_serving.errors import DeadlineExceeded
from rag_serving.models import EmbeddingModel

Vectors = npt.NDArray[np.float32]
T = TypeVar("T")

CHARACTERS_A_TOKEN = 4  # of English, about: near enough to share out work
PIECE_SECONDS = 0.25  # about how long documents are encoded before waiting queries get their turn
PIECES = (1, 256)  # least and most documents of a piece
DOCUMENTS_A_QUERY = 4  # so many times more documents than queries may wait: nobody sits before them
MOST_QUERY_THREADS = 4  # at most, and no more than cores: each holds the interpreter for a tenth of its batch
YIELD_SECONDS = 0.001  # after a piece while queries are under way: their thread gets the turn of a model that computes one thing at a time
DOCUMENTS_NICENESS = 10  # of the thread of documents: about a tenth of a core while queries want them all


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors (n, dims) of the texts of a request, in their order, and how many tokens the texts have together."""

    vectors: Vectors
    tokens: int


@dataclass(slots=True, eq=False)
class _Work:
    """The texts of one request; those from `taken` on wait, and `left` have no vector yet."""

    model: EmbeddingModel
    texts: Sequence[str]
    query: bool
    deadline: Deadline | None
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[Embedded]"
    rows: Vectors
    left: int
    taken: int = 0
    tokens: int = 0
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
    """The threads that compute, and the lines before them. `start()` it in the event loop whose requests it serves, `close()` it after.

    At most `most_texts` queries wait, and four times as many documents. While several clients ask, a batch that is not full waits until its
    oldest text is `max_wait` seconds old; one client alone is never made to wait. `computed` hears of each batch, on its thread.
    Other work gets turns of the same threads.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        max_wait: float = 0.002,
        most_texts: int = 1024,
        computed: Callable[[Computed], None] = lambda _: None,
    ) -> None:
        self._batch_tokens = batch_tokens
        self._max_wait = max_wait
        self._most_texts = most_texts
        self._computed = computed
        self._lines: dict[bool, deque[_Work]] = {True: deque(), False: deque()}
        self._lock = threading.Lock()
        self._turns = {query: Turns() for query in self._lines}
        self._embedded_at: dict[str, float] = {}  # when a text last got its vector, by fingerprint
        self._changed = {query: threading.Condition(self._lock) for query in self._lines}
        self._ending = False
        self._cores = thread_count()
        self._at_queries = 0  # threads that compute some now
        self._piece_due = False  # whether other work was done since the last piece of documents
        self._company = False  # whether the last batch of queries was of several requests
        self._pace: dict[str, float] = {}  # seconds a document, by fingerprint
        self._threads = [
            *(
                threading.Thread(target=self._queries, name=f"queries-{at}", daemon=True)
                for at in range(min(self._cores, MOST_QUERY_THREADS))
            ),
            threading.Thread(target=self._documents, name="documents", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Finish the batches under way; what still waits is cancelled."""
        with self._lock:
            self._ending = True
            for changed in self._changed.values():
                changed.notify_all()
        for thread in self._threads:
            thread.join()
        for line in self._lines.values():
            for work in line:
                work.done.cancel()
        for turns in self._turns.values():
            turns.cancel()

    def waiting(self, *, query: bool) -> int:
        """Texts in the line."""
        return sum(len(work.texts) - work.taken for work in tuple(self._lines[query]))

    async def encode(self, model: EmbeddingModel, texts: Sequence[str], *, query: bool, deadline: Deadline | None = None) -> Embedded:
        """Raises Overloaded, ModelError, and DeadlineExceeded for work not begun in time."""
        return await self.submit(model, texts, query=query, deadline=deadline)

    async def turn(self, run: Callable[[], T], *, query: bool, deadline: Deadline) -> T:
        """What `run` gives, called by a thread that computes: of the queries in the order of arrival, of the documents between two pieces.

        Raises what it raises, Overloaded, and DeadlineExceeded when the deadline passed before its turn.
        """
        with self._lock:
            done = self._turns[query].add(run, deadline)
            self._changed[query].notify()
        try:
            return await done
        finally:
            done.cancel()

    def idle(self, model: EmbeddingModel) -> float:
        """Seconds since this model last made a vector; infinite when it never did."""
        return time.monotonic() - self._embedded_at.get(model.fingerprint, -math.inf)

    def submit(
        self, model: EmbeddingModel, texts: Sequence[str], *, query: bool, deadline: Deadline | None = None, first: bool = False
    ) -> "asyncio.Future[Embedded]":
        """The same, begun at once; cancel the future if nobody waits for it any more. `first` goes before all that wait, room or no room."""
        loop = asyncio.get_running_loop()
        rows = np.empty((len(texts), model.dims), dtype=np.float32)
        work = _Work(model, texts, query, deadline, loop, loop.create_future(), rows, len(texts))
        with self._lock:
            if not (first or self._has_room(len(texts), query=query)):
                self._drop_over(self._lines[query])
                if not self._has_room(len(texts), query=query):
                    raise Overloaded
            (self._lines[query].appendleft if first else self._lines[query].append)(work)
            self._changed[query].notify()
        return work.done

    def _has_room(self, texts: int, *, query: bool) -> bool:
        most = self._most_texts if query else self._most_texts * DOCUMENTS_A_QUERY
        waiting = self.waiting(query=query)
        return waiting == 0 or waiting + texts <= most

    def _queries(self) -> None:
        while following := self._next_queries():
            self._do(following)
            with self._lock:
                self._at_queries -= 1

    def _documents(self) -> None:
        stand_back(DOCUMENTS_NICENESS)
        compute_on(self._cores)
        while following := self._next_documents():
            self._do(following)
            if self._lines[True] or self._at_queries:
                time.sleep(YIELD_SECONDS)

    def _do(self, following: list[Part] | Turn) -> None:
        if isinstance(following, Turn):
            following.take()
        else:
            self._compute(following)

    def _next_queries(self) -> list[Part] | Turn:
        """What to compute now, waiting for some; nothing at the end. The calling thread gets its share of the cores."""
        line, changed = self._lines[True], self._changed[True]
        with self._lock:
            while not self._ending:
                self._drop_over(line)
                turn = self._turns[True].next(before=line[0].arrived if line else None)
                if turn is not None:
                    self._share_cores()
                    return turn
                if not line:
                    changed.wait()
                    continue
                pause = self._max_wait - (time.monotonic() - line[0].arrived) if self._company else 0.0
                if pause > 0 and sum(map(_tokens_left, line)) < self._batch_tokens:
                    changed.wait(pause)
                    continue
                self._share_cores()
                return self._take_queries(line)
        return []

    def _share_cores(self) -> None:
        """One more thread computes queries: the calling one, on its share."""
        self._at_queries += 1
        compute_on(max(1, self._cores // self._at_queries))

    def _next_documents(self) -> list[Part] | Turn:
        """The same: pieces of documents and other work in turns."""
        line = self._lines[False]
        with self._lock:
            while not self._ending:
                self._drop_over(line)
                turn = None if self._piece_due and line else self._turns[False].next()
                self._piece_due = turn is not None
                if turn is not None:
                    return turn
                if line:
                    return [self._take_documents(line)]
                self._changed[False].wait()
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
            tokens = model.count_tokens(texts)
        except Exception as error:  # noqa: BLE001 - the waiting requests get it; the bench must go on
            if len(parts) > 1:
                for part in parts:
                    self._compute([part])
            else:
                _tell(parts[0].work, error)
            return
        ended = self._embedded_at[model.fingerprint] = time.monotonic()
        seconds = ended - before
        self._deliver(parts, vectors, tokens)
        if not query:
            self._pace[model.fingerprint] = max(1e-6, seconds / len(texts))
        self._computed(Computed(query, len(texts), seconds))

    def _deliver(self, parts: list[Part], vectors: Vectors, tokens: list[int]) -> None:
        at = 0
        with self._lock:  # another thread may compute other texts of the same request
            for part in parts:
                size = part.end - part.start
                part.work.rows[part.start : part.end] = vectors[at : at + size]
                part.work.tokens += sum(tokens[at : at + size])
                part.work.left -= size
                at += size
            finished = [part.work for part in parts if part.work.left == 0]
        if finished:
            finished[0].loop.call_soon_threadsafe(_finish, finished)


def _finish(finished: list[_Work]) -> None:
    for work in finished:
        if not work.done.done():
            work.done.set_result(Embedded(work.rows, work.tokens))


def _tell(work: _Work, error: Exception) -> None:
    def tell() -> None:
        if not work.done.done():
            work.done.set_exception(error)

    work.loop.call_soon_threadsafe(tell)


def _tokens(text: str) -> int:
    return len(text) // CHARACTERS_A_TOKEN + 2


def _tokens_left(work: _Work) -> int:
    return sum(map(_tokens, work.texts[work.taken :]))
