"""The contract: what OpenAPI says is what the service does, whatever is sent; and docs/api.md shows it with commands that work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance
from small_service import embedding, problem, release, serving, settings_for, two_snapshots

from rag_serving.app import create_app
from rag_serving.edge.caller import SCOPES
from rag_serving.edge.keys import create_key
from rag_serving.edge.openapi import EXAMPLES
from rag_serving.edge.problems import PROBLEMS
from rag_serving.settings import Access, Settings
from rag_serving.store import LocalStore

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENT = create_app(Settings(root=Path("nowhere")), store=LocalStore(Path("nowhere"))).openapi()
OPERATIONS = [(path, method, operation) for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()]
REFUSED = ["400", "401", "403", "404", "405", "408", "409", "413", "415", "422", "429", "431", "5xx"]  # a wrong body may be too long first
SCHEMA = schemathesis.openapi.from_dict(
    json.loads(json.dumps(DOCUMENT)),
    config=SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": REFUSED}}}),
)
WORKING = {"/v1/retrieve", "/v1/query", "/v1/compare", "/v1/chat/completions"}
PROBES = {"/livez", "/readyz"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A client, with a key, of a service with a released snapshot and an embedding service; and its store."""
    root = tmp_path_factory.mktemp("contract")
    store, manifest, _ = two_snapshots(root)
    release(store, manifest)
    with embedding(settings_for(root)) as url:
        access = Access(poll_seconds=0.05, requests_per_minute=0, tokens_per_day=0)
        key, _ = create_key(store, "contract", scopes=SCOPES, actor="tester")
        with serving(settings_for(root, embedder_url=url).model_copy(update={"access": access}), store) as client:
            client.headers["Authorization"] = f"Bearer {key}"
            yield client, store


def validator(schema: dict) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for({**schema, "components": DOCUMENT["components"]})


def schema_of(operation: dict, status: int) -> dict:
    (content,) = (each for media, each in operation["responses"][str(status)]["content"].items() if media.endswith("json"))
    return content["schema"]


# what the document says


def test_every_reference_leads_somewhere():
    """Each $ref of the document points to a schema in it."""
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT)))
    assert references
    assert {each.removeprefix("#/components/schemas/") for each in references} <= set(DOCUMENT["components"]["schemas"])
    assert "$defs" not in json.dumps(DOCUMENT)


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS, ids=[path for path, *_ in OPERATIONS])
def test_every_route_is_described(path, method, operation):
    """Each route says what it does, asks for a key unless it is a probe, shows a request and a reply that fit, and its refusals by code."""
    assert operation["description"]
    assert ("security" in operation) == (path not in PROBES)
    (good,) = (status for status in operation["responses"] if status.startswith("2"))
    shown = operation["responses"][good]["content"]["application/json"]["example"]
    assert shown == EXAMPLES[path]
    validator(schema_of(operation, int(good))).validate(shown)
    if method == "post":
        body = operation["requestBody"]["content"]["application/json"]
        schema = DOCUMENT["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
        for asked in [body["example"]] if "example" in body else schema["examples"]:
            validator(schema).validate(asked)
    for status, refused in operation["responses"].items():
        if not status.startswith("2"):
            examples = refused["content"]["application/problem+json"]["examples"]
            assert examples
            assert all(PROBLEMS[code] == (int(status), each["value"]["title"]) for code, each in examples.items())
            assert ("Retry-After" in refused.get("headers", {})) == (status in ("429", "503"))


def test_every_code_is_documented():
    """Each code of a refusal stands in the document at some route, and in the guide's table with its status; the guide names no other."""
    text = json.dumps(DOCUMENT)
    assert [code for code in PROBLEMS if f'"{code}"' not in text and code not in ("not_found", "method_not_allowed")] == []
    told = {code: int(status) for status, code in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", GUIDE, re.MULTILINE)}
    assert told == {code: status for code, (status, _) in PROBLEMS.items()}


# what the service does


@pytest.mark.parametrize("path", sorted({path for path, *_ in OPERATIONS} - {"/v1/feedback"}))
def test_replies_fit_their_schemas(service, path):
    """A reply has the fields that the document gives it; of a route that works it names snapshot, what was done without, trace and times."""
    client, _ = service
    ((_, method, operation),) = (each for each in OPERATIONS if each[0] == path)
    asked = (
        {"query": "How do I delete a bucket?"} if "chat" not in path else {"messages": [{"role": "user", "content": "Delete a bucket?"}]}
    )
    reply = client.request(method, path, **({"json": asked} if method == "post" else {}))
    body = reply.json()
    assert reply.status_code == 200
    validator(schema_of(operation, 200)).validate(body)
    assert set(EXAMPLES[path]) == set(body)
    if path in WORKING:
        told = body.get("ragline", body.get("champion", body))
        assert {"snapshot_id", "release", "degraded", "trace_id", "timings_ms"} <= set(told)
        assert told["timings_ms"]


@pytest.mark.parametrize("path", sorted(WORKING))
def test_refusals_fit_their_schema(service, path):
    """A refusal is a problem document with the fields that the document gives it."""
    client, _ = service
    reply = client.post(path, content=b"{")
    assert reply.status_code == 415
    validator(DOCUMENT["components"]["schemas"]["Problem"]).validate(reply.json())
    if "chat" not in path:
        problem(reply)


def asks_anything(case: Case, client: httpx2.Client) -> None:
    """Send a case and hold the reply against the document: no 5xx, a documented status, type and body; what is wrong is refused."""
    with requests.Session() as session:
        session.trust_env = False
        case.call_and_validate(
            base_url=str(client.base_url),
            session=session,
            headers={"Authorization": client.headers["Authorization"]},
            excluded_checks=[positive_data_acceptance],  # a schema cannot say that a text must have something to read in it
        )


QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck)
)


@SCHEMA.parametrize()
@QUICK
def test_whatever_is_sent(case, service):
    """Requests made from the document, right and wrong ones: no server error, and nothing that the document does not say."""
    asks_anything(case, service[0])


@pytest.mark.heavy
@pytest.mark.timeout(900)
@SCHEMA.parametrize()
@settings(QUICK, max_examples=1000, derandomize=False)
def test_whatever_is_sent_for_long(case, service):
    """The same with a thousand requests a route, other ones at every run."""
    asks_anything(case, service[0])


# what the guide shows


def test_the_guide_works(service, tmp_path):
    """Every command of docs/api.md runs, in order, against a real service, and what it prints is JSON or the events that are told of."""
    client, store = service
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    script = "\n".join(["set -euo pipefail", 'ragline() { "$PYTHON" -m rag_assets "$@"; }', *blocks])
    script = script.replace("URL=http://127.0.0.1:8321", f"URL={str(client.base_url).rstrip('/')}")
    told = {"PYTHON": sys.executable, "RAGLINE_STORE": str(store.root), "PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_PROXY": "*"}
    done = subprocess.run(["bash", "-c", script], env=told, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    for field in ("snapshot_id", "citations", "queued", "event: done", "champion", "chat.completion"):
        assert field in done.stdout, field
