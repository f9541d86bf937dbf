"""The reranker of a snapshot as the pipeline measures with it: by the rule that serving follows, with models in this process."""

from collections.abc import Callable
from typing import Any

from rag_serving.embedding.weights import pull
from rag_serving.encoding import LocalEncoder
from rag_serving.errors import ConfigError, ModelError
from rag_serving.ranking.cross_encoder import CrossEncoder, folder_fingerprint
from rag_serving.ranking.rerankers import endpoint, late_interaction, ruled
from rag_serving.reranking import Judge, Reranker
from rag_serving.retrieval import Retriever
from rag_serving.settings import ModelSpec, Settings
from rag_serving.store import Store

Rerankers = Callable[[Retriever, LocalEncoder], Reranker | None]
"""Opens the reranker of an opened snapshot, whose queries the encoder encodes; who opens it closes it."""


def local_reranker(store: Store, settings: Settings, retriever: Retriever, encoder: LocalEncoder) -> Reranker | None:
    """None when the manifest names none. ModelError when its cross-encoder is not the one that can be loaded now."""
    manifest = retriever.manifest
    rule = manifest.reranking()
    if rule is None:
        return None
    judge: Judge | None = None
    if rule.method == "maxsim":
        judge = late_interaction(store, manifest, encoder)
    elif rule.method == "cross_encoder":
        model = CrossEncoder.load(rule.model, settings.models_dir)
        if model.fingerprint != manifest.rerank["fingerprint"]:
            raise ModelError(
                f"{rule.model} is not the cross-encoder of {manifest.snapshot_id}.", fix="Restore it, or build a new snapshot."
            )
        judge = model
    elif rule.method == "endpoint":
        if not settings.places.rerank_url:
            raise ConfigError("no rerank endpoint is named.", fix="Set RAGLINE_RERANK_URL to its whole address, ending in /rerank.")
        judge = endpoint(settings.places, rule)
    return ruled(retriever, rule, judge)


def rerank_rule(settings: Settings, spec: ModelSpec) -> dict[str, Any]:
    """What the manifest of a snapshot to be built says of reranking, before anything is stored for it; empty when nothing is reranked."""
    rule = settings.rerank
    if not rule.active:
        return {}
    weights = rule.weights
    if rule.method == "maxsim":  # its scores are cosines of the model, and spread as those do
        weights = weights.model_copy(update={"relevance": weights.relevance * spec.dense_scale})
    written = rule.model_copy(update={"weights": weights}).model_dump(exclude={"budget_ms"})
    if rule.method == "cross_encoder":
        return {"rule": written, "fingerprint": folder_fingerprint(pull(rule.model, settings.models_dir, progress=lambda _: None))}
    return {"rule": written}
