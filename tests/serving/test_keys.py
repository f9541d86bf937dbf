"""API keys: made once, kept as digests, polled, and asked for at every route that works or tells."""

import asyncio
import dataclasses
import hashlib
import json
import logging
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from fastapi import Depends, FastAPI
from live_server import running
from small_service import release, serving, settings_for, two_snapshots, until
from typer.testing import CliRunner

from rag_assets.cli import app as cli
from rag_serving.app import serve
from rag_serving.edge.caller import SCOPES
from rag_serving.edge.entry import Door, doors
from rag_serving.edge.frame import Frame
from rag_serving.edge.keys import KEYS, PREFIX, REVOKED, Key, KeyRing, create_key, read_keys, require_keys, revoke_key
from rag_serving.edge.origins import Origins
from rag_serving.edge.routes import routes
from rag_serving.errors import AccessError, ConfigError, NotReady, StoreError
from rag_serving.seals import sealed
from rag_serving.settings import Access
from rag_serving.signals import trace
from rag_serving.store import LocalStore

ASK = {"query": "How do I delete a bucket?"}


def made(store, name="app", *, scopes=SCOPES, groups=()):
    return create_key(store, name, scopes=scopes, groups=groups, actor="tester")


def ring_of(store) -> KeyRing:
    ring = KeyRing(store, poll_seconds=1)
    ring.refresh()
    return ring


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_key_is_kept_as_its_digest(store):
    """The store holds the digest of a key with what it may do; no file holds the key; it stands for a caller with its groups and scopes."""
    token, key = made(store, groups=("staff", "eu"), scopes=("read", "query"))
    assert (key.sha256, len(token)) == (hashlib.sha256(token.encode()).hexdigest(), len(PREFIX) + 64)
    files = [path.read_text() for path in store.root.rglob("*") if path.is_file()]
    assert files
    assert not any(token in text or token.removeprefix(PREFIX) in text for text in files)
    caller = ring_of(store).caller_of(token)
    assert (caller.name, caller.key_id, caller.anonymous) == ("app", key.sha256[:12], False)
    assert (caller.groups, caller.scopes) == ({"staff", "eu"}, {"read", "query"})


def test_keys_are_random(store):
    """No two keys are the same."""
    assert len({made(store, f"app{number}")[0] for number in range(20)}) == 20


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"name": "../app"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"scopes": ()}, "scopes"),
        ({"scopes": ("query", "admin")}, "admin"),
        ({"groups": ("a b",)}, "a b"),
        ({"groups": ("",)}, "group"),
        ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, "2020"),
    ],
)
def test_what_cannot_be_a_key(store, changed, word):
    """A name, scope, group or day that cannot be is named in the error, and nothing is written."""
    with pytest.raises(AccessError, match=word) as refused:
        create_key(store, **({"name": "app", "scopes": SCOPES, "actor": "tester"} | changed))
    assert refused.value.fix
    assert store.names(KEYS) == []


def test_a_name_is_used_once(store):
    """A name is never given to a second key, not even after the first was revoked; and the first stays as it was."""
    token, _ = made(store)
    with pytest.raises(AccessError, match="exists"):
        made(store)
    assert ring_of(store).caller_of(token).name == "app"
    revoke_key(store, "app", actor="tester", reason="leaked")
    with pytest.raises(AccessError, match="exists"):
        made(store)


def test_revoking_is_final(store):
    """A revoked key is refused; revoking again keeps who did it first and why; a name without a key is an error."""
    token, _ = made(store)
    first = revoke_key(store, "app", actor="first", reason="leaked")
    assert revoke_key(store, "app", actor="second", reason="again") == first
    with pytest.raises(AccessError) as refused:
        ring_of(store).caller_of(token)
    assert refused.value.code == "unauthorized"
    ((_, ended),) = read_keys(store)
    assert ended == first
    for nobody in ("other", "../app"):
        with pytest.raises(AccessError, match="no key named"):
            revoke_key(store, nobody, actor="tester", reason="")


def test_an_expired_key_is_refused(store):
    """From the moment it expires a key is refused; until then it is good."""
    token, key = made(store)
    now = datetime.now(UTC)
    for name, ends in (("past", now - timedelta(seconds=2)), ("soon", now + timedelta(hours=1))):
        other = dataclasses.replace(key, name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), expires=ends.isoformat())
        store.create(f"{KEYS}/{name}.json", sealed(dataclasses.asdict(other)))
    ring = ring_of(store)
    assert (ring.caller_of(token).name, ring.caller_of("soon").name) == ("app", "soon")
    with pytest.raises(AccessError):
        ring.caller_of("past")


def test_an_edited_record_is_no_key(store, caplog):
    """A record whose groups were widened by hand, or that is no record, gives access to nobody, is logged once and named by `list`."""
    token, _ = made(store)
    other, _ = made(store, "other")
    path = store.root / KEYS / "app.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"groups": ["board"]}))
    ring = ring_of(store)
    ring.refresh()
    assert ring.caller_of(other).name == "other"
    for wrong in (token, ""):
        with pytest.raises(AccessError):
            ring.caller_of(wrong)
    assert [record.levelname for record in caplog.records if "app.json" in record.message] == ["ERROR"]
    with pytest.raises(StoreError, match=r"app\.json"):
        read_keys(store)


@pytest.mark.parametrize("change", [{"since": 1}, {"groups": None}, {"expires": "soon"}], ids=["unknown field", "no groups", "no time"])
def test_a_record_of_another_shape_stops_no_revocation(store, caplog, change):
    """A sealed record that this version cannot read is no key, is logged, and keeps nobody from seeing that another key was revoked."""
    token, _ = made(store)
    ring = ring_of(store)
    _, foreign = made(store, "foreign")
    store.write(f"{KEYS}/foreign.json", sealed(dataclasses.asdict(foreign) | change))
    revoke_key(store, "app", actor="tester", reason="it leaked")
    ring.refresh()
    with pytest.raises(AccessError, match="API key"):
        ring.caller_of(token)
    assert "foreign.json is no record of a key" in caplog.text


def test_a_store_without_keys_is_open_until_it_has_one(store):
    """Before the first key everybody is anonymous; from the first key on nobody is, even when its record is gone again."""
    ring = ring_of(store)
    assert ring.caller_of("").anonymous
    token, _ = made(store)
    ring.refresh()
    assert ring.caller_of(token).name == "app"
    store.remove(KEYS)
    ring.refresh()
    for wrong in ("", token):
        with pytest.raises(AccessError):
            ring.caller_of(wrong)


def test_all_keys_revoked_is_not_open(store):
    """When the last key was revoked the service is closed, not open."""
    made(store)
    revoke_key(store, "app", actor="tester", reason="")
    with pytest.raises(AccessError):
        ring_of(store).caller_of("")


class Failing(LocalStore):
    """A store that cannot be listed while `broken`."""

    broken = False

    def names(self, prefix: str) -> list[str]:
        if self.broken:
            raise StoreError("no disk.")
        return super().names(prefix)


def test_a_store_that_cannot_be_read_changes_nothing(tmp_path):
    """Keys known before stay good while the store is away; a process that never read any lets nobody in, keys or not."""
    store = Failing(tmp_path)
    token, _ = made(store)
    ring = ring_of(store)
    store.broken = True
    ring.refresh()
    assert ring.caller_of(token).name == "app"
    with pytest.raises(NotReady):
        ring_of(store).caller_of(token)
    store.broken = False
    revoke_key(store, "app", actor="tester", reason="")
    ring.refresh()
    with pytest.raises(AccessError):
        ring.caller_of(token)


def test_the_ring_follows_the_store(store):
    """A running ring takes in new and revoked keys by itself."""

    async def story() -> None:
        ring = KeyRing(store, poll_seconds=0.01)
        await ring.start()
        token, _ = made(store)
        async with asyncio.timeout(10):
            while ring.open:  # noqa: ASYNC110 - the ring has no event to wait for
                await asyncio.sleep(0.01)
            assert ring.caller_of(token).name == "app"
            revoke_key(store, "app", actor="tester", reason="")
            while True:
                try:
                    ring.caller_of(token)
                except AccessError:
                    break
                await asyncio.sleep(0.01)
        await ring.stop()

    asyncio.run(story())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_key(store, host):
    """Only this machine reaches these hosts."""
    require_keys(store, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.5", "rag.example.org"])  # noqa: S104 - refused, not bound
def test_other_hosts_need_a_key(store, tmp_path, host):
    """A host that others can reach is not served without keys: exit code 78, what to do, and no socket was opened; with a key it may be."""
    with pytest.raises(ConfigError, match="no API keys") as refused:
        serve(settings_for(store.root).model_copy(update={"root": tmp_path}), host=host, port=0)
    assert refused.value.exit_code == 78
    assert "ragline keys create" in refused.value.fix
    made(store)
    require_keys(store, host)


# over HTTP


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A client of a service with a release, without an embedding service; and its store, which has a key `whole` and a key `reader`."""
    root = tmp_path_factory.mktemp("keys")
    store, manifest, _ = two_snapshots(root)
    release(store, manifest)
    tokens = {"whole": made(store, "whole")[0], "reader": made(store, "reader", scopes=("read",))[0]}
    settings = settings_for(root).model_copy(update={"access": Access(poll_seconds=0.05)})
    with serving(settings, store) as client:
        yield client, store, tokens


def test_only_a_good_key_is_let_in(service):
    """No key, a wrong one, one that differs in its last digit, another scheme or one in the address: 401 with one and the same body."""
    client, _, tokens = service
    good = tokens["whole"]
    last = "0" if good[-1] != "0" else "1"
    tries = [
        client.post("/v1/query", json=ASK, headers=headers)
        for headers in (
            {},
            bearer("x"),
            bearer(good[:-1] + last),
            {"Authorization": f"Basic {good}"},
            {"Authorization": good},
            {"Authorization": "Bearer"},
        )
    ]
    tries += [client.post("/v1/query", json=ASK, params={"api_key": good})]
    tries += [client.post("/v1/query", json=ASK, params=params, headers=bearer(good)) for params in ({"api_key": good}, {"x": good})]
    bodies = [{**reply.json(), "trace_id": ""} for reply in tries]
    assert all(reply.status_code == 401 for reply in tries)
    assert all(body == bodies[0] for body in bodies)
    assert bodies[0]["code"] == "unauthorized"
    assert all(reply.headers["www-authenticate"] == "Bearer" for reply in tries)
    assert client.post("/v1/query", json=ASK, headers=bearer(good)).status_code == 200


def test_what_has_no_door():
    """Of our routes, probes and the page's files alone ask for no key."""
    every = {(method, route.path) for route in routes.routes for method in route.methods}
    assert every - set(doors(routes)) == {("GET", path) for path in ("/livez", "/readyz", "/", "/static/{name}")}


@pytest.mark.parametrize(("method", "path"), sorted(doors(routes)))
def test_every_route_that_works_or_tells_asks_for_a_key(service, method, path):
    """Before anything is read of it, a request without a key is refused; with a line break behind it the address is none."""
    assert service[0].request(method, path).status_code == 401
    assert service[0].request(method, f"{path}%0A").json()["code"] == "not_found"


def test_a_door_without_entry_is_closed():
    """A route whose door nobody stands at fails; it never works for somebody whom nobody looked at."""
    app, worked = FastAPI(), []

    @app.get("/told", dependencies=[Depends(Door("read"))])
    async def told() -> None:
        worked.append(1)

    with running(Frame(app, tracer=trace.tracer(trace.provider()), origins=Origins())) as url:
        assert httpx2.get(f"{url}/told", trust_env=False).status_code == 500
    assert not worked


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/", "/static/app.js", "/openapi.json"])
def test_probes_and_page_need_no_key(service, path):
    """What tells nothing of documents stays open: probes, the page's files, the description of the API."""
    assert service[0].get(path).status_code == 200


def test_a_missing_scope_is_forbidden_and_noted(service, caplog):
    """A good key without the scope gets 403, and the audit log says which key asked for what; the key itself is not logged."""
    client, _, tokens = service
    with caplog.at_level(logging.WARNING, logger="rag_serving.audit"):
        reply = client.post("/v1/query", json=ASK, headers=bearer(tokens["reader"]))
    assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "rag_serving.audit"]
    assert all(word in line for word in ("reader", "query", "POST /v1/query", reply.json()["trace_id"]))
    assert tokens["reader"] not in line
    assert client.get("/v1/release", headers=bearer(tokens["reader"])).status_code == 200


def test_new_and_revoked_keys_count_without_a_restart(service):
    """A key made while the service runs is soon good, and soon refused once revoked; others are not disturbed."""
    client, store, tokens = service
    token, _ = made(store, "late")

    class Release:
        def get(self, path):
            return client.get(path, headers=bearer(token))

    until(Release(), "/v1/release", holds=lambda reply: reply.status_code == 200)
    revoke_key(store, "late", actor="tester", reason="leaked")
    until(Release(), "/v1/release", holds=lambda reply: reply.status_code == 401)
    assert client.get("/v1/release", headers=bearer(tokens["whole"])).status_code == 200


def test_no_reply_shows_a_key(service):
    """Nothing that is sent back holds the key or its digest."""
    client, _, tokens = service
    digest = hashlib.sha256(tokens["whole"].encode()).hexdigest()
    for reply in (
        client.post("/v1/query", json=ASK, headers=bearer(tokens["whole"])),
        client.get("/v1/release", headers=bearer(tokens["whole"])),
        client.post("/v1/query", json=ASK, params={"key": tokens["whole"]}),
    ):
        assert tokens["whole"] not in reply.text
        assert digest not in reply.text


# the commands


def run(store, *words: str) -> str:
    result = CliRunner().invoke(cli, ["keys", *words], env={"RAGLINE_STORE": str(store.root), "RAGLINE_ACTOR": "tester"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands_make_tell_and_end_keys(store):
    """`create` prints a key that works, `list` tells all but the key, `revoke` ends it with its reason."""
    token = run(store, "create", "web", "--group", "staff", "--group", "eu", "--scope", "query,read", "--expires", "2099-01-31").split()[0]
    caller = ring_of(store).caller_of(token)
    assert (caller.groups, caller.scopes) == ({"staff", "eu"}, {"query", "read"})
    listed = run(store, "list")
    assert "web" in listed
    assert "until 2099-01-31" in listed
    assert token not in listed
    run(store, "revoke", "web", "--reason", "leaked")
    (told,) = json.loads(run(store, "list", "--json"))["keys"]
    assert (told["revoked"]["reason"], told["revoked"]["actor"], told["name"]) == ("leaked", "tester", "web")
    assert store.names(REVOKED) == ["web.json"]
    with pytest.raises(AccessError):
        run(store, "create", "web")


def test_list_of_no_keys_says_so(store):
    """Without keys `list` says what that means."""
    assert "open, to this machine alone" in " ".join(run(store, "list").split())


def test_key_records_have_a_fixed_shape():
    """The record of a key holds its digest, never the key: these fields and no others."""
    assert [field.name for field in dataclasses.fields(Key)] == ["name", "sha256", "groups", "scopes", "created", "created_by", "expires"]
