"""The teacher's answers to problems."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from sft.data.read.message import Message
from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record
from sft.data.steps.context import Context
from sft.data.steps.generate.answer import Answer, Request
from sft.data.steps.generate.asked import STEP, chat_request, child, described, seed_of
from sft.data.steps.generate.asking import Answerer
from sft.data.steps.generate.client import RequestFailedError
from sft.data.steps.generate.token_map import TokenMap
from sft.data.steps.generate.usage import Price
from sft.data.steps.top_logprobs.given import BadTopError, NoTokenError, from_named
from sft.data.steps.top_logprobs.vocabulary import OwnVocabulary

if TYPE_CHECKING:
    from sft.recipe.steps.generate import GenerateStep


class Rollouts:
    """Makes a row of each answer."""

    def __init__(self, config: GenerateStep, context: Context, teacher: Answerer, price: Price) -> None:
        self._config, self._context, self._teacher, self._price = config, context, teacher, price

    async def row(self, record: Record, messages: list[Message], number: int) -> Kept | Dropped:
        """The row of the `number`th answer to `messages`; it isn't measured yet."""
        made, request = child(record, number), self._request(record, messages, number)
        try:
            answer = await self._teacher.ask(request)
        except RequestFailedError as error:
            return Dropped(made, "request_failed", str(error))
        made.facts[STEP] = described(answer, self._price, request.seed)
        made.messages = [*messages, {"role": "assistant", "content": answer.text}]
        dropped = fault(made, answer, self._config)
        if dropped is None and self._config.logprobs:
            self._keep_logprobs(made, answer)
        if dropped is None and self._config.top_logprobs is not None:
            self._keep_top(made, answer)
        return dropped or Kept(made)

    def _request(self, record: Record, messages: list[Message], number: int) -> Request:
        config, seed = self._config, seed_of(self._context, "teacher", record, number)
        return chat_request("teacher", config.teacher, config, messages, seed, config.max_tokens)

    def _keep_logprobs(self, made: Record, answer: Answer) -> None:
        if answer.tokens is None:
            found: tuple[list[int], list[float]] | str = "the server gave none"
        else:
            found = self._token_map.ids(answer.tokens, answer.text)
        if isinstance(found, str):
            made.facts[STEP]["no_logprobs"] = found
        else:
            made.teacher_ids, made.teacher_logprobs = found

    def _keep_top(self, made: Record, answer: Answer) -> None:
        if answer.tokens is None or answer.top is None:
            made.facts[STEP]["no_top_logprobs"] = "the server gave none"
            return
        try:
            made.teacher_top = from_named(answer.tokens, answer.top, self._own)
        except (BadTopError, NoTokenError) as error:
            made.facts[STEP]["no_top_logprobs"] = str(error)

    @cached_property
    def _own(self) -> OwnVocabulary:
        return OwnVocabulary(self._context.tokenizer)

    @cached_property
    def _token_map(self) -> TokenMap:
        return TokenMap(self._context.tokenizer)


def fault(made: Record, answer: Answer, config: GenerateStep) -> Dropped | None:
    """Why the answer that `made` holds can't be used, or None."""
    if answer.truncated and config.truncated == "drop":
        return Dropped(made, "truncated", f"cut off after {answer.completion_tokens or config.max_tokens} tokens")
    if answer.silent and not (answer.truncated and answer.text.strip()):
        return Dropped(made, "no_answer", f"nothing said beyond thinking, finish_reason {answer.finish_reason}")
    return None
