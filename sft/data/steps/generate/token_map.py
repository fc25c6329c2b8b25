"""From the tokens that an endpoint names by their bytes to the ids of our tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TokenMap:
    """Ids of a byte-level tokenizer by the bytes of the tokens. Added tokens aren't among them: they stand for no text.

    Two vocabularies needn't be the same for this: it is enough that each token of an answer is one of ours.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        self._byte_level = b'"ByteLevel"' in backend.decoder.__getstate__()
        self._ids: dict[bytes, int] = {}
        if self._byte_level:
            byte_of = _byte_of_character()
            vocabulary = backend.get_vocab(with_added_tokens=False)
            self._ids = {bytes(byte_of[character] for character in token): id for token, id in vocabulary.items()}

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


def _byte_of_character() -> dict[str, int]:
    """What byte each character of a byte-level vocabulary stands for (Radford et al. 2019, GPT-2's encoder.py):
    printable ones for themselves, the others, in order, for 256 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
