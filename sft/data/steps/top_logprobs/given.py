"""What a row says of a teacher's likeliest tokens, checked and in our vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.read.record import TeacherTokens, TopLogprobs
from sft.data.steps.generate.answer import BrokenAnswerError, Named, read_tokens, read_top
from sft.data.steps.score.teacher_tokens import NoMatchError, TeacherVocabulary
from sft.data.steps.top_logprobs.vocabulary import OwnVocabulary

ABOVE_ZERO = 1e-3  # of a log probability: rounding of a softmax in half precision
ABOVE_ONE = 1e-2  # of the probabilities of a place together
_LOWEST = float(np.finfo(np.float16).min)


class BadTopError(Exception):
    """Says what is wrong with a row's log probabilities."""


class NoTokenError(Exception):
    """Says which of the teacher's tokens is none of ours."""


def from_content(content: Any, own: OwnVocabulary) -> TeacherTokens:
    """From the `content` of an OpenAI answer's `logprobs`; tokens are told by their bytes, else by their text.

    Raises BadTopError and NoTokenError.
    """
    try:
        tokens, top = read_tokens(content), read_top(content)
    except BrokenAnswerError as error:
        raise BadTopError(str(error)) from error
    if tokens is None or top is None:
        raise BadTopError("there are no tokens with `top_logprobs`")
    return from_named(tokens, top, own)


def from_named(tokens: Sequence[Named], top: Sequence[Sequence[Named]], own: OwnVocabulary) -> TeacherTokens:
    """From tokens by their bytes (None: unknown), with their log probabilities.

    `tokens`: n, of the answer; what follows its text, such as the token that ends it, need not be ours. `top`: n lists.
    """
    written = np.array([own.of_bytes(raw) for raw, _ in tokens], np.int32)
    foreign = np.flatnonzero(written[:-1] < 0)
    if len(foreign):
        raise NoTokenError(f"{tokens[foreign[0]][0]!r} (token {foreign[0]}) is no token of the tokenizer")
    width = max([1, *map(len, top)])
    ids, logprobs = np.full((len(tokens), width), -1, np.int32), np.full((len(tokens), width), -np.inf)
    for place, named in enumerate(top):
        ids[place, : len(named)] = [own.of_bytes(raw) for raw, _ in named]
        logprobs[place, : len(named)] = [logprob for _, logprob in named]
    given = np.arange(width) < np.array([len(named) for named in top])[:, None]
    return TeacherTokens(written, _checked(ids, logprobs, given))


def from_ids(value: Any, teacher: TeacherVocabulary, table: NDArray[np.int32]) -> TeacherTokens:
    """From {tokens: n ids, ids: n lists of k, logprobs: n lists of k} of the teacher's vocabulary; -1 is no id.

    Args:
        table: our id of each of the teacher's, -1 where there is none.
    Raises:
        BadTopError, NoTokenError.
    """
    tokens, ids = (_numbers(value, key, dims, whole=True) for key, dims in (("tokens", 1), ("ids", 2)))
    logprobs = _numbers(value, "logprobs", 2, whole=False)
    if not len(tokens) or not len(tokens) == len(ids) or ids.shape != logprobs.shape or not ids.shape[1]:
        raise BadTopError(
            f"{len(tokens)} tokens, ids {ids.shape}, logprobs {logprobs.shape}: expected n, (n, k), (n, k)"
        )
    try:
        inside = np.concatenate([[], *teacher.stretches(tokens.tolist())]).astype(int)
    except NoMatchError as error:
        raise NoTokenError(str(error)) from error
    written = np.full(len(tokens), -1, np.int32)
    kept = np.union1d(inside, [len(tokens) - 1])  # the last one may be the token that ends the answer
    written[kept] = _mapped(tokens[kept], table)
    foreign = inside[(written[inside] < 0) & (inside < len(tokens) - 1)]
    if len(foreign):
        raise NoTokenError(f"the teacher's token {tokens[foreign[0]]} is no token of the tokenizer")
    given = ids >= 0
    return TeacherTokens(written, _checked(_mapped(ids, table), logprobs, given))


def _numbers(value: Any, key: str, dims: int, *, whole: bool) -> NDArray[Any]:
    try:
        array = np.array(value[key])
    except (KeyError, TypeError, ValueError) as error:
        raise BadTopError(f"`{key}` is missing, or no list of numbers of one length") from error
    if array.size and (array.ndim != dims or array.dtype.kind not in ("iu" if whole else "iuf")):
        raise BadTopError(f"`{key}` holds {array.dtype} in {array.ndim} dimensions, expected numbers in {dims}")
    if array.size and whole and not -1 <= array.min() <= array.max() < 1 << 31:
        raise BadTopError(f"`{key}` holds {array.min()} to {array.max()}, which are no token ids")
    return array.reshape(len(array), -1) if dims == 2 else array.reshape(-1)


def _mapped(ids: NDArray[Any], table: NDArray[np.int32]) -> NDArray[np.int32]:
    known = (ids >= 0) & (ids < len(table))
    return np.where(known, table[np.where(known, ids, 0)], -1).astype(np.int32)


def _checked(ids: NDArray[np.int32], logprobs: NDArray[Any], given: NDArray[np.bool_]) -> TopLogprobs:
    """As it is stored. `given` (n, k): what the teacher names, in our vocabulary or not: all of it is its mass."""
    values = np.where(given, logprobs.astype(np.float64), -np.inf)
    wrong = given & ~(np.isfinite(values) & (values <= ABOVE_ZERO))
    if wrong.any():
        place, at = np.argwhere(wrong)[0]
        raise BadTopError(f"{logprobs[place, at]} at token {place} is no log probability")
    mass = np.exp(values).sum(1)
    if (mass > 1 + ABOVE_ONE).any():
        raise BadTopError(f"the probabilities at token {int(mass.argmax())} come to {mass.max():.4f}")
    ids = np.where(given, ids, -1)
    ordered = np.sort(np.where(ids >= 0, ids, -1 - np.arange(ids.shape[1])), axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if twice.any():
        raise BadTopError(f"a token is named twice at token {int(twice.argmax())}")
    return stored(ids, values)


def stored(ids: NDArray[np.int32], logprobs: NDArray[Any]) -> TopLogprobs:
    """As they are kept: half precision, whose range holds every log probability but for the least, which are cut."""
    return TopLogprobs(ids, np.where(ids >= 0, logprobs.clip(_LOWEST, 0), 0).astype(np.float16))
