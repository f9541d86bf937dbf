"""Traffic for a canary: a sticky share or a shadow, each logged, and nothing that is wrong with it reaches who asks."""

import asyncio
import time
from dataclasses import replace

import pytest
from opentelemetry.trace import NoOpTracer
from small_service import build, name_canary, serving, settings_for, until
from test_observations import rows_of, until_true

from rag_serving.canary import MOST_FAILURES, Account, Traffic, Work, account_of, conversation_of, in_share, overlap, split_key
from rag_serving.deadline import Deadline
from rag_serving.edge.caller import Caller
from rag_serving.errors import QueryError
from rag_serving.exchange import Exchange
from rag_serving.live import Live
from rag_serving.observations import ObservationLog
from rag_serving.promotion import abort, promote
from rag_serving.settings import Canary, Gate
from rag_serving.snapshots import snapshot_key
from rag_serving.writing.extraction import NOTHING_FOUND, Answer, extract

ASK = {"query": "How do I delete a bucket?", "top_k": 3}
SHADOW = Canary(log_seconds=0.05, shadow_concurrency=8)
SPLIT = Canary(mode="split", share=1.0, log_seconds=0.05)


@pytest.fixture
def two(two):
    """A store of the test's own: the first snapshot is released, the second is its canary."""
    store, _, second = two
    name_canary(store, second)
    return two


def settings_of(root, canary, **changes):
    return settings_for(root, **changes).model_copy(update={"canary": canary})


def exchange_of(number=0, *, key_id="", seconds=20.0) -> Exchange:
    caller = Caller("tester", key_id=key_id or f"key-{number}")
    return Exchange(f"{number:032x}", NoOpTracer(), Deadline.after(seconds), caller)


def work_of(run) -> Work:
    return Work("query", "what?", run, lambda text: Account(doc_ids=(text,), text=text))


async def say_snapshot(serving, exchange):
    return serving.snapshot_id


def traffic_test(store, root, canary, check):
    """Run `check(traffic, live)` with a live champion and canary; what was observed, when it is done."""

    async def run() -> None:
        live = Live(store, settings_for(root))
        traffic = Traffic(live, ObservationLog(store, canary), canary)
        live.start()
        traffic.start()
        await until_true(lambda: live.canary)
        await check(traffic, live)
        await traffic.stop()
        await live.stop()

    asyncio.run(run())
    return sorted(rows_of(store), key=lambda row: row["at"])


def test_a_share_is_sticky_and_of_its_size():
    """A key is in the share always or never, about as many keys as asked for, and other ones at the next canary."""
    keys = [f"key-{number}" for number in range(10_000)]
    chosen = {key for key in keys if in_share(key, 7, 0.05)}
    assert chosen == {key for key in keys if in_share(key, 7, 0.05)}
    assert 400 < len(chosen) < 600
    assert chosen < {key for key in keys if in_share(key, 7, 0.5)}
    assert len(chosen & {key for key in keys if in_share(key, 8, 0.05)}) < 100
    assert (any(in_share(key, 7, 0.0) for key in keys), all(in_share(key, 7, 1.0) for key in keys)) == (False, True)


def test_a_conversation_is_led_as_one():
    """Callers are told apart by key and conversation, nobody known by the conversation alone or one by one; a strange header is none."""
    nobody = Caller("anonymous", anonymous=True)
    one, other = exchange_of(1, key_id="k"), exchange_of(2, key_id="k")
    assert split_key(one) == split_key(other) != split_key(replace(one, conversation="c"))
    assert split_key(replace(one, caller=nobody)) != split_key(replace(other, caller=nobody))
    assert split_key(replace(one, caller=nobody, conversation="c")) == split_key(replace(other, caller=nobody, conversation="c"))
    given = ("chat-7", "", "a b", "x" * 65, "a\r\nb")
    assert [conversation_of({"x-conversation-id": value}) for value in given] == ["chat-7", "", "", "", ""]


def test_overlap_is_of_sets():
    """Jaccard: shared over all; two empty ones are alike."""
    assert [overlap(*pair) for pair in ((["a", "b"], ["b", "c", "b"]), ([], []), (["a"], []))] == [1 / 3, 1.0, 0.0]


def test_an_account_says_what_an_answer_is_worth():
    """Quotes of passages are cited and grounded; an abstention has neither; a removed citation is unsound."""
    assert account_of([], Answer(NOTHING_FOUND, abstained=True)) == Account(abstained=True)
    assert account_of([], Answer("It is so [1].", groundedness=0.5, flags=("citation_removed",))).cited == 0.0
    assert account_of([], Answer("It is so [1].", groundedness=0.5)) == Account(
        text="It is so [1].", abstained=False, citations=0, cited=1.0, grounded=0.5
    )
    assert account_of([], extract("nothing", [])).abstained


def test_shadow_answers_are_unseen_and_compared(two, tmp_path):
    """In shadow mode the champion answers everybody; each request leaves a row of both arms, joined by its trace id, with their overlap."""
    store, first, second = two
    with serving(settings_of(tmp_path, SHADOW), store) as client:
        until(client, "/readyz", holds=lambda reply: reply.status_code == 200)
        until(client, "/v1/release", holds=lambda reply: reply.json()["number"] == 2)
        replies = []
        while not any(row["arm"] == "shadow" for row in rows_of(store)):
            replies.append(client.post("/v1/query", json=ASK).json())
            assert len(replies) < 500
    rows = rows_of(store)
    assert {reply["snapshot_id"] for reply in replies} == {first.snapshot_id}
    assert {reply["release"] for reply in replies} == {1}
    by_trace = {row["trace_id"]: row for row in rows if row["arm"] == "champion"}
    assert by_trace.keys() == {reply["trace_id"] for reply in replies}
    shadows = [row for row in rows if row["arm"] == "shadow"]
    assert {(row["snapshot_id"], row["release"], row["canary"], row["outcome"]) for row in shadows} <= {
        (second.snapshot_id, 1, 2, outcome) for outcome in ("ok", "degraded")
    }
    assert {row["trace_id"] for row in shadows} <= by_trace.keys()
    assert all(row["documents"] == 1.0 and 0 < row["wording"] <= 1 and row["grounded"] == 1.0 for row in shadows)
    assert all({"encode", "retrieve", "generate"} <= dict(row["timings_ms"]).keys() for row in rows)
    assert all("query" not in row for row in rows)


def test_both_answers_side_by_side(two, tmp_path):
    """/v1/compare gives the answers of both, each with its own snapshot and timings, as a pair of the log; the champion's alone without a canary."""
    store, first, second = two
    with serving(settings_of(tmp_path, Canary(shadow_share=0.0, log_seconds=0.05)), store) as client:
        deadline = time.monotonic() + 20
        while not (body := client.post("/v1/compare", json=ASK).json())["canary"]:
            assert time.monotonic() < deadline
        assert (body["champion"]["snapshot_id"], body["canary"]["snapshot_id"]) == (first.snapshot_id, second.snapshot_id)
        assert body["champion"]["trace_id"] == body["canary"]["trace_id"]
        assert body["canary"]["citations"]
        assert {"admit"} == body["champion"]["timings_ms"].keys() - body["canary"]["timings_ms"].keys()
        abort(store, actor="tester", reason="enough")
        until(client, "/v1/release", holds=lambda reply: reply.json()["number"] == 3)
        assert client.post("/v1/compare", json=ASK).json()["canary"] is None
        counted = client.get("/metrics").text
    pair = [(row["arm"], row["kind"]) for row in rows_of(store) if row["trace_id"] == body["champion"]["trace_id"]]
    assert sorted(pair) == [("champion", "compare"), ("shadow", "compare")]  # told apart from traffic, by which a canary is judged
    assert 'rag_canary_answers_total{result="shadowed"} 0.0' in counted


def test_split_answers_a_share_until_the_canary_ends(two, tmp_path):
    """In split mode the canary answers its share under the release number in force; after an abort the champion answers everybody."""
    store, first, second = two

    def answered(reply) -> str:
        return reply.json()["snapshot_id"]

    with serving(settings_of(tmp_path, SPLIT), store) as client:
        asked = time.monotonic()
        while answered(client.post("/v1/query", json=ASK)) != second.snapshot_id:
            assert time.monotonic() - asked < 20
        reply = client.post("/v1/retrieve", json=ASK).json()
        assert (reply["snapshot_id"], reply["release"]) == (second.snapshot_id, 1)
        abort(store, actor="tester", reason="enough")
        while answered(client.post("/v1/query", json=ASK)) != first.snapshot_id:
            assert time.monotonic() - asked < 40
        assert {answered(client.post("/v1/query", json=ASK)) for _ in range(5)} == {first.snapshot_id}
    assert {("canary", 2), ("champion", None)} <= {(row["arm"], row["canary"]) for row in rows_of(store)}


def test_a_caller_stays_on_its_arm(two, tmp_path):
    """Of many callers about the share goes to the canary, each always to the same arm; anonymous requests are split one by one."""
    store, first, second = two

    async def check(traffic, live) -> None:
        arms = {}
        for number in range(200):
            arms[number] = await traffic.answered(work_of(say_snapshot), exchange_of(number))
        for number in range(200):
            exchange = replace(exchange_of(1000 + number), caller=exchange_of(number).caller)
            assert await traffic.answered(work_of(say_snapshot), exchange) == arms[number]
        assert 40 < sum(arm == second.snapshot_id for arm in arms.values()) < 160
        nobody = Caller("anonymous", anonymous=True)
        alone = [await traffic.answered(work_of(say_snapshot), replace(exchange_of(number), caller=nobody)) for number in range(100)]
        assert set(alone) == {first.snapshot_id, second.snapshot_id}

    traffic_test(store, tmp_path, SPLIT.model_copy(update={"share": 0.5}), check)


def test_a_failing_canary_falls_back_and_is_only_shadowed_then(two, tmp_path, caplog):
    """Whoever the canary fails gets the champion's answer, with nothing left of the failed one; after some in a row it is only shadowed."""
    store, first, second = two

    async def fail_on_canary(serving, exchange):
        with exchange.phase("encode"):
            exchange.degrade("embedding")
            if serving.snapshot_id == second.snapshot_id:
                raise ValueError("something nobody foresaw")
            exchange.degraded.clear()
        return serving.snapshot_id

    async def check(traffic, live) -> None:
        for number in range(MOST_FAILURES + 3):
            exchange = exchange_of(number)
            assert await traffic.answered(work_of(fail_on_canary), exchange) == first.snapshot_id
            assert (exchange.degraded, list(exchange.timings_ms)) == ([], ["encode"])
        await until_true(lambda: traffic.counts["failed"] == 1 + traffic.counts["shadowed"] or not traffic._shadows)
        assert traffic.counts["fell_back"] == MOST_FAILURES
        assert await traffic.answered(work_of(say_snapshot), exchange_of(50)) == first.snapshot_id

    rows = traffic_test(store, tmp_path, SPLIT, check)
    failed = [row for row in rows if row["arm"] == "canary"]
    assert {(row["outcome"], row["code"], row["snapshot_id"]) for row in failed} == {("error", "internal", second.snapshot_id)}
    assert len(failed) == MOST_FAILURES
    champions = {row["trace_id"] for row in rows if row["arm"] == "champion"}
    assert len(champions) == MOST_FAILURES + 4
    assert {row["trace_id"] for row in failed} < champions
    assert any(row["arm"] == "shadow" for row in rows)
    assert "only shadowed" in caplog.text


def test_a_question_that_nobody_can_answer_is_not_the_canarys_fault(two, tmp_path):
    """Requests that the champion refuses as well, such as those with a wrong filter, end no split, however many there are."""
    store, _, second = two

    async def refuse(serving, exchange):
        raise QueryError("the filter is wrong.", code="invalid_filter")

    async def check(traffic, live) -> None:
        for number in range(MOST_FAILURES + 1):
            with pytest.raises(QueryError):
                await traffic.answered(work_of(refuse), exchange_of(number))
        assert traffic.counts["fell_back"] == 0
        assert await traffic.answered(work_of(say_snapshot), exchange_of(50)) == second.snapshot_id

    traffic_test(store, tmp_path, SPLIT, check)


def test_a_hanging_canary_leaves_the_champion_time(two, tmp_path):
    """A canary that never answers is given up after half of the time that is left; the champion answers within the rest."""
    store, first, second = two

    async def hang_on_canary(serving, exchange):
        if serving.snapshot_id == second.snapshot_id:
            await asyncio.Event().wait()
        assert not exchange.deadline.expired
        return serving.snapshot_id

    async def check(traffic, live) -> None:
        assert await traffic.answered(work_of(hang_on_canary), exchange_of(seconds=2.0)) == first.snapshot_id

    rows = traffic_test(store, tmp_path, SPLIT, check)
    assert [(row["arm"], row["code"]) for row in rows] == [("canary", "timeout"), ("champion", "")]


def test_shadows_are_bounded_and_end(two, tmp_path):
    """Shadows that hang delay no reply, are dropped beyond the bound, and end at their own deadline as errors of the canary."""
    store, first, second = two
    settings = Canary(log_seconds=0.05, shadow_concurrency=2, shadow_deadline_seconds=0.3)

    heard = []

    async def hang_on_canary(serving, exchange):
        heard.append((serving.snapshot_id, exchange.listener))
        if serving.snapshot_id == second.snapshot_id:
            await asyncio.Event().wait()
        return serving.snapshot_id

    async def check(traffic, live) -> None:
        answers = [await traffic.answered(work_of(hang_on_canary), replace(exchange_of(number), listener=heard)) for number in range(6)]
        assert set(answers) == {first.snapshot_id}
        await until_true(lambda: len(heard) == 8)
        assert {snapshot_id for snapshot_id, listener in heard if listener is None} == {second.snapshot_id}
        assert sum(listener is None for _, listener in heard) == 2
        assert (len(traffic._shadows), traffic.counts["dropped"]) == (2, 4)
        await until_true(lambda: not traffic._shadows)
        assert traffic.counts["failed"] == 2

    rows = traffic_test(store, tmp_path, settings, check)
    assert [row["code"] for row in rows if row["arm"] == "shadow"] == ["timeout"] * 2


def test_a_busy_service_shadows_nobody(two, tmp_path):
    """While many requests are under way no shadow begins; each one left out is counted."""
    store, *_ = two

    async def run() -> None:
        busy = [True]
        live = Live(store, settings_for(tmp_path))
        traffic = Traffic(live, ObservationLog(store, SHADOW), SHADOW, busy=lambda: busy[0])
        live.start()
        await until_true(lambda: live.canary)
        await traffic.answered(work_of(say_snapshot), exchange_of())
        assert (traffic.counts["dropped"], len(traffic._shadows)) == (1, 0)
        busy[0] = False
        await traffic.answered(work_of(say_snapshot), exchange_of())
        await until_true(lambda: traffic.counts["shadowed"] == 1)
        await live.stop()

    asyncio.run(run())


def test_shadows_are_ended_at_shutdown(two, tmp_path):
    """A service that stops does not wait for shadows, and closes the canary they used."""
    store, _, second = two
    opened = []

    async def hang_on_canary(serving, exchange):
        if serving.snapshot_id == second.snapshot_id:
            opened.append(serving.snapshot)
            await asyncio.Event().wait()

    async def check(traffic, live) -> None:
        await traffic.answered(Work("query", "what?", hang_on_canary, lambda _: Account()), exchange_of())
        await until_true(lambda: opened)

    traffic_test(store, tmp_path, SHADOW, check)
    assert opened[0].closed


@pytest.mark.parametrize("settings", [Canary(mode="off", log_seconds=0.05), Canary(shadow_share=0.0, log_seconds=0.05)])
def test_no_traffic_when_it_is_switched_off(two, tmp_path, settings):
    """Mode off, or a share of 0, asks the canary nothing; requests are logged all the same."""
    store, first, _ = two

    async def check(traffic, live) -> None:
        assert await traffic.answered(work_of(say_snapshot), exchange_of()) == first.snapshot_id
        assert not traffic._shadows

    assert [row["arm"] for row in traffic_test(store, tmp_path, settings, check)] == ["champion"]


def test_a_staged_canary_is_shadowed_first(two, tmp_path):
    """It answers nobody until so many of its shadow answers came out; then it answers its share."""
    store, first, second = two
    settings = Canary(mode="staged", share=1.0, min_requests=20, log_seconds=0.05)

    async def check(traffic, live) -> None:
        for number in range(20):
            assert await traffic.answered(work_of(say_snapshot), exchange_of(number)) == first.snapshot_id
            await until_true(lambda: not traffic._shadows)
        assert await traffic.answered(work_of(say_snapshot), exchange_of(20)) == second.snapshot_id
        assert traffic.counts["shadowed"] == 20

    arms = [row["arm"] for row in traffic_test(store, tmp_path, settings, check)]
    assert (arms.count("champion"), arms.count("shadow"), arms.count("canary")) == (20, 20, 1)


@pytest.mark.parametrize("kept", [True, False])
def test_words_are_logged_where_that_was_chosen(two, tmp_path, kept):
    """With `log_text` the rows of both arms have the words of the query and the ids of documents; without it neither is there."""
    store, first, second = two

    async def check(traffic, live) -> None:
        await traffic.answered(work_of(say_snapshot), exchange_of())
        await until_true(lambda: traffic.counts["shadowed"] == 1)

    rows = traffic_test(store, tmp_path, SHADOW.model_copy(update={"log_text": kept}), check)
    assert [row.get("query") for row in rows] == ["what?" if kept else None] * 2
    assert ([row["doc_ids"] for row in rows] == [[first.snapshot_id], [second.snapshot_id]]) is kept


def test_an_error_of_both_speaks_against_neither(two, tmp_path):
    """What the champion raises reaches who asked and is logged with its code; the canary meets the same request, so that both may fail alike."""
    store, *_ = two

    async def fail(serving, exchange):
        with exchange.phase("encode"):
            raise ValueError("wrong")

    async def check(traffic, live) -> None:
        with pytest.raises(ValueError, match="wrong"):
            await traffic.answered(work_of(fail), exchange_of())
        await until_true(lambda: not traffic._shadows)

    rows = traffic_test(store, tmp_path, SHADOW, check)
    assert [(row["arm"], row["outcome"], row["code"], row["documents"]) for row in rows] == [
        ("champion", "error", "internal", None),
        ("shadow", "error", "internal", None),
    ]


def test_a_champion_whose_files_go_under_a_request(two, tmp_path):
    """A request that finds the live snapshot's files gone is answered by the release before it, in the same call, with nothing of the first try."""
    store, first, second = two
    promote(store, second.snapshot_id, gate=Gate(), actor="tester", reason="good", override=True)

    async def take_away(serving, exchange):
        with exchange.phase("encode"):
            if serving.snapshot_id == second.snapshot_id:
                exchange.degrade("text_index")
                store.folder(snapshot_key(second.snapshot_id)).rename(tmp_path / "away")
                raise RuntimeError("Not found")
        return serving.snapshot_id

    async def run() -> None:
        live = Live(store, settings_for(tmp_path))
        traffic = Traffic(live, ObservationLog(store, SHADOW), SHADOW)
        live.start()
        await until_true(lambda: live.serving and live.manifest(first.snapshot_id))
        exchange = exchange_of()
        assert await traffic.answered(work_of(take_away), exchange) == first.snapshot_id
        assert exchange.degraded == []
        assert live.serving.number == 1
        await live.stop()

    asyncio.run(run())


def test_a_damaged_canary_is_never_opened(two, tmp_path, caplog):
    """A canary with a missing file gets no traffic, the champion answers, the problem is kept, and it is opened once it is whole."""
    store, first, second = two
    folder = store.folder(snapshot_key(second.snapshot_id))
    folder.rename(tmp_path / "away")

    async def run() -> None:
        live = Live(store, settings_of(tmp_path, SPLIT))
        traffic = Traffic(live, ObservationLog(store, SPLIT), SPLIT)
        live.start()
        await until_true(lambda: live.canary_problem)
        assert second.snapshot_id in live.canary_problem.detail
        assert (live.problem, live.canary, live.serving.snapshot_id) == (None, None, first.snapshot_id)
        assert await traffic.answered(work_of(say_snapshot), exchange_of()) == first.snapshot_id
        (tmp_path / "away").rename(folder)
        await until_true(lambda: live.canary)
        assert live.canary_problem is None
        assert await traffic.answered(work_of(say_snapshot), exchange_of()) == second.snapshot_id
        await live.stop()

    asyncio.run(run())
    assert "answers alone" in caplog.text


def test_a_promoted_canary_is_already_open(two, tmp_path):
    """The promotion of the canary swaps to the snapshot that is open; then nothing is a canary, and the former champion stays open."""
    store, first, second = two

    async def check(traffic, live) -> None:
        opened = live.canary.snapshot
        assert promote(store, second.snapshot_id, gate=Gate(), actor="tester", reason="good", override=True)
        await until_true(lambda: live.serving.number == 3)
        assert live.serving.snapshot is opened
        assert live.canary is None
        assert live.manifest(first.snapshot_id)

    traffic_test(store, tmp_path, SHADOW, check)


def test_a_new_canary_replaces_one_that_ended(two, tmp_path):
    """After an abort the canary closes, and the next one named is opened under its own entry."""
    store, _, _ = two
    third = build(store, settings_for(tmp_path), {"a": ("A", "Another page.")})

    async def check(traffic, live) -> None:
        former = live.canary.snapshot
        abort(store, actor="tester", reason="enough")
        await until_true(lambda: live.canary is None and former.closed)
        name_canary(store, third)
        await until_true(lambda: live.canary)
        assert (live.canary.snapshot_id, live.canary.canary, live.canary.number) == (third.snapshot_id, 4, 1)

    traffic_test(store, tmp_path, SHADOW, check)


def test_feedback_is_a_row_of_the_arm_that_answered(two, tmp_path):
    """A thumb for an answer of the canary or of the champion is logged under that snapshot; one for neither is not compared."""
    store, first, second = two
    asked = "how to stop?"
    with serving(settings_of(tmp_path, SHADOW), store) as client:
        until(client, "/v1/release", holds=lambda reply: reply.json()["number"] == 2)
        deadline = time.monotonic() + 20
        while not any(row["arm"] == "canary" for row in rows_of(store)):
            for number, (snapshot_id, verdict) in enumerate(
                [(second.snapshot_id, "down"), (first.snapshot_id, "up"), ("other-1234", "up")]
            ):
                said = {"query": f"{asked} {number}", "verdict": verdict, "snapshot_id": snapshot_id, "trace_id": "a" * 32}
                assert client.post("/v1/feedback", json=said).status_code == 202
            assert time.monotonic() < deadline
    found = {(row["kind"], row["arm"], row["snapshot_id"], row["verdict"], row["trace_id"]) for row in rows_of(store)}
    assert found == {
        ("feedback", "canary", second.snapshot_id, "down", "a" * 32),
        ("feedback", "champion", first.snapshot_id, "up", "a" * 32),
    }
