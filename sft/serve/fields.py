"""The fields of requests: the OpenAI API's, and those that vLLM adds for sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from sft.serve.errors import ApiError
from sft.serve.settings import LONGEST_STOP, MOST_ANSWERS, MOST_LIKELIEST, MOST_STOPS

_INT64 = 1 << 63
_INT32 = 1 << 31

# Fields that have no part in the answer; any value is right.
_NO_PART = frozenset("user metadata service_tier parallel_tool_calls safety_identifier prompt_cache_key".split())
# What the engine doesn't do: the values by which nothing is asked of it.
_NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "store": (False,),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


def _form(value: Any) -> str:
    """Which of a field's forms is meant: only what is wrong with that one is told."""
    return "a list" if isinstance(value, list) else "a text"


_FORM = Discriminator(_form)
_StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
_Stops = Annotated[list[_StopText], Field(max_length=MOST_STOPS, fail_fast=True)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Fields):
    """Of a streamed answer."""

    include_usage: bool | None = None


class Sampling(_Fields):
    """What both kinds of requests have; null is the same as nothing. Limits keep one request from failing others."""

    model: str = Field(max_length=1024)
    n: int | None = Field(default=None, ge=1, le=MOST_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=_INT32)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, lt=_INT32)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: Annotated[Annotated[_StopText, Tag("a text")] | Annotated[_Stops, Tag("a list")], _FORM] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    skip_special_tokens: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer, if the request says so."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many log-probabilities each token gets beside its own; None: not even its own."""
        raise NotImplementedError


class Part(_Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str


_Parts = Annotated[list[Part], Field(max_length=4096, fail_fast=True)]


class Message(_Fields):
    """A message; what an answer's message has beside it, and what is empty, may be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[str, Tag("a text")] | Annotated[_Parts, Tag("a list")], _FORM]
    name: str | None = Field(default=None, max_length=256)
    reasoning_content: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """Its parts, put together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatFields(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELIEST)
    include_reasoning: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        """See `Sampling`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """See `Sampling`."""
        if not self.logprobs and self.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if self.logprobs and self.include_reasoning is False:
            # Tokens aren't cut where thinking ends: it would stand in theirs.
            text = "logprobs tell the thinking that include_reasoning: false leaves out; leave out one of the two."
            raise ApiError(400, text, param="include_reasoning")
        return (self.top_logprobs or 0) if self.logprobs else None


class TextFields(Sampling):
    """The body of /v1/completions; `prompts` tells the forms of `prompt`."""

    prompt: Any
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELIEST)

    @property
    def most_tokens(self) -> int | None:
        """See `Sampling`; 16, as the API has it."""
        return self.max_tokens or 16

    @property
    def likeliest(self) -> int | None:
        """See `Sampling`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """A text, several, token ids, or several lists of those: as a list of texts and lists of ids."""
        prompt = self.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        found = prompt if several else [prompt]
        if len(found) > MOST_ANSWERS:
            raise ApiError(400, f"prompt: at most {MOST_ANSWERS} prompts in a request.", param="prompt")
        for one in found:
            ids = isinstance(one, list) and all(type(token) is int and 0 <= token < _INT32 for token in one)
            if not one or not (ids or isinstance(one, str)):
                text = "prompt must be a text or a list of token ids, which isn't empty, or a list of such."
                raise ApiError(400, text, param="prompt")
        return found


_NAMES = {name for kind in (ChatFields, TextFields, StreamOptions, Message, Part) for name in kind.model_fields}
Asked = TypeVar("Asked", bound=Sampling)


def read_fields(kind: type[Asked], body: Any) -> Asked:
    """The fields of a request's body (JSON as read).

    Raises:
        ApiError: 400, by name, for a field that isn't known, isn't right, or asks for what the engine doesn't do.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    fields = {}
    for name, value in body.items():
        if name in kind.model_fields:
            fields[name] = value
        elif name in _NOTHING_ASKED:
            if value is not None and value not in _NOTHING_ASKED[name]:
                text = f"{name}: this server doesn't support it; leave it out."
                raise ApiError(400, text, param=name, code="unsupported_parameter")
        elif name not in _NO_PART:
            text = f"Unrecognized request argument supplied: {name[:100]}"
            raise ApiError(400, text, param=name, code="unknown_parameter")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # What stands between brackets, or is no name, says which of several forms was tried.
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _NAMES)
        raise ApiError(400, f"{place}: {first['msg']}", param=str(first["loc"][0])) from None
