"""Questions whose topic the corpus leaves out are not answered: from the tuned threshold to the reply over HTTP."""

import json

import pytest
from generated_corpus import released, settings_for
from small_service import embedding, serving

from rag_assets.noanswer import tune_live
from rag_assets.workbench import Workbench
from rag_serving.settings import ModelSpec, Serving
from rag_serving.writing.extraction import NO_PASSAGES

TOPICS = {
    "garden": "soil seeds roses compost spade watering pruning hedge lawn tulips",
    "kitchen": "flour oven yeast butter saucepan whisk simmer garlic pepper dough",
    "harbour": "anchor rudder sails mooring tide captain lighthouse ferry deck keel",
}
LEFT_OUT = ["satellite", "thruster", "gravity", "telescope", "comet", "lander", "module", "perigee", "launch", "nebula"]
SPEC = ModelSpec(name="hashing-256", source="hashing:256", dims=256, max_tokens=256)
EACH = 20


def ask(topic: str, words: list[str], number: int) -> str:
    return f"which advice is there on {words[number % 10]} and {words[(number + 1) % 10]} of {topic} {number}"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A release over three topics, with an eval set on them; nothing in the corpus speaks of a fourth."""
    root = tmp_path_factory.mktemp("abstention")
    (root / "beir" / "qrels").mkdir(parents=True)
    corpus, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for topic, words in ((topic, words.split()) for topic, words in TOPICS.items()):
        for number in range(EACH):
            chosen = ", ".join(words[(number + step) % 10] for step in range(4))
            text = f"This page of the {topic} {number} gives advice on {chosen}. Nothing else is written there but these few words."
            corpus.append({"_id": f"{topic}.{number}", "title": f"{topic} {number}", "text": text})
            queries.append({"_id": f"{topic}-{number}", "text": ask(topic, words, number)})
            qrels.append(f"{topic}-{number}\t{topic}.{number}\t1")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (root / "beir" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "beir" / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")
    made = Workbench(settings_for(root, models=(SPEC,), serving=Serving(poll_seconds=0.1, encode_timeout_seconds=10)))
    released(made, SPEC.name)
    return made


def test_left_out_topics_are_not_answered(bench):
    """Once tuned, at least nine in ten questions on the topic that is not there are refused, and at most one in ten of the others."""
    found = tune_live(bench)
    with embedding(bench.settings) as url:
        places = bench.settings.places.model_copy(update={"embedder_url": url})
        with serving(bench.settings.model_copy(update={"places": places}), bench.store) as client:

            def refused(questions: list[str]) -> float:
                replies = [client.post("/v1/query", json={"query": question}).json() for question in questions]
                assert all(reply["degraded"] == [] for reply in replies)
                assert all((reply["confidence"] is None) == reply["abstained"] for reply in replies)
                assert all(reply["hits"] for reply in replies)
                return sum(reply["answer"] == NO_PASSAGES for reply in replies) / len(
                    replies
                )  # by the threshold, not for want of a sentence

            absent = refused([ask("orbit", LEFT_OUT, number) for number in range(EACH)])
            present = refused([ask(topic, words.split(), number) for topic, words in TOPICS.items() for number in range(EACH)])
    print(f"threshold {found.threshold:.3f}: {absent:.0%} of left-out questions refused, {present:.0%} of the others")
    assert absent >= 0.9
    assert present <= 0.1
