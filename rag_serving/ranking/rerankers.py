"""The reranker that a snapshot's manifest asks for, put together for serving; the pipeline gives its own judge to the same rule."""

from rag_serving.ranking.diversity import Diverse
from rag_serving.ranking.maxsim import TokenVectors
from rag_serving.ranking.rerank_endpoint import RerankEndpoint
from rag_serving.ranking.token_client import RemoteTokens
from rag_serving.reranking import Judge, Judged, LateInteraction, Reranker, TokenEncoder
from rag_serving.retrieval import Retriever
from rag_serving.settings import Places, Rerank, Settings
from rag_serving.snapshots import Manifest, snapshot_key
from rag_serving.store import Store


def ruled(retriever: Retriever, rule: Rerank, judge: Judge | None) -> Reranker | None:
    """The reranker of a rule; None when it changes nothing."""
    judged = None
    if judge is not None:
        judged = Judged(judge, pool=rule.pool, weights=rule.weights, distinctness=retriever.manifest.title_distinctness)
    return Diverse(judged, retriever, pool=rule.pool, diversity=rule.diversity) if rule.diversity else judged


def late_interaction(store: Store, manifest: Manifest, encoder: TokenEncoder) -> Judge:
    """MaxSim over the token vectors of a verified snapshot. SnapshotError when it has none."""
    return LateInteraction(TokenVectors(store.folder(snapshot_key(manifest.snapshot_id))), encoder)


def endpoint(places: Places, rule: Rerank) -> Judge:
    """The endpoint that the environment names; without one, every use is a RerankError."""
    key = places.rerank_key.get_secret_value() if places.rerank_key else ""
    return RerankEndpoint(places.rerank_url or "", model=rule.model, key=key)


def served_reranker(store: Store, retriever: Retriever, settings: Settings) -> Reranker | None:
    """The reranker of an opened snapshot in a serving process, where models are asked for over HTTP; None when its manifest names none."""
    manifest = retriever.manifest
    rule = manifest.reranking()
    if rule is None:
        return None
    judge: Judge | None = None
    if rule.method == "maxsim":
        tokens = RemoteTokens(settings.embedder_url, manifest.embedding_model, manifest.fingerprint, dims=manifest.dims)
        judge = late_interaction(store, manifest, tokens)
    elif rule.method == "cross_encoder":
        url, fingerprint = f"{settings.embedder_url.rstrip('/')}/v1/rerank", manifest.rerank["fingerprint"]
        judge = RerankEndpoint(url, model=rule.model, kind=rule.method, fingerprint=fingerprint)
    elif rule.method == "endpoint":
        judge = endpoint(settings.places, rule)
    return ruled(retriever, rule, judge)
