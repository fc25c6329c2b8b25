"""A request to a model and the answer that came back, as they are journaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sft.data.read.message import REASONING_KEYS
from sft.utils.files import sha256_json

Who = Literal["teacher", "student"]
Named = tuple[bytes | None, float]
"""A token by its bytes (None where they aren't known), and its natural log probability."""

CHAT = "chat/completions"
COMPLETIONS = "completions"


@dataclass(frozen=True)
class Request:
    """What is asked, before anything that depends on where it is sent.

    Attributes:
        who: which of the step's models is asked.
        path: CHAT or COMPLETIONS.
        body: the JSON of the request.
        seed: what tells the answers to one problem apart, whether `body` holds it or not.
    """

    who: Who
    path: str
    body: dict[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """Hash of all that decides the answer: a journaled answer is one to the very same request."""
        return sha256_json({"who": self.who, "path": self.path, "body": self.body, "seed": self.seed})


class BrokenAnswerError(ValueError):
    """What came back isn't an answer."""


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        content: the text; reasoning: the thinking, where the server gives it apart.
        finish_reason: `stop`, `length` (cut off), or what else the server said.
        prompt_tokens, completion_tokens: as the server counted them, None where it didn't.
        cost: as the server told it, None where it didn't.
        model: what the server calls the model that answered.
        tokens: each token; top: the likeliest ones in the place of each.
    """

    content: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None
    model: str
    tokens: list[Named] | None = None
    top: list[list[Named]] | None = None

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at the limit of tokens."""
        return self.finish_reason == "length"

    @property
    def text(self) -> str:
        """The whole answer: thinking that came apart, or without the mark that opens it, gets its <think>."""
        if self.reasoning.strip():
            thought = f"<think>\n{self.reasoning.strip()}"
            return f"{thought}\n</think>\n\n{self.content.strip()}" if self.content.strip() else thought
        head, closed, _ = self.content.partition("</think>")
        # Templates that end in <think> leave only its end in the answer.
        return f"<think>\n{self.content.lstrip()}" if closed and "<think>" not in head else self.content

    @property
    def silent(self) -> bool:
        """Whether nothing is said beyond the thinking."""
        return not self.content.rpartition("</think>")[2].strip()

    def to_json(self) -> dict[str, Any]:
        """For the journal."""
        value = {**vars(self), "tokens": None if self.tokens is None else _hex(self.tokens)}
        top = value.pop("top")
        return value if top is None else {**value, "top": [_hex(named) for named in top]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Answer:
        """From the journal."""
        tokens, top = value["tokens"], value.get("top")
        known = {
            "tokens": None if tokens is None else _from_hex(tokens),
            "top": None if top is None else [_from_hex(named) for named in top],
        }
        return Answer(**{**value, **known})


def read_answer(path: str, body: Any, model: str) -> Answer:
    """The answer that the response `body` to a request on `path` holds; `model` is what was asked for.

    Raises BrokenAnswerError when it holds none.
    """
    if not isinstance(body, dict):
        raise BrokenAnswerError(f"expected a JSON object, found {type(body).__name__}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        # Some routers answer 200 and put the upstream's error into the body.
        error = body.get("error")
        raise BrokenAnswerError(f"no `choices` in the answer{f', but {str(error)[:200]}' if error else ''}")
    choice = choices[0]
    content, reasoning = _said(choice) if path == CHAT else (_text(choice.get("text"), "text"), "")
    usage: dict[str, Any] = body["usage"] if isinstance(body.get("usage"), dict) else {}
    return Answer(
        content,
        reasoning,
        str(choice.get("finish_reason") or "stop"),
        _number(usage.get("prompt_tokens"), int),
        _number(usage.get("completion_tokens"), int),
        _number(usage.get("cost"), float),
        str(body.get("model") or model),
        read_tokens(_content(choice.get("logprobs"))),
        read_top(_content(choice.get("logprobs"))),
    )


def _hex(tokens: Sequence[Named]) -> list[list[Any]]:
    return [[None if raw is None else raw.hex(), logprob] for raw, logprob in tokens]


def _from_hex(tokens: Sequence[Sequence[Any]]) -> list[Named]:
    return [(None if raw is None else bytes.fromhex(raw), logprob) for raw, logprob in tokens]


def _said(choice: Mapping[str, Any]) -> tuple[str, str]:
    """(content, reasoning) of a chat answer."""
    message = choice.get("message")
    if not isinstance(message, dict):
        raise BrokenAnswerError("the answer has no `message`")
    content = message.get("content")
    if isinstance(content, list):  # the form with parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    reasoning = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")
    return _text(content, "content"), _text(reasoning, "reasoning")


def _text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BrokenAnswerError(f"`{what}` is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BrokenAnswerError(f"`{what}` holds half of a surrogate pair") from error
    return value


def _number(value: Any, kind: type) -> Any:
    return kind(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _content(logprobs: Any) -> Any:
    return logprobs.get("content") if isinstance(logprobs, dict) else None


def read_tokens(content: Any) -> list[Named] | None:
    """The tokens that the `content` of a chat answer's `logprobs` names; None where the server gave none.

    Raises BrokenAnswerError for what isn't tokens.
    """
    return [_named(token) for token in content] if isinstance(content, list) and content else None


def read_top(content: Any) -> list[list[Named]] | None:
    """The likeliest tokens in the place of each; None where the server gave none. Raises as `read_tokens`."""
    if not isinstance(content, list) or not all(isinstance(token, dict) for token in content):
        return None
    tops = [token.get("top_logprobs") or [] for token in content]
    if not any(tops):
        return None
    if not all(isinstance(top, list) for top in tops):
        raise BrokenAnswerError("`top_logprobs` is no list")
    return [[_named(token) for token in top] for top in tops]


def _named(token: Any) -> Named:
    try:
        return _bytes(token), float(token["logprob"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BrokenAnswerError(f"`logprobs` can't be read: {error!r}") from error


def _bytes(token: Mapping[str, Any]) -> bytes | None:
    raw, text = token.get("bytes"), token.get("token")
    if isinstance(raw, list):
        return bytes(raw)
    # A replacement character stands for a part of a character: which bytes they were is lost.
    return text.encode() if isinstance(text, str) and "\ufffd" not in text else None
