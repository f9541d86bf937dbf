"""What was measured is what is served: the eval set asked over HTTP of a real serving process and a real embedding process.

The bytes searched are the same. Query vectors may differ in the last bits, as a model in bfloat16 rounds by batch: lower ranks may swap.
"""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from conftest import ROOT, command, environment, facts

from evals.collections import split_of
from evals.metrics import document_ranking, score_rankings, summarise
from evals.sample import load_sample
from rag_assets.evaluation import read_evaluation, read_rows
from rag_serving.store import LocalStore

pytestmark = pytest.mark.timeout(900)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def processes(home: Path, ports: dict[str, str]) -> Iterator[None]:
    """`ragline embedder` and `ragline serve` as processes of their own."""
    started = [
        subprocess.Popen(command(name), cwd=ROOT, env=environment(home, **ports), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("embedder", "serve")
    ]
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            assert process.wait(timeout=30) in {0, -15}


def wait_for(client: httpx2.Client, url: str, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if client.get(url).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        assert time.monotonic() < deadline, url
        time.sleep(0.2)


def test_the_served_ranking_is_the_measured_one_and_the_server_follows_a_rollback(ragline, released):
    """Held-out queries over HTTP rank documents as the stored evaluation says; a promotion and a rollback are followed without restart."""
    ports = {"RAGLINE_SERVING_PORT": str(free_port()), "RAGLINE_EMBEDDER_PORT": str(free_port())}
    base, embedder = (f"http://127.0.0.1:{port}" for port in ports.values())
    champion = facts(ragline(released, "status", "--json"))["champion"]
    eval_set = load_sample("small")
    with processes(released, ports), httpx2.Client(trust_env=False, timeout=30) as client:
        wait_for(client, f"{base}/readyz")
        wait_for(client, f"{embedder}/readyz")
        rankings = {}
        for query in eval_set.half("heldout").queries:
            reply = client.post(f"{base}/v1/retrieve", json={"query": query.text, "top_k": 50}).json()
            assert reply["snapshot_id"] == champion["snapshot_id"]
            assert reply["degraded"] == []
            rankings[query.query_id] = document_ranking((hit["chunk_id"], hit["doc_id"], hit["score"]) for hit in reply["hits"])
        served = score_rankings({query_id: eval_set.qrels[query_id] for query_id in rankings}, rankings)

        store = LocalStore(released / "store")
        manifest_sha256 = json.loads((released / "store" / "releases" / "000001.json").read_text(encoding="utf-8"))["manifest_sha256"]
        evaluation = read_evaluation(store, manifest_sha256, eval_set.sha256)
        measured = {row["query_id"]: row["retrieved"] for row in read_rows(store, evaluation) if split_of(row["query_id"]) == "heldout"}
        first = sum(list(row.retrieved[:1]) == measured[row.query_id][:1] for row in served) / len(served)
        whole = sum(list(row.retrieved) == measured[row.query_id] for row in served) / len(served)
        mrr = summarise(served, k=10)["mrr_at_10"]
        print(
            f"of {len(served)} served rankings {first:.1%} agree with the measured ones at rank 1, {whole:.1%} to rank 10; MRR@10 {mrr:.4f}"
        )
        assert len(measured) == len(served)
        assert first >= 0.99
        assert mrr == pytest.approx(champion["metrics"]["mrr_at_10_heldout"], abs=0.005)

        question = {"query": eval_set.queries[0].text}
        answer = client.post(f"{base}/v1/query", json=question).json()
        assert answer["citations"]
        forced = facts(ragline(released, "promote", "wordllama-256", "--override", "--reason", "follow me", "--json", **ports))
        assert forced["server_followed_seconds"] is not None
        assert client.post(f"{base}/v1/query", json=question).json()["embedding_model"] == "wordllama-256"
        back = facts(ragline(released, "rollback", "--json", **ports))
        print(f"rollback took {back['seconds']} s, the server followed after {back['server_followed_seconds']} s")
        assert back["seconds"] + back["server_followed_seconds"] < 2
        assert client.post(f"{base}/v1/query", json=question).json()["snapshot_id"] == champion["snapshot_id"]
