"""From the tokens that an endpoint names by their bytes to the ids of our tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.tokenizers.token_bytes import token_bytes


class TokenMap:
    """Ids of a byte-level tokenizer by the bytes of the tokens. Added tokens aren't among them: they stand for no text.

    Two vocabularies needn't be the same for this: it is enough that each token of an answer is one of ours.
    """

    def __init__(self, tokenizer: Any) -> None:
        found = token_bytes(tokenizer, added=False)
        self._byte_level = found is not None
        self._ids = {spelled: number for number, spelled in (found or {}).items()}

    def ids(self, tokens: Sequence[tuple[bytes | None, float]], text: str) -> tuple[list[int], list[float]] | str:
        """Ids and log probabilities of the tokens that spell `text`, or one sentence why there are none.

        Tokens after the text (which end the turn) are left out.
        """
        if not self._byte_level:
            return "the tokenizer isn't a byte-level one"
        wanted, at = text.encode(), 0
        ids: list[int] = []
        for raw, _ in tokens:
            if at == len(wanted):
                break
            if raw is None:
                return f"the server doesn't tell the bytes of token {len(ids)}"
            if not wanted.startswith(raw, at) or not raw:
                return f"the server's tokens spell another text than the answer from byte {at} on"
            if raw not in self._ids:
                return f"{raw!r} is no token of the tokenizer"
            ids.append(self._ids[raw])
            at += len(raw)
        if at < len(wanted):
            return f"the server's tokens end at byte {at} of the answer's {len(wanted)}"
        return ids, [logprob for _, logprob in tokens[: len(ids)]]
