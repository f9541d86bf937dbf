"""Phase six of a request: the answer. A language model writes it if there is one and passages are quoted if not, or if it fails.

What the model writes is filtered (answer_filter.py) and checked against the passages (citations.py) sentence by sentence, and only then told.
So whatever was told stays true when the model breaks off: its checked sentences are the answer, marked as degraded. Nothing is asked again
after the first word.
"""

import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from rag_serving import telemetry
from rag_serving.context import Passage
from rag_serving.deadline import Deadline
from rag_serving.errors import LanguageModelError
from rag_serving.exchange import Exchange
from rag_serving.settings import Guards
from rag_serving.signals import contract, trace
from rag_serving.writing.answer_filter import AnswerFilter, filter_answer
from rag_serving.writing.citations import CitationCheck
from rag_serving.writing.extraction import NOTHING_FOUND, Answer, extract
from rag_serving.writing.llm import LanguageModel, Usage
from rag_serving.writing.prompting import draw_nonce, prompt

RESERVE_SECONDS = 0.2  # of a request's time, kept for quoting and for the reply
WITHHELD = "The answer is withheld: it holds what answers may not hold."

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Writer:
    """What answers: a language model or none, at most `seconds` for each answer, under the rules for answers."""

    model: LanguageModel | None
    seconds: float
    rules: Guards

    async def answer(self, query: str, passages: Sequence[Passage], exchange: Exchange) -> Answer:
        """The answer to `query` out of the passages. The exchange hears its text as it becomes certain; the whole is what it heard.

        Never fails because of the model: `exchange.degraded` has "llm" and `Answer.problem` says why when its answer is not, or not all, here.
        """
        if not passages or self.model is None:
            return await self._quoted(query, passages, exchange)
        try:
            return await self._written(self.model, query, passages, exchange)
        except LanguageModelError as error:
            log.warning("passages are quoted instead: %s", error)
            exchange.degrade("llm")
            await exchange.dropped()
            return replace(await self._quoted(query, passages, exchange), problem=error.reason)

    async def aclose(self) -> None:
        if self.model is not None:
            await self.model.aclose()

    async def _quoted(self, query: str, passages: Sequence[Passage], exchange: Exchange) -> Answer:
        """Sentences of the passages; what stands in them is filtered too, since whoever shows an answer may make links of it."""
        quoted = extract(query, passages)
        with trace.guarding("output"):
            shown = filter_answer(quoted.text, self.rules, hits=[passage.hit for passage in passages])
            exchange.guarded(shown.events)
        answer = Answer(WITHHELD, abstained=True) if shown.blocked else replace(quoted, text=shown.text)
        await exchange.wrote(answer.text)
        return answer

    async def _written(self, model: LanguageModel, query: str, passages: Sequence[Passage], exchange: Exchange) -> Answer:
        """LanguageModelError when nothing of what the model wrote may stand."""
        nonce, usage, failure = draw_nonce(), Usage(), None
        through, check = AnswerFilter(self.rules, hits=[passage.hit for passage in passages], canary=nonce), CitationCheck(query, passages)
        deadline = Deadline.after(min(self.seconds, exchange.deadline.remaining - RESERVE_SECONDS))
        try:
            with telemetry.chatting(model.model) as call:
                try:
                    async with aclosing(model.write(prompt(query, passages, nonce=nonce), deadline=deadline, usage=usage)) as pieces:
                        async for piece in pieces:
                            call.began()
                            await exchange.wrote(check.feed(through.feed(piece)))
                            if through.blocked or through.full:
                                break
                finally:
                    trace.record({contract.INPUT_TOKENS: usage.prompt_tokens or 0, contract.OUTPUT_TOKENS: usage.completion_tokens or 0})
                    telemetry.ended(usage.ended)
        except LanguageModelError as error:
            failure = error
        with trace.guarding("output"):
            rest = "" if through.blocked else check.feed(through.close()) + check.finish(whole=failure is None and not through.full)
            exchange.guarded(through.events)
        if through.blocked:
            raise LanguageModelError(f"what {model.model!r} wrote is withheld: {_rules(through)}.", reason="withheld")
        await exchange.wrote(rest)
        answer = check.answer
        if failure is not None and answer is None:
            raise failure
        if answer is None:
            answer = Answer(NOTHING_FOUND, abstained=True, generated=True, flags=check.flags)
            await exchange.wrote(answer.text)
        if failure is not None:
            log.warning("the answer is not whole: %s", failure)
            exchange.degrade("llm")
        read, written = usage.prompt_tokens or 0, usage.completion_tokens or 0
        return replace(answer, problem=failure.reason if failure else None, tokens_read=read, tokens_written=written)


def _rules(through: AnswerFilter) -> str:
    return ", ".join(event.rule for event in through.events if event.action == "block")
