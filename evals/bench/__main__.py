"""`python -m evals.bench [NAME ...]`: run benches and print one table. Without names, all but `quality`, which takes many minutes."""

import asyncio
import os
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from rich.console import Console
from uvicorn.loops.auto import auto_loop_factory

from evals.bench import embedder, embedding, load, overhead, quality, reranking, retrieval, rollback, scale, verify
from evals.bench.figures import Figure, figures_table, machine
from evals.bench.rig import Rig
from rag_assets.terminal import TerminalReporter
from rag_serving.embedding.cpu import computes_bfloat16, thread_count
from rag_serving.errors import RaglineError
from rag_serving.settings import Settings, load_settings

BENCHES: Mapping[str, Callable[[Rig], Awaitable[list[Figure]]]] = MappingProxyType(
    {
        "embedding": embedding.run,
        "retrieval": retrieval.run,
        "verify": verify.run,
        "rollback": rollback.run,
        "embedder": embedder.run,
        "overhead": overhead.run,
        "load": load.run,
        "quality": quality.run,
        "reranking": reranking.run,
        "scale": scale.run,
    }
)
BY_NAME_ONLY = frozenset({"quality", "reranking", "scale"})
_MODEL = "all-MiniLM-L6-v2"
_CORPUS = "sample:small"


def _chosen(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        listed = "\n".join(f"  {name:<10} {_about(name)}{' (only by name: minutes)' if name in BY_NAME_ONLY else ''}" for name in BENCHES)
        sys.exit(f"{'' if unknown == ['--list'] else f'No bench {unknown[0]!r}. '}Benches:\n{listed}")
    return list(names) or [name for name in BENCHES if name not in BY_NAME_ONLY]


def _about(name: str) -> str:
    module = sys.modules[BENCHES[name].__module__]
    return (module.__doc__ or "").splitlines()[0]


def bench_settings(settings: Settings) -> Settings:
    """The settings with the small sample as corpus and eval set, whatever ragline.toml names."""
    corpus, eval_choice = (part.model_copy(update={"source": _CORPUS}) for part in (settings.corpus, settings.eval))
    return settings.model_copy(update={"corpus": corpus, "eval": eval_choice})


def main(names: Sequence[str]) -> int:
    """Run the named benches; 0 when all ran.

    torch gets one thread a side unless OMP_NUM_THREADS says more. With a thread a core, any other load leaves threads spinning at barriers:
    the peer was then measured at a tenth of its speed, and ours looked quicker than its own limit.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    chosen, console = _chosen(names), Console(width=None if sys.stdout.isatty() else 170)
    started, results, failed = time.perf_counter(), [], False
    settings = bench_settings(load_settings())
    state = settings.home / "bench"
    state.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="run-", dir=state) as scratch:
        rig = Rig(settings, Path(scratch), TerminalReporter(console), _MODEL)
        for name in chosen:
            console.rule(f"{name}: {_about(name)}", align="left")
            before = time.perf_counter()
            try:
                # the services' own loop, since a load generator takes cores from them
                with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
                    results.append((name, runner.run(_run(name, rig))))
            except RaglineError as error:
                failed = True
                console.print(f"{name} failed: {error}", style="red", markup=False)
            console.print(f"[dim]  {time.perf_counter() - before:.0f} s[/]")
    console.print(figures_table(results))
    console.print(machine(threads=thread_count(), bf16=computes_bfloat16()), highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    return int(failed)


async def _run(name: str, rig: Rig) -> list[Figure]:
    return await BENCHES[name](rig)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
