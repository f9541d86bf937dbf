"""OpenAI's chat completions: the official client works unmodified, streaming and not, and gets citations besides."""

import json

import openai
import pytest
from scripted_model import answering, scripted
from small_service import build, release, settings_for

from rag_serving.store import LocalStore

QUESTION = "How do I delete a bucket?"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    store = LocalStore(root)
    release(store, build(store, settings_for(root)))
    return root, store


@pytest.fixture(scope="module")
def service(released):
    """A service with a scripted model, and the model's script."""
    with scripted() as (url, script), answering(*released, url) as client:
        yield client, script


@pytest.fixture(scope="module")
def openai_client(service):
    with openai.OpenAI(base_url=f"{service[0].base_url}/v1", api_key="anything", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def _quoting(service):
    service[1].mode = "quote"


def test_a_completion_has_an_answer_and_what_it_rests_on(service, openai_client):
    """The message is the answer of /v1/query; citations and where it comes from ride along as fields of their own."""
    reply = openai_client.chat.completions.create(model="ragline", messages=ASKED)
    same = service[0].post("/v1/query", json={"query": QUESTION}).json()
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (same["answer"], "stop")
    assert reply.model == "ragline"
    assert reply.citations == same["citations"]
    assert reply.ragline["snapshot_id"] == same["snapshot_id"]
    assert (reply.ragline["groundedness"], reply.ragline["degraded"]) == (1.0, same["degraded"])
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 1


def test_a_stream_is_the_same_in_pieces(openai_client):
    """The chunks' contents together are the answer; the last choice says why it ended and what it rests on; usage comes when asked for."""
    whole = openai_client.chat.completions.create(model="ragline", messages=ASKED)
    chunks = list(openai_client.chat.completions.create(model="any", messages=ASKED, stream=True, stream_options={"include_usage": True}))
    told = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in told] == [None] * (len(told) - 1) + ["stop"]
    assert next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason).citations == whole.citations
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_is_not_sent_unasked(openai_client):
    """Without include_usage no chunk has an empty list of choices."""
    chunks = list(openai_client.chat.completions.create(model="ragline", messages=ASKED, stream=True))
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize("mode", ["hang", "cut", "error"])
def test_a_failing_model_still_completes(released, mode):
    """When the model fails, the completion is what stood before or what passages say, streamed or not, and says that it is degraded."""
    with (
        scripted(mode) as (url, _),
        answering(*released, url, llm_timeout_seconds=0.3) as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="anything", max_retries=0) as official,
    ):
        whole = official.chat.completions.create(model="ragline", messages=ASKED)
        chunks = list(official.chat.completions.create(model="ragline", messages=ASKED, stream=True))
    assert "Deletes the bucket." in whole.choices[0].message.content
    assert "llm" in whole.ragline["degraded"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == whole.choices[0].message.content


def test_length_is_a_finish_reason(service, openai_client):
    """A model that ran into its limit finishes with `length`."""
    service[1].mode = "length"
    assert openai_client.chat.completions.create(model="ragline", messages=ASKED).choices[0].finish_reason == "length"


def test_the_last_user_message_is_the_question(service, openai_client):
    """Of a conversation only the last question is asked; parts of text are joined, and settings of other models have no effect."""
    turns = [
        {"role": "user", "content": "How do I create a user?"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "How do I"}, {"type": "text", "text": "delete a bucket?"}]},
        {"role": "assistant", "content": "Let me see."},
    ]
    reply = openai_client.chat.completions.create(
        model="gpt-9", messages=turns, temperature=1.5, max_tokens=10, top_p=0.1, stop=["x"], user="u", presence_penalty=1, seed=3
    )
    assert reply.citations[0]["doc_id"] == "s3.DeleteBucket"
    assert service[1].requests[-1]["messages"][-1]["content"].endswith("Question: How do I delete a bucket?")


def test_models_are_listed(openai_client):
    """A client that lists models finds one."""
    assert [model.id for model in openai_client.models.list()] == ["ragline"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"messages": []}, "invalid_field"),
        ({}, "invalid_field"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_field"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty_query"),
        ({"messages": [{"role": "user", "content": None}]}, "empty_query"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "empty_query"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "query_too_long"),
        ({"messages": [{"role": "user", "content": "a\x00b"}]}, "invalid_characters"),
        ({"messages": ASKED, "n": 2}, "invalid_field"),
        ({"messages": ASKED, "max_tokens": 1_000_000}, "invalid_field"),
        ({"messages": ASKED, "temperature": 9}, "invalid_field"),
        ({"messages": "hello"}, "invalid_field"),
        ({"messages": ASKED, "stream": "yes"}, "invalid_field"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_as_openai_does(service, body, code, stream):
    """A request that cannot be answered gets 422 and an `error` object with a message, a type and a code, whether or not it streams."""
    response = service[0].post("/v1/chat/completions", json={"stream": stream, **body})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (422, code, "invalid_request_error")
    assert error["message"]


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[]", b'{"messages": NaN}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}'])
def test_bodies_that_are_no_requests(service, raw):
    """Bytes that are no JSON object, or no text, are refused with a client error."""
    response = service[0].post("/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code in {400, 422}
    assert response.json()["error"]["code"]


def test_the_client_raises_its_own_errors(openai_client):
    """The official client turns a refusal into the error that it documents, with our code."""
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        openai_client.chat.completions.create(model="ragline", messages=[{"role": "user", "content": " "}])
    assert caught.value.code == "empty_query"


def test_a_broken_stream_raises_in_the_client(service, openai_client, monkeypatch):
    """An error after the first chunk reaches the official client as an error, not as an end."""

    async def broken(_writer, _query, _passages, exchange) -> None:
        await exchange.wrote("One moment")
        raise RuntimeError("secret detail")

    monkeypatch.setattr("rag_serving.generation.Writer.answer", broken)
    stream = openai_client.chat.completions.create(model="ragline", messages=ASKED, stream=True)
    with pytest.raises(openai.APIError, match="log has the details") as caught:
        list(stream)
    assert "secret" not in json.dumps(caught.value.body)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ({"content": b"x" * (65 << 10)}, "body_too_long"),
        ({"content": (b"x" * (33 << 10) for _ in range(2))}, "body_too_long"),
        ({"headers": {"Host": "evil.example"}}, "unknown_host"),
        ({"headers": {"X-Long": "x" * (17 << 10)}}, "headers_too_long"),
    ],
    ids=["stated length", "while it arrives", "host", "headers"],
)
def test_what_is_refused_at_the_edge_is_an_error_for_openai_too(service, sent, code):
    """Refusals before a request is looked at have the shape that OpenAI's clients read as well."""
    reply = service[0].post("/v1/chat/completions", **sent)
    assert (reply.json()["code"], reply.json()["error"]["code"]) == (code, code)
