"""Reranking: three judges behind one rule and one budget, over real sockets, and the fused order whenever one of them fails."""

import asyncio
import json
import warnings
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from live_server import running
from pydantic import ValidationError
from small_line import MODEL, SPEC, build, chunk_table, passages, recipe_of, vectors_of
from small_service import embedding, release, serving
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from rag_assets.indexing import build_snapshot
from rag_assets.local_reranking import local_reranker, rerank_rule
from rag_serving.breaker import Breaker
from rag_serving.deadline import Deadline
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import EncoderError, EncoderUnavailable, ModelError, ModelMismatch, RerankError
from rag_serving.exchange import Exchange
from rag_serving.ranking.cross_encoder import CrossEncoder
from rag_serving.ranking.diversity import Diverse, diverse_order
from rag_serving.ranking.maxsim import maxsim, packed, unit_rows
from rag_serving.ranking.rerank_endpoint import RerankEndpoint
from rag_serving.ranking.rerankers import served_reranker
from rag_serving.ranking.token_client import RemoteTokens
from rag_serving.reranking import Judged, reordered, rerank_within
from rag_serving.retrieval import Hit, Retriever
from rag_serving.settings import Places, Rerank, RerankWeights, Serving, Settings
from rag_serving.signals import trace
from rag_serving.store import LocalStore
from rag_serving.tcp_faults import Fault, TcpFaults

ALONE = RerankWeights(fused=0.0, relevance=1.0)
TEXTS = passages(40)


def hits_of(count: int) -> list[Hit]:
    """Hits in fused order, scores 1, 1/2, 1/3, ..."""
    return [Hit(f"c{at}", f"d{at}", "u", f"title {at}", "", TEXTS[at], 0, 9, 1 / (at + 1), {"dense_text": 0.1 * at}) for at in range(count)]


def ids(hits):
    return [hit.chunk_id for hit in hits]


class Scores:
    """A judge that gives these scores, after `seconds`."""

    kind = "by hand"

    def __init__(self, scores, *, seconds: float = 0.0) -> None:
        self.scores, self._seconds = scores, seconds
        self.asked = 0

    async def relevance(self, query, texts, *, deadline):
        self.asked += 1
        await asyncio.sleep(self._seconds)
        return np.asarray(self.scores[: len(texts)], dtype=np.float64)

    async def aclose(self) -> None:
        pass


def judged(judge, *, pool: int = 50, weights: RerankWeights = ALONE) -> Judged:
    return Judged(judge, pool=pool, weights=weights, distinctness=1.0)


def rerank(reranker, hits, *, k: int, seconds: float = 30.0):
    return asyncio.run(reranker.rerank("a question", hits, k=k, deadline=Deadline.after(seconds)))


def exchange(seconds: float = 30.0) -> Exchange:
    return Exchange("0" * 32, trace.tracer(trace.provider()), Deadline.after(seconds))


def test_maxsim_is_the_mean_of_best_cosines():
    """For passages of any length the score is the mean over query tokens of the best cosine, as computed one by one."""
    rng = np.random.default_rng(1)
    query, *passage_tokens = (unit_rows(rng.normal(size=(n, 24)).astype(np.float32)) for n in (5, 1, 9, 3, 30))
    by_hand = [np.mean([max(float(token @ other) for other in tokens) for token in query]) for tokens in passage_tokens]
    assert maxsim(query, passage_tokens) == pytest.approx(by_hand, abs=1e-6)


def test_packing_rounds_by_half_a_step_at_most():
    """Packed vectors come back within half a scale, whatever their size; zeros stay zeros."""
    rows = np.vstack([np.random.default_rng(2).normal(size=(50, 16)) * 10.0 ** np.arange(-3, 2).repeat(10)[:, None], np.zeros(16)])
    integers, scales = packed(rows.astype(np.float32))
    assert integers.dtype == np.int8
    assert (np.abs(integers * scales[:, None] - rows) <= scales[:, None] * 0.5001).all()


def test_the_score_is_the_weighted_sum():
    """Fused score, relevance and single signals add up by their weights, BM25 by a twentieth and title signals by distinctness."""
    hit = replace(hits_of(1)[0], score=2.0, signals={"dense_text": 0.5, "bm25_text": 10.0, "bm25_title": 20.0, "wording": 0.1})
    weights = RerankWeights(fused=2.0, relevance=3.0, dense_text=-1.0, bm25_text=4.0, bm25_title=5.0, wording=6.0)
    (scored,) = reordered([hit], [0.7], weights=weights, distinctness=0.5)
    assert scored.score == pytest.approx(2 * 2.0 + 3 * 0.7 - 0.5 + 4 * 0.5 + 5 * 1.0 * 0.5 + 6 * 0.1)
    assert scored.signals == {**hit.signals, "relevance": 0.7, "rank_before": 1.0}


def test_only_the_pool_is_ordered_anew():
    """The pool is sorted by its new score and stays above the rest; equal scores keep the fused order; the rank before is told."""
    found = rerank(judged(Scores([0.1, 0.9, 0.1, 0.5]), pool=4), hits_of(6), k=5)
    assert ids(found) == ["c1", "c3", "c0", "c2", "c4"]
    assert [hit.signals.get("rank_before") for hit in found] == [2, 4, 1, 3, None]


def test_nothing_found_stays_nothing():
    """No hits are no work for a reranker."""
    assert rerank(judged(Scores([])), [], k=5) == []


@pytest.mark.parametrize(
    "judge",
    [
        Scores([np.nan] * 9),
        Scores([1.0]),
        Scores([0.5] * 9, seconds=30),
        RerankEndpoint(""),
        RerankEndpoint("http://127.0.0.1:9/v1/rerank"),
    ],
    ids=["NaN", "too few scores", "too slow", "no endpoint named", "endpoint down"],
)
def test_a_failing_judge_leaves_the_fused_order(judge):
    """Whatever is wrong with a judge, the request goes on in fused order and says that it did without."""
    asked = exchange()
    found = asyncio.run(rerank_within(judged(judge), "q", hits_of(6), k=4, exchange=asked, budget_seconds=0.1, breaker=Breaker()))
    assert (ids(found), asked.degraded) == (["c0", "c1", "c2", "c3"], ["rerank"])


def test_a_working_judge_degrades_nothing():
    """Within the budget the reranked hits come back and nothing is marked."""
    asked = exchange()
    found = asyncio.run(
        rerank_within(judged(Scores([0, 0, 1, 0])), "q", hits_of(4), k=2, exchange=asked, budget_seconds=30, breaker=Breaker())
    )
    assert (ids(found), asked.degraded) == (["c2", "c0"], [])


def test_the_budget_never_passes_the_deadline():
    """A request that has less time left than the budget waits for no more than that."""
    asked, breaker = exchange(seconds=0.05), Breaker(failures=1)
    slow = judged(Scores([1.0] * 9, seconds=20))
    asyncio.run(rerank_within(slow, "q", hits_of(3), k=3, exchange=asked, budget_seconds=1000, breaker=breaker))
    assert asked.degraded == ["rerank"]
    assert breaker.state == "closed"  # it had less time than it may take


def test_a_failing_judge_is_left_alone_for_a_while():
    """After as many failures as the breaker allows it is not asked; after the pause one request tries, and then all have it again."""
    moment, judge = [0.0], Scores([np.nan] * 4)
    subject, breaker = judged(judge), Breaker(failures=2, open_seconds=5, clock=lambda: moment[0])

    def degraded() -> list[str]:
        asked = exchange()
        found = asyncio.run(rerank_within(subject, "q", hits_of(4), k=4, exchange=asked, budget_seconds=1, breaker=breaker))
        assert len(found) == 4
        return asked.degraded

    assert [degraded() for _ in range(4)] == [["rerank"]] * 4
    assert judge.asked == 2
    judge.scores = [0.0, 0.0, 1.0, 0.0]
    assert degraded() == ["rerank"]
    moment[0] = 5.0
    assert [degraded() for _ in range(2)] == [[], []]
    assert judge.asked == 4


# --- endpoints -----------------------------------------------------------------------------------------------------------------------------


class Endpoint:
    """A real rerank server: longer passages are better, or whatever `reply` says."""

    def __init__(self, reply=None, *, status: int = 200) -> None:
        self.asked: list[dict] = []
        self.keys: list[str] = []

        async def versioned(request) -> Response:
            body = json.loads(await request.body())
            self.asked.append(body)
            self.keys.append(request.headers.get("authorization", ""))
            results = [{"index": at, "relevance_score": len(text) / 100} for at, text in enumerate(body["documents"])]
            return written({"id": "x", "results": sorted(results, key=lambda each: -each["relevance_score"]), "meta": {}})

        async def plain(request) -> Response:
            body = json.loads(await request.body())
            self.asked.append(body)
            return written([{"index": at, "score": len(text) / 100} for at, text in enumerate(body["texts"])])

        def written(answer) -> Response:
            data = json.dumps(answer if reply is None else reply) if not isinstance(reply, bytes) else reply
            return Response(data, status_code=status, media_type="application/json")

        self.app = Starlette(routes=[Route("/v1/rerank", versioned, methods=["POST"]), Route("/rerank", plain, methods=["POST"])])


def ask(endpoint: RerankEndpoint, texts, *, seconds: float = 20.0):
    async def run():
        try:
            return await endpoint.relevance("q", texts, deadline=Deadline.after(seconds))
        finally:
            await endpoint.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"], ids=["Cohere and Jina", "Text Embeddings Inference"])
def test_either_shape_of_endpoint(path):
    """Scores come back by passage, in the order asked, from both shapes; model and key are sent where they have a place."""
    server, texts = Endpoint(), ["bb", "dddd", "a"]
    with running(server.app) as url:
        scores = ask(RerankEndpoint(url + path, model="m", key="secret"), texts)
    assert scores.tolist() == [0.02, 0.04, 0.01]
    if path.startswith("/v1"):
        assert server.asked == [{"query": "q", "documents": texts, "top_n": 3, "return_documents": False, "model": "m"}]
        assert server.keys == ["Bearer secret"]
    else:
        assert server.asked == [{"query": "q", "texts": texts}]


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [
        ({"results": [{"index": 0, "relevance_score": 1.0}]}, 200, "1 scores for 2"),
        ({"results": [{"index": 0, "relevance_score": 1.0}] * 2}, 200, "2 scores for 2"),
        ({"results": [{"index": 0, "relevance_score": 1}, {"index": 7, "relevance_score": 1}]}, 200, "2 scores for 2"),
        ({"results": [{"index": 0}]}, 200, "no usable reply"),
        ({"message": "no"}, 200, "no usable reply"),
        (b"<html>", 200, "no usable reply"),
        (b" " * 200_000, 200, "more than"),
        ({"message": "slow down"}, 429, "answered 429"),
        ({"message": "broken"}, 500, "answered 500"),
    ],
)
def test_an_unusable_reply_is_an_error(reply, status, says):
    """A reply that does not give exactly one score to each passage is a RerankError that says what came."""
    with running(Endpoint(reply, status=status).app) as url, pytest.raises(RerankError, match=says):
        ask(RerankEndpoint(url + "/v1/rerank"), ["one", "two"])


def test_an_endpoint_has_until_the_deadline():
    """An endpoint that does not answer is given up at the deadline."""

    async def never(request) -> Response:
        await asyncio.sleep(0.5)
        return Response()

    app = Starlette(routes=[Route("/v1/rerank", never, methods=["POST"])])
    with running(app) as url, pytest.raises(RerankError, match="in time"):
        ask(RerankEndpoint(url + "/v1/rerank"), ["one"], seconds=0.05)


# --- cross-encoders ------------------------------------------------------------------------------------------------------------------------


def save_cross_encoder(folder: Path, *, labels: int = 1, seed: int = 0) -> Path:
    """A tiny cross-encoder with random weights, as sentence-transformers saves one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **marks).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=labels,
        max_position_embeddings=64, initializer_range=1.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("models") / "tiny")


def scores_of(model: CrossEncoder, query, texts):
    return asyncio.run(model.relevance(query, texts, deadline=Deadline.after(60)))


def test_a_cross_encoder_is_the_model_in_the_folder(cross_encoder, tmp_path):
    """Scores are what sentence-transformers predicts for the pairs, 0 to 1, and the fingerprint follows the weights."""
    from sentence_transformers import CrossEncoder as Model

    model = CrossEncoder.load(f"path:{cross_encoder}", tmp_path)
    scores = scores_of(model, "topic3 and word10", TEXTS[:7])
    peer = Model(str(cross_encoder), device="cpu").predict([("topic3 and word10", text) for text in TEXTS[:7]], show_progress_bar=False)
    assert scores == pytest.approx(peer, abs=1e-5)
    assert ((scores > 0) & (scores < 1)).all()
    assert len(np.unique(scores.round(6))) > 1
    other = CrossEncoder.load(f"path:{save_cross_encoder(tmp_path / 'other', seed=1)}", tmp_path)
    assert model.fingerprint != other.fingerprint
    assert model.fingerprint == CrossEncoder.load(f"path:{cross_encoder}", tmp_path).fingerprint


def test_a_cross_encoder_with_several_outputs_is_refused(tmp_path):
    """A classifier of two classes is no reranker; a folder without a model is none either."""
    with pytest.raises(ModelError, match="2 outputs"):
        CrossEncoder.load(f"path:{save_cross_encoder(tmp_path / 'two', labels=2)}", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty holds n"):
        CrossEncoder.load(f"path:{tmp_path / 'empty'}", tmp_path)


def test_expired_work_is_not_begun(cross_encoder, tmp_path):
    """A cross-encoder computes nothing for a request whose time is over."""
    model = CrossEncoder.load(f"path:{cross_encoder}", tmp_path)
    with pytest.raises(RerankError, match="ended before"):
        asyncio.run(model.relevance("q", ["a"], deadline=Deadline.after(0)))


# --- the embedding service -----------------------------------------------------------------------------------------------------------------


def settings_of(root: Path, rule: Rerank, **places) -> Settings:
    quick = Serving(poll_seconds=0.1, encode_timeout_seconds=10.0, deadline_seconds=60.0)
    return Settings(root=root, models=(SPEC,), serving=quick, rerank=rule.model_copy(update={"budget_ms": 9000.0}), places=Places(**places))


@pytest.fixture(scope="module")
def service(tmp_path_factory, cross_encoder):
    """The embedding service with the hashed model and the tiny cross-encoder."""
    rule = Rerank(method="cross_encoder", model=f"path:{cross_encoder}")
    with embedding(settings_of(tmp_path_factory.mktemp("service"), rule)) as url:
        yield url


def tokens_from(url: str, queries, *, fingerprint: str = MODEL.fingerprint, seconds: float = 20.0):
    async def run():
        client = RemoteTokens(url, SPEC.name, fingerprint, dims=SPEC.dims)
        try:
            return await client.encode_tokens(queries, deadline=Deadline.after(seconds))
        finally:
            await client.aclose()

    return asyncio.run(run())


def test_token_vectors_over_http_are_the_models_own(service):
    """The service gives the same token vectors as the model in this process, for several queries and for one without words."""
    queries = ["topic3 and word10", "?!", "déjà vu"]
    for remote, local in zip(tokens_from(service, queries), MODEL.encode_tokens(queries, query=True), strict=True):
        assert remote.dtype == np.float32
        assert remote == pytest.approx(local, abs=1e-6)


def test_token_vectors_of_another_model_are_refused(service):
    """A reply under another fingerprint is never used."""
    with pytest.raises(ModelMismatch, match="fingerprint"):
        tokens_from(service, ["word1"], fingerprint="f" * 64)


def test_no_service_no_token_vectors():
    """A service that is down is EncoderUnavailable at once; one that gives something else is an EncoderError."""
    with pytest.raises(EncoderUnavailable, match="cannot be reached"):
        tokens_from("http://127.0.0.1:9", ["word1"])

    async def odd(request) -> Response:
        return Response(json.dumps({"data": [{"index": 0, "embedding": "AAAA"}], "fingerprint": MODEL.fingerprint}))

    with running(Starlette(routes=[Route("/v1/token_embeddings", odd, methods=["POST"])])) as url, pytest.raises(EncoderError):
        tokens_from(url, ["word1"])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/token_embeddings", {"model": "unknown", "input": ["a"]}, 404),
        ("/v1/token_embeddings", {"model": SPEC.name, "input": []}, 400),
        ("/v1/token_embeddings", {"model": SPEC.name, "input": [" "]}, 400),
        ("/v1/token_embeddings", {"model": SPEC.name, "input": ["a"] * 17}, 400),
        ("/v1/token_embeddings", [], 400),
        ("/v1/rerank", {"model": "unknown", "query": "q", "documents": ["a"]}, 404),
        ("/v1/rerank", {"query": "q", "documents": []}, 400),
        ("/v1/rerank", {"query": "q", "documents": ["a"] * 201}, 400),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, 400),
    ],
)
def test_what_the_service_refuses(service, path, body, status):
    """A request that cannot be served gets its status and a message in OpenAI's shape."""
    reply = httpx2.post(service + path, json=body, trust_env=False)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_the_cross_encoder_over_http_is_the_one_here(service, cross_encoder, tmp_path):
    """`/v1/rerank` of the embedding service, asked by the endpoint client, gives the scores that the pipeline measured with."""
    local = CrossEncoder.load(f"path:{cross_encoder}", tmp_path)
    remote = RerankEndpoint(service + "/v1/rerank", fingerprint=local.fingerprint)
    assert ask(remote, TEXTS[:9]) == pytest.approx(scores_of(local, "q", TEXTS[:9]), abs=1e-6)
    with pytest.raises(RerankError, match="another model"):
        ask(RerankEndpoint(service + "/v1/rerank", fingerprint="0" * 64), TEXTS[:2])


def test_best_first_and_no_more_than_asked(service):
    """`top_n` best results come back, best first, as other rerank services give them."""
    reply = httpx2.post(service + "/v1/rerank", json={"query": "q", "documents": TEXTS[:9], "top_n": 3}, trust_env=False).json()
    scores = [each["relevance_score"] for each in reply["results"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


# --- a served snapshot ---------------------------------------------------------------------------------------------------------------------


def build_ruled(store: LocalStore, settings: Settings):
    """A snapshot whose manifest has the rule of the settings."""
    chunks = chunk_table(TEXTS)
    recipe = replace(recipe_of(chunks), rerank=rerank_rule(settings, SPEC))
    late = (lambda texts: MODEL.encode_tokens(texts, query=False)) if recipe.late_interaction else None
    return asyncio.run(build_snapshot(store, recipe, chunks, *vectors_of(chunks), parent=None, tokens=late))[0]


def found_locally(store, settings, snapshot_id, query, *, k):
    async def run():
        retriever, encoder = await Retriever.open(store, snapshot_id), LocalEncoder(MODEL)
        reranker = local_reranker(store, settings, retriever, encoder)
        hits = await retriever.retrieve(query, MODEL.encode_queries([query])[0], k=reranker.pool)
        try:
            return await reranker.rerank(query, hits, k=k, deadline=Deadline.after(60))
        finally:
            retriever.close()
            await reranker.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("method", ["maxsim", "cross_encoder"])
def test_what_is_served_is_what_is_measured(method, service, cross_encoder, tmp_path):
    """A serving process gives the passages and scores that the pipeline's own reranker gives, and names nothing that it did without."""
    rule = Rerank(method=method, model=f"path:{cross_encoder}" if method == "cross_encoder" else "", pool=20, weights=ALONE, diversity=0.2)
    settings = settings_of(tmp_path, rule, embedder_url=service)
    store = LocalStore(tmp_path / "store")
    manifest = build_ruled(store, settings)
    release(store, manifest)
    with serving(settings, store) as client:
        reply = client.post("/v1/retrieve", json={"query": "topic3 and word10", "top_k": 8}).json()
    wanted = found_locally(store, settings, manifest.snapshot_id, "topic3 and word10", k=8)
    assert reply["degraded"] == []
    assert "rerank" in reply["timings_ms"]
    assert [hit["chunk_id"] for hit in reply["hits"]] == ids(wanted)
    assert [hit["score"] for hit in reply["hits"]] == pytest.approx([hit.score for hit in wanted], abs=1e-5)


def test_without_the_service_the_fused_order_is_served(service, tmp_path):
    """With token vectors out of reach a served snapshot still answers, in fused order, degraded."""
    settings = settings_of(tmp_path, Rerank(method="maxsim", weights=ALONE), embedder_url=service)
    store = LocalStore(tmp_path / "store")
    release(store, build_ruled(store, settings))
    plain = LocalStore(tmp_path / "plain")
    release(plain, build(plain, TEXTS)[0])
    ask_for = {"query": "topic3 and word10", "top_k": 8}
    gone = settings.model_copy(update={"places": Places(embedder_url="http://127.0.0.1:9")})
    with serving(gone, store) as client:
        degraded = client.post("/v1/retrieve", json=ask_for).json()
    with serving(gone, plain) as client:
        fused = client.post("/v1/retrieve", json=ask_for).json()
    assert set(degraded["degraded"]) == {"embedding", "rerank"}
    assert fused["degraded"] == ["embedding"]
    assert [hit["chunk_id"] for hit in degraded["hits"]] == [hit["chunk_id"] for hit in fused["hits"]]


def test_a_silent_service_is_waited_for_once(service, tmp_path):
    """A request whose query got no vector does not ask the same service for token vectors; nor does one with a known vector, once it rests."""
    store, known = LocalStore(tmp_path / "store"), "topic3 and word10"
    with TcpFaults(service) as faults:
        settings = settings_of(tmp_path, Rerank(method="maxsim", weights=ALONE), embedder_url=faults.url)
        release(store, build_ruled(store, settings))
        settings = settings.model_copy(update={"serving": settings.serving.model_copy(update={"encode_timeout_seconds": 0.3})})
        with serving(settings, store) as client:
            assert client.post("/v1/retrieve", json={"query": known}).json()["degraded"] == []
            faults.set(Fault("blackhole"))
            connections = faults.accepted
            replies = [client.post("/v1/retrieve", json={"query": f"word{number}"}).json() for number in range(5)]
            assert [reply["degraded"] for reply in replies] == [["embedding", "rerank"]] * 5
            replies = [client.post("/v1/retrieve", json={"query": query}).json() for query in (known, "word6")]
            assert [reply["degraded"] for reply in replies] == [["rerank"], ["embedding", "rerank"]]
            assert faults.accepted - connections <= 5


def test_a_snapshot_without_a_rule_has_no_reranker(line):
    """A snapshot that was built without reranking opens for serving without one."""
    store, (manifest, *_) = line

    async def opened():
        retriever = await Retriever.open(store, manifest.snapshot_id)
        retriever.close()
        return served_reranker(store, retriever, settings_of(Path(), Rerank(method="maxsim")))

    assert asyncio.run(opened()) is None


# --- diversity -----------------------------------------------------------------------------------------------------------------------------


def test_passages_that_say_the_same_step_back():
    """A near copy of the best passage is chosen after a different one that scored less; with no weight on difference it is not."""
    vectors = np.array([[1.0, 0.0, 0.0], [0.999, 0.04, 0.0], [0.0, 1.0, 0.0]], dtype=np.float32)
    assert diverse_order(vectors, [1.0, 0.9, 0.5], diversity=0.5) == [0, 2, 1]
    assert diverse_order(vectors, [1.0, 0.9, 0.5], diversity=0.0) == [0, 1, 2]
    assert diverse_order(vectors, [0.3, 0.3, 0.3], diversity=0.5)[0] == 0


def test_diversity_keeps_every_hit_and_its_score(line):
    """MMR over a snapshot's stored vectors orders the pool only: no hit is lost or rescored, and those behind the pool stay behind."""
    store, (manifest, *_) = line

    async def run():
        retriever = await Retriever.open(store, manifest.snapshot_id)
        hits = await retriever.retrieve("topic3", MODEL.encode_queries(["topic3"])[0], k=20)
        vectors = await retriever.vectors(hits)
        found = await Diverse(None, retriever, pool=10, diversity=0.7).rerank("topic3", hits, k=20, deadline=Deadline.after(30))
        retriever.close()
        return hits, vectors, found

    hits, vectors, found = asyncio.run(run())
    assert vectors == pytest.approx(MODEL.encode_documents([f"{hit.title}\n{hit.text}" for hit in hits]), abs=1e-6)
    assert {hit.chunk_id: hit.score for hit in found} == {hit.chunk_id: hit.score for hit in hits}
    assert ids(found)[0] == ids(hits)[0]
    assert ids(found)[10:] == ids(hits)[10:]
    assert ids(found) != ids(hits)


# --- configuration -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"method": "cross_encoder"}, {"method": "cross_encoder", "model": "x"}, {"pool": 1}, {"diversity": 1.0}])
def test_rules_that_cannot_work_are_refused(rule):
    """A cross-encoder without a model, a pool of one and nothing but difference are errors when ragline.toml is read."""
    with pytest.raises(ValidationError):
        Rerank(**rule)
