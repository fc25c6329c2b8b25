"""From a request's body to what the engine is asked."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from sft.generate.sampling import SamplingParams
from sft.generate.text import opens_thinking
from sft.serve.body import parse
from sft.serve.errors import ApiError
from sft.serve.fields import ChatFields, Sampling, TextFields, read_fields
from sft.serve.settings import MOST_ANSWERS, Settings
from sft.tokenizers.prompt import prompt_text
from sft.tokenizers.vocabulary import check_vocabulary, outside
from sft.utils.errors import UserError

CONTEXT = "context_length_exceeded"


@dataclass(frozen=True)
class Job:
    """A request that can be answered.

    Attributes:
        prompts: token ids, each answered `n` times.
        params: of each prompt's answers.
        opened: the prompt ends where thinking begins.
        thinking: what becomes of it: a field of its own, a part of the text, or nothing.
    """

    asked: Sampling
    chat: bool
    prompts: list[list[int]]
    params: list[SamplingParams]
    n: int
    opened: bool = False
    thinking: str = "text"

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.asked.stream_options and self.asked.stream_options.include_usage)


class Reader:
    """Reads requests to one model: takes time, and holds for one request at once."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    def read(self, body: bytes, chat: bool) -> Job:
        """The job that a body asks for. Raises ApiError."""
        value = parse(body)
        try:
            return self._chat(read_fields(ChatFields, value)) if chat else self._text(read_fields(TextFields, value))
        except UserError as error:
            raise ApiError(400, str(error)) from None

    def _chat(self, asked: ChatFields) -> Job:
        self._check(asked)
        messages = [
            # Thinking of earlier turns isn't read again: models are trained with their answers alone.
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in asked.messages
        ]
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        rendered = prompt_text(self.tokenizer, messages)
        prompt = self._tokens(rendered, special=False, param="messages")
        thinking = "field" if self.settings.separate_thinking else "text"
        if asked.include_reasoning is False:
            thinking = "nothing"
        opened = opens_thinking(rendered)
        return Job(asked, True, [prompt], [self._params(asked, prompt)], asked.n or 1, opened, thinking)

    def _text(self, asked: TextFields) -> Job:
        self._check(asked)
        prompts = []
        for one in asked.prompts:
            if isinstance(one, str):
                self._check_length(len(one), "prompt")
                one = self._tokens(one, special=True, param="prompt")
                check_vocabulary(self.model, max(one))
            elif wrong := outside(self.model, one):
                raise ApiError(400, f"prompt: {wrong}.", param="prompt")
            prompts.append(one)
        if len(prompts) * (asked.n or 1) > MOST_ANSWERS:
            raise ApiError(400, f"At most {MOST_ANSWERS} answers to a request: prompts times n.", param="n")
        return Job(asked, False, prompts, [self._params(asked, prompt) for prompt in prompts], asked.n or 1)

    def _check(self, asked: Sampling) -> None:
        if asked.model != self.settings.name:
            text = f"The model `{asked.model}` does not exist; this server has `{self.settings.name}`."
            raise ApiError(404, text, param="model", code="model_not_found")
        if asked.temperature is not None and 0 < asked.temperature < 0.01:
            # Logits divided by less come to infinities.
            raise ApiError(400, "temperature must be 0 (greedy), or from 0.01 to 2.", param="temperature")
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options needs stream: true.", param="stream_options")

    def _check_length(self, characters: int, param: str) -> None:
        """Refuse what is too long however it is cut into tokens, without cutting it."""
        if characters > self.settings.max_length * self._longest_token:
            raise self._too_long(f"more than {self.settings.max_length}", param)

    def _tokens(self, text: str, *, special: bool, param: str) -> list[int]:
        if not _encodable(text):
            raise ApiError(400, f"{param}: holds characters that are no Unicode text.", param=param)
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _params(self, asked: Sampling, prompt: list[int]) -> SamplingParams:
        room = self.settings.max_length - len(prompt)
        if room < 1:
            raise self._too_long(str(len(prompt)), "messages" if isinstance(asked, ChatFields) else "prompt")
        most = asked.most_tokens
        if most is not None and most > room and not (isinstance(asked, TextFields) and asked.max_tokens is None):
            text = (
                f"max_tokens {most} and the prompt's {len(prompt)} tokens are more than this server's maximum context "
                f"length of {self.settings.max_length} tokens."
            )
            raise ApiError(400, text, param="max_tokens", code=CONTEXT)
        return SamplingParams(
            max_new_tokens=min(room, most or room),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=max(0, asked.top_k or 0),
            min_p=asked.min_p or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            presence_penalty=asked.presence_penalty or 0.0,
            stop=asked.stops,
            stop_token_ids=frozenset(asked.stop_token_ids or ()),
            logprobs=asked.likeliest,
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        )

    def _too_long(self, tokens: str, param: str) -> ApiError:
        text = (
            f"This server's maximum context length is {self.settings.max_length} tokens; the prompt has {tokens}, and "
            "an answer needs at least one."
        )
        return ApiError(400, text, param=param, code=CONTEXT)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
