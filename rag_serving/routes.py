"""The addresses of the serving process. Each takes a request apart, has the pipeline do the work, and puts the reply together."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from rag_serving import pipeline
from rag_serving.admission import Question, admit, admit_body
from rag_serving.deadline import Deadline
from rag_serving.exchange import Exchange
from rag_serving.feedback import Feedback, propose
from rag_serving.live import Live
from rag_serving.page_files import page_file
from rag_serving.pipeline import Service
from rag_serving.problems import DOCUMENTED
from rag_serving.replies import FeedbackReply, QueryReply, ReleaseReply, RetrieveReply, query_reply, release_reply, retrieve_reply

routes = APIRouter()


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


_BODY, _FEEDBACK = _takes(Question), _takes(Feedback)


async def _admitted(request: Request) -> tuple[Question, Exchange]:
    state = request.app.state
    seconds = state.service.settings.serving.deadline_seconds
    exchange = Exchange(request.state.trace_id, state.tracer, Deadline.after(seconds), request_id=request.state.request_id)
    body = await request.body()
    with exchange.phase("admit"):
        return admit(request.headers.get("content-type", ""), body), exchange


@routes.post("/v1/retrieve", openapi_extra=_BODY, responses=DOCUMENTED)
async def retrieve(request: Request) -> RetrieveReply:
    """The passages nearest to a question, best first."""
    question, exchange = await _admitted(request)
    service: Service = request.app.state.service
    return retrieve_reply(await pipeline.retrieve(service, question, exchange), exchange)


@routes.post("/v1/query", openapi_extra=_BODY, responses=DOCUMENTED)
async def query(request: Request) -> QueryReply:
    """An answer quoted from the passages nearest to a question, with citations; `abstained` when they hold none."""
    question, exchange = await _admitted(request)
    service: Service = request.app.state.service
    found, answer = await pipeline.answer(service, question, exchange)
    return query_reply(found, answer, exchange)


@routes.post("/v1/feedback", status_code=202, openapi_extra=_FEEDBACK, responses=DOCUMENTED)
async def feedback(request: Request) -> FeedbackReply:
    """A thumb for an answer: its question waits for a judgment, from which the eval set grows. `queued` is false if it waits already."""
    given = admit_body(request.headers.get("content-type", ""), await request.body(), Feedback)
    store = request.app.state.store
    said = given.model_dump(exclude={"query"})
    queued = await asyncio.to_thread(propose, store, given.query, "feedback", **said)
    return FeedbackReply(queued=queued, trace_id=request.state.trace_id)


@routes.get("/v1/release")
async def release(request: Request) -> ReleaseReply:
    """What is live, what was before, what answers here, and the last entries of the ledger."""
    return release_reply(request.app.state.service.live)


@routes.get("/livez")
async def livez() -> dict[str, str]:
    """The process runs."""
    return {"status": "alive"}


@routes.get("/readyz", responses={503: DOCUMENTED[503]})
async def readyz(request: Request) -> dict[str, Any]:
    """A verified, warmed snapshot is open; `problem` says why it is not the ledger's newest, if so."""
    live: Live = request.app.state.service.live
    serving = live.serving
    if serving is None:
        raise live.not_ready()
    problem = release_reply(live).problem
    return {"status": "ready", "snapshot_id": serving.snapshot_id, "release": serving.number, "problem": problem}


@routes.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    return page_file(request, "index.html")


@routes.get("/static/{name}", include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    return page_file(request, name)
