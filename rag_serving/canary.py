"""Who answers a request: the champion, or for a sticky share of callers the canary; in shadow mode the canary answers too, unseen.

Whatever is wrong with the canary never hurts who asks: when it fails or takes more than half of the time that is left, the champion answers;
after five failures in a row it is only shadowed by this process. Shadow answers run in the background, a few at a time, with a deadline of
their own; when too many run, or the service is busy, the next are dropped. Every outcome is a row of the observation log.
"""

import asyncio
import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from copy import copy
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Generic, Literal, TypeVar

from opentelemetry.trace import NoOpTracer

from rag_serving.deadline import Deadline
from rag_serving.errors import NotReady, RaglineError, in_log
from rag_serving.exchange import Exchange
from rag_serving.live import Live
from rag_serving.observations import Arm, Kind, Observation, ObservationLog
from rag_serving.opened import Serving
from rag_serving.retrieval import Hit
from rag_serving.settings import Canary
from rag_serving.signals.redaction import redacted
from rag_serving.wording import terms
from rag_serving.writing.extraction import Answer

MOST_FAILURES = 5  # of the canary in a row, after which this process only shadows it

_CONVERSATION = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNSOUND = frozenset({"citation_removed", "uncited", "unsupported_removed"})  # what checking an answer's citations found

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Account:
    """What is observed of an answer. `text` is compared and never logged; shares are between 0 and 1, None where there is nothing to judge."""

    doc_ids: tuple[str, ...] = ()
    top_score: float | None = None
    text: str = ""
    abstained: bool | None = None
    citations: int | None = None
    cited: float | None = None
    grounded: float | None = None


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """A request that any opened snapshot can do: `run` its phases, and give the `account` of what came out."""

    kind: Kind
    query: str
    run: Callable[[Serving, Exchange], Awaitable[T]]
    account: Callable[[T], Account]


def account_of(hits: Sequence[Hit], answer: Answer | None = None) -> Account:
    """The account of passages found, and of the answer made of them."""
    found = Account(tuple(dict.fromkeys(hit.doc_id for hit in hits)), hits[0].score if hits else None)
    if answer is None:
        return found
    if answer.abstained:
        return replace(found, abstained=True)
    sound = float(not _UNSOUND.intersection(answer.flags))
    return replace(found, text=answer.text, abstained=False, citations=len(answer.cited), cited=sound, grounded=answer.groundedness)


def in_share(key: str, canary: int, share: float) -> bool:
    """Whether a caller belongs to the share that the canary of this ledger entry gets: always the same answer, another draw each canary."""
    drawn = int.from_bytes(hashlib.sha256(f"{canary}:{key}".encode()).digest()[:8], "big")
    return drawn < share * 2**64


def conversation_of(headers: Mapping[str, str]) -> str:
    """The conversation that a request says it belongs to, in `X-Conversation-Id`: 1 to 64 letters, digits, `.`, `_`, `-`; else none."""
    given = headers.get("x-conversation-id", "")
    return given if _CONVERSATION.fullmatch(given) else ""


def split_key(exchange: Exchange) -> str:
    """What a request is led by: its caller and its conversation; one of nobody known is led alone."""
    if exchange.caller.anonymous and not exchange.conversation:
        return exchange.trace_id
    return f"{exchange.caller.key_id} {exchange.conversation}"


def overlap(ours: Iterable[str], theirs: Iterable[str]) -> float:
    """The Jaccard overlap of two collections; 1 when both are empty."""
    one, other = set(ours), set(theirs)
    return len(one & other) / len(one | other) if one | other else 1.0


class Traffic:
    """Leads each request to an arm and logs what came of it. `counts`: fell_back, shadowed, dropped and failed (of the shadows).

    While `busy()`, no shadow begins: it would take time from those who wait, and look slow itself.
    """

    def __init__(self, live: Live, observations: ObservationLog, settings: Canary, *, busy: Callable[[], bool] = lambda: False) -> None:
        self.counts: Counter[str] = Counter()
        self._live = live
        self.observations = observations
        self._settings = settings
        self._busy = busy
        self._shadows: set[asyncio.Task[Any]] = set()
        self._failures: Counter[int] = Counter()  # of the canary in a row, by its ledger entry
        self._compared: Counter[int] = Counter()  # its shadow answers so far

    def start(self) -> None:
        self.observations.start()

    async def stop(self) -> None:
        """End the shadows that run and write what was observed."""
        shadows = set(self._shadows)
        for shadow in shadows:
            shadow.cancel()
        if shadows:
            await asyncio.wait(shadows)
        await self.observations.stop()

    async def answered(self, work: Work[T], exchange: Exchange) -> T:
        """The result of the work on the arm that the caller belongs to; raises what the champion raises."""
        canary = self._live.canary
        failure: Exception | None = None
        if canary is not None and self._splits(canary, exchange):
            before = _collected(exchange)
            try:
                with canary.snapshot.in_use():
                    result, _ = await self._on(canary, work, exchange, arm="canary", seconds=exchange.deadline.remaining / 2)
            except Exception as error:  # noqa: BLE001 - of whatever kind, the champion is asked instead
                failure = error
                _restore(exchange, before)
            else:
                self._failures.clear()
                return result
        try:
            result, account = await self._by_champion(work, exchange)
        except Exception:
            self._shadow(work, exchange, None)  # the canary may fail as often as the champion does, so it is seen there too
            raise
        if canary is not None and failure is not None:  # what the champion cannot answer either is not the canary's fault
            self._fell_back(canary, failure)
        self._shadow(work, exchange, account)
        return result

    async def compared(self, work: Work[T], exchange: Exchange) -> tuple[T, tuple[T, Exchange] | None]:
        """The champion's result, and the canary's with an exchange of its own: None when no canary is open or it failed.

        Both are logged as `compare`, and count neither as traffic nor as shadows.
        """
        work = replace(work, kind="compare")
        result, account = await self._by_champion(work, exchange)
        canary = self._live.canary
        if canary is None or self._stage(canary) == "off":
            return result, None
        apart = _apart(exchange, exchange.deadline)
        return result, await asyncio.create_task(self._shadowed(work, apart, account), context=Context())

    def said(self, verdict: Literal["up", "down"], *, snapshot_id: str, trace_id: str) -> None:
        """Log a thumb for an answer of a snapshot that answers here; one of an earlier release is not compared with anything."""
        for serving in (self._live.serving, self._live.canary):
            if serving is not None and serving.snapshot_id == snapshot_id:
                self.observations.add(replace(self._row("feedback", trace_id, serving, arm=serving.arm), verdict=verdict))

    def _stage(self, canary: Serving) -> Literal["shadow", "split", "off"]:
        """What the canary gets from this process now; a staged one at first, and one that failed too often, is only shadowed."""
        mode, entry = self._settings.mode, canary.canary or 0
        if mode == "staged":
            mode = "split" if self._compared[entry] >= self._settings.min_requests else "shadow"
        return "shadow" if mode == "split" and self._failures[entry] >= MOST_FAILURES else mode

    def _splits(self, canary: Serving, exchange: Exchange) -> bool:
        return self._stage(canary) == "split" and in_share(split_key(exchange), canary.canary or 0, self._settings.share)

    def _fell_back(self, canary: Serving, error: Exception) -> None:
        entry = canary.canary or 0
        self.counts["fell_back"] += 1
        self._failures[entry] += 1
        if self._failures[entry] in (1, MOST_FAILURES):
            then = "it is only shadowed from now on" if self._failures[entry] == MOST_FAILURES else "the champion answers"
            log.warning("the canary %s failed, %s: %s", canary.snapshot_id, then, in_log(error))

    async def _by_champion(self, work: Work[T], exchange: Exchange) -> tuple[T, Account]:
        before = _collected(exchange)
        with self._live.borrow() as serving:
            try:
                return await self._on(serving, work, exchange, arm="champion")
            except Exception as error:
                if not await self._live.lost(serving):
                    raise
                if self._live.serving is serving:
                    raise NotReady(f"the files of {serving.snapshot_id} are gone.", fix="Try again in a moment.") from error
        _restore(exchange, before)
        with self._live.borrow() as serving:
            return await self._on(serving, work, exchange, arm="champion")

    def _shadow(self, work: Work[Any], exchange: Exchange, seen: Account | None) -> None:
        """Have the canary do the same work in the background, if one is open and the request is to be shadowed."""
        canary, settings = self._live.canary, self._settings
        if canary is None or self._stage(canary) != "shadow" or not in_share(exchange.trace_id, 0, settings.shadow_share):
            return
        if len(self._shadows) >= settings.shadow_concurrency or self._busy():
            self.counts["dropped"] += 1
            return
        apart = _apart(exchange, Deadline.after(settings.shadow_deadline_seconds))
        task = asyncio.create_task(self._shadowed(work, apart, seen), context=Context())  # no part of the request's trace and metrics
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _shadowed(self, work: Work[T], exchange: Exchange, seen: Account | None) -> tuple[T, Exchange] | None:
        try:
            with self._live.borrow("canary") as canary:
                result, _ = await self._on(canary, work, exchange, arm="shadow", seconds=exchange.deadline.remaining, seen=seen)
        except Exception as error:  # noqa: BLE001 - it is in the log of observations
            self.counts["failed"] += work.kind != "compare"
            log.info("a shadow answer failed: %s", in_log(error))
            return None
        if work.kind != "compare":
            self.counts["shadowed"] += 1
            self._compared[canary.canary or 0] += 1
        return result, exchange

    async def _on(
        self, serving: Serving, work: Work[T], exchange: Exchange, *, arm: Arm, seconds: float | None = None, seen: Account | None = None
    ) -> tuple[T, Account]:
        """Run the work on an opened snapshot within `seconds`, and log it; a shadow is compared with what the champion was `seen` to say."""
        row = self._row(work.kind, exchange.trace_id, serving, arm=arm)
        row = replace(row, query=redacted(work.query) if self._settings.log_text else None)
        started, before = time.perf_counter(), len(exchange.guards)
        try:
            async with asyncio.timeout(seconds):
                result = await work.run(serving, exchange)
            account = work.account(result)
        except Exception as error:
            code = error.code if isinstance(error, RaglineError) else "timeout" if isinstance(error, TimeoutError) else "internal"
            self.observations.add(replace(_ended(row, exchange, started, before), outcome="error", code=code))
            raise
        self.observations.add(_accounted(_ended(row, exchange, started, before), account, seen))
        return result, account

    def _row(self, kind: Kind, trace_id: str, serving: Serving, *, arm: Arm) -> Observation:
        canary = self._live.canary
        return Observation(kind, trace_id, arm, serving.number, serving.snapshot_id, canary=canary.canary if canary else None)


def _ended(row: Observation, exchange: Exchange, started: float, before: int) -> Observation:
    """The row with how the work ended; the guards' events `before` it began were about the question, not about an arm."""
    return replace(
        row,
        outcome="degraded" if exchange.degraded else "ok",
        total_ms=(time.perf_counter() - started) * 1000,
        timings_ms=dict(exchange.timings_ms),
        degraded=tuple(exchange.degraded),
        guards=tuple(str(event) for event in exchange.guards[before:]),
    )


def _accounted(row: Observation, account: Account, seen: Account | None) -> Observation:
    row = replace(
        row,
        doc_ids=account.doc_ids,
        top_score=account.top_score,
        abstained=account.abstained,
        citations=account.citations,
        cited=account.cited,
        grounded=account.grounded,
    )
    if seen is None:
        return row
    wording = overlap(terms(account.text), terms(seen.text)) if account.text and seen.text else None
    return replace(row, documents=overlap(account.doc_ids, seen.doc_ids), wording=wording)


def _apart(exchange: Exchange, deadline: Deadline) -> Exchange:
    """The same request anew, heard by nobody and in no trace."""
    return replace(exchange, deadline=deadline, tracer=NoOpTracer(), listener=None, **_fresh(exchange))


def _fresh(exchange: Exchange) -> dict[str, Any]:
    """Empty ones of what the phases collect in an exchange."""
    return {each.name: each.default_factory() for each in fields(exchange) if each.default_factory is not MISSING}


def _collected(exchange: Exchange) -> dict[str, Any]:
    """Copies of what was collected in an exchange so far."""
    return {name: copy(getattr(exchange, name)) for name in _fresh(exchange)}


def _restore(exchange: Exchange, collected: dict[str, Any]) -> None:
    for name, value in collected.items():
        setattr(exchange, name, value)
