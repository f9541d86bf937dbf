"""What a swap of releases costs the requests beside it: little is opened, hashed or asked anew that is known already."""

import asyncio
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_line import MODEL
from small_service import embedding, release, settings_for

from rag_serving import connections
from rag_serving import live as following
from rag_serving.live import Live
from rag_serving.promotion import rollback
from rag_serving.retrieval import Retriever
from rag_serving.snapshots import snapshot_key, stamp_of, verify
from rag_serving.store import LocalStore

QUESTION = "How do I delete a bucket?"


async def until(holds: Callable[[], object]) -> None:
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it took too long")


def a_file(store: LocalStore, snapshot_id: str) -> Path:
    return next(path for path in store.folder(snapshot_key(snapshot_id)).rglob("*.lance") if path.is_file())


async def followed(live: Live, entry) -> None:
    """Wait until the live release is that of a ledger entry and what stands beside it is open."""
    await until(lambda: live.serving and live.serving.number == entry.number and live._besides and live._besides.done())


def test_a_new_release_begins_with_what_the_encoder_knows(two, tmp_path):
    """Snapshots of one model share the encoder: known queries are not asked again, and it is closed with the last snapshot alone."""
    store, _, second = two

    async def run(url: str) -> None:
        live = Live(store, settings_for(tmp_path, embedder_url=url))
        live.start()
        await until(lambda: live.serving)
        encoder = live.serving.snapshot.encoder
        vectors = await encoder.encode([QUESTION])
        assert encoder.recent(5)[0][0] == QUESTION
        await followed(live, release(store, second))
        assert live.serving.snapshot.encoder is encoder
        np.testing.assert_array_equal(await encoder.encode([QUESTION]), vectors)
        assert (encoder.traffic.requests, encoder.traffic.cache_hits) == (1, 1)
        await live.stop()
        assert not encoder.in_use
        assert encoder._pool._pool is None

    with embedding(settings_for(tmp_path)) as url:
        asyncio.run(run(url))


def test_warming_reads_what_known_queries_will_need(line):
    """After a warm-up with known queries they read no passage from the disk."""
    store, manifests = line
    queries = ["topic3 word12", "passage 7"]

    async def run() -> None:
        retriever = await Retriever.open(store, manifests[3].snapshot_id)
        try:
            await retriever.warm_up(list(zip(queries, MODEL.encode_queries(queries), strict=True)))
            warmed = len(retriever._passages)
            for query, vector in zip(queries, MODEL.encode_queries(queries), strict=True):
                await retriever.retrieve(query, vector, k=10)
            assert len(retriever._passages) == warmed > 0
        finally:
            retriever.close()

    asyncio.run(run())


@pytest.mark.parametrize("touched", [False, True])
def test_going_back_hashes_only_what_was_touched(two, tmp_path, monkeypatch, touched):
    """A rollback to a snapshot that is still open hashes it again only if a file of it was written since, even one whose time was set back."""
    store, first, second = two
    verified: list[str] = []
    monkeypatch.setattr(following, "verify", lambda store, snapshot_id: verified.append(snapshot_id) or verify(store, snapshot_id))

    async def run() -> None:
        live = Live(store, settings_for(tmp_path))
        live.start()
        await until(lambda: live.serving)
        await followed(live, release(store, second))
        if touched:
            file = a_file(store, first.snapshot_id)
            before = file.stat()
            file.write_bytes(file.read_bytes())
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        await followed(live, rollback(store, actor="tester", reason="back"))
        assert (live.serving.snapshot_id, live.problem) == (first.snapshot_id, None)
        await live.stop()

    asyncio.run(run())
    assert verified == [first.snapshot_id] * touched


@pytest.mark.parametrize("change", ["write", "replace", "add", "remove"])
def test_a_stamp_tells_every_change(two, change):
    """Writing into a file, replacing it by an equal one, adding and removing one: each makes another stamp; reading makes none."""
    store, first, _ = two
    before = stamp_of(store, first.snapshot_id)
    verify(store, first.snapshot_id)
    assert stamp_of(store, first.snapshot_id) == before
    file = a_file(store, first.snapshot_id)
    if change == "write":
        file.write_bytes(file.read_bytes())
    elif change == "replace":
        data = file.read_bytes()
        file.with_suffix(".new").write_bytes(data)
        file.with_suffix(".new").replace(file)
    elif change == "add":
        (file.parent / "extra").write_bytes(b"")
    else:
        file.unlink()
    assert stamp_of(store, first.snapshot_id) != before


def test_clients_share_what_is_slow_to_make(tmp_path, monkeypatch):
    """The authorities that https needs are read once a process, whichever and however many clients are made, and before the first release."""
    made = []
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **named: made.append(named))
    connections.tls.cache_clear()

    async def run() -> None:
        live = Live(LocalStore(tmp_path / "store"), settings_for(tmp_path))
        live.start()
        await until(lambda: live._followed >= 0)
        for _ in range(3):
            with pytest.raises(connections.Unreachable):
                await connections.Pool().post("https://127.0.0.1:9", b"", {}, most=1)
        await live.stop()

    asyncio.run(run())
    connections.tls.cache_clear()
    assert len(made) == 1
