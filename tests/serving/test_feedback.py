"""Thumbs over HTTP: what a person says of an answer becomes a question that waits for a judgment, once."""

import json

import pytest
from small_service import build, embedding, release, serving, settings_for

from rag_serving.canary import Traffic
from rag_serving.edge import routes
from rag_serving.errors import QueryError, StoreError
from rag_serving.feedback import QUEUE, propose, settle, waiting_queries
from rag_serving.store import LocalStore


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A client of a service with a release, and its store."""
    root = tmp_path_factory.mktemp("feedback")
    store = LocalStore(root / "store")
    release(store, build(store, settings_for(root)))
    with embedding(settings_for(root)) as url, serving(settings_for(root, embedder_url=url), store) as client:
        yield client, store


def thumb(**fields):
    return {"query": "How do I delete a bucket?", "verdict": "down", "snapshot_id": "hashing-64-0123456789ab", "doc_ids": ["a"], **fields}


def test_a_thumb_waits_once(live):
    """The first thumb for a question is queued with its words, verdict and documents; the same question again is not."""
    client, store = live
    first, again = client.post("/v1/feedback", json=thumb()), client.post("/v1/feedback", json=thumb(query="how do I  DELETE a bucket?"))
    assert (first.status_code, first.json()["queued"], again.json()["queued"]) == (202, True, False)
    (waiting,) = waiting_queries(store)
    assert (waiting.query, waiting.origin, waiting.verdict, waiting.doc_ids) == ("How do I delete a bucket?", "feedback", "down", ("a",))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"verdict": "maybe"}, "invalid_field"),
        ({"query": " \t"}, "empty_query"),
        ({"query": "x" * 4001}, "query_too_long"),
        ({"query": "a\x00b"}, "invalid_characters"),
        ({"snapshot_id": "../../etc/passwd"}, "invalid_field"),
        ({"doc_ids": ["a"] * 51}, "invalid_field"),
        ({"comment": "x" * 1001}, "invalid_field"),
        ({"tenant": "b"}, "unknown_field"),
    ],
)
def test_wrong_feedback_is_refused(live, fields, code):
    """Unknown fields, wrong verdicts, no text or too much of it: a 422 with its code, and nothing is queued."""
    client, store = live
    before = store.names(QUEUE)
    reply = client.post("/v1/feedback", json=thumb(**fields))
    assert (reply.status_code, reply.json()["code"]) == (422, code)
    assert store.names(QUEUE) == before


def test_a_thumb_that_was_not_kept_is_not_counted(live, monkeypatch):
    """What could not be queued may be sent again under its key, and is one thumb for the canary's verdict then."""
    client, _ = live
    said = []
    monkeypatch.setattr(Traffic, "said", lambda _, verdict, **__: said.append(verdict))

    def send():
        return client.post("/v1/feedback", json=thumb(query="Which disk is full?"), headers={"Idempotency-Key": "full"}).status_code

    def full(*_, **__) -> None:
        raise StoreError("the disk is full.")

    with monkeypatch.context() as broken:
        broken.setattr(routes, "propose", full)
        assert send() == 500
    monkeypatch.setattr(routes, "propose", lambda *_, **__: True)
    assert [send(), send(), said] == [202, 202, ["down"]]


@pytest.mark.parametrize("field", ["query", "comment", "doc_ids"])
def test_half_a_character_is_no_text(live, field):
    """A lone surrogate in any field is a 422 that names it, not a fault of ours when it is written."""
    client, store = live
    before = store.names(QUEUE)
    body = json.dumps(thumb(**{"query": "another question", field: ["\ud800"] if field == "doc_ids" else "\ud800"}))
    reply = client.post("/v1/feedback", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_characters")
    assert field in reply.json()["detail"]
    assert store.names(QUEUE) == before


def test_what_is_settled_does_not_come_back(store):
    """A question that was judged is not queued again, by whomever it is asked."""
    assert propose(store, "What is it?", "log")
    (waiting,) = waiting_queries(store)
    settle(store, waiting, outcome="skipped", actor="me")
    settle(store, waiting, outcome="judged", actor="you")
    assert waiting_queries(store) == []
    assert not propose(store, "what is  it?", "feedback", verdict="down")
    assert json.loads(store.read(f"reviews/settled/{waiting.review_id}.json"))["outcome"] == "skipped"


def test_what_was_marked_down_comes_first(store):
    """Of waiting questions those marked not helpful are handed out first."""
    for query, verdict in (("one", ""), ("two", "up"), ("three", "down")):
        propose(store, query, "feedback", verdict=verdict)
    assert waiting_queries(store)[0].query == "three"


def test_a_full_queue_takes_no_more(store, monkeypatch):
    """Past the bound nothing is queued, so that a flood of thumbs cannot fill the disk; what was decided makes room."""
    monkeypatch.setattr("rag_serving.feedback.MOST_WAITING", 2)
    assert [propose(store, f"question {number}", "feedback") for number in range(4)] == [True, True, False, False]
    settle(store, waiting_queries(store)[0], outcome="judged", actor="me")
    assert propose(store, "question 4", "feedback")


def test_a_damaged_entry_is_named(store):
    """A queue file that cannot be read is a StoreError that names it; text that is none is refused before it is written."""
    store.write(f"{QUEUE}/bad.json", b"{")
    with pytest.raises(StoreError, match=r"bad\.json"):
        waiting_queries(store)
    with pytest.raises(QueryError):
        propose(store, "\ud800", "log")
