"""Mixed-policy completion (arXiv 2601.09088): the student begins, the teacher finishes.

A student that was trained on its teacher's answers alone has never had to go on from what it says itself. So it answers
training questions, with 1.5 times the tokens that the teacher needed; of an answer that isn't done by then, a prefix is
kept that ends at a random point beyond half, and the teacher completes it. The whole is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from sft.data.read.message import Message
from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record
from sft.data.steps.context import Context
from sft.data.steps.generate.answer import CHAT, Answer, Request, Who
from sft.data.steps.generate.asked import STEP, chat_request, child, completion_request, described, seed_of
from sft.data.steps.generate.asking import Answerer
from sft.data.steps.generate.client import RequestFailedError
from sft.data.steps.generate.usage import Price
from sft.tokenizers.prompt import prompt_text

if TYPE_CHECKING:
    from sft.recipe.steps.generate import GenerateStep

_MOST_TOKENS_OF_A_CHARACTER = 8


class Student(Protocol):
    """Makes the request by which the student answers."""

    def __call__(self, messages: list[Message], seed: int, max_tokens: int) -> Request: ...


class Mixed:
    """Makes a row of each of the student's unfinished answers."""

    def __init__(
        self,
        config: GenerateStep,
        context: Context,
        teacher: Answerer,
        student: Answerer,
        student_request: Student,
        prices: dict[Who, Price],
    ) -> None:
        self._config, self._context, self._prices = config, context, prices
        self._teacher, self._student, self._student_request = teacher, student, student_request

    def student_request(self, record: Record, messages: list[Message], number: int) -> Request:
        """How the student is asked, with as many tokens as it may use."""
        assert record.completion is not None
        length = len(self._context.tokenizer(record.completion, add_special_tokens=False)["input_ids"])
        limit = max(1, min(self._config.max_tokens, int(self._config.cap * length)))
        return self._student_request(messages, seed_of(self._context, "student", record, number), limit)

    async def row(self, record: Record, messages: list[Message], number: int) -> Kept | Dropped:
        """The row of the `number`th answer to `messages`; it isn't measured yet."""
        made = child(record, number)
        if record.completion is None:
            return Dropped(made, "no_conversation", "without the teacher's answer there is no length to go by")
        request = self.student_request(record, messages, number)
        try:
            begun = await self._student.ask(request)
        except RequestFailedError as error:
            return Dropped(made, "request_failed", f"student: {error}")
        made.facts[STEP] = {"student": described(begun, self._prices["student"], request.seed)}
        made.messages = [*messages, {"role": "assistant", "content": begun.text}]
        if not begun.truncated:
            return Dropped(made, "student_finished", f"after {begun.completion_tokens} tokens")
        point = self._context.draw(f"{STEP} cut", record, str(number))
        prefix = cut(self._context.tokenizer, begun.text, point)
        if prefix is None:
            return Dropped(made, "no_answer", "the student's answer is too short to cut")
        made.facts[STEP]["prefix_characters"] = len(prefix)
        return await self._finish(made, record, messages, number, prefix)

    async def _finish(
        self, made: Record, record: Record, messages: list[Message], number: int, prefix: str
    ) -> Kept | Dropped:
        request = self._continuation(messages, prefix, seed_of(self._context, "teacher", record, number))
        try:
            answer = await self._teacher.ask(request)
        except RequestFailedError as error:
            return Dropped(made, "request_failed", f"teacher: {error}")
        made.facts[STEP]["teacher"] = described(answer, self._prices["teacher"], request.seed)
        rest = self._rest(prefix, answer)
        if rest is None:
            return Dropped(made, "restarted", "the teacher began to think anew instead of going on")
        whole = prefix + rest
        made.messages = [*messages, {"role": "assistant", "content": whole}]
        if answer.truncated and self._config.truncated == "drop":
            return Dropped(made, "truncated", f"cut off after {answer.completion_tokens} tokens of the teacher")
        if not rest.strip() or not (answer.truncated or whole.rpartition("</think>")[2].strip()):
            return Dropped(made, "no_answer", f"the teacher added {len(rest)} characters and no answer")
        return Kept(made)

    def _continuation(self, messages: list[Message], prefix: str, seed: int) -> Request:
        config, teacher = self._config, self._config.teacher
        if config.continuation == "completions":
            return completion_request("teacher", teacher, config, self._prompt(messages, prefix), seed)
        unfinished = [*messages, {"role": "assistant", "content": prefix}]
        request = chat_request("teacher", teacher, config, unfinished, seed, config.max_tokens)
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        return Request("teacher", CHAT, {**request.body, **flags}, seed)

    def _prompt(self, messages: Sequence[Message], prefix: str) -> str:
        """The question as the teacher's template renders it, and the answer so far, in the teacher's spelling."""
        tokenizer, marks = self._teacher_tokenizer, self._config.teacher.marks
        text = prompt_text(tokenizer, messages, "The teacher's question")
        if tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
            text = text.removeprefix(tokenizer.bos_token)  # the server puts it there
        if text.rstrip().endswith("<think>") and prefix.lstrip().startswith("<think>"):
            prefix = prefix.lstrip().removeprefix("<think>")
            prefix = prefix.removeprefix("\n") if text.endswith("\n") else prefix
        for ours, theirs in marks.items():
            prefix = prefix.replace(ours, theirs)
        return text + prefix

    def _rest(self, prefix: str, answer: Answer) -> str | None:
        """What the teacher added, in our spelling; None where it didn't go on but began anew."""
        rest, thought = answer.content, answer.reasoning
        for ours, theirs in self._config.teacher.marks.items():
            rest = rest.replace(theirs, ours)
        if self._config.continuation == "chat":
            rest = rest.removeprefix(prefix)  # some servers repeat what they go on from
        if thought.strip():
            if not rest.strip():
                rest = thought
            elif prefix.count("<think>") > prefix.count("</think>"):
                rest = f"{thought.rstrip()}\n</think>\n\n{rest.strip()}"
            else:
                return None
        return None if "<think>" in rest else rest

    @cached_property
    def _teacher_tokenizer(self) -> Any:
        from sft.tokenizers.load import load_tokenizer

        name = self._config.teacher.tokenizer
        return self._context.tokenizer if name is None else load_tokenizer(name)


def cut(tokenizer: Any, text: str, point: float) -> str | None:
    """The beginning of `text` up to a token in its second half: the earliest for `point` 0, the last before 1.

    More than half of the tokens, and never all; None where `text` is too short for that. It ends where a token and a
    character end.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = len(ids) // 2 + 1
    chosen = first + int(point * (len(ids) - first))
    for count in range(chosen, min(chosen + _MOST_TOKENS_OF_A_CHARACTER, len(ids))):
        prefix: str = tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.startswith(prefix) and len(prefix) < len(text):
            return prefix
    return None
