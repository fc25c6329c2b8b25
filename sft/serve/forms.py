"""What answers look like to the API's clients: whole, and in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sft.generate.requests import TokenLogprobs
from sft.generate.streaming import Piece
from sft.generate.text import TextStream, Thinking
from sft.serve.jobs import Job
from sft.tokenizers.token_bytes import token_bytes


class Vocabulary:
    """How tokens are written beside their log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] | None = None
        self._asked = False

    def spelled(self, token: int) -> tuple[str, bytes]:
        """A token's text and bytes."""
        if not self._asked:
            self._bytes, self._asked = token_bytes(self._tokenizer), True
        raw = None if self._bytes is None else self._bytes.get(token)
        if raw is None:
            text = str(self._tokenizer.decode([token]))
            return text, text.encode()
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            # A part of a character, written as the API does: two such tokens aren't the same.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class Choice:
    """One answer on its way to a client: its text in parts, and in the end the whole."""

    def __init__(self, index: int, job: Job, tokenizer: Any) -> None:
        self.index = index
        skip = job.asked.skip_special_tokens is not False
        self._thinking_to = job.thinking
        self._text = TextStream(tokenizer, job.asked.stops, skip_special_tokens=skip)
        self._thinking = Thinking(opened=job.opened) if job.chat and job.thinking != "text" else None
        self.tokens = 0
        self.content, self.thought = "", ""
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None

    def take(self, piece: Piece) -> tuple[str, str]:
        """(thinking, text) that a piece adds."""
        self.tokens += len(piece.ids)
        if piece.end is None:
            text = self._text.add(piece.ids)
        else:
            self.finish_reason = piece.end.finish_reason
            text = self._text.finish(piece.ids, piece.end.stop)
        if self._thinking is None:
            return "", text
        parts = self._thinking.add(text)
        if piece.end is not None:
            parts += self._thinking.finish()
        thought = "".join(part for kind, part in parts if kind == "thought") if self._thinking_to == "field" else ""
        return thought, "".join(part for kind, part in parts if kind == "answer")

    def keep(self, piece: Piece) -> None:
        """Take a piece for the whole answer."""
        thought, text = self.take(piece)
        self.thought += thought
        self.content += text
        self.ids += piece.ids
        self.logprobs += piece.logprobs


class Forms:
    """The answers to one job."""

    def __init__(self, job: Job, name: str, vocabulary: Vocabulary) -> None:
        self.job, self.name, self.vocabulary = job, name, vocabulary
        self.id = f"{'chatcmpl' if job.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The response to a request that isn't streamed."""
        return {**self._head(""), "choices": [self._choice(one) for one in choices], "usage": self.usage(choices)}

    def begin(self, index: int) -> dict[str, Any]:
        """What a choice of a chat begins with."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        """What a choice has grown by; None where that is nothing that can be told."""
        thought, text = choice.take(piece)
        logprobs = self._logprobs(choice.index, piece.ids, piece.logprobs)
        if not (thought or text or logprobs or choice.finish_reason):
            return None
        if not self.job.chat:
            return self._chunk(choice.index, {"text": text, "logprobs": logprobs}, choice.finish_reason)
        delta = {name: value for name, value in (("reasoning_content", thought), ("content", text)) if value}
        return self._chunk(choice.index, {"delta": delta, "logprobs": logprobs}, choice.finish_reason)

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What a stream ends with that tells the numbers of tokens."""
        return {**self._head(".chunk"), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Numbers of tokens; a prompt counts once, however many answers it gets."""
        prompt, answers = sum(map(len, self.job.prompts)), sum(choice.tokens for choice in choices)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.job.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self.job.include_usage else {}
        return {**self._head(".chunk"), "choices": [{"index": index, **content, "finish_reason": reason}], **usage}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.index, choice.ids, choice.logprobs)
        end = {"logprobs": logprobs, "finish_reason": choice.finish_reason}
        if not self.job.chat:
            return {"index": choice.index, "text": choice.content, **end}
        message: dict[str, Any] = {"role": "assistant", "content": choice.content}
        if self.job.thinking == "field":
            message["reasoning_content"] = choice.thought or None
        return {"index": choice.index, "message": message, **end}

    def _logprobs(self, index: int, ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        pairs = list(zip(ids, logprobs, strict=True))
        if self.job.chat:
            return {
                "content": [
                    {
                        **self._named(token, of.token),
                        "top_logprobs": [self._named(*one) for one in of.top.items()],
                    }
                    for token, of in pairs
                ],
                "refusal": None,
            }
        tokens = [self.vocabulary.spelled(token)[0] for token in ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
        # The API tells the token's own beside the likeliest, whether it is one of them or not.
        every = [{**of.top, token: of.token} for token, of in pairs]
        top = [{self.vocabulary.spelled(one)[0]: _finite(value) for one, value in likely.items()} for likely in every]
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(of.token) for _, of in pairs],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.vocabulary.spelled(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; the API's number in its place."""
    return max(logprob, -9999.0)


def event(value: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
