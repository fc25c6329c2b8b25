"""Where a teacher's tokens stand in an answer: their text is laid over it, whatever vocabulary they come from.

A teacher writes control tokens that the answer doesn't hold (gpt-oss its harmony format, others an end of text), and
its thinking and its answer come as separate pieces that a data set has put together with `<think>` tags. So the ids
are cut at control tokens and tags, and the text of each piece must follow in the answer, with nothing but white space
and tags between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Control tokens of gpt-oss (o200k_harmony) that also end what is said or say what comes next. The base vocabulary below
# them is o200k's, as in Phi-4-mini.
HARMONY = {200002: "<|return|>", 200003: "<|constrain|>", 200005: "<|channel|>", 200006: "<|start|>"}
HARMONY |= {200007: "<|end|>", 200008: "<|message|>", 200012: "<|call|>"}
_HEADER = frozenset(
    ["<|start|>", "<|channel|>", "<|constrain|>"]
)  # a role or a channel's name follows, up to <|message|>
_TAG = re.compile(r"</?think>")
_TAGS = re.compile(r"(?:\s|</?think>)*")


class NoMatchError(Exception):
    """The tokens don't spell the answer; the message says where they part."""


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Tokens of a text: [starts, ends) in characters, each (n,) int64, and their natural log probabilities (n,).

    `starts` is a token's first character that is no space, where it has one: ` The` belongs to the word's sentence.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    logprobs: NDArray[np.float64]


def place_tokens(spans: NDArray[np.int64], logprobs: NDArray[np.float64], text: str) -> TextTokens:
    """Tokens that cover `spans` (n, 2) of `text`."""
    spaces = np.fromiter((character.isspace() for character in text), bool, len(text))
    places = np.where(spaces, len(text), np.arange(len(text)))
    following = np.append(np.minimum.accumulate(places[::-1])[::-1], len(text))
    starts, ends = spans[:, 0], spans[:, 1]
    first = following[np.minimum(starts, len(text))]
    return TextTokens(np.where(first < ends, first, starts), ends, logprobs)


class TeacherVocabulary:
    """What a teacher's token ids mean."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._known = set(self._backend.get_vocab(with_added_tokens=True).values())
        added = tokenizer.added_tokens_decoder
        self._control = {number: token.content for number, token in added.items() if token.special}

    def align(self, ids: Sequence[int], logprobs: Sequence[float], text: str) -> tuple[TextTokens, NDArray[np.bool_]]:
        """(the tokens that stand in `text`, which of its characters they cover (len(text),)).

        Control tokens, `<think>` tags, and white space around both are left out.
        Raises NoMatchError when the tokens don't spell the text.
        """
        covered = np.zeros(len(text), bool)
        spans, kept, position = [np.zeros((0, 2), np.int64)], [np.zeros(0)], 0
        values = np.asarray(logprobs, np.float64)
        for stretch in self.stretches(ids):
            said, own = self._decoded([ids[index] for index in stretch])
            for start, end in _bodies(said):
                position = _found(text, said[start:end], position)
                inside = (own[:, 0] < end) & (own[:, 1] > start)
                spans.append(own[inside].clip(start, end) + (position - start))
                kept.append(values[stretch][inside])
                covered[position : position + end - start] = True
                position += end - start
        rest = _after(_TAGS, text, position)
        if rest < len(text):
            raise NoMatchError(f"the tokens end where the answer goes on: {text[rest : rest + 40]!r}")
        return place_tokens(np.concatenate(spans), np.concatenate(kept), text), covered

    def stretches(self, ids: Sequence[int]) -> list[list[int]]:
        """Indices of the tokens between control tokens, without those that name a role or a channel.

        Raises NoMatchError for an id that isn't the teacher's.
        """
        stretches: list[list[int]] = [[]]
        in_header = False
        for index, number in enumerate(ids):
            control = self._control_name(number)
            if control is not None:
                in_header = control in _HEADER
                stretches.append([])
            elif not in_header:
                stretches[-1].append(index)
        return stretches

    def _control_name(self, number: int) -> str | None:
        if number in self._control:
            return self._control[number]
        if number in self._known:
            return None
        if number not in HARMONY:
            raise NoMatchError(f"the id {number} is no token of the teacher's vocabulary")
        return HARMONY[number]

    def _decoded(self, ids: Sequence[int]) -> tuple[str, NDArray[np.int64]]:
        """The text of `ids` and each token's characters (n, 2); tokens that hold parts of one character share it."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        said: list[str] = []
        spans: list[tuple[int, int]] = []
        position = waiting = 0
        for number in ids:
            waiting += 1
            piece = stream.step(self._backend, int(number))
            if piece is not None:
                spans += [(position, position + len(piece))] * waiting
                said.append(piece)
                position, waiting = position + len(piece), 0
        spans += [(position, position)] * waiting
        return "".join(said), np.array(spans, np.int64).reshape(-1, 2)


def _bodies(said: str) -> Iterator[tuple[int, int]]:
    """[start, end) of what is said between tags, without white space around it."""
    start = 0
    for tag in [*_TAG.finditer(said), None]:
        piece = said[start : tag.start() if tag else len(said)]
        if body := piece.strip():
            first = start + len(piece) - len(piece.lstrip())
            yield first, first + len(body)
        start = tag.end() if tag else start


def _found(text: str, body: str, position: int) -> int:
    """Where `body` stands in `text`: after white space and tags from `position` on."""
    start = _after(_TAGS, text, position)
    if text.startswith(body, start):
        return start
    same = 0
    while text[start + same : start + same + 1] == body[same : same + 1] != "":
        same += 1
    raise NoMatchError(
        f"at character {start + same} the answer has {text[start + same : start + same + 30]!r}, "
        f"the tokens {body[same : same + 30]!r}"
    )


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
