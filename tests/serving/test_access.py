"""Access lists and filters over a real socket: a caller finds, is answered from and sees cited what its groups may read, and nothing else."""

import re

import pytest
from small_service import build, embedding, problem, release, serving, settings_for

from rag_serving.edge.keys import create_key
from rag_serving.settings import Access, Index
from rag_serving.store import LocalStore

ASK = {"query": "how do I delete a bucket and its objects, or encrypt them?", "top_k": 10}
ACL = {"s3.DeleteBucket": ["storage"], "kms.Encrypt": ["keys", "storage"], "iam.CreateUser": ["nobody"]}
PUBLIC = {"s3.ListObjects", "ec2.StopInstances"}
READS = {"storage": PUBLIC | {"s3.DeleteBucket", "kms.Encrypt"}, "keys": PUBLIC | {"kms.Encrypt"}, "": PUBLIC, "*": PUBLIC}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A service without an embedder, and in `headers` what each caller sends."""
    root = tmp_path_factory.mktemp("access")
    update = {"index": Index(filters={"service": "text"}), "access": Access(burst_seconds=0)}  # the tests ask as quickly as they can
    settings = settings_for(root).model_copy(update=update)
    store = LocalStore(root / "store")
    release(store, build(store, settings, acl=ACL))
    headers_of = {
        group: {"Authorization": f"Bearer {create_key(store, f'k{at}', scopes=['query'], groups=groups, actor='tester')[0]}"}
        for at, (group, groups) in enumerate({"storage": ["storage"], "keys": ["keys"], "": [], "*": ["all"]}.items())
    }
    with serving(settings, store) as client:
        client.headers_of = headers_of
        yield client


def found(client, group: str, path: str = "/v1/retrieve", **changes) -> set[str]:
    reply = client.post(path, json=ASK | changes, headers=client.headers_of[group])
    assert reply.status_code == 200, reply.text
    body = reply.json()
    return {hit["doc_id"] for hit in [*body["hits"], *body.get("citations", [])]}


@pytest.mark.parametrize("path", ["/v1/retrieve", "/v1/query"])
@pytest.mark.parametrize("group", READS)
def test_callers_find_what_they_may_read(client, group, path):
    """Hits and citations are of documents that are public or of the caller's groups."""
    assert found(client, group, path) <= READS[group]
    assert found(client, group, path, query="bucket objects instance encrypt user account") == READS[group]


def test_filters_restrict_a_request(client):
    """A filter on metadata or ids holds for the request that has it, within what the caller may read."""
    asked = {"query": "bucket objects instance encrypt user account"}
    assert found(client, "storage", **asked, filter={"service": {"eq": "s3"}}) == {"s3.DeleteBucket", "s3.ListObjects"}
    assert found(client, "keys", **asked, filter={"service": {"eq": "s3"}}) == {"s3.ListObjects"}
    assert found(client, "keys", **asked, filter={"not": {"doc_id": {"prefix": "s3"}}}) == READS["keys"] - {"s3.ListObjects"}
    assert found(client, "keys", **asked, filter=None) == READS["keys"]


WRONG = [
    {"service": {"eq": 3}},
    {"acl": {"in": ["=nobody"]}},
    {"vector": {"eq": 1}},
    {"service": "s3' OR '1'='1"},
    "service = 's3'",
    {"or": [{"doc_id": {"eq": "x"}}] * 33},
    {"not": {"not": {"not": {"not": {"doc_id": {"eq": "x"}}}}}},
]


@pytest.mark.parametrize("asked", WRONG, ids=lambda asked: str(asked)[:40])
def test_wrong_filters_are_refused(client, asked):
    """What is no filter over allowed columns is 422 `invalid_filter`."""
    reply = client.post("/v1/retrieve", json=ASK | {"filter": asked}, headers=client.headers_of["storage"])
    refused = problem(reply)
    assert (refused["status"], refused["code"]) == (422, "invalid_filter")


@pytest.mark.parametrize("value", ["s3' OR '1'='1", "s3'; DROP TABLE chunks", "s3' -- ", "s3') OR (true", "\\' OR 1=1"])
def test_injections_find_nothing(client, value):
    """A value that would end a naive literal is looked for as it stands, and is nowhere."""
    for condition in ({"eq": value}, {"in": [value]}, {"prefix": value}):
        assert found(client, "storage", filter={"service": condition}) == set()


def test_what_one_caller_asked_is_no_answer_to_another(tmp_path):
    """Row 28: callers of other groups ask the same question, whose vector is known by then; each finds what it may read."""
    store, settings = LocalStore(tmp_path / "store"), settings_for(tmp_path)
    release(store, build(store, settings, acl=ACL))
    groups_of = {"storage": ["storage"], "keys": ["keys"], "": []}
    keys = {
        group: create_key(store, f"k{at}", scopes=["query", "read"], groups=groups, actor="tester")[0]
        for at, (group, groups) in enumerate(groups_of.items())
    }
    with embedding(settings) as url, serving(settings_for(tmp_path, embedder_url=url), store) as client:
        client.headers_of = {group: {"Authorization": f"Bearer {key}"} for group, key in keys.items()}
        for group in ("storage", "keys", "", "storage"):
            assert found(client, group, query="bucket objects instance encrypt user account") == READS[group]
        known = client.get("/metrics", headers=client.headers_of["storage"]).text
        assert re.search(r'^rag_embedding_cache_total\{result="hit"\} 3', known, re.MULTILINE), known


def test_no_address_shows_a_chunk(client):
    """Row 29: asked for by its id, a chunk of another's is a 404 like one that does not exist, as is one's own: there is no such address."""
    theirs = client.post("/v1/retrieve", json=ASK, headers=client.headers_of["storage"]).json()["hits"][0]["chunk_id"]
    for path in ("chunks", "v1/chunks"):
        for chunk_id in (theirs, "0" * len(theirs)):
            refused = problem(client.get(f"/{path}/{chunk_id}", headers=client.headers_of[""]))
            assert (refused["status"], refused["code"]) == (404, "not_found")
            assert chunk_id not in str(refused)
