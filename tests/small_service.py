"""A small store with real snapshots, an embedding service and a serving process on real sockets, for the tests of serving."""

import asyncio
import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import httpx2
import pyarrow as pa
from live_server import running

from rag_assets.attributes import attributes_of, row_schema
from rag_assets.embedding import embed
from rag_assets.indexing import build_snapshot
from rag_assets.recipe import Recipe
from rag_serving import app, embedder
from rag_serving.edge.problems import PROBLEMS
from rag_serving.models import load_model
from rag_serving.passages import embedded_text
from rag_serving.promotion import promote
from rag_serving.releases import Action, Entry, Ledger
from rag_serving.settings import Gate, ModelSpec, Places, Rerank, Serving, Settings
from rag_serving.snapshots import Manifest
from rag_serving.store import LocalStore

SPEC = ModelSpec(name="hashing", source="hashing:64", dims=64, max_tokens=128)
PAGES = {
    "s3.DeleteBucket": (
        "Delete Bucket",
        "Deletes the bucket. All objects in the bucket must be deleted before the bucket itself can be deleted.",
    ),
    "s3.ListObjects": ("List Objects", "Returns some or all of the objects in a bucket. A request returns up to 1,000 objects."),
    "iam.CreateUser": (
        "Create User",
        "Creates a new user for the account.\n\n- The name must be unique.\n- For more information, see the guide.",
    ),
    "ec2.StopInstances": ("Stop Instances", "Stops a running instance. You can start it again at any time."),
    "kms.Encrypt": ("Encrypt", "Encrypts plaintext into ciphertext with a symmetric key."),
}


def settings_for(
    root: Path, *, embedder_url: str = "http://127.0.0.1:9", spec: ModelSpec = SPEC, encode_timeout_seconds: float = 10.0
) -> Settings:
    serving = Serving(poll_seconds=0.1, deadline_seconds=60, encode_timeout_seconds=encode_timeout_seconds)
    return Settings(root=root, models=(spec,), serving=serving, places=Places(embedder_url=embedder_url))


def build(
    store: LocalStore,
    settings: Settings,
    pages: Mapping[str, tuple[str, str]] = PAGES,
    *,
    rerank: Rerank | None = None,
    acl: Mapping[str, list[str]] = MappingProxyType({}),
) -> Manifest:
    """A snapshot of one chunk a page, with the vectors of the hashing model; the service of a page is its metadata, as far as declared."""
    model = load_model(settings.models[0], Path())
    rows = [
        {
            "chunk_id": hashlib.sha256(f"{doc_id}{text}".encode()).hexdigest()[:32],
            "doc_id": doc_id.partition("#")[0],  # d#1, d#2: chunks of one document
            "uri": f"https://docs.example/{doc_id}",
            "title": title,
            "heading_path": "",
            "text": text,
            "start": 0,
            "end": len(text),
            **attributes_of(acl.get(doc_id, []), {"service": doc_id.partition(".")[0]}, settings.index.filters),
        }
        for doc_id, (title, text) in pages.items()
    ]
    texts = embed(store, model, [embedded_text(row["title"], row["text"]) for row in rows]).vectors
    titles = embed(store, model, [row["title"] for row in rows]).vectors
    recipe = Recipe(
        model=settings.models[0],
        fingerprint=model.fingerprint,
        corpus_sha256=hashlib.sha256(repr(pages).encode()).hexdigest(),
        documents=len(rows),
        chunking={},
        index=settings.index,
        retrieval=settings.retrieval,
        rerank={"rule": rerank.model_dump()} if rerank else {},
    )
    manifest, _ = asyncio.run(
        build_snapshot(store, recipe, pa.Table.from_pylist(rows, schema=row_schema(settings.index.filters)), texts, titles, parent=None)
    )
    return manifest


def release(store: LocalStore, manifest: Manifest) -> Entry:
    entry = promote(store, manifest.snapshot_id, gate=Gate(), actor="tester", reason="for a test", override=True)
    assert entry
    return entry


def name_canary(store: LocalStore, manifest: Manifest) -> Entry:
    """The ledger entry of a canary, without the verdicts that `start_canary` asks for."""
    ledger = Ledger(store)
    state = ledger.state()
    named = {"snapshot_id": manifest.snapshot_id, "manifest_sha256": manifest.sha256}
    evidence = {"champion": state.champion.snapshot_id}
    return ledger.append(Action.CANARY, after=state.number, actor="tester", reason="to try it", evidence=evidence, **named)


@contextmanager
def embedding(settings: Settings) -> Iterator[str]:
    with running(embedder.create_app(settings, preload=[settings.models[0].name]), ready_path="/readyz") as url:
        yield url


@contextmanager
def serving(settings: Settings, store: LocalStore, *, ready: bool = True) -> Iterator[httpx2.Client]:
    """A client of a serving process over `store`."""
    with (
        running(app.create_app(settings, store=store), ready_path="/readyz" if ready else "/livez") as url,
        httpx2.Client(base_url=url, trust_env=False, timeout=20) as client,
    ):
        yield client


def until(client: httpx2.Client, path: str, *, holds, seconds: float = 5) -> float:
    """Ask until `holds(reply)`; the seconds it took."""
    started = time.perf_counter()
    while not holds(client.get(path)):
        assert time.perf_counter() - started < seconds, client.get(path).text
        time.sleep(0.01)
    return time.perf_counter() - started


def two_snapshots(root: Path) -> tuple[LocalStore, Manifest, Manifest]:
    """A store with two snapshots of the same pages in two editions; nothing is released."""
    store, settings = LocalStore(root), settings_for(root)
    return store, build(store, settings), build(store, settings, edition(2))


def edition(number: int) -> dict[str, tuple[str, str]]:
    return {doc_id: (title, f"{text} Edition {number}.") for doc_id, (title, text) in PAGES.items()}


def problem(reply: httpx2.Response) -> dict:
    """The body of a refusal, after what every refusal promises was checked."""
    body = reply.json()
    assert reply.headers["content-type"] == "application/problem+json"
    assert set(body) == {"type", "status", "title", "code", "detail", "fix", "trace_id"}
    assert (body["status"], body["title"]) == PROBLEMS[body["code"]]
    assert body["status"] == reply.status_code
    assert re.fullmatch(r"[0-9a-f]{32}", body["trace_id"])
    assert "Traceback" not in reply.text
    assert not re.search(r"(/[\w.-]+){2,}\.py|/tmp/", reply.text)
    return body
