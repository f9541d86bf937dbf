"""Whether anything found is on topic, by the threshold that was tuned for the snapshot."""

import json

import pytest

from rag_serving.retrieval import Hit
from rag_serving.store import LocalStore
from rag_serving.writing.relevance import SIGNAL, Relevance, threshold_key

SHA = "ab" * 32


def hit(score: float | None) -> Hit:
    return Hit("c", "d", "u", "", "", "text", 0, 4, 1.0, {} if score is None else {SIGNAL: score})


def tuned(store: LocalStore, value: object) -> Relevance:
    store.write(threshold_key(SHA), value if isinstance(value, bytes) else json.dumps(value).encode())
    relevance = Relevance(SHA)
    relevance.refresh(store)
    return relevance


def test_below_the_threshold_nothing_is_relevant(store):
    """Hits are refused when the best of them is below the threshold, and only then."""
    relevance = tuned(store, {"signal": SIGNAL, "threshold": 0.4})
    assert relevance.refuses([hit(0.3), hit(0.39)])
    assert not relevance.refuses([hit(0.3), hit(0.4)])


def test_what_says_nothing_refuses_nothing(store):
    """Without a threshold, without hits, and for hits found by words alone, nothing is refused."""
    assert not Relevance(SHA).refuses([hit(0.0)])
    relevance = tuned(store, {"signal": SIGNAL, "threshold": 0.4})
    assert not relevance.refuses([])
    assert not relevance.refuses([hit(None)])


@pytest.mark.parametrize(
    "value", [b"{", b"[]", {"signal": SIGNAL}, {"signal": SIGNAL, "threshold": "high"}, {"signal": "bm25", "threshold": 1}]
)
def test_a_damaged_threshold_refuses_nothing(store, value):
    """A threshold that is damaged or of another signal changes nothing, and no request fails of it."""
    assert tuned(store, value).threshold is None


def test_a_threshold_tuned_later_is_read(store, monkeypatch):
    """It is read again after a while, not on each look, and goes when it is removed."""
    relevance = Relevance(SHA)
    relevance.refresh(store)
    store.write(threshold_key(SHA), json.dumps({"signal": SIGNAL, "threshold": 0.4}).encode())
    relevance.refresh(store)
    assert relevance.threshold is None
    monkeypatch.setattr("rag_serving.writing.relevance._FRESH_SECONDS", 0.0)
    relevance.refresh(store)
    assert relevance.threshold == 0.4
    store.remove(threshold_key(SHA))
    relevance.refresh(store)
    assert relevance.threshold is None
