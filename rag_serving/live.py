"""The opened release: follows the ledger, opens and warms what it names, and swaps one reference between two requests.

A request borrows the reference it starts with and keeps it, so it sees one snapshot in all its phases. What cannot be read or verified is
never swapped in: what is open stays, and the problem is told. The release before the live one is kept open, so that a rollback only swaps.
"""

import asyncio
import importlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from rag_serving.encoding import Encoder, RemoteEncoder
from rag_serving.errors import NotReady, RaglineError, ReleaseError, SnapshotError, StoreError
from rag_serving.releases import Entry, Ledger, Release, State, fold
from rag_serving.retrieval import Retriever
from rag_serving.settings import Settings
from rag_serving.snapshots import Manifest, verify
from rag_serving.store import Store

LONGEST_PAUSE = 30.0  # seconds between attempts while a release cannot be opened

log = logging.getLogger(__name__)


class OpenSnapshot:
    """A verified, warmed snapshot and the encoder of its embedding model. Once retired, it closes when its last user leaves."""

    def __init__(self, retriever: Retriever, encoder: Encoder, closings: set[asyncio.Task[None]]) -> None:
        self.retriever = retriever
        self.encoder = encoder
        self.recheck = False
        self.closed = False
        self._closings = closings
        self._users = 0
        self._retired = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_done()

    def retire(self) -> None:
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._users and not self.closed:
            self.closed = True
            self.retriever.close()
            task = asyncio.get_running_loop().create_task(self.encoder.aclose())
            self._closings.add(task)
            task.add_done_callback(self._closings.discard)


@dataclass(frozen=True, slots=True)
class Serving:
    """The single reference that a swap replaces: which release number serves which opened snapshot, and since when (UTC)."""

    number: int
    snapshot: OpenSnapshot
    since: str

    @property
    def snapshot_id(self) -> str:
        return self.snapshot.retriever.snapshot_id


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the ledger's newest state is not what is served; `detail` is fit for clients."""

    code: str
    detail: str
    fix: str
    at: str


class Live:
    """What one serving process has open. Everything happens on one event loop; reading and hashing happen in threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.serving: Serving | None = None
        self.state = State()
        self.entries: tuple[Entry, ...] = ()
        self.problem: Problem | None = None
        self._store = store
        self._ledger = Ledger(store)
        self._settings = settings
        self._open: dict[str, OpenSnapshot] = {}
        self._closings: set[asyncio.Task[None]] = set()
        self._followed = -1
        self._pause = 0.0
        self._retry_at = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the ledger, in the background."""
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop following and close what no request uses any more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._keep(set())
        await asyncio.gather(*self._closings)

    @contextmanager
    def borrow(self) -> Iterator[Serving]:
        """What serves now, kept open until the `with` ends; NotReady when nothing does."""
        serving = self.serving
        if serving is None:
            raise self.not_ready()
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

    async def _follow(self) -> None:
        await asyncio.to_thread(importlib.import_module, "lancedb")
        while True:
            await self._catch_up()
            await asyncio.sleep(self._settings.serving.poll_seconds)

    async def _catch_up(self) -> None:
        number: int | None = None
        try:
            number = await asyncio.to_thread(self._ledger.last_number)
            if number == self._followed and (self.problem is None or time.monotonic() < self._retry_at):
                return
            await self._adopt(await asyncio.to_thread(self._ledger.entries))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the store, requests go on
            if number != self._followed:
                self._pause = 0.0
            self._followed = -2 if number is None else number
            self._note(error)
        else:
            self.problem, self._pause = None, 0.0
            self._followed = self.state.number

    def _note(self, error: Exception) -> None:
        self._pause = min(max(self._pause * 2, self._settings.serving.poll_seconds), LONGEST_PAUSE)
        self._retry_at = time.monotonic() + self._pause
        detail, fix = _public(error)
        if self.problem is None or self.problem.detail != detail:
            self.problem = Problem(getattr(error, "code", "internal"), detail, fix, _now())
            served = f"release {self.serving.number} stays open" if self.serving else "nothing is open"
            log.error("the ledger cannot be followed, %s: %s", served, error, exc_info=not isinstance(error, RaglineError))

    async def _adopt(self, entries: list[Entry]) -> None:
        state = fold(entries)
        self.state, self.entries = state, tuple(entries)
        champion, previous = state.champion, state.previous
        if champion is None:
            if self.serving is not None:
                raise ReleaseError("the ledger names no release any more.", fix="Restore the ledger from a backup.")
            return
        if self.serving is None or (self.serving.number, self.serving.snapshot_id) != (champion.number, champion.snapshot_id):
            await self._swap(champion)
        self._keep({release.snapshot_id for release in (champion, previous) if release})
        snapshot = self._open[champion.snapshot_id]
        if snapshot.recheck:
            await asyncio.to_thread(verify, self._store, champion.snapshot_id)
            snapshot.recheck = False
        if previous is not None and previous.snapshot_id not in self._open:
            await self._opened(previous)

    async def _swap(self, release: Release) -> None:
        """Serve `release`; one that is still open at once, since its bytes were verified when it was opened, and are again later."""
        started = time.perf_counter()
        reused = self._open.get(release.snapshot_id)
        if reused is not None:
            reused.recheck = True
        snapshot = reused or await self._opened(release)
        self.serving = Serving(release.number, snapshot, _now())
        seconds = time.perf_counter() - started
        log.info("release %s serves %s, opened in %.3f s", release.number, release.snapshot_id, seconds)

    async def _opened(self, release: Release) -> OpenSnapshot:
        retriever = await Retriever.open(self._store, release.snapshot_id)
        manifest = retriever.manifest
        try:
            _check_released(manifest, release)
            await retriever.warm_up()
        except BaseException:
            retriever.close()
            raise
        encoder = RemoteEncoder(
            self._settings.embedder_url,
            manifest.embedding_model,
            manifest.fingerprint,
            dims=manifest.dims,
            timeout_seconds=self._settings.serving.encode_timeout_seconds,
        )
        self._open[release.snapshot_id] = OpenSnapshot(retriever, encoder, self._closings)
        return self._open[release.snapshot_id]

    def _keep(self, snapshot_ids: set[str]) -> None:
        for snapshot_id in set(self._open) - snapshot_ids:
            self._open.pop(snapshot_id).retire()


def _check_released(manifest: Manifest, release: Release) -> None:
    if manifest.sha256 != release.manifest_sha256:
        raise SnapshotError(f"{release.snapshot_id} is not the snapshot that was released.", fix="Restore it from a backup.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _public(error: Exception) -> tuple[str, str]:
    """What a client may read of an error: errors of the store name its place, others are unforeseen."""
    if isinstance(error, RaglineError) and (isinstance(error, SnapshotError) or not isinstance(error, StoreError)):
        return error.what, error.fix
    return f"the store cannot be read ({type(error).__name__}).", "The service's log has the details; run `ragline doctor`."
