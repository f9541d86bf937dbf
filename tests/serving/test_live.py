"""Following the ledger: one swap between two requests, nothing unverified, and the way back always open."""

import asyncio
import threading
import time

import httpx2
import pytest
from small_service import PAGES, build, edition, embedding, release, serving, settings_for, until

from rag_serving.errors import NotReady
from rag_serving.live import Live
from rag_serving.promotion import hold, rollback
from rag_serving.releases import Action, Ledger
from rag_serving.snapshots import snapshot_key
from rag_serving.store import LocalStore

ASK = {"query": "How do I delete a bucket?", "top_k": 3}


def append(store: LocalStore, snapshot_id: str, manifest_sha256: str) -> None:
    """Release a snapshot without the checks of a promotion, as if its bytes had gone bad just after them."""
    reason = "straight into the ledger"
    Ledger(store).append(Action.PROMOTE, after=1, actor="tester", reason=reason, snapshot_id=snapshot_id, manifest_sha256=manifest_sha256)


def damage(store: LocalStore, snapshot_id: str) -> tuple:
    """Flip a byte of the largest file of a snapshot; what restores it."""
    path = max((path for path in store.folder(snapshot_key(snapshot_id)).rglob("*.lance")), key=lambda path: path.stat().st_size)
    good = path.read_bytes()
    path.write_bytes(good[:50] + bytes([good[50] ^ 255]) + good[51:])
    return path, good


def test_promotion_and_rollback_under_load(two, tmp_path, capsys):
    """Ten promotions and rollbacks under a stream of requests are each served soon after, without a restart.

    No request fails, and each reply holds the texts of the one snapshot that it names, under a release number of that snapshot.
    """
    store, first, second = two
    texts = {first.snapshot_id: {text for _, text in PAGES.values()}, second.snapshot_id: {text for _, text in edition(2).values()}}
    done, replies = threading.Event(), []

    def ask(url: str) -> None:
        with httpx2.Client(base_url=url, trust_env=False, timeout=20) as client:
            while not done.is_set():
                reply = client.post("/v1/query", json=ASK)
                replies.append((reply.status_code, reply.json()))

    taken: dict[str, list[float]] = {"promote": [], "rollback": []}
    with embedding(settings_for(tmp_path)) as url, serving(settings_for(tmp_path, embedder_url=url), store) as client:
        threads = [threading.Thread(target=ask, args=(str(client.base_url),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                for action, wanted in (("promote", second), ("rollback", first)):
                    entry = release(store, second) if action == "promote" else rollback(store, actor="tester", reason="back")

                    def served(reply, number=entry.number, snapshot_id=wanted.snapshot_id):
                        body = reply.json()
                        return (body["release"], body["snapshot_id"]) == (number, snapshot_id)

                    taken[action].append(until(client, "/readyz", holds=served))
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert client.get("/v1/release").json()["number"] == 11
    with capsys.disabled():
        for action, seconds in taken.items():
            print(
                f"\n{action} served after {min(seconds):.3f} to {max(seconds):.3f} s (polled every 0.1 s), {len(replies)} requests", end=""
            )
    assert {status for status, _ in replies} == {200}
    assert {body["snapshot_id"] for _, body in replies} == set(texts)
    assert not any(body["degraded"] for _, body in replies)
    for _, body in replies:
        assert {hit["text"] for hit in body["hits"]} <= texts[body["snapshot_id"]]
        assert (body["release"] % 2 == 0) == (body["snapshot_id"] == second.snapshot_id)
        assert all(quote["text"] in " ".join(texts[body["snapshot_id"]]) for quote in body["quotes"])


def test_damaged_snapshot_is_never_swapped_in(two, tmp_path, caplog):
    """A released snapshot with a flipped byte leaves the old one serving, shows why, and is served once it is whole again."""
    store, first, second = two
    with serving(settings_for(tmp_path), store) as client:
        path, good = damage(store, second.snapshot_id)
        append(store, second.snapshot_id, second.sha256)
        until(client, "/readyz", holds=lambda reply: reply.json()["problem"])
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["snapshot_id"]) == (200, first.snapshot_id)
        assert "was altered" in ready.json()["problem"]["detail"]
        body = client.get("/v1/release").json()
        assert (body["champion"]["snapshot_id"], body["open"]["snapshot_id"]) == (second.snapshot_id, first.snapshot_id)
        assert body["problem"]["code"] == "snapshot"
        assert client.post("/v1/query", json=ASK).json()["snapshot_id"] == first.snapshot_id
        path.write_bytes(good)
        until(client, "/readyz", holds=lambda reply: reply.json()["snapshot_id"] == second.snapshot_id, seconds=10)
        until(client, "/readyz", holds=lambda reply: reply.json()["problem"] is None)
    assert "stays open" in caplog.text


def test_a_snapshot_taken_away_while_it_serves(two, tmp_path, caplog):
    """When the live snapshot's folder is removed, the release before answers, no request fails, and the live one is back once restored."""
    store, first, second = two
    release(store, second)
    folder = store.folder(snapshot_key(second.snapshot_id))
    with serving(settings_for(tmp_path), store) as client:
        until(client, "/readyz", holds=lambda reply: reply.json()["snapshot_id"] == second.snapshot_id)
        until(client, "/v1/release", holds=lambda reply: reply.json()["previous"]["embedding_model"])
        folder.rename(tmp_path / "away")
        replies = []
        while not replies or replies[-1].json()["snapshot_id"] != first.snapshot_id:
            replies.append(client.post("/v1/query", json=ASK))
            assert replies[-1].status_code == 200
            assert len(replies) < 1000
        body = client.get("/v1/release").json()
        assert (body["champion"]["snapshot_id"], body["open"]["snapshot_id"]) == (second.snapshot_id, first.snapshot_id)
        assert (body["open"]["release"], body["problem"]["code"]) == (1, "snapshot")
        (tmp_path / "away").rename(folder)
        until(client, "/readyz", holds=lambda reply: reply.json()["snapshot_id"] == second.snapshot_id, seconds=20)
        until(client, "/readyz", holds=lambda reply: reply.json()["problem"] is None, seconds=20)
        assert client.post("/v1/query", json=ASK).json()["snapshot_id"] == second.snapshot_id
    assert "release 1 stands in" in caplog.text


def test_an_only_snapshot_taken_away(two, tmp_path):
    """Without a release before it, the service says what is gone and answers from what it has open or with 503; restored, all is well."""
    store, first, _ = two
    folder = store.folder(snapshot_key(first.snapshot_id))
    with serving(settings_for(tmp_path), store) as client:
        folder.rename(tmp_path / "away")
        until(client, "/readyz", holds=lambda reply: reply.json().get("problem"))
        reply = client.post("/v1/query", json=ASK)
        assert (reply.status_code, reply.json().get("snapshot_id", reply.json().get("code"))) in (
            (200, first.snapshot_id),
            (503, "not_ready"),
        )
        (tmp_path / "away").rename(folder)
        until(client, "/readyz", holds=lambda reply: reply.json()["problem"] is None, seconds=20)
        assert client.post("/v1/query", json=ASK).status_code == 200


def test_missing_snapshot_on_a_cold_start(two, tmp_path):
    """A service that starts on a release whose snapshot is gone stays alive and not ready, and says which; going back makes it ready."""
    store, first, second = two
    release(store, second)
    folder = store.folder(snapshot_key(second.snapshot_id))
    folder.rename(tmp_path / "away")
    with serving(settings_for(tmp_path), store, ready=False) as client:
        until(client, "/readyz", holds=lambda reply: second.snapshot_id in reply.json()["detail"])
        assert client.get("/livez").status_code == 200
        assert client.post("/v1/query", json=ASK).status_code == 503
        rollback(store, actor="tester", reason="the new one is gone")
        until(client, "/readyz", holds=lambda reply: reply.status_code == 200)
        assert client.post("/v1/query", json=ASK).json()["snapshot_id"] == first.snapshot_id


def test_broken_ledger_keeps_what_is_open(two, tmp_path):
    """An unreadable ledger changes nothing for who asks; it is shown, and a service that starts on it is not ready."""
    store, first, _ = two
    with serving(settings_for(tmp_path), store) as client:
        (store.root / "releases" / "000002.json").write_text("{}")
        until(client, "/readyz", holds=lambda reply: reply.json()["problem"])
        assert "000002.json" in client.get("/readyz").json()["problem"]["detail"]
        assert client.post("/v1/query", json=ASK).json()["snapshot_id"] == first.snapshot_id
    with serving(settings_for(tmp_path), store, ready=False) as client:
        until(client, "/readyz", holds=lambda reply: "000002.json" in reply.json()["detail"])
        assert client.get("/readyz").status_code == 503


def test_vanished_store_keeps_what_is_open(two, tmp_path):
    """A store that cannot be reached changes nothing for who asks, and its place is not told to clients."""
    store, first, _ = two
    with serving(settings_for(tmp_path), store) as client:
        (store.root / "releases").rename(tmp_path / "away")
        until(client, "/readyz", holds=lambda reply: reply.json()["problem"])
        assert str(tmp_path) not in client.get("/v1/release").text
        assert client.post("/v1/query", json=ASK).json()["snapshot_id"] == first.snapshot_id
        (tmp_path / "away").rename(store.root / "releases")
        until(client, "/readyz", holds=lambda reply: reply.json()["problem"] is None)


def test_holds_and_history_are_shown(two, tmp_path):
    """A hold shows in /v1/release and swaps nothing."""
    store, _, _ = two
    with serving(settings_for(tmp_path), store) as client:
        hold(store, actor="tester", reason="drift")
        until(client, "/v1/release", holds=lambda reply: reply.json()["number"] == 2)
        body = client.get("/v1/release").json()
        assert [(entry["number"], entry["reason"]) for entry in body["holds"]] == [(2, "drift")]
        assert [entry["action"] for entry in body["history"]] == ["hold", "promote"]
        assert body["open"]["release"] == body["champion"]["number"] == 1


async def until_true(check, *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_old_snapshot_closes_after_its_last_request(two, tmp_path):
    """A request that holds an older snapshot keeps it open through two promotions; it closes when the request ends, not before."""
    store, first, second = two
    third = build(store, settings_for(tmp_path), edition(3))

    async def run() -> None:
        live = Live(store, settings_for(tmp_path))
        live.start()
        await until_true(lambda: live.serving)
        with live.borrow() as borrowed:
            for number, manifest in ((2, second), (3, third)):
                release(store, manifest)
                await until_true(lambda number=number: live.serving.number == number)
            await until_true(lambda: live.manifest(first.snapshot_id) is None)
            assert not borrowed.snapshot.closed
            hits = await borrowed.snapshot.retriever.retrieve("delete a bucket", None, k=1)
            assert hits[0].text == PAGES["s3.DeleteBucket"][1]
        assert borrowed.snapshot.closed
        assert live.manifest(second.snapshot_id), "the release before stays open"
        await live.stop()

    asyncio.run(run())


def test_previous_is_open_after_a_restart(two, tmp_path):
    """A service that starts later opens the release before the live one too, so that its first rollback only swaps."""
    store, first, second = two
    release(store, second)

    async def run() -> None:
        live = Live(store, settings_for(tmp_path))
        with pytest.raises(NotReady):
            live.borrow().__enter__()
        live.start()
        await until_true(lambda: live.manifest(first.snapshot_id))
        assert live.serving.snapshot_id == second.snapshot_id
        kept = live._open[first.snapshot_id]
        rollback(store, actor="tester", reason="back")
        await until_true(lambda: live.serving.number == 3)
        assert live.serving.snapshot is kept
        await live.stop()
        assert kept.closed

    asyncio.run(run())


def test_released_id_with_other_bytes_is_refused(two, tmp_path):
    """A ledger entry whose manifest hash is not that of the snapshot it names opens nothing."""
    store, first, second = two
    append(store, second.snapshot_id, first.sha256)
    with serving(settings_for(tmp_path), store, ready=False) as client:
        until(client, "/readyz", holds=lambda reply: "not the snapshot that was released" in reply.json()["detail"])
        assert client.get("/readyz").status_code == 503
