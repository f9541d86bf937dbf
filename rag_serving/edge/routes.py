"""The addresses of the serving process. Each takes a request apart, has the pipeline do the work, and puts the reply together."""

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from rag_serving import pipeline, telemetry
from rag_serving.admission import Ask, Question
from rag_serving.edge import idempotency
from rag_serving.edge.chat import ChatReply, ChatRequest, ChatStream, ModelList, chat_reply
from rag_serving.edge.entry import Asked, Door, Edge
from rag_serving.edge.page_files import page_file
from rag_serving.edge.problems import DOCUMENTED, documented
from rag_serving.edge.replies import (
    CompareReply,
    FeedbackReply,
    QueryReply,
    ReleaseReply,
    RetrieveReply,
    query_reply,
    release_reply,
    retrieve_reply,
)
from rag_serving.edge.streaming import EVENT_STREAM, QueryStream, while_connected
from rag_serving.feedback import Feedback, propose
from rag_serving.live import Live
from rag_serving.pipeline import Found, Service
from rag_serving.signals import metrics, vitals
from rag_serving.writing.extraction import Answer

routes = APIRouter()

Admitted = Annotated[Asked[Question], Depends(Door("query", Question))]


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


_BODY = takes(Question)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The reply, or Server-Sent Events when they are asked for.", "content": {EVENT_STREAM: {}}},
    **DOCUMENTED,
}
_FEEDBACK = takes(Feedback) | {
    "parameters": [
        {
            "name": idempotency.HEADER,
            "in": "header",
            "required": False,
            "description": "Sent again with the same body, the first reply comes back and nothing is done twice.",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
        }
    ]
}


@routes.post("/v1/retrieve", response_model=RetrieveReply, openapi_extra=_BODY, responses=DOCUMENTED)
async def retrieve(request: Request, admitted: Admitted) -> Response:
    """The passages nearest to a question, best first."""
    service: Service = request.app.state.service
    found = await pipeline.retrieve(service, admitted.body, admitted.exchange)
    admitted.spend(admitted.body.query, *(hit.text for hit in found.hits))
    return _written(retrieve_reply(found, admitted.exchange))


@routes.post("/v1/query", response_model=QueryReply, openapi_extra=takes(Ask), responses=_STREAMED)
async def query(request: Request, admitted: Annotated[Asked[Ask], Depends(Door("query", Ask))]) -> Response:
    """An answer out of the passages nearest to a question, with citations; `abstained` when they hold none.

    With `stream`, or `Accept: text/event-stream`, the reply is events: hits, token, restart, citations and last done or error.
    """
    work = partial(_answered, request, admitted, admitted.body)
    if admitted.body.stream or EVENT_STREAM in request.headers.get("accept", ""):
        return QueryStream(admitted.exchange, work)
    found, answer = await while_connected(request.receive, work())
    return _written(query_reply(found, answer, admitted.exchange))


def _written(reply: BaseModel) -> Response:
    """The reply as JSON, at once: FastAPI would check the model that we have just made a second time."""
    return Response(reply.model_dump_json(), media_type="application/json")


@routes.post("/v1/compare", response_model=CompareReply, openapi_extra=_BODY, responses=DOCUMENTED)
async def compare(request: Request, admitted: Admitted) -> Response:
    """The same question answered by what is released and by the canary that is tried beside it."""
    service: Service = request.app.state.service
    admitted.spend(admitted.body.query, admitted.body.query)
    work = pipeline.compare(service, admitted.body, admitted.exchange)
    (found, answer), beside = await while_connected(request.receive, work)
    champion = query_reply(found, answer, admitted.exchange)
    canary = query_reply(*beside[0], beside[1]) if beside else None
    admitted.spend(*(hit.text for reply in (champion, canary) if reply for hit in reply.hits))
    return _written(CompareReply(champion=champion, canary=canary))


@routes.post("/v1/chat/completions", response_model=ChatReply, openapi_extra=takes(ChatRequest), responses=_STREAMED)
async def chat(request: Request, admitted: Annotated[Asked[ChatRequest], Depends(Door("query", ChatRequest))]) -> Response:
    """The same as /v1/query in the shape of OpenAI's chat completions: the last user message is the question."""
    body, question = admitted.body, admitted.body.question()
    work = partial(_answered, request, admitted, question)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return ChatStream(admitted.exchange, work, question=question, include_usage=usage)
    found, answer = await while_connected(request.receive, work())
    return _written(chat_reply(question, found, answer, admitted.exchange))


@routes.get("/v1/models", dependencies=[Depends(Door("query"))], responses=documented(401, 403, 429))
async def models() -> ModelList:
    """The one model of /v1/chat/completions."""
    return ModelList()


async def _answered(request: Request, admitted: Asked[Any], question: Question) -> tuple[Found, Answer]:
    service: Service = request.app.state.service
    admitted.spend(question.query)
    found, answer = await pipeline.answer(service, question, admitted.exchange)
    admitted.spend(*(hit.text for hit in found.hits), answer.text)
    return found, answer


@routes.post(
    "/v1/feedback", status_code=202, openapi_extra=_FEEDBACK, responses=documented(401, 403, 408, 409, 413, 415, 422, 429, 503, 504)
)
async def feedback(
    request: Request, response: Response, admitted: Annotated[Asked[Feedback], Depends(Door("feedback", Feedback))]
) -> FeedbackReply:
    """A thumb for an answer: its question waits for a judgment, from which the eval set grows. `queued` is false if it waits already."""
    given, trace_id = admitted.body, admitted.exchange.trace_id
    service: Service = request.app.state.service

    async def queue() -> FeedbackReply:
        said = given.model_dump(exclude={"query", "trace_id"})
        queued = await asyncio.to_thread(propose, request.app.state.store, given.query, "feedback", **said)
        telemetry.judged(given.verdict)  # only now: work that failed may be sent again, and is one thumb
        service.traffic.said(given.verdict, snapshot_id=given.snapshot_id, trace_id=given.trace_id or trace_id)
        return FeedbackReply(queued=queued, trace_id=trace_id)

    key = request.headers.get(idempotency.HEADER)
    if key is None:
        return await queue()
    edge: Edge = request.app.state.edge
    reply: FeedbackReply
    reply, again = await edge.feedback.once(admitted.exchange.caller.key_id, key, admitted.raw, queue)
    if again:
        response.headers["Idempotent-Replayed"] = "true"
    return reply


@routes.get("/v1/release", dependencies=[Depends(Door("read"))], responses=documented(401, 403, 429))
async def release(request: Request) -> ReleaseReply:
    """What is live, what was before, what answers here, and the last entries of the ledger."""
    return release_reply(request.app.state.service.live)


@routes.get("/livez", responses=documented())
async def livez() -> dict[str, str]:
    """The process runs."""
    return {"status": "alive"}


@routes.get("/readyz", responses=documented(503))
async def readyz(request: Request) -> dict[str, Any]:
    """A verified, warmed snapshot is open; `problem` says why it is not the ledger's newest, if so."""
    live: Live = request.app.state.service.live
    serving = live.serving
    if serving is None:
        raise live.not_ready()
    problem = release_reply(live).problem
    return {"status": "ready", "snapshot_id": serving.snapshot_id, "release": serving.number, "problem": problem}


@routes.get("/metrics", dependencies=[Depends(Door("read"))], include_in_schema=False)
async def collected(request: Request) -> Response:
    """The metrics of this process, as Prometheus collects them."""
    state = request.app.state
    levels = await asyncio.to_thread(vitals.levels, state.service, state.edge.slots, state.store, state.probe)
    body, media_type = metrics.exposition(levels, accept=request.headers.get("accept", ""))
    return Response(body, media_type=media_type)


@routes.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    return page_file(request, "index.html")


@routes.get("/static/{name}", include_in_schema=False)
async def static(request: Request, name: str) -> Response:
    return page_file(request, name)
