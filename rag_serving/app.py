"""The serving process: its parts put together, started and stopped. Addresses are in routes.py, the work is in pipeline.py."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider

from rag_serving import telemetry
from rag_serving.frame import Frame
from rag_serving.limits import BodyLimit
from rag_serving.live import Live
from rag_serving.page_files import read_page
from rag_serving.pipeline import Service
from rag_serving.ports import require_port
from rag_serving.problems import add_problems, refusal
from rag_serving.routes import routes
from rag_serving.settings import Settings
from rag_serving.store import LocalStore, Store

MOST_BODY_BYTES = 64 << 10
BODY_SECONDS = 10.0
_TOO_LONG = f"The body is longer than {MOST_BODY_BYTES} bytes."


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.live.start()
    yield
    await service.live.stop()


def create_app(settings: Settings, *, store: Store | None = None, tracing: TracerProvider | None = None) -> FastAPI:
    """The service over a store; default: the settings' own. It starts whatever the store holds, and answers once a release is open.

    `tracing` makes its spans; add span processors to it to send them somewhere.
    """
    tracer = telemetry.tracer(tracing or telemetry.provider())
    app = FastAPI(title="ragline", version="1", lifespan=_lifespan, docs_url=None, redoc_url=None)
    app.state.store = store or LocalStore(settings.store_dir)
    app.state.service = Service(settings, Live(app.state.store, settings))
    app.state.assets = read_page()
    app.state.tracer = tracer
    app.include_router(routes)
    app.add_middleware(BodyLimit, most_bytes=MOST_BODY_BYTES, too_long=_TOO_LONG, refusal=refusal, seconds=BODY_SECONDS)
    app.add_middleware(Frame, tracer=tracer)
    add_problems(app)
    return app


def serve(settings: Settings, *, host: str, port: int) -> None:
    """Run the service until SIGTERM or SIGINT; requests under way are finished first, for ten seconds at most.

    Raises PlatformError when the port is taken.
    """
    require_port(host, port, variable="RAGLINE_SERVING_PORT")
    uvicorn.run(
        create_app(settings), host=host, port=port, access_log=False, ws="none", timeout_keep_alive=75, timeout_graceful_shutdown=10
    )
