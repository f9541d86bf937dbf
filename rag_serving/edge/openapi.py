"""What the API's description says beyond the routes' own signatures: an example of each reply, and every schema under one roof."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from rag_serving.edge.problems import Problem

_SUMMARY = "Answers and passages out of a released, measured index; every reply names the snapshot that gave it."
_TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
_SNAPSHOT = {"snapshot_id": "all-minilm-l6-v2-3f1c2ab45d6e", "release": 7}
_PASSAGE = {
    "chunk_id": "e999e305d33be7b212c26f2fa133e6fd",
    "doc_id": "s3.DeleteBucket",
    "uri": "https://docs.example/s3.DeleteBucket",
    "title": "Delete Bucket",
    "start": 0,
    "end": 102,
}
_TEXT = "Deletes the bucket. All objects in the bucket must be deleted before the bucket itself can be deleted."
_QUOTE = "All objects in the bucket must be deleted before the bucket itself can be deleted."
_MADE = {"degraded": [], "trace_id": _TRACE_ID, "timings_ms": {"admit": 0.4, "encode": 6.1, "retrieve": 7.2}}
_RETRIEVED = {
    **_SNAPSHOT,
    "embedding_model": "all-MiniLM-L6-v2",
    "hits": [
        {
            **_PASSAGE,
            "heading_path": "",
            "text": _TEXT,
            "score": 2.43,
            "signals": {"dense_text": 0.51, "dense_title": 0.88, "bm25_text": 3.7, "bm25_title": 2.65, "wording": 0.9},
        }
    ],
    "guards": [],
    **_MADE,
}
_ANSWERED = {"abstained": False, "generated": False, "groundedness": 1.0, "confidence": "medium", "flags": [], "llm_problem": None}
_CITATIONS = [{"number": 1, **_PASSAGE}]
_ENTRY = {"number": 7, "action": "promote", "actor": "ann", "reason": "", "at": "2026-11-02T09:30:00+00:00"} | {
    "snapshot_id": _SNAPSHOT["snapshot_id"],
    "mrr": 0.897,
}

_QUERIED: dict[str, Any] = {
    **_RETRIEVED,
    "answer": f"{_QUOTE} [1]",
    "quotes": [{"number": 1, "text": _QUOTE}],
    "citations": _CITATIONS,
    **_ANSWERED,
    "usage": None,
}

EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/retrieve": _RETRIEVED,
    "/v1/query": _QUERIED,
    "/v1/compare": {"champion": _QUERIED, "canary": None},
    "/v1/chat/completions": {
        "id": f"chatcmpl-{_TRACE_ID}",
        "object": "chat.completion",
        "created": 1793610600,
        "model": "ragline",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"{_QUOTE} [1]", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 23, "total_tokens": 32},
        "citations": _CITATIONS,
        "ragline": {**_SNAPSHOT, **_ANSWERED, **_MADE},
    },
    "/v1/models": {"object": "list", "data": [{"id": "ragline", "object": "model", "created": 0, "owned_by": "ragline"}]},
    "/v1/feedback": {"queued": True, "trace_id": _TRACE_ID},
    "/v1/release": {
        "number": 7,
        "champion": {
            "number": 7,
            "snapshot_id": _SNAPSHOT["snapshot_id"],
            "manifest_sha256": "3f1c2ab45d6e" + "0" * 52,
            "embedding_model": "all-MiniLM-L6-v2",
            "documents": 3267,
            "rows": 3712,
            "summary": "PASS: MRR@10 0.897 over 1,344 queries",
            "metrics": {"mrr_floor": 0.897},
        },
        "previous": None,
        "holds": [],
        "open": {**_SNAPSHOT, "since": "2026-11-02T09:30:01.250+00:00", "fingerprint": "named"},
        "problem": None,
        "canary": None,
        "canary_problem": None,
        "history": [_ENTRY],
    },
    "/livez": {"status": "alive"},
    "/readyz": {"status": "ready", **_SNAPSHOT, "problem": None},
}

_THUMB = {"query": "How do I delete a bucket?", "verdict": "up", "snapshot_id": _SNAPSHOT["snapshot_id"], "doc_ids": ["s3.DeleteBucket"]}


def describe(app: FastAPI) -> None:
    """Have the app describe itself so: examples at every reply, schemas as components, made once when first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the way that FastAPI documents


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, summary=_SUMMARY, routes=app.routes)
    schemas = found["components"]["schemas"]
    schemas["Problem"] = Problem.model_json_schema()
    found["paths"]["/v1/feedback"]["post"]["requestBody"]["content"]["application/json"]["example"] = _THUMB
    for path, methods in found["paths"].items():
        for operation in methods.values():
            for body in (operation.get("requestBody", {}), *operation["responses"].values()):
                for content in body.get("content", {}).values():
                    if "schema" in content:
                        content["schema"] = _shared(content["schema"], schemas)
            if path in EXAMPLES:
                reply = next(operation["responses"][status] for status in ("200", "202") if status in operation["responses"])
                reply["content"]["application/json"]["example"] = EXAMPLES[path]
    return found


def _shared(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema, or a reference to it if it has a title, with it and all that it defines moved to `schemas`."""
    for name, definition in schema.pop("$defs", {}).items():
        schemas[name] = _pointed(definition)
    if "title" not in schema or "properties" not in schema:
        return _pointed(schema)
    schemas[schema["title"]] = _pointed(schema)
    return {"$ref": f"#/components/schemas/{schema['title']}"}


def _pointed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same with references into `$defs` pointing to the components."""
    moved: dict[str, Any] = json.loads(json.dumps(schema).replace('"#/$defs/', '"#/components/schemas/'))
    return moved
