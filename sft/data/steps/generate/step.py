"""The step `generate`: a teacher answers, or finishes what the student began."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from sft.data.read.message import Message
from sft.data.read.outcomes import Dropped, Kept, Outcome, Replaced
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.data.steps.context import Context
from sft.data.steps.generate.answer import CHAT, Request, Who
from sft.data.steps.generate.asked import chat_request, question
from sft.data.steps.generate.asking import Answerer, Desk, FailureLimit
from sft.data.steps.generate.client import Client
from sft.data.steps.generate.journal import Journal
from sft.data.steps.generate.local_student import LocalStudent
from sft.data.steps.generate.loop import Loop, flowing, together
from sft.data.steps.generate.mixed import Mixed
from sft.data.steps.generate.rollouts import Rollouts
from sft.data.steps.generate.usage import Price, Usage
from sft.recipe.steps.generate import Checkpoint, Endpoint, GenerateStep
from sft.tokenizers.control import ControlTokens
from sft.tokenizers.load import load_tokenizer
from sft.utils.errors import UserError
from sft.utils.files import sha256_file, sha256_json, write_sealed

log = logging.getLogger(__name__)

USAGE = "usage.json"
_RECORDS_IN_MEMORY = 8
_Asked = tuple[Record, list[Message], int]


class Generate(RowStep):
    """Puts in the place of each row one row for each answer.

    Answers are kept in a journal that every run shares which asks the same models in the same way, so that nothing is
    paid for twice, and in the step's folder `usage.json`: requests, retries, tokens, cost and seconds of that journal.
    """

    config: GenerateStep
    uses_tokenizer = True
    changes_text = True

    @classmethod
    def parallel(cls, config: GenerateStep) -> bool:
        """One process keeps all requests on their way; the work is the server's."""
        return False

    @classmethod
    def settings(cls, config: GenerateStep) -> dict[str, Any]:
        """The settings that decide the answers: a run goes on with its journal when it is asked faster or elsewhere."""
        return config.deciding()

    @classmethod
    def identity(cls, config: GenerateStep) -> dict[str, Any]:
        """Content of what the settings name on this machine: the student's checkpoint, the teacher's tokenizer."""
        found: dict[str, Any] = {}
        if isinstance(config.student, Checkpoint):
            found["student"] = _folder_hash(config.student.checkpoint)
        if config.teacher.tokenizer is not None:
            found["teacher_tokenizer"] = _folder_hash(config.teacher.tokenizer)
        return found

    def __init__(self, config: GenerateStep, context: Context) -> None:
        super().__init__(config, context)
        self._usage = Usage({who: _price(endpoint) for who, endpoint in self._models().items()})
        self._journal = Journal(context.journal / self._asked_how(config), self._usage.add)
        self._limit = FailureLimit(config.max_failed)
        self._loop = Loop()
        self._desks: list[Desk] = []
        self._student: Answerer | None = None
        self._mode = self._make_mode()
        self._asked_ahead = False

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Reasons: no_problem, tools, control_token, request_failed, truncated, no_answer; mixed: no_conversation,
        student_finished, restarted.

        First all answers are asked for, then the rows are made of what the journal holds, a few at a time: the answers
        to a batch may not fit into memory.
        """
        if not self._asked_ahead:
            self._ask([batch])
        questions = [self._question(record) for record in batch]
        write_sealed(self.context.folder / USAGE, self._usage.described())
        for start in range(0, len(batch), _RECORDS_IN_MEMORY):
            part = slice(start, start + _RECORDS_IN_MEMORY)
            yield from self._outcomes(batch[part], questions[part])

    def ahead(self, batches: Iterable[list[Record]]) -> None:
        """Ask for the answers to all rows: as many requests as the endpoint takes are on their way all the time."""
        self._ask(batches)
        self._asked_ahead = True

    def close(self) -> None:
        """Close connections and journal; say what was used."""
        for desk in self._desks:
            self._loop.run(desk.close())
        self._desks = []
        self._loop.close()
        self._journal.close()
        write_sealed(self.context.folder / USAGE, self._usage.described())
        log.info("generate: %s", self._usage.sentence())

    def _question(self, record: Record) -> list[_Asked] | Dropped:
        """The record's question, once for each answer."""
        messages = question(record, self.context)
        if messages is None:
            return Dropped(record, "no_problem", "there is no question to answer")
        if record.tools or any("tools" in message or "tool_calls" in message for message in messages):
            return Dropped(record, "tools", "an endpoint isn't told of tools or their calls")
        text = "\n".join(message["content"] for message in messages)
        found = next(filter(None, (control.find(text) for control in self._control)), None)
        if found is not None:
            return Dropped(record, "control_token", f"the question spells out {found}")
        return [(record, messages, number) for number in range(self.config.n)]

    def _ask(self, batches: Iterable[list[Record]]) -> None:
        """Get everything that is asked into the journal."""
        for desk in self._desks:
            desk.forget_failures()

        async def ask(item: _Asked) -> None:
            await self._mode.row(*item)

        window = 2 * max((desk.concurrency for desk in self._desks), default=1)
        if not isinstance(self._mode, Mixed) or not isinstance(self._student, LocalStudent):
            self._loop.run(flowing(ask, (item for batch in batches for item in self._items(batch)), window))
            return
        for batch in batches:
            items = self._items(batch)
            self._student.prepare([self._mode.student_request(*item) for item in items if item[0].completion])
            self._loop.run(flowing(ask, items, window))

    @cached_property
    def _control(self) -> list[ControlTokens]:
        """What no question may spell out: neither in the tokenizer that is trained with nor where one is rendered."""
        tokenizers = [self.context.tokenizer]
        if self.config.teacher.tokenizer is not None:
            tokenizers.append(load_tokenizer(self.config.teacher.tokenizer))
        if isinstance(student := self.config.student, Checkpoint):
            tokenizers.append(load_tokenizer(student.checkpoint, revision=student.revision))
        return [ControlTokens(tokenizer) for tokenizer in tokenizers]

    def _items(self, batch: list[Record]) -> list[_Asked]:
        questions = [self._question(record) for record in batch]
        return [item for found in questions if not isinstance(found, Dropped) for item in found]

    def _outcomes(self, batch: list[Record], questions: list[list[_Asked] | Dropped]) -> Iterator[Outcome]:
        asked = [item for found in questions if not isinstance(found, Dropped) for item in found]
        rows = self._loop.run(together(lambda item: self._mode.row(*item), asked))
        made = iter(rows)
        for record, found in zip(batch, questions, strict=True):
            if isinstance(found, Dropped):
                yield found
                continue
            mine = [next(made) for _ in found]
            kept = [row.record for row in mine if isinstance(row, Kept)]
            yield Replaced(record, kept, [row for row in mine if isinstance(row, Dropped)])

    @classmethod
    def _asked_how(cls, config: GenerateStep) -> str:
        """What all requests of these settings have in common; how many answers are wanted isn't part of a request."""
        settings = {key: value for key, value in config.deciding().items() if key not in ("n", "truncated")}
        return f"answers-{sha256_json({'settings': settings, **cls.identity(config)})[:32]}"

    def _models(self) -> dict[Who, Endpoint | Checkpoint]:
        models: dict[Who, Endpoint | Checkpoint] = {"teacher": self.config.teacher}
        return models if self.config.student is None else {**models, "student": self.config.student}

    def _make_mode(self) -> Rollouts | Mixed:
        teacher, prices = self._desk(self.config.teacher), dict(self._usage.prices)
        if self.config.student is None:
            return Rollouts(self.config, self.context, teacher, prices["teacher"])
        self._student = self._make_student(self.config.student)
        return Mixed(self.config, self.context, teacher, self._student, self._student_request, prices)

    def _make_student(self, student: Endpoint | Checkpoint) -> Answerer:
        return LocalStudent(student, self._journal) if isinstance(student, Checkpoint) else self._desk(student)

    def _desk(self, endpoint: Endpoint) -> Desk:
        self._desks.append(Desk(Client(endpoint), self._journal, self._limit))
        return self._desks[-1]

    def _student_request(self, messages: list[Message], seed: int, max_tokens: int) -> Request:
        student = self.config.student
        if isinstance(student, Endpoint):
            return chat_request("student", student, self.config, messages, seed, max_tokens)
        assert student is not None
        # What is sampled follows from the request: where the checkpoint lies is no part of it.
        body = {"content": _folder_hash(student.checkpoint), "dtype": student.dtype}
        sampling = {"temperature": self.config.temperature, "top_p": self.config.top_p, "max_tokens": max_tokens}
        return Request("student", CHAT, {**body, **sampling, "messages": messages}, seed)


def _price(model: Endpoint | Checkpoint) -> Price:
    return Price(model.input_price, model.output_price) if isinstance(model, Endpoint) else Price()


@cache
def _folder_hash(name: str) -> dict[str, str] | str:
    """SHA-256 of each file of a folder; the name itself where it is a Hub id.

    Raises UserError when it looks like a folder and isn't there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"The step generate names {name}, and there is no such folder.")
    return name
