"""From a teacher's tokens to ours: the same bytes, the same token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.tokenizers.token_bytes import token_bytes
from sft.utils.errors import UserError

LEAST_SHARED = 0.9
"""Of a teacher's vocabulary that must be ours: below that two tokenizers cut hardly any text alike."""


class OwnVocabulary:
    """Ids of the tokenizer that is trained with, by the bytes that they spell."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises UserError for a tokenizer whose tokens needn't spell the very text."""
        spelled = token_bytes(tokenizer)
        if spelled is None:
            raise UserError(
                "top_logprobs: the tokenizer that is trained with isn't a byte-level one, so a teacher's tokens can't "
                "be told to be its own."
            )
        self._ids = {raw: number for number, raw in spelled.items()}

    def of_bytes(self, raw: bytes | None) -> int:
        """The token that spells `raw`; -1 where there is none."""
        return -1 if raw is None else self._ids.get(raw, -1)

    def table(self, teacher: Any, name: str) -> NDArray[np.int32]:
        """Our id (or -1) of each id of the tokenizer `teacher`, called `name`.

        Raises UserError for one that is no byte-level tokenizer, or of which hardly a token is ours.
        """
        spelled = token_bytes(teacher)
        if spelled is None:
            raise UserError(
                f"top_logprobs: {name} isn't a byte-level tokenizer, so its tokens can't be told to be ours."
            )
        table = np.full(max(spelled) + 1, -1, np.int32)
        for number, raw in spelled.items():
            table[number] = self.of_bytes(raw)
        words = list(token_bytes(teacher, added=False) or {})
        shared = float((table[words] >= 0).mean())
        if shared < LEAST_SHARED:
            raise UserError(
                f"top_logprobs: only {shared:.0%} of the tokens of {name} are tokens of the tokenizer that is trained "
                "with, so its teacher's distributions can't be learned from: take a teacher of the same vocabulary."
            )
        return table


def check_same_ids(own: Any, teacher: Any, name: str) -> None:
    """Raise UserError unless each token of `own` has the same id in the tokenizer `teacher`, called `name`."""
    theirs = teacher.get_vocab()
    others = [(number, token) for token, number in own.get_vocab().items() if theirs.get(token) != number]
    if others:
        number, token = min(others)
        there = theirs.get(token, "no token")
        raise UserError(
            f"top_logprobs: {name} has another vocabulary than the tokenizer that is trained with: {token!r} is "
            f"{number} here and {there} there. A teacher in this process reads our ids: serve this one, and let "
            "`generate` ask it with `top_logprobs`."
        )
