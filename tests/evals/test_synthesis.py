"""Synthetic queries: what is kept, what is left out and why."""

import asyncio
import json

import pytest

from evals.synthesis import SourcePassage, synthesize

PASSAGE = SourcePassage(
    "s3.DeleteBucket", "Delete Bucket", "Deletes the bucket. All objects in the bucket must be deleted before the bucket itself can go."
)


def made(reply: str, *, found: tuple[str, ...] = ("other", "s3.DeleteBucket")):
    prompts = []

    async def ask(prompt: str) -> str:
        prompts.append(prompt)
        return reply

    async def retrieve(query: str) -> tuple[str, ...]:
        return found

    (result,) = asyncio.run(synthesize([PASSAGE], ask=ask, retrieve=retrieve, model="m-1"))
    return result, prompts[0]


def test_a_kept_query_is_marked_synthetic():
    """A good question that finds its own document is kept, marked with who wrote it; the prompt held the passage as data."""
    result, prompt = made(json.dumps({"question": "how do I remove a bucket that is not empty"}))
    assert result.query is not None
    assert result.query.text == "how do I remove a bucket that is not empty"
    assert result.query.metadata == {"synthetic": True, "written_by": "m-1"}
    assert PASSAGE.text in prompt


def test_json_within_chatter_is_found():
    """Models wrap JSON in fences and words; the question is taken out of them."""
    result, _ = made('Sure!\n```json\n{"question": "how can one empty and remove a bucket"}\n```')
    assert result.query is not None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("no json here", "no question"),
        ('{"question": "bucket?"}', "no question"),
        ('{"answer": "x"}', "no question"),
        ('{"question": "what does the passage say about deletion"}', "passage itself"),
        ('{"question": "is it so that all objects in the bucket must be deleted before the bucket itself"}', "quotes"),
    ],
)
def test_unusable_questions_are_left_out_with_a_reason(reply, reason):
    """No question, too short, about "the passage", or a quotation of it: not kept, and the reason says which."""
    result, _ = made(reply)
    assert result.query is None
    assert reason in result.rejected


def test_a_question_that_does_not_lead_back_is_left_out():
    """The round trip: a question that does not find its own document tests nothing and is not kept."""
    result, _ = made('{"question": "how do I remove a bucket that is not empty"}', found=("other",))
    assert result.query is None
    assert "not found" in result.rejected
