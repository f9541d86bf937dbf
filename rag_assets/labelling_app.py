"""The labelling page: one question at a time, its passages beside it, judged by keyboard or by hand. For loopback, by one person at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.middleware.trustedhost import TrustedHostMiddleware

from evals.collections import EvalSetError
from rag_assets.labelling import Desk, open_desk
from rag_assets.workbench import Workbench
from rag_serving.edge.ports import NO_TELEMETRY, require_port
from rag_serving.errors import RaglineError

_TYPES = {"index.html": "text/html", "label.js": "text/javascript", "label.css": "text/css"}
_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"


class Decision(BaseModel):
    """`grades` by document id judge the question; None skips it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    review_id: str
    grades: dict[str, int] | None = None


def create_app(bench: Workbench, folder: Path, *, actor: str) -> FastAPI:
    """The page over a desk that is open while the app runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_desk(bench, folder, actor=actor) as desk:
            app.state.desk = desk
            yield

    app = _pages(folder)
    app.router.lifespan_context = lifespan
    return app


def _pages(folder: Path) -> FastAPI:
    app = FastAPI(title="ragline labelling", docs_url=None, redoc_url=None, openapi_url=None, telemetry=NO_TELEMETRY)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])  # another host name is DNS rebinding

    @app.exception_handler(RaglineError)
    @app.exception_handler(EvalSetError)
    async def refused(_: Request, error: Any) -> JSONResponse:
        return JSONResponse({"detail": error.what, "fix": error.fix}, status_code=409)

    @app.get("/next")
    async def next_task(request: Request, skip: str = "") -> dict[str, Any]:
        """The next question, leaving out the ids in `skip` (comma-separated); `task` is null when none is left."""
        task = await _desk(request).next(after=frozenset(skip.split(",")))
        return {"task": asdict(task) if task else None, "folder": folder.name}

    @app.post("/decide", status_code=204)
    async def decide(request: Request, decision: Decision) -> None:
        """File a decision. Only from this page: a form or a script of another site cannot send JSON here."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "Send JSON.")
        desk = _desk(request)
        await (desk.skip(decision.review_id) if decision.grades is None else desk.judge(decision.review_id, decision.grades))

    @app.get("/{name:path}")
    async def asset(name: str) -> Response:
        name = name or "index.html"
        if name not in _TYPES:
            raise HTTPException(404, "There is no such page.")
        data = files("rag_assets").joinpath("label_page", name).read_bytes()
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return Response(data, media_type=_TYPES[name], headers=headers)

    return app


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


def serve(bench: Workbench, folder: Path, *, actor: str, port: int) -> None:
    """Run the page on loopback until Ctrl-C. PlatformError when the port is taken, NotReady when nothing is released."""
    require_port("127.0.0.1", port, variable="--port")

    async def run() -> None:
        app = _pages(folder)
        async with open_desk(bench, folder, actor=actor) as app.state.desk:  # opened here, so that what fails is raised as it is
            bench.reporter.note(f"Judge on http://127.0.0.1:{port} ; Ctrl-C ends it.")
            await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")).serve()

    with suppress(KeyboardInterrupt):
        asyncio.run(run())
