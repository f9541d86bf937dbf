"""From questions people asked to judged queries: each waiting question with what the live snapshot finds for it, and what a person decides.

Decisions go into a living eval set (a BEIR folder, to be reviewed and versioned like code), never straight into the release.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from evals.living import add_judged, add_negative, open_living
from evals.negatives import Grade
from rag_assets.searching import Search, live_release, open_search
from rag_assets.workbench import Workbench
from rag_serving.errors import QueryError, SourceError
from rag_serving.feedback import Waiting, propose, settle, waiting_queries
from rag_serving.store import Store

SHOWN = 10
GRADES = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that may answer: its best passage, and whether it was shown when the question was asked."""

    doc_id: str
    title: str
    uri: str
    text: str
    score: float
    hinted: bool


@dataclass(frozen=True, slots=True)
class Task:
    """A waiting question with its candidates, best first, and how many wait, this one included."""

    waiting: Waiting
    candidates: tuple[Candidate, ...]
    left: int


class Desk:
    """Hands out waiting questions and files the decisions. `folder` is the eval set that grows; `actor` is who decides."""

    def __init__(self, store: Store, search: Search, folder: Path, *, actor: str) -> None:
        self._store = store
        self._search = search
        self.folder = folder
        self._actor = actor
        open_living(folder)

    async def next(self, *, after: frozenset[str] = frozenset()) -> Task | None:
        """The first waiting question whose id is not in `after`; None when all are decided."""
        queue = waiting_queries(self._store)
        waiting = next((each for each in queue if each.review_id not in after), None)
        return Task(waiting, await self._candidates(waiting), len(queue)) if waiting else None

    async def search(self, query: str) -> list[str]:
        """Ids of the documents found for a query, best first."""
        return [candidate.doc_id for candidate in await self._found(query, frozenset())]

    async def judge(self, review_id: str, grades: Mapping[str, int]) -> None:
        """File the judgments of a question; one without a relevant document becomes a near-miss negative. QueryError for a wrong grade."""
        waiting = self._waiting(review_id)
        wrong = {doc_id: grade for doc_id, grade in grades.items() if grade not in GRADES}
        if wrong:
            raise QueryError(f"the grades {wrong} are none of {GRADES}.", fix="0: not relevant, 1: relevant, 2: answers it.")
        if any(grades.values()):
            add_judged(self.folder, waiting.query, grades, metadata={"origin": waiting.origin})
            settle(self._store, waiting, outcome="judged", actor=self._actor)
        else:
            add_negative(self.folder, waiting.query, Grade.NEAR_MISS)
            settle(self._store, waiting, outcome="no_answer", actor=self._actor)

    async def skip(self, review_id: str) -> None:
        """Take a question out of the queue without a judgment."""
        settle(self._store, self._waiting(review_id), outcome="skipped", actor=self._actor)

    def _waiting(self, review_id: str) -> Waiting:
        found = next((each for each in waiting_queries(self._store) if each.review_id == review_id), None)
        if found is None:
            raise QueryError(f"no question {review_id!r} waits for a judgment.", fix="Somebody decided it; take the next one.")
        return found

    async def _candidates(self, waiting: Waiting) -> tuple[Candidate, ...]:
        return tuple(await self._found(waiting.query, frozenset(waiting.doc_ids)))

    async def _found(self, query: str, hinted: frozenset[str]) -> list[Candidate]:
        (hits,) = await self._search.find([query], k=5 * SHOWN)
        best = {hit.doc_id: hit for hit in reversed(hits)}
        ordered = sorted(best.values(), key=lambda hit: -hit.score)[:SHOWN]
        return [Candidate(hit.doc_id, hit.title, hit.uri, hit.text, hit.score, hit.doc_id in hinted) for hit in ordered]


@asynccontextmanager
async def open_desk(bench: Workbench, folder: Path, *, actor: str) -> AsyncIterator[Desk]:
    """A desk over the live snapshot with its own model in this process; NotReady when nothing is released."""
    async with open_search(bench, live_release(bench).snapshot_id) as search:
        yield Desk(bench.store, search, folder, actor=actor)


def queue_log(store: Store, log: Path) -> tuple[int, int]:
    """Queue each line of a text file as a logged question: how many wait now, and how many were known. SourceError names a bad line."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {log}: {error}.", fix="Give a UTF-8 text file with a question on each line.") from None
    questions = [line for line in lines if line]
    queued = 0
    for number, question in enumerate(questions, start=1):
        try:
            queued += propose(store, question, "log")
        except QueryError as error:
            raise SourceError(f"question {number} of {log}: {error.what}", fix="Correct it; those before it are queued.") from None
    return queued, len(questions) - queued
