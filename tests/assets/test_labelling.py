"""From waiting questions to judged ones: desk, page, terminal, logs, synthesis through a language model, and the no-answer threshold."""

import asyncio
import io
import json
import re

import httpx2
import pytest
from fastapi import FastAPI, Request
from generated_corpus import released, settings_for
from live_server import running
from rich.console import Console

from evals.collections import load_beir
from evals.living import open_living
from evals.negatives import load_negatives
from rag_assets.coverage import measure_coverage
from rag_assets.labelling import open_desk, queue_log
from rag_assets.labelling_app import create_app, serve
from rag_assets.labelling_terminal import label_here
from rag_assets.noanswer import threshold_key, tune_live
from rag_assets.synthesis import synthesize_queries
from rag_assets.workbench import Workbench
from rag_serving.errors import ConfigError, NotReady, PlatformError, QueryError, SourceError
from rag_serving.feedback import propose, waiting_queries
from rag_serving.releases import Ledger
from rag_serving.settings import Places
from rag_serving.store import LocalStore

TOPICS = {
    "garden": "soil seeds roses compost spade watering pruning hedge lawn tulips",
    "kitchen": "flour oven yeast butter saucepan whisk simmer garlic pepper dough",
    "harbour": "anchor rudder sails mooring tide captain lighthouse ferry deck keel",
    "orbit": "satellite thruster gravity telescope comet lander module perigee launch nebula",
}


@pytest.fixture(scope="module")
def released_root(tmp_path_factory):
    """A folder with a corpus of four topics, judged for three of them, and a release over it."""
    root = tmp_path_factory.mktemp("labelling")
    folder = root / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for topic, words in TOPICS.items():
        listed = words.split()
        for number in range(20):
            chosen = [listed[(number + step) % 10] for step in range(4)]
            advice = "with advice for every season and weather. " * 3
            text = f"This page of the {topic} tells of {', '.join(chosen)} and of item{topic}{number}, {advice}"
            corpus.append({"_id": f"{topic}.{number}", "title": f"{topic} {number}", "text": text})
            if topic != "orbit":
                queries.append({"_id": f"{topic}-{number}", "text": f"advice for {chosen[0]} and {chosen[1]} item{topic}{number}"})
                qrels.append(f"{topic}-{number}\t{topic}.{number}\t1")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")
    released(Workbench(settings_for(root)), "hashing-256")
    return root


@pytest.fixture
def bench(released_root, tmp_path):
    """A workbench over a store of its own with the release."""
    import shutil

    shutil.copytree(released_root, tmp_path / "line")
    return Workbench(settings_for(tmp_path / "line"))


def scripted_model(answer) -> FastAPI:
    """An OpenAI-compatible endpoint that answers a prompt by a function."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict:
        prompt = (await request.json())["messages"][0]["content"]
        return {"choices": [{"message": {"role": "assistant", "content": answer(prompt)}}]}

    return app


def test_a_waiting_question_becomes_a_judged_query(bench, tmp_path):
    """The desk shows what the live snapshot finds; judging files the grades in the eval set and takes the question off the queue."""
    propose(bench.store, "what about roses and compost", "feedback", verdict="down", doc_ids=["garden.3"])

    async def work():
        async with open_desk(bench, tmp_path / "living", actor="me") as desk:
            task = await desk.next()
            await desk.judge(task.waiting.review_id, {task.candidates[0].doc_id: 2, task.candidates[1].doc_id: 0})
            return task, await desk.next()

    task, after = asyncio.run(work())
    assert len({candidate.doc_id for candidate in task.candidates}) == 10
    assert task.candidates[0].doc_id.startswith("garden.")
    assert [candidate.doc_id for candidate in task.candidates if candidate.hinted] == ["garden.3"]
    assert after is None
    grown = load_beir(tmp_path / "living")
    assert [*grown.qrels.values()] == [{task.candidates[0].doc_id: 2, task.candidates[1].doc_id: 0}]


def test_nothing_relevant_makes_a_negative(bench, tmp_path):
    """A question judged without a relevant document becomes a near-miss negative; a wrong grade or an unknown question is refused."""
    propose(bench.store, "who was the third emperor of Rome", "log")

    async def work():
        async with open_desk(bench, tmp_path / "living", actor="me") as desk:
            task = await desk.next()
            with pytest.raises(QueryError, match="grades"):
                await desk.judge(task.waiting.review_id, {task.candidates[0].doc_id: 7})
            await desk.judge(task.waiting.review_id, {candidate.doc_id: 0 for candidate in task.candidates})
            with pytest.raises(QueryError, match="waits"):
                await desk.judge(task.waiting.review_id, {"garden.1": 1})

    asyncio.run(work())
    assert open_living(tmp_path / "living").queries == ()
    assert [each.text for each in load_negatives(tmp_path / "living")] == ["who was the third emperor of Rome"]


def test_the_page_judges_over_http(bench, tmp_path):
    """/next hands out a question, /decide files or skips it; other host names, forms and unknown fields are refused."""
    for query in ("roses and compost", "flour and yeast"):
        propose(bench.store, query, "log")
    with (
        running(create_app(bench, tmp_path / "living", actor="me"), ready_path="/next") as url,
        httpx2.Client(base_url=url, trust_env=False) as client,
    ):
        task = client.get("/next").json()["task"]
        wrong = {"review_id": task["waiting"]["review_id"], "grades": {"garden.1": 9}}
        assert client.post("/decide", json=wrong).status_code == 409
        assert client.post("/decide", json={"review_id": "x", "tenant": "y"}).status_code == 422
        form = client.post("/decide", content=json.dumps(wrong).encode(), headers={"Content-Type": "text/plain"})
        assert form.status_code in (415, 422)
        assert client.get("/next", headers={"Host": "evil.example"}).status_code == 400
        assert client.get("/../labelling.py").status_code == 404
        assert "default-src 'self'" in client.get("/").headers["content-security-policy"]
        assert client.post("/decide", json={"review_id": task["waiting"]["review_id"]}).status_code == 204
        second = client.get("/next").json()["task"]
        assert (
            client.post(
                "/decide", json={"review_id": second["waiting"]["review_id"], "grades": {second["candidates"][0]["doc_id"]: 1}}
            ).status_code
            == 204
        )
        assert client.get("/next").json()["task"] is None
    assert len(load_beir(tmp_path / "living").queries) == 1


def test_the_page_without_a_release_says_so(tmp_path):
    """Starting the page before anything is released raises what the command line prints as one line."""
    empty = Workbench(settings_for(tmp_path))
    with pytest.raises(NotReady, match="nothing is released"):
        serve(empty, tmp_path / "living", actor="me", port=0)


def test_judging_in_the_terminal(bench, tmp_path, monkeypatch):
    """Numbers grade, ! says that one answers it, anything else explains itself, s skips, the end of input stops."""
    for query in ("roses and compost", "flour and yeast", "anchor and rudder"):
        propose(bench.store, query, "log")
    lines = iter(["what", "99", "01! 2", "s"])
    console = Console(file=io.StringIO(), width=120)

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(console, "input", read)
    asyncio.run(label_here(bench, tmp_path / "living", actor="me", console=console))
    (judgments,) = load_beir(tmp_path / "living").qrels.values()
    assert sorted(judgments.values(), reverse=True)[:3] == [2, 1, 0]
    assert len(waiting_queries(bench.store)) == 1
    assert console.file.getvalue().count("numbers of the relevant ones") >= 3 + 2


def test_a_log_is_queued_line_by_line(store, tmp_path):
    """Each line of a log waits once; a line that is no text is named with its number."""
    log = tmp_path / "asked.txt"
    log.write_text("one two\n\none  TWO\nthree\n")
    assert queue_log(store, log) == (2, 1)
    log.write_text("fine\nbad \x00 one\n")
    with pytest.raises(SourceError, match="question 2"):
        queue_log(store, log)
    with pytest.raises(SourceError, match="cannot read"):
        queue_log(store, tmp_path / "absent.txt")


def test_coverage_names_what_no_query_touches(bench):
    """The topic without a judged document leads the coverage report."""
    found = measure_coverage(bench)
    assert [part.name for part in found.untouched] == ["orbit"]
    assert (found.whole.documents, found.whole.judged) == (80, 60)


def test_synthetic_questions_fill_the_uncovered_part(bench):
    """A language model over a real socket writes questions for the least covered part; those that lead back wait for judgment, marked."""

    def answer(prompt: str) -> str:
        item = re.search(r"item\w+", prompt)
        assert item
        return json.dumps({"question": f"which page gives advice on {item[0]} today"})

    with running(scripted_model(answer)) as url:
        places = Places(home=bench.settings.root, llm_url=f"{url}/v1", llm_model="scripted")
        facts = synthesize_queries(Workbench(bench.settings.model_copy(update={"places": places}), store=bench.store), count=6)
    waiting = waiting_queries(bench.store)
    assert (facts["asked"], facts["kept"]) == (6, len(waiting))
    assert facts["kept"] >= 4
    assert {each.origin for each in waiting} == {"synthetic"}
    assert all(each.doc_ids[0].startswith("orbit.") for each in waiting)


def test_no_language_model_is_said_plainly(bench):
    """Without RAGLINE_LLM_URL synthesis is a ConfigError; with one that is dead it is a PlatformError; both say what to set."""
    with pytest.raises(ConfigError, match="RAGLINE_LLM_URL"):
        synthesize_queries(bench, count=1)
    places = Places(home=bench.settings.root, llm_url="http://127.0.0.1:9/v1", llm_model="none")
    with pytest.raises(PlatformError, match="RAGLINE_LLM_URL"):
        synthesize_queries(Workbench(bench.settings.model_copy(update={"places": places}), store=bench.store), count=1)


def test_the_threshold_of_the_live_snapshot_is_kept(bench):
    """Left-out topics score below answerable queries; the threshold is stored under the live manifest."""
    found = tune_live(bench)
    assert found.auc["left_out"] > 0.9
    live = Ledger(bench.store).state().champion
    assert json.loads(bench.store.read(threshold_key(live.manifest_sha256)))["threshold"] == found.threshold


def test_without_a_release_there_is_nothing_to_ask(tmp_path):
    """On an empty store the desk says that nothing is released."""

    async def work():
        async with open_desk(Workbench(settings_for(tmp_path), store=LocalStore(tmp_path / "s")), tmp_path / "living", actor="me"):
            raise AssertionError

    with pytest.raises(NotReady):
        asyncio.run(work())
