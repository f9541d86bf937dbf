"""A language model of this machine behind its real socket (`ragline llm`), for heavy tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

from rag_serving.edge.ports import port_is_free

SMALL, LARGE = "smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"
MODELS_DIR = Path(os.environ.get("RAGLINE_MODELS_DIR") or Path(__file__).parents[1] / ".ragline" / "models")


def has_weights(name: str) -> bool:
    """Whether the model's weights are on this machine already; else they are downloaded, 93 MB or 1.1 GB."""
    return any(path.parent.name.startswith(name) for path in MODELS_DIR.glob("*/model.gguf"))


@contextmanager
def local_model(root: Path, name: str, *, models_dir: Path = MODELS_DIR) -> Iterator[str]:
    """Its base URL, ending in /v1; it computes with one thread."""
    port = next(port for port in range(18423, 18600) if port_is_free("127.0.0.1", port))
    config = root / "local-model.toml"
    config.write_text(f'[local_llm]\nmodel = "{name}"\nthreads = 1\n')
    environ = {**os.environ, "RAGLINE_CONFIG": str(config), "RAGLINE_MODELS_DIR": str(models_dir), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rag_assets", "llm", "--port", str(port)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _until_healthy(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def _until_healthy(url: str, process: subprocess.Popen) -> None:
    for _ in range(6000):
        with suppress(httpx2.TransportError):
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        assert process.poll() is None, "the model did not start"
        time.sleep(0.1)
    raise AssertionError("the local model never became healthy")
