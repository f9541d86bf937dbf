"""The opened releases: follows the ledger, opens and warms what it names, and swaps one reference between two requests.

A request borrows the reference it starts with and keeps it, so it sees one snapshot in all its phases. What cannot be read or verified is
never swapped in: what is open stays, and the problem is told. The release before the live one is kept open, so that a rollback only swaps,
and stands in when the live snapshot's files are taken away. The canary that the ledger names is open beside them; whatever is wrong with it
changes nothing for the champion.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module

from rag_serving import connections, telemetry
from rag_serving.errors import NotReady, ReleaseError, SnapshotError
from rag_serving.opened import Arm, Encoders, OpenSnapshot, Serving, open_release
from rag_serving.releases import Entry, Ledger, Release, State, fold
from rag_serving.settings import Settings
from rag_serving.snapshots import MANIFEST, Manifest, snapshot_key, stamp_of, verify
from rag_serving.store import Store
from rag_serving.trouble import Problem, Trouble

log = logging.getLogger(__name__)


class Live:
    """What one serving process has open. Everything happens on one event loop; reading and hashing happen in threads."""

    def __init__(self, store: Store, settings: Settings, *, opened: Callable[[], None] | None = None) -> None:
        """`opened` is called once, when the first release is open and before it answers."""
        self._when_open = opened
        self.serving: Serving | None = None
        self.canary: Serving | None = None
        self.state = State()
        self.entries: tuple[Entry, ...] = ()
        self._store = store
        self._ledger = Ledger(store)
        self._settings = settings
        self._encoders = Encoders(settings)
        self._open: dict[str, OpenSnapshot] = {}
        self._closings: set[asyncio.Task[None]] = set()
        self._followed = -1
        self._trouble = Trouble("the ledger cannot be followed", shortest=settings.serving.poll_seconds)
        self._canary_trouble = Trouble("the canary cannot be opened", shortest=settings.serving.poll_seconds)
        self._task: asyncio.Task[None] | None = None
        self._besides: asyncio.Task[None] | None = None

    @property
    def problem(self) -> Problem | None:
        """Why the ledger's newest state is not what is served."""
        return self._trouble.problem

    @property
    def canary_problem(self) -> Problem | None:
        """Why the canary that the ledger names is not open."""
        return self._canary_trouble.problem

    def start(self) -> None:
        """Begin to follow the ledger, in the background."""
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop following and close what no request uses any more."""
        for task in (self._task, self._besides):
            await _ended(task)
        self.canary = None
        self._keep(set())
        await asyncio.gather(*self._closings)

    @contextmanager
    def borrow(self, arm: Arm = "champion") -> Iterator[Serving]:
        """What serves now, or the canary beside it, kept open until the `with` ends; NotReady when there is none."""
        serving = self.serving if arm == "champion" else self.canary
        if serving is None:
            raise self.not_ready() if arm == "champion" else NotReady("no canary is open.", fix="Ask the champion.")
        with serving.snapshot.in_use():
            yield serving

    def manifest(self, snapshot_id: str) -> Manifest | None:
        """The manifest of a snapshot that is open here."""
        snapshot = self._open.get(snapshot_id)
        return snapshot.retriever.manifest if snapshot else None

    def not_ready(self) -> NotReady:
        if self.problem is not None:
            return NotReady(f"no release is open: {self.problem.detail}", fix=self.problem.fix)
        if self._followed >= 0 and self.state.champion is None:
            return NotReady("nothing has been promoted yet.", fix="Run `ragline run` to build, evaluate and promote a snapshot.")
        return NotReady("the release is being opened.", fix="Try again in a moment.")

    async def lost(self, serving: Serving) -> bool:
        """Whether the files of a serving snapshot were taken away. Then the previous release stands in, if its own are still there."""
        if await self._present(serving):
            return False
        serving.snapshot.recheck = True
        previous = self.state.previous
        opened = self._open.get(previous.snapshot_id) if previous else None
        instead = Serving(previous.number, opened, _now()) if previous and opened and opened is not serving.snapshot else None
        if instead and not await self._present(instead):
            instead = None
        if self.serving is serving and (instead or self.problem is None):
            what = f"the files of {serving.snapshot_id} are gone"
            error = SnapshotError(
                f"{what}; release {instead.number} stands in." if instead else f"{what}.", fix="Restore it from a backup."
            )
            self._note(error)
        if self.serving is serving and instead:
            self._open.pop(serving.snapshot_id, serving.snapshot).retire()
            self.serving = instead
        return True

    async def _present(self, serving: Serving) -> bool:
        return await asyncio.to_thread(self._store.exists, f"{snapshot_key(serving.snapshot_id)}/{MANIFEST}")

    async def _follow(self) -> None:
        await asyncio.to_thread(import_module, "lancedb")  # a second of work that would hold up health checks
        await asyncio.to_thread(connections.tls)
        while True:
            await self._catch_up()
            await asyncio.sleep(self._settings.serving.poll_seconds)

    async def _catch_up(self) -> None:
        number: int | None = None
        try:
            for snapshot in tuple(self._open.values()):
                await asyncio.to_thread(snapshot.relevance.refresh, self._store)
            if self.serving is not None:
                await self.lost(self.serving)
            number = await asyncio.to_thread(self._ledger.last_number)
            if number == self._followed and (self._busy() or not (self._trouble.due or self._canary_trouble.due)):
                return
            await self._adopt(await asyncio.to_thread(self._ledger.entries))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the store, requests go on
            if number != self._followed:
                self._trouble.clear()
            self._followed = -2 if number is None else number
            self._note(error)
        else:
            self._followed = self.state.number

    def _busy(self) -> bool:
        return self._besides is not None and not self._besides.done()

    def _note(self, error: Exception) -> None:
        served = f"release {self.serving.number} stays open" if self.serving else "nothing is open"
        self._trouble.note(error, meanwhile=served)

    async def _adopt(self, entries: list[Entry]) -> None:
        """Serve what the ledger names now; what stands beside it is opened in the background, so that it delays no later swap."""
        state = fold(entries)
        await _ended(self._besides)
        self.state, self.entries = state, tuple(entries)
        champion, previous, canary = state.champion, state.previous, state.canary
        if self.canary is not None and (canary is None or self.canary.canary != canary.number):
            self.canary = None
        if champion is None:
            if self.serving is not None:
                raise ReleaseError("the ledger names no release any more.", fix="Restore the ledger from a backup.")
            self._trouble.clear()
            return
        if self.serving is None or (self.serving.number, self.serving.snapshot_id) != (champion.number, champion.snapshot_id):
            await self._swap(champion)
        self._keep({release.snapshot_id for release in (champion, previous, canary) if release})
        self._besides = asyncio.create_task(self._open_besides(champion, previous, canary))

    async def _swap(self, release: Release) -> None:
        """Serve `release`; one that is still open at once, since its bytes were verified when it was opened, and are again later."""
        started = time.perf_counter()
        reused = self._open.get(release.snapshot_id)
        if reused is not None:
            reused.recheck = True
        snapshot = reused or await self._opened(release)
        if self._when_open is not None:
            self._when_open()
            self._when_open = None
        self.serving = Serving(release.number, snapshot, _now())
        seconds = time.perf_counter() - started
        telemetry.swapped(seconds)
        log.info("release %s serves %s, opened in %.3f s", release.number, release.snapshot_id, seconds)

    async def _open_besides(self, champion: Release, previous: Release | None, canary: Release | None) -> None:
        """Verify a reused champion again, and have the previous release and the canary open."""
        try:
            snapshot = self._open[champion.snapshot_id]
            if snapshot.recheck:
                await asyncio.to_thread(self._recheck, snapshot)
            if previous is not None and previous.snapshot_id not in self._open:
                await self._opened(previous)
        except Exception as error:  # noqa: BLE001 - as in _catch_up
            self._note(error)
        else:
            self._trouble.clear()
        try:
            if canary is not None and self.canary is None:
                opened = self._open.get(canary.snapshot_id) or await self._opened(canary)
                self.canary = Serving(champion.number, opened, _now(), canary.number)
                log.info("entry %s: %s is open as the canary", canary.number, canary.snapshot_id)
        except Exception as error:  # noqa: BLE001 - the champion serves, with or without a canary
            self._canary_trouble.note(error, meanwhile=f"release {champion.number} answers alone")
        else:
            self._canary_trouble.clear()

    def _recheck(self, snapshot: OpenSnapshot) -> None:
        """Verify an open snapshot again, unless its files are untouched since they were verified."""
        snapshot_id = snapshot.retriever.snapshot_id
        stamp = stamp_of(self._store, snapshot_id)
        if stamp != snapshot.stamp:
            verify(self._store, snapshot_id)
            snapshot.stamp = stamp
        snapshot.recheck = False

    async def _opened(self, release: Release) -> OpenSnapshot:
        opened = await open_release(self._store, release, self._settings, self._encoders, self._closings)
        self._open[release.snapshot_id] = opened
        return opened

    def _keep(self, snapshot_ids: set[str]) -> None:
        for snapshot_id in set(self._open) - snapshot_ids:
            self._open.pop(snapshot_id).retire()


async def _ended(task: asyncio.Task[None] | None) -> None:
    """Cancel a task, if there is one, and wait for its end."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
