"""What both modes share: the question of a row, the requests for it, and the rows that the answers make."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from sft.data.read.message import Message
from sft.data.read.record import Record
from sft.data.steps.context import Context
from sft.data.steps.generate.answer import CHAT, COMPLETIONS, Answer, Request, Who
from sft.data.steps.generate.usage import Price
from sft.recipe.steps.generate import Endpoint, GenerateStep

STEP = "generate"


def question(record: Record, context: Context) -> list[Message] | None:
    """The messages up to the answer: of a conversation all before its last answer, else the problem in its templates.

    None where there is nothing to answer.
    """
    if record.messages is None:
        return context.templates.conversation(record.problem, "")[:-1] if record.problem else None
    last = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    messages = record.messages[: last[-1]] if last else record.messages
    return messages if any(message["role"] == "user" for message in messages) else None


def seed_of(context: Context, who: Who, record: Record, number: int) -> int:
    """The seed of a row's `number`th answer, in [0, 2^31)."""
    return int(context.draw(f"{STEP} {who}", record, str(number)) * (1 << 31))


def chat_request(
    who: Who, endpoint: Endpoint, config: GenerateStep, messages: list[Message], seed: int, max_tokens: int
) -> Request:
    """A request for the next message."""
    return Request(
        who, CHAT, {**_body(endpoint, config, seed), "messages": messages, endpoint.max_tokens_key: max_tokens}, seed
    )


def completion_request(who: Who, endpoint: Endpoint, config: GenerateStep, prompt: str, seed: int) -> Request:
    """A request for what follows a text."""
    body = {**_body(endpoint, config, seed), "prompt": prompt, "max_tokens": config.max_tokens}
    return Request(who, COMPLETIONS, body, seed)


def _body(endpoint: Endpoint, config: GenerateStep, seed: int) -> dict[str, Any]:
    body: dict[str, Any] = {"model": endpoint.model, "temperature": config.temperature, "top_p": config.top_p}
    if endpoint.send_seed:
        body["seed"] = seed
    if config.logprobs or config.top_logprobs is not None:
        body["logprobs"] = True
    if config.top_logprobs is not None:
        body["top_logprobs"] = config.top_logprobs
    return {**{key: value for key, value in body.items() if value is not None}, **endpoint.extra_body}


def child(record: Record, number: int) -> Record:
    """The row of a record's `number`th answer, still without one."""
    said = [n for n, message in enumerate(record.messages or ()) if message["role"] == "assistant"]
    made = replace(
        record,
        id=f"{record.id}#g{number}",
        messages=None,
        untrained=[n for n in record.untrained if n != said[-1]],  # another answer stands there
        carried=copy.deepcopy(record.carried),
        facts=copy.deepcopy(record.facts),
        teacher_ids=None,
        teacher_logprobs=None,
        teacher_top=None,
    )
    made.forget_tokens()
    return made


def described(answer: Answer, price: Price, seed: int) -> dict[str, Any]:
    """What is noted of an answer."""
    return {
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "cost": round(price.of(answer), 9),
        "model": answer.model,
        "seed": seed,
    }
