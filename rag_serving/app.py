"""The serving process: its parts put together, started and stopped. Addresses are in routes.py, the work is in pipeline.py."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from opentelemetry.sdk.trace import TracerProvider

from rag_serving.canary import Traffic
from rag_serving.collector import settle
from rag_serving.edge.entry import Edge, Entry, doors
from rag_serving.edge.frame import Frame
from rag_serving.edge.keys import require_keys
from rag_serving.edge.limits import BodyLimit
from rag_serving.edge.openapi import describe
from rag_serving.edge.origins import Origins
from rag_serving.edge.page_files import read_page
from rag_serving.edge.ports import NO_TELEMETRY, listening, require_port, server_config
from rag_serving.edge.problems import refusal
from rag_serving.edge.routes import routes
from rag_serving.embedding.vector_probe import VectorProbe
from rag_serving.generation import Writer
from rag_serving.live import Live
from rag_serving.observations import ObservationLog
from rag_serving.pipeline import Service
from rag_serving.settings import Settings
from rag_serving.signals import logs, trace
from rag_serving.store import LocalStore, Store
from rag_serving.writing.injection import classifier
from rag_serving.writing.llm import LanguageModel

MOST_BODY_BYTES = 64 << 10
BODY_SECONDS = 10.0
_NOT_STARTED = 3  # the exit code of uvicorn.run
_TOO_LONG = f"The body is longer than {MOST_BODY_BYTES} bytes."


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    edge: Edge = app.state.edge
    await edge.start()
    await asyncio.to_thread(classifier)  # read now, not while the first question waits
    service.live.start()
    service.traffic.start()
    app.state.probe.start()
    yield
    await app.state.probe.stop()
    await service.traffic.stop()
    await service.live.stop()
    await service.writer.aclose()
    await edge.stop()


def create_app(
    settings: Settings, *, store: Store | None = None, tracing: TracerProvider | None = None, opened: Callable[[], None] | None = None
) -> FastAPI:
    """The service over a store; default: the settings' own. It starts whatever the store holds, and answers once a release is open.

    `tracing` makes its spans; add span processors to it to send them somewhere. `opened` is called when the first release is open, before it
    answers.
    """
    tracer = trace.tracer(tracing or trace.provider(share=settings.telemetry.share))
    app = FastAPI(
        title="ragline",
        version="1",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )
    app.state.store = store or LocalStore(settings.store_dir)
    live = Live(app.state.store, settings, opened=opened)
    observations = ObservationLog(app.state.store, settings.canary)
    writer = Writer(LanguageModel.configured(settings), settings.generation.llm_timeout_seconds, settings.guards)
    traffic = Traffic(live, observations, settings.canary, busy=lambda: trace.inflight() > max(1, settings.admission.concurrency // 8))
    app.state.service = Service(settings, live, traffic, writer)
    app.state.probe = VectorProbe(live, settings)
    app.state.edge = Edge(settings, app.state.store)
    app.state.assets = read_page()
    app.include_router(routes)
    entry = Entry(AsyncExitStackMiddleware(app.router), edge=app.state.edge, tracer=tracer, doors=doors(routes))
    limited = BodyLimit(entry, most_bytes=MOST_BODY_BYTES, too_long=_TOO_LONG, refusal=refusal, seconds=BODY_SECONDS)
    # in place of FastAPI's own layers, of which only the exit stack is needed: what an error becomes is said in frame.py alone
    app.middleware_stack = Frame(limited, tracer=tracer, origins=Origins(settings.access.allowed_hosts, own=settings.places.host))
    describe(app)
    return app


def serve(settings: Settings, *, host: str, port: int) -> None:
    """Run the service until SIGTERM or SIGINT; requests under way are finished first, for ten seconds at most.

    Raises PlatformError when the port is taken, ConfigError when other machines could ask it without a key.
    """
    store = LocalStore(settings.store_dir)
    require_keys(store, host)
    require_port(host, port, variable="RAGLINE_SERVING_PORT")
    logs.configure(settings.places.log_format, settings.places.log_level)
    telling = settings.telemetry
    tracing = trace.exporting_provider(service="ragline", share=telling.share, slow_seconds=telling.slow_seconds)
    config = server_config(create_app(settings, store=store, tracing=tracing, opened=settle), host=host, port=port)
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening(config)])
    if not server.started:
        sys.exit(_NOT_STARTED)
